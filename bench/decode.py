"""One decode step against scaled_dot_product_attention over a KV cache, on a GPU both replayed from a CUDA graph.

The floor is the time to read the chunk states once at the measured copy bandwidth (its reading half). Rows refuse to be
timed when the step disagrees with the definition.
"""

from __future__ import annotations

import re
import sys

import torch
from common import Clock, Deadline, ceilings, free, number, parser, record, save, table
from torch.nn import functional as F

import rat_ext
from rat_ext import reference

HEADS, GROUPS = 16, 2


def rows(device: torch.device, quick: bool) -> list[tuple[int, int, int, int]]:
    """(batch, tokens, D, L)."""
    if device.type == "cpu":
        return [(4, 1024, 64, 16)] if quick else [(4, t, 64, 16) for t in (1024, 4096, 16384)]
    if quick:
        return [(64, 4096, 128, 16)]
    return [
        (256, 1024, 128, 16),
        (512, 4096, 128, 16),
        (512, 16384, 128, 16),
        (64, 4096, 128, 16),
        (64, 4096, 128, 64),
        (64, 4096, 64, 16),
        (16, 16384, 128, 16),
        (4, 65536, 128, 16),
        (2, 131072, 128, 16),
        (1, 131072, 128, 16),
    ]


def variants(device: torch.device, quick: bool) -> list[tuple[str, int, int]]:
    """(what, batch, tokens), all of D = 128, L = 16: other ways to call the step."""
    if device.type == "cpu":
        return []
    if quick:
        return [("draft of 4", 64, 4096)]
    chains = [("chain of 15", 1, 1024), ("chain of 15", 8, 4096)]
    return [*chains, *((what, b, 4096) for what in ("draft of 4", "pages of 16", "e4m3") for b in (64, 512))]


