"""Context parallelism: one sequence, or one row of packed sequences, over several ranks.

Each rank holds an early and a late piece. It computes the chunk states of its tokens by the recurrence alone; states go to the
ranks whose tokens come later, and every piece is then a call of the op that continues from the state before it. Nothing is
approximated. What is sent, per layer:

- *running states*: the state at a cut is a linear function of the one before only inside the chunk that the cut divides. A
  piece of more than a chunk sends its own, ``2 B H D`` numbers in float32; only where a piece lies inside one chunk does it
  send the product of its gates besides, and states are composed;
- *chunk states*: ``2 H D / L`` numbers per token in the dtype of the op, of early pieces to all ranks, of late pieces to the
  ranks whose late piece comes after. In the backward, their gradients, the same way back.

Order, of the forward: tails of pieces; running states start; chunk states of the early piece; they start; those of the late
piece; they start; attention of what needs no state; of the early piece; of the late piece. Each transfer runs beside the
computation that follows its start.

Order, of the backward: attention of all pieces; gradients of late states start; of early states; recurrence of the late piece;
of the early piece. No transfer starts before attention is done, though those of late states could: attention of late pieces
takes ranks unlike times, of both pieces of a rank the same, and where a GPU's copies wait for another GPU they hold
multiprocessors meanwhile, which attention would have to do without.

Packed sequences, of which few cross a cut, go another way where they can: packed.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._arguments import ROWS, Given, floating, integer
from .._autograd import call_kernel, check_given
from ..cache import RATCache, state_dtype
from ..rotary import rotate
from .checkpoint import passing
from .exchange import Exchange, Route, finish, join, start
from .layout import Layout, States
from .packed import Plan, whole_row
from .parts import Columns, Parts, columns_in, view

# Tokens, over the batch, whose gradients by way of states are computed at once; forward, where less is held, twice as many.
# What the recurrence writes for every token is gone after each.
SLICE = 32768
# Tokens of a chunk that stays open whose states are kept, not computed again: that would cost the host more than their memory.
FEW = 256


def _wrong(op: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"rat_ext.{op}: {argument}: expected {expected}, got {got}")


def _dimension(op: str, x: Any, dim: Any) -> int:
    if not isinstance(x, Tensor):
        raise _wrong(op, "x", "a tensor", type(x).__name__)
    dim = integer(f"rat_ext.{op}", "dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise _wrong(op, "dim", f"a dimension of shape {tuple(x.shape)}", dim)
    return dim % x.dim()


def _final_states(
    xs: Sequence[Tensor], gate: Tensor, bias: Tensor | None, chunk_size: int, initial: Tensor | None = None, offset: int = 0
) -> Tensor:
    """States after each ``chunk_size`` tokens of ``xs``, ``(C, len(xs), B, H, D)``, for ``(B, C * chunk_size, ...)``.

    ``initial``: ``(len(xs), B, H, D)`` states before, of a chunk that has had ``offset`` tokens; then C = 1.
    """
    from ..ops import chunk_recurrence

    batch, tokens = gate.shape[:2]
    chunks = tokens // chunk_size
    options: dict[str, Any] = {"gate_bias": bias, "return_state": True}
    if initial is not None:
        options["lengths"] = torch.full((batch,), offset, dtype=torch.int32, device=gate.device)

    def rows(x: Tensor) -> Tensor:
        return x if chunks == 1 else x.unflatten(1, (chunks, chunk_size)).flatten(0, 1)

    gates, states = rows(gate), []
    for i, x in enumerate(xs):
        before = None if initial is None else initial[i].contiguous()
        state = chunk_recurrence(rows(x), gates, chunk_size + offset, initial_state=before, **options)[1]
        states.append(state.unflatten(0, (batch, chunks)))
    return torch.stack(states).permute(2, 0, 1, 3, 4)


def _kept(gate: Tensor, gate_bias: Tensor | None) -> Tensor:
    """The product of the forget gates of all tokens, ``(B, H, D)``: what is left of a state before them."""
    from ..ops import chunk_recurrence

    batch, tokens, heads, dim = gate.shape
    acc = state_dtype(gate.dtype)
    return chunk_recurrence(
        gate.new_zeros(batch, tokens, 1, dim), gate, tokens + 2, gate_bias=gate_bias, return_state=True,
        initial_state=torch.ones(batch, heads, dim, dtype=acc, device=gate.device),
        lengths=torch.ones(batch, dtype=torch.int32, device=gate.device),
    )[1]  # fmt: skip


def _numbers(name: str, values: Any) -> tuple[int, ...]:
    """Ints of the host, of a list or a tensor."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool or values.is_meta:
            got = f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)} on {values.device}"
            raise _wrong("ContextParallel", name, "a list or 1-D tensor of ints", got)
        values = values.tolist()
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise _wrong("ContextParallel", name, "a list or 1-D tensor of ints", type(values).__name__)
    return tuple(integer("rat_ext.ContextParallel", name, n) for n in values)


