"""Packed sequences over ranks, all tokens of a rank in one call of the op.

Few sequences cross a cut; the others lie on one rank and need nothing from others. A call for each stretch between cuts and
sequences' ends would cost the host more than short sequences cost a GPU, and put together y, and every gradient, from pieces.
Here a rank makes one call over its whole row, of sequences of which some continue from states:

1. states that others need: the op over the tokens of a sequence that leaves this rank, for its states alone where they are few;
   else the recurrence, a chunk each a sequence, of which nothing is kept;
2. one transfer, running and chunk states together;
3. the op over the row.

The backward goes the same way back, and what the recurrence gives is added to the op's gradients where they lie. One function
of autograd's graph holds it all. Not every row can go this way, see :attr:`Plan.fits`; _Call in context.py takes any.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._arguments import ROWS, Given
from .._autograd import call_forward, call_kernel, refuse_second_derivative, results_of
from ..cache import RATCache, state_dtype
from .checkpoint import passing
from .layout import Crossing, Layout
from .parts import Columns, columns_in, view

# Tokens over which the recurrence alone runs at once: what it writes for each is gone after them. Backward half as many.
SLICE = 65536
# Tokens of which the op gives the states: it takes the host half as long as the recurrence over k, that over v, rotation and
# rounding, and attention, which nobody reads, takes a GPU less than that. In the backward the host is ahead: the recurrence.
FEW = 8192
# Chunk states of sequences that continue are rows of one tensor, as many for each sequence as for the longest. More rows than
# tokens in a compact row may be by one for so many tokens.
TOKENS_OF_A_ROW = 8

RUNNING = ("running_k_out", "running_v_out")  # results of the op
CHUNKS = ("chunk_k_out", "chunk_v_out")


@dataclasses.dataclass(frozen=True)
class Leaving:
    """The tokens of a run whose sequence goes on after it, from token ``at`` of the rank's row on.

    In order: ``head`` that end a chunk of which earlier runs have ``offset`` tokens, ``whole`` chunks, ``tail`` of an open one.

    Attributes:
        first: index of the first chunk that closes here.
        within: no chunk closes here that another run began: the run lies inside one.
        size: L.
    """

    at: int
    head: int
    whole: int
    tail: int
    first: int
    offset: int
    within: bool
    size: int

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.head + self.whole * self.size + self.tail

    @property
    def closed(self) -> int:
        """Chunks that close here."""
        return self.whole + (self.head > 0)


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
    """What one rank gets of a run: the states of ``closed`` chunks, and, if ``running``, the state at its end."""

    run: int
    closed: int
    running: bool


@dataclasses.dataclass(frozen=True)
class Way:
    """A transfer. ``out``: for each rank, what it gets of this one; ``into``: for each rank, what this one gets of it."""

    out: list[list[Message]]
    into: list[list[Message]]

    def only(self, running: bool) -> Way:
        """Of running states alone, or of chunk states alone."""

        def kept(messages: list[Message]) -> list[Message]:
            cut = [Message(m.run, 0 if running else m.closed, running and m.running) for m in messages]
            return [m for m in cut if m.closed or m.running]

        return Way([kept(ms) for ms in self.out], [kept(ms) for ms in self.into])


@dataclasses.dataclass(frozen=True)
class Entering:
    """The sequence that enters a run, number ``sequence`` of the rank's row.

    ``sources``: (run, first chunk, chunks) of those before; ``running``: the run that has the open chunk's last token, or None.
    """

    run: int
    sequence: int
    sources: tuple[tuple[int, int, int], ...]
    running: int | None


class Plan:
    """How a row of packed sequences goes over ranks, for one chunk size. Arithmetic of the host, made once.

    Attributes:
        fits: whether all ranks can take it: no run that sends lies inside a chunk that others began, and chunk states of a rank
            need little more memory than they would have by sequence.
        ways: the transfers, in order: one; or of running states, then of chunk states, some of which follow from them; or none.
        leaving: the runs of this rank whose states are sent.
        entering: the sequences of this rank that continue.
        cu_seqlens, lengths: of the sequences of this rank's row; the tokens that each had before.
        longest, bound, chunk_rows: the most tokens of a sequence in the row; in all; the most chunks that one had before.
    """

    def __init__(self, layout: Layout, chunk_size: int, rank: int, world: int):
        self.chunk_size = chunk_size
        self.runs = self._runs(layout, world)
        for run in self.runs:
            run.leaving = None if run.outward is None else self._leaving(run, run.outward)
        sources = [
            [i for i in range(j) if self.runs[i].outward == run.inward] if run.inward else [] for j, run in enumerate(self.runs)
        ]
        wanted: dict[tuple[int, int], bool] = {}  # a run and a rank: also the running state?
        for run, before in zip(self.runs, sources, strict=True):
            for i in before:
                wanted[i, run.owner] = wanted.get((i, run.owner), False) or (self._open(run) and i == before[-1])
        rows = [self._row(layout, r) for r in range(world)]
        self.cu_seqlens, self.lengths = rows[rank]
        self.longest, self.bound, self.chunk_rows = self._sizes(*rows[rank])
        self.fits = not any(self.left(i).within for i, _ in wanted) and all(self._small(*row) for row in rows)
        messages = {(i, to): Message(i, self.left(i).closed, running) for (i, to), running in sorted(wanted.items())}
        messages = {key: m for key, m in messages.items() if m.closed or m.running}
        owner = [run.owner for run in self.runs]
        self.way = Way(
            [[m for (i, to), m in messages.items() if to == r and owner[i] == rank] for r in range(world)],
            [[m for (i, to), m in messages.items() if to == rank and owner[i] == r] for r in range(world)],
        )
        self.ways = [self.way] if messages else []
        if any(self.left(m.run).head for m in messages.values()):
            self.ways = [self.way.only(running=True), self.way.only(running=False)]
        self.leaving = sorted({m.run for ms in self.way.out for m in ms})
        self.entering = [
            Entering(
                j,
                bisect.bisect_right(self.cu_seqlens, run.at) - 1,
                tuple((i, self.left(i).first, self.left(i).closed) for i in sources[j] if self.left(i).closed),
                sources[j][-1] if self._open(run) else None,
            )
            for j, run in enumerate(self.runs)
            if run.owner == rank and run.inward is not None
        ]
        self._tensors: dict[Any, Tensor] = {}

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

    def _leaving(self, run: Run, sequence: Crossing) -> Leaving:
        begin, size = max(run.begin, sequence[0]), self.chunk_size
        tokens, (first, offset) = run.end - begin, divmod(begin - sequence[0], size)
        within = offset > 0 and offset + tokens < size
        head = 0 if within else -offset % size
        whole, tail = divmod(tokens - head, size)
        return Leaving(run.at + begin - run.begin, head, whole, tail, first, offset, within, size)

    def left(self, i: int) -> Leaving:
        """What leaves run i."""
        leaving = self.runs[i].leaving
        assert leaving is not None
        return leaving

    def _open(self, run: Run) -> bool:
        """Does its begin divide a chunk?"""
        return run.inward is not None and (run.begin - run.inward[0]) % self.chunk_size > 0

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

    def numbers(self, name: Any, values: Callable[[], Sequence[int]], device: torch.device) -> Tensor:
        """int32 numbers on a device, by a name."""
        key = name, device
        if key not in self._tensors:
            with torch.inference_mode(False):  # a backward may save them later
                self._tensors[key] = torch.tensor(values(), dtype=torch.int32, device="cpu").to(device)
        return self._tensors[key]

    def slices(self, i: int, tokens: int, device: torch.device) -> Iterator[tuple[int, int, int, int, Tensor]]:
        """The whole chunks and the tail of run i, each a sequence, in slices of so many tokens.

        Of each: first token, tokens, first sequence, sequences, cu_seqlens.
        """
        leaving, size = self.left(i), self.chunk_size
        step, count = max(tokens // size, 1), leaving.whole + (leaving.tail > 0)
        for first in range(0, count, step):
            n = min(step, count - first)
            length = min(n * size, (leaving.whole - first) * size + leaving.tail)
            ends = self.numbers(("chunks", n, length), functools.partial(_ends, n, size, length), device)
            yield leaving.at + leaving.head + first * size, length, first, n, ends

    # ---- bytes ----

    @staticmethod
    def bytes_of(messages: Sequence[Message], numbers: int, size: int, wide: int) -> int:
        """Of states of ``numbers`` numbers: chunk states of ``size`` bytes each, running ones of ``wide``."""
        return sum(2 * numbers * (m.closed * size + m.running * wide) for m in messages)

    def bytes_by_kind(self, rank: int, numbers: int, size: int, wide: int) -> dict[str, int]:
        """What leaves this rank, as ContextParallel.bytes_sent says it."""
        sent, got = ([m for to, ms in enumerate(x) if to != rank for m in ms] for x in (self.way.out, self.way.into))
        half = self.runs[-1].end // 2 if self.runs else 0
        kinds: dict[str, list[Message]] = {"early": [], "late": []}
        for m in sent:
            kinds["early" if self.runs[m.run].begin < half else "late"].append(m)
        return {
            "running": self.bytes_of(sent, numbers, 0, wide),
            **{kind: self.bytes_of(ms, numbers, size, 0) for kind, ms in kinds.items()},
            "backward": self.bytes_of(got, numbers, size, wide),
        }


States = tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]  # of k and v: running ones (H, D); of chunks, (H, chunks, D)


def _transfer(
    group: Any, there: list[list[Message]], back: list[list[Message]], states: Callable[[Message], States],
    shape: Sequence[int], dtype: torch.dtype, device: torch.device,
) -> Iterator[tuple[Message, Tensor | None, Tensor | None]]:  # fmt: skip
    """Sends ``there``, by rank, and gives each message of ``back``, by rank, its running states ``(2, H, D)`` and chunk states
    ``(2, H, chunks, D)``, or None.

    All as bytes, which every backend can move; chunk states in ``dtype``. Nothing could be computed meanwhile.
    """
    acc, (heads, dim) = state_dtype(dtype), shape
    wide, narrow = 2 * heads * dim * acc.itemsize, 2 * heads * dim * dtype.itemsize
    sent, received = ([sum(m.running * wide + m.closed * narrow for m in ms) for ms in way] for way in (there, back))
    rows = torch.empty(sum(sent), dtype=torch.uint8, device=device)
    at = 0
    for messages in there:
        for m in messages:
            running, chunks = states(m)
            if m.running:
                assert running is not None
                torch.cat(list(running), out=rows[at : at + wide].view(acc).view(2 * heads, dim))
                at += wide
            if m.closed:
                assert chunks is not None
                end = at + m.closed * narrow
                torch.cat(list(chunks), out=rows[at:end].view(dtype).view(2 * heads, m.closed, dim))
                at = end
    got = rows.new_empty(sum(received))
    dist.all_to_all_single(got, rows, received, sent, group=group)
    at = 0
    for messages in back:
        for m in messages:
            running_of = chunks_of = None
            if m.running:
                running_of = got[at : at + wide].view(acc).view(2, heads, dim)
                at += wide
            if m.closed:
                end = at + m.closed * narrow
                chunks_of = got[at:end].view(dtype).view(2, heads, m.closed, dim)
                at = end
            yield m, running_of, chunks_of


def _ends(n: int, size: int, length: int) -> list[int]:
    """cu_seqlens of n sequences of ``size`` tokens but for the last."""
    return [*range(0, n * size, size), length]


class _Row(torch.autograd.Function):
    """y of all tokens of a rank. ``rows``: the tensors of tokens, by ``names``; ``options``: the other arguments of the op."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, op: str, plan: Plan, options: Given, names: Sequence[str], bias: Tensor | None, *rows: Tensor
    ) -> Tensor:
        given = options | dict(zip(names, rows, strict=True)) | {"gate_bias": bias}
        lead = rows[0]
        shape = _places(given)[0]
        cu_seqlens = plan.numbers("cu_seqlens", lambda: plan.cu_seqlens, lead.device)
        given |= {"cu_seqlens": cu_seqlens, "max_seqlen": plan.longest, "initial_state": None, "return_state": False}
        of_op = {i: _by_op(plan, i, given) for i in plan.leaving if _few(plan, i)}
        scans = {i: _states(plan, i, given) for i in plan.leaving if i not in of_op}
        before: dict[int, Tensor] = {}  # by run, the running states that came
        chunks_of: dict[int, Tensor] = {}
        ready: dict[int, list[Tensor]] = {}  # chunk states that the recurrence gave, as they are sent to any rank

        def states(m: Message) -> States:
            if m.run in of_op:
                found = of_op[m.run]
                return [found[name][0] for name in RUNNING], [found[name][0] for name in CHUNKS]
            if m.closed and m.run not in ready:
                ready[m.run] = _closed(plan, m.run, given, scans[m.run], before)
            return [x[-1] for x in scans[m.run]] if m.running else None, ready.get(m.run)

        for way in plan.ways:
            for m, came, chunks in _transfer(group, way.out, way.into, states, shape, lead.dtype, lead.device):
                if came is not None:
                    before[m.run] = came
                if chunks is not None:
                    chunks_of[m.run] = chunks
        if plan.entering:
            n, (heads, dim) = len(plan.lengths), shape
            rows_of = lead.new_empty(2, n, heads, plan.chunk_rows, dim)
            running = lead.new_zeros(2, n, heads, dim, dtype=state_dtype(lead.dtype))
        for e in plan.entering:
            for run, first, count in e.sources:
                rows_of[:, e.sequence, :, first : first + count] = chunks_of[run]
            if e.running is not None:
                running[:, e.sequence] = before[e.running]
        if plan.entering:
            lengths = plan.numbers("lengths", lambda: plan.lengths, lead.device)
            # What the op adds to the bound, the longest sequence's tokens, makes it that of the longest with its past.
            bound = plan.bound - plan.longest
            given["initial_state"] = RATCache(rows_of[0], rows_of[1], running[0], running[1], lengths, plan.chunk_size, bound)
        saved = given | call_forward(op, given)
        # call_forward has put the tensors of the state among the arguments.
        ctx.group, ctx.op, ctx.plan, ctx.names, ctx.shape = group, op, plan, names, shape
        ctx.tensors = [name for name, x in saved.items() if isinstance(x, Tensor)]
        ctx.given = {name: x for name, x in saved.items() if not isinstance(x, (Tensor, RATCache))}
        ctx.save_for_backward(*(saved[name] for name in ctx.tensors))
        return saved["y"]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        with torch.no_grad():
            dbias, *grads = _Row.gradients(ctx, dy)
        if torch.is_grad_enabled():
            there = [g for g in (dbias, *grads) if g is not None]
            refused = _Once.apply(len(there), *there, dy, *ctx.saved_tensors)
            dbias, grads = (None, refused) if dbias is None else (refused[0], refused[1:])
        return None, None, None, None, None, dbias, *grads

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
        """Of the bias and of the rows."""
        plan: Plan = ctx.plan
        given = ctx.given | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        grads = results_of(f"{ctx.op}_backward", **given, dy=dy)
        dbias = [grads["dgate_bias"]]
        chunks_of: dict[int, list[Tensor]] = {}  # gradients of the chunk states that came, by run
        runnings: dict[int, list[Tensor]] = {}
        for e in plan.entering:
            for run, first, count in e.sources:
                more = [grads[name][e.sequence, :, first : first + count] for name in ("dchunk_k", "dchunk_v")]
                chunks_of[run] = [a + b for a, b in zip(chunks_of[run], more, strict=True)] if run in chunks_of else more
            if e.running is not None:
                runnings[e.running] = [grads[name][e.sequence] for name in ("drunning_k", "drunning_v")]

        def states_of(m: Message) -> States:
            return runnings.get(m.run), chunks_of.get(m.run)

        came: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i in plan.leaving}
        opened: dict[int, list[Tensor]] = {}
        for way in reversed(plan.ways):
            # Rank after rank: the bits do not depend on timing.
            for m, *states in _transfer(ctx.group, way.into, way.out, states_of, ctx.shape, dy.dtype, dy.device):
                for x, to in zip(states, came[m.run], strict=True):
                    if x is not None:
                        to.append(x)
            if way is plan.ways[-1]:  # chunk states, of which some follow from running ones
                opened = {i: _opened(plan, i, given, came[i][1]) for i in plan.leaving if came[i][1]}
                for i, dstates in opened.items():
                    if plan.left(i).head:
                        dbias.append(_backward_of_head(plan, i, given, grads, dstates))
        for i, (running, _) in came.items():
            dbias.append(_backward_of_states(plan, i, given, grads, opened.get(i), _total(running)))
        return [_sum(dbias), *(grads["d" + name] for name in ctx.names)]


