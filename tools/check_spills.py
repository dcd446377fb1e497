"""Fails when a kernel spills more registers than it may. Reads the report of tools/resource_report.py.

    python tools/check_spills.py build/cmake/resource_report.json [--arch sm_80 --arch sm_90a]

What each may spill is in tools/spill_limits.txt. --arch: the report must hold kernels for each.
"""

import argparse
import json
import math
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from resource_report import table


def read_limits(text: str) -> list[tuple[str, int]]:
    """[(pattern, bytes a thread), ...]"""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    matches = [re.fullmatch(r"(.*?)(?:\s+(\d+))?", line) for line in lines if line]
    return [(match[1], int(match[2] or 0)) for match in matches]


def limit(row: dict, limits: list[tuple[str, int]]) -> float:
    """The last pattern that matches decides; a kernel that none matches may spill what it wants."""
    found = [size for pattern, size in limits if fnmatchcase(f"{row['kernel']} on {row['arch']}", pattern)]
    return found[-1] if found else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("--arch", action="append", default=[])
    parser.add_argument("--limits", type=Path, default=Path(__file__).parent / "spill_limits.txt")
    arguments = parser.parse_args()
    rows = json.loads(arguments.report.read_text())
    limits = read_limits(arguments.limits.read_text())
    print(table(rows))
    missing = [arch for arch in arguments.arch if not any(row["arch"] == arch for row in rows)]
    if missing:
        sys.exit(f"the report holds no kernel for {', '.join(missing)}")
    spilling = [row for row in rows if row["spill_stores"] or row["spill_loads"]]
    forbidden = [r for r in spilling if max(r["spill_stores"], r["spill_loads"]) > limit(r, limits)]
    if forbidden:
        sys.exit(f"{len(forbidden)} of {len(rows)} kernels spill more than they may:\n{table(forbidden)}")
    print(f"{len(rows)} kernels, {len(spilling)} with spills, none above the limits of {arguments.limits.name}")


if __name__ == "__main__":
    main()