class _WholeChunks(torch.autograd.Function):
    """States of whole chunks in a row, ``(C, S, B, H, D)`` with S = 2, k~ rotated and v~. Of the tokens nothing is kept.

    A slice of tokens at a time, and so the backward, which adds gradients to the buffers of Parts as they come.
    """

    @staticmethod
    def forward(
        ctx: Any, sources: Sequence[tuple[Parts, Columns | None]], begin: int, chunks: int, size: int, tables: Any,
        bias: Tensor | None, *xs: Tensor,
    ) -> Tensor:  # fmt: skip
        """``sources``: where the rows of k, v and gate are, of chunks of ``size`` tokens from local token ``begin`` on.

        ``xs``: the tensors of ``sources``. ``tables``: cosines and sines of the chunks, or None.
        """
        from ..ops import chunk_recurrence

        ctx.set_materialize_grads(False)
        ctx.sources, ctx.where, ctx.tables = sources, (begin, chunks, size), tables
        ctx.save_for_backward(bias, *xs)
        batch = xs[0].shape[0]
        states: Tensor | None = None
        for first, count in _WholeChunks.slices(ctx, batch, 2 * SLICE):
            *rows, gate = _WholeChunks.rows(ctx, xs, first, count)
            for i, x in enumerate(rows):
                with passing():
                    state = chunk_recurrence(x, gate, size, gate_bias=bias, return_state=True)[1]
                if states is None:
                    states = state.new_empty(chunks, len(rows), batch, *state.shape[1:])
                states[first : first + count, i] = state.unflatten(0, (batch, count)).transpose(0, 1)
        assert states is not None
        if tables is not None:
            states[:, 0] = rotate(states[:, 0], *tables)
        return states

    @staticmethod
    def slices(ctx: Any, batch: int, tokens: int) -> list[tuple[int, int]]:
        """(first chunk, chunks) of each, of at most so many tokens."""
        _, chunks, size = ctx.where
        step = max(tokens // max(batch, 1) // size, 1)
        return [(first, min(step, chunks - first)) for first in range(0, chunks, step)]

    @staticmethod
    def rows(ctx: Any, xs: Sequence[Tensor], first: int, count: int) -> list[Tensor]:
        """A row for each chunk of a slice: ``(B * count, size, heads, D)`` of each source."""
        begin, _, size = ctx.where
        cut = (view(x, begin + first * size, count * size, columns) for x, (_, columns) in zip(xs, ctx.sources, strict=True))
        return [x.unflatten(1, (count, size)).flatten(0, 1) for x in cut]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        bias, *xs = ctx.saved_tensors
        nothing = (None,) * (6 + len(xs))
        if grad is None:
            return nothing
        begin, _, size = ctx.where
        dstates = list(grad.unbind(1))
        if ctx.tables is not None:
            cos, sin = ctx.tables
            dstates[0] = rotate(dstates[0], cos, -sin)
        dbias: Tensor | None = None
        for parts, _ in ctx.sources:
            if parts.x.requires_grad:
                parts.gather()  # now, before there are gradients that need memory beside it
        for first, count in _WholeChunks.slices(ctx, xs[0].shape[0], SLICE):
            *rows, gate = _WholeChunks.rows(ctx, xs, first, count)
            at = begin + first * size, count * size
            for i, x in enumerate(rows):
                dstate = dstates[i][first : first + count].transpose(0, 1).flatten(0, 1)
                # No token but the last of a chunk has a gradient: one row of zeros stands for all. y is not read, only checked.
                dy = gate.new_zeros(gate.shape[-1]).expand(gate.shape)
                dx, dgate, more, _ = call_kernel(
                    "chunk_recurrence_backward", dy=dy, dfinal_state=dstate, x=x, gate=gate, gate_bias=bias, y=gate,
                    chunk_size=size,
                )  # fmt: skip
                for (parts, columns), g in ((ctx.sources[i], dx), (ctx.sources[-1], dgate)):
                    parts.add(*at, columns, g.view(xs[0].shape[0], count * size, *g.shape[2:]))
                if more is not None:
                    dbias = more if dbias is None else dbias + more
        # Parts give the rows' gradients on; only the bias gets its own here.
        return *nothing[:5], dbias, *nothing[6:]


def _passing(function: Callable, *args: Any) -> Any:
    """Calls it; selective checkpoints around it keep nothing of it."""
    with passing():
        return function(*args)


def _again(function: Callable, *args: Any) -> Any:
    """Calls it, and again in the backward: nothing of the size of the tokens is kept."""
    if not torch.is_grad_enabled():
        return _passing(function, *args)
    return checkpoint(_passing, function, *args, use_reentrant=False, preserve_rng_state=False)


class ContextParallel:
    """Tokens of one row spread over the ranks of a group.

    Rank r of W holds pieces r and 2 W - 1 - r of 2 W, one after the other: the order of PyTorch's own context parallelism.
    :meth:`shard` cuts a global tensor, :meth:`gather` puts the parts together, :meth:`positions` tells where local tokens
    stand. Every rank of the group makes the same calls in the same order, backward included.

    Args:
        group: a process group or a mesh of one dimension. None: all processes.
        tokens: T of the global row. None: each call's local tokens times W, in 2 W pieces of one length.
        cuts: the 2 W + 1 positions between pieces, from 0 to T. None: equal pieces, as far as T allows.
        cu_seqlens: ``(N + 1,)``: sequences packed in the row, of which any may cross any cut. The host has to know them: a
            list, a tensor of the CPU, or one of a GPU, which is waited for, once.

    Example:
        >>> from rat_ext.parallel import ContextParallel
        >>> cp = ContextParallel(tokens=100)            # a process alone is a group of one
        >>> tuple(cp.shard(torch.randn(2, 100, 8)).shape)
        (2, 100, 8)
    """

    def __init__(
        self,
        group: Any = None,
        tokens: int | None = None,
        *,
        cuts: Sequence[int] | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ):
        if tokens is not None:
            tokens = integer("rat_ext.ContextParallel", "tokens", tokens)
            if tokens < 0:
                raise _wrong("ContextParallel", "tokens", "at least 0", tokens)
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.group = group.get_group() if hasattr(group, "get_group") else group
        self.rank, self.world = (0, 1) if alone else (dist.get_rank(self.group), dist.get_world_size(self.group))
        if self.rank < 0:
            raise _wrong("ContextParallel", "group", "one that this process is in", "another")
        self.cu_seqlens = None if cu_seqlens is None else _numbers("cu_seqlens", cu_seqlens)
        if self.cu_seqlens is not None:
            falls = any(a > b for a, b in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True))
            if len(self.cu_seqlens) < 1 or self.cu_seqlens[0] != 0 or falls:
                raise _wrong("ContextParallel", "cu_seqlens", "numbers that begin at 0 and never fall", self.cu_seqlens[:8])
            if tokens is not None and tokens != self.cu_seqlens[-1]:
                raise _wrong("ContextParallel", "tokens", f"the end of cu_seqlens, {self.cu_seqlens[-1]}", tokens)
            tokens = self.cu_seqlens[-1]
        if cuts is not None:
            cuts = _numbers("cuts", cuts)
            falls = any(a > b for a, b in zip(cuts[:-1], cuts[1:], strict=True))
            if len(cuts) != 2 * self.world + 1 or cuts[0] != 0 or falls or tokens not in (None, cuts[-1]):
                expected = f"{2 * self.world + 1} numbers from 0 to {'T' if tokens is None else tokens} that never fall"
                raise _wrong("ContextParallel", "cuts", expected, cuts)
            tokens = cuts[-1]
        self.tokens, self.cuts = tokens, cuts
        self._layouts: dict[int, Layout] = {}
        self._cu_seqlens: dict[Any, Tensor] = {}
        self._routes: dict[Any, Route] = {}
        self._plans: dict[tuple[int, int], Plan] = {}

    def __repr__(self) -> str:
        return f"ContextParallel(rank {self.rank} of {self.world}, {self.tokens or 'any'} tokens)"

    # ---- tokens ----

    def _layout(self, tokens: int) -> Layout:
        if tokens not in self._layouts:
            pieces = 2 * self.world
            cuts = self.cuts or [i * tokens // pieces for i in range(pieces + 1)]
            self._layouts[tokens] = Layout(self.world, cuts, self.cu_seqlens)
        return self._layouts[tokens]

    def length(self, tokens: int) -> int:
        """T of the global row for a call of ``tokens`` local tokens."""
        tokens = integer("rat_ext.ContextParallel", "tokens", tokens)
        if tokens < 0:
            raise _wrong("ContextParallel", "tokens", "at least 0", tokens)
        return tokens * self.world if self.tokens is None else self.tokens

    def _mine(self) -> tuple[int, int]:
        return self.rank, 2 * self.world - 1 - self.rank

    def _local(self, op: str, x: Tensor, dim: int = 1) -> Layout:
        """The layout of a call whose tensors of tokens are like ``x``."""
        tokens = self.length(x.shape[dim])
        if self.tokens is None and tokens % (2 * self.world):
            raise _wrong(op, "context_parallel", "one that knows T, for pieces that differ in length", repr(self))
        layout = self._layout(tokens)
        here = sum(layout.pieces[p].tokens for p in self._mine())
        if x.shape[dim] != here:
            raise _wrong(op, "context_parallel", f"{here} tokens on rank {self.rank} of {self.world}", x.shape[dim])
        return layout

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """What this rank holds of a global tensor whose dimension ``dim`` is tokens."""
        dim = _dimension("ContextParallel.shard", x, dim)
        if self.tokens is not None and x.shape[dim] != self.tokens:
            raise _wrong("ContextParallel.shard", "x", f"{self.tokens} tokens", x.shape[dim])
        pieces = [self._layout(x.shape[dim]).pieces[p] for p in self._mine()]
        return torch.cat([x.narrow(dim, piece.begin, piece.tokens) for piece in pieces], dim=dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The global tensor of all ranks' parts, on every rank. Its gradient is the sum of those of all ranks."""
        dim = _dimension("ContextParallel.gather", x, dim)
        layout = self._local("ContextParallel.gather", x, dim)
        if self.world == 1 or not layout.tokens:
            return x.clone()
        mine = [x.narrow(dim, *span) for span in self._spans(layout)]
        wanted = {(p, r): (0, piece.tokens) for p, piece in enumerate(layout.pieces) for r in range(self.world)}
        got = self._fetch(layout, [part.movedim(dim, 0) for part in mine], wanted)
        return torch.cat([got[p] for p in sorted(got)]).movedim(0, dim)

    def positions(self, tokens: int | None = None, device: torch.device | str | None = None) -> Tensor:
        """``(local tokens,)`` int64: the place of each in its sequence, for what rotates by token.

        ``tokens``: the local ones, where the length is not fixed.
        """
        layout = self._layout(self.length(0 if tokens is None else tokens))
        parts = []
        for piece in (layout.pieces[p] for p in self._mine()):
            lengths = [(piece.past, piece.continued), *((0, n) for n in piece.fresh)]
            parts += [torch.arange(past, past + n, device=device) for past, n in lengths]
        return torch.cat(parts)

    def _spans(self, layout: Layout) -> list[tuple[int, int]]:
        """(begin, tokens) of this rank's pieces in its local row."""
        early, late = (layout.pieces[p].tokens for p in self._mine())
        return [(0, early), (early, late)]

    def _fetch(self, layout: Layout, mine: list[Tensor], wanted: dict) -> dict[int, Tensor]:
        """Rows of other pieces, by piece, in one transfer. ``mine``: the rows of both pieces of this rank."""
        route = Route(self.rank, self.world, [piece.owner for piece in layout.pieces], wanted)
        exchange = Exchange(self.group, route, mine[0].shape[1:], mine[0].dtype)
        return finish(exchange, start(exchange, mine, ()))[0]

    # ---- what is sent ----

    def _route(self, layout: Layout, chunk_size: int, kind: str) -> Route:
        """Of "running" states, of the chunk states of "early" pieces and of those of "late" ones."""
        key = (layout.tokens, chunk_size, kind)
        if key not in self._routes:
            wanted: dict[tuple[int, int], tuple[int, int]] = {}
            for p, piece in enumerate(layout.pieces):
                if kind == "running":
                    if piece.continued:
                        wanted |= {(q, piece.owner): (0, 1) for q in layout.chain(p, chunk_size)}
                    continue
                for q in layout.earlier(p):
                    states = layout.pieces[q].states(chunk_size)
                    if states is not None and (q < self.world) == (kind == "early"):
                        wanted[q, piece.owner] = (0, states.closed)
            self._routes[key] = Route(self.rank, self.world, [piece.owner for piece in layout.pieces], wanted)
        return self._routes[key]

    def _plan(self, layout: Layout, chunk_size: int) -> Plan | None:
        """Of packed sequences, where a call over all tokens of a rank is possible."""
        if self.cu_seqlens is None or self.world == 1:
            return None
        key = (layout.tokens, chunk_size)
        if key not in self._plans:
            self._plans[key] = Plan(layout, chunk_size, self.rank, self.world)
        plan = self._plans[key]
        return plan if plan.fits else None

    def _through(self, layout: Layout, chunk_size: int) -> bool:
        """Whether a piece lies inside one chunk, so that running states have to be composed."""
        return any(len(layout.chain(p, chunk_size)) > 1 for p in range(2 * self.world))

    def bytes_sent(
        self, batch: int, num_heads: int, head_dim: int, chunk_size: int, dtype: torch.dtype, tokens: int | None = None
    ) -> dict[str, int]:
        """Bytes that this rank sends in one layer, by what: "running", "early" and "late" states, and their "backward".

        ``tokens``: the local ones, where the length is not fixed.
        """
        name = "ContextParallel.bytes_sent"
        batch, num_heads, head_dim, chunk_size = (
            integer(f"rat_ext.{name}", argument, n)
            for argument, n in (
                ("batch", batch), ("num_heads", num_heads), ("head_dim", head_dim), ("chunk_size", chunk_size)
            )
        )  # fmt: skip
        if chunk_size < 1:
            raise _wrong(name, "chunk_size", "at least 1", chunk_size)
        if floating(f"rat_ext.{name}", "dtype", dtype) is None:
            raise _wrong(name, "dtype", "a floating dtype", dtype)
        layout = self._layout(self.length(0 if tokens is None else tokens))
        if (plan := self._plan(layout, chunk_size)) is not None:
            acc = state_dtype(dtype).itemsize
            return plan.bytes_by_kind(self.rank, batch * num_heads * head_dim, dtype.itemsize, acc)
        row = 2 * batch * num_heads * head_dim
        wide = row * state_dtype(dtype).itemsize
        if self._through(layout, chunk_size):
            wide = wide // 2 * 3
        width = {"running": wide, "early": row * dtype.itemsize, "late": row * dtype.itemsize}
        routes = {kind: self._route(layout, chunk_size, kind) for kind in width}
        sent = {kind: route.rows_sent * width[kind] for kind, route in routes.items()}
        return sent | {"backward": sum(route.rows_received * width[kind] for kind, route in routes.items())}

    # ---- the op ----

    @torch.compiler.disable
    def call(self, op: str, given: Given) -> Any:
        """rat_attention, rat_attention_packed or chunk_recurrence of the whole row, on this rank's tokens.

        Args:
            op: its name.
            given: its arguments by name, without ``context_parallel``.
        """
        for name in ("initial_state", "lengths", "cu_seqlens", "max_seqlen", "cache", "slots"):
            if given.get(name) is not None:
                expected = "None beside context_parallel" + (", which takes them itself" if name == "cu_seqlens" else "")
                raise _wrong(op, name, expected, type(given[name]).__name__)
        lead = given[next(name for name in ROWS if name in given)]
        check_given(op, given)
        if not isinstance(lead, Tensor) or lead.dim() < 3:
            raise _wrong(op, "context_parallel", "tensors of tokens (B, T, ...)", type(lead).__name__)
        if self.cu_seqlens is not None and lead.shape[0] != 1:
            raise _wrong(op, "context_parallel", "B = 1 for packed sequences", lead.shape[0])
        if given["return_state"] and self.cuts is not None and self.cu_seqlens is None and self.cuts[-2] == self.cuts[-1]:
            raise _wrong(op, "return_state", "False where the last piece of context_parallel is empty", True)
        return _Call(self, op, dict(given)).run()


def _check_shapes(op: str, given: Given) -> None:
    """Has the op itself refuse, in its words and before any transfer, local tensors that do not fit each other.

    A few comparisons tell of most calls that they fit; of the others the op tells, on meta tensors.
    """
    from .. import ops

    rows = [given[name] for name in ROWS if given.get(name) is not None]
    lead, heads = rows[0], {given[name].shape[2:3] for name in ("v", "gate", "out_gate") if given.get(name) is not None}
    cos, sin = given.get("rotary_cos"), given.get("rotary_sin")
    fit = all(x.dim() == lead.dim() and x.shape[:2] == lead.shape[:2] and x.shape[3:] == lead.shape[3:] for x in rows)
    fit = fit and len(heads) < 2 and len({x.dtype for x in rows}) == 1
    if not fit or (cos is not None and sin is not None and cos.shape != sin.shape):
        with torch.no_grad():
            getattr(ops, op)(**{name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()})


class _Call:
    """One call: its tensors cut into spans, the states of this rank's pieces, the transfers."""

    def __init__(self, cp: ContextParallel, op: str, given: Given):
        from .. import ops

        self.cp, self.function, self.op = cp, getattr(ops, op), op
        device = "cuda" if given[next(name for name in ROWS if name in given)].is_cuda else "cpu"
        if torch.is_autocast_enabled(device):  # states are sent in the dtype that the ops compute in
            dtype = torch.get_autocast_dtype(device)
            for name in ROWS:
                x = given.get(name)
                if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                    given[name] = x.to(dtype)
        _check_shapes(op, given)
        self.given = given
        self.rows = [name for name in ROWS if given.get(name) is not None]
        self.lead = given[self.rows[0]]
        self.alone = op == "chunk_recurrence"
        self.sources = ("x", "gate") if self.alone else ("k", "v", "gate")
        self.states = len(self.sources) - 1  # how many a token has: k~ and v~, or y
        self.layout = cp._local(op, self.lead)
        self.chunk_size = integer(op, "chunk_size", given["chunk_size"])
        if self.chunk_size < 1:
            raise _wrong(op, "chunk_size", "at least 1", self.chunk_size)
        self.pieces = [self.layout.pieces[p] for p in cp._mine()]
        self._check_tables()

    def _check_tables(self) -> None:
        need, cos = -(-self.layout.longest // self.chunk_size), self.given.get("rotary_cos")
        if (cos is None) != (self.given.get("rotary_sin") is None):
            raise _wrong(self.op, "rotary_cos, rotary_sin", "both or neither", "one of them")
        if isinstance(cos, Tensor) and cos.dim() == 2 and cos.shape[0] < need:
            raise _wrong(self.op, "rotary_cos", f"at least {need} rows, of the whole sequence", cos.shape[0])

    def _plan(self) -> Plan | None:
        """Where the op over all tokens of each rank is all of it. What a rank is given wrong is told by the other way."""
        given = self.given
        rows = {"q", "k", "v", "gate"} if "q" in given else {"projection"}
        usual = rows <= set(self.rows) and all(isinstance(given[name], Tensor) for name in self.rows)
        cos = given.get("rotary_cos")
        if self.alone or given["return_state"] or not usual or (cos is not None and cos.requires_grad):
            return None
        return self.cp._plan(self.layout, self.chunk_size)

    # ---- states ----

    def _cut_rows(self) -> None:
        """Cuts the local tokens into spans: what continues in the early piece, what begins in it, the same of the late one."""
        cuts = [0]
        for piece in self.pieces:
            cuts += [cuts[-1] + piece.continued, cuts[-1] + piece.tokens]
        self.cuts = cuts
        self.parts = {name: Parts(self.given[name], cuts) for name in self.rows}

    def _places(self) -> list[tuple[Parts, Columns | None]]:
        """Where the rows are that recurrences run over, k and v or x, and those of their gate."""
        if self.rows[0] != "projection":
            return [(self.parts[name], None) for name in self.sources]
        return [(self.parts["projection"], columns) for columns in columns_in(self.lead, self.given)]

    def _inputs_of_states(self, begin: int, tokens: int) -> tuple[Tensor, ...]:
        """Those of some local tokens."""
        return tuple(parts.part(begin, tokens, columns) for parts, columns in self._places())

    def _whole(self, begin: int, s: States) -> Tensor:
        """Rotated states of a piece's whole chunks, which begin at a local token."""
        bias = self.given["gate_bias"]
        if bias is not None:
            bias = bias.to(state_dtype(self.lead.dtype))
        tables = self._tables(s.first + (s.head > 0), s.whole)
        places = self._places()
        return _WholeChunks.apply(places, begin, s.whole, self.chunk_size, tables, bias, *(parts.x for parts, _ in places))

    def _states_of(self, parts: tuple[Tensor, ...], chunk_size: int, *initial: Any) -> Tensor:
        return _final_states(parts[:-1], parts[-1], self.given["gate_bias"], chunk_size, *initial)

    def _tail(self, parts: tuple[Tensor, ...], compose: bool) -> Tensor:
        """What a piece says of the chunk that is open at its end: ``(1, 2 or 3, B, H, D)``, states and what is kept."""
        call = _again if parts[-1].shape[1] > FEW else _passing
        u = call(self._states_of, parts, parts[-1].shape[1])[0]
        if not compose:
            return u[None]
        return torch.cat((u, call(_kept, parts[-1], self.given["gate_bias"])[None]))[None]

    def _tables(self, first: int, chunks: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of some chunks, ``(chunks, 1, 1, D / 2)``."""
        cos, sin = self.given["rotary_cos"], self.given["rotary_sin"]
        if cos is None:
            return None
        acc = state_dtype(self.lead.dtype)
        c, s = (table[first : first + chunks, None, None].to(acc) for table in (cos, sin))
        return c, s

    def _turned(self, rows: Tensor, first: int) -> Tensor:
        """Chunk states ``(C, 2, B, H, D)`` whose keys are rotated by the index of their chunk."""
        tables = self._tables(first, rows.shape[0])
        return rows if tables is None else torch.stack((rotate(rows[:, 0], *tables), rows[:, 1]), dim=1)

    def run(self) -> Any:
        cp, layout, given = self.cp, self.layout, self.given
        if cp.world == 1:
            return self.function(**given | {"cu_seqlens": None if cp.cu_seqlens is None else self._packed(layout.starts)})
        if (plan := self._plan()) is not None:
            return whole_row(cp.group, self.op, plan, given)
        early, late, running = (cp._route(layout, self.chunk_size, kind) for kind in ("early", "late", "running"))
        if self.alone:
            early = late = Route(cp.rank, cp.world, [piece.owner for piece in layout.pieces], {})
        states = [piece.states(self.chunk_size) for piece in self.pieces]
        self._cut_rows()
        tokens_of: list[tuple[Any, int, Any]] = []  # head, begin of the whole chunks, tail of each piece
        for (at, _), s in zip(cp._spans(layout), states, strict=True):
            if s is None:
                tokens_of.append((None, 0, None))
                continue
            at += s.before
            begin = at + s.head
            head = self._inputs_of_states(at, s.head) if s.head else None
            tail = self._inputs_of_states(begin + s.whole * self.chunk_size, s.tail) if s.tail else None
            tokens_of.append((head, begin, tail))
        anchors = list(self._inputs_of_states(0, 0))
        empty = anchors[-1].new_empty(0, self.states, self.lead.shape[0], *anchors[-1].shape[2:])
        if given["gate_bias"] is not None:
            anchors.append(given["gate_bias"][:0])
        exchange = functools.partial(Exchange, cp.group)
        acc = state_dtype(self.lead.dtype)
        token: Tensor | None = None
        before: list[Tensor | None] = [None, None]

        # Running states of cuts inside a chunk.
        if running.used:
            compose = cp._through(layout, self.chunk_size)
            tails = [
                empty.new_zeros(1, self.states + compose, *empty.shape[2:], dtype=acc) if s is None or not s.open or not s.tail
                else self._tail(tail, compose)
                for s, (_, _, tail) in zip(states, tokens_of, strict=True)
            ]  # fmt: skip
            transfer = exchange(running, tails[0].shape[1:], acc)
            token = start(transfer, tails, anchors)

        # Chunk states. Whole chunks of the early piece need no running state: they are computed while it is under way.
        def whole(i: int) -> list[Tensor]:
            s = states[i]
            return [] if self.alone or s is None or not s.whole else [self._whole(tokens_of[i][1], s)]

        def closed(i: int, rows: list[Tensor]) -> Tensor:
            s = states[i]
            if self.alone or s is None or not s.closed:
                return empty.to(acc)
            if s.head:
                head = self._states_of(tokens_of[i][0], s.head, before[i], s.offset)
                rows = [self._turned(head, s.first), *rows]
            return rows[0] if len(rows) == 1 else torch.cat(rows)

        rows = whole(0)
        if running.used:
            assert token is not None
            got, token = finish(transfer, token)
            before = [self._compose(p, got) for p in cp._mine()]
        order = [token] if token is not None else []
        transfers: dict[str, Exchange] = {}
        waiting: dict[str, Tensor] = {}
        for i, (name, route) in enumerate((("early", early), ("late", late))):
            rows = whole(1) if i else rows
            mine = closed(i, rows)
            if route.used:
                transfers[name] = exchange(route, empty.shape[1:], self.lead.dtype)
                # Each rank's other piece is no part of this route.
                pair = (mine, empty.to(acc)) if i == 0 else (empty.to(acc), mine)
                waiting[name] = start(transfers[name], pair, [*order, *anchors])

        # Attention. Its backward is to run before gradients of states are sent: what is called last comes first.
        arriving: dict[str, dict[int, Tensor]] = {}
        for name, transfer in transfers.items():
            arriving[name], token = finish(transfer, waiting[name], *order, wait=False)
            order = [token]
        result: list[Any] = [None, None, None, None]
        for i in (0, 1):
            result[2 * i + 1] = self._fresh(i)
        found: dict[int, Tensor] = {}
        for i, name in enumerate(("early", "late")):
            if name in transfers:
                transfers[name].wait()
                found |= arriving[name]
            result[2 * i] = self._continued(i, found, before[i], empty)
        state = next((x[1] for x in result if isinstance(x, tuple)), None)
        if given["return_state"] and cp.cu_seqlens is not None:
            state, order = self._packed_state(result, empty, anchors, order)
        ys = [x[0] if isinstance(x, tuple) else x for x in result if x is not None]
        if not ys:  # a rank without tokens: gradients of all inputs are zeros, as they are where there are tokens
            ys = [self.function(**self._tensors(0) | {"cu_seqlens": None, "return_state": False})]
        y = join(order[0], ys) if order else torch.cat(ys, dim=1)
        return (y, state) if given["return_state"] else y

    def _compose(self, p: int, got: dict[int, Tensor]) -> Tensor | None:
        """The running states ``(2, B, H, D)`` before piece p, of what the pieces of its chunk say."""
        state: Tensor | None = None
        for q in self.layout.chain(p, self.chunk_size):
            if q not in got:
                return None
            row = got[q][0]
            new = row[: self.states]
            state = new if state is None else row[self.states] * state + new
        return state

    # ---- attention ----

    def _tensors(self, span: int) -> Given:
        """The arguments of the op, those of tokens cut to a span."""
        begin, end = self.cuts[span : span + 2]
        return self.given | {name: self.parts[name].part(begin, end - begin) for name in self.rows}

    def _packed(self, starts: Sequence[int]) -> Tensor:
        key = (tuple(starts), self.lead.device)
        if key not in self.cp._cu_seqlens:
            with torch.inference_mode(False):  # a backward may save them later
                self.cp._cu_seqlens[key] = torch.tensor(starts, dtype=torch.int32).to(self.lead.device)
        return self.cp._cu_seqlens[key]

    def _returns(self, i: int) -> bool:
        """Whether a state comes of piece i of this rank: of the last piece; of packed sequences, which end in any, of all."""
        return bool(self.given["return_state"]) and (self.cp.cu_seqlens is not None or (self.cp.rank == 0 and i == 1))

    def _fresh(self, i: int) -> Any:
        piece = self.pieces[i]
        if not piece.fresh and not (self._returns(i) and piece.inward is None):
            return None
        starts = [0]
        for n in piece.fresh:
            starts.append(starts[-1] + n)
        cu_seqlens = self._packed(starts) if len(piece.fresh) > 1 else None
        return self.function(**self._tensors(2 * i + 1) | {"cu_seqlens": cu_seqlens, "return_state": self._returns(i)})

    def _continued(self, i: int, found: dict[int, Tensor], running: Tensor | None, empty: Tensor) -> Any:
        piece, p = self.pieces[i], self.cp._mine()[i]
        if piece.inward is None or not (piece.continued or self._returns(i)):
            return None
        rows = [found[q] for q in self.layout.earlier(p) if q in found]
        batch = self.lead.shape[0]
        if running is None:
            running = empty.new_zeros(self.states, *empty.shape[2:], dtype=state_dtype(empty.dtype))
        lengths = torch.full((batch,), piece.past, dtype=torch.int32, device=empty.device)
        options = self._tensors(2 * i) | {"return_state": self._returns(i)}
        if self.alone:
            return self.function(**options | {"initial_state": running[0].contiguous(), "lengths": lengths})
        chunk_k, chunk_v = torch.cat([x.permute(1, 2, 3, 0, 4) for x in rows or [empty]], dim=3).contiguous().unbind(0)
        state = RATCache(
            chunk_k, chunk_v, running[0].contiguous(), running[1].contiguous(), lengths, self.chunk_size, piece.past
        )
        return self.function(**options | {"initial_state": state})

    # ---- states of packed sequences ----

    def _packed_state(
        self, result: list[Any], empty: Tensor, anchors: list[Tensor], order: list[Tensor]
    ) -> tuple[Any, list[Tensor]]:
        """The state of all sequences on rank 0, of the states of the spans in which they end; None on other ranks."""
        cp, pieces, size = self.cp, self.layout.pieces, self.chunk_size
        acc = state_dtype(empty.dtype)
        # An op's results need gradients if any input does, states too where they depend on none that does. Then only ranks on
        # which a sequence ends would take part in the backward.
        wanted = any(x.requires_grad for x in anchors)
        closed: list[Tensor] = []
        running: list[Tensor] = []
        for i, piece in enumerate(self.pieces):
            chunks, finals = [empty], [empty.to(acc)]
            for tokens, span, j in piece.ending():
                state = result[2 * i + span][1]
                if self.alone:
                    finals.append((state if wanted else state.detach())[None, j : j + 1, None])
                    continue
                if not wanted:
                    state = state.detach()
                of_chunks = torch.stack((state.chunk_k[j], state.chunk_v[j]))[:, :, : tokens // size]
                chunks.append(of_chunks.permute(2, 0, 1, 3)[:, :, None])
                finals.append(torch.stack((state.running_k[j], state.running_v[j]))[None, :, None])
            closed.append(torch.cat(chunks))
            running.append(torch.cat(finals))
        owners = [piece.owner for piece in pieces]
        counts = {
            "closed": [0 if self.alone else sum(n // size for n, _, _ in piece.ending()) for piece in pieces],
            "running": [len(piece.ending()) for piece in pieces],
        }
        found: list[Tensor] = []
        for mine, rows in ((closed, counts["closed"]), (running, counts["running"])):
            route = Route(cp.rank, cp.world, owners, {(p, 0): (0, n) for p, n in enumerate(rows)})
            got: dict[int, Tensor] = {}
            if route.used:
                transfer = Exchange(cp.group, route, empty.shape[1:], mine[0].dtype)
                got, token = finish(transfer, start(transfer, mine, anchors), *order)
                order = [token]
            found.append(torch.cat([mine[0][:0], *(got[p] for p in sorted(got))])[:, :, 0])
        if cp.rank:
            return None, order
        assert cp.cu_seqlens is not None
        device, cuts = empty.device, cp.cu_seqlens
        tokens_of = [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        there = [i for i, n in enumerate(tokens_of) if n]
        count, room = len(tokens_of), max(tokens_of, default=0) // size
        all_running = found[1].new_zeros(count, *found[1].shape[1:])
        all_running = all_running.index_copy(0, torch.tensor(there, dtype=torch.int64).to(device), found[1])
        if self.alone:
            return all_running[:, 0], order
        places = torch.tensor([i * room + c for i in there for c in range(tokens_of[i] // size)], dtype=torch.int64)
        rows_of = found[0].new_zeros(count * room, *found[0].shape[1:]).index_copy(0, places.to(device), found[0])
        chunk_k, chunk_v = rows_of.unflatten(0, (count, room)).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        running_k, running_v = all_running.transpose(0, 1).contiguous().unbind(0)
        lengths = torch.tensor(tokens_of, dtype=torch.int32).to(device)
        return RATCache(chunk_k, chunk_v, running_k, running_v, lengths, size, self.layout.tokens), order


def use_context_parallel(model: nn.Module, context_parallel: ContextParallel | None) -> int:
    """Sets it for every layer of a model that knows it, until it is set anew. Returns how many there are.

    A call, its backward and what checkpoints compute again in it have to see the same one: set it between steps. The model is
    given local tokens (:meth:`ContextParallel.shard`) and gives local results. Parameters are replicated: their gradients are
    those of local tokens, to be summed over the group, as data parallelism does where its group has the group's ranks too.
    """
    if not isinstance(model, nn.Module):
        raise _wrong("use_context_parallel", "model", "a module", type(model).__name__)
    if context_parallel is not None and not isinstance(context_parallel, ContextParallel):
        raise _wrong("use_context_parallel", "context_parallel", "one or None", type(context_parallel).__name__)
    layers = [module for module in model.modules() if hasattr(module, "context_parallel")]
    for layer in layers:
        layer.context_parallel = context_parallel  # type: ignore[assignment]
    return len(layers)
