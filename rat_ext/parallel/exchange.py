"""Rows of tensors sent between ranks, differentiable, with compute between the start of a transfer and its end.

A transfer is two nodes of autograd's graph: :func:`start` sends and :func:`finish` waits; in the backward `finish` sends the
gradients and `start` waits for them and adds them up, in float32 and by rank, so that the bits do not depend on timing. What
leads from one to the other is a *token*, a tensor without elements. Tokens also put transfers into one order on all ranks, in
the backward too, and keep a rank in the transfers that it has nothing to give to or to take from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cache import state_dtype

Range = tuple[int, int]


class Route:
    """Which rows of which piece go to which rank: the same table on all ranks.

    Args:
        rank, world: this rank, and how many there are.
        owners: the rank that holds each piece.
        wanted: for a piece and a rank, the range of rows of that piece which that rank gets.
    """

    def __init__(self, rank: int, world: int, owners: Sequence[int], wanted: dict[tuple[int, int], Range]):
        wanted = {key: (begin, end) for key, (begin, end) in wanted.items() if end > begin}
        self.mine = [p for p, owner in enumerate(owners) if owner == rank]
        self.used = bool(wanted)
        # By rank, and of each by piece: (piece, begin, end).
        self.out = [[(p, *wanted[p, to]) for p in self.mine if (p, to) in wanted] for to in range(world)]
        come = [(p, *wanted[p, rank]) for p in range(len(owners)) if (p, rank) in wanted]
        self.into = [[entry for entry in come if owners[entry[0]] == source] for source in range(world)]
        self.sent = [sum(end - begin for _, begin, end in rows) for rows in self.out]
        self.received = [sum(end - begin for _, begin, end in rows) for rows in self.into]
        # Rows that leave this rank. What it sends to itself is a copy.
        self.rows_sent = sum(n for to, n in enumerate(self.sent) if to != rank)
        self.rows_received = sum(n for source, n in enumerate(self.received) if source != rank)


def _send(group: Any, rows: Tensor, sent: list[int], received: list[int]) -> tuple[Any, Tensor, Tensor]:
    """Starts to send ``rows``, cut by ``sent``. As bytes, which every backend can move. Returns (work, sent, received)."""
    rows = rows.contiguous()
    got = rows.new_empty(sum(received), *rows.shape[1:])
    work = dist.all_to_all_single(got.view(torch.uint8), rows.view(torch.uint8), received, sent, group=group, async_op=True)
    return work, rows, got


class Exchange:
    """One transfer along a route. Rows are ``(n, *shape)``, sent in ``dtype``."""

    def __init__(self, group: Any, route: Route, shape: Sequence[int], dtype: torch.dtype):
        self.group, self.route, self.shape, self.dtype = group, route, tuple(shape), dtype
        self.under_way: tuple[Any, Tensor, Tensor] | None = None

    def send(self, rows: Tensor, sent: list[int], received: list[int]) -> None:
        self.under_way = _send(self.group, rows, sent, received)

    def wait(self) -> Tensor:
        """What came, for what the current stream runs from now on."""
        assert self.under_way is not None
        work, _, got = self.under_way
        work.wait()
        self.under_way = None
        return got


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, count: int, *tensors: Tensor) -> Tensor:
        """``tensors``: the rows of the ``count`` pieces that this rank holds, then tokens."""
        route, mine = exchange.route, dict(zip(exchange.route.mine, tensors[:count], strict=True))
        mine = {p: x.to(exchange.dtype) for p, x in mine.items()}  # once for all ranks that get them
        parts = [mine[p][begin:end] for rows in route.out for p, begin, end in rows]
        like = tensors[0]
        rows = torch.cat(parts or [like.new_empty(0, *exchange.shape, dtype=exchange.dtype)])
        exchange.send(rows, route.sent, route.received)
        ctx.exchange, ctx.sizes = exchange, [(x.shape, x.dtype, x.device) for x in tensors]
        return like.new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple:
        exchange: Exchange = ctx.exchange
        route, got = exchange.route, exchange.wait()
        acc = state_dtype(exchange.dtype)
        mine: dict[int, Tensor] = {}
        sizes = dict(zip(route.mine, ctx.sizes, strict=False))
        at = 0
        for rows in route.out:
            for p, begin, end in rows:
                part, (shape, _, device) = got[at : at + end - begin], sizes[p]
                if p not in mine and part.shape == shape:
                    mine[p] = part.to(acc)
                else:
                    if p not in mine:
                        mine[p] = torch.zeros(shape, dtype=acc, device=device)
                    mine[p][begin:end] += part
                at += end - begin
        grads = [mine.get(p) for p in route.mine] + [None] * (len(ctx.sizes) - len(route.mine))
        # Zeros where nothing comes back: everything that gradients of the rows may reach is to run on every rank.
        return (
            None,
            None,
            *(
                torch.zeros(shape, dtype=dtype, device=device) if g is None else g.to(dtype)
                for g, (shape, dtype, device) in zip(grads, ctx.sizes, strict=True)
            ),
        )


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, wait: bool, *tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.tokens = exchange, len(tokens)
        assert exchange.under_way is not None
        got = exchange.wait() if wait else exchange.under_way[2]
        return got, got.new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
        exchange: Exchange = ctx.exchange
        exchange.send(grad, exchange.route.received, exchange.route.sent)
        return None, None, *(grad.new_empty(0, dtype=torch.float32) for _ in range(ctx.tokens))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, *parts: Tensor) -> Tensor:
        ctx.sizes = [x.shape[1] for x in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad.new_empty(0, dtype=torch.float32), *grad.split(ctx.sizes, dim=1)


def start(exchange: Exchange, pieces: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Begins to send. Returns the token for :func:`finish`.

    Args:
        exchange: the transfer.
        pieces: the rows ``(n, *shape)`` of each piece that this rank holds, in order.
        tokens: those of transfers whose gradients are to be sent later than those of this one; and tensors without elements of
            everything that gradients of the rows may reach, so that all ranks take part in the backward.
    """
    return _Start.apply(exchange, len(pieces), *pieces, *tokens)


def finish(exchange: Exchange, *tokens: Tensor, wait: bool = True) -> tuple[dict[int, Tensor], Tensor]:
    """Waits. Returns the rows that came, by piece, and a token.

    Args:
        exchange: the transfer.
        tokens: of :func:`start`, and of transfers whose gradients are to be sent after those of this one.
        wait: False: nobody reads the rows before ``exchange.wait()``. What is called between is computed beside the transfer,
            and its backward runs before the gradients of the rows are sent.
    """
    got, token = _Finish.apply(exchange, wait, *tokens)
    ranges = [entry for rows in exchange.route.into for entry in rows]
    parts = got.split([end - begin for _, begin, end in ranges]) if ranges else ()
    return {p: part for (p, _, _), part in zip(ranges, parts, strict=True)}, token


def join(token: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """``parts`` one after the other along dimension 1; their backward is that of the transfers that ``token`` stands for."""
    return _Join.apply(token, *parts)