class _Once(torch.autograd.Function):
    """Gradients, of which there is no derivative by anything."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        refuse_second_derivative(ctx)
        return (None, *grads)


def _total(came: Sequence[Tensor]) -> Tensor | None:
    """Of what came from several ranks, in float32."""
    if len(came) < 2:
        return came[0] if came else None
    acc = state_dtype(came[0].dtype)
    return _sum([x.to(acc) for x in came])


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    there = [x for x in terms if x is not None]
    return sum(there[1:], there[0]) if there else None


# ---- states of a run, from tokens of the rank's row ----------------------------------------------------------------------


def _places(given: Given) -> tuple[tuple[int, int], list[tuple[Tensor, Columns | None]]]:
    """(H, D), and where k, v and gate are."""
    if "projection" not in given:
        return given["v"].shape[2:], [(given[name], None) for name in ("k", "v", "gate")]
    columns = columns_in(given["projection"], given)
    return columns[-1][1:], [(given["projection"], c) for c in columns]


def _cut(given: Given, at: int, tokens: int) -> list[Tensor]:
    """k, v and gate of some tokens."""
    return [view(x, at, tokens, columns) for x, columns in _places(given)[1]]


def _few(plan: Plan, i: int) -> bool:
    leaving = plan.left(i)
    return leaving.tokens <= FEW and not leaving.offset


def _op_of(plan: Plan, i: int, given: Given) -> Given:
    """The arguments of the op over what leaves a run. Its chunks are turned as those of the sequence."""
    leaving = plan.left(i)
    k, v, gate = _cut(given, leaving.at, leaving.tokens)
    tables = {}
    for name in ("rotary_cos", "rotary_sin"):
        table = given[name]
        tables[name] = None if table is None else table[leaving.first :].to(state_dtype(k.dtype))
    return tables | {
        "q": k, "k": k, "v": v, "gate": gate, "gate_bias": given["gate_bias"], "chunk_size": plan.chunk_size,
        "scale": k.shape[-1] ** -0.5, "chunk_rows": leaving.whole, "return_state": True,
        "deterministic": given["deterministic"],
    }  # fmt: skip


def _by_op(plan: Plan, i: int, given: Given) -> dict[str, Tensor]:
    """What the op gives, with all states of a run among it."""
    with passing():
        return results_of("rat_attention", **_op_of(plan, i, given))


def _scan(x: Tensor, gate: Tensor, given: Given, chunk_size: int, **more: Any) -> Tensor:
    """States at the ends of sequences, ``(N, H, D)``."""
    with passing():
        return call_kernel(
            "chunk_recurrence", x=x, gate=gate, gate_bias=given["gate_bias"], chunk_size=chunk_size, return_state=True, **more
        )[1]


def _states(plan: Plan, i: int, given: Given) -> list[Tensor]:
    """k~ and v~ of a run's whole chunks and of its tail, ``(chunks, H, D)``."""
    (heads, dim), places = _places(given)
    lead = places[0][0]
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for at, tokens, _, sequences, ends in plan.slices(i, SLICE, lead.device):
        *rows, gate = _cut(given, at, tokens)
        for x, to in zip(rows, found, strict=True):
            more = {"cu_seqlens": ends} if sequences > 1 else {}
            to.append(_scan(x, gate, given, min(plan.chunk_size, tokens), **more))
    none = [lead.new_empty(0, heads, dim, dtype=state_dtype(lead.dtype))]
    return [x[0] if len(x) == 1 else torch.cat(x or none) for x in found]


