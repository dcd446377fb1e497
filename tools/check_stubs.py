"""Fails when two object files define the host stub of one kernel template as weak symbols.

    python tools/check_stubs.py [--nvcc /usr/local/cuda/bin/nvcc] [--root FOLDER]

The linker would keep one of them, and with it one file's machine code for the calls of both. CUDA 13 makes such stubs local
by default; earlier toolkits, and `-static-global-template-stub=false`, with which every .cu file is compiled here, do not. A
kernel template that two files instantiate must therefore be `static` or in an unnamed namespace. Compiles to PTX without
optimisation, which takes about a minute on two cores.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ["-std=c++17", "--expt-relaxed-constexpr", "-DRAT_EXT_CUDA=1", "-static-global-template-stub=false"]
FLAGS += ["-gencode=arch=compute_80,code=compute_80", "-Xcicc=-O0", "-Xcompiler=-O0"]


def weak_stubs(nvcc: str, source: Path, folder: Path) -> set[str]:
    """The kernels, by their mangled names, whose host stubs the file's object defines as weak symbols."""
    output = folder / f"{source.name}.{abs(hash(source))}.o"
    subprocess.run([nvcc, *FLAGS, "-c", str(source), "-o", str(output)], check=True)
    symbols = subprocess.run(["nm", str(output)], capture_output=True, text=True, check=True).stdout
    # Kernel _Zfoo has a local variable within __device_stub__Zfoo.
    return {name for name in re.findall(r" [WV] (\S+)$", symbols, re.MULTILINE) if f"__device_stub_{name}" in symbols}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="checkout to look at")
    arguments = parser.parse_args()
    sources = sorted(arguments.root.glob("csrc/cuda/**/*.cu"))
    if not sources:
        sys.exit(f"no .cu file under {arguments.root}/csrc/cuda")
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(lambda source: weak_stubs(arguments.nvcc, source, Path(folder)), sources))
    owners: dict[str, list[str]] = {}
    for source, names in zip(sources, found, strict=True):
        for name in names:
            owners.setdefault(name, []).append(str(source.relative_to(arguments.root)))
    shared = {name: files for name, files in sorted(owners.items()) if len(files) > 1}
    for name, files in shared.items():
        print(f"{name}: {', '.join(files)}")
    if shared:
        sys.exit(f"{len(shared)} kernel templates have a weak host stub in more than one object; make them static")
    print(f"{len(sources)} files, {len(owners)} weak kernel stubs, none in two objects")


if __name__ == "__main__":
    main()
