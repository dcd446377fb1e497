"""Runs all tests on a GPU and records it, so that CI, which has none, knows whether the kernels were run as they are.

    python tools/gpu_check.py                            # every test with --device cuda, shared by several processes per GPU
    python tools/gpu_check.py --families auto sm80 scan  # again with each family of kernels forced
    python tools/gpu_check.py --sanitize                 # and tests/sanitize.py under memcheck and synccheck
    python tools/gpu_check.py --out record.json          # elsewhere than tests/gpu_record.json
    python tools/gpu_check.py --files test_x --out x.json    # some files again, say after a test was mended, and then
    python tools/gpu_check.py --merge x.json             # into the record, if the sources are the same
    python tools/gpu_check.py --here                     # failed tests that use no device, once more, on any machine
    python tools/gpu_check.py --verify                   # what CI runs: are the kernels those of the record?
    python tools/gpu_check.py --pending "no GPU at hand: docs only"   # lets --verify pass, with a warning, for these sources

It needs the built extension in rat_ext/, pytest and hypothesis; no compiler. Tests marked "alone" want most of a GPU's memory
and run one after the other when the rest is done.

The record (JSON): `sources`, a hash of csrc/ and setup.py without comments and blank lines; device, versions, date; `families`:
for each, by file, passed, skipped, failed, seconds; `failed`, the names; `missing`, tests skipped for want of memory, GPUs,
toolkits or kernels, by name with the reason; `again`, files that were run later than the rest; `without_gpu`, tests that use
no device and passed elsewhere later; `sanitizer`; `pending`, why nothing was run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import hashlib
import io
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "gpu_record.json"
# Reasons of skips that say what the machine lacks, not what a test is for.
LAST_WORDS = 15.0  # seconds that a process has to write its report once it is interrupted
MISSING = re.compile(r"GiB|GPUs|compiler|toolkit|nvcc|sanitizer|no such kernels")
HOW = "run tools/gpu_check.py on a GPU and commit tests/gpu_record.json (without one: tools/gpu_check.py --pending REASON)"


# ---- the hash of the sources -----------------------------------------------------------------------------------------


def cpp_code(text: str) -> str:
    """C++ without its comments. Strings, raw ones too, and character literals are left as they are."""
    token = re.compile(
        r"""(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)
          |(?P<raw>R"(?P<mark>[^()\\\s]{0,16})\(.*?\)(?P=mark)")
          |(?P<string>"(?:\\.|[^"\\\n])*")
          |(?P<separator>(?<=[0-9a-fA-F])'(?=[0-9a-fA-F]))
          |(?P<character>'(?:\\.|[^'\\\n])+')""",
        re.DOTALL | re.VERBOSE,
    )
    return token.sub(lambda found: " " if found["comment"] else found[0], text)


def python_code(text: str) -> str:
    """Python without its comments."""
    lines = text.splitlines()
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        if found.type == tokenize.COMMENT:
            row, column = found.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)


