"""What the benches share: arguments, clocks, the ceilings of the device, the record of a run."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rat_ext

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


# ---- arguments -------------------------------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="few rows, few repeats: to see that it runs; writes no result")
    p.add_argument("--rows", default="", metavar="REGEX", help="only rows whose name matches, e.g. 'T=4096 .*D=128'")
    p.add_argument("--no-peers", action="store_true", help="time rat_ext alone")
    p.add_argument("--time-limit", type=float, default=170.0, metavar="S", help="begin no row after S seconds (default: 170)")
    p.add_argument("--out", type=Path, help="JSON file (default: bench/results/<bench>-<device>-<date>.json)")
    return p


class Deadline:
    def __init__(self, limit: float):
        self.begin, self.limit = time.perf_counter(), limit

    def over(self) -> bool:
        return time.perf_counter() - self.begin > self.limit

    def seconds(self) -> float:
        return time.perf_counter() - self.begin


# ---- kernel families -------------------------------------------------------------------------------------------------

FAMILIES = {"auto": "", "sm80": " portable kernels"}  # what the name of a row ends in


def kernels() -> str:
    """The kernel family of this process: rat_ext reads the variable once."""
    return os.environ.get("RAT_EXT_KERNELS") or "auto"


def in_family(family: str, words: list[str], **options: object) -> subprocess.CompletedProcess:
    """Runs a Python program whose CUDA kernels are those of ``family``."""
    return subprocess.run([sys.executable, *words], env=os.environ | {"RAT_EXT_KERNELS": family}, **options)


def add_kernels(p: argparse.ArgumentParser) -> None:
    families = "auto (what is chosen), sm80 (the portable ones)"
    p.add_argument("--kernels", default=kernels(), metavar="A,B", help=f"kernel families to time, on a GPU: {families}")


def each_family(p: argparse.ArgumentParser, options: argparse.Namespace, deadline: Deadline) -> int | None:
    """Runs the bench in a process for each family of --kernels and writes one result with all their rows.

    None where this process is all that was asked for. Peers do not depend on the family: "auto" alone has them.
    """
    asked = options.kernels.split(",")
    if unknown := [family for family in asked if family not in FAMILIES]:
        p.error(f"--kernels: {', '.join(unknown)!r}; known: {', '.join(FAMILIES)}")
    if asked == [kernels()]:
        return None
    if options.device != "cuda":
        p.error("--kernels: only a GPU has several kernel families")
    result, code = None, 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        for family in asked:
            left = options.time_limit - deadline.seconds()
            words = [*sys.argv, "--kernels", family, "--out", str(out), "--time-limit", str(left)]
            code |= in_family(family, words + ([] if family == "auto" else ["--no-peers"])).returncode
            if not out.exists():
                return code or 1
            found = json.loads(out.read_text())
            out.unlink()
            result = {**result, "rows": result["rows"] + found["rows"]} if result else found
    save(result | {"kernels": options.kernels}, options)
    return code


# ---- clocks ----------------------------------------------------------------------------------------------------------


class Clock:
    """Median milliseconds of a call. On a GPU: CUDA events around each call, other memory read through L2 before each.

    Reading leaves clean lines behind. Those of a fill would be dirty, and written back inside the timing.
    """

    def __init__(self, device: torch.device, quick: bool = False):
        self.device, self.quick = device, quick
        self.cuda = device.type == "cuda"
        if self.cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.ones(max(size, 64 << 20) // 4, dtype=torch.int32, device=device)

    def once(self, function: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.sum()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def median(self, function: Callable[[], object], budget_ms: float = 1000.0, most: int = 50, least: int = 3) -> float:
        """One call to warm up, then as many as ``budget_ms`` allows, between ``least`` and ``most``."""
        if self.quick:
            budget_ms, most, least = budget_ms / 10, 5, 1
        function()
        first = self.once(function)
        count = int(min(most, max(least, budget_ms / max(first, 1e-3))))
        return statistics.median([first, *(self.once(function) for _ in range(count - 1))])


def host_microseconds(function: Callable[[], object], device: torch.device, calls: int = 200, rounds: int = 7) -> float:
    """Median over rounds of the host's time for one call, the device idle at the start of each round."""
    for _ in range(20):
        function()
    found = []
    for _ in range(rounds):
        sync(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        found.append((time.perf_counter() - start) / calls * 1e6)
        sync(device)
    return statistics.median(found)


def device_kernels(function: Callable[[], object], device: torch.device) -> dict | None:
    """Milliseconds and calls by kernel of one call of ``function``, the longest first; prints them. None on a CPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
        sync(device)
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    events = [event for event in events if event.self_device_time_total > 0]
    listed = {event.key[:120]: [round(event.self_device_time_total / 1e3, 4), event.count] for event in events[:25]}
    total = sum(event.self_device_time_total for event in events) / 1e3
    print(f"  {total:.3f} ms in {sum(event.count for event in events)} kernels")
    for name, (ms, count) in listed.items():
        print(f"  {ms:9.4f} ms {count:5d}  {name}")
    return {"total_ms": total, "listed": listed}


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False) -> dict:
    """Measured here and now: copy bandwidth (bytes read + written) in GB/s, square matrix product in TFLOP/s."""
    clock = Clock(device, quick)
    cuda = device.type == "cuda"
    source = torch.empty((2 << 30 if cuda else 256 << 20) // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = clock.median(lambda: target.copy_(source), 300, 30)
    bandwidth = 2 * source.numel() * 4 / copy / 1e6
    source = target = None
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = clock.median(lambda: a @ b, 300, 30)
    free()
    return {"copy_gb_s": bandwidth, "matmul_tflop_s": 2 * n**3 / product / 1e9, "matmul_size": n}


# ---- record ----------------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit, with '+' where files differ from it; outside a repository RAT_EXT_COMMIT, or 'unknown'."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RAT_EXT_COMMIT", "unknown")


def record(bench: str, device: torch.device, **more: object) -> dict:
    info = rat_ext.build_info(kernels=False)
    return {
        "bench": bench,
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "isa": info["cpu_isa"] if device.type == "cpu" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rat_ext": info["version"],
        "build": info["build"],
        "kernels": kernels() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **more,
    }


def result_path(result: dict, options: argparse.Namespace) -> Path | None:
    """Where the JSON of a run goes; a quick one only where --out names a file."""
    if options.out is not None or options.quick:
        return options.out
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return RESULTS / f"{result['bench']}-{device}-{result['date'][:10]}.json"


def write(result: dict, path: Path) -> None:
    """Whole or not at all: a run that is ended in the middle leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    beside.replace(path)


def save(result: dict, options: argparse.Namespace, quiet: bool = False) -> None:
    """Writes the JSON of a run; a quick one only where --out names a file."""
    path = result_path(result, options)
    if path is not None:
        write(result, path)
    if not quiet:
        print("--quick: no result written" if path is None else f"written: {path}")


def flash_attention_3() -> tuple[Callable | None, str]:
    """``flash_attn_with_kvcache`` of FlashAttention-3 where the wheel fa3-fwd is installed; else None, and why."""
    try:
        from fa3_fwd_interface import flash_attn_with_kvcache
    except Exception as error:  # not there, or made for another torch
        return None, f"FlashAttention-3 is left out: {type(error).__name__}: {str(error).splitlines()[0]}"
    return flash_attn_with_kvcache, ""


def table(head: list[str], rows: list[list[str]]) -> None:
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits without an exponent; '-' for None."""
    if x is None:
        return "-"
    return f"{x:.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:#.{digits}g}".rstrip(".")
