"""Draws the figures of README.md and docs/decode.md from the JSON files in bench/results: time against sequence length.

One image for light and one for dark pages. docs/images/speed-*.png: every point has 262,144 tokens in all, so a line that
rises shows what length costs. docs/images/decode-*.png: a decode step over batch and length. The device of the newest
result is named in the figure. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from table import merged

HERE = Path(__file__).resolve().parent
TOKENS = 262144
BATCHES = (1, 8, 64, 512)
INK = {"light": "#1f2328", "dark": "#e6edf3"}
GRID = {"light": "#d0d7de", "dark": "#30363d"}
COLOURS = {
    "rat_ext": {"light": "#0969da", "dark": "#58a6ff"},
    "compiled": {"light": "#1a7f37", "dark": "#3fb950"},
    "sdpa cudnn": {"light": "#bc4c00", "dark": "#f0883e"},
    "sdpa flash": {"light": "#8c959f", "dark": "#8b949e"},
    "sdpa": {"light": "#bc4c00", "dark": "#f0883e"},
    "FlashAttention-3": {"light": "#8250df", "dark": "#bc8cff"},
    "floor": {"light": "#8c959f", "dark": "#8b949e"},
}
LABELS = {
    "rat_ext": "rat_ext",
    "compiled": "RAT, torch.compile",
    "sdpa cudnn": "dense attention, cuDNN",
    "sdpa flash": "dense attention, FlashAttention-2",
    "sdpa": "dense attention",
}
STEP_LABELS = {
    "rat_ext": "rat_ext",
    "floor": "the time to read the chunk states once",
    "sdpa": "dense attention, PyTorch",
    "FlashAttention-3": "dense attention, FlashAttention-3",
}


def points(result: dict, phase: int | None) -> dict[str, list[tuple[int, float]]]:
    """(T, ms) by name, of the rows that have TOKENS tokens in all, D = 128 and L = 16."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        match = re.match(r"T=(\d+) B=(\d+) H=16 G=2 D=128 L=16( bfloat16)?$", row["name"])
        if not match or int(match[1]) * int(match[2]) != TOKENS or "ms" not in row:
            continue
        for name, ms in ((name, ms) for name, ms in row["ms"].items() if name in LABELS):
            found.setdefault(name, []).append((int(match[1]), ms if phase is None else ms[phase]))
    return {name: sorted(line) for name, line in found.items()}


def steps(result: dict) -> dict[int, dict[str, list[tuple[int, float]]]]:
    """By batch what :func:`points` has, in microseconds: decode steps of D = 128 and L = 16, and their floor."""
    found: dict[int, dict[str, list[tuple[int, float]]]] = {}
    for row in result["rows"]:
        match = re.match(r"T=(\d+) B=(\d+) H=16 G=2 D=128 L=16$", row["name"])
        if not match or int(match[2]) not in BATCHES or "ms" not in row:
            continue
        times = {name: row["ms"].get(name) for name in STEP_LABELS} | {"floor": row["floor_ms"]}
        for name, ms in times.items():
            if ms is not None:
                found.setdefault(int(match[2]), {}).setdefault(name, []).append((int(match[1]), ms * 1e3))
    return {batch: {name: sorted(line) for name, line in found[batch].items()} for batch in sorted(found)}


def draw(axis, lines: dict[str, list[tuple[int, float]]], title: str, unit: str, theme: str, labels: dict = LABELS) -> None:
    for name, line in lines.items():
        mine = name == "rat_ext"
        x, y = zip(*line, strict=True)
        style = {"linewidth": 2.6 if mine else 1.6, "marker": "o", "markersize": 5 if mine else 3.5, "zorder": 3 if mine else 2}
        if name == "floor":
            style |= {"linestyle": "--", "marker": "", "zorder": 4}
        axis.plot(x, y, color=COLOURS[name][theme], label=labels[name], **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({x for line in lines.values() for x, _ in line})
    axis.set_xticks(ticks, [f"{t // 1024}K" for t in ticks])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_title(title, color=INK[theme], fontsize=11, loc="left")
    axis.set_xlabel("sequence length T", color=INK[theme], fontsize=9)
    axis.set_ylabel(unit, color=INK[theme], fontsize=9)
    axis.grid(True, which="major", color=GRID[theme], linewidth=0.7)
    axis.tick_params(colors=INK[theme], labelsize=8.5, length=0, which="both")
    for spine in axis.spines.values():
        spine.set_visible(False)


def legend(fig, axis, theme: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    made = fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9.5)
    for text in made.get_texts():
        text.set_color(INK[theme])


def figure(op: dict, decode: dict, theme: str):
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.9), dpi=160, layout="constrained")
    names = [op["device"], decode["device"]]
    forward, backward, step = "Forward", "Forward + backward", "One decode step, all sequences"
    if names[0] == names[1]:
        fig.suptitle(names[0], color=INK[theme], fontsize=10, x=0.01, ha="left")
    else:  # the newest results of the two benches are of different devices
        forward, backward, step = (f"{title}, {names[i]}" for title, i in ((forward, 0), (backward, 0), (step, 1)))
    draw(axes[0], points(op, 0), forward, "milliseconds", theme)
    draw(axes[1], points(op, 1), backward, "milliseconds", theme)
    found = points(decode, None)
    lines = {name: [(t, ms * 1e3) for t, ms in line] for name, line in found.items() if len(line) > 1}
    draw(axes[2], lines, step, "microseconds", theme)
    legend(fig, axes[0], theme)
    return fig


def decode_figure(decode: dict, theme: str):
    by_batch = steps(decode)
    fig, axes = plt.subplots(1, len(by_batch), figsize=(12, 3.9), dpi=160, layout="constrained", squeeze=False, sharey=True)
    fig.suptitle(decode["device"], color=INK[theme], fontsize=10, x=0.01, ha="left")
    for axis, (batch, lines) in zip(axes[0], by_batch.items(), strict=True):
        unit = "microseconds" if axis is axes[0][0] else ""
        draw(axis, lines, f"{batch} sequence{'s' if batch > 1 else ''}", unit, theme, STEP_LABELS)
    axes[0][0].yaxis.set_major_locator(matplotlib.ticker.LogLocator())  # one scale for all: over many decades
    legend(fig, max(axes[0], key=lambda axis: len(axis.lines)), theme)
    return fig


def newest(bench: str, results: Path) -> dict | None:
    """The newest result of a bench on a GPU."""
    found = [result for result in merged(bench, results) if result["device_type"] == "cuda"]
    return max(found, key=lambda result: result["date"], default=None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    options = p.parse_args()
    op, decode = (newest(bench, options.results) for bench in ("op", "decode"))
    options.out.mkdir(parents=True, exist_ok=True)
    for theme in INK:
        figures = {}
        if op and decode:
            figures["speed"] = figure(op, decode, theme)
        if decode:
            figures["decode"] = decode_figure(decode, theme)
        for name, fig in figures.items():
            fig.savefig(options.out / f"{name}-{theme}.png", transparent=True)
            plt.close(fig)


if __name__ == "__main__":
    main()
