"""What the parts of ``python -m rat_ext`` share: text out, progress bars, tables."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Sequence

import torch

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Console:
    """Prints to ``stream``; progress bars go to stderr where that is a terminal and tqdm is installed, else nowhere."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stdout

    def print(self, *text: object) -> None:
        line = " ".join(str(part) for part in text)
        if tqdm is None:
            print(line, file=self.stream, flush=True)
        else:
            tqdm.write(line, file=self.stream)
            self.stream.flush()

    def title(self, text: str) -> None:
        self.print(f"\n== {text}")

    @contextlib.contextmanager
    def bar(self, total: float, name: str, unit: str = "it"):
        """Yields ``advance(amount, note="")``."""
        if tqdm is None:
            yield lambda amount=1, note="": None
            return
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"
        with tqdm(total=total, desc=name, unit=unit, disable=None, leave=False, bar_format=form) as bar:

            def advance(amount: float = 1, note: str = "") -> None:
                bar.set_postfix_str(note, refresh=False)
                bar.update(min(amount, total - bar.n))

            yield advance

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Columns padded to their width: the first to the left, the others to the right."""
        rows = [head, *rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        for row in rows:
            cells = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            self.print("  ".join(cells).rstrip())


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device: torch.device, budget: float, most: int = 30) -> float:
    """Median seconds of a call, after one that warms up: at most ``most`` calls, and none that begins after ``budget``
    s.

    A first call that takes all of the budget is the measurement.
    """
    begin = time.perf_counter()
    function()
    wait(device)
    found: list[float] = []
    if time.perf_counter() - begin >= budget:
        return time.perf_counter() - begin
    while not found or (len(found) < most and time.perf_counter() - begin < budget):
        start = time.perf_counter()
        function()
        wait(device)
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]