def code(path: Path) -> str:
    """What of a file counts: no comments, no blank lines, no space at the end of a line."""
    text = path.read_text()
    if path.suffix == ".py":
        text = python_code(text)
    elif path.suffix == ".txt":
        text = re.sub(r"(?m)^\s*#.*$", "", text)
    else:
        text = cpp_code(text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def hash_of_sources(root: Path = ROOT) -> str:
    """SHA-256 of the kernels and of how they are built: names and contents of csrc/, and setup.py."""
    digest = hashlib.sha256()
    files = sorted(path for path in (root / "csrc").rglob("*") if path.is_file() and not path.name.startswith("."))
    files = [path for path in files if path.parent.name != "__pycache__"]
    for path in [*files, root / "setup.py"]:
        digest.update(f"{path.relative_to(root).as_posix()}\0{code(path)}\0".encode())
    return digest.hexdigest()


# ---- the record ------------------------------------------------------------------------------------------------------


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def verify(path: Path, root: Path = ROOT) -> int:
    """0 where the record is of these sources and has no failure, or is pending; else 1. One line says which."""
    if not path.exists():
        print(f"gpu_check: there is no {path.name}: {HOW}")
        return 1
    record = json.loads(path.read_text())
    if record["sources"] != hash_of_sources(root):
        print(f"gpu_check: csrc/ or setup.py changed after the GPU record of {record['date']}: {HOW}")
        return 1
    if record.get("pending"):
        line = f"WARNING: these kernels have not run on a GPU ({record['pending']}). {HOW}"
        print("*" * 100 + f"\n{line}\n" + "*" * 100)
        return 0
    if record["failed"]:
        print(f"gpu_check: the GPU record of {record['date']} has {len(record['failed'])} failures: {record['failed'][0]}, ...")
        return 1
    print(f"gpu_check: these kernels ran on {record['device']} on {record['date']}: no failure")
    return 0


def pend(path: Path, reason: str) -> int:
    if not reason.strip():
        print("gpu_check: --pending: expected a reason, got an empty one")
        return 1
    last = json.loads(path.read_text()) if path.exists() else None
    while last and last.get("pending"):
        last = last.get("last")
    record = {"sources": hash_of_sources(), "pending": reason, "date": now(), "last": last}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {path}, pending: {reason}")
    return 0


# ---- running ---------------------------------------------------------------------------------------------------------


class Job:
    """Some of the tests, with one family of kernels: one process of pytest."""

    def __init__(self, name: str, family: str, words: list[str]):
        self.name, self.family, self.words = name, family, words
        self.files: dict[str, dict] = {}  # by test file: passed, skipped, failed, seconds
        self.failures: list[str] = []
        self.missing: dict[str, str] = {}

    def run(self, devices: str, options: argparse.Namespace) -> Job:
        # Threads of several processes on one core, which spin while they wait, would take many times as long.
        threads = max(1, len(os.sched_getaffinity(0)) // options.jobs)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {"CUDA_VISIBLE_DEVICES": devices}
        if self.family != "auto":
            environment["RAT_EXT_KERNELS"] = self.family
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "--device", options.device, "-p", "no:cacheprovider"]
            command += [f"--junitxml={report}", *(["--slow"] if options.slow else []), *self.words]
            problem = ""
            log = (options.logs or Path(folder)) / f"{self.name}-{re.sub(r'[^a-z0-9]+', '-', self.family)}.log"
            with open(log, "w+") as said:
                process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
                try:
                    if process.wait(options.limit) not in (0, 1, 5):  # 5: no test was chosen
                        problem = f"pytest ended with {process.returncode}"
                except subprocess.TimeoutExpired:
                    problem = f"over {options.limit:.0f} s"
                    process.send_signal(signal.SIGINT)  # then it writes what it has run
                    try:
                        process.wait(LAST_WORDS)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()
                if report.exists():
                    self.read(report)
                if problem:
                    self.failures.append(f"{self.name} [{self.family}]: {problem}")
                if self.failures:
                    said.seek(0)
                    print(said.read()[-6000:], flush=True)
        return self

    def read(self, report: Path) -> None:
        for case in ElementTree.parse(report).iter("testcase"):
            # A file that skips itself as a whole has no class, and every process reports it.
            whole = not case.get("classname")
            file = f"{(case.get('name', '') if whole else case.get('classname', '')).replace('.', '/')}.py"
            if whole and case.find("skipped") is not None:
                self.files[file] = {"passed": 0, "skipped": 1, "failed": 0, "seconds": 0.0, "whole": True}
                reason = case.find("skipped").get("message", "")
                if MISSING.search(reason):
                    self.missing[f"{file} [{self.family}]"] = reason
                continue
            counts = self.files.setdefault(file, {"passed": 0, "skipped": 0, "failed": 0, "seconds": 0.0})
            counts["seconds"] += float(case.get("time", 0))
            name = f"{file}::{case.get('name')}"
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                counts["failed"] += 1
                self.failures.append(f"{name} [{self.family}]")
            elif skip is not None:
                counts["skipped"] += 1
                reason = skip.get("message", "")
                if MISSING.search(reason):
                    self.missing[f"{name} [{self.family}]"] = reason
            else:
                counts["passed"] += 1


def by_file(jobs: list[Job]) -> dict[str, dict]:
    """Counts of several processes added up."""
    found: dict[str, dict] = {}
    for job in jobs:
        for file, counts in job.files.items():
            if counts.get("whole"):
                found.setdefault(file, {key: value for key, value in counts.items() if key != "whole"})
                continue
            sums = found.setdefault(file, dict.fromkeys(counts, 0))
            for key, value in counts.items():
                sums[key] = round(sums[key] + value, 1)
    return dict(sorted(found.items()))


def gpus() -> list[str]:
    """The GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count())]


def let_processes_be_interrupted() -> None:
    """What a shell runs in the background ignores interrupts, and its processes inherit that: pytest would write no report."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def run_side_by_side(jobs: list[Job], devices: list[str], options: argparse.Namespace) -> None:
    """options.jobs at a time on each GPU. A job sees all GPUs, its own first."""
    begin = time.perf_counter()
    free: queue.Queue[int] = queue.Queue()
    for _ in range(options.jobs):
        for i in range(len(devices)):
            free.put(i)

    def run(job: Job) -> Job:
        own = free.get()
        try:
            return job.run(",".join(devices[own:] + devices[:own]), options)
        finally:
            free.put(own)

    with concurrent.futures.ThreadPoolExecutor(options.jobs * len(devices)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, job) for job in jobs]):
            job = done.result()
            failed = f", failed: {len(job.failures)}" if job.failures else ""
            print(f"{job.name} [{job.family}] is done after {time.perf_counter() - begin:.0f} s{failed}", flush=True)


