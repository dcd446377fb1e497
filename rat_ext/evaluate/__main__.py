"""``python -m rat_ext.evaluate MODEL --tasks ...``: one harness, lm-eval, for its own tasks and for those of this package."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from ..train._extra import Refused, check_vocabulary, need, one_line, run, write_json, write_whole, wrong

TASKS = Path(__file__).parent / "tasks"
# By what the samples of a task are told apart, and the metric.
BY = {
    "rat_needle": (("length", "depth"), "found"),
    "rat_needle_keys": (("length", "depth"), "found"),
    "rat_recall": (("pairs",), "acc"),
    "rat_prompts": (("dataset",), "match"),
}


def ours() -> list[str]:
    """Names of the tasks of this package."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m rat_ext.evaluate",
        description="Evaluates a model through lm-eval. Tasks of this package, which need no download: "
        f"{', '.join(ours())}. Any task of lm-eval works as well.",
    )
    found.add_argument("model", metavar="MODEL", help="a folder with a model and its tokenizer, or a name")
    found.add_argument("--tasks", required=True, help="names, with commas")
    found.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: %(default)s")
    found.add_argument("--device", help="default: cuda where there is a GPU")
    found.add_argument("--dtype", default="auto", help="of the weights (default: as they are stored)")
    found.add_argument("--batch-size", default="8", help="a number, or auto (default: %(default)s)")
    found.add_argument("--limit", type=float, help="documents of each task: a number, or a share below 1")
    found.add_argument("--num-fewshot", type=int)
    found.add_argument("--tokenizer", help="a folder or a name (default: that of MODEL)")
    found.add_argument("--adapter", help="a folder with a PEFT adapter")
    found.add_argument("--max-length", type=int, help="tokens of a prompt and its answer (default: the model's, or --lengths)")
    found.add_argument("--seed", type=int, default=0, help="of the documents that are made")
    found.add_argument("--text", nargs="+", help="rat_bits_per_byte: files and folders of held-out text")
    found.add_argument("--lengths", type=int, nargs="+", help="rat_needle: tokens")
    found.add_argument("--depths", type=float, nargs="+", help="rat_needle: from 0, the beginning, to 1")
    found.add_argument("--pairs", type=int, nargs="+", help="rat_recall: how many pairs there are")
    found.add_argument("--samples", type=int, help="rat_needle, rat_recall: documents of each kind")
    found.add_argument("--prompts", nargs="+", help="rat_prompts: .jsonl files as of LongBench and RULER")
    found.add_argument("--template", help="rat_prompts: with {context} and {input}")
    return found