def _before_head(plan: Plan, i: int) -> Entering:
    return next(e for e in plan.entering if e.run == i)


def _closed(plan: Plan, i: int, given: Given, states: list[Tensor], before: dict[int, Tensor]) -> list[Tensor]:
    """k~, turned, and v~ of the chunks that close in a run, ``(H, chunks, D)``."""
    leaving, lead = plan.left(i), states[0]
    rows = [x[: leaving.whole] for x in states]
    if leaving.head:
        *tokens, gate = _cut(given, leaving.at, leaving.head)
        source = _before_head(plan, i).running
        assert source is not None
        lengths = plan.numbers(("offset", i), lambda: [leaving.offset], lead.device)
        heads = [
            _scan(x, gate, given, plan.chunk_size, initial_state=state[None], lengths=lengths)
            for x, state in zip(tokens, before[source], strict=True)
        ]
        rows = [torch.cat(x) for x in zip(heads, rows, strict=True)]
    return [_turn(rows[0], given, leaving.first).transpose(0, 1), rows[1].transpose(0, 1)]


def _turn(rows: Tensor, given: Given, first: int, back: bool = False) -> Tensor:
    """Keys ``(chunks, H, D)``, turned by the index of their chunk; ``back``: turned back."""
    if given["rotary_cos"] is None or not rows.shape[0]:
        return rows
    count, heads, dim = rows.shape
    cos, sin = (given[name].narrow(0, first, count).unsqueeze(1).to(rows.dtype) for name in ("rotary_cos", "rotary_sin"))
    halves = rows.view(count, heads, 2, dim // 2)
    turned = halves * cos.unsqueeze(1)
    (low, high), (x1, x2) = turned.unbind(2), halves.unbind(2)
    low.addcmul_(x2, sin, value=1 if back else -1)
    high.addcmul_(x1, sin, value=-1 if back else 1)
    return turned.view(count, heads, dim)


# ---- their gradients, added to those of the tokens -----------------------------------------------------------------------


def _opened(plan: Plan, i: int, given: Given, came: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of k~ and v~ of closed chunks, ``(chunks, H, D)``, of those of what was sent."""
    total = _total(came)
    assert total is not None
    chunks = total.to(state_dtype(total.dtype)).transpose(1, 2).contiguous()
    return [_turn(chunks[0], given, plan.left(i).first, back=True), chunks[1]]


def _scan_back(
    given: Given, grads: dict[str, Tensor], at: int, tokens: int, chunk_size: int, dstates: Sequence[Tensor], **more: Any
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Adds what follows from gradients of states to those of some tokens. Returns the bias's and those of initial states."""
    *rows, gate = _cut(given, at, tokens)
    *drows, dgate = _cut(given | {name.removeprefix("d"): x for name, x in grads.items() if x is not None}, at, tokens)
    dbias, initial = [], []
    # No token but the last of a chunk has a gradient: one row of zeros stands for all. y is not read, only checked.
    dy = gate.new_zeros(gate.shape[-1]).expand(gate.shape)
    for i, (x, dx, dstate) in enumerate(zip(rows, drows, dstates, strict=True)):
        own = {name: values[i] if name == "initial_state" else values for name, values in more.items()}
        more_x, more_gate, of_bias, of_initial = call_kernel(
            "chunk_recurrence_backward", dy=dy, dfinal_state=dstate, x=x, gate=gate, gate_bias=given["gate_bias"], y=gate,
            chunk_size=chunk_size, **own,
        )  # fmt: skip
        dx += more_x
        dgate += more_gate
        dbias.append(of_bias)
        initial.append(of_initial)
    return _sum(dbias), initial


def _backward_of_head(plan: Plan, i: int, given: Given, grads: dict[str, Tensor], dstates: list[Tensor]) -> Tensor | None:
    """Of the chunk that another run began: the gradient of its running state is added to the op's."""
    leaving, n = plan.left(i), _before_head(plan, i).sequence
    names = ("running_k", "running_v")
    dbias, initial = _scan_back(
        given, grads, leaving.at, leaving.head, plan.chunk_size, [x[:1] for x in dstates],
        initial_state=[given[name][n : n + 1] for name in names],
        lengths=plan.numbers(("offset", i), lambda: [leaving.offset], dstates[0].device),
    )  # fmt: skip
    for name, more in zip(names, initial, strict=True):
        assert more is not None
        grads[f"d{name}"][n : n + 1] += more
    return dbias


def _backward_of_states(
    plan: Plan, i: int, given: Given, grads: dict[str, Tensor], dstates: list[Tensor] | None, running: Tensor | None
) -> Tensor | None:
    """Of the whole chunks, and of the tail."""
    leaving = plan.left(i)
    parts: list[list[Tensor]] = [[], []]
    if dstates is not None and leaving.whole:
        parts = [[x[leaving.head > 0 :]] for x in dstates]
    if leaving.tail:
        like = parts[0][0] if parts[0] else running
        assert like is not None
        ends = like.new_zeros(2, *like.shape[1:]) if running is None else running
        parts = [[*x, end[None]] for x, end in zip(parts, ends, strict=True)]
    rows = [x[0] if len(x) == 1 else torch.cat(x) for x in parts if x]
    dbias = []
    for at, tokens, first, sequences, ends in plan.slices(i, SLICE // 2, given["cu_seqlens"].device):
        cut = [x[first : first + sequences] for x in rows]
        own = {"cu_seqlens": ends} if sequences > 1 else {}
        dbias.append(_scan_back(given, grads, at, tokens, min(plan.chunk_size, tokens), cut, **own)[0])
    return _sum(dbias)


# ---- the call ------------------------------------------------------------------------------------------------------------


def whole_row(group: Any, op: str, plan: Plan, given: Given) -> Tensor:
    """y of an op over this rank's tokens."""
    names = [name for name in ROWS if given.get(name) is not None]
    bias = given["gate_bias"]
    if bias is not None:
        bias = bias.to(state_dtype(given[names[0]].dtype))
    options = {name: x for name, x in given.items() if name not in names and name != "gate_bias"}
    return _Row.apply(group, op, plan, options, names, bias, *(given[name] for name in names))
