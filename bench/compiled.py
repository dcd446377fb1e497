"""The compiled peer: RAT as one writes it today with torch.compile, an associative scan and FlexAttention.

The recurrence is :func:`torch._higher_order_ops.associative_scan` over the tokens of each chunk, forward and, for the
gradient, in reverse. Attention to the states of earlier chunks is FlexAttention with a block mask; the token's own
state joins by the logsumexp that FlexAttention returns. Same arguments and results as :func:`rat_ext.rat_attention`; T
must be a multiple of L. ``compile=False`` runs the same code eagerly with the generic scan: that is how it is tested on
a CPU. :func:`decode_step` is a step of decoding, of the op or of a layer.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


def _combine(a, b):
    (fa, ka, va), (fb, kb, vb) = a, b
    return fa * fb, fb * ka + kb, fb * va + vb


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def _scan_forward(gate: Tensor, k: Tensor, v: Tensor, chunk_size: int, mode: str) -> tuple[Tensor, Tensor]:
    """k~, v~ ``(B, T, H, D)`` in the dtype of v; everything inside in float32."""
    batch, tokens, heads, dim = v.shape
    cut = (batch, tokens // chunk_size, chunk_size, heads, dim)
    acc = torch.promote_types(torch.float32, v.dtype)
    gate = gate.to(acc).view(cut)
    keep, take = torch.sigmoid(gate), torch.sigmoid(-gate)
    leaves = (keep, take * _expand(k, heads).to(acc).view(cut), take * v.to(acc).view(cut))
    _, ks, vs = associative_scan(_combine, leaves, dim=2, combine_mode=mode)
    return ks.to(v.dtype).reshape(v.shape), vs.to(v.dtype).reshape(v.shape)


def _scan_backward(gate, k, v, ks, vs, dks, dvs, chunk_size: int, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate, k and v from those of k~ and v~: the same scan, backwards, with f of the token after."""
    batch, tokens, heads, dim = v.shape
    cut = (batch, tokens // chunk_size, chunk_size, heads, dim)
    acc = torch.promote_types(torch.float32, v.dtype)
    gate, wide = gate.to(acc).view(cut), _expand(k, heads).to(acc).view(cut)
    keep, take = torch.sigmoid(gate), torch.sigmoid(-gate)
    after = torch.nn.functional.pad(keep[:, :, 1:], (0, 0, 0, 0, 0, 1))
    leaves = (after, dks.to(acc).view(cut), dvs.to(acc).view(cut))
    _, a, b = associative_scan(_combine, leaves, dim=2, reverse=True, combine_mode=mode)
    before_k = torch.nn.functional.pad(ks.to(acc).view(cut)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    before_v = torch.nn.functional.pad(vs.to(acc).view(cut)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    dgate = keep * take * (a * (before_k - wide) + b * (before_v - v.to(acc).view(cut)))
    dk = (take * a).reshape(batch, tokens, k.shape[2], heads // k.shape[2], dim).sum(3)
    return dgate.to(v.dtype).reshape(v.shape), dk.to(k.dtype), (take * b).to(v.dtype).reshape(v.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.float().chunk(2, dim=-1) if x.dtype != torch.float64 else x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def _attend(q, ks, vs, out_gate, cos, sin, chunk_size: int, block_mask, flex) -> Tensor:
    batch, tokens, heads, dim = vs.shape
    scale = dim**-0.5
    q = _expand(q, heads)
    last_k, last_v = ks[:, chunk_size - 1 :: chunk_size], vs[:, chunk_size - 1 :: chunk_size]
    chunks = last_k.shape[1]
    last_k = _rotate(last_k, cos[:chunks, None], sin[:chunks, None])
    by_token = (t[:chunks].repeat_interleave(chunk_size, dim=0)[:, None] for t in (cos, sin))
    turned = _rotate(q, *by_token)
    o, aux = flex(
        *(x.transpose(1, 2) for x in (turned, last_k, last_v)),
        block_mask=block_mask,
        scale=scale,
        return_aux=AuxRequest(lse=True),
    )
    own = scale * (q.to(aux.lse.dtype) * ks.to(aux.lse.dtype)).sum(-1)
    margin = (own - aux.lse.transpose(1, 2))[..., None]  # +inf in the first chunk: the own state is all there is
    o = o.transpose(1, 2).to(margin.dtype) * torch.sigmoid(-margin) + vs.to(margin.dtype) * torch.sigmoid(margin)
    return (torch.sigmoid(out_gate.to(margin.dtype)) * o).to(vs.dtype)


@functools.cache
def _block_mask(tokens: int, chunk_size: int, device: str):
    def earlier(b, h, token, chunk):
        return chunk < token // chunk_size

    return create_block_mask(earlier, None, None, tokens, tokens // chunk_size, device=device)


@functools.cache
def _functions(compile: bool):
    if not compile:
        return _scan_forward, _scan_backward, _attend
    torch._dynamo.config.recompile_limit = 256
    return tuple(torch.compile(f, dynamic=False) for f in (_scan_forward, _scan_backward, _attend))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, k, v, chunk_size, compile):
        ctx.chunk_size, ctx.compile = chunk_size, compile
        ks, vs = _functions(compile)[0](gate, k, v, chunk_size, "pointwise" if compile else "generic")
        ctx.save_for_backward(gate, k, v, ks, vs)
        return ks, vs

    @staticmethod
    def backward(ctx, dks, dvs):
        mode = "pointwise" if ctx.compile else "generic"
        grads = _functions(ctx.compile)[1](*ctx.saved_tensors, dks.contiguous(), dvs.contiguous(), ctx.chunk_size, mode)
        return (*grads, None, None)


def rat_attention(q, k, v, gate, chunk_size, *, out_gate, rotary_cos, rotary_sin, compile: bool = True) -> Tensor:
    """The peer. All of q, k, v, gate, out_gate ``(B, T, heads, D)`` contiguous."""
    ks, vs = _Scan.apply(gate, k, v, chunk_size, compile)
    mask = _block_mask(v.shape[1], chunk_size, str(v.device))
    return _functions(compile)[2](q, ks, vs, out_gate, rotary_cos, rotary_sin, chunk_size, mask, flex_attention)


def _step(
    q, k, v, gate, out_gate, gate_bias, chunk_k, chunk_v, running_k, running_v, lengths, cos, sin, chunk_size: int
) -> Tensor:
    """One token of each row, q, k (B, G, D), the rest (B, H, D); states and lengths as of a RATCache, updated in place."""
    heads, dim, acc = v.shape[1], v.shape[2], running_k.dtype
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1).to(acc) for x in (q, k))
    place, chunk = lengths % chunk_size, (lengths // chunk_size).long()
    gate = gate.to(acc) if gate_bias is None else gate.to(acc) + gate_bias.to(acc)
    keep, take = torch.sigmoid(gate), torch.sigmoid(-gate)
    first = (place == 0)[:, None, None]
    own_k = torch.where(first, 0, running_k) * keep + take * k
    own_v = torch.where(first, 0, running_v) * keep + take * v.to(acc)
    angles = cos[chunk][:, None], sin[chunk][:, None]
    turned = _rotate(q, *angles)
    earlier = torch.arange(chunk_k.shape[2], device=q.device) < chunk[:, None, None]
    scores = (turned[:, :, None] * chunk_k.to(acc)).sum(-1) * dim**-0.5
    scores = scores.masked_fill(~earlier, float("-inf"))
    own = (q * own_k).sum(-1, keepdim=True) * dim**-0.5
    top = torch.maximum(scores.amax(-1, keepdim=True), own)
    p, p_own = (scores - top).exp(), (own - top).exp()
    y = (p[..., None] * chunk_v.to(acc)).sum(2) + p_own * own_v
    y = (y / (p.sum(-1, keepdim=True) + p_own) * torch.sigmoid(out_gate.to(acc))).to(v.dtype)
    # The row of the open chunk is nobody's to read before its last token has written it.
    index = (torch.arange(v.shape[0], device=q.device)[:, None], torch.arange(heads, device=q.device), chunk[:, None])
    chunk_k.index_put_(index, _rotate(own_k, *angles).to(chunk_k.dtype))
    chunk_v.index_put_(index, own_v.to(chunk_v.dtype))
    running_k.copy_(own_k)
    running_v.copy_(own_v)
    lengths.add_(1)
    return y


def _layer_step(x, in_weight, out_weight, gate_bias, *rest) -> Tensor:
    """A layer's step: ``_step`` between two projections, of rows q, k, v, gate, out_gate. ``rest``: states, tables, L, G."""
    *rest, groups = rest
    heads, dim = gate_bias.shape
    projection = torch.nn.functional.linear(x, in_weight).unflatten(-1, (-1, dim))
    parts = projection.split((groups, groups, heads, heads, heads), dim=-2)
    return torch.nn.functional.linear(_step(*parts, gate_bias, *rest).flatten(1), out_weight)


def decode_step_eager(layer: bool):
    """The step of the op, or of a layer, without torch.compile."""
    return _layer_step if layer else _step


@functools.cache
def decode_step(layer: bool):
    """The same under torch.compile."""
    return torch.compile(decode_step_eager(layer), dynamic=False)
