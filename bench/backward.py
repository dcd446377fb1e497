"""The phases of the backward, each against its own ceiling, and the memory of a training step. GPU only.

By torch.profiler, a call of forward + backward: the chunk attention backward alone (all its kernels) in TFLOP/s, prepare and
the reverse scan as shares of the copy bandwidth that was just measured, and all kernels together. Then the peak of
allocated memory over a call, beyond inputs, y, dy and gradients.

TFLOP/s counts the five needed products, each 2 T (C / 2) D a head. Bytes are those that the phases need:
  prepare       reads dy, y, out_gate; writes do, dout_gate, Delta (float32, one a head and token)
  reverse scan  reads q, k, v, gate, do and attention's part of dq (float32); writes dq, dk, dv, dgate
Gradients of the chunk states (1/L of a token's row, twice, in float32) and the other scalars are not counted. Small rows find
some of their bytes in the L2 cache.

A row is refused when gradients are further from float64 than twice the eager definition (at the size of op.check_row), or break
a law at its own size: y is linear in v, so <dv, v> = <dy, y>; scores are bilinear in q and k, so <dq, q> = <dk, k>.

Sums are taken in a fixed order, the default; "any order" is the attention part with deterministic=False.
"""

from __future__ import annotations

import re
import sys

import torch
from common import Deadline, add_kernels, ceilings, each_family, free, kernels, number, parser, record, save, table
from op import Row, check_row, checked
from phases import Training, profile
from table import BACKWARD, backward_cells

PHASES = {
    "attention": r"chunk_attention_\w*bwd",
    "prepare": r"chunk_prepare_\w*bwd",
    "scan": r"(chunk_scan_|chunk_segment_)\w*bwd",
}
LAW_ROUNDINGS = 4  # of the dtype, of each term, as if they were independent

LONG = "T=131072 B=2 .*D=128"
FULL = "T=(4096 B=64|16384 B=16|131072 B=2) .*D=128"
# figure: what is listed, unit, must, aim, and the rows they are for. Of tera-operations more is better, as of shares.
TARGETS = {
    "attention_tflop_s": ("TFLOP/s", 420, 520, LONG),
    "prepare_of_copy": ("of copy", 0.75, 0.88, FULL),
    "scan_of_copy": ("of copy", 0.75, 0.88, FULL),
    "peak_gb": ("GB", 1.5, 0.8, LONG),
}


def rows(quick: bool) -> list[Row]:
    shapes = (
        [(4, 4096, 128)] if quick else [(64, 4096, 128), (16, 16384, 128), (2, 131072, 128), (1, 4096, 128), (2, 131072, 64)]
    )
    return [Row(batch, tokens, 16, 2, dim, 16, torch.bfloat16) for batch, tokens, dim in shapes]


def needed_bytes(row: Row) -> dict[str, int]:
    tokens = row.batch * row.tokens
    wide, narrow = (heads * row.dim * row.dtype.itemsize * tokens for heads in (row.heads, row.groups))
    return {
        "prepare": 5 * wide + 4 * row.heads * tokens,
        "scan": 5 * wide + 4 * narrow + 4 * row.groups * row.dim * tokens,
    }


def broken_laws(train: Training) -> dict[str, float]:
    """How far each law is from holding, in roundings of the dtype; of every head or group, the furthest."""
    q, k, v, _, _ = train.leaves
    y, dq, dk, dv, _, _ = train()
    eps = torch.finfo(v.dtype).eps

    def far(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> float:
        """<a, b> - <c, d> over tokens and elements, relative to the root of the sum of the squares of all terms."""
        found = []
        for row in range(a.shape[0]):
            for head in range(a.shape[2]):
                left, right = (m[row, :, head].double() * n[row, :, head].double() for m, n in ((a, b), (c, d)))
                size = (left.square().sum() + right.square().sum()).sqrt()
                found.append((left.sum() - right.sum()).abs() / size / eps)
        return float(torch.stack(found).max())  # NaN if one is

    with torch.no_grad():
        return {"<dv, v> = <dy, y>": far(dv, v, train.dy, y), "<dq, q> = <dk, k>": far(dq, q, dk, k)}


def peak_gb(train: Training, device: torch.device) -> float:
    """Beyond what is there before the call, and y and the gradients."""
    train()
    free()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = train()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in results)) / 1e9


