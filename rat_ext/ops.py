"""The public ops: thin wrappers over ``torch.ops.rat_ext``, with their shape rules for torch.compile and their gradients.

Arguments are checked in one place, ``csrc/ops.cpp``: a wrong one raises ``ValueError`` naming the argument, what was expected
and what came. Facts that only a GPU knows (``cu_seqlens``, lengths) are checked there: a bad one prints its name and stops
the kernel, and the next CUDA call raises ``RuntimeError``.

The method is Wei, Yadav, Pascanu, Gulcehre, "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence
Modeling", arXiv 2507.04416.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from . import _C  # noqa: F401  (loading it registers the operators)
from .cache import RATCache, state_dtype

_ops = torch.ops.rat_ext


# ---- arguments --------------------------------------------------------------------------------------------------------


def _table(name: str, x: Tensor | None, dtype: torch.dtype, differentiable: bool = False) -> Tensor | None:
    """A small tensor as the kernels want it: contiguous, in the state dtype."""
    if x is None:
        return None
    if not differentiable and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"rat_ext: {name}: expected a tensor that needs no gradient (the op has none for it), got one that does"
        )
    if x.dtype != dtype:
        x = x.to(dtype)
    return x.contiguous()


def _autocast(tensors: tuple) -> tuple:
    """Under autocast, float32 inputs are computed in the autocast dtype; their gradients come back in float32."""
    device = "cuda" if tensors[0].is_cuda else "cpu"  # asking a torch.device for its type makes a string each time
    if not torch.is_autocast_enabled(device) or not (tensors[0].is_cuda or tensors[0].is_cpu):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _state_args(op: str, chunk_size: int, tokens: int, cu_seqlens: Tensor | None, state: RATCache | None, return_state: bool):
    """The tensors of ``state``, the number of chunk rows to allocate, and the host's bound of the lengths afterwards."""
    step = max(chunk_size, 1)
    # The tracer makes a graph of its own for a size of 0 or 1: with two rows at least, one graph serves every length.
    fewest = 2 if torch.compiler.is_compiling() else 0
    if state is None:
        rows = tokens // step
        if cu_seqlens is not None and not return_state:
            rows += max(cu_seqlens.numel() - 1, 0)
        return (None,) * 5, max(rows, fewest), tokens
    if not isinstance(state, RATCache):
        raise ValueError(f"rat_ext.{op}: initial_state: expected a RATCache, got {type(state).__name__}")
    if state.chunk_size != chunk_size:
        raise ValueError(
            f"rat_ext.{op}: initial_state: expected a cache of chunk_size {chunk_size}, got one of {state.chunk_size}"
        )
    bound = state.length_bound + tokens
    tensors = (state.chunk_k, state.chunk_v, state.running_k, state.running_v, state.lengths)
    return tensors, max(state.chunk_k.shape[2], bound // step, fewest), bound


def _default_scale(shape: torch.Size) -> float:
    return max(shape[-1], 1) ** -0.5 if shape else 1.0


def _finish(result: Tensor | tuple, chunk_size: int, bound: int):
    if isinstance(result, Tensor):
        return result
    y, *state = result
    return y, RATCache(*state, chunk_size, bound)


# ---- the ops ----------------------------------------------------------------------------------------------------------


def rat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
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
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, RATCache]:
    """RAT: a gated linear recurrence inside chunks of L tokens, softmax attention across the states of the chunks.

    Inside a chunk, with ``f = sigmoid(gate + gate_bias)``, keys and values are compressed by ``k~_t = f_t k~_{t-1} + (1 - f_t)
    k_t`` (v~ alike), starting from 0 at each chunk. Token t attends to the last k~, v~ of every earlier chunk and to its own
    ``k~_t, v~_t``; the result is multiplied by ``sigmoid(out_gate_t)``. ``chunk_size=1`` is attention over gated keys and
    values, ``chunk_size >= T`` a gated linear RNN. States and gates are computed in float32 (float64 for float64).

    Args:
        q: ``(B, T, G, D)`` queries; G divides H, and head h uses group ``h // (H // G)``.
        k: ``(B, T, G, D)`` keys.
        v: ``(B, T, H, D)`` values. D is a multiple of 8, at most 256.
        gate: ``(B, T, H, D)`` logits of the forget gate.
        chunk_size: L, at least 1. T need not be a multiple.
        gate_bias: ``(H, D)``, added to ``gate``. Any floating dtype; used in float32.
        out_gate: ``(B, T, H, D)`` logits of the output gate. None: no gate.
        rotary_cos, rotary_sin: ``(chunks, D / 2)`` tables by chunk index (:func:`rat_ext.rotary_tables`), at least one row a
            chunk, counting those of ``initial_state``. Queries and chunk keys are rotated by the index of their chunk. None: no
            positional encoding.
        scale: factor of the scores. Default ``D ** -0.5``.
        cu_seqlens: ``(N + 1,)`` int32: the tokens of sequence n are ``cu_seqlens[n] : cu_seqlens[n + 1]`` of the only row
            (B = 1). Each sequence has its own chunks from its own start. Empty ones are legal. Never read by the host.
        initial_state: a :class:`RATCache` of B (or N) sequences to continue from, cut anywhere, also inside a chunk.
        return_state: also return the state after the last token. For packed sequences each gets room for T // L chunks.
        deterministic: gradients have the same bits every time. False lets the backward add up dq in any order, which is
            faster where Hopper's kernels run and changes nothing elsewhere.

    q, k, v, gate and out_gate share one dtype (bfloat16, float16, float32; on the CPU also float64) and one device. They may
    have any strides with a contiguous last dimension; no copy is made. Under autocast they are cast to its dtype.

    Returns:
        y ``(B, T, H, D)`` in the dtype of q; with ``return_state``, ``(y, RATCache)``. All of q, k, v, gate, gate_bias,
        out_gate and the floating tensors of ``initial_state`` get gradients, from y and from the returned state. There are no
        second derivatives.

    Raises:
        ValueError: an argument of wrong rank, shape, dtype, device or stride; G that does not divide H; an unsupported D;
            L < 1; malformed cu_seqlens; a rotary table that is too short.
        RuntimeError: the same for facts that only the GPU knows; a GPU older than compute capability 8.0.

    Example:
        >>> import torch, rat_ext
        >>> q, k = (torch.randn(2, 100, 2, 32) for _ in range(2))
        >>> v, gate, out_gate = (torch.randn(2, 100, 4, 32) for _ in range(3))
        >>> cos, sin = rat_ext.rotary_tables(7, 32)
        >>> y = rat_ext.rat_attention(q, k, v, gate, 16, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin)
        >>> tuple(y.shape)
        (2, 100, 4, 32)
    """
    q, k, v, gate, out_gate = _autocast((q, k, v, gate, out_gate))
    return _rat_attention(
        "rat_attention", q, k, v, gate, chunk_size, gate_bias, out_gate, rotary_cos, rotary_sin, scale, cu_seqlens,
        initial_state, return_state, deterministic,
    )  # fmt: skip


