"""Causal attention of the attention and sliding-window layers, through PyTorch's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import KeysAndValues, Window, ring_positions
from .layout import Layout


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate-half of ``(B, T, H, D)`` in the dtype of the angles, ``(1 or B, T, 1, D / 2)``; the result in that of x."""
    cos, sin = angles
    x1, x2 = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """``(B, T, H, D)`` queries, ``(B, H, S, D)`` keys and values."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    """Every token attends to those of its own sequence up to itself, at most ``window`` back: ``(B, T, H, D)`` each."""
    cu_seqlens, compiling = layout.cu_seqlens, torch.compiler.is_compiling()
    batch, tokens = q.shape[:2]
    if cu_seqlens is None and (window is None or (not compiling and tokens <= window + 1)):
        return _sdpa(q, k.transpose(1, 2), v.transpose(1, 2), causal=True)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # only where it is used: its import takes long

        if cu_seqlens is None:
            cu_seqlens = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * tokens
        visible = (-1 if window is None else window, 0)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        longest = layout.max_seqlen
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=visible)
        assert isinstance(y, Tensor)
        return y.unflatten(0, (batch, tokens))
    if compiling:  # one graph for all lengths, and a mask of all pairs
        token = torch.arange(tokens, device=q.device)
        back = token[:, None] - token
        mask = back >= 0 if window is None else (back >= 0) & (back <= window)
        if cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
            mask = mask & (sequence[:, None] == sequence)
        return _sdpa(q, k.transpose(1, 2), v.transpose(1, 2), mask)
    if cu_seqlens is None:
        return _dense(q, k, v, window)
    cuts = cu_seqlens.tolist()
    pieces = [_dense(q[:, a:b], k[:, a:b], v[:, a:b], window) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a < b]
    return torch.cat(pieces, dim=1)


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    tokens = q.shape[1]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if window is None or tokens <= window + 1:
        return _sdpa(q, k, v, causal=True)
    # Blocks of queries, each against its own keys and those of the block before: memory linear in T.
    size = max(window, 16)
    start = min(size, tokens)
    first = _sdpa(q[:, :start], k[:, :, :start], v[:, :, :start], _visible(start, 0, window, q))
    if tokens <= size:
        return first
    rest = -(-(tokens - size) // size)
    missing = (rest + 1) * size - tokens
    q = F.pad(q[:, size:], (0, 0, 0, 0, 0, missing)).unflatten(1, (rest, size)).flatten(0, 1)
    k, v = (F.pad(x, (0, 0, 0, missing)).unfold(2, 2 * size, size).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v))
    y = _sdpa(q, k, v, _visible(size, size, window, q))
    return torch.cat((first, y.unflatten(0, (-1, rest)).flatten(1, 2)[:, : tokens - size]), dim=1)


def _visible(queries: int, before: int, window: int, like: Tensor) -> Tensor:
    """(queries, before + queries): which keys a query sees that follows ``before`` keys of the block before."""
    key = torch.arange(before + queries, device=like.device)
    back = (key[before:] if before else key)[:, None] - key
    return (back >= 0) & (back <= window)


# ---- with a cache --------------------------------------------------------------------------------------------------------


def remember(k: Tensor, v: Tensor, state: KeysAndValues, layout: Layout) -> None:
    """Writes the first tokens of every row into an empty state."""
    assert layout.cache is not None
    k, v = layout.align(k).detach(), layout.align(v).detach()
    batch, tokens = k.shape[:2]
    if isinstance(state, Window):
        state.reserve(k, state.ring + 1)
        position = torch.arange(tokens, device=k.device).expand(batch, tokens)
        state.write(k, v, state.columns(position, layout.counts))
        return
    state.reserve(k, layout.cache.room(tokens))
    assert state.keys is not None and state.values is not None
    state.keys[:, :, :tokens] = k.transpose(1, 2)
    state.values[:, :, :tokens] = v.transpose(1, 2)


def continue_from(q: Tensor, k: Tensor, v: Tensor, state: KeysAndValues, layout: Layout, window: int | None) -> Tensor:
    """New tokens attend to those before, in the state, and to each other; the state takes them up."""
    cache, lengths = layout.cache, layout.lengths
    assert cache is not None and lengths is not None
    q, k, v = (layout.align(x) for x in (q, k, v))
    tokens, past = q.shape[1], lengths.long()
    position = past[:, None] + torch.arange(tokens, device=q.device)
    if isinstance(state, Window) and window is not None:
        columns = state.columns(position, layout.counts)
        if tokens == 1:
            state.write(k.detach(), v.detach(), columns)
            keys, values, key_position = state.keys, state.values, ring_positions(past + 1, state.ring)
            assert keys is not None and values is not None
            keys, values = keys[:, :, : state.ring], values[:, :, : state.ring]
        else:
            assert state.keys is not None and state.values is not None
            keys = torch.cat((state.keys[:, :, : state.ring].to(k.dtype), k.transpose(1, 2)), dim=2)
            values = torch.cat((state.values[:, :, : state.ring].to(v.dtype), v.transpose(1, 2)), dim=2)
            key_position = torch.cat((ring_positions(past, state.ring), position), dim=1)
            state.write(k.detach(), v.detach(), columns)
        back = position[:, :, None] - key_position[:, None]
        mask = (back >= 0) & (back <= window) & (key_position >= 0)[:, None]
        ends = None if tokens == 1 else state.ring
    else:
        state.reserve(k, cache.room(cache.seen + tokens) if cache.seen >= 0 else 0)
        state.write(k.detach(), v.detach(), position)
        assert state.keys is not None and state.values is not None
        keys, values = state.keys, state.values
        if not cache.static:
            keys, values = keys[:, :, : cache.seen + tokens], values[:, :, : cache.seen + tokens]
        mask = torch.arange(keys.shape[2], device=q.device) <= position[:, :, None]
        ends = 0
    keys, values, mask = keys.to(q.dtype), values.to(q.dtype), mask[:, None]
    ragged = layout.counts is not None or cache.valid is not None
    if ends is None or not ragged or q.is_cuda or torch.compiler.is_compiling():
        return layout.unalign(_sdpa(q, keys, values, mask))
    # On a CPU a row is computed by itself, as it would be alone: what is masked would change the order of its sums.
    y = torch.empty_like(q)
    counts = [tokens] * layout.batch if layout.counts is None else layout.counts.tolist()
    for b, (count, length) in enumerate(zip(counts, lengths.tolist(), strict=True)):
        if count:
            end = count + (ends or length)
            row = slice(b, b + 1)
            part = _sdpa(q[row, :count], keys[row, :, :end], values[row, :, :end], mask[row, :, :count, :end])
            y[row, :count] = part
    return layout.unalign(y)
