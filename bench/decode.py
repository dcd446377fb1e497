"""A decode step and what is built on it: the layer's step, drafts, pages, FP8, exact steps, a prefill in pieces.

On a GPU everything is replayed from a CUDA graph. Peers: scaled_dot_product_attention and FlashAttention-3 over a KV cache of
as many tokens, and the definition under torch.compile. The floor is the time to read chunk states, and the weights of a layer,
once at the measured copy bandwidth (its reading half). A row that disagrees with the definition is not timed. Rows come in the
order of their worth and are written as they are found.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

import compiled
import torch
from common import (
    Clock,
    Deadline,
    ceilings,
    device_kernels,
    flash_attention_3,
    free,
    number,
    parser,
    record,
    result_path,
    save,
    table,
    write,
)
from table import MEASURES
from torch.nn import functional as F

import rat_ext
from rat_ext import reference
from rat_ext.layers import RATLayer

GROUPS = 2
ROOM = 1024  # the sequences grow by one token per call
CHAIN, DRAFT, PAGE = 15, 4, 16
# Tokens of all sequences up to which dense attention is a peer: 34 GB of keys and values.
LARGEST = 1 << 22
# Seconds that compiling the definition may take: it begins only where they are left.
COMPILING = 30.0


@dataclasses.dataclass(frozen=True)
class Row:
    """One row. ``kind``: "" for a step of the op, else what comes before the sizes in the row's name."""

    kind: str
    batch: int
    tokens: int
    dim: int = 128
    chunk_size: int = 16
    heads: int = 16

    @property
    def sizes(self) -> str:
        width = f"d_model={self.heads * self.dim} " if self.kind == "layer step" else ""
        return f"T={self.tokens} B={self.batch} {width}H={self.heads} G={GROUPS} D={self.dim} L={self.chunk_size}"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.sizes}".strip()

    @property
    def states(self) -> int:
        """Numbers in the closed chunks."""
        return 2 * self.batch * self.heads * (self.tokens // self.chunk_size) * self.dim


def rows(device: torch.device, quick: bool) -> list[Row]:
    """The most worth first."""
    if device.type == "cpu":
        small: dict[str, Any] = {"dim": 64, "heads": 4 if quick else 16}
        batch, tokens = (2, 64) if quick else (4, 1024)
        kinds = ["layer step", "", f"chain of {CHAIN}", f"draft of {DRAFT}", "e4m3", f"pages of {PAGE}", "exact"]
        made = [Row(kind, batch, tokens, **small) for kind in kinds] + [Row("pieces", 1, tokens, **small)]
        return made if quick else made + [Row("", batch, t, **small) for t in (4096, 16384)]
    draft, pages, chain = f"draft of {DRAFT}", f"pages of {PAGE}", f"chain of {CHAIN}"
    first = [
        Row("layer step", 64, 4096), Row("", 64, 4096), Row("", 1, 131072), Row(chain, 1, 1024), Row(chain, 8, 4096),
        Row("", 512, 4096), Row("", 512, 16384), Row(draft, 64, 4096), Row("e4m3", 512, 4096), Row(pages, 64, 4096),
        Row("pieces", 1, 131072), Row("exact", 64, 4096),
    ]  # fmt: skip
    if quick:
        return [first[0], first[1], first[3], first[7], first[11]]
    # The README's figure: 262,144 tokens in all. Then that over B and T.
    figure = [Row("", 262144 // t, t) for t in (1024, 16384, 65536, 131072)]
    grid = [Row("", b, t) for b in (1, 8, 64, 512) for t in (1024, 4096, 16384, 65536, 131072)]
    rest = [
        Row("", 64, 4096, chunk_size=64), Row("", 64, 4096, dim=64), Row(draft, 512, 4096), Row(pages, 512, 4096),
        Row("e4m3", 64, 4096),
    ]  # fmt: skip
    return list(dict.fromkeys(first + figure + grid + rest))


class Pool:
    """The tensors of a pool as the operator takes them."""

    def __init__(self, row: Row, device: torch.device, dtype: torch.dtype):
        paged, fp8 = row.kind.startswith("pages"), row.kind == "e4m3"
        heads, dim, batch = row.heads, row.dim, row.batch
        chunks = (row.tokens + ROOM) // row.chunk_size
        blocks, page = (batch * (chunks // PAGE), PAGE) if paged else (batch, chunks)
        make = {"device": device, "dtype": dtype}
        shape = (blocks, heads, page, dim)
        self.states = [torch.randn(shape, **make).to(torch.float8_e4m3fn if fp8 else dtype) for _ in range(2)]
        self.scales = [torch.ones(shape[:3], device=device) if fp8 else None for _ in range(2)]
        self.table = None
        if paged:
            self.table = torch.randperm(blocks, device=device).to(torch.int32).reshape(batch, -1).contiguous()
        self.running = [torch.randn(batch, heads, dim, device=device) for _ in range(2)]
        self.lengths = torch.full((batch,), row.tokens, dtype=torch.int32, device=device)
        self.error = torch.zeros(4, dtype=torch.int32, device=device)
        size = torch.ops.rat_ext.decode_workspace.default(batch, heads, chunks, dim)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self.tables = rat_ext.rotary_tables(chunks + 1, dim, device=device)
        front = (batch, DRAFT) if row.kind.startswith("draft") else (batch,)
        self.new = [torch.randn(*front, n, dim, **make) for n in (GROUPS, GROUPS, heads, heads, heads)]
        self.chunk_size, self.scale = row.chunk_size, dim**-0.5

    def step(self) -> torch.Tensor:
        q, k, v, gate, out_gate = self.new
        return torch.ops.rat_ext.rat_decode_step.default(
            q, k, v, gate, None, out_gate, *self.tables, None, self.table, *self.states, *self.scales, *self.running,
            self.lengths, self.error, self.workspace, self.chunk_size, self.scale,
        )  # fmt: skip


def graphed(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A replay of ``function`` on a GPU, ``function`` itself on a CPU."""
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


class Wrong(Exception):
    """What is measured is not what the definition says."""


class Bench:
    """Measures a row; each measurement returns what the row's JSON has beside its name."""

    def __init__(self, device: torch.device, options, deadline: Deadline):
        self.device, self.deadline = device, deadline
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.peers, self.profile = not options.no_peers, options.profile
        self.clock = Clock(device, options.quick)
        self.limits = ceilings(device, self.dtype, options.quick)
        self.flash3, why = flash_attention_3() if self.peers and device.type == "cuda" else (None, "")
        if why:
            print(why)

    def milliseconds(self, function: Callable[[], object], budget: float = 150.0, most: int = 100) -> float:
        return self.clock.median(graphed(function, self.device), budget, most)

    def measure(self, row: Row) -> dict:
        function = {"": self.step, "layer step": self.layer, "pieces": self.pieces, "exact": self.exact}
        return function.get(row.kind, self.variant)(row)

    def with_floor(self, found: dict, state_bytes: int, weight_bytes: int = 0) -> dict:
        floor = (state_bytes + weight_bytes) / self.limits["copy_gb_s"] / 1e6
        found = found | {"floor_ms": floor, "state_bytes": state_bytes}
        return found | {"weight_bytes": weight_bytes} if weight_bytes else found

    # ---- the op ----

    def full(self, row: Row, room: int = ROOM) -> rat_ext.RATCache:
        """A cache of random sequences of the row's length."""
        sizes = (row.batch, row.heads, row.dim, row.chunk_size, row.tokens + room)
        cache = rat_ext.RATCache.empty(*sizes, dtype=self.dtype, device=self.device)
        for x in (cache.chunk_k, cache.chunk_v, cache.running_k, cache.running_v):
            x.normal_()
        return self.again(cache, row)

    def again(self, cache: rat_ext.RATCache, row: Row) -> rat_ext.RATCache:
        """The sequences of ``cache`` at the row's length once more: what steps wrote since is random too."""
        cache.lengths.fill_(row.tokens)
        cache.length_bound = cache.capacity
        return cache

    def tables(self, row: Row) -> dict[str, torch.Tensor]:
        cos, sin = rat_ext.rotary_tables((row.tokens + ROOM) // row.chunk_size + 1, row.dim, device=self.device)
        return {"rotary_cos": cos, "rotary_sin": sin}

    def new(self, row: Row, *front: int) -> list[torch.Tensor]:
        """q, k, v, gate, out_gate of new tokens."""
        counts = (GROUPS, GROUPS, row.heads, row.heads, row.heads)
        return [torch.randn(*front, n, row.dim, device=self.device, dtype=self.dtype) for n in counts]

    def check(self, row: Row, got: torch.Tensor, want: list[torch.Tensor]) -> dict:
        """``want``: the definition in float64, and eagerly in the dtype of the bench."""
        error, eager = (float((x.double() - want[0]).abs().max()) for x in (got, want[1]))
        if not error <= 2 * eager + 8 * torch.finfo(self.dtype).eps * float(want[0].abs().max()):
            raise Wrong(f"error {error:.1e}, eager {eager:.1e}")
        return {"error": error, "eager_error": eager}

    def step(self, row: Row) -> dict:
        """A step of the op beside dense attention."""
        found = self.steps(row, ("rat_ext", False))
        if self.peers:
            free()
            found["ms"] |= self.attention(row)
        return self.with_floor(found, row.states * self.dtype.itemsize)

    def exact(self, row: Row) -> dict:
        """exact=True beside the plain step."""
        return self.steps(row, ("rat_ext", True), ("one step", False))

    def steps(self, row: Row, *ways: tuple[str, bool]) -> dict:
        """Names of what is timed, each with its ``exact``; the first is checked."""
        token, cache, fixed = self.new(row, row.batch), self.full(row), self.tables(row)

        def step(exact: bool) -> torch.Tensor:
            return rat_ext.rat_decode_step(*token[:4], cache, out_gate=token[4], **fixed, exact=exact)

        some = cache.read(torch.zeros(1, dtype=torch.int64, device=self.device))
        want = []
        for to in (torch.float64, self.dtype):
            one = [x[:1].to(to) for x in token]
            want.append(reference.rat_decode_step(*one[:4], _as(some.clone(), to), out_gate=one[4], **fixed))
        found: dict = self.check(row, step(ways[0][1])[:1], want) | {"ms": {}}
        for name, exact in ways:
            self.again(cache, row)
            found["ms"][name] = self.milliseconds(lambda exact=exact: step(exact))
            cache.check()
        return found

    def attention(self, row: Row) -> dict[str, float]:
        """Dense attention over keys and values of as many tokens, where memory has room for them."""
        size = row.batch * row.heads * row.tokens * row.dim
        if row.batch * row.tokens > LARGEST:
            return {}
        if self.device.type == "cuda" and 2 * size * 2 > 0.8 * torch.cuda.mem_get_info(self.device)[0]:
            return {}
        keys, values = (torch.randn(size, device=self.device, dtype=self.dtype) for _ in range(2))
        query = torch.randn(row.batch, row.heads, 1, row.dim, device=self.device, dtype=self.dtype)
        by_head = [x.view(row.batch, row.heads, row.tokens, row.dim) for x in (keys, values)]
        ways: dict[str, Callable[[], object]] = {"sdpa": lambda: F.scaled_dot_product_attention(query, *by_head)}
        if self.flash3 is not None:
            by_token = [x.view(row.batch, row.tokens, row.heads, row.dim) for x in (keys, values)]
            used = torch.full((row.batch,), row.tokens, dtype=torch.int32, device=self.device)
            ways["FlashAttention-3"] = lambda: self.flash3(query.transpose(1, 2), *by_token, cache_seqlens=used)
        found = {}
        for name, way in ways.items():
            try:
                found[name] = self.milliseconds(way, most=50)
            except Exception as error:
                print(f"{row.name}: {name} is left out: {words(error)}", flush=True)
        return found

    def variant(self, row: Row) -> dict:
        """Other ways to call the step, by the operator itself."""
        steps = CHAIN if row.kind.startswith("chain") else 1
        pools = [Pool(row, self.device, self.dtype) for _ in range(steps)]
        ms = self.milliseconds(lambda: [pool.step() for pool in pools]) / steps
        if any(bool(pool.error.any()) for pool in pools):
            raise Wrong(f"cache.error is {pools[0].error.tolist()}")
        return self.with_floor({"ms": {"rat_ext": ms}}, row.states * pools[0].states[0].element_size())

    def pieces(self, row: Row) -> dict:
        """A prefill in pieces of 512 tokens (16 on a CPU) beside one forward over the whole."""
        piece = 512 if self.device.type == "cuda" else 16
        q, k, v, gate, out_gate = self.new(row, 1, row.tokens)
        sizes = (1, row.heads, row.dim, row.chunk_size, row.tokens)
        cache = rat_ext.RATCache.empty(*sizes, dtype=self.dtype, device=self.device)
        fixed = self.tables(row)

        def part(begin: int, end: int) -> torch.Tensor:
            some = [x[:, begin:end] for x in (q, k, v, gate)]
            return rat_ext.rat_attention(*some, row.chunk_size, out_gate=out_gate[:, begin:end], cache=cache, **fixed)

        def in_pieces() -> list[torch.Tensor]:
            cache.reset()
            return [part(begin, begin + piece) for begin in range(0, row.tokens, piece)]

        def at_once() -> torch.Tensor:
            cache.reset()
            return part(0, row.tokens)

        def whole() -> torch.Tensor:
            forward = rat_ext.rat_attention(q, k, v, gate, row.chunk_size, out_gate=out_gate, return_state=True, **fixed)
            return forward[0]

        want, got = whole(), torch.cat(in_pieces(), dim=1)
        cache.check()
        error, largest = float((got - want).abs().max()), float(want.abs().max())
        if not error <= 8 * torch.finfo(self.dtype).eps * largest:
            raise Wrong(f"pieces are {error:.1e} off the whole, of {largest:.1e}")
        equal = torch.equal(got, want)
        del want, got
        ms = {"rat_ext": self.milliseconds(in_pieces, 500, 20), "whole": self.milliseconds(whole, 500, 20)}
        ms["whole, with a cache"] = self.milliseconds(at_once, 500, 20)
        cache.check()
        return {"ms": ms, "piece": piece, "equal_bits": equal}

    # ---- the layer ----

    def layer(self, row: Row) -> dict:
        """RATLayer.step, its projections included."""
        layer = self.make_layer(row)
        x = torch.randn(row.batch, row.heads * row.dim, device=self.device, dtype=self.dtype)
        cache = self.full(row)

        def step() -> torch.Tensor:
            return layer.step(x, cache)

        some = cache.read(torch.zeros(1, dtype=torch.int64, device=self.device))
        want = []
        for to in (torch.float64, self.dtype):
            projection = F.linear(x[:1].to(to), layer.in_proj.weight.to(to)).unflatten(-1, (-1, row.dim))
            q, k, v, gate, out_gate = projection.split(layer.parts, dim=-2)
            y = reference.rat_decode_step(
                q, k, v, gate, _as(some.clone(), to), gate_bias=layer.gate_bias, out_gate=out_gate, **self.tables(row)
            )
            want.append(F.linear(y.flatten(-2), layer.out_proj.weight.to(to)))
        found = self.check(row, step()[:1], want)
        run = graphed(step, self.device)
        found["ms"] = {"rat_ext": self.clock.median(run, 150, 100)}
        cache.check()
        if self.profile:
            found["kernels"] = device_kernels(run, self.device)
        weights = sum(p.nbytes for p in layer.parameters())
        return self.with_floor(found, row.states * self.dtype.itemsize, weights)

    def make_layer(self, row: Row) -> RATLayer:
        sizes = (row.heads * row.dim, row.heads, GROUPS, row.chunk_size)
        return RATLayer(*sizes, device=self.device, dtype=self.dtype).requires_grad_(False)

    def add_compiled(self, row: Row, found: dict) -> None:
        """The definition of the row, compiled, as one more peer."""
        # It reads every row of its cache, so that has few more than it needs.
        token, fixed, cache = self.new(row, row.batch), self.tables(row), self.full(row, 128)
        state = (*(x.clone() for x in cache.tensors()), *fixed.values(), row.chunk_size)
        way = compiled.decode_step if self.device.type == "cuda" else compiled.decode_step_eager
        if row.kind == "layer step":
            layer, function = self.make_layer(row), way(True)
            x = torch.randn(row.batch, row.heads * row.dim, device=self.device, dtype=self.dtype)
            weights = (layer.in_proj.weight, layer.out_proj.weight, layer.gate_bias)
            want = layer.step(x, cache).float()

            def theirs() -> torch.Tensor:
                return function(x, *weights, *state, GROUPS)
        else:
            function = way(False)
            want = rat_ext.rat_decode_step(*token[:4], cache, out_gate=token[4], **fixed).float()

            def theirs() -> torch.Tensor:
                return function(*token, None, *state)

        # Both round to the dtype of the bench, and not at the same places.
        off, largest = float((theirs().float() - want).abs().max()), float(want.abs().max())
        if not off <= 32 * torch.finfo(self.dtype).eps * largest:
            raise Wrong(f"the compiled definition is {off:.1e} off, of {largest:.1e}")
        found["ms"]["compiled"] = self.milliseconds(theirs, most=50)


def _as(cache: rat_ext.RATCache, dtype: torch.dtype) -> rat_ext.RATCache:
    for name in ("chunk_k", "chunk_v"):
        setattr(cache, name, getattr(cache, name).to(dtype))
    if dtype == torch.float64:
        cache.running_k, cache.running_v = cache.running_k.double(), cache.running_v.double()
    return cache


def beside(found: list[dict]) -> None:
    """Of drafts, pages and FP8 the plain step of the same sizes, where this run has it."""
    plain = {row["name"]: row["ms"]["rat_ext"] for row in found}
    for row in found:
        match = re.match(r"(?:draft of \d+|pages of \d+|e4m3) (.*)", row["name"])
        if match and match[1] in plain:
            row["ms"]["one step"] = plain[match[1]]


def cells(row: dict) -> list[str]:
    """What the table on the screen says of a row."""
    ms = dict(row["ms"])
    mine, floor = ms.pop("rat_ext"), row.get("floor_ms")
    times = {name: f"{mine / t:.2f}x as long" if name in MEASURES else f"{t / mine:.2f}x" for name, t in ms.items()}
    others = ", ".join(f"{name} {number(t * 1e3)} ({times[name]})" for name, t in ms.items())
    of_floor = f"{floor / mine:.0%}" if floor else "-"
    return [row["name"], f"{mine * 1e3:.1f}", number(floor and floor * 1e3), of_floor, others]


@torch.no_grad()
def main() -> int:
    p = parser(__doc__)
    p.set_defaults(time_limit=100.0)
    p.add_argument("--profile", action="store_true", help="also list the kernels of the layer's step, on a GPU")
    options = p.parse_args()
    device, deadline = torch.device(options.device), Deadline(options.time_limit)
    bench = Bench(device, options, deadline)
    result = record("decode", device, ceilings=bench.limits, rows=[])
    path, found = result_path(result, options), result["rows"]
    copy = bench.limits["copy_gb_s"]
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}, copy {copy:.0f} GB/s\n", flush=True)
    wrong, late = False, []
    wanted = [row for row in rows(device, options.quick) if re.search(options.rows, row.name)]
    for row in wanted:
        if deadline.over():
            late.append(row.name)
            continue
        free()
        try:
            entry = bench.measure(row)
        except Exception as error:  # no row costs another
            print(f"{row.name}: {words(error)}: not timed", flush=True)
            wrong |= not isinstance(error, torch.OutOfMemoryError)
            continue
        found.append({"name": row.name, **entry})
        beside(found)
        if path is not None:
            write(result, path)
    # Compiling costs the most time and decides nothing else: last.
    for row in wanted[:2] if bench.peers else []:
        entry = next((x for x in found if x["name"] == row.name and row.kind in ("", "layer step")), None)
        if entry is None or deadline.seconds() + COMPILING > deadline.limit:
            continue
        free()
        try:
            bench.add_compiled(row, entry)
        except Exception as error:
            print(f"{row.name}: the compiled definition is left out: {words(error)}")
    table(["", "us", "floor us", "of floor", "beside, us (ratio)"], [cells(row) for row in found])
    if late:
        print(f"left out, --time-limit: {', '.join(late)}")
    print(f"{deadline.seconds():.0f} s")
    save(result, options)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
