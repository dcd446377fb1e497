"""Tensor parallelism of layers: heads, and the hidden numbers of feed-forwards, over the ranks of a mesh.

A layer's projections are one matrix whose rows are parts, q, k, v and gates. Its rows are put in the order of ranks, so that
each rank's share of every part is one stretch: then PyTorch's column- and row-parallel styles do the rest, and the layer
between them works on its own heads as if there were no others. Groups of q and k that do not divide the ranks are replicated:
each rank has the group of its heads, and the gradients of copies are summed.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn import functional as F


def _rows(parts: Sequence[int], size: int, world: int) -> Tensor:
    """Rows of the projection in the order of ranks, ``(W, n)``; parts in units of ``size`` rows.

    Each rank has 1 / W of a part, or, of a part that W is a multiple of, the unit that its own share falls into.
    """
    ranks, at = [], 0
    for rank in range(world):
        rows, at = [], 0
        for part in parts:
            if part % world == 0:
                first, count = rank * (part // world), part // world
            else:
                first, count = rank * part // world, 1
            rows.append(torch.arange((at + first) * size, (at + first + count) * size))
            at += part
        ranks.append(torch.cat(rows))
    return torch.stack(ranks)


class SplitParts(ParallelStyle):
    """For ``parallelize_module``: a module of two linear maps, the first of which makes parts that are split alike.

    Args:
        first, second: their names in the module.
        parts: heads, or numbers, of each part of the first one's result; None: the module's own ``parts``.
    """

    def __init__(self, first: str, second: str, parts: Sequence[int] | None = None):
        super().__init__()
        self.first, self.second, self.parts = first, second, parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        world = device_mesh.size()
        parts: Any = module.parts if self.parts is None else self.parts
        linear = module.get_submodule(self.first)
        assert isinstance(linear, nn.Linear)
        size = linear.out_features // sum(parts)
        if (bad := [n for n in parts if n % world and world % n]) or max(parts) % world:
            raise ValueError(
                f"rat_ext.parallelize_plan: mesh: expected ranks that divide {max(parts)} heads, and groups that divide the "
                f"ranks or are divided by them, got {world} ranks and {(bad or parts)[0]}"
            )
        rows = _rows(parts, size, world)
        with torch.no_grad():
            order = rows.flatten().to(linear.weight.device)
            linear.weight = nn.Parameter(linear.weight[order])
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[order])
        linear.out_features = rows.numel()
        module.rank_rows = rows.flatten()  # no buffer: `to_empty` after the split would lose it
        ColwiseParallel()._apply(linear, device_mesh)
        RowwiseParallel()._apply(module.get_submodule(self.second), device_mesh)
        copied = sum(size for n in parts if n % world)  # rows at the begin of each rank's: q and k come first
        if copied:
            group = _sharing(device_mesh, world // min(parts))
            linear.forward = functools.partial(_linear, linear, copied, group)  # type: ignore[method-assign]
            module.copies = copied, group  # type: ignore[assignment]
        if self.parts is None:
            local = [max(n // world, 1) for n in parts]
            module.parts = tuple(local)  # type: ignore[assignment]
            module.num_heads = max(local)
            if hasattr(module, "num_groups"):
                module.num_groups = local[0]
            bias = getattr(module, "gate_bias", None)
            if isinstance(bias, nn.Parameter):
                module.gate_bias = nn.Parameter(distribute_tensor(bias.data, device_mesh, [Shard(0)]))
        return module


_groups: weakref.WeakKeyDictionary[DeviceMesh, dict[int, Any]] = weakref.WeakKeyDictionary()


def _sharing(mesh: DeviceMesh, share: int) -> Any:
    """The group of the ``share`` ranks, this one among them, that have the same groups of q and k; one for all layers."""
    known = _groups.setdefault(mesh, {})
    if share not in known:
        begin = mesh.get_local_rank() // share * share
        members = mesh.mesh.flatten().tolist()[begin : begin + share]
        known[share] = dist.new_group(members, use_local_synchronization=True)
    return known[share]


def _linear(linear: nn.Linear, copied: int, group: Any, x: Tensor) -> Tensor:
    """What a split projection computes, whose first ``copied`` rows other ranks have too."""
    bias = None if linear.bias is None else _Copies.apply(linear.bias, copied, group)
    return F.linear(x, _Copies.apply(linear.weight, copied, group), bias)


class _Copies(torch.autograd.Function):
    """A weight or bias; its gradient is summed, of the rows that ranks share. Whatever shards weights besides sees the sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copied: int, group: Any) -> Tensor:
        ctx.copied, ctx.group = copied, group
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        assert isinstance(grad, DTensor)
        local = grad.redistribute(placements=[Shard(0)]).to_local().clone()
        copies = local[: ctx.copied].contiguous()
        dist.all_reduce(copies, group=ctx.group)
        local[: ctx.copied] = copies
        return DTensor.from_local(local, grad.device_mesh, [Shard(0)], run_check=False), None, None


