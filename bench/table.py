"""Makes bench/RESULTS.md and the tables of README.md from the JSON files in bench/results.

RESULTS.md is made whole. In README.md, what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` is made. Several
files of one device and bench (say of different --rows) are merged: a newer row replaces an older one of its name.
``--check`` changes nothing and fails when a file is not what it would be.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def op(result: dict) -> str:
    peers: list[str] = []
    for row in result["rows"]:
        peers += [name for name in row.get("ms", {}) if name != "rat_ext" and name not in peers]
    parts = []
    for i, phase in enumerate(("forward", "forward + backward")):
        lines = []
        for row in result["rows"]:
            if "ms" not in row:
                lines.append([f"`{row['name']}`", "wrong: not timed", *[""] * (len(peers) + 1)])
                continue
            mine = row["ms"]["rat_ext"][i]
            cells = [f"`{row['name']}`", f"**{number(mine)}**"]
            for name in peers:
                times = row["ms"].get(name)
                cells.append(f"{number(times[i])} ({times[i] / mine:.1f}x)" if times else "-")
            lines.append([*cells, f"{row['share_of_ceiling'][i]:.0%}"])
        head = [f"{phase}, ms", "rat_ext", *(f"{name} (ratio)" for name in peers), "of ceiling"]
        parts.append(markdown(head, lines))
    if memory := result.get("memory"):
        parts.append(
            f"Peak memory of forward + backward at T = {memory['tokens']}: {memory['ratio']:.2f}x of inputs, "
            "output and gradients."
        )
    return "\n\n".join(parts)


def host(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        empty = row["empty_us"]
        beside = [f"{empty:.1f}", f"{row['us'] / empty:.2f}x"] if empty else ["-", "-"]
        rows.append([row["name"], f"{row['us']:.1f}", *beside])
    return markdown(["host time per call, microseconds", "rat_ext", "an empty autograd function", "ratio"], rows)


# Not peers of a decode row but what it is held against: our own step, or a forward over the whole.
MEASURES = ("one step", "whole", "whole, with a cache")


def decode(result: dict) -> str:
    """Steps beside their peers; then what is held against another call of ours."""
    names = dict.fromkeys(name for row in result["rows"] for name in row["ms"])
    peers = [name for name in names if name != "rat_ext" and name not in MEASURES]
    steps, held = [], []
    for row in result["rows"]:
        ms = row["ms"]
        mine, floor = ms["rat_ext"], row.get("floor_ms")
        for name in (name for name in MEASURES if name in ms):
            us = [f"**{number(mine * 1e3)}**", number(ms[name] * 1e3), f"{mine / ms[name]:.2f}x"]
            held.append([f"`{row['name']}`", us[0], name, *us[1:]])
        if floor:
            cells = [f"{number(ms[n] * 1e3)} ({ms[n] / mine:.1f}x)" if n in ms else "-" for n in peers]
            of_floor = f"{number(floor * 1e3)} ({floor / mine:.0%})"
            steps.append([f"`{row['name']}`", f"**{number(mine * 1e3)}**", of_floor, *cells])
    head = ["decode step, microseconds", "rat_ext", "floor (its share)", *(f"{name} (ratio)" for name in peers)]
    parts = [markdown(head, steps)] if steps else []
    if held:
        parts.append(markdown(["microseconds", "rat_ext", "held against", "that", "rat_ext takes"], held))
    return "\n\n".join(parts)


def recurrence(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        cells = (f"{number(ms)} ({share:.0%})" for ms, share in zip(row["ms"], row["share_of_copy"], strict=True))
        rows.append([f"`{row['name']}`", *cells])
    return markdown(["chunk_recurrence, ms (share of copy bandwidth)", "forward", "forward + backward"], rows)


def phases(result: dict) -> str:
    parts = []
    for row in result["rows"]:
        listed = [(name, ms) for name, ms in row["ms"].items() if ms > 0.01 * row["total_ms"]]
        lines = [[f"`{name}`", f"{ms:.3f}", f"{ms / row['total_ms']:.0%}"] for name, ms in listed]
        parts.append(markdown([f"forward + backward, `{row['name']}`", "ms", "share"], lines))
    return "\n\n".join(parts)


BACKWARD = ["attention ms", "any order", "TFLOP/s", "prepare ms", "of copy", "scan ms", "of copy", "all kernels ms", "peak GB"]


def backward_cells(row: dict, show=number) -> list[str]:
    """The figures of a row under BACKWARD."""
    ms = row["ms"]
    line = [show(ms["attention"]), show(ms["attention, any order"]), show(row["attention_tflop_s"])]
    for phase in ("prepare", "scan"):
        line += [show(ms[phase]), f"{row[f'{phase}_of_copy']:.0%}"]
    return [*line, show(ms["all kernels"]), show(row["peak_gb"])]


def backward(result: dict) -> str:
    wrong = ["wrong: not timed", *[""] * (len(BACKWARD) - 1)]
    lines = [[f"`{row['name']}`", *(backward_cells(row) if "ms" in row else wrong)] for row in result["rows"]]
    return markdown(["backward", *BACKWARD], lines)


def families(result: dict) -> str:
    chosen, portable = result["ms"]["auto"], result["ms"]["sm80"]
    rows = []
    for name, ms in chosen.items():
        cells = [f"{number(a)} ({b / a:.2f}x)" for a, b in zip(ms, portable[name], strict=True)]
        rows.append([f"`{name}`", *cells])
    return markdown(["ms by graph replay (portable kernels' time over it)", "forward", "forward + backward"], rows)


def parallel(result: dict) -> str:
    """Rows of context parallelism; then those of training."""
    lines, words = [], []
    for row in result["rows"]:
        if "speedup" in row:
            ms = f"{number(row['one_ms'])} ms on one GPU, {number(row['all_ms'])} ms on {row['ranks']}"
            words.append(f"`{row['name']}`: a step takes {ms}: {row['speedup']:.2f}x the tokens per second.")
        elif "ms" not in row:
            lines.append([f"`{row['name']}`", "wrong: not timed", *[""] * 6])
        else:
            ring = row.get("ring_ms")
            lines.append([
                f"`{row['name']}`", *(f"**{number(ms)}**" for ms in row["ms"]), f"{row['of_share'][1]:.2f}x",
                f"{number(ring[1])} ({ring[1] / row['ms'][1]:.1f}x)" if ring else "-",
                f"{row['peak_gb'] / max(row['one_peak_gb'], 1e-9):.2f}x", number(row["bytes_sent"] / 1e6),
                f"1/{row['ring_bytes'] / max(row['bytes_sent'], 1):.0f}",
            ])  # fmt: skip
    head = ["context parallel", "forward ms", "forward + backward ms", "of one GPU's / ranks", "ring attention ms (ratio)"]
    head += ["memory of one's", "MB sent per rank", "of the ring's"]
    return "\n\n".join(([markdown(head, lines)] if lines else []) + words)


def model(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        name, figure, more = row["words"]
        rows.append([f"`{name}`", f"**{figure}**", f"{more} ({row['run'].partition(',')[0]})"])
    return markdown(["1.3B", "", ""], rows)


def readme(result: dict) -> str:
    """Six rows that say what there is to say, the shapes at which the peers are timed too, under their own runs."""
    shown = [row for row in result["rows"] if re.match(README_ROWS, row["name"]) and "ms" in row]
    rows = []
    for row in shown:
        for i, phase in enumerate(("forward", "forward + backward")):
            ms = {name: times[i] for name, times in row["ms"].items()}
            peers = [f"{number(ms[n])} ({ms[n] / ms['rat_ext']:.1f}x)" if n in ms else "-" for n in ("compiled", "sdpa cudnn")]
            rows.append([f"{phase}, T = {row['tokens']}, B = {row['batch']}", f"**{number(ms['rat_ext'])}**", *peers])
    rows.sort(key=lambda row: "backward" in row[0])
    head = head_line(result | {"rows": shown, "ceilings": None})
    return head + "\n\n" + markdown(["ms", "rat_ext", "the definition, compiled", "dense attention, cuDNN"], rows)


README_ROWS = r"T=(4096 B=64|16384 B=16|131072 B=2) H=16 G=2 D=128 L=16 bfloat16$"
MAKERS = {
    "op": op,
    "backward": backward,
    "decode": decode,
    "recurrence": recurrence,
    "families": families,
    "host": host,
    "phases": phases,
    "parallel": parallel,
    "model": model,
}

# What RESULTS.md says above each bench's tables.
WORDS = {
    "op": """## The op against its peers

