"""What torchtitan asks of a model: a class that its configuration builds, flavours, a loss, names for Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from ...models import RATConfig, RATForCausalLM
from ...models.loss import IGNORED
from ...parallel import share_copies
from .. import flops
from .parallelize import parallelize


class RATDecoder(BaseModel):
    """The modules of :class:`rat_ext.models.RATForCausalLM`, with its names of weights, behind torchtitan's interface."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """``rat``: sizes and layers."""

        rat: RATConfig

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Checks the run's configuration against the model; there is nothing to take from it."""
            parallelism = config.parallelism
            ranks, rat = parallelism.tensor_parallel_degree, self.rat

            def expect(right: bool, argument: str, expected: str, got: object) -> None:
                if not right:
                    raise ValueError(f"rat_ext.train.titan: {argument}: expected {expected}, got {got}")

            backend, balancer = parallelism.spmd_backend, parallelism.context_parallel_load_balancer
            expect(backend == "partial_dtensor", "parallelism.spmd_backend", "partial_dtensor", backend)
            if parallelism.context_parallel_degree > 1:
                argument = "parallelism.context_parallel_load_balancer"
                expect(balancer == "headtail", argument, "headtail, an early and a late piece for each rank", balancer)
            if ranks > 1:
                argument, sequence = "parallelism.tensor_parallel_degree", parallelism.enable_sequence_parallel
                heads, groups = rat.num_attention_heads, rat.num_groups
                expect(heads % ranks == 0, argument, f"a divisor of num_attention_heads = {heads}", ranks)
                if "rat" in rat.layer_types:
                    sizes = f"a divisor or a multiple of num_groups = {groups}"
                    expect(not (groups % ranks and ranks % groups), argument, sizes, ranks)
                expect(not sequence, "parallelism.enable_sequence_parallel", "False", sequence)
                checkpoint = getattr(config, "checkpoint", None)
                for name in ("initial_load_in_hf", "last_save_in_hf"):  # rows of projections are in the order of ranks
                    value = getattr(checkpoint, name, False)
                    expect(not value, f"checkpoint.{name}", "False beside tensor parallelism", value)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """(parameters, FLOP per token of forward and backward)."""
            return flops.parameters(self.rat)[0], round(flops.flops_per_token(self.rat, seq_len))

    _skip_lm_head = False  # set by the trainer, where the loss calls the head

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        whole = RATForCausalLM(config.rat)
        self.model: Any = whole.model
        self.lm_head: Any = whole.lm_head
        self._tie()

    def _tie(self) -> None:
        if self.config.rat.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's blocks."""
        return self.model.layers

    def verify_module_protocol(self) -> None:
        """Nothing: the modules are those of rat_ext.models, which initialise themselves."""

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Draws all weights as the models do. There are no buffers."""
        self._tie()  # of meta tensors each module's was made real by itself
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        share_copies(self)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of ``tokens`` ``(B, T)``, or hidden states where the loss calls the head.

        ``positions`` are not used: documents of a row run into each other, as in the paper.
        """
        x = self.model(input_ids=tokens, use_cache=False, return_dict=True).last_hidden_state
        return x if self._skip_lm_head else self.lm_head(x)


class HeadLoss(ChunkedLossWrapper):
    """Cross-entropy through the head: the logits of a piece of the tokens are there at a time, never those of all.

    One call of the head, and its gradients are computed along with the loss. It takes any number of tokens.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, *, compile_config: Any = None):
        self.lm_head = None

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over this rank's labels of hidden states ``pred``, by the tokens of all ranks where they are given."""
        head = self.lm_head
        assert head is not None
        labels = labels.flatten()
        if getattr(head, "_distribute_module_applied", False):  # tensor parallelism: only the module knows its logits
            total = F.cross_entropy(head(pred).flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum")
        else:
            total, _ = head(pred, labels)
        return total if global_valid_tokens is None else total / global_valid_tokens, {}


class HuggingFaceNames(StateDictAdapter):
    """Names are those of RATForCausalLM; a tied head is not stored."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state as ``RATForCausalLM.from_pretrained`` reads it."""
        tied = self.model_config.rat.tie_word_embeddings
        return {name: x for name, x in state_dict.items() if not (tied and name == "lm_head.weight")}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state as the model names it."""
        if not self.model_config.rat.tie_word_embeddings:
            return hf_state_dict
        return hf_state_dict | {"lm_head.weight": hf_state_dict["model.embed_tokens.weight"]}


# Of debug, what a CPU trains in seconds.
FLAVORS: dict[str, dict[str, Any]] = {
    "debug": {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "sliding_window": 24},
    "200m": {"preset": "200m"},
    "1.3b": {"preset": "1.3b"},
    "7b": {"preset": "7b"},
}


def model_registry(flavor: str, pattern: str = "rat", **changes: Any) -> ModelSpec:
    """What torchtitan's Trainer is given: a flavour of :data:`FLAVORS`, its pattern of layers, and changes of a RATConfig."""
    sizes = dict(FLAVORS[flavor])
    preset = sizes.pop("preset", None)
    given = {"layer_types": pattern} | sizes | changes
    rat = RATConfig(**given) if preset is None else RATConfig.preset(preset, **{"pattern": given.pop("layer_types")}, **given)
    return ModelSpec(
        name="rat_ext", flavor=f"{flavor} {pattern}", model=RATDecoder.Config(rat=rat), parallelize_fn=parallelize,
        pipelining_fn=None, post_optimizer_build_fn=None, state_dict_adapter=HuggingFaceNames,
    )  # fmt: skip
