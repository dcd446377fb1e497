"""Packed sequences over ranks, all tokens of a rank in one call of the op.

Few sequences cross a cut; the others lie on one rank and need nothing from others. A call for each stretch between cuts and
sequences' ends would cost the host more than short sequences cost a GPU, and put together y, and every gradient, from pieces.
Here a rank makes one call over its whole row, of sequences of which some continue from states:

1. states that others need: the recurrence alone over the tokens of sequences that leave this rank, a chunk each a sequence;
2. one transfer, running and chunk states together;
3. the op over the row.

The backward goes the same way back, and what the recurrence gives is added to the op's gradients where they lie. One function
of autograd's graph holds it all. Not every row can go this way, see :attr:`Plan.fits`; _Call in context.py takes any.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._arguments import ROWS, Given
from .._autograd import call_forward, call_kernel, results_of
from ..cache import RATCache, state_dtype
from .checkpoint import passing
from .layout import Crossing, Layout
from .parts import Columns, view

# Tokens over which the recurrence alone runs at once: what it writes for each is gone after them. Backward half as many.
SLICE = 65536
# Chunk states of sequences that continue are rows of one tensor, as many for each sequence as for the longest. More rows than
# tokens in a compact row may be by one for so many tokens.
TOKENS_OF_A_ROW = 8


@dataclasses.dataclass(frozen=True)
class Leaving:
    """The tokens of a run whose sequence goes on after it: ``whole`` chunks, the first of index ``first``, and ``tail`` more.

    ``at``: the first of them, in the rank's row.
    """

    at: int
    whole: int
    tail: int
    first: int


@dataclasses.dataclass
class Run:
    """Tokens ``begin : end`` of the global row, at ``at`` of the row of the rank that owns them: a piece, or two in a row."""

    begin: int
    end: int
    owner: int
    at: int
    inward: Crossing | None = None
    outward: Crossing | None = None
    leaving: Leaving | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """What one rank gets of a run: the states of its whole chunks, and, if ``running``, the state at its end."""

    run: int
    whole: int
    running: bool


@dataclasses.dataclass(frozen=True)
class Entering:
    """A sequence of a rank's row that continues: ``sources`` (run, first chunk, chunks); the run that has its open chunk."""

    sequence: int
    sources: tuple[tuple[int, int, int], ...]
    running: int | None


