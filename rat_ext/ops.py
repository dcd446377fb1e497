"""The public ops: their arguments, defaults and documentation. _autograd.py calls the operators behind them.

A wrong argument raises ``ValueError`` naming the argument, what was expected and what came. Facts that only a GPU knows
(``cu_seqlens``, lengths) are checked there: a bad one prints its name and stops the kernel, and the next CUDA call raises
``RuntimeError``.

The method is Wei, Yadav, Pascanu, Gulcehre, "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence
Modeling", arXiv 2507.04416.
"""

# Every op hands its arguments on by name, in a display, which costs the host a fifth of dict(). (Not as locals(): torch 2.11
# cannot trace it.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import _autograd
from ._arguments import wrong
from ._autograd import call, decode
from .cache import RATCache

if TYPE_CHECKING:
    from .parallel import ContextParallel


def _run(op: str, given: dict[str, Any], context_parallel: ContextParallel | None) -> Any:
    if context_parallel is None:
        return call(op, given)
    from .parallel import ContextParallel

    if not isinstance(context_parallel, ContextParallel):
        wrong(op, "context_parallel", "a ContextParallel or None", type(context_parallel).__name__)
    return context_parallel.call(op, given)


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
    max_seqlen: int | None = None,
    cache: RATCache | None = None,
    slots: Tensor | None = None,
    deterministic: bool = True,
    context_parallel: ContextParallel | None = None,
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
        rotary_cos, rotary_sin: ``(chunks, D / 2)`` tables by chunk index (:func:`rat_ext.rotary_tables`), at least one row per
            chunk, counting those of ``initial_state``. Queries and chunk keys are rotated by the index of their chunk. None: no
            positional encoding.
        scale: factor of the scores. Default ``D ** -0.5``.
        cu_seqlens: ``(N + 1,)`` int32: the tokens of sequence n are ``cu_seqlens[n] : cu_seqlens[n + 1]`` of the only row
            (B = 1). Each sequence has its own chunks from its own start. Empty ones are legal. Of a GPU never read by the host.
        initial_state: a :class:`RATCache` of B (or N) sequences to continue from, cut anywhere, also inside a chunk.
        return_state: also return the state after the last token.
        max_seqlen: of packed sequences the most new tokens that one has, for the state that is returned: each gets room for
            max_seqlen // L chunks more. None: the longest, where cu_seqlens is on the CPU, else T. Too small is an error.
        cache: a :class:`RATCache` that each sequence continues from and that is updated in place, instead of
            ``initial_state`` and ``return_state``: prefill pieces, single tokens and drafts of a serving batch in one call.
            Nothing is copied and nothing read by the host, so that a CUDA graph can replay it. No gradient. Outputs have the
            bits of one forward over all tokens, with any cut and in any batch.
        slots: ``(B or N,)`` int64, with ``cache``: the entry that each sequence continues, all distinct. A negative one, say
            -1, skips the sequence, whose y is 0. None: sequence n continues entry n.
        deterministic: gradients have the same bits every time. False lets the backward add up dq in any order, which is
            faster where Hopper's kernels run and changes nothing elsewhere.
        context_parallel: a :class:`rat_ext.parallel.ContextParallel`: the tensors are this rank's tokens of a longer row, which
            the ranks of its group hold together. It takes ``cu_seqlens``; ``initial_state`` is None; the state is returned on
            the rank that holds the last token, 0, and None on others. Rotary tables are those of the whole row.

    q, k, v, gate and out_gate share one dtype (bfloat16, float16, float32; on the CPU also float64) and one device. They may
    have any strides with a contiguous last dimension; no copy is made. Under autocast they are cast to its dtype.

    Returns:
        y ``(B, T, H, D)`` in the dtype of q; with ``return_state``, ``(y, RATCache)``. All of q, k, v, gate, gate_bias,
        out_gate and the floating tensors of ``initial_state`` get gradients, from y and from the returned state. There are no
        second derivatives.

    Raises:
        ValueError: an argument of wrong rank, shape, dtype, device or stride; G that does not divide H; an unsupported D;
            L < 1; malformed cu_seqlens; a rotary table that is too short.
        RuntimeError: the same for facts that only the GPU knows; a GPU older than compute capability 8.0. What a GPU finds
            wrong with ``cache`` (one that is full, a bad slot) does not stop it: :meth:`RATCache.check` raises it.

    Example:
        >>> import torch, rat_ext
        >>> q, k = (torch.randn(2, 100, 2, 32) for _ in range(2))
        >>> v, gate, out_gate = (torch.randn(2, 100, 4, 32) for _ in range(3))
        >>> cos, sin = rat_ext.rotary_tables(7, 32)
        >>> y = rat_ext.rat_attention(q, k, v, gate, 16, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin)
        >>> tuple(y.shape)
        (2, 100, 4, 32)
    """
    given: dict[str, Any] = {
        "q": q, "k": k, "v": v, "gate": gate, "chunk_size": chunk_size, "gate_bias": gate_bias, "out_gate": out_gate,
        "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "scale": scale, "cu_seqlens": cu_seqlens,
        "initial_state": initial_state, "return_state": return_state, "max_seqlen": max_seqlen, "cache": cache, "slots": slots,
        "deterministic": deterministic,
    }  # fmt: skip
    return _run("rat_attention", given, context_parallel)


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
    max_seqlen: int | None = None,
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
    given = {
        "q": q, "chunk_size": chunk_size, "out_gate": out_gate, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        "scale": scale, "cu_seqlens": cu_seqlens, "initial_state": initial_state, "return_state": return_state,
        "max_seqlen": max_seqlen, "deterministic": deterministic, "k": k_states, "v": v_states, "gate": None, "gate_bias": None,
    }  # fmt: skip
    return call("rat_attention", given, op="chunk_attention")


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
    max_seqlen: int | None = None,
    cache: RATCache | None = None,
    slots: Tensor | None = None,
    deterministic: bool = True,
    context_parallel: ContextParallel | None = None,
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
    given: dict[str, Any] = {
        "projection": projection, "num_heads": num_heads, "num_groups": num_groups, "chunk_size": chunk_size,
        "has_out_gate": has_out_gate, "gate_bias": gate_bias, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin,
        "scale": scale, "cu_seqlens": cu_seqlens, "initial_state": initial_state, "return_state": return_state,
        "max_seqlen": max_seqlen, "cache": cache, "slots": slots, "deterministic": deterministic,
    }  # fmt: skip
    return _run("rat_attention_packed", given, context_parallel)


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
    context_parallel: ContextParallel | None = None,
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
        context_parallel: as in :func:`rat_attention`; ``lengths`` is None too.

    Returns:
        y ``(B, T, H, D)`` in the dtype of x; with ``return_state``, ``(y, final_state)``. x, gate, gate_bias and initial_state
        get gradients, from y and from final_state.

    Raises:
        ValueError, RuntimeError: as :func:`rat_attention`.
    """
    given: dict[str, Any] = {
        "x": x, "gate": gate, "chunk_size": chunk_size, "gate_bias": gate_bias, "cu_seqlens": cu_seqlens,
        "initial_state": initial_state, "lengths": lengths, "return_state": return_state,
    }  # fmt: skip
    return _run("chunk_recurrence", given, context_parallel)


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
    exact: bool = False,
) -> Tensor:
    """One or a few new tokens for every sequence of a batch. Updates ``cache`` in place: states, closed chunks and lengths.

    On a GPU it is one kernel that reads lengths and slots on the device, so a CUDA graph can replay it across chunk
    boundaries. It has no gradient. A sequence's outputs depend on its own tokens alone, bit for bit, not on the batch; and n
    tokens at once (a draft, which :meth:`RATCache.rollback` takes back) give the bits of n steps.

    Args:
        q, k: ``(B, G, D)`` of the new token; or ``(B, n, G, D)`` of n tokens.
        v, gate: ``(B, H, D)`` or ``(B, n, H, D)``.
        cache: states of at least B sequences (:func:`rat_attention` with ``return_state``, :meth:`RATCache.empty`), with room
            for the new tokens (:meth:`RATCache.reserve`).
        gate_bias, out_gate, rotary_cos, rotary_sin, scale: as in :func:`rat_attention`; out_gate is shaped as v.
        slots: ``(B,)`` int64: which entry of the cache each row continues, all distinct. A negative one, say -1, skips the row,
            whose y is 0. None: row b continues entry b.
        exact: the forward's arithmetic, that of :func:`rat_attention` with ``cache``: outputs have the bits of one forward
            over all tokens, if all earlier ones came by a forward or were exact too. It is slower.

    Returns:
        y, shaped as v.

    Raises:
        ValueError: as :func:`rat_attention`; an input that needs a gradient; on the CPU, before anything is written, a full
            cache, a slot outside it or one that is named twice.

    A GPU skips a row whose slot is out of range, named before, or full: its y is 0 and its state stays as it is. The other rows
    are right, and :meth:`RATCache.check` raises what happened.

    Example:
        >>> import torch, rat_ext
        >>> cache = rat_ext.RATCache.empty(1, 4, 32, chunk_size=16, max_length=64)
        >>> q, k = (torch.randn(1, 2, 32) for _ in range(2))
        >>> v, gate = (torch.randn(1, 4, 32) for _ in range(2))
        >>> y = rat_ext.rat_decode_step(q, k, v, gate, cache)
        >>> int(cache.lengths[0])
        1
    """
    return decode({
        "q": q, "k": k, "v": v, "gate": gate, "cache": cache, "gate_bias": gate_bias, "out_gate": out_gate,
        "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "scale": scale, "slots": slots, "exact": exact,
    })  # fmt: skip