def verdicts(row: Row, figures: dict[str, float]) -> dict[str, list]:
    """[must, aim, word] of each figure that has a target in this row."""
    found = {}
    for key, (_, must, aim, where) in TARGETS.items():
        if re.search(where, str(row)):
            sign = 1 if aim > must else -1
            value = sign * figures[key]
            found[key] = [must, aim, "aim" if value >= sign * aim else "must" if value >= sign * must else "MISSED"]
    return found


def measure(row: Row, device: torch.device, limits: dict, calls: int) -> dict:
    train = Training(row, device)
    laws = broken_laws(train)
    if wrong := [law for law, roundings in laws.items() if not roundings <= LAW_ROUNDINGS]:
        return {"laws": laws, "wrong": wrong}
    listed = profile(train, device, calls)
    ms = {phase: sum(t for name, t in listed.items() if re.match(regex, name)) for phase, regex in PHASES.items()}
    ms["all kernels"] = sum(listed.values())
    if missing := [phase for phase, t in ms.items() if not t]:
        sys.exit(f"bench/backward.py: no kernel of {', '.join(missing)} among {', '.join(listed)}")
    figures = {"attention_tflop_s": (row.flops(True) - row.flops(False)) / ms["attention"] / 1e9}
    for phase, size in needed_bytes(row).items():
        figures[f"{phase}_of_copy"] = size / ms[phase] / 1e6 / limits["copy_gb_s"]
    figures["peak_gb"] = peak_gb(train, device)
    del train
    free()
    listed_any = profile(Training(row, device, deterministic=False), device, calls)
    ms["attention, any order"] = sum(t for name, t in listed_any.items() if re.match(PHASES["attention"], name))
    free()
    small = set(profile(Training(check_row(row, device), device), device, 1))
    unchecked = [name for name in listed if re.match(PHASES["attention"], name) and name not in small]
    return {"laws": laws, "ms": ms, "kernel_ms": listed, **figures, "targets": verdicts(row, figures), "unchecked": unchecked}


def main() -> int:
    p = parser(__doc__)
    add_kernels(p)
    options = p.parse_args()
    if options.device != "cuda":
        print("only a GPU has these kernels; bench/phases.py shows where a CPU spends its time")
        return 0
    deadline = Deadline(options.time_limit)
    if (code := each_family(p, options, deadline)) is not None:
        return code
    device = torch.device("cuda")
    limits = ceilings(device, torch.bfloat16, options.quick)
    result = record("backward", device, ceilings=limits, rows=[])
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}, kernels {kernels()}")
    print(
        f"measured ceilings: copy {limits['copy_gb_s']:.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s\n", flush=True
    )
    checks: dict = {}
    wrong, shown = False, []
    for row in rows(options.quick):
        if not re.search(options.rows, str(row)) or deadline.over():
            continue
        free()
        entry = checked(row, device, checks)
        result["rows"].append(entry)
        if not entry["check"]["wrong"]:
            entry |= measure(row, device, limits, 2 if options.quick else 10)
            if "ms" in entry:
                gain = 1 - entry["ms"]["attention, any order"] / entry["ms"]["attention"]
                print(f"  deterministic=False: {entry['ms']['attention, any order']:.3g} ms of attention, {gain:.1%} less")
            print("  at its own size, in roundings:", ", ".join(f"{law} {far:.2g}" for law, far in entry["laws"].items()))
        if "ms" not in entry:
            wrong = True
            print(f"  WRONG: not timed {entry.get('wrong', '')}\n")
            continue
        if entry["unchecked"]:
            print("  against float64 others ran than", ", ".join(entry["unchecked"]))
        shown.append([entry["name"], *backward_cells(entry, number)])
    print()
    table(["backward", *BACKWARD], shown)
    for key, (unit, must, aim, where) in TARGETS.items():
        print(f"  {key}: must {must}, aim {aim} {unit}, in rows {where}")
    print(f"{deadline.seconds():.0f} s")
    save(result, options)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
