"""``python -m rat_ext``: what is built, whether it agrees with the definition, a model that learns, timings."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
import time

PARTS = ("info", "check", "train", "time")
PLOTS = (".png", ".pdf", ".svg")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rat_ext",
        description="Shows what is built (info), compares the ops with their definition in float64 (check), trains a "
        "small language model on the sources of Python's standard library and samples from it (train), and times the "
        "ops against scaled_dot_product_attention (time). All four together take under two minutes on two CPU cores. "
        "'doctor', alone, prints what a bug report needs. Exit code 1 if anything disagrees.",
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="info, check, train, time (default: these); or doctor")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one and kernels for it")
    parser.add_argument(
        "--out", default="rat_ext_timing.png", metavar="FILE", help="plot of the timings (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="results for machines; '-' is stdout, and the text goes to stderr")
    parser.add_argument("--train-seconds", type=float, default=40.0, metavar="S", help="time to train (default: %(default)s)")
    options = parser.parse_args(arguments)
    if "doctor" in options.parts and options.parts != ["doctor"]:
        parser.error("doctor stands alone: expected no other part beside it")
    if unknown := [part for part in options.parts if part not in (*PARTS, "doctor")]:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}, doctor")
    if not 0 < options.train_seconds < float("inf"):
        parser.error(f"argument --train-seconds: expected more than 0, got {options.train_seconds}")
    if options.parts != ["doctor"]:
        options.parts = [part for part in PARTS if part in (options.parts or PARTS)]
    if options.json not in (None, "-") and (why := _unwritable(options.json)):
        parser.error(f"argument --json: {why}")
    if "time" in options.parts:
        if not options.out.lower().endswith(PLOTS):
            parser.error(f"argument --out: expected a name that ends in {', '.join(PLOTS)}, got {options.out!r}")
        if why := _unwritable(options.out):
            parser.error(f"argument --out: {why}")
    return options


def _unwritable(path: str) -> str | None:
    """Why a file cannot be written, found by opening it; leaves what is there as it is."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return f"no folder {folder} to write {path} to"
    try:
        new = not os.path.lexists(path)
        with open(path, "a"):
            pass
        if new:
            os.remove(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot write {path!r}: {getattr(error, 'strerror', None) or error}"
    return None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    stream = sys.stderr if options.json == "-" else sys.stdout
    if options.parts == ["doctor"]:
        from .demo import doctor

        return _finish(options, doctor.run(stream))
    try:
        # After parsing: --help and wrong arguments answer at once.
        from ._build_info import build_info
    except Exception as error:
        return _refuse(" ".join(str(error).split()))
    import torch

    from .demo import check, train
    from .demo import time as timing
    from .demo.console import Console
    from .demo.doctor import processor

    begin = time.perf_counter()
    console = Console(stream)
    built = build_info(kernels=False)
    usable = bool(built["cuda"]) and torch.cuda.is_available()
    if options.device == "cuda" and not usable:
        why = "torch finds no GPU" if built["cuda"] else f"rat_ext is built {built['build']}"
        return _refuse(f"--device cuda: {why}")
    kind = options.device or ("cuda" if usable else "cpu")
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    runs_on = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    results: dict = {"device": runs_on, "torch": torch.__version__}
    for part in options.parts:
        start = time.perf_counter()
        if part == "info":
            info = build_info(kernels=device.type == "cuda")
            console.title("info: what is built, and on what it runs")
            console.print(info)
            console.print(f"{'runs on':<9} {runs_on}")
            results["info"] = dict(info)
        elif part == "check":
            results["check"] = check.run(console, device)
        elif part == "train":
            results["train"] = train.run(console, device, options.train_seconds)
        else:
            results["time"] = timing.run(console, device, options.out)
        results[part]["seconds"] = round(time.perf_counter() - start, 2)

    results["ok"] = all(results[part].get("ok", True) for part in options.parts)
    results["seconds"] = round(time.perf_counter() - begin, 2)
    took = ", ".join(f"{part} {results[part]['seconds']:.0f}" for part in options.parts)
    console.print(f"\n{'All agrees' if results['ok'] else 'SOMETHING DISAGREES'}. {results['seconds']:.0f} s ({took}).")
    return _finish(options, results)


def _finish(options: argparse.Namespace, results: dict) -> int:
    """Writes the results for machines; the exit code."""
    text = json.dumps(results, indent=1)
    if options.json == "-":
        print(text)
    elif options.json:
        try:
            with open(options.json, "w") as file:
                file.write(text)
        except OSError as error:
            return _refuse(f"argument --json: cannot write {options.json!r}: {error.strerror}")
    return 0 if results["ok"] else 1


def _refuse(why: str) -> int:
    print(f"python -m rat_ext: {why}", file=sys.stderr)
    return 2


OUTPUT_FAILS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def command() -> int:
    """:func:`main`; where what it prints cannot be written, a full disk or a closed pipe, one line instead of a traceback."""
    if sys.stdout is None or sys.stderr is None:  # closed before Python began
        return _refuse("stdout and stderr: expected both open, got one closed")
    try:
        try:
            code = main()
        except SystemExit as stop:  # argparse has printed
            code = int(stop.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
        return code
    except OSError as error:
        if error.errno not in OUTPUT_FAILS:
            raise
        why = os.strerror(error.errno)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # what is left would be flushed at Python's end, and fail again
            os.dup2(nothing, stream.fileno())
    with contextlib.suppress(OSError):
        _refuse(f"cannot write what it prints: {why}")
    return 2


if __name__ == "__main__":
    sys.exit(command())