RAT's rows have two key and query groups, an output gate and rotation; dense attention has none of them. "compiled" is the
same definition under `torch.compile` (associative scan and FlexAttention). "portable kernels" are those that run where there
is no Hopper GPU, timed on this one. "of ceiling" is the time that the needed products or bytes take at the rates measured in
the same run, over the time measured. Small rows are bound by the host.""",
    "backward": """## The backward by phase

Attention in TFLOP/s of its five products, also with `deterministic=False` ("any order"); the memory-bound phases as shares of
copy bandwidth. Peak memory is that of forward + backward beyond inputs, y, dy and gradients.""",
    "decode": """## Decoding

One step in a CUDA graph, other memory read through the L2 cache before each. The floor: reading the chunk states, and of a
layer its weights, once. "layer step" is `RATLayer.step` with both projections, "chain" the time per step of several in a row.
"sdpa" and FlashAttention-3 read keys and values of as many tokens; "compiled" is the definition under `torch.compile`.""",
    "recurrence": "## The recurrence alone",
    "families": """## Kernel families

The chosen kernels beside the portable ones, forced by `RAT_EXT_KERNELS=sm80`: none of the chosen may be slower.""",
    "host": "## Host time",
    "phases": "## Time by kernel",
    "parallel": """## Several GPUs

