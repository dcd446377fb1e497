"""Plants small faults, one at a time, and sees whether the tests notice: the list is in tools/planted.py.

    python tools/mutants.py list                       # the faults; says which no longer match the code
    python tools/mutants.py run                        # Python and CPU: builds each, runs its test
    python tools/mutants.py run --only decode --all    # some of them, and where the named test passes the quick suite too
    python tools/mutants.py build --cuda --out DIR     # CUDA: compiles each here, which needs no GPU ...
    python tools/mutants.py run DIR                    # ... and runs them where there is one

Everything happens in a copy of the working tree: tracked files and new ones that git does not ignore. A fault is caught
where its test fails. Exit status: 0 if all are caught, 1 if one lives, 2 if one could not be planted or run.

DIR holds mutants.json and one compressed archive of extensions, which differ in one kernel and pack well. Building takes one
compilation of the changed file each.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

from planted import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
PRISTINE = Mutant("(no fault)", "", "", "", "")


class Moved(Exception):
    """The text that a fault replaces is not where it was."""


def plant(mutant: Mutant, root: Path) -> Path:
    """Replaces the text in the one file that has it, and returns that file."""
    found = []
    for path in sorted(root.glob(mutant.where)):
        if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh"):
            text = path.read_text()
            found += [(path, text, match) for match in re.finditer(mutant.old, text)]
    if len(found) != 1:
        places = ", ".join(str(path.relative_to(root)) for path, *_ in found) or "nowhere"
        raise Moved(f"{mutant.name}: expected one match of {mutant.old!r} in {mutant.where}, got {len(found)} ({places})")
    path, text, match = found[0]
    path.write_text(text[: match.start()] + mutant.new + text[match.end() :])
    return path


def copy_tree(target: Path) -> None:
    """The working tree as git sees it; without git all of it but for builds."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and p.suffix not in (".so", ".o", ".pyc")]
        names = [name for name in names if not name.startswith(("build/", ".git/"))]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def extension(root: Path) -> Path | None:
    """That of this Python, if there is one."""
    path = root / "rat_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.exists() else None


# ---- building --------------------------------------------------------------------------------------------------------


class Workshop:
    """A copy of the tree that is built once; each fault is then planted in a copy of that, at the same path.

    Copies keep the times of their files, so that a build compiles what was changed and nothing else.
    """

    def __init__(self, folder: Path, cuda: bool):
        self.tree, self.clean = folder / "tree", folder / "clean"
        self.environment = os.environ | {"RAT_EXT_CUDA": "1" if cuda else "0"}
        self.environment.setdefault("CXXFLAGS", "-O1")  # half the time of a build, and no fault depends on it
        if cuda:
            self.environment.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        if self.clean.exists():  # from an earlier call
            return
        copy_tree(self.tree)
        if not cuda:  # one instruction set instead of three: a third of the time
            plant(Mutant("one instruction set", "csrc/cpu/plan.h", r"#define RAT_CPU_X86 1\n", "", ""), self.tree)

    def build(self) -> None:
        words = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(words, cwd=self.tree, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError("the build failed:\n" + (done.stdout + done.stderr)[-2000:])

    def prepare(self, python_only: bool = False) -> None:
        """Builds the clean tree; faults in Python alone run on the extension of the working tree, where there is one."""
        if self.clean.exists():
            return
        ready = extension(ROOT)
        if python_only and ready:
            shutil.copy2(ready, self.tree / "rat_ext" / ready.name)
        else:
            self.build()
        self.tree.rename(self.clean)

    def planted(self, mutant: Mutant) -> Path:
        """The tree with the fault in it, built."""
        shutil.rmtree(self.tree, ignore_errors=True)
        shutil.copytree(self.clean, self.tree, symlinks=True)
        if mutant is not PRISTINE:
            changed = plant(mutant, self.tree)
            if changed.suffix != ".py":
                self.build()
        return self.tree


# ---- running ---------------------------------------------------------------------------------------------------------


def pytest(root: Path, tests: str, device: str, limit: float) -> tuple[str, float, str]:
    """The outcome ("caught", "lived" or what went wrong), the seconds, and the test that failed or those that were run."""
    words = tests.split()
    forced = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("tests/"))
    paths = [str(root / word) for word in words if word.startswith("tests")]
    environment = os.environ | forced
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--device", device, *paths]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return "caught (it hangs)", time.perf_counter() - begin, tests
    seconds = time.perf_counter() - begin
    if done.returncode == 0:
        skipped = re.search(r"\d+ skipped", done.stdout) and " passed" not in done.stdout
        return ("nothing ran: all skipped" if skipped else "lived"), seconds, tests
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1:
        return "caught", seconds, failed[1] if failed else tests
    if done.returncode < 0 or done.returncode > 5:
        return f"caught (it dies: {done.returncode})", seconds, tests
    return "could not run: " + (done.stdout + done.stderr).strip().splitlines()[-1][:200], seconds, tests