class Plan:
    """How a row of packed sequences goes over ranks, for one chunk size. Arithmetic of the host, made once.

    Attributes:
        fits: whether all ranks can take it: each state that is sent follows from tokens of one run, and chunk states of a rank
            need little more memory than they would have by sequence.
        used: whether anything is sent.
        out: for each rank, what it gets of this one.
        into: for each rank, what this one gets of it.
        cu_seqlens, lengths: of the sequences of this rank's row; the tokens that each had before.
    """

    def __init__(self, layout: Layout, chunk_size: int, rank: int, world: int):
        self.chunk_size = chunk_size
        self.runs = self._runs(layout, world)
        self._find_leaving()
        wanted: dict[tuple[int, int], bool] = {}  # a run and a rank: also the running state?
        exact = True
        entering: dict[int, list[tuple[Run, list[int], int | None]]] = {r: [] for r in range(world)}
        for j, run in enumerate(self.runs):
            if run.inward is None:
                continue
            sources = [i for i in range(j) if self.runs[i].outward == run.inward]
            open_ = (run.begin - run.inward[0]) % chunk_size > 0
            for i in sources:
                sender = self.runs[i]
                exact &= (max(sender.begin, run.inward[0]) - run.inward[0]) % chunk_size == 0
                with_state = open_ and i == sources[-1]
                wanted[i, run.owner] = wanted.get((i, run.owner), False) or with_state
            entering[run.owner].append((run, sources, sources[-1] if open_ else None))
        rows = [self._row(layout, r) for r in range(world)]
        self.cu_seqlens, self.lengths = rows[rank]
        self.longest, self.bound, self.chunk_rows = self._sizes(*rows[rank])
        self.fits = exact and all(self._small(*row) for row in rows)
        messages = {key: self._message(key[0], running) for key, running in sorted(wanted.items())}
        messages = {key: m for key, m in messages.items() if m.whole or m.running}
        self.used = bool(messages)
        owner = [run.owner for run in self.runs]
        self.out = [[m for (i, to), m in messages.items() if to == r and owner[i] == rank] for r in range(world)]
        self.into = [[m for (i, to), m in messages.items() if to == rank and owner[i] == r] for r in range(world)]
        self.leaving = sorted({m.run for ms in self.out for m in ms})
        self.entering: list[Entering] = []
        for run, sources, running in entering[rank]:
            found = []
            for i in sources:
                leaving = self.runs[i].leaving
                assert leaving is not None
                if leaving.whole:
                    found.append((i, leaving.first, leaving.whole))
            self.entering.append(Entering(bisect.bisect_right(self.cu_seqlens, run.at) - 1, tuple(found), running))
        self._tensors: dict[Any, tuple[Tensor, Tensor]] = {}
        self._chunks: dict[Any, Tensor] = {}

    @staticmethod
    def _runs(layout: Layout, world: int) -> list[Run]:
        """Pieces with tokens; those of the last rank, which follow each other, as one."""
        runs: list[Run] = []
        at = [0] * world
        for piece in layout.pieces:
            if not piece.tokens:
                continue
            if runs and runs[-1].owner == piece.owner:
                runs[-1].end, runs[-1].outward = piece.end, piece.outward
            else:
                runs.append(Run(piece.begin, piece.end, piece.owner, at[piece.owner], piece.inward, piece.outward))
            at[piece.owner] += piece.tokens
        return runs

    def _find_leaving(self) -> None:
        for run in self.runs:
            if run.outward is not None:
                start = max(run.begin, run.outward[0])
                whole, tail = divmod(run.end - start, self.chunk_size)
                first = (start - run.outward[0]) // self.chunk_size
                run.leaving = Leaving(run.at + start - run.begin, whole, tail, first)

    def _message(self, i: int, running: bool) -> Message:
        leaving = self.runs[i].leaving
        assert leaving is not None
        return Message(i, leaving.whole, running)

    def _row(self, layout: Layout, rank: int) -> tuple[list[int], list[int]]:
        """cu_seqlens and lengths of a rank's row."""
        cu_seqlens, lengths, starts = [0], [], layout.starts
        for run in self.runs:
            if run.owner != rank:
                continue
            inner = starts[bisect.bisect_right(starts, run.begin) : bisect.bisect_left(starts, run.end)]
            cu_seqlens += [run.at + s - run.begin for s in (*inner, run.end)]
            lengths += [0 if run.inward is None else run.begin - run.inward[0]] + [0] * len(inner)
        return cu_seqlens, lengths

    def _sizes(self, cu_seqlens: list[int], lengths: list[int]) -> tuple[int, int, int]:
        """The most tokens of a sequence, with those before, and how many chunks the longest past has."""
        new = [b - a for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
        total = [n + past for n, past in zip(new, lengths, strict=True)]
        return max(new, default=0), max(total, default=0), max(lengths, default=0) // self.chunk_size

    def _small(self, cu_seqlens: list[int], lengths: list[int]) -> bool:
        if not any(lengths):
            return True
        rows = len(lengths) * (self._sizes(cu_seqlens, lengths)[1] // self.chunk_size)
        tokens = cu_seqlens[-1]
        return rows <= tokens // self.chunk_size + len(lengths) + tokens // TOKENS_OF_A_ROW

    # ---- tensors, made once ----

    def row(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cu_seqlens and lengths on a device."""
        if device not in self._tensors:
            made = [torch.tensor(x, dtype=torch.int32, device="cpu").to(device) for x in (self.cu_seqlens, self.lengths)]
            self._tensors[device] = made[0], made[1]
        return self._tensors[device]

    def slices(self, leaving: Leaving, tokens: int, device: torch.device) -> Iterator[tuple[int, int, int, int, Tensor]]:
        """What is left of a run in slices: first token, tokens, first sequence, sequences, and cu_seqlens of these.

        A chunk is a sequence, and so is the tail.
        """
        step = max(tokens // self.chunk_size, 1)
        count = leaving.whole + (leaving.tail > 0)
        for first in range(0, count, step):
            n = min(step, count - first)
            tail = leaving.tail if first + n == count else 0
            key = (n, tail, device)
            if key not in self._chunks:
                ends = torch.arange(n + 1, dtype=torch.int32, device="cpu") * self.chunk_size
                if tail:
                    ends[-1] += tail - self.chunk_size
                self._chunks[key] = ends.to(device)
            length = n * self.chunk_size + (tail - self.chunk_size if tail else 0)
            yield leaving.at + first * self.chunk_size, length, first, n, self._chunks[key]

    # ---- bytes ----

    def bytes_of(self, messages: Sequence[Message], numbers: int, size: int, wide: int) -> int:
        """Of states of ``numbers`` numbers: chunk states of ``size`` bytes each, running ones of ``wide``."""
        return sum(2 * numbers * (m.whole * size + m.running * wide) for m in messages)

    def bytes_by_kind(self, rank: int, numbers: int, size: int, wide: int) -> dict[str, int]:
        """What leaves this rank, as ContextParallel.bytes_sent says it."""
        sent = [m for to, ms in enumerate(self.out) if to != rank for m in ms]
        got = [m for source, ms in enumerate(self.into) if source != rank for m in ms]
        early = [self.runs[m.run].begin < self.runs[-1].end // 2 for m in sent]
        by_kind = {"running": self.bytes_of([dataclasses.replace(m, whole=0) for m in sent], numbers, size, wide)}
        for kind, wanted in (("early", True), ("late", False)):
            of_kind = [dataclasses.replace(m, running=False) for m, e in zip(sent, early, strict=True) if e == wanted]
            by_kind[kind] = self.bytes_of(of_kind, numbers, size, wide)
        return by_kind | {"backward": self.bytes_of(got, numbers, size, wide)}


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _turn(rows: Tensor, tables: tuple[Tensor, Tensor] | None, first: int, back: bool = False) -> Tensor:
    """Keys ``(chunks, H, D)``, turned by the index of their chunk; ``back``: turned back. Of a tensor of its own."""
    if tables is None or not rows.shape[0]:
        return rows
    cos, sin = (table[first : first + rows.shape[0], None, None] for table in tables)
    halves = rows.unflatten(-1, (2, -1))
    turned, crossed = halves * cos, halves * sin
    low, high = turned.unbind(-2)
    if back:
        low.add_(crossed.select(-2, 1))
        high.sub_(crossed.select(-2, 0))
    else:
        low.sub_(crossed.select(-2, 1))
        high.add_(crossed.select(-2, 0))
    return turned.flatten(-2)


class _Transfer:
    """States of some runs for all ranks, or their gradients on the way back, as bytes."""

    def __init__(self, group: Any, plan: Plan, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        self.group, self.plan, self.shape, self.dtype, self.device = group, plan, shape, dtype, device
        self.acc = state_dtype(dtype)

    def start(self, there: list[list[Message]], back: list[list[Message]], parts: list[Tensor]) -> None:
        """``parts``: what is sent, by rank; ``there`` and ``back``: what that is, and what comes."""
        numbers, size, wide = self.shape[0] * self.shape[1], self.dtype.itemsize, self.acc.itemsize
        sent, received = ([self.plan.bytes_of(ms, numbers, size, wide) for ms in way] for way in (there, back))
        kind = {"dtype": torch.uint8, "device": self.device}
        self.rows = torch.cat([_flat(x) for x in parts]) if parts else torch.empty(0, **kind)
        self.got, self.back = torch.empty(sum(received), **kind), back
        self.work = dist.all_to_all_single(self.got, self.rows, received, sent, group=self.group, async_op=True)

    def finish(self) -> Iterator[tuple[Message, Tensor | None, Tensor]]:
        """Of each message that came, by rank: running states ``(2, H, D)``, chunk states ``(2, chunks, H, D)``."""
        self.work.wait()
        got, at = self.got, 0
        del self.work, self.rows, self.got  # this lives as long as the graph

        def take(count: int, dtype: torch.dtype) -> Tensor:
            nonlocal at
            shape = (2, *([count] if count >= 0 else []), *self.shape)
            end = at + abs(count) * 2 * self.shape[0] * self.shape[1] * dtype.itemsize
            part, at = got[at:end], end
            return part.view(dtype).view(shape)

        for messages in self.back:
            for m in messages:
                running = take(-1, self.acc) if m.running else None
                yield m, running, take(m.whole, self.dtype)


class _Row(torch.autograd.Function):
    """y of all tokens of a rank. ``rows``: the tensors of tokens, by ``names``; ``options``: the other arguments of the op."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, op: str, plan: Plan, options: Given, names: Sequence[str], bias: Tensor | None, *rows: Tensor
    ) -> Tensor:
        given = options | dict(zip(names, rows, strict=True)) | {"gate_bias": bias}
        heads, dim, places = _places(given)
        lead = rows[0]
        acc = state_dtype(lead.dtype)
        transfer = _Transfer(group, plan, (heads, dim), lead.dtype, lead.device)
        tables = None if given["rotary_cos"] is None else (given["rotary_cos"].to(acc), given["rotary_sin"].to(acc))
        if plan.used:
            states = {i: _states(plan, i, places, bias, tables, lead.dtype) for i in plan.leaving}
            parts = []
            for m in (m for messages in plan.out for m in messages):
                running, chunks = states[m.run]
                parts += [*(running if m.running else ()), *chunks]
            transfer.start(plan.out, plan.into, parts)
        cu_seqlens, lengths = plan.row(lead.device)
        given |= {"cu_seqlens": cu_seqlens, "max_seqlen": plan.longest, "initial_state": None, "return_state": False}
        if plan.entering:
            sequences = len(plan.lengths)
            chunk_k, chunk_v = lead.new_empty(2, sequences, heads, plan.chunk_rows, dim).unbind(0)
            running = lead.new_zeros(2, sequences, heads, dim, dtype=acc)
        if plan.used:
            came = {m.run: (running_of, chunks) for m, running_of, chunks in transfer.finish()}
            for e in plan.entering:
                for run, first, count in e.sources:
                    for to, chunks in zip((chunk_k, chunk_v), came[run][1], strict=True):
                        to[e.sequence, :, first : first + count] = chunks.transpose(0, 1)
                if e.running is not None:
                    running[:, e.sequence] = came[e.running][0]
        if plan.entering:
            # What the op adds to the bound, the longest sequence's tokens, makes it that of the longest with its past.
            bound = plan.bound - plan.longest
            given["initial_state"] = RATCache(chunk_k, chunk_v, *running.unbind(0), lengths, plan.chunk_size, bound)
        results = call_forward(op, given)
        ctx.group, ctx.op, ctx.plan, ctx.names, ctx.transfer = group, op, plan, names, transfer
        saved = given | results
        ctx.tensors = [name for name, x in saved.items() if isinstance(x, Tensor)]
        ctx.given = {name: x for name, x in saved.items() if not isinstance(x, (Tensor, RATCache))}
        ctx.save_for_backward(*(saved[name] for name in ctx.tensors))
        return results["y"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        op, plan, transfer = ctx.op, ctx.plan, ctx.transfer
        given = ctx.given | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        grads = results_of(f"{op}_backward", **given, dy=dy)
        dbias = grads["dgate_bias"]
        if plan.used:
            back: dict[int, list] = {}
            for e in plan.entering:
                for run, first, count in e.sources:
                    of_run = [grads[n][e.sequence, :, first : first + count].transpose(0, 1) for n in ("dchunk_k", "dchunk_v")]
                    back.setdefault(run, [None, None])[1] = _plus(back.get(run, [None, None])[1], of_run)
                if e.running is not None:
                    of_run = [grads[n][e.sequence] for n in ("drunning_k", "drunning_v")]
                    back.setdefault(e.running, [None, None])[0] = of_run
            parts = []
            for m in (m for messages in plan.into for m in messages):
                running, chunks = back[m.run]
                parts += [*(running if m.running else ()), *(chunks if m.whole else ())]
            transfer.start(plan.into, plan.out, parts)
            totals: dict[int, Any] = {}
            for m, running, chunks in transfer.finish():  # of rank after rank: the bits do not depend on timing
                before = totals.get(m.run, (None, None))
                chunks = chunks.to(transfer.acc)
                totals[m.run] = (
                    running if before[0] is None else before[0] if running is None else before[0] + running,
                    chunks if before[1] is None else before[1] + chunks,
                )
            for i, (running, chunks) in totals.items():
                more = _backward_of_states(plan, i, given, grads, running, chunks)
                if dbias is not None and more is not None:
                    dbias = dbias + more
        return None, None, None, None, None, dbias, *(grads["d" + name] for name in ctx.names)


def _plus(a: list[Tensor] | None, b: list[Tensor]) -> list[Tensor]:
    return b if a is None else [x + y for x, y in zip(a, b, strict=True)]


def _places(given: Given) -> tuple[int, int, list[tuple[Tensor, Columns | None]]]:
    """H, D, and where k, v and gate are."""
    if "projection" not in given:
        heads, dim = given["v"].shape[2:]
        return heads, dim, [(given[name], None) for name in ("k", "v", "gate")]
    projection, heads, groups = given["projection"], given["num_heads"], given["num_groups"]
    dim = projection.shape[-1] // (2 * groups + (3 if given["has_out_gate"] else 2) * heads)
    columns = ((groups, groups), (2 * groups, heads), (2 * groups + heads, heads))
    return heads, dim, [(projection, (at * dim, n, dim)) for at, n in columns]


def _states(
    plan: Plan, i: int, places: list, bias: Tensor | None, tables: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Of a run: k~ and v~ at its end, and of its whole chunks, keys turned."""
    leaving = plan.runs[i].leaving
    assert leaving is not None
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for at, tokens, _, sequences, ends in plan.slices(leaving, SLICE, places[0][0].device):
        k, v, gate = (view(x, at, tokens, columns) for x, columns in places)
        for x, to in zip((k, v), found, strict=True):
            with passing():
                to.append(
                    call_kernel(
                        "chunk_recurrence", x=x, gate=gate, gate_bias=bias, cu_seqlens=ends if sequences > 1 else None,
                        chunk_size=min(plan.chunk_size, tokens), return_state=True,
                    )[1]
                )  # fmt: skip
    k, v = (x[0] if len(x) == 1 else torch.cat(x) for x in found)
    whole = leaving.whole
    return [k[-1], v[-1]], [_turn(k[:whole], tables, leaving.first).to(dtype), v[:whole].to(dtype)]


def _backward_of_states(
    plan: Plan, i: int, given: Given, grads: dict[str, Tensor], running: Tensor | None, chunks: Tensor
) -> Tensor | None:
    """Adds what follows from gradients of a run's states to those of its tokens. Returns the bias's."""
    leaving = plan.runs[i].leaving
    assert leaving is not None
    tables = None
    if given["rotary_cos"] is not None:
        tables = given["rotary_cos"].to(chunks.dtype), given["rotary_sin"].to(chunks.dtype)
    dstates = [_turn(chunks[0], tables, leaving.first, back=True), chunks[1]]
    if leaving.tail:
        last = chunks.new_zeros(2, *chunks.shape[2:]) if running is None else running
        dstates = [torch.cat((x, end[None])) for x, end in zip(dstates, last, strict=True)]
    places = _places(given)[2]
    to = _places({**given, **{n.removeprefix("d"): x for n, x in grads.items() if x is not None}})[2]
    dbias: Tensor | None = None
    for at, tokens, first, sequences, ends in plan.slices(leaving, SLICE // 2, chunks.device):
        *rows, gate = (view(x, at, tokens, columns) for x, columns in places)
        *drows, dgate = (view(x, at, tokens, columns) for x, columns in to)
        # No token but the last of a chunk has a gradient: one row of zeros stands for all. y is not read, only checked.
        dy = gate.new_zeros(gate.shape[-1]).expand(gate.shape)
        for x, dx, dstate in zip(rows, drows, dstates, strict=True):
            more_x, more_gate, more, _ = call_kernel(
                "chunk_recurrence_backward", dy=dy, dfinal_state=dstate[first : first + sequences], x=x, gate=gate,
                gate_bias=given["gate_bias"], cu_seqlens=ends if sequences > 1 else None, y=gate,
                chunk_size=min(plan.chunk_size, tokens),
            )  # fmt: skip
            dx += more_x
            dgate += more_gate
            if more is not None:
                dbias = more if dbias is None else dbias + more
    return dbias


def whole_row(group: Any, op: str, plan: Plan, given: Given) -> Tensor:
    """y of an op over this rank's tokens."""
    names = [name for name in ROWS if given.get(name) is not None]
    bias = given["gate_bias"]
    if bias is not None:
        bias = bias.to(state_dtype(given[names[0]].dtype))
    options = {name: x for name, x in given.items() if name not in names and name != "gate_bias"}
    return _Row.apply(group, op, plan, options, names, bias, *(given[name] for name in names))