class Pool:
    """The tensors of a pool as the operator takes them."""

    def __init__(self, what: str, batch: int, tokens: int, dim: int, chunk_size: int, device: torch.device):
        rows = (tokens + 1024) // chunk_size
        blocks, page = (batch * (rows // 16), 16) if what == "pages of 16" else (batch, rows)
        states = torch.float8_e4m3fn if what == "e4m3" else torch.bfloat16
        make = {"device": device, "dtype": torch.bfloat16}
        self.states = [torch.randn(blocks, HEADS, page, dim, **make).to(states) for _ in range(2)]
        self.scales = [torch.ones(blocks, HEADS, page, device=device) if what == "e4m3" else None for _ in range(2)]
        self.table = None
        if what == "pages of 16":
            self.table = torch.randperm(blocks, device=device).to(torch.int32).reshape(batch, -1).contiguous()
        self.running = [torch.randn(batch, HEADS, dim, device=device) for _ in range(2)]
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        self.error = torch.zeros(4, dtype=torch.int32, device=device)
        size = torch.ops.rat_ext.decode_workspace.default(batch, HEADS, rows, dim)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        self.tables = rat_ext.rotary_tables(rows + 1, dim, device=device)
        shape = (batch, 4) if what == "draft of 4" else (batch,)
        self.new = [torch.randn(*shape, n, dim, **make) for n in (GROUPS, GROUPS, HEADS, HEADS, HEADS)]
        self.chunk_size, self.scale = chunk_size, dim**-0.5

    def step(self) -> torch.Tensor:
        q, k, v, gate, out_gate = self.new
        return torch.ops.rat_ext.rat_decode_step.default(
            q, k, v, gate, None, out_gate, *self.tables, None, self.table, *self.states, *self.scales, *self.running,
            self.lengths, self.error, self.workspace, self.chunk_size, self.scale,
        )  # fmt: skip


def graphed(function, device: torch.device):
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


def main() -> int:
    options = parser(__doc__).parse_args()
    device = torch.device(options.device)
    deadline, clock = Deadline(options.time_limit), Clock(device, options.quick)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limits = ceilings(device, dtype, options.quick)
    result = record("decode", device, ceilings=limits, rows=[])
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}, copy {limits['copy_gb_s']:.0f} GB/s\n")
    shown, wrong = [], False
    for batch, tokens, dim, chunk_size in rows(device, options.quick):
        name = f"T={tokens} B={batch} H={HEADS} G={GROUPS} D={dim} L={chunk_size}"
        if not re.search(options.rows, name) or deadline.over():
            continue
        free()
        counts = (GROUPS, GROUPS, HEADS, HEADS, HEADS)
        token = [torch.randn(batch, h, dim, device=device, dtype=dtype) for h in counts]
        room = tokens + 1024  # the sequences grow by one token per call
        cos, sin = rat_ext.rotary_tables(room // chunk_size + 1, dim, device=device)
        fixed = {"out_gate": token[4], "rotary_cos": cos, "rotary_sin": sin}
        cache = rat_ext.RATCache.empty(batch, HEADS, dim, chunk_size, room, dtype=dtype, device=device)
        cache.chunk_k.normal_()
        cache.chunk_v.normal_()
        cache.running_k.normal_()
        cache.running_v.normal_()

        def step(token=token, cache=cache, fixed=fixed):
            return rat_ext.rat_decode_step(*token[:4], cache, **fixed)

        with torch.no_grad():
            cache.lengths.fill_(tokens)
            some = cache.read(torch.zeros(1, dtype=torch.int64, device=device))
            one = [x[:1] for x in token]
            want = [
                reference.rat_decode_step(
                    *(x.to(to) for x in one[:4]),
                    _as(some.clone(), to),
                    out_gate=one[4].to(to),
                    rotary_cos=cos,
                    rotary_sin=sin,
                )
                for to in (torch.float64, dtype)
            ]
            got = step()[:1]
            error, eager = (float((x.double() - want[0]).abs().max()) for x in (got, want[1]))
            if not error <= 2 * eager + 8 * torch.finfo(dtype).eps * float(want[0].abs().max()):
                print(f"{name}: WRONG, error {error:.1e}, eager {eager:.1e}: not timed")
                wrong = True
                continue
            mine = clock.median(graphed(step, device), 200, 200)
            theirs = None
            if not options.no_peers and batch * tokens <= 1 << 21:  # memory for its keys and values
                query = torch.randn(batch, HEADS, 1, dim, device=device, dtype=dtype)
                keys, values = (torch.randn(batch, HEADS, tokens, dim, device=device, dtype=dtype) for _ in range(2))
                theirs = clock.median(
                    graphed(lambda q=query, k=keys, v=values: F.scaled_dot_product_attention(q, k, v), device), 200, 100
                )
                del query, keys, values
        states = 2 * batch * HEADS * (tokens // chunk_size) * dim * dtype.itemsize
        floor = states / limits["copy_gb_s"] / 1e6
        entry = {
            "name": name,
            "ms": {"rat_ext": mine},
            "floor_ms": floor,
            "state_bytes": states,
            "error": error,
            "eager_error": eager,
        }
        if theirs is not None:
            entry["ms"]["sdpa"] = theirs
        result["rows"].append(entry)
        ratio = "" if theirs is None else f"{theirs / mine:.1f}x"
        shown.append(
            [
                name,
                f"{mine * 1e3:.1f}",
                f"{floor * 1e3:.1f}",
                f"{floor / mine:.0%}",
                number(theirs and theirs * 1e3),
                ratio,
            ]
        )
    for what, batch, tokens in variants(device, options.quick):
        name = f"{what} T={tokens} B={batch} H={HEADS} G={GROUPS} D=128 L=16"
        if not re.search(options.rows, name) or deadline.over():
            continue
        free()
        steps = 15 if what == "chain of 15" else 1
        pools = [Pool(what, batch, tokens, 128, 16, device) for _ in range(steps)]
        mine = clock.median(graphed(lambda p=pools: [pool.step() for pool in p], device), 200, 100) / steps
        if any(pool.error.any() for pool in pools):
            print(f"{name}: an error, {pools[0].error.tolist()}: not counted")
            wrong = True
            continue
        states = 2 * batch * HEADS * (tokens // 16) * 128 * pools[0].states[0].element_size()
        floor = states / limits["copy_gb_s"] / 1e6
        result["rows"].append({"name": name, "ms": {"rat_ext": mine}, "floor_ms": floor, "state_bytes": states})
        shown.append([name, f"{mine * 1e3:.1f}", f"{floor * 1e3:.1f}", f"{floor / mine:.0%}", "-", ""])
        del pools
    table(["", "us", "floor us", "of floor", "sdpa us", "ratio"], shown)
    save(result, options)
    return 1 if wrong else 0


def _as(cache: rat_ext.RATCache, dtype: torch.dtype) -> rat_ext.RATCache:
    for name in ("chunk_k", "chunk_v"):
        setattr(cache, name, getattr(cache, name).to(dtype))
    if dtype == torch.float64:
        cache.running_k, cache.running_v = cache.running_k.double(), cache.running_v.double()
    return cache


if __name__ == "__main__":
    sys.exit(main())
