"""Parts of a tensor whose gradients are gathered in one buffer, as they come.

``x.split(...)`` would keep the gradients of all parts until the last is there, and then copy them; of overlapping parts it
would make a tensor of the size of x each, and add them. Here gradients of stretches between cuts are kept until another part
of x has one, or all have come; then they move into the buffer, to which every other part adds its own and frees it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import Given

Columns = tuple[int, int, int]  # the first, heads, size of a head


def view(x: Tensor, begin: int, tokens: int, columns: Columns | None) -> Tensor:
    """``x[:, begin : begin + tokens]``, or of ``columns`` of those, as heads."""
    x = x.narrow(1, begin, tokens)
    if columns is None:
        return x
    first, heads, size = columns
    return x.narrow(-1, first, heads * size).unflatten(-1, (heads, size))


def columns_in(projection: Tensor, given: Given) -> list[Columns]:
    """Where k, v and gate are in the projection of rat_attention_packed, of whose arguments ``given`` are some."""
    heads, groups = given["num_heads"], given["num_groups"]
    size = projection.shape[-1] // (2 * groups + (3 if given["has_out_gate"] else 2) * heads)
    return [(at * size, n, size) for at, n in ((groups, groups), (2 * groups, heads), (2 * groups + heads, heads))]


class Parts:
    """Views of ``x`` ``(B, T, ...)`` along T, and of columns of its last dimension as heads.

    Args:
        x: the tensor.
        cuts: 0 ... T: no part of more than no tokens crosses one. Most gradients come as whole stretches between them.
    """

    def __init__(self, x: Tensor, cuts: Sequence[int]):
        self.cuts = cuts
        self.buffer: Tensor | None = None
        self.stretches: dict[int, Tensor] = {}  # gradients that came as a whole stretch, by its number; not yet in the buffer
        self.written = [False] * (len(cuts) - 1)
        self.x = _Whole.apply(self, x)

    def part(self, begin: int, tokens: int, columns: Columns | None = None) -> Tensor:
        """``x[:, begin : begin + tokens]``; with ``columns`` (first, heads, size), of those ``(B, tokens, heads, size)``."""
        return _Part.apply(self, self.x, begin, tokens, columns)

    def add(self, begin: int, tokens: int, columns: Columns | None, grad: Tensor) -> None:
        """Adds the gradient of a part, if x wants one."""
        if not tokens or not self.x.requires_grad:
            return
        i = bisect.bisect_right(self.cuts, begin) - 1
        if self.buffer is None and not self.written[i] and columns is None:
            if (begin, begin + tokens) == (self.cuts[i], self.cuts[i + 1]):
                self.stretches[i], self.written[i] = grad, True
                return
        to = view(self.gather(), begin, tokens, columns)
        if not self.written[i]:
            self._clear(i)
        to.add_(grad)

    def gather(self) -> Tensor:
        """The buffer, with the stretches in it. It is made late: what computes the stretches then has its memory."""
        if self.buffer is None:
            self.buffer = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        while self.stretches:
            i, grad = self.stretches.popitem()
            self.buffer[:, self.cuts[i] : self.cuts[i + 1]] = grad
        return self.buffer

    def _clear(self, i: int) -> None:
        self.gather()[:, self.cuts[i] : self.cuts[i + 1]] = 0
        self.written[i] = True

    def gradient(self) -> Tensor | None:
        """All of it; zeros where nothing came. Begins anew."""
        if not any(self.written):  # a rank without tokens has a gradient too: who gathers gradients waits for it
            return None if self.x.numel() else torch.zeros_like(self.x)
        for i, written in enumerate(self.written):
            if not written:
                self._clear(i)
        buffer, self.buffer = self.gather(), None
        self.written = [False] * len(self.written)
        return buffer


class _Whole(torch.autograd.Function):
    """Its backward runs after that of every part."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, x: Tensor) -> Tensor:
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return None, ctx.parts.gradient()


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Parts, x: Tensor, begin: int, tokens: int, columns: Columns | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parts, ctx.where = parts, (begin, tokens, columns)
        return view(x, begin, tokens, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is not None:
            ctx.parts.add(*ctx.where, grad)
        return None, None, None, None, None