class Results:
    def __init__(self, names: list[str]):
        self.width = max(map(len, names), default=0)
        self.found: dict[str, str] = {}

    def add(self, name: str, outcome: str, seconds: float, who: str) -> None:
        self.found[name] = outcome
        print(f"{outcome:<8} {name:<{self.width}} {seconds:5.1f} s  {who}", flush=True)

    def finish(self) -> int:
        caught = sum(outcome.startswith("caught") for outcome in self.found.values())
        lived = [name for name, outcome in self.found.items() if outcome == "lived"]
        broken = [name for name, outcome in self.found.items() if outcome != "lived" and not outcome.startswith("caught")]
        print(
            f"{caught} of {len(self.found)} caught; lived: {', '.join(lived) or 'none'}; not run: {', '.join(broken) or 'none'}"
        )
        return 2 if broken else 1 if lived else 0


def try_one(root: Path, mutant: Mutant, options: argparse.Namespace, device: str) -> tuple[str, float, str]:
    outcome, seconds, who = pytest(root, mutant.tests, device, options.limit)
    if outcome == "lived" and options.all:
        outcome, more, who = pytest(root, "tests", device, 20 * options.limit)
        seconds += more
        outcome = "caught by others" if outcome.startswith("caught") else outcome
    return outcome, seconds, who


def run_here(mutants: list[Mutant], options: argparse.Namespace) -> int:
    """Builds and runs Python and CPU faults one after the other."""
    results = Results([m.name for m in mutants])
    with tempfile.TemporaryDirectory(prefix="rat_ext_mutants_") as folder:
        workshop = Workshop(Path(folder), cuda=False)
        workshop.prepare(all(m.kind == "python" for m in mutants))
        if not options.trust:
            tests = " ".join(sorted({word for m in mutants for word in m.tests.split() if word.startswith("tests")}))
            outcome, *_ = pytest(workshop.planted(PRISTINE), tests, "cpu", 20 * options.limit)
            if outcome != "lived":
                print(f"without any fault the tests do not pass: {outcome}")
                return 2
        for mutant in mutants:
            try:
                results.add(mutant.name, *try_one(workshop.planted(mutant), mutant, options, "cpu"))
            except (Moved, RuntimeError) as error:
                results.add(mutant.name, "error", 0.0, str(error))
    return results.finish()


def archive_name(index: int) -> str:
    return f"{index:03d}.so"


def build(mutants: list[Mutant], options: argparse.Namespace) -> int:
    """One extension for each fault into options.out, beside one without."""
    options.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="rat_ext_mutants_") as folder:
        workshop = Workshop(Path(folder), options.cuda)
        workshop.prepare()
        built = []
        for mutant in [PRISTINE, *mutants]:
            begin = time.perf_counter()
            try:
                so = extension(workshop.planted(mutant))
            except (Moved, RuntimeError) as error:
                print(f"error    {mutant.name}: {error}", flush=True)
                failed = 2
                continue
            shutil.copy2(so, Path(folder) / archive_name(len(built)))
            built.append({"name": mutant.name, "tests": mutant.tests, "file": so.name})
            print(f"built    {mutant.name} ({time.perf_counter() - begin:.0f} s)", flush=True)
        (options.out / "mutants.json").write_text(json.dumps(built, indent=1) + "\n")
        # A dictionary larger than an extension finds again what they share. xz of the system uses all that a dictionary needs.
        tar = Path(folder) / "all.tar"
        with tarfile.open(tar, "w") as archive:
            for i in range(len(built)):
                archive.add(Path(folder) / archive_name(i), archive_name(i))
        compress(tar, options.out / "mutants.tar.xz")
    size = (options.out / "mutants.tar.xz").stat().st_size / 2**20
    print(f"{len(built) - 1} faults in {options.out}, {size:.0f} MiB")
    return failed


