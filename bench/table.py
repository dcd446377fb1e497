"""Makes the Markdown tables of README.md from the JSON files in bench/results.

Between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` stands what the newest results of bench NAME say, a table for
each device (several files of one device and bench, say of different --rows, are merged: a newer row replaces an older
one of its name). ``--check`` changes nothing and fails when the file is not what it would be.
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
    rows = [[name, f"{us:.1f}", str(result["targets"].get(name) or "")] for name, us in result["microseconds"].items()]
    return markdown(["host time a call, microseconds", "", "target"], rows)


def decode(result: dict) -> str:
    rows = []
    for row in result["rows"]:
        mine, theirs = row["ms"]["rat_ext"], row["ms"].get("sdpa")
        peer = f"{number(theirs * 1e3)} ({theirs / mine:.1f}x)" if theirs else "-"
        rows.append([f"`{row['name']}`", f"**{number(mine * 1e3)}**", number(row["floor_ms"] * 1e3), peer])
    return markdown(["decode step, microseconds", "rat_ext", "floor", "sdpa (ratio)"], rows)


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
    """The figures of a row under BACKWARD, with the target that was reached, or MISSED, where there is one."""

    def figure(key: str) -> str:
        text = f"{row[key]:.0%}" if key.endswith("of_copy") else show(row[key])
        return text + (f" ({row['targets'][key][2]})" if key in row["targets"] else "")

    ms = row["ms"]
    line = [show(ms["attention"]), show(ms["attention, any order"]), figure("attention_tflop_s")]
    for phase in ("prepare", "scan"):
        line += [show(ms[phase]), figure(f"{phase}_of_copy")]
    return [*line, show(ms["all kernels"]), figure("peak_gb")]


def backward(result: dict) -> str:
    wrong = ["wrong: not timed", *[""] * (len(BACKWARD) - 1)]
    lines = [[f"`{row['name']}`", *(backward_cells(row) if "ms" in row else wrong)] for row in result["rows"]]
    return markdown(["backward", *BACKWARD], lines)


MAKERS = {"op": op, "backward": backward, "host": host, "decode": decode, "recurrence": recurrence, "phases": phases}


def merged(bench: str, folder: Path) -> list[dict]:
    """The results of a bench, one a device, the newest last read."""
    found: dict[str, dict] = {}
    files = [json.loads(path.read_text()) for path in folder.glob(f"{bench}-*.json")]
    for result in sorted((r for r in files if r["bench"] == bench), key=lambda r: r["date"]):
        older = found.get(result["device"])
        if older and "rows" in result:
            rows = {row["name"]: row for row in older["rows"]} | {row["name"]: row for row in result["rows"]}
            result = {**older, **result, "rows": list(rows.values())}
        found[result["device"]] = result
    return sorted(found.values(), key=lambda r: (r["device_type"] != "cuda", r["device"]))


def section(bench: str, folder: Path) -> str:
    parts = []
    for result in merged(bench, folder):
        where = result["device"] + (f", {result['threads']} threads, {result['isa']}" if result["device_type"] == "cpu" else "")
        versions = f"torch {result['torch']}" + (f", CUDA {result['cuda']}" if result["device_type"] == "cuda" else "")
        head = f"**{where}** ({versions}, commit {result['commit']}, {result['date'][:10]}"
        if limits := result.get("ceilings"):
            copy, matmul = number(limits["copy_gb_s"]), number(limits["matmul_tflop_s"])
            head += f"; ceilings measured: copy {copy} GB/s, matmul {matmul} TFLOP/s"
        parts += [head + ")", MAKERS[bench](result)]
    return "\n\n".join(parts)


def fill(text: str, folder: Path) -> str:
    def replace(match: re.Match) -> str:
        bench = match[1]
        if bench not in MAKERS:
            sys.exit(f"bench/table.py: unknown marker bench:{bench}; known: {', '.join(MAKERS)}")
        body = section(bench, folder)
        return f"<!-- bench:{bench} -->\n" + (f"\n{body}\n\n" if body else "") + "<!-- /bench -->"

    return re.sub(r"<!-- bench:(\w+) -->.*?<!-- /bench -->", replace, text, flags=re.DOTALL)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing; exit code 1 if the tables are not those of the JSON")
    p.add_argument("--file", type=Path, default=HERE.parent / "README.md")
    p.add_argument("--results", type=Path, default=HERE / "results")
    options = p.parse_args()
    text = options.file.read_text()
    made = fill(text, options.results)
    if made == text:
        return 0
    if options.check:
        print(f"{options.file}: tables are not those of {options.results}; run python bench/table.py", file=sys.stderr)
        return 1
    options.file.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
