"""The configuration of the paper's models."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LAYER_TYPES = ("rat", "attention", "sliding_attention", "rnn")

# Even layers, odd layers.
PATTERNS = {
    "rat": ("rat", "rat"),
    "attention": ("attention", "attention"),
    "rnn": ("rnn", "rnn"),
    "rat-swa": ("rat", "sliding_attention"),
    "attention-swa": ("attention", "sliding_attention"),
}

PRESETS = {
    "200m": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def wrong(argument: str, expected: str, got: object) -> ValueError:
    """The error for a value of the configuration."""
    return ValueError(f"rat_ext.RATConfig: {argument}: expected {expected}, got {got!r}")


def _finite(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


@strict
class RATConfig(PreTrainedConfig):
    """Sizes and layers of a :class:`RATModel`. The defaults are the authors' 1.3B RAT model.

    Args:
        vocab_size: V.
        hidden_size: d_model; heads have size ``hidden_size / num_attention_heads``, a multiple of 8 up to 256.
        num_hidden_layers: layers.
        num_attention_heads: H, of every layer.
        num_groups: G, heads of queries and keys of RAT layers; divides H. Attention has H of each.
        intermediate_size: width of the feed-forward. None: 4 d_model; with SwiGLU 8/3 of it, rounded up to a multiple of 8.
        layer_types: what each layer is: "rat", "attention", "sliding_attention" or "rnn"; or the name of a pattern: "rat",
            "attention", "rnn", "rat-swa", "attention-swa" (even layers RAT or attention, odd layers a sliding window).
        chunk_size: L, tokens in a chunk of RAT layers: one number, or one for each layer (those of other layers are not used).
        sliding_window: W; token i of a sliding-window layer sees token j where ``0 <= i - j <= W``.
        hidden_act: "gelu" (exact), or "swiglu" for a gated feed-forward.
        rms_norm_eps: of every norm.
        rope_theta: base of the rotary frequencies: by chunk index in RAT layers, by token in attention. None: no rotation.
        max_position_embeddings: tokens that the model is trained for. It bounds nothing; the gates of RNN layers start with
            time scales up to it.
        initializer_range: deviation of the normal weights.
        tie_word_embeddings: the head's weight is the embedding's.
        logits_with_loss: also return logits where ``labels`` are given to a model in training mode. They are (B, T, V); the
            loss needs them in pieces only.
    """

    model_type = "rat"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_key_value_heads": "num_attention_heads"}

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_groups: int = 2
    intermediate_size: int | None = None
    layer_types: Any = "rat"
    chunk_size: Any = 16
    sliding_window: int = 1024
    hidden_act: str = "gelu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = 10000.0
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    logits_with_loss: bool = False
    bos_token_id: Any = None
    eos_token_id: Any = None
    pad_token_id: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.layer_types, str):
            if self.layer_types not in PATTERNS:
                raise wrong("layer_types", f"a pattern of {', '.join(PATTERNS)}, or a list", self.layer_types)
            self.layer_types = [PATTERNS[self.layer_types][i % 2] for i in range(self.num_hidden_layers)]
        if self.intermediate_size is None:
            swiglu = self.hidden_act == "swiglu"
            self.intermediate_size = -(-self.hidden_size // 3) * 8 if swiglu else 4 * self.hidden_size
        self._check()
        kinds = list(self.layer_types)
        super().__post_init__(**kwargs)
        self.layer_types = kinds  # transformers takes "attention" for an old name of a kind of its own

    def validate_layer_type(self) -> None:
        """In place of the check against the layers that transformers has."""
        self._check()

    def _check(self) -> None:
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_groups",
            "intermediate_size",
        ):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise wrong(name, "an int of at least 1", getattr(self, name))
        if self.hidden_size % heads or self.hidden_size // heads not in range(8, 257, 8):
            sizes = "heads of a size hidden_size / num_attention_heads that is a multiple of 8 up to 256"
            raise wrong("num_attention_heads", f"{sizes} for hidden_size = {self.hidden_size}", heads)
        if heads % self.num_groups:
            raise wrong("num_groups", f"a divisor of num_attention_heads = {heads}", self.num_groups)
        kinds = self.layer_types
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in LAYER_TYPES for kind in kinds):
            raise wrong("layer_types", f"one of {', '.join(LAYER_TYPES)} for each of the {layers} layers", kinds)
        lengths = self.chunk_sizes
        if len(lengths) != layers or any(type(length) is not int or length < 1 for length in lengths):
            raise wrong("chunk_size", f"a number from 1 on, or a list of {layers} of them", self.chunk_size)
        if type(self.sliding_window) is not int or self.sliding_window < 0:
            raise wrong("sliding_window", "an int of at least 0", self.sliding_window)
        if type(self.max_position_embeddings) is not int or self.max_position_embeddings < 1:
            raise wrong("max_position_embeddings", "an int of at least 1", self.max_position_embeddings)
        for name in ("rms_norm_eps", "initializer_range"):
            if not _finite(getattr(self, name)) or getattr(self, name) < 0:
                raise wrong(name, "a finite number of at least 0", getattr(self, name))
        if self.hidden_act not in ("gelu", "swiglu"):
            raise wrong("hidden_act", "gelu or swiglu", self.hidden_act)
        if self.rope_theta is not None and (not _finite(self.rope_theta) or self.rope_theta <= 0):
            raise wrong("rope_theta", "a finite number above 0, or None", self.rope_theta)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def chunk_sizes(self) -> list[int]:
        """L of each layer."""
        return self.chunk_size if isinstance(self.chunk_size, list) else [self.chunk_size] * self.num_hidden_layers

    @classmethod
    def preset(cls, size: str, pattern: str = "rat", **changes: Any) -> RATConfig:
        """One of three sizes: "200m", "1.3b" (the paper's), "7b"; ``pattern`` as of ``layer_types``, ``changes`` by argument.

        Example:
            >>> from rat_ext.models import RATConfig
            >>> config = RATConfig.preset("1.3b", "rat-swa", max_position_embeddings=8192)
            >>> config.hidden_size, config.layer_types[:2]
            (2048, ['rat', 'sliding_attention'])
        """
        if size not in PRESETS:
            raise wrong("preset", f"one of {', '.join(PRESETS)}", size)
        return cls(**PRESETS[size] | {"layer_types": pattern} | changes)