def evaluate(model: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    """Results of tasks on a model, the samples told apart where a task is one of ours. Options: those of the command."""
    lm_eval, torch = need("lm_eval", "eval", "rat_ext.evaluate"), need("torch", "eval", "rat_ext.evaluate")
    need("transformers", "models", "rat_ext.evaluate")
    import rat_ext.models  # noqa: F401  (registers its classes)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    length, size, limit = options.get("max_length"), options.get("batch_size") or "8", options.get("limit")
    if not tasks:
        raise wrong("evaluate", "--tasks", f"names of tasks, such as {ours()[0]}", "none")
    if length is not None and length < 2:
        raise wrong("evaluate", "--max-length", "at least 2", length)
    if not re.fullmatch(r"auto|[1-9]\d*", str(size)):
        raise wrong("evaluate", "--batch-size", "auto, or a number from 1 on", size)
    if limit is not None and not limit > 0:
        raise wrong("evaluate", "--limit", "more than 0", limit)
    dtype, device = options.get("dtype") or "auto", options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise wrong("evaluate", "--dtype", "auto, or a dtype of torch such as bfloat16", dtype)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise wrong("evaluate", "--device", f"a device ({one_line(error)[:100]})", device) from None
    names = ("tokenizer", "text", "lengths", "depths", "pairs", "samples", "prompts", "template", "seed")
    metadata = {name: options[name] for name in names if options.get(name) is not None} | {"pretrained": model}
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=not all(task.startswith("rat_") for task in tasks),
        metadata=metadata,
    )
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise wrong("evaluate", "--tasks", f"tasks of lm-eval or of {', '.join(ours())}", unknown[0])
    tasks = list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task])))  # of patterns, what they mean
    if length is None and any(task.startswith("rat_needle") for task in tasks):
        length = max(options.get("lengths") or (4096,))
    if not Path(model, "config.json").is_file() and Path(model).exists():
        raise wrong("evaluate", "MODEL", "a folder with a model and its tokenizer", model)
    try:
        harness = HFLM(
            pretrained=model, tokenizer=options.get("tokenizer"), device=device, dtype=dtype, max_length=length,
            batch_size=size if size == "auto" else int(size), peft=options.get("adapter"),
        )  # fmt: skip
    except Exception as error:  # of transformers, tokenizers, safetensors or peft
        expected = f"a model, its tokenizer (or --tokenizer) and --adapter that load ({one_line(error)})"
        raise wrong("evaluate", "MODEL", expected, model) from None
    if hasattr(harness, "tokenizer"):
        check_vocabulary("evaluate", "--tokenizer", harness.tokenizer, harness.config)
        if "rat_recall" in tasks:  # lm-eval would cut off its first pairs without a word
            from .tasks.rat_tasks import recall

            documents = recall(**metadata)["test"].to_list()
            pairs = max(document["pairs"] for document in documents)
            texts = [document["prompt"] + document["answer"] for document in documents if document["pairs"] == pairs]
            most = max(len(harness.tok_encode(text)) for text in texts) - 1
            if most > harness.max_length:
                expected = f"at least {most}, the tokens of rat_recall with {pairs} --pairs"
                raise wrong("evaluate", "--max-length", expected, f"{harness.max_length}{'' if length else ', the default'}")
    if "rat_prompts" in tasks and (longest := getattr(harness, "max_length", None)) is not None and longest <= 64:
        raise wrong("evaluate", "--max-length", "more than 64, the tokens of an answer of rat_prompts", longest)
    found = lm_eval.simple_evaluate(
        model=harness, tasks=tasks, task_manager=manager, limit=limit, num_fewshot=options.get("num_fewshot"), bootstrap_iters=0
    )
    results = {
        task: {
            name.partition(",")[0]: value
            for name, value in metrics.items()
            if isinstance(value, float) and "stderr" not in name
        }
        for task, metrics in found["results"].items()
    }
    cells = {task: _cells(found["samples"][task], *BY[task]) for task in results if task in BY}
    versions = {name: need(name, "eval", "").__version__ for name in ("lm_eval", "transformers", "torch")}
    return {"model": model, "results": results, "by": cells, "versions": versions}


def _cells(samples: list[dict], fields: tuple[str, ...], metric: str) -> list[dict[str, Any]]:
    """The mean of a metric over the samples that agree in the fields."""
    groups: dict[tuple, list[float]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample["doc"][field] for field in fields), []).append(sample[metric])
    return [
        dict(zip(fields, key, strict=True)) | {metric: sum(values) / len(values), "samples": len(values)}
        for key, values in sorted(groups.items())
    ]


def heat_map(cells: list[dict[str, Any]], title: str, path: Path) -> None:
    """Depth against length, from red (nothing is found) to green."""
    need("matplotlib", "eval", "the heat map")
    from matplotlib.figure import Figure

    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = [[next(c["found"] for c in cells if (c["length"], c["depth"]) == (n, d)) for n in lengths] for d in depths]
    figure = Figure(figsize=(1.5 + 0.8 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth", title=title)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center")
    figure.colorbar(image, label="found")
    write_whole(path, lambda name: figure.savefig(name, dpi=120))


def table(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (task, of what, metric, value): each task, then its kinds of samples."""
    rows = []
    for task, metrics in results["results"].items():
        rows += [(task, "all", name, f"{value:.4f}") for name, value in metrics.items()]
        if task in BY:
            fields, metric = BY[task]
            for cell in results["by"][task]:
                kind = ", ".join(f"{field} {cell[field]}" for field in fields)
                rows.append((task, kind, metric, f"{cell[metric]:.4f}"))
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    out, tasks = options.pop("out"), [task for task in options.pop("tasks").split(",") if task]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrong("evaluate", "--out", "a folder that can be written", f"{out}: {error.strerror}") from None
    results = evaluate(options.pop("model"), tasks, **options)
    write_json(out / "results.json", results)
    rows = [("task", "of", "metric", "value"), *table(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    print(text)
    write_whole(out / "results.txt", lambda path: path.write_text(text + "\n"))
    for task in ("rat_needle", "rat_needle_keys"):
        if task in results["by"]:
            try:
                heat_map(results["by"][task], task, out / f"{task}.png")
            except Refused as error:
                print(error, file=sys.stderr)
    print(json.dumps({"written": str(out)}))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
