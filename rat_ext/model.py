"""A small language model of RAT layers: enough to train, prefill and decode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache import RATCache
from .layers import Linear, RATLayer


class Embedding(nn.Embedding):
    """Normal weights of deviation ``std``. Numbers ``(...)`` give their rows; vectors ``(..., d_model)`` give logits.

    A head that shares the weights is this module called again, not a second module: no wrapper can pull the two apart, and
    those that gather or load weights around a module's call do so for both.
    """

    std: float = 1.0

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class SwiGLU(nn.Module):
    """``(..., d_model) -> (..., d_model)``: ``down(silu(gate) * up)``, gate and up from one projection."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: RAT, then a SwiGLU MLP."""

    def __init__(self, layer: RATLayer, d_model: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.rat, self.mlp = layer, SwiGLU(d_model, hidden)

    def forward(
        self,
        x: Tensor,
        state: RATCache | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, RATCache | None]:
        """x of shape ``(B, d_model)`` is one new token per sequence, which updates ``state`` in place."""
        if x.dim() == 2:
            y, state = self.rat(self.norm1(x), cache=state, slots=slots), None
        else:
            y = self.rat(self.norm1(x), state, return_state, cu_seqlens)
            y, state = y if return_state else (y, None)
        x = x + y
        return x + self.mlp(self.norm2(x)), state


class RATLM(nn.Module):
    """Embedding, blocks of :class:`rat_ext.layers.RATLayer` and a SwiGLU MLP, RMSNorm, head.

    Args:
        vocab_size: V.
        d_model: width; hidden width of the MLPs is 8/3 of it, rounded up to a multiple of 8, unless ``hidden`` is
            given.
        num_layers: blocks.
        num_heads, num_groups, chunk_size, max_length: of every RAT layer.
        tie_embeddings: the head is the embedding, called with vectors.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        num_groups: int,
        chunk_size: int,
        *,
        hidden: int | None = None,
        max_length: int = 2048,
        tie_embeddings: bool = True,
    ):
        super().__init__()
        hidden = hidden or -(-d_model // 3) * 8
        self.embedding = Embedding(vocab_size, d_model)
        blocks = [
            Block(RATLayer(d_model, num_heads, num_groups, chunk_size, max_length=max_length), d_model, hidden)
            for _ in range(num_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model)
        for block in blocks:  # the sum over blocks starts with the variance of one
            for linear in (block.rat.out_proj, block.mlp.down):
                linear.std = linear.in_features**-0.5 * (2 * num_layers) ** -0.5
        if tie_embeddings:
            self.embedding.std = 0.02
        else:
            head = Linear(d_model, vocab_size, bias=False)
            head.std = 0.02
            self._modules["head"] = head
        self.reset_parameters()

    @property
    def head(self) -> nn.Module:
        """What makes logits ``(..., V)`` of vectors ``(..., d_model)``: the embedding, where it is tied."""
        return cast(nn.Module, self._modules.get("head", self.embedding))

    def reset_parameters(self) -> None:
        """Draws every parameter anew: what each module's own ``reset_parameters`` does."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                cast(Callable[[], None], module.reset_parameters)()

    def forward(
        self,
        tokens: Tensor,
        caches: Sequence[RATCache | None] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        *,
        slots: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[RATCache]]:
        """Logits of the next token at every position; or, for tokens ``(B,)``, after one new token per sequence.

        Args:
            tokens: ``(B, T)`` int64; or ``(B,)``, which updates ``caches`` in place and has no gradient.
            caches: one state per layer to continue from.
            return_state: also return the states after the last token, one per layer.
            cu_seqlens: ``(N + 1,)`` int32: sequences packed in one row, B = 1.
            slots: ``(B,)`` int64, of one new token: entries of the caches, -1 to skip a row. None: row b is entry b.

        Returns:
            ``(B, T, V)`` or ``(B, V)``; with ``return_state``, that and a list of :class:`rat_ext.RATCache`.
        """
        decoding = tokens.dim() == 1
        if decoding and (caches is None or return_state or cu_seqlens is not None):
            raise ValueError(
                "RATLM: tokens: expected shape (B, T), or (B,) with caches and without return_state and cu_seqlens, got "
                f"{tuple(tokens.shape)}"
            )
        if slots is not None and not decoding:
            raise ValueError(f"RATLM: slots: expected with tokens of shape (B,), got tokens of shape {tuple(tokens.shape)}")
        if caches is None:
            caches = [None] * len(self.blocks)
        if len(caches) != len(self.blocks):
            raise ValueError(f"RATLM: caches: expected one for each of the {len(self.blocks)} layers, got {len(caches)}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoding):
            x = self.embedding(tokens)
            states = []
            for block, cache in zip(self.blocks, caches, strict=True):
                x, state = block(x, cache, return_state, cu_seqlens, slots)
                states.append(state)
            logits = self.head(self.norm(x))
        return (logits, states) if return_state else logits

    @torch.no_grad()
    def step(self, tokens: Tensor, caches: Sequence[RATCache], slots: Tensor | None = None) -> Tensor:
        """Logits ``(B, V)`` after one more token ``(B,)`` per sequence; updates the caches in place."""
        return self(tokens, caches, slots=slots)

    def new_caches(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> list[RATCache]:
        """Empty caches, one per layer: see :meth:`rat_ext.layers.RATLayer.new_cache`."""
        return [cast(Block, block).rat.new_cache(batch, max_length, dtype) for block in self.blocks]

    def generate(self, prompt: Tensor, max_new_tokens: int, **options) -> Tensor | tuple[Tensor, Tensor]:
        """:func:`generate` by this model."""
        return generate(self, prompt, max_new_tokens, **options)


@torch.no_grad()
def generate(
    model: Callable,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    return_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Continues ``prompt``: one forward over it (prefill), then one decode step per token.

    Args:
        model: a :class:`RATLM`, or what wraps one (FSDP, DDP, ``torch.compile``): it is only called.
        prompt: ``(B, T)`` int64, T >= 1.
        max_new_tokens: n, at least 1.
        temperature: of the softmax that tokens are drawn from; 0 takes the most likely one.
        top_k: draw from the k most likely tokens only.
        generator: source of randomness, on the device of the model.
        return_logits: also return the logits that each new token was drawn from.

    Returns:
        ``(B, T + n)``; with ``return_logits``, that and ``(B, n, V)``.
    """
    if prompt.dim() != 2 or prompt.shape[1] < 1 or max_new_tokens < 1:
        raise ValueError(
            "RATLM.generate: prompt, max_new_tokens: expected (B, T) with T >= 1 and n >= 1, got "
            f"{tuple(prompt.shape)} and {max_new_tokens}"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"RATLM.generate: temperature: expected at least 0, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"RATLM.generate: top_k: expected at least 1 or None, got {top_k}")
    logits, caches = model(prompt, return_state=True)
    caches = [cache.reserve(prompt.shape[1] + max_new_tokens) for cache in caches]
    tokens, seen, logits = [prompt], [], logits[:, -1]
    for i in range(max_new_tokens):
        if i:
            logits = model(tokens[-1][:, 0], caches)
        seen.append(logits)
        tokens.append(_draw(logits, temperature, top_k, generator))
    result = torch.cat(tokens, dim=1)
    return (result, torch.stack(seen, dim=1)) if return_logits else result


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token ``(B, 1)`` from logits ``(B, V)``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, kept = logits.float(), None
    if top_k is not None:
        logits, kept = logits.topk(min(top_k, logits.shape[-1]))
    # The largest becomes 0, and the temperature a float32 that is neither 0 nor inf: no inf - inf, no 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, 1e-30), 1e30)
    token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return token if kept is None else kept.gather(-1, token)