def chunk_attention(
    q: Tensor,
    k_states: Tensor,
    v_states: Tensor,
    chunk_size: int,
    *,
    out_gate: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: RATCache | None = None,
    return_state: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, RATCache]:
    """Attention across chunks over per-token states that any recurrence made: the second half of :func:`rat_attention`.

    Token t attends to ``k_states, v_states`` at the last token of every earlier chunk and at t itself.

    Args:
        q: ``(B, T, G, D)`` queries.
        k_states: ``(B, T, H, D)`` keys k~ of every token, a contiguous last dimension.
        v_states: ``(B, T, H, D)`` values v~.
        chunk_size: L, at least 1.

    The other arguments, the returned values and the errors are those of :func:`rat_attention`; the running state that it
    returns is that of the last token, and the initial one is not used.
    """
    q, k_states, v_states, out_gate = _autocast((q, k_states, v_states, out_gate))
    return _rat_attention(
        "chunk_attention", q, k_states, v_states, None, chunk_size, None, out_gate, rotary_cos, rotary_sin, scale, cu_seqlens,
        initial_state, return_state, deterministic,
    )  # fmt: skip


def _rat_attention(
    op, q, k, v, gate, chunk_size, gate_bias, out_gate, rotary_cos, rotary_sin, scale, cu_seqlens, initial_state,
    return_state, deterministic,
):  # fmt: skip
    acc = state_dtype(q.dtype)
    gate_bias = _table("gate_bias", gate_bias, acc, differentiable=True)
    rotary_cos, rotary_sin = _table("rotary_cos", rotary_cos, acc), _table("rotary_sin", rotary_sin, acc)
    shape = v.shape
    tokens = shape[1] if len(shape) == 4 else 0
    state, rows, bound = _state_args(op, chunk_size, tokens, cu_seqlens, initial_state, return_state)
    if scale is None:
        scale = _default_scale(shape)
    inputs = (q, k, v, gate, gate_bias, out_gate)
    args = (*inputs, rotary_cos, rotary_sin, cu_seqlens, *state, chunk_size, scale, rows, return_state, deterministic)
    if initial_state is not None:
        inputs += state[:4]
    return _finish(_call("rat_attention", args, inputs), chunk_size, bound)


