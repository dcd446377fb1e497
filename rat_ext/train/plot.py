"""The loss of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from ._extra import Refused, need, write_whole


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_loss(folder: Path) -> str | None:
    """Writes ``loss.png`` from ``log.jsonl`` of a run. None, or why there is no plot."""
    lines = read_log(folder / "log.jsonl")
    try:
        need("matplotlib", "train", "the plot of the loss")
    except Refused as error:
        return str(error)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    unit = "tokens" if any("tokens" in line for line in lines) else "step"
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(line[unit], line[key]) for line in lines if key in line and unit in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else None)
    axes.set(xlabel=unit, ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    write_whole(folder / "loss.png", lambda path: figure.savefig(path, dpi=120))
    return None