def explain(
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
    max_seqlen: int | None = None,
    cache: RATCache | None = None,
    slots: Tensor | None = None,
    deterministic: bool = True,
) -> list[dict[str, Any]]:
    """Which kernels a call of :func:`rat_attention` takes, forward and backward, and why. Nothing is computed.

    Args, errors: those of :func:`rat_attention`; tensors without memory (fake ones, those of the meta device) are refused, for
    their place matters. ``torch.compile`` leaves its graph for this call.

    Returns:
        For each phase its kernel families, best first, as dicts of ``phase`` ("attention_fwd"), ``family`` ("sm90", or the
        CPU's instruction set), ``chosen`` and ``why``: what decided, or the reason why the family does not serve the call.
        On a GPU a tensor of rows that do not all begin at multiples of 16 bytes has a phase too ("v_rows"): they are read
        "in_place" or "copied".

    Example:
        >>> import torch, rat_ext
        >>> x = torch.randn(1, 40, 2, 32)
        >>> [row["phase"] for row in rat_ext.explain(x, x, x, x, 16)]
        ['attention_fwd', 'attention_bwd']
    """
    return _autograd.explain("rat_attention", {
        "q": q, "k": k, "v": v, "gate": gate, "chunk_size": chunk_size, "gate_bias": gate_bias, "out_gate": out_gate,
        "rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "scale": scale, "cu_seqlens": cu_seqlens,
        "initial_state": initial_state, "return_state": return_state, "max_seqlen": max_seqlen, "cache": cache, "slots": slots,
        "deterministic": deterministic,
    })  # fmt: skip