def sanitize(tools: list[str], family: str, devices: list[str], limit: float) -> dict[str, str]:
    """tests/sanitize.py under each tool, side by side, on one GPU each where there are so many: its last words."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    forced = {} if family == "auto" else {"RAT_EXT_KERNELS": family}

    def run(tool: str, device: str) -> str:
        if not Path(program).exists():
            return "not run: no compute-sanitizer on this machine"
        environment = os.environ | forced | {"CUDA_VISIBLE_DEVICES": device}
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "tests/sanitize.py"]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"FAILED: over {limit:.0f} s"
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "cases ran" in line or "ERROR SUMMARY" in line]
        words = "; ".join(line.strip("= ") for line in lines) or (done.stdout + done.stderr)[-300:]
        return words if done.returncode == 0 else f"FAILED: {words}"

    own = [devices[i % len(devices)] for i in range(len(tools))]
    with concurrent.futures.ThreadPoolExecutor(len(tools)) as pool:
        said = pool.map(run, tools, own)
    return {tool if family == "auto" else f"{tool} [{family}]": words for tool, words in zip(tools, said, strict=True)}


def about_this_machine() -> dict:
    import torch

    import rat_ext

    info = rat_ext.build_info()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "devices": torch.cuda.device_count(),
        "driver": info.get("cuda_driver"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "rat_ext": rat_ext.__version__,
        "build": info["build"],
        "architectures": info["cuda_architectures"],
        "kernels": len(info["kernels"] or []),
    }


def merge(path: Path, later: Path) -> int:
    """Puts the files of a later run, of the same sources on the same kind of GPU, in the place of theirs in a record."""
    record, again = json.loads(path.read_text()), json.loads(later.read_text())
    for key in ("sources", "device", "torch"):
        if record[key] != again[key]:
            print(f"gpu_check: --merge: expected a run of the same {key}, {record[key]}, got {again[key]}")
            return 1
    for family, files in again["families"].items():
        for file, counts in files.items():
            record["families"][family][file] = counts
            record["failed"] = [
                name for name in record["failed"] if not (name.startswith(file) and name.endswith(f"[{family}]"))
            ]
            record.setdefault("again", {})[f"{file} [{family}]"] = again["date"]
    record["failed"] += again["failed"]
    path.write_text(json.dumps(record, indent=1) + "\n")
    table(record)
    return 1 if record["failed"] else 0


def here(path: Path) -> int:
    """Runs the failed tests of a record that use no device once more, on this machine: tests of documents, say, which lacked
    files there. Those that pass are named under ``without_gpu`` and are no failures; a test with a device is left as it is.
    """
    record = json.loads(path.read_text())
    if record["sources"] != hash_of_sources(ROOT):
        print("gpu_check: --here: the record is of other sources")
        return 1
    for name in list(record["failed"]):
        test, family = name.rsplit(" ", 1)
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        asked = subprocess.run([*pytest, "--fixtures-per-test"], cwd=ROOT, capture_output=True, text=True)
        if asked.returncode or re.search(r"^device\b", asked.stdout, re.MULTILINE):
            print(f"{name}: left, it uses a device")
        elif subprocess.run(pytest, cwd=ROOT).returncode:
            print(f"{name}: fails here too")
        else:
            counts = record["families"][family.strip("[]")][test.partition("::")[0]]
            counts["failed"] -= 1
            counts["passed"] += 1
            record["failed"].remove(name)
            record.setdefault("without_gpu", {})[name] = now()
    path.write_text(json.dumps(record, indent=1) + "\n")
    table(record)
    return 1 if record["failed"] else 0


def check(options: argparse.Namespace) -> int:
    let_processes_be_interrupted()
    sys.path.insert(0, str(ROOT))
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU: run it where there is one, or --pending REASON")
        return 2
    begin = time.perf_counter()
    devices = gpus() if options.device == "cuda" else [""]
    record = {"sources": hash_of_sources(), "date": now()} | about_this_machine()
    files = [p.name for p in sorted((ROOT / "tests").glob("test_*.py")) if re.search(options.files, p.name)]
    targets = [f"tests/{name}" for name in files]
    shards = options.jobs * len(devices)
    jobs = [
        Job(f"share-{k + 1}-of-{shards}", family, ["-m", "not alone", "--shard", f"{k}/{shards}", *targets])
        for family in options.families
        for k in range(shards)
    ]
    with concurrent.futures.ThreadPoolExecutor(1) as beside:  # the sanitizers keep one core each busy, and little of a GPU

        def sanitize_all() -> dict[str, str]:
            found: dict[str, str] = {}
            for family in options.families if options.sanitize else []:
                found |= sanitize(options.tools.split(","), family, devices, options.sanitizer_limit)
            return found

        said = beside.submit(sanitize_all)
        run_side_by_side(jobs, devices, options)
    alone = [] if options.no_alone else [Job("alone", options.families[0], ["-m", "alone", *targets])]
    for job in alone:
        job.run(",".join(devices), options)
    record["families"] = {family: by_file([job for job in jobs if job.family == family]) for family in options.families}
    record["alone"] = by_file(alone)
    everything = [*jobs, *alone]
    record["failed"] = sorted(name for job in everything for name in job.failures)
    record["missing"] = dict(sorted((name, reason) for job in everything for name, reason in job.missing.items()))
    record["sanitizer"] = said.result()
    record["failed"] += [f"{tool}: {words}" for tool, words in record["sanitizer"].items() if words.startswith("FAILED")]
    record["seconds"] = round(time.perf_counter() - begin, 1)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    table(record)
    print(f"written: {options.out}")
    return 1 if record["failed"] else 0


def table(record: dict) -> None:
    """What happened, in a few lines: the last thing that is printed."""
    families = list(record["families"])
    names = sorted({name for counts in record["families"].values() for name in counts})
    width = max(map(len, names), default=0)
    print(f"\n{record['device']} x {record['devices']}, torch {record['torch']}: passed / skipped / failed, seconds")
    print(" " * width + "".join(f"{family:>26}" for family in families))
    for name in names:
        cells = [record["families"][family].get(name) for family in families]
        print(
            f"{name:<{width}}"
            + "".join(f"{c['passed']:>9}/{c['skipped']:>4}/{c['failed']:>3} {c['seconds']:>6.0f} s" for c in cells)
        )
    for name, counts in record["alone"].items():
        print(f"{name} alone: {counts}")
    for name, reason in record["missing"].items():
        print(f"missing: {name}: {reason}")
    for tool, said in record["sanitizer"].items():
        print(f"{tool}: {said}")
    for name in record["failed"]:
        print(f"FAILED: {name}")
    print(f"{len(record['failed'])} failures, {record['seconds']:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--verify", action="store_true", help="compare the record with the sources and run nothing")
    p.add_argument("--pending", metavar="REASON", help="write a record that says why nothing was run")
    p.add_argument("--merge", type=Path, metavar="JSON", help="take the test files of this later run into the record")
    p.add_argument("--here", action="store_true", help="run failed tests of the record that use no device once more, here")
    p.add_argument("--families", nargs="+", default=["auto"], metavar="F", help="auto, or what RAT_EXT_KERNELS forces")
    p.add_argument("--sanitize", action="store_true", help="also run tests/sanitize.py under compute-sanitizer")
    p.add_argument("--tools", default="memcheck,synccheck", help="tools of compute-sanitizer (default: memcheck,synccheck)")
    p.add_argument("--out", type=Path, default=RECORD, help="the record (default: tests/gpu_record.json)")
    p.add_argument("--files", default="", metavar="REGEX", help="only test files whose name matches; wants --out")
    p.add_argument("--no-alone", action="store_true", help="leave out the tests that want a GPU for themselves")
    p.add_argument("--jobs", type=int, default=6, help="processes on each GPU, which share the tests (default: 6)")
    p.add_argument("--limit", type=float, default=1800.0, metavar="S", help="seconds for a process (default: 1800)")
    p.add_argument("--slow", action="store_true", help="also run the tests marked slow: before a release")
    p.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each process said")
    p.add_argument("--sanitizer-limit", type=float, default=1800.0, metavar="S", help="seconds for a tool (default: 1800)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # cpu: to try this program
    options = p.parse_args(arguments)
    if options.verify:
        return verify(options.out)
    if options.pending is not None:
        return pend(options.out, options.pending)
    if options.merge:
        return merge(options.out, options.merge)
    if options.here:
        return here(options.out)
    if (options.files or options.device == "cpu") and options.out == RECORD:
        p.error("a part of the tests is no record: name another file with --out")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    return check(options)


if __name__ == "__main__":
    sys.exit(main())