def rat_attention_packed(
    projection: Tensor,
    num_heads: int,
    num_groups: int,
    chunk_size: int,
    *,
    has_out_gate: bool = True,
    gate_bias: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: RATCache | None = None,
    return_state: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, RATCache]:
    """:func:`rat_attention` on one projection that holds all its inputs; the gradient comes back as one tensor too.

    Splitting a projection by views and calling :func:`rat_attention` computes the same, but autograd then adds five gradients
    into a copy of the projection; here the kernels write into one buffer.

    Args:
        projection: ``(B, T, W)``: q (G D), k (G D), v (H D), gate (H D) and, with ``has_out_gate``, out_gate (H D), so
            W = (2 G + 3 H) D or (2 G + 2 H) D.
        num_heads: H.
        num_groups: G.
        chunk_size: L.
        has_out_gate: whether the projection ends with an output gate.

    The other arguments, the returned values and the errors are those of :func:`rat_attention`.

    Example:
        >>> import torch, rat_ext
        >>> projection = torch.randn(2, 50, (2 * 1 + 3 * 4) * 16, requires_grad=True)
        >>> rat_ext.rat_attention_packed(projection, 4, 1, 16).sum().backward()
        >>> projection.grad.shape == projection.shape
        True
    """
    (projection,) = _autocast((projection,))
    acc = state_dtype(projection.dtype)
    gate_bias = _table("gate_bias", gate_bias, acc, differentiable=True)
    rotary_cos, rotary_sin = _table("rotary_cos", rotary_cos, acc), _table("rotary_sin", rotary_sin, acc)
    tokens = projection.shape[1] if projection.dim() == 3 else 0
    state, rows, bound = _state_args("rat_attention_packed", chunk_size, tokens, cu_seqlens, initial_state, return_state)
    if scale is None:
        parts = 2 * num_groups + (3 if has_out_gate else 2) * num_heads
        scale = max(projection.shape[-1] // max(parts, 1), 1) ** -0.5
    args = (
        projection, num_heads, num_groups, has_out_gate, gate_bias, rotary_cos, rotary_sin, cu_seqlens, *state, chunk_size,
        scale, rows, return_state, deterministic,
    )  # fmt: skip
    inputs = (projection, gate_bias) if initial_state is None else (projection, gate_bias, *state[:4])
    return _finish(_call("rat_attention_packed", args, inputs), chunk_size, bound)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated linear recurrence alone: ``y_t = f_t y_{t-1} + (1 - f_t) x_t``, restarting from 0 every L tokens.

    Args:
        x: ``(B, T, G, D)`` inputs; G divides H.
        gate: ``(B, T, H, D)`` logits, ``f = sigmoid(gate + gate_bias)``.
        chunk_size: L, at least 1; L >= T is a plain gated linear RNN, computed in parallel over segments.
        gate_bias: ``(H, D)`` or None.
        cu_seqlens: ``(N + 1,)`` int32, packed sequences in a batch of 1, as in :func:`rat_attention`.
        initial_state: ``(B or N, H, D)`` float32 (float64 for float64): y of the token before the first one.
        lengths: ``(B or N,)`` int32: how many tokens came before; needed with ``initial_state``. Where it is a multiple of L
            the recurrence restarts and the initial state is not used.
        return_state: also return y of the last token of each sequence, ``(B or N, H, D)`` float32.

    Returns:
        y ``(B, T, H, D)`` in the dtype of x; with ``return_state``, ``(y, final_state)``. x, gate, gate_bias and initial_state
        get gradients, from y and from final_state.

    Raises:
        ValueError, RuntimeError: as :func:`rat_attention`.
    """
    x, gate = _autocast((x, gate))
    acc = state_dtype(x.dtype)
    gate_bias = _table("gate_bias", gate_bias, acc, differentiable=True)
    args = (x, gate, gate_bias, cu_seqlens, initial_state, lengths, chunk_size, return_state)
    return _call("chunk_recurrence", args, (x, gate, gate_bias, initial_state))


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
) -> Tensor:
    """One new token for every sequence of a batch. Updates ``cache`` in place: states, closed chunks and lengths.

    On a GPU it is one kernel that reads lengths and slots on the device, so a CUDA graph can replay it across chunk
    boundaries. It has no gradient.

    Args:
        q, k: ``(B, G, D)`` of the new token.
        v, gate: ``(B, H, D)``.
        cache: states of at least B sequences (:func:`rat_attention` with ``return_state``, :meth:`RATCache.empty`), with room
            for one more token (:meth:`RATCache.reserve`).
        gate_bias, out_gate, rotary_cos, rotary_sin, scale: as in :func:`rat_attention`; out_gate is ``(B, H, D)``.
        slots: ``(B,)`` int64: which entry of the cache each row continues, all distinct; -1 skips the row, whose y is 0. None:
            row b continues entry b.

    Returns:
        y ``(B, H, D)``.

    Raises:
        ValueError: as :func:`rat_attention`; a full cache or a slot outside the cache on the CPU; an input that needs a
            gradient.
        RuntimeError: a full cache or a slot outside the cache, found by the GPU.

    Example:
        >>> import torch, rat_ext
        >>> cache = rat_ext.RATCache.empty(1, 4, 32, chunk_size=16, max_length=64)
        >>> q, k = (torch.randn(1, 2, 32) for _ in range(2))
        >>> v, gate = (torch.randn(1, 4, 32) for _ in range(2))
        >>> y = rat_ext.rat_decode_step(q, k, v, gate, cache)
        >>> int(cache.lengths[0])
        1
    """
    if not isinstance(cache, RATCache):
        raise ValueError(f"rat_ext.rat_decode_step: cache: expected a RATCache, got {type(cache).__name__}")
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k", k), ("v", v), ("gate", gate), ("gate_bias", gate_bias), ("out_gate", out_gate),
                        ("cache", cache.running_k), ("cache", cache.chunk_k)):  # fmt: skip
            if x is not None and x.requires_grad:
                raise ValueError(
                    f"rat_ext.rat_decode_step: {name}: expected a tensor that needs no gradient (decoding has none; use "
                    "torch.no_grad() or RATCache.detach()), got one that does"
                )
    q, k, v, gate, out_gate = _autocast((q, k, v, gate, out_gate))
    acc = state_dtype(q.dtype)
    y = _ops.rat_decode_step.default(
        q, k, v, gate, _table("gate_bias", gate_bias, acc), out_gate, _table("rotary_cos", rotary_cos, acc),
        _table("rotary_sin", rotary_sin, acc), slots, *cache.tensors(), cache.decode_workspace(), cache.chunk_size,
        _default_scale(v.shape) if scale is None else scale,
    )  # fmt: skip
    cache.decoded()
    return y


# ---- shape rules for tracing ------------------------------------------------------------------------------------------


def _fake(name: str):
    """Registers the shape rule of an operator. Meta tensors reach it too, and with them any tensor beside them."""

    def register(rule):
        names = tuple(inspect.signature(rule).parameters)

        def checked(*args):
            tensors = [(n, x) for n, x in zip(names, args, strict=True) if isinstance(x, Tensor)]
            device = tensors[0][1].device
            for argument, x in tensors:
                if x.device != device:
                    raise ValueError(f"rat_ext.{name}: {argument}: expected a tensor on {device}, got one on {x.device}")
            return rule(*args)

        torch.library.register_fake(f"rat_ext::{name}")(checked)

    return register


def _fake_forward(like, batch, tokens, heads, dim, cu_seqlens, lengths, chunk_rows, return_state):
    acc = state_dtype(like.dtype)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    compact = cu_seqlens is not None and lengths is None and not return_state
    owners = 1 if compact else sequences
    return (
        like.new_empty(batch, tokens, heads, dim),
        like.new_empty(batch, heads, tokens, dtype=acc),
        like.new_empty(owners, heads, chunk_rows, dim),
        like.new_empty(owners, heads, chunk_rows, dim),
        like.new_empty(sequences, heads, dim, dtype=acc) if return_state else None,
        like.new_empty(sequences, heads, dim, dtype=acc) if return_state else None,
        like.new_empty(sequences, dtype=torch.int32) if return_state else None,
    )


@_fake("rat_attention")
def _(q, k, v, gate, gate_bias, out_gate, rotary_cos, rotary_sin, cu_seqlens, chunk_k, chunk_v, running_k, running_v, lengths,
      chunk_size, scale, chunk_rows, return_state, deterministic):  # fmt: skip
    return _fake_forward(q, *v.shape, cu_seqlens, lengths, chunk_rows, return_state)


@_fake("rat_attention_packed")
def _(projection, num_heads, num_groups, has_out_gate, gate_bias, rotary_cos, rotary_sin, cu_seqlens, chunk_k, chunk_v,
      running_k, running_v, lengths, chunk_size, scale, chunk_rows, return_state, deterministic):  # fmt: skip
    batch, tokens, width = projection.shape
    dim = width // (2 * num_groups + (3 if has_out_gate else 2) * num_heads)
    return _fake_forward(projection, batch, tokens, num_heads, dim, cu_seqlens, lengths, chunk_rows, return_state)


def _fake_state_grads(like, gate_bias, *state):
    acc = state_dtype(like.dtype)
    dtypes = (acc, like.dtype, like.dtype, acc, acc)
    return tuple(
        None if x is None else like.new_empty(x.shape, dtype=d) for x, d in zip((gate_bias, *state), dtypes, strict=True)
    )


@_fake("rat_attention_backward")
def _(dy, dchunk_k, dchunk_v, drunning_k, drunning_v, q, k, v, gate, gate_bias, out_gate, rotary_cos, rotary_sin, cu_seqlens,
      chunk_k, chunk_v, running_k, running_v, lengths, y, lse, saved_chunk_k, saved_chunk_v, chunk_size, scale,
      return_state, deterministic):  # fmt: skip
    bias, *state = _fake_state_grads(q, gate_bias, chunk_k, chunk_v, running_k, running_v)
    dq, dk, dv, dgate, dout_gate = (None if x is None else q.new_empty(x.shape) for x in (q, k, v, gate, out_gate))
    return dq, dk, dv, dgate, bias, dout_gate, *state


@_fake("rat_attention_packed_backward")
def _(dy, dchunk_k, dchunk_v, drunning_k, drunning_v, projection, num_heads, num_groups, has_out_gate, gate_bias, rotary_cos,
      rotary_sin, cu_seqlens, chunk_k, chunk_v, running_k, running_v, lengths, y, lse, saved_chunk_k, saved_chunk_v,
      chunk_size, scale, return_state, deterministic):  # fmt: skip
    small = _fake_state_grads(projection, gate_bias, chunk_k, chunk_v, running_k, running_v)
    return (projection.new_empty(projection.shape), *small)


@_fake("chunk_recurrence")
def _(x, gate, gate_bias, cu_seqlens, initial_state, lengths, chunk_size, return_state):
    batch, _, heads, dim = gate.shape
    n = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(gate.shape), x.new_empty(n, heads, dim, dtype=state_dtype(x.dtype)) if return_state else None


@_fake("chunk_recurrence_backward")
def _(dy, dfinal, x, gate, gate_bias, cu_seqlens, initial_state, lengths, y, chunk_size):
    acc = state_dtype(x.dtype)
    dbias, dinitial = (None if t is None else x.new_empty(t.shape, dtype=acc) for t in (gate_bias, initial_state))
    return x.new_empty(x.shape), x.new_empty(gate.shape), dbias, dinitial


@_fake("rat_decode_step")
def _(q, k, v, gate, gate_bias, out_gate, rotary_cos, rotary_sin, slots, chunk_k, chunk_v, running_k, running_v, lengths,
      workspace, chunk_size, scale):  # fmt: skip
    return v.new_empty(v.shape)


# ---- gradients --------------------------------------------------------------------------------------------------------
#
# Each op has its gradient twice, from the same operator. Tracing takes the operator itself, whose autograd torch.library
# registers: one input and one output for each of the schema. In eager mode that costs the host more than a small op costs a
# GPU, for autograd's work grows with every input and output, and torch.library looks up the schema argument by argument. There
# the wrappers go through an autograd.Function that shows autograd only what has a gradient: `args`, all arguments of the
# operator in a tuple, is opaque to it, and so are lse and chunk states that are only saved.


def _below_autograd(operator, *args):
    """Calls the kernel itself where nothing is recorded. Else a second derivative may be wanted: the operator refuses it."""
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


# What the backward reads is saved in the order of the backward operator's arguments.


def _attention_grads(ctx, dy, dchunk_k=None, dchunk_v=None, drunning_k=None, drunning_v=None, _dlengths=None):
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[-4])
    return _below_autograd(
        _ops.rat_attention_backward.default, dy, dchunk_k, dchunk_v, drunning_k, drunning_v, *saved, *ctx.numbers
    )


def _packed_grads(ctx, dy, dchunk_k=None, dchunk_v=None, drunning_k=None, drunning_v=None, _dlengths=None):
    projection, *saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[-4])
    return _below_autograd(
        _ops.rat_attention_packed_backward.default, dy, dchunk_k, dchunk_v, drunning_k, drunning_v, projection, *ctx.counts,
        *saved, *ctx.numbers,
    )  # fmt: skip


def _recurrence_grads(ctx, dy, dfinal=None):
    saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(saved[-1])
    return _below_autograd(_ops.chunk_recurrence_backward.default, dy, dfinal, *saved, ctx.chunk_size)


# Tracing: contexts and gradients of the operators.


def _save_attention(ctx, inputs, output):
    *tensors, chunk_size, scale, _, return_state, deterministic = inputs
    ctx.numbers = chunk_size, scale, return_state, deterministic
    ctx.save_for_backward(*tensors, *output[:4])


def _save_packed(ctx, inputs, output):
    projection, *ctx.counts = inputs[:4]
    *tensors, chunk_size, scale, _, return_state, deterministic = inputs[4:]
    ctx.numbers = chunk_size, scale, return_state, deterministic
    ctx.save_for_backward(projection, *tensors, *output[:4])


def _save_recurrence(ctx, inputs, output):
    *tensors, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*tensors, output[0])


def _operator_context(save):
    def context(ctx, inputs, output):
        if len(output) == 7:
            _, lse, *chunk_states, running_k, _, lengths = output
            ctx.mark_non_differentiable(lse, *((lengths,) if running_k is not None else chunk_states))
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    return context


def _attention_backward(ctx, dy, _dlse, dchunk_k, dchunk_v, drunning_k, drunning_v, _dlengths):
    grads = _attention_grads(ctx, dy, dchunk_k, dchunk_v, drunning_k, drunning_v)
    return *grads[:6], *(None,) * 3, *grads[6:], *(None,) * 6


def _packed_backward(ctx, dy, _dlse, dchunk_k, dchunk_v, drunning_k, drunning_v, _dlengths):
    dprojection, dbias, *dstate = _packed_grads(ctx, dy, dchunk_k, dchunk_v, drunning_k, drunning_v)
    return dprojection, *(None,) * 3, dbias, *(None,) * 3, *dstate, *(None,) * 6


def _recurrence_backward(ctx, dy, dfinal):
    dx, dgate, dbias, dinitial = _recurrence_grads(ctx, dy, dfinal)
    return dx, dgate, dbias, None, dinitial, None, None, None


# Eager mode: functions of `args`, all arguments of the operator in one tuple, and of those that may have a gradient, in the
# order in which the backward operator returns theirs. They return y, or y and the returned state.


def _eager_function(name: str, save, grads):
    operator = getattr(_ops, name).default

    def forward(ctx, args, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
        save(ctx, args, output)
        if output[-1] is None:  # no state is returned, and autograd gives zeros for a gradient of y that is missing
            return output[0]
        ctx.set_materialize_grads(False)
        return _without_lse(output)

    def backward(ctx, *grads_of_outputs):
        # Those past the last input (of a state that was not given) are None, which autograd takes.
        return None, *grads(ctx, *grads_of_outputs)

    function = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    # What Function.apply comes to outside torch.func, whose wrappers it looks for in every argument.
    return function.apply, super(torch.autograd.Function, function).apply


_functions = {}
for _name, _save, _grads, _backward in (
    ("rat_attention", _save_attention, _attention_grads, _attention_backward),
    ("rat_attention_packed", _save_packed, _packed_grads, _packed_backward),
    ("chunk_recurrence", _save_recurrence, _recurrence_grads, _recurrence_backward),
):
    torch.library.register_autograd(f"rat_ext::{_name}", _backward, setup_context=_operator_context(_save))
    _functions[_name] = _eager_function(_name, _save, _grads)


def _without_lse(output: tuple) -> tuple:
    return output if len(output) == 2 else (output[0], *output[2:])


def _call(name: str, args: tuple, inputs: tuple) -> tuple | Tensor:
    """Runs an operator as the wrappers call it, see above: y, or y and the returned state."""
    if torch.compiler.is_compiling():
        output = getattr(_ops, name).default(*args)
    elif torch.is_grad_enabled():
        under_func, plain = _functions[name]
        return (under_func if torch._C._are_functorch_transforms_active() else plain)(args, *inputs)
    else:
        output = _below_autograd(getattr(_ops, name).default, *args)
    return output[0] if output[-1] is None else _without_lse(output)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("rat_ext: the ops have first derivatives only; this needs a second one (create_graph=True?)")


for _name in ("rat_attention_backward", "rat_attention_packed_backward", "chunk_recurrence_backward"):
    torch.library.register_autograd(f"rat_ext::{_name}", _no_second_derivative)
