"""Forward and forward + backward of the kernel families on one GPU, shape by shape: no shape may be slower on the one that
is chosen.

Each family is forced in a process of its own (RAT_EXT_KERNELS is read once). Times are device times of one call, by CUDA
graph replay, so that launches cost no more than they do in a training step.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import torch
from common import FAMILIES, Clock, free, in_family, parser, record, save, table

import rat_ext
from rat_ext import RATCache

# batch, tokens, H, G, D, L, tokens seen before, dtype, what is special
SHAPES = [
    *((b, t, 16, 2, 128, 16, 0, "bf16", "") for b, t in ((64, 4096), (16, 16384), (2, 131072), (1, 4096), (1, 1024), (1, 128))),
    *((b, t, 16, 2, 64, 16, 0, "bf16", "") for b, t in ((64, 4096), (2, 131072), (1, 4096), (1, 1024))),
    *((8, 4096, 16, 2, d, 16, 0, "bf16", "") for d in (8, 16, 24, 32, 48, 72, 80, 96, 104, 192, 256)),
    *((8, 4096, 16, g, 128, 16, 0, "f16", "") for g in (1, 4, 16)),
    *((4, 8192, 16, 2, 128, size, 0, "bf16", "") for size in (1, 2, 4, 64, 256, 1 << 20)),
    (2, 131072, 16, 2, 128, 64, 0, "bf16", ""),
    (1, 1048576, 2, 1, 128, 16, 0, "bf16", ""),
    (8, 4096, 16, 2, 128, 16, 0, "bf16", "unaligned"),
    (8, 4096, 16, 2, 128, 16, 0, "bf16", "aligned to 8 bytes"),
    (8, 4096, 16, 2, 64, 16, 0, "bf16", "unaligned"),
    (1, 131072, 16, 2, 128, 16, 0, "bf16", "unaligned"),
    (1, 131072, 16, 2, 120, 16, 0, "bf16", ""),
    (1, 131072, 16, 2, 40, 16, 0, "bf16", ""),
    (1, 32768, 16, 2, 128, 16, 0, "bf16", "packed in 64"),
    (1, 32768, 16, 2, 128, 16, 0, "bf16", "packed in 1000"),
    (1, 262144, 16, 2, 128, 16, 0, "bf16", "packed in 64"),
    (1, 262144, 16, 2, 128, 16, 0, "bf16", "packed in 1000"),
    (1, 262144, 16, 2, 128, 16, 0, "bf16", "packed in 4000"),
    (16, 16384, 8, 2, 256, 16, 0, "bf16", ""),
    (4, 16384, 16, 2, 128, 1, 0, "bf16", ""),
    (1, 16, 16, 2, 128, 16, 131072, "bf16", "continued"),
    (1, 256, 16, 2, 128, 16, 131072, "bf16", "continued"),
    (8, 1, 16, 2, 128, 16, 16384, "bf16", "continued"),
    (4, 2048, 16, 2, 64, 16, 32768, "bf16", "continued"),
]


def name(shape: tuple) -> str:
    batch, tokens, heads, groups, dim, size, seen, dtype, special = shape
    after = f" after {seen}" if seen else ""
    return f"T={tokens}{after} B={batch} H={heads} G={groups} D={dim} L={size} {dtype}{' ' + special if special else ''}"


PHASES = ("forward", "forward + backward")


def calls(shape: tuple) -> tuple:
    """Forward and forward + backward of a shape, as functions without arguments."""
    batch, tokens, heads, groups, dim, size, seen, dtype, special = shape
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    shift = {"unaligned": 1, "aligned to 8 bytes": 4}.get(special, 0)

    def rows(n: int) -> torch.Tensor:
        return torch.randn(batch, tokens, n * dim + shift, device="cuda", dtype=dtype)[..., shift:].unflatten(-1, (n, dim))

    q, k, v, gate, out_gate = (rows(n) for n in (groups, groups, heads, heads, heads))
    cos, sin = rat_ext.rotary_tables((seen + tokens) // size + 1, dim, device="cuda")
    options = {"out_gate": out_gate, "rotary_cos": cos, "rotary_sin": sin}
    if special.startswith("packed"):
        cuts = torch.linspace(0, tokens, int(special.split()[-1]) + 1).round().to(torch.int32)
        options["cu_seqlens"] = cuts.cuda()
    if seen:
        state = RATCache.empty(batch, heads, dim, size, seen, dtype=dtype, device="cuda")
        state.chunk_k.normal_(), state.chunk_v.normal_()
        state.lengths.fill_(seen)
        state.length_bound = seen
        options["initial_state"] = state
    leaves = [x.requires_grad_() for x in (q, k, v, gate, out_gate)]
    dy = torch.randn_like(v)

    def forward() -> torch.Tensor:
        return rat_ext.rat_attention(q, k, v, gate, size, **options)

    def training() -> None:
        torch.autograd.grad(forward(), leaves, dy)

    return torch.no_grad()(forward), training


def replay_ms(function, clock: Clock) -> float:
    stream = torch.cuda.Stream()  # the first call, and what it loads, may not be captured
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return clock.median(graph.replay, 60, 30)


def measure(pattern: str, quick: bool) -> dict[str, list[float]]:
    clock, found = Clock(torch.device("cuda"), quick), {}
    for shape in SHAPES:
        if re.search(pattern, name(shape)):
            found[name(shape)] = [replay_ms(function, clock) for function in calls(shape)]
            free()
    return found


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # prints this process's times, as JSON
    options = p.parse_args()
    if options.device != "cuda":
        print("only a GPU has several kernel families")
        return 0
    if options.child:
        print(json.dumps(measure(options.rows, options.quick)))
        return 0
    found = {}
    for family in FAMILIES:
        words = [*sys.argv, "--child"]
        found[family] = json.loads(
            in_family(family, words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    result = record("families", torch.device("cuda"), kernels=",".join(FAMILIES), ms=found)
    for i, phase in enumerate(PHASES):
        shown = []
        for row, chosen in found["auto"].items():
            mine, portable = chosen[i], found["sm80"][row][i]
            gain = [f"{portable / mine:.2f}x", "SLOWER" if mine > 1.03 * portable else ""]
            shown.append([row, f"{portable:.4f}", f"{mine:.4f}", *gain])
        table([f"{phase}, ms", "sm80", "auto", "gain", ""], shown)
        print()
    save(result, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
