"""Sharding rules of every operator for DTensor: by batch, and by heads. Importing :mod:`rat_ext.parallel` registers them.

A rule says, for one dimension of a mesh, which placements of the arguments give which of the results without communication:

- batch: tensors of tokens and states are sharded by sequence, parameters and tables replicated, their gradients partial sums.
  Not where sequences are packed in one row;
- heads: everything of heads is sharded by them. Groups of q and k are sharded along, where every rank gets whole groups with
  their heads; one group alone is replicated, and its gradient a partial sum. Groups that do not divide the ranks have no such
  rule: repeat them (``q.repeat_interleave(n, dim=2)``) so that they do, or they, and heads with them, are gathered. An operator
  on one projection has no rule by heads: its parts lie side by side in one dimension.

A cache that is updated in place is sharded by heads, or by sequence where row b continues entry b: slots and pages are of the
whole pool. ``error`` then tells each rank of its own rows.

What is sharded otherwise, by token say, DTensor brings into one of these forms first; but not a cache, whose copy would be
written instead: ValueError.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

# Of every argument and result: the dimension of sequences, and of heads; None: it has none.
_TOKENS, _STATES, _TABLE, _SHARED = (0, 2), (0, 1), (None, 0), (None, None)
_DIMENSIONS: dict[str, tuple[int | None, int | None]] = {
    **dict.fromkeys(("q", "k", "v", "gate", "out_gate", "x", "y"), _TOKENS),
    "projection": (0, None),
    **dict.fromkeys(("chunk_k", "chunk_v", "running_k", "running_v", "initial_state", "lse", "final_state"), _STATES),
    **dict.fromkeys(("scale_k", "scale_v"), _STATES),
    "gate_bias": _TABLE,
    **dict.fromkeys(("rotary_cos", "rotary_sin", "cu_seqlens", "workspace", "error"), _SHARED),
    **dict.fromkeys(("lengths", "slots", "page_table"), (0, None)),
}
_ONE_TOKEN = dict.fromkeys(("q", "k", "v", "gate", "out_gate", "y"), (0, 1))
_RING = dict.fromkeys(("running_k", "running_v"), (0, 2))
GROUPED = ("q", "k", "x")
OPERATORS = ("rat_attention", "rat_attention_packed", "chunk_recurrence")
IN_PLACE = ("rat_decode_step", "rat_attention_cached")


def _plain(name: str) -> tuple[str, bool]:
    """What a tensor of a schema is of, and whether it is a gradient: ("chunk_k", True) of "dchunk_k_out"."""
    gradient = name.startswith("d") and name[1:].removesuffix("_out") in _DIMENSIONS
    return name[gradient:].removesuffix("_out"), gradient


def _divides(groups: int, sizes: tuple[int, ...]) -> bool:
    """Whether ranks get whole groups, over whichever dimensions of a mesh of ``sizes`` groups come to be sharded."""
    some = itertools.chain.from_iterable(itertools.combinations(sizes, n) for n in range(1, len(sizes) + 1))
    return all(groups % n == 0 for n in map(math.prod, some) if n <= groups)


def rule(operator: Any, *args: Any) -> list[tuple[list, list]]:
    """The placements of (results, arguments) that an operator takes as they are.

    Args:
        operator: its overload.
        args: its arguments; what stands for a tensor has ``shape`` and ``mesh``.
    """
    schema = operator._schema
    arguments, results = [a.name for a in schema.arguments], [r.name for r in schema.returns]
    given = dict(zip(arguments, args, strict=True))
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    tensors = {name: x for name, x in given.items() if hasattr(x, "shape") and hasattr(x, "mesh")}
    dimensions = _DIMENSIONS
    if written:
        dimensions = dimensions | (_ONE_TOKEN if len(tensors["v"].shape) == 3 else {})
        dimensions = dimensions | (_RING if len(tensors["running_k"].shape) == 4 else {})
    heads_at = dimensions["v"][1]
    assert heads_at is not None
    sizes = tuple(next(iter(tensors.values())).mesh.shape)
    first = next((name for name in GROUPED if name in tensors), None)
    # Heads: of v, or of what the gate says where k and v are no states.
    wide = tensors.get("v", tensors.get("gate"))
    heads = None if first is None or wide is None else wide.shape[heads_at]
    groups = None if first is None else tensors[first].shape[heads_at]

    def exists(name: str) -> bool:
        """Whether an optional result is there."""
        if name in ("running_k_out", "running_v_out", "lengths_out", "final_state"):
            return bool(given["return_state"])
        plain, gradient = _plain(name)
        return not gradient or given.get(plain) is not None

    def places(by: int) -> tuple[list, list]:
        """By sequence (0), or by heads (1)."""

        def of(name: str, result: bool) -> Any:
            plain, gradient = _plain(name)
            dimension = dimensions[plain][by]
            if by == 1 and plain in GROUPED:
                # One group is every rank's; k has heads where it is of states.
                has = (given[plain] if plain in given else given[first]).shape[heads_at]
                dimension = dimension if has != 1 or heads == 1 else None
            if dimension is not None:
                return Shard(dimension)
            # What all share gets a part of its gradient from each.
            return Partial() if gradient and result else Replicate()

        return (
            [of(name, True) if exists(name) else None for name in results],
            [of(name, False) if name in tensors else None for name in arguments],
        )

    found = [
        (
            [Replicate() if exists(name) else None for name in results],
            [Replicate() if name in tensors else None for name in arguments],
        )
    ]
    # A pool has entries of its own, which only slots tell from rows, and pages belong to any of them.
    pool = written and (
        given["slots"] is not None or given["page_table"] is not None or tensors["running_k"].shape[0] != tensors["q"].shape[0]
    )
    if given.get("cu_seqlens") is None and not pool:
        found.append(places(0))
    if groups is not None and (groups == 1 or _divides(groups, sizes)):
        found.append(places(1))
    if not written:
        return found
    at = {i: tensors[name] for i, name in enumerate(arguments) if name in written and name in tensors}
    stay = [(y, of) for y, of in found if all(of[i] in x.placements for i, x in at.items())]
    if not stay:
        expected = "tensors sharded by heads, by sequence (without slots and pages) or replicated, which q and k allow"
        got = ", ".join(f"{arguments[i]} {x.placements}" for i, x in at.items())
        raise ValueError(f"{schema.name.replace('::', '.')}: cache: expected {expected}, got {got}")
    return stay


def register() -> None:
    """Registers the rules of all operators and of their backward operators."""
    for name in (*OPERATORS, *(f"{name}_backward" for name in OPERATORS), *IN_PLACE):
        operator = getattr(torch.ops.rat_ext, name).default
        register_sharding(operator)(functools.partial(rule, operator))


register()
