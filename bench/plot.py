"""Draws the README's figure from the JSON files in bench/results: time against sequence length, peers beside.

One image for light and one for dark pages, docs/images/speed-light.png and speed-dark.png. Every point has 262,144
tokens in all, so a line that rises shows what length costs. Needs matplotlib.
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
INK = {"light": "#1f2328", "dark": "#e6edf3"}
GRID = {"light": "#d0d7de", "dark": "#30363d"}
COLOURS = {
    "rat_ext": {"light": "#0969da", "dark": "#58a6ff"},
    "compiled": {"light": "#1a7f37", "dark": "#3fb950"},
    "sdpa cudnn": {"light": "#bc4c00", "dark": "#f0883e"},
    "sdpa flash": {"light": "#8c959f", "dark": "#8b949e"},
    "sdpa": {"light": "#bc4c00", "dark": "#f0883e"},
}
LABELS = {
    "rat_ext": "rat_ext",
    "compiled": "RAT, torch.compile",
    "sdpa cudnn": "dense attention, cuDNN",
    "sdpa flash": "dense attention, FlashAttention-2",
    "sdpa": "dense attention",
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


def draw(axis, lines: dict[str, list[tuple[int, float]]], title: str, unit: str, theme: str) -> None:
    for name, line in lines.items():
        mine = name == "rat_ext"
        x, y = zip(*line, strict=True)
        style = {"linewidth": 2.6 if mine else 1.6, "marker": "o", "markersize": 5 if mine else 3.5, "zorder": 3 if mine else 2}
        axis.plot(x, y, color=COLOURS[name][theme], label=LABELS[name], **style)
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


def figure(op: dict, decode: dict, theme: str):
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.7), dpi=160, layout="constrained")
    draw(axes[0], points(op, 0), "Forward", "milliseconds", theme)
    draw(axes[1], points(op, 1), "Forward + backward", "milliseconds", theme)
    step = {name: [(t, ms * 1e3) for t, ms in line] for name, line in points(decode, None).items()}
    draw(axes[2], step, "One decode step, all sequences", "microseconds", theme)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9.5)
    for text in legend.get_texts():
        text.set_color(INK[theme])
    return fig


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=HERE / "results")
    p.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images")
    options = p.parse_args()
    op, decode = ([r for r in merged(b, options.results) if r["device_type"] == "cuda"][0] for b in ("op", "decode"))
    options.out.mkdir(parents=True, exist_ok=True)
    for theme in INK:
        fig = figure(op, decode, theme)
        fig.savefig(options.out / f"speed-{theme}.png", transparent=True)
        plt.close(fig)


if __name__ == "__main__":
    main()
