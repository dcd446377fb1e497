"""Attention and sliding-window layers of a hybrid under context parallelism, through PyTorch's kernels.

Keys and values are fetched before: all earlier ones of the sequence, or those of the window. Any length, cuts, packed sequences
and backend; the keys of a row are on every rank for one layer. Where T is a multiple of twice the ranks and one flash or cuDNN
kernel serves the call, PyTorch's ring (``torch.distributed.tensor.experimental.context_parallel``) holds less; tokens lie on
ranks as it wants them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from .._arguments import integer, real
from .context import ContextParallel, _wrong
from .exchange import Exchange, Route, finish, join, start


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """The last ``q.shape[1]`` tokens of ``k`` attend to those before: ``(B, n, H, D)`` and ``(B, m, H, D)``."""
    tokens, past = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None or past + tokens <= window + 1:
        causal = {"is_causal": True} if past == 0 else {"attn_mask": causal_lower_right(tokens, past + tokens)}
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **causal).transpose(1, 2)
    parts, size = [], max(window, 64)
    for begin in range(0, tokens, size):
        end = min(begin + size, tokens)
        first = max(past + begin - window, 0)
        back = torch.arange(past + begin, past + end, device=q.device)[:, None] - torch.arange(
            first, past + end, device=q.device
        )
        mask = (back >= 0) & (back <= window)
        keys, values = (x[:, :, first : past + end] for x in (k, v))
        parts.append(F.scaled_dot_product_attention(q[:, :, begin:end], keys, values, attn_mask=mask, scale=scale))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _check(q: Any, k: Any, v: Any, cp: Any) -> None:
    if not isinstance(cp, ContextParallel):
        raise _wrong("attention", "context_parallel", "one", type(cp).__name__)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise _wrong("attention", name, "a tensor of 4 dimensions", got)
        for what, mine, theirs in (("dtype", q.dtype, x.dtype), ("device", q.device, x.device)):
            if mine != theirs:
                raise _wrong("attention", name, f"{what} {mine}, that of q", theirs)
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise _wrong("attention", "k", f"a number of groups that divides the {q.shape[2]} heads", k.shape[2])
    for name, x in (("k", k), ("v", v)):
        shape = (*q.shape[:2], k.shape[2], q.shape[3])
        if x.shape != shape:
            raise _wrong("attention", name, f"shape {shape}", tuple(x.shape))


@torch.compiler.disable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_parallel: ContextParallel,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of a row that ranks hold together, each its own tokens.

    Args:
        q: ``(B, T, H, D)``, rotated by :meth:`ContextParallel.positions` where it is to be.
        k, v: ``(B, T, G, D)``; G divides H.
        context_parallel: how the row lies on ranks, packed sequences included.
        window: a token sees itself and this many before it. None: all of its sequence.
        scale: default ``D ** -0.5``.

    Returns:
        ``(B, T, H, D)``. Gradients reach the keys and values of all ranks.
    """
    cp = context_parallel
    _check(q, k, v, cp)
    if window is not None:
        window = integer("attention", "window", window)
        if window < 0:
            raise _wrong("attention", "window", "at least 0 or None", window)
    if scale is not None:
        scale = real("attention", "scale", scale)
    layout = cp._local("attention", q)
    heads = q.shape[2]
    mine = [layout.pieces[p] for p in cp._mine()]
    wanted: dict[tuple[int, int], tuple[int, int]] = {}
    firsts = []
    for p, piece in enumerate(layout.pieces):
        past = piece.past if window is None else min(piece.past, window)
        firsts.append(piece.begin - past if piece.continued else piece.begin)
        for other, source in enumerate(layout.pieces[:p]):
            begin, end = max(firsts[p], source.begin) - source.begin, source.tokens
            if begin < end:
                before = wanted.get((other, piece.owner), (begin, end))
                wanted[other, piece.owner] = min(begin, before[0]), end
    rows = torch.stack((k, v)).movedim(2, 0)  # (T, 2, B, G, D)
    spans = cp._spans(layout)
    route = Route(cp.rank, cp.world, [piece.owner for piece in layout.pieces], wanted)
    token: Tensor | None = None
    found: dict[int, Tensor] = {}
    if cp.world == 1:
        found = {p: rows.narrow(0, *spans[p])[begin:end] for (p, _), (begin, end) in wanted.items()}
    elif route.used:
        exchange = Exchange(cp.group, route, rows.shape[1:], rows.dtype)
        found, token = finish(exchange, start(exchange, [rows.narrow(0, *span) for span in spans], ()))
    ys = []
    for p, piece, (at, _) in zip(cp._mine(), mine, spans, strict=True):
        lengths = [piece.continued] if piece.continued else []
        for i, n in enumerate([*lengths, *piece.fresh]):
            own = rows[at : at + n]
            if i == 0 and piece.continued and firsts[p] < piece.begin:
                # What came of a piece ends where it ends.
                earlier = [
                    part[-(layout.pieces[o].end - max(firsts[p], layout.pieces[o].begin)) :]
                    for o, part in sorted(found.items())
                    if o < p and layout.pieces[o].end > firsts[p]
                ]
                own = torch.cat((*earlier, own))
            keys, values = own.movedim(0, 2).unbind(0)
            if keys.shape[2] != heads:
                keys, values = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (keys, values))
            ys.append(_attend(q[:, at : at + n], keys, values, window, scale))
            at += n
    ys = ys or [q[:, :0]]
    return torch.cat(ys, dim=1) if token is None else join(token, ys)
