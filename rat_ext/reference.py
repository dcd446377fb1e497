"""The definition of every op in plain PyTorch: any dtype, any device, no cleverness. The oracle of the tests.

It follows Wei, Yadav, Pascanu, Gulcehre, "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence
Modeling" (arXiv 2507.04416), computes everything in the dtype of its inputs and is differentiable by autograd. Memory is
proportional to T * T / L. Signatures are those of :mod:`rat_ext.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache import RATCache, dequantise, quantise, state_dtype
from .rotary import rotate


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(..., G, D) -> (..., H, D): head h reads group h // (H // G)."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def _scan(x: Tensor, keep: Tensor, take: Tensor, chunk_size: int, start: int, running: Tensor | None) -> Tensor:
    """s_t = keep_t * s_{t-1} + take_t * x_t inside each chunk, for (B, T, H, D) that begins at position ``start``."""
    batch, tokens, heads, dim = x.shape
    before = start % chunk_size  # tokens of the first chunk that an earlier call has seen
    length = min(chunk_size, before + tokens)
    chunks = -(-(before + tokens) // length)
    after = chunks * length - before - tokens

    def cut(t: Tensor, fill: float) -> Tensor:
        t = torch.nn.functional.pad(t, (0, 0, 0, 0, before, after), value=fill)
        return t.reshape(batch, chunks, length, heads, dim)

    x, keep, take = cut(x, 0.0), cut(keep, 1.0), cut(take, 0.0)
    state = x.new_zeros(batch, chunks, heads, dim)
    if before and running is not None:
        state = torch.cat((running.to(x.dtype)[:, None], state[:, 1:]), dim=1)
    states = []
    for i in range(length):
        state = keep[:, :, i] * state + take[:, :, i] * x[:, :, i]
        states.append(state)
    return torch.stack(states, dim=2).reshape(batch, chunks * length, heads, dim)[:, before : before + tokens]


def _gates(gate: Tensor, gate_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """f and 1 - f from logits, each from its own sigmoid.

    In float64, by way of the logarithm: autograd takes the derivative of y = sigmoid(x) as y (1 - y), which cancels where y is
    nearly 1, and an oracle should not.
    """
    logits = gate if gate_bias is None else gate + gate_bias.to(gate.dtype)
    if logits.dtype == torch.float64:
        return torch.nn.functional.logsigmoid(logits).exp(), torch.nn.functional.logsigmoid(-logits).exp()
    return torch.sigmoid(logits), torch.sigmoid(-logits)


def _attend(q, k, v, chunk_size, start, chunk_k, chunk_v, out_gate, rotary_cos, rotary_sin, scale, fp8=False):
    """Softmax over the closed chunks before each token and its own state. k, v: (B, T, H, D) per-token states.

    ``chunk_k``, ``chunk_v`` are the closed chunks of earlier calls. Returns y and all closed chunks. With ``fp8``, chunks are
    rounded to FP8 when they close; the own state is not.
    """
    batch, tokens, heads, dim = v.shape
    q = _per_head(q, heads)
    chunk = torch.arange(start, start + tokens, device=q.device) // chunk_size
    first = start // chunk_size
    closed = (start + tokens) // chunk_size
    last = (torch.arange(first, closed, device=q.device) + 1) * chunk_size - 1 - start
    new_k, new_v = k[:, last], v[:, last]
    turned = q
    if rotary_cos is not None:
        index = torch.arange(first, closed, device=q.device)
        new_k = rotate(new_k, rotary_cos[index][:, None], rotary_sin[index][:, None])
        turned = rotate(q, rotary_cos[chunk][:, None], rotary_sin[chunk][:, None])
    if fp8:
        new_k, new_v = (dequantise(*quantise(x), x.dtype) for x in (new_k, new_v))
    chunk_k = torch.cat((chunk_k, new_k.transpose(1, 2)), dim=2)
    chunk_v = torch.cat((chunk_v, new_v.transpose(1, 2)), dim=2)

    scores = scale * torch.einsum("bthd,bhcd->bhtc", turned, chunk_k)
    visible = torch.arange(closed, device=q.device) < chunk[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    own = scale * (q * k).sum(-1).transpose(1, 2)[..., None]
    weights = torch.softmax(torch.cat((scores, own), dim=-1), dim=-1)
    o = torch.einsum("bhtc,bhcd->bthd", weights[..., :-1], chunk_v) + weights[..., -1].transpose(1, 2)[..., None] * v
    if not chunk_v.isfinite().all():  # a value that a token does not see is no part of its sum, 0 * inf would be NaN
        terms = (weights[..., :-1, None] * chunk_v[:, :, None]).masked_fill(~visible[..., None], 0.0)
        o = terms.sum(-2).transpose(1, 2) + weights[..., -1].transpose(1, 2)[..., None] * v
    y = o if out_gate is None else torch.sigmoid(out_gate) * o
    return y, chunk_k, chunk_v


def _sequences(tokens: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None):
    """(n, row, begin, end, start) of each sequence; None as n and row stands for the whole batch at once."""
    batch, count = tokens.shape[:2]
    if cu_seqlens is not None:
        cuts = cu_seqlens.tolist()
        for n, (begin, end) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
            yield n, 0, begin, end, 0 if lengths is None else int(lengths[n])
    elif lengths is not None:
        for n in range(batch):
            yield n, n, 0, count, int(lengths[n])
    else:
        yield None, None, 0, count, 0


def rat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    chunk_size: int,
    *,
    gate_bias: Tensor | None = None,
    out_gate: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: RATCache | None = None,
    return_state: bool = False,
    max_seqlen: int | None = None,
    cache: RATCache | None = None,
    slots: Tensor | None = None,
    deterministic: bool = True,  # no choice here: sums are taken in one order
):
    """:func:`rat_ext.rat_attention` by its definition; without a gate, :func:`rat_ext.chunk_attention`."""
    heads, dim = v.shape[2:]
    scale = dim**-0.5 if scale is None else scale
    if cache is not None:
        tables = (rotary_cos, rotary_sin)
        return _in_place(q, k, v, gate, cache, gate_bias, out_gate, tables, scale, cu_seqlens, slots)
    lengths = None if initial_state is None else initial_state.lengths
    total = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    longest = v.shape[1]
    if cu_seqlens is not None:
        longest = max(cu_seqlens.diff().tolist(), default=0) if max_seqlen is None else min(max_seqlen, longest)
    bound = (0 if initial_state is None else initial_state.length_bound) + longest
    rows = max(0 if initial_state is None else initial_state.chunk_k.shape[2], bound // chunk_size)
    acc = state_dtype(v.dtype)
    ys, states = [], []
    for n, row, begin, end, start in _sequences(v, cu_seqlens, lengths):
        batch = slice(None) if row is None else slice(row, row + 1)
        owner = slice(None) if n is None else slice(n, n + 1)

        def part(x, batch=batch, begin=begin, end=end):
            return None if x is None else x[batch, begin:end]

        qs, ks, vs, gs, zs = part(q), _per_head(part(k), heads), part(v), part(gate), part(out_gate)
        size = vs.shape[0]
        chunk_k = chunk_v = vs.new_zeros(size, heads, 0, dim)
        running_k = running_v = None
        if initial_state is not None:
            closed = start // chunk_size
            chunk_k, chunk_v = initial_state.chunk_k[owner, :, :closed], initial_state.chunk_v[owner, :, :closed]
            running_k, running_v = initial_state.running_k[owner], initial_state.running_v[owner]
        if gs is not None and end > begin:
            keep, take = _gates(gs, gate_bias)
            ks = _scan(ks, keep, take, chunk_size, start, running_k)
            vs = _scan(vs, keep, take, chunk_size, start, running_v)
        if end > begin:
            y, chunk_k, chunk_v = _attend(qs, ks, vs, chunk_size, start, chunk_k, chunk_v, zs, rotary_cos, rotary_sin, scale)
            ys.append(y)
            running_k, running_v = ks[:, -1].to(acc), vs[:, -1].to(acc)
        elif running_k is None:
            running_k = running_v = vs.new_zeros(size, heads, dim, dtype=acc)
        pad = (0, 0, 0, rows - chunk_k.shape[2])
        states.append(
            (
                torch.nn.functional.pad(chunk_k, pad),
                torch.nn.functional.pad(chunk_v, pad),
                running_k,
                running_v,
                torch.full((size,), start + end - begin, dtype=torch.int32, device=v.device),
            )
        )
    if cu_seqlens is None:
        y = torch.cat(ys, dim=0) if ys else torch.empty_like(v)
    else:
        y = torch.cat(ys, dim=1) if ys else torch.empty_like(v)
    if not return_state:
        return y
    if not total:
        state = RATCache.empty(0, heads, dim, chunk_size, rows * chunk_size, dtype=v.dtype, device=v.device)
    else:
        chunk_k, chunk_v, running_k, running_v, after = (torch.cat(x, dim=0) for x in zip(*states, strict=True))
        state = RATCache(chunk_k, chunk_v, running_k, running_v, after, chunk_size, bound)
    return y, state


def _in_place(q, k, v, gate, cache, gate_bias, out_gate, tables, scale, cu_seqlens, slots):
    """Every sequence continues its slot of the cache. Whatever is wrong with one is an error before anything is written."""
    size, ring = cache.chunk_size, cache.ring
    parts = []
    for n, row, begin, end, _ in _sequences(v, cu_seqlens, cache.lengths[: v.shape[0]] if cu_seqlens is None else None):
        slot = n if slots is None else int(slots[n])
        if slot < 0:
            continue
        if slot >= cache.batch or slot in [part[0] for part in parts]:
            raise ValueError(f"slots: expected distinct entries from 0 to {cache.batch - 1}, got {slot}")
        before = int(cache.lengths[slot])
        room = cache.rows if cache.page_table is None else int((cache.page_table[slot] >= 0).sum()) * cache.chunk_k.shape[2]
        if (before + end - begin) // size > room:
            raise ValueError(f"cache: expected room for {before + end - begin} tokens in slot {slot}, got {room} chunks")
        parts.append((slot, row, begin, end, before))
    y = torch.zeros_like(v)
    for slot, row, begin, end, before in parts:
        if begin == end:
            continue
        cut = (slice(row, row + 1), slice(begin, end))
        kept = [_chunks_of(cache, slot, name, before // size, v.dtype) for name in ("k", "v")]
        running = [getattr(cache, f"running_{name}")[slot] for name in ("k", "v")]
        if ring > 1:
            running = [x[(before - 1) % ring] for x in running]
        keep, take = _gates(gate[cut], gate_bias)
        ks = _scan(_per_head(k[cut], v.shape[2]), keep, take, size, before, running[0][None])
        vs = _scan(v[cut], keep, take, size, before, running[1][None])
        zs = None if out_gate is None else out_gate[cut]
        y[cut], *closed = _attend(q[cut], ks, vs, size, before, *kept, zs, *tables, scale, cache.fp8)
        for name, states, per_token in (("k", closed[0], ks), ("v", closed[1], vs)):
            for c in range(before // size, states.shape[2]):
                _put_chunk(cache, slot, name, c, states[0, :, c])
            at = getattr(cache, f"running_{name}")[slot]
            for t in range(max(begin, end - ring), end):
                (at[(before + t - begin) % ring] if ring > 1 else at).copy_(per_token[0, t - begin])
        cache.lengths[slot] = before + end - begin
    return y


def _chunks_of(cache: RATCache, slot: int, name: str, chunks: int, dtype: torch.dtype) -> Tensor:
    """(1, H, chunks, D): the closed chunks of an entry."""
    entry = cache.read(torch.tensor([slot], device=cache.lengths.device))
    x = getattr(entry, f"chunk_{name}")[:, :, :chunks]
    return dequantise(x, getattr(entry, f"scale_{name}")[:, :, :chunks], dtype) if cache.fp8 else x


def _put_chunk(cache: RATCache, slot: int, name: str, chunk: int, state: Tensor) -> None:
    """Writes the state (H, D) of a chunk that closed."""
    block, row = slot, chunk
    if cache.page_table is not None:
        page = cache.chunk_k.shape[2]
        block, row = int(cache.page_table[slot, chunk // page]), chunk % page
    if cache.fp8:
        state, scale = quantise(state)
        getattr(cache, f"scale_{name}")[block, :, row] = scale
    getattr(cache, f"chunk_{name}")[block, :, row] = state


def chunk_attention(q, k_states, v_states, chunk_size, **options):
    """:func:`rat_ext.chunk_attention` by its definition."""
    return rat_attention(q, k_states, v_states, None, chunk_size, **options)


def chunk_recurrence(
    x: Tensor,
    gate: Tensor,
    chunk_size: int,
    *,
    gate_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    return_state: bool = False,
):
    """:func:`rat_ext.chunk_recurrence` by its definition."""
    heads = gate.shape[2]
    keep, take = _gates(gate, gate_bias)
    x = _per_head(x, heads)
    acc = state_dtype(gate.dtype)
    ys, finals = [], []
    for n, row, begin, end, start in _sequences(gate, cu_seqlens, lengths):
        batch = slice(None) if row is None else slice(row, row + 1)
        owner = slice(None) if n is None else slice(n, n + 1)
        running = None if initial_state is None else initial_state[owner]
        cut = (batch, slice(begin, end))
        if end > begin:
            ys.append(_scan(x[cut], keep[cut], take[cut], chunk_size, start, running))
            running = ys[-1][:, -1].to(acc)
        elif running is None:
            running = x.new_zeros(x[cut].shape[0], heads, x.shape[-1], dtype=acc)
        finals.append(running)
    y = torch.cat(ys, dim=0 if cu_seqlens is None else 1) if ys else torch.empty_like(gate)
    if not return_state:
        return y
    return y, torch.cat(finals, dim=0) if finals else x.new_zeros(0, heads, x.shape[-1], dtype=acc)


def rat_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cache: RATCache,
    *,
    gate_bias: Tensor | None = None,
    out_gate: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    exact: bool = False,  # no choice here: there is one arithmetic
) -> Tensor:
    """:func:`rat_ext.rat_decode_step` by its definition: a forward of a few tokens that continues from the cache."""
    one = v.dim() == 3
    if one:
        q, k, v, gate = q[:, None], k[:, None], v[:, None], gate[:, None]
        out_gate = None if out_gate is None else out_gate[:, None]
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    y = _in_place(q, k, v, gate, cache, gate_bias, out_gate, (rotary_cos, rotary_sin), scale, None, slots)
    return y[:, 0] if one else y