One row of tokens over the GPUs of one host, beside what one GPU takes for the whole row and beside PyTorch's context-parallel
attention of as many heads of keys and values.""",
    "model": """## The models

1.3B models, random weights. "largest batch" is as many sequences of T tokens as memory holds, "floor" the time to read
weights and states once. A peer's step is the fastest of the ways it was tried. Model FLOP utilisation (MFU) counts 6 N per
token and the products of attention, no recomputation, of 989 TFLOP/s. The attention models' `Generator` of commit 973009f did
not read keys by cuDNN yet; rows of c338e6e are older than the present decoding.""",
}


def merged(bench: str, folder: Path) -> list[dict]:
    """The results of a bench, one a device, the newest last read."""
    found: dict[str, dict] = {}
    files = [json.loads(path.read_text()) for path in folder.glob(f"{bench}-*.json")]
    for result in sorted((r for r in files if r["bench"] == bench), key=lambda r: r["date"]):
        older = found.get(result["device"])
        for row in result.get("rows", []):
            row["run"] = f"commit {result['commit']}, {result['date'][:10]}"
        if older and "rows" in result:
            rows = {row["name"]: row for row in older["rows"]} | {row["name"]: row for row in result["rows"]}
            result = {**older, **result, "rows": list(rows.values())}
        found[result["device"]] = result
    return sorted(found.values(), key=lambda r: (r["device_type"] != "cuda", r["device"]))


def head_line(result: dict) -> str:
    where = result["device"] + (f", {result['threads']} threads, {result['isa']}" if result["device_type"] == "cpu" else "")
    versions = f"torch {result['torch']}" + (f", CUDA {result['cuda']}" if result["device_type"] == "cuda" else "")
    runs = dict.fromkeys(row["run"] for row in result.get("rows", []))  # a row that was not timed again has an older one
    runs = runs or [f"commit {result['commit']}, {result['date'][:10]}"]
    head = f"**{where}** ({versions}, {' and '.join(runs)}"
    if limits := result.get("ceilings"):
        copy, matmul = number(limits["copy_gb_s"]), number(limits["matmul_tflop_s"])
        head += f"; ceilings measured: copy {copy} GB/s, matmul {matmul} TFLOP/s"
    return head + ")"


def section(bench: str, make, folder: Path) -> str:
    return "\n\n".join(f"{head_line(result)}\n\n{make(result)}" for result in merged(bench, folder))


def results(folder: Path) -> str:
    parts = [
        "# Results\n\nMade by `python bench/table.py` from the JSON files in `bench/results/`, which say device, versions,\n"
        "commit and date. [README.md](README.md) says how the figures are measured."
    ]
    for bench, words in WORDS.items():
        if body := section(bench, MAKERS[bench], folder):
            parts += [words, body]
    return "\n\n".join(parts) + "\n"


def fill(text: str, folder: Path) -> str:
    """README.md with its tables made anew."""

    def replace(match: re.Match) -> str:
        if match[1] != "readme":
            sys.exit(f"bench/table.py: unknown marker bench:{match[1]}; known: readme")
        newest = [result for result in merged("op", folder) if result["device_type"] == "cuda"]
        body = "\n\n".join(readme(result) for result in newest)
        return "<!-- bench:readme -->\n" + (f"\n{body}\n\n" if body else "") + "<!-- /bench -->"

    return re.sub(r"<!-- bench:(\w+) -->.*?<!-- /bench -->", replace, text, flags=re.DOTALL)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the tables are not those of the JSON")
    p.add_argument("--folder", type=Path, default=HERE.parent, help="of README.md and bench/RESULTS.md")
    p.add_argument("--results", type=Path, default=HERE / "results")
    options = p.parse_args()
    readme_file, results_file = options.folder / "README.md", options.folder / "bench" / "RESULTS.md"
    made = {readme_file: fill(readme_file.read_text(), options.results), results_file: results(options.results)}
    stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path}: tables are not those of {options.results}; run python bench/table.py", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(made[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
