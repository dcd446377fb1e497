"""Fails when two object files hold a kernel of one name. Reads the report of tools/resource_report.py.

    python tools/check_stubs.py resource_report.json

A kernel template that two .cu files instantiate gets a host stub in both. CUDA 13 makes such stubs local by default; earlier
toolkits, and `-static-global-template-stub=false`, make them weak symbols. The linker keeps one of them, and with it one file's
machine code for the calls of both. In an unnamed namespace a kernel has a name of its own in each file.
"""

import argparse
import collections
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    rows = json.loads(parser.parse_args().report.read_text())
    sources = collections.defaultdict(list)
    for row in rows:
        sources[row["symbol"], row["arch"]].append(row["source"])
    shared = sorted({(symbol, *files) for (symbol, _), files in sources.items() if len(files) > 1})
    for symbol, *files in shared:
        print(f"{symbol}: {', '.join(files)}")
    if shared:
        sys.exit(f"{len(shared)} kernels stand in more than one object; put their templates into unnamed namespaces")
    print(f"{len({symbol for symbol, _ in sources})} kernels, none in two objects")


if __name__ == "__main__":
    main()
