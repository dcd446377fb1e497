"""FLOP of every operator, for torch.utils.flop_counter.

Counted is what the definition needs: a product of attention for every key that a token sees (2 D per head; PyTorch counts the
keys that a causal mask hides as well), and the recurrences, 3 per number of a state. Not counted, as PyTorch counts none of it:
gates, softmax, rotation. With n states (k~ and v~; one in chunk_recurrence), per token and number of a state:

    forward   s = f s + (1 - f) x                                     3 n
    backward  s again, where it was not saved                         3 n
              a = g + f a;  dx = (1 - f) a;  a (s - x)                5 n
              dgate = f (1 - f) (sum over states)                     n + 1

and per token and key, own state included, two products forward and five backward: scores again, dV, dP, dQ, dK.

How far sequences are is read from ``cu_seqlens`` and ``lengths``, of a GPU too. Where they have no values (fake tensors),
packed sequences count as equally long, and those that continue as long as their state has rows for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import _build_info  # noqa: F401  (loading the extension registers the operators)


def _values(x: Tensor | None) -> list[int] | None:
    return None if x is None or x.is_meta or isinstance(x, FakeTensor) else x.tolist()


def _closed(n: int, chunk_size: int) -> int:
    """Sum over positions 0 ... n - 1 of the chunks closed before each."""
    whole, rest = divmod(n, chunk_size)
    return chunk_size * whole * (whole - 1) // 2 + rest * whole


def _keys(batch: int, tokens: int, chunk_size: int, cu_seqlens: Tensor | None, lengths: Tensor | None, rows: int) -> int:
    """Keys that all tokens see, own states included."""
    if cu_seqlens is None:
        counts = [tokens] * batch
    else:
        cuts, sequences = _values(cu_seqlens), max(cu_seqlens.shape[0] - 1, 1)
        counts = (
            [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
            if cuts is None
            else [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        )
    past = [0] * len(counts) if lengths is None else _values(lengths) or [rows * chunk_size] * len(counts)
    seen = [_closed(p + n, chunk_size) - _closed(p, chunk_size) for p, n in zip(past, counts, strict=True)]
    return sum(seen) + sum(counts)


def _recurrences(numbers: int, states: int, backward: bool, saved: bool) -> int:
    return numbers * (states * (5 if saved else 8) + states + 1 if backward else 3 * states)


def _formula(operator: Any, backward: bool, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Of any operator: arguments are read by name."""
    given = dict(zip([a.name for a in operator._schema.arguments], args, strict=False)) | kwargs
    chunk_size = given["chunk_size"]
    if "x" in given:
        return _recurrences(given["gate"].numel(), 1, backward, saved=True)
    if "projection" in given:
        batch, tokens, width = given["projection"].shape
        heads = given["num_heads"]
        dim = width // (2 * given["num_groups"] + (3 if given["has_out_gate"] else 2) * heads)
    else:
        shape = given["v"].shape
        batch, tokens, heads, dim = shape if len(shape) == 4 else (shape[0], 1, *shape[1:])
    chunk_k, lengths = given.get("chunk_k"), given.get("lengths")
    rows = 0 if chunk_k is None else chunk_k.shape[2]
    if lengths is not None and given.get("slots") is not None:
        slots = given["slots"]
        batch = slots.shape[0]
        if _values(slots) is not None:
            batch, lengths = int((slots >= 0).sum()), lengths[slots[slots >= 0]]
    elif lengths is not None and given.get("cu_seqlens") is None:
        lengths = lengths[:batch]
    keys = _keys(batch, tokens, chunk_size, given.get("cu_seqlens"), lengths, rows)
    total = (5 if backward else 2) * 2 * dim * heads * keys
    if "gate" not in given or given["gate"] is not None:
        total += _recurrences(batch * tokens * heads * dim, 2, backward, saved=False)
    return total


for _name in ("rat_attention", "rat_attention_packed", "chunk_recurrence", "rat_decode_step"):
    for _overload in (_name, f"{_name}_backward"):
        if _overload != "rat_decode_step_backward":
            _packet = getattr(torch.ops.rat_ext, _overload)
            _count = functools.partial(_formula, _packet.default, _overload != _name)
            register_flop_formula(_packet, get_raw=True)(_count)
