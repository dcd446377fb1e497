"""How a model is spread over ranks: heads, rows, checkpoints of blocks, torch.compile, FSDP2; in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.distributed.fsdp import (
    disable_fsdp_gradient_division,
    enable_fsdp_symm_mem,
    get_fsdp_reshard_after_forward_policy,
)
from torchtitan.distributed.tensor_parallel import NoParallel

from ...parallel import ContextParallel, parallelize_plan, save_attention, use_context_parallel


class SaveAttention(SelectiveAC):
    """Activation checkpoints that keep what the ops of rat_ext gave, and compute everything else again."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        """As of SelectiveAC; ``force_recompute_mm_shapes_by_fqns`` is not used: all products are computed again."""

    def _wrap_block(self, module: nn.Module, *, base_fqn: str | None = None) -> nn.Module:
        config = self.config
        return checkpoint_wrapper(
            module, context_fn=save_attention, preserve_rng_state=config.preserve_rng_state,
            determinism_check=config.determinism_check, early_stop=False, debug=config.debug,
        )  # fmt: skip


def parallelize(
    model: Any,
    *,
    parallel_dims: ParallelDims,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> nn.Module:
    """A :class:`RATDecoder` on the meta device, in place. What torchtitan's Trainer calls."""
    if parallel_dims.tp_enabled:
        _split_heads(model, parallel_dims.get_mesh("tp"))
    if parallel_dims.cp_enabled:
        # The pieces of torchtitan's "headtail" are those of ContextParallel where they are of one length.
        use_context_parallel(model, ContextParallel(parallel_dims.get_mesh("cp"), tokens=training.seq_len))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        for layer in model.layers:
            # Context parallelism waits for transfers: the graph breaks around the op.
            layer.compile(backend=compile_config.backend, fullgraph=not parallel_dims.cp_enabled)
    _shard(model, parallel_dims, training, parallelism)
    return model


def _split_heads(model: Any, mesh: Any) -> None:
    plan = parallelize_plan(model)
    # Replicated, but on the mesh as well: clipping and AdamW take tensors of one mesh.
    for name, module in model.named_modules():
        if isinstance(module, (nn.RMSNorm, nn.Embedding)) or module is model.lm_head:
            plan[name] = NoParallel(use_local_output=True)
    parallelize_module(model, mesh, plan)
    model._tie()


def _shard(model: Any, parallel_dims: ParallelDims, training: Any, parallelism: Any) -> None:
    """FSDP2, of one rank too: it is what computes in the dtype of mixed precision."""
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    options: dict[str, Any] = {"mesh": parallel_dims.get_mesh(names)}
    options["mp_policy"] = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
    )
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    policy = parallelism.fsdp_reshard_after_forward
    reshard = get_fsdp_reshard_after_forward_policy(policy, pp_enabled=False)
    for layer in model.layers:
        fully_shard(layer, **options, reshard_after_forward=reshard)
    last, embedding = [model.model.norm, model.lm_head], model.model.embed_tokens
    if model.config.rat.tie_word_embeddings:
        last = [embedding, *last]  # one weight: one group
    else:
        fully_shard(embedding, **options, reshard_after_forward=reshard)
    fully_shard(last, **options, reshard_after_forward=policy == "always")  # else it would be gathered again at once
    fully_shard(model, **options)
    if parallelism.enable_fsdp_symm_mem:
        enable_fsdp_symm_mem(model)
    disable_fsdp_gradient_division(model)  # the loss is divided by the tokens of all ranks
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo has too, not one times 1.0
