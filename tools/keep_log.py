"""Runs nvcc and keeps what it prints as <object>.log, of which it shows what is no list of registers.

setup.py and CMakeLists.txt both start nvcc through it; tools/resource_report.py reads the logs.
"""

import subprocess
import sys

command = sys.argv[1:]
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
if "-o" in command:
    with open(command[command.index("-o") + 1] + ".log", "w") as log:
        log.write(done.stdout)
for line in done.stdout.splitlines(keepends=True):
    remark = "(C" in line  # "ptxas info : (C7514) Potential Performance Loss: ..."
    if remark or not (line.startswith("ptxas info") or "bytes stack frame" in line):
        sys.stdout.write(line)
sys.exit(done.returncode)
