"""chunk_recurrence alone: memory-bound, so its share of the measured copy bandwidth is the figure. L up to T.

Needed bytes: the forward reads x (G = 2 heads) and gate and writes y; the backward reads x, gate and dy and writes dx,
dgate.
"""

from __future__ import annotations

import re
import sys

import torch
from common import Clock, Deadline, ceilings, free, number, parser, record, save, table

import rat_ext
from rat_ext import reference


def rows(device: torch.device, quick: bool) -> list[tuple[int, int, int, int, int, int]]:
    """(batch, tokens, H, G, D, L)."""
    if device.type == "cpu":
        return [(1, 1024 if quick else 16384, 8, 2, 64, size) for size in (16, 1 << 20)]
    if quick:
        return [(4, 4096, 16, 2, 128, 16)]
    return [(64, 4096, 16, 2, 128, size) for size in (16, 64, 512, 4096)] + [(2, 131072, 16, 2, 128, 131072)]


def main() -> int:
    options = parser(__doc__).parse_args()
    device = torch.device(options.device)
    deadline, clock = Deadline(options.time_limit), Clock(device, options.quick)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limits = ceilings(device, dtype, options.quick)
    result = record("recurrence", device, ceilings=limits, rows=[])
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}, copy {limits['copy_gb_s']:.0f} GB/s\n")
    shown, wrong = [], False
    for batch, tokens, heads, groups, dim, chunk_size in rows(device, options.quick):
        name = f"T={tokens} B={batch} H={heads} G={groups} D={dim} L={chunk_size}"
        if not re.search(options.rows, name) or deadline.over():
            continue
        free()
        x = torch.randn(batch, tokens, groups, dim, device=device, dtype=dtype)
        gate = torch.randn(batch, tokens, heads, dim, device=device, dtype=dtype)
        dy = torch.randn_like(gate)
        part = [t[:1, :600] for t in (x, gate, dy)]
        far = [
            _errors(f, part, chunk_size, to)
            for f, to in ((rat_ext.chunk_recurrence, dtype), (reference.chunk_recurrence, dtype))
        ]
        if bad := [key for key in far[0] if not far[0][key] <= 2 * far[1][key] + 8 * torch.finfo(dtype).eps]:
            print(f"{name}: WRONG in {', '.join(bad)}: not timed")
            wrong = True
            continue
        with torch.no_grad():
            forward = clock.median(lambda x=x, g=gate, n=chunk_size: rat_ext.chunk_recurrence(x, g, n), 400)
        leaves = (x.requires_grad_(), gate.requires_grad_())
        whole = clock.median(
            lambda v=leaves, n=chunk_size, dy=dy: torch.autograd.grad(rat_ext.chunk_recurrence(*v, n), v, dy), 400
        )
        token = dim * dtype.itemsize * batch * tokens
        sizes = ((groups + 2 * heads) * token, (3 * groups + 5 * heads) * token)
        share = [size / ms / 1e6 / limits["copy_gb_s"] for size, ms in zip(sizes, (forward, whole), strict=True)]
        result["rows"].append({"name": name, "ms": [forward, whole], "bytes": sizes, "share_of_copy": share, "errors": far})
        shown.append([name, number(forward), f"{share[0]:.0%}", number(whole), f"{share[1]:.0%}"])
    table(["", "forward ms", "of copy", "fwd+bwd ms", "of copy"], shown)
    save(result, options)
    return 1 if wrong else 0


def _errors(function, tensors, chunk_size: int, dtype: torch.dtype) -> dict[str, float]:
    def run(op, to):
        x, gate, dy = (t.detach().to(to) for t in tensors)
        leaves = (x.requires_grad_(), gate.requires_grad_())
        y = op(*leaves, chunk_size)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    exact, got = run(reference.chunk_recurrence, torch.float64), run(function, dtype)
    names = ("y", "dx", "dgate")
    return {n: float((g.double() - e).abs().max() / e.abs().max()) for n, g, e in zip(names, got, exact, strict=True)}


if __name__ == "__main__":
    sys.exit(main())