def parallelize_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The plan of a model of RAT layers for ``torch.distributed.tensor.parallel.parallelize_module``.

    Every module with ``in_proj``, ``out_proj`` and ``parts`` is split by heads, every feed-forward by its hidden numbers; what
    stays whole (embeddings, norms) is replicated. Weights are to be loaded before, or drawn after, and :func:`share_copies`
    called; :func:`full_state_dict` gives them back as they were. Before FSDP2, where both are used.

    Example:
        >>> from rat_ext.layers import RATLayer
        >>> list(parallelize_plan(nn.Sequential(nn.Embedding(10, 64), RATLayer(64, 4, 2, 8))))
        ['1']
    """
    plan: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if {"in_proj", "out_proj"} <= children.keys() and hasattr(module, "parts"):
            plan[name] = SplitParts("in_proj", "out_proj")
        for first, second in (("up", "down"), ("up_proj", "down_proj")):
            if {first, second} <= children.keys():
                up, down = children[first], children[second]
                assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
                parts = [down.in_features] * (up.out_features // down.in_features)
                plan[name] = SplitParts(first, second, parts)
    return plan


def share_copies(model: nn.Module) -> None:
    """Makes the copies of a group of q and k one again, after weights of a split model were drawn: each rank drew its own.

    Nothing to do where the ranks divide the groups. Before or after FSDP2; every rank calls it.
    """
    for module in model.modules():
        copies = getattr(module, "copies", None)
        if copies is None:
            continue
        copied, group = copies
        linear = module.get_submodule(next(n for n in ("in_proj", "up", "up_proj") if hasattr(module, n)))
        for x in (linear.weight, linear.bias):
            if isinstance(x, DTensor):
                mesh, begin = x.device_mesh, 0
                for dim, placement in enumerate(x.placements[:-1]):  # the last is that of heads; another is FSDP2's
                    if placement.is_shard() or isinstance(placement, _StridedShard):
                        rows = x.shape[0] // mesh.size(-1)
                        begin = mesh.get_local_rank(dim) * -(-rows // mesh.size(dim))
                part = x.to_local()[: max(copied - begin, 0)]
                if part.shape[0]:
                    shared = part.detach().contiguous()
                    dist.broadcast(shared, group_src=0, group=group)
                    with torch.no_grad():
                        part.copy_(shared)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model whose layers are split, as that of one rank's: whole tensors, rows in their own order."""
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    for name, module in model.named_modules():
        rows = getattr(module, "rank_rows", None)
        if isinstance(rows, Tensor):
            first = next(n for n in ("in_proj", "up", "up_proj") if hasattr(module, n))
            name = name.replace("_checkpoint_wrapped_module.", "")  # which a state's names leave out
            for key in (f"{name}.{first}.weight", f"{name}.{first}.bias"):
                if key in state:
                    whole = state[key].new_empty(int(rows.max()) + 1, *state[key].shape[1:])
                    whole[rows] = state[key]
                    state[key] = whole
    return state
