"""Collects what ptxas said of each kernel, registers, shared memory and spills, from the logs of a build folder.

    python tools/resource_report.py build/cmake --json resource_report.json --text resource_report.txt

The logs are those that setup.py and CMakeLists.txt keep beside the object files. The text form is printed when neither
file is asked for.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path


def readable(symbols: list[str]) -> dict[str, str]:
    """Mangled names to short ones: ``chunk_attention_fwd_sm80_kernel<bf16, 128>``."""
    names = symbols
    if symbols and shutil.which("c++filt"):
        names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
        names = names.splitlines()
    short = {}
    for symbol, name in zip(symbols, names, strict=True):
        name = name.replace("(anonymous namespace)::", "").replace("rat::cuda::", "")
        name = re.sub(r"\((?:int|unsigned int|long|bool|[\w:]+)\)(?=-?\w)", "", name)  # casts of template arguments
        depth = 0
        for i, c in enumerate(name):  # the parameter list starts at the first parenthesis outside <...>
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                name = name[:i]
                break
        name = name.removeprefix("void ").replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("> >", ">>")
        short[symbol] = name
    return short


def parse_log(text: str) -> list[dict]:
    """One dict for each kernel and architecture in ptxas -v output."""
    found = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            found.append({"symbol": match[1], "arch": match[2], "stack": 0, "spill_stores": 0, "spill_loads": 0})
            found[-1] |= {"registers": 0, "static_shared": 0}
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if found:  # functions that a kernel calls and that were not inlined count with it
                for key, value in zip(("stack", "spill_stores", "spill_loads"), match.groups(), strict=True):
                    found[-1][key] += int(value)
        elif (match := re.search(r"Used (\d+) registers", line)) and found:
            found[-1]["registers"] = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1]["static_shared"] = int(shared[1]) if shared else 0
    return found


def collect(folder: Path) -> list[dict]:
    rows = []
    for log in sorted(folder.rglob("*.log")):
        source = log.name.removesuffix(".log").removesuffix(".o").removesuffix(".cu") + ".cu"
        rows += [{"source": source, **row} for row in parse_log(log.read_text(errors="replace"))]
    # Hopper's kernels are empty for every other architecture.
    rows = [row for row in rows if "sm90" not in row["symbol"] or row["arch"] == "sm_90a"]
    names = readable([row["symbol"] for row in rows])
    return sorted(({"kernel": names[row["symbol"]], **row} for row in rows), key=lambda r: (r["kernel"], r["arch"]))


def table(rows: list[dict]) -> str:
    width = max([len(row["kernel"]) for row in rows] + [6])
    lines = [f"{'kernel':<{width}}  {'arch':<7}  registers  smem (static)  stack  spill stores  spill loads"]
    for row in rows:
        lines.append(
            f"{row['kernel']:<{width}}  {row['arch']:<7}  {row['registers']:>9}  {row['static_shared']:>13}"
            f"  {row['stack']:>5}  {row['spill_stores']:>12}  {row['spill_loads']:>11}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="build folder with the compilers' logs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    rows = collect(arguments.folder)
    if not rows:
        sys.exit(f"no kernel in the logs under {arguments.folder}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.text:
        arguments.text.write_text(table(rows) + "\n")
    if not (arguments.json or arguments.text):
        print(table(rows))


if __name__ == "__main__":
    main()
