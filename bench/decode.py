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
        (64, 4096, 128, 16),
        (64, 4096, 128, 64),
        (64, 4096, 64, 16),
        (16, 16384, 128, 16),
        (4, 65536, 128, 16),
        (2, 131072, 128, 16),
        (1, 131072, 128, 16),
    ]


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
            if not options.no_peers:
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
