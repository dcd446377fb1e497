"""Where a forward + backward spends its time: the kernels by name, from torch.profiler.

On a GPU each kernel's device time per call and its share; --kernels narrows by a regular expression (kernels are named
<op>_<phase>_<fwd|bwd>_kernel, so 'bwd' selects the backward). On a CPU the ops' times.
"""

from __future__ import annotations

import re

import torch
from common import free, parser, record, save, sync, table
from op import Row, inputs, rat, tables

import rat_ext


def rows(device: torch.device, quick: bool) -> list[Row]:
    if device.type == "cpu":
        return [Row(1, 1024 if quick else 4096, 8, 2, 64, 16, torch.float32)]
    shapes = [(4, 4096)] if quick else [(64, 4096), (2, 131072)]
    return [Row(b, t, 16, 2, 128, 16, torch.bfloat16) for b, t in shapes]


class Training:
    """A call runs forward + backward of a row, on inputs made once, and returns y and the gradients."""

    def __init__(self, row: Row, device: torch.device, **options):
        self.options = options  # of rat_attention
        self.row, self.tables = row, tables(row, device, row.tokens)
        self.leaves = [x.requires_grad_() for x in inputs(row, device, row.batch, row.tokens)]
        self.dy = torch.randn_like(self.leaves[2]).detach()

    def __call__(self) -> tuple[torch.Tensor, ...]:
        y = rat(rat_ext.rat_attention, self.row, self.leaves, self.tables, **self.options)
        return y, *torch.autograd.grad(y, self.leaves, self.dy)


def profile(train: Training, device: torch.device, calls: int) -> dict[str, float]:
    """Milliseconds a call, by kernel."""
    for _ in range(min(3, calls)):
        train()
    sync(device)
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as session:
        for _ in range(calls):
            train()
        sync(device)
    found: dict[str, float] = {}
    for event in session.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            found[short(event.key)] = found.get(short(event.key), 0.0) + us / calls / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def short(name: str) -> str:
    """'void rat::cuda::f_kernel<...>(...)' -> 'f_kernel<...>', so that instantiations stay apart."""
    name = re.sub(r"\(anonymous namespace\)::|^void |rat::cuda::|rat::", "", name)
    return re.sub(r"\(.*", "", name)[:90]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--kernels", default="", metavar="REGEX", help="only kernels whose name matches")
    options = p.parse_args()
    device = torch.device(options.device)
    result = record("phases", device, rows=[])
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}; forward + backward")
    for row in rows(device, options.quick):
        if not re.search(options.rows, str(row)):
            continue
        free()
        found = profile(Training(row, device), device, 2 if options.quick else 10)
        total = sum(found.values())
        result["rows"].append({"name": str(row), "ms": found, "total_ms": total})
        print(f"\n{row}: {total:.3f} ms in kernels")
        shown = {name: ms for name, ms in found.items() if re.search(options.kernels, name) and ms > 1e-3 * total}
        table(["", "ms", "share"], [[name, f"{ms:.3f}", f"{ms / total:.1%}"] for name, ms in shown.items()])
    save(result, options)


if __name__ == "__main__":
    main()
