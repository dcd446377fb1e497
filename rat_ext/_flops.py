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


def _counts(batch: int, tokens: int, cu_seqlens: Tensor | None) -> list[int]:
    """Tokens of each sequence."""
    if cu_seqlens is None:
        return [tokens] * batch
    cuts, sequences = _values(cu_seqlens), max(cu_seqlens.shape[0] - 1, 1)
    if cuts is None:
        return [tokens // sequences + (i < tokens % sequences) for i in range(sequences)]
    return [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _of_slots(counts: list[int], slots: Tensor, lengths: Tensor) -> tuple[list[int], Tensor]:
    """Tokens and lengths of the sequences that are served: not of rows that are skipped."""
    if _values(slots) is None:
        return counts, lengths[: len(counts)]
    served = (slots >= 0) & (slots < lengths.shape[0])
    return [n for n, one in zip(counts, served.tolist(), strict=True) if one], lengths[slots[served]]


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
    counts, lengths, slots = _counts(batch, tokens, given.get("cu_seqlens")), given.get("lengths"), given.get("slots")
    if slots is not None:
        counts, lengths = _of_slots(counts, slots, given["lengths"])
    past = [0] * len(counts)
    if lengths is not None:
        known, table = _values(lengths[: len(counts)]), given.get("page_table")
        if known is None:
            rows = given["chunk_k"].shape[2] * (1 if table is None else table.shape[1])
            past = [rows * chunk_size] * len(counts)
        else:  # a pool counts the new tokens already: formulas are asked after the call
            past = [max(p - n, 0) for p, n in zip(known, counts, strict=True)] if "error" in given else known
    keys = sum(counts) + sum(_closed(p + n, chunk_size) - _closed(p, chunk_size) for p, n in zip(past, counts, strict=True))
    total = (5 if backward else 2) * 2 * dim * heads * keys
    if "gate" not in given or given["gate"] is not None:
        total += _recurrences(sum(counts) * heads * dim, 2, backward, saved=False)
    return total


_WITH_GRADIENT = ("rat_attention", "rat_attention_packed", "chunk_recurrence")
for _name in (*_WITH_GRADIENT, *(f"{n}_backward" for n in _WITH_GRADIENT), "rat_decode_step", "rat_attention_cached"):
    _packet = getattr(torch.ops.rat_ext, _name)
    register_flop_formula(_packet, get_raw=True)(functools.partial(_formula, _packet.default, _name.endswith("_backward")))
