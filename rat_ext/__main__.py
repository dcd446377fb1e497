"""``python -m rat_ext``: what is built, whether it agrees with the definition, a model that learns, timings."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

PARTS = ("info", "check", "train", "time")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rat_ext",
        description="Shows what is built (info), compares the ops with their definition in float64 (check), trains a "
        "small language model on the sources of Python's standard library and samples from it (train), and times the "
        "ops against scaled_dot_product_attention (time). All four together take under two minutes on two CPU cores. "
        "Exit code 1 if anything disagrees.",
    )
    parser.add_argument("parts", nargs="*", metavar="part", help="info, check, train, time (default: all, in this order)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one and kernels for it")
    parser.add_argument(
        "--out", default="rat_ext_timing.png", metavar="FILE", help="plot of the timings (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="results for machines; '-' is stdout, and the text goes to stderr")
    parser.add_argument("--train-seconds", type=float, default=40.0, metavar="S", help="time to train (default: %(default)s)")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    if not options.train_seconds > 0:
        parser.error(f"argument --train-seconds: expected more than 0, got {options.train_seconds}")
    if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
        parser.error(f"argument --json: no folder {Path(options.json).absolute().parent} to write {options.json} to")
    options.parts = [part for part in PARTS if part in (options.parts or PARTS)]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.perf_counter()

    import torch  # after parsing: --help and wrong arguments answer at once

    import rat_ext

    from . import _check, _time, _train
    from ._console import Console

    console = Console(sys.stderr if options.json == "-" else sys.stdout)
    built = rat_ext.build_info(kernels=False)
    if options.device is None:
        options.device = "cuda" if built["cuda"] and torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not (built["cuda"] and torch.cuda.is_available()):
        why = "torch finds no GPU" if built["cuda"] else f"rat_ext is built {built['build']}"
        print(f"python -m rat_ext: --device cuda: {why}", file=sys.stderr)
        return 2
    device = torch.device(options.device, torch.cuda.current_device() if options.device == "cuda" else None)

    results: dict = {"device": _describe(torch, device), "torch": torch.__version__}
    for part in options.parts:
        start = time.perf_counter()
        if part == "info":
            info = rat_ext.build_info(kernels=device.type == "cuda")
            console.title("info: what is built, and on what it runs")
            console.print(info)
            console.print(f"{'runs on':<9} {results['device']}")
            results["info"] = dict(info)
        elif part == "check":
            results["check"] = _check.run(console, device)
        elif part == "train":
            results["train"] = _train.run(console, device, options.train_seconds)
        else:
            results["time"] = _time.run(console, device, options.out)
        results[part]["seconds"] = round(time.perf_counter() - start, 2)

    results["ok"] = all(results[part].get("ok", True) for part in options.parts)
    results["seconds"] = round(time.perf_counter() - begin, 2)
    took = ", ".join(f"{part} {results[part]['seconds']:.0f}" for part in options.parts)
    console.print(f"\n{'All agrees' if results['ok'] else 'SOMETHING DISAGREES'}. {results['seconds']:.0f} s ({took}).")
    if options.json == "-":
        print(json.dumps(results, indent=1))
    elif options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    return 0 if results["ok"] else 1


def _describe(torch, device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = "CPU"
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
