"""Parts of a tensor whose gradients are gathered in one buffer, as they come.

``x.split(...)`` would keep the gradients of all parts until the last is there, and then copy them; of overlapping parts it
would make a tensor of the size of x each, and add them. Here each part writes its gradient into the buffer and frees it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Parts:
    """Views of ``x`` ``(B, T, ...)`` along T, and of columns of its last dimension as heads.

    Args:
        x: the tensor.
        cuts: 0 ... T: no part of more than no tokens crosses one. Most gradients come as whole stretches between them.
    """

    def __init__(self, x: Tensor, cuts: Sequence[int]):
        self.cuts = cuts
        self.buffer: Tensor | None = None
        self.written = [False] * (len(cuts) - 1)
        self.x = _Whole.apply(self, x)

    def part(self, begin: int, tokens: int, columns: tuple[int, int, int] | None = None) -> Tensor:
        """``x[:, begin : begin + tokens]``; with ``columns`` (first, heads, size), of those ``(B, tokens, heads, size)``."""
        return _Part.apply(self, self.x, begin, tokens, columns)

    def add(self, view: Any, begin: int, tokens: int, whole: bool, grad: Tensor, like: tuple) -> None:
        """Adds the gradient of a part; ``view`` finds it in the buffer."""
        if not tokens:
            return
        if self.buffer is None:
            shape, options = like
            self.buffer = torch.empty(shape, **options)
        i = bisect.bisect_right(self.cuts, begin) - 1
        first, last = self.cuts[i], self.cuts[i + 1]
        if self.written[i]:
            view(self.buffer).add_(grad)
            return
        self.written[i] = True
        if whole and (begin, begin + tokens) == (first, last):
            view(self.buffer).copy_(grad)
        else:
            self.buffer[:, first:last] = 0
            view(self.buffer).add_(grad)

    def gradient(self) -> Tensor | None:
        """The buffer; zeros where nothing came. Begins anew."""
        buffer, self.buffer = self.buffer, None
        for i, written in enumerate(self.written):
            if buffer is not None and not written:
                buffer[:, self.cuts[i] : self.cuts[i + 1]] = 0
            self.written[i] = False
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
    def forward(ctx: Any, parts: Parts, x: Tensor, begin: int, tokens: int, columns: tuple[int, int, int] | None) -> Tensor:
        def view(y: Tensor) -> Tensor:
            y = y.narrow(1, begin, tokens)
            if columns is None:
                return y
            first, heads, size = columns
            return y.narrow(-1, first, heads * size).unflatten(-1, (heads, size))

        ctx.set_materialize_grads(False)
        ctx.add = parts.add
        ctx.where = view, begin, tokens, columns is None
        ctx.like = x.shape, {"dtype": x.dtype, "device": x.device}
        return view(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        if grad is not None:
            ctx.add(*ctx.where, grad, ctx.like)
        return None, None, None, None, None
