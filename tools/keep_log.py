"""Runs a compiler and keeps what it prints as <object>.log: CMake's launcher for nvcc (CMakeLists.txt)."""

import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
if "-o" in command:
    with open(command[command.index("-o") + 1] + ".log", "w") as log:
        log.write(done.stdout)
sys.stdout.write(
    "".join(
        line
        for line in done.stdout.splitlines(keepends=True)
        if not line.startswith("ptxas info") and "bytes stack frame" not in line
    )
)
sys.exit(done.returncode)