def compress(source: Path, target: Path) -> None:
    import lzma

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 256 << 20}]
    with open(source, "rb") as data, lzma.open(target, "wb", filters=filters) as out:
        shutil.copyfileobj(data, out, 1 << 24)


def run_built(folder: Path, options: argparse.Namespace) -> int:
    """Runs what `build` made, several at a time: each in a folder with the Python files, the tests and its extension."""
    built = json.loads((folder / "mutants.json").read_text())
    chosen = [(i, entry) for i, entry in enumerate(built) if i == 0 or re.search(options.only, entry["name"])]
    results = Results([entry["name"] for _, entry in chosen[1:]])
    with tempfile.TemporaryDirectory(prefix="rat_ext_mutants_") as temporary:
        with tarfile.open(folder / "mutants.tar.xz") as archive:
            archive.extractall(temporary, filter="data")

        def one(index: int, entry: dict) -> tuple[dict, str, float, str]:
            root = Path(temporary) / f"{index:03d}"
            for part in ("rat_ext", "tests"):
                shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            for part in ("pyproject.toml", "README.md"):
                shutil.copy2(ROOT / part, root / part)
            shutil.move(Path(temporary) / archive_name(index), root / "rat_ext" / entry["file"])
            if index == 0:
                tests = " ".join(sorted({w for _, e in chosen for w in e["tests"].split() if w.startswith("tests")}))
                outcome, seconds, who = pytest(root, tests, options.device, 600)
            else:
                outcome, seconds, who = try_one(
                    root, Mutant(entry["name"], "", "", "", entry["tests"]), options, options.device
                )
            shutil.rmtree(root, ignore_errors=True)
            return entry, outcome, seconds, who

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            todo = chosen[1:] if options.trust else chosen
            for done in concurrent.futures.as_completed([pool.submit(one, *item) for item in todo]):
                entry, outcome, seconds, who = done.result()
                if entry["name"] == PRISTINE.name:
                    if outcome != "lived":
                        print(f"without any fault the tests do not pass: {outcome}")
                        return 2
                    continue
                results.add(entry["name"], outcome, seconds, who)
    return results.finish()


def show(mutants: list[Mutant]) -> int:
    missing = 0
    with tempfile.TemporaryDirectory(prefix="rat_ext_mutants_") as folder:
        copy_tree(Path(folder))
        for mutant in mutants:
            problem = ""
            try:
                path = plant(mutant, Path(folder))
                shutil.copy2(ROOT / path.relative_to(folder), path)
            except Moved as error:
                problem, missing = f"  MOVED: {error}", missing + 1
            print(f"{mutant.kind:<7} {mutant.name}: {mutant.tests}{problem}")
    print(f"{len(mutants)} faults, {missing} that do not match the code")
    return 2 if missing else 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=("list", "build", "run"))
    p.add_argument("folder", nargs="?", type=Path, help="run: what build made")
    p.add_argument("--only", default="", metavar="REGEX", help="faults whose name matches")
    p.add_argument("--python", action="store_true", help="faults in Python files")
    p.add_argument("--cpu", action="store_true", help="faults in C++ that the CPU runs")
    p.add_argument("--cuda", action="store_true", help="faults in CUDA kernels and in what chooses them")
    p.add_argument("--out", type=Path, help="build: where to")
    p.add_argument("--all", action="store_true", help="where the named test passes, run the quick suite too")
    p.add_argument("--trust", action="store_true", help="do not run the tests without a fault first")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="run FOLDER: where (default: cuda)")
    p.add_argument("--jobs", "-j", type=int, default=6, help="run FOLDER: processes at a time (default: 6)")
    p.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for a test (default: 300)")
    options = p.parse_args()
    kinds = [kind for kind in ("python", "cpu", "cuda") if getattr(options, kind)]
    if not kinds:
        kinds = ["python", "cpu", "cuda"] if options.command == "list" else ["python", "cpu"]
    mutants = [m for m in MUTANTS if m.kind in kinds and re.search(options.only, m.name)]
    if options.command == "list":
        return show(mutants)
    if options.command == "build":
        if not options.out:
            p.error("build: --out is needed")
        return build([m for m in mutants if m.kind != "python"], options)
    return run_built(options.folder, options) if options.folder else run_here(mutants, options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:  # the clean tree does not build
        print(error)
        sys.exit(2)
