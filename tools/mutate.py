"""Draws small faults at random, plants each in a copy of the tree and sees whether the tests that concern it notice.

    python tools/mutate.py --seed 7 --count 40            # 40 fresh faults: 32 in Python, 8 in C++ of the CPU
    python tools/mutate.py --seed 7 --count 40 --list     # which they are, and nothing runs
    python tools/mutate.py --seed 7 --count 20 --cpp 0 --only 'cache|rotary'

tools/planted.py holds chosen faults, each with its test; these are drawn from the code as it stands: < for <=, + for -, a
number off by one, an argument dropped or swapped with its neighbour, a statement left out, a branch turned round, a cast or
a copy left out, k for v. One seed draws the same faults as long as the code stays as it is.

A fault that lives is printed with the line before and after. Some change nothing that can be seen (a bound that is never
reached, a faster way round): whether one does is for the reader to judge, and another draw takes its place. The others want a
test, for their kind and not for the one line. Exit status: 0 if all are caught, 1 if one lives.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mutants import PRISTINE, ROOT, Workshop, copy_tree

# Which tests concern a file, those that notice most first. The first pattern that is found in its path counts.
OPS = "attention state recurrence packed_sequences errors layers rotary laws autograd packed_projection"
DECODE = "decode decode_pool cached cache serving"
MODELS = "models models_official models_system generator"
PARALLEL = "parallel_context parallel_heads parallel_sharding parallel_models parallel_wrappers parallel_jobs"
TESTS = {
    r"rat_ext/_(flops|log|build_info)": "flops build_info explain demo",
    r"rat_ext/(__main__|__init__)": "demo docs",
    r"rat_ext/testing": "attention hypothesis rounding decode recurrence state",
    r"rat_ext/cache": "limits cache state serving decode decode_pool cached errors meta compile not_finite",
    r"rat_ext/(layers|rotary)": "limits layers rotary compile autograd docs models",
    r"rat_ext/reference": f"{OPS} cached decode chunk_attention hypothesis",
    r"rat_ext/(_autograd|_arguments|ops)": f"errors limits meta {OPS} decode cached cache opcheck compile explain "
    "chunk_attention docs serving flops",
    r"rat_ext/models/(official|__main__)": "models_official models",
    r"rat_ext/models/(generator)": "generator models models_system",
    r"rat_ext/models/": MODELS,
    r"rat_ext/parallel/(context|exchange|layout|parts|dense)": "parallel_context parallel_models parallel_heads "
    "parallel_wrappers",
    r"rat_ext/parallel/heads": "parallel_heads parallel_models parallel_sharding",
    r"rat_ext/parallel/": "parallel_sharding parallel_wrappers parallel_models parallel_heads parallel_context parallel_jobs",
    r"rat_ext/train/titan": "train_titan",
    r"rat_ext/train/prepare": "train_prepare train_run",
    r"rat_ext/train/": "train_run train_prepare train_study train_docs",
    r"rat_ext/evaluate/": "evaluate",
    r"csrc/cpu/(decode)": f"{DECODE} not_finite",
    r"csrc/cpu/(dispatch|plan)": f"{OPS} {DECODE} cpu many_chunks long_chunks not_finite hypothesis",
    r"csrc/cpu/": f"attention recurrence state cpu rounding not_finite many_chunks long_chunks laws {DECODE} packed_sequences "
    "rotary",
    r"csrc/ops/(pool|rat_decode)": f"{DECODE} errors meta",
    r"csrc/ops/": f"errors meta {OPS} {DECODE} opcheck explain chunk_attention cpu alignment",
}

# How often a file is drawn, times the root of its length.
WEIGHTS = {
    r"rat_ext/(ops|cache|layers|_arguments|_autograd|rotary|reference)\.py": 3.0,
    r"rat_ext/(models|parallel)/": 1.5,
    r"rat_ext/(train|evaluate)/": 0.7,
    r"rat_ext/(demo|testing|_version|_build_info|_log|__main__)": 0.0,
    r"csrc/cpu/": 2.0,
}

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is",
    ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.Pow: ("**", "*"),
}  # fmt: skip
PAIRS = (
    "min max", "any all", "k v", "q k", "cos sin", "begin end", "first last", "start stop", "float32 float64", "int32 int64",
    "amax amin", "maximum minimum", "zeros empty", "ones zeros", "heads groups", "num_heads num_groups", "rows columns",
    "key value", "tokens length", "lengths slots", "x gate", "before after", "left right", "mean sum", "floor ceil",
    "extend append", "rotary_cos rotary_sin", "shape stride", "before count", "rank world", "train eval",
)  # fmt: skip
OTHER = {a: b for pair in PAIRS for x, y in [pair.split()] for a, b in ((y, x), (x, y))}
WRAPPERS = {"list", "tuple", "sorted", "set", "dict", "int", "float", "bool", "abs", "reversed"}
CASTS = {"clone", "contiguous", "detach", "float", "double", "tolist", "copy", "flatten", "item", "long", "int", "t", "abs"}
OUT_OF_TIME = 77  # an exit status
MENTIONS = {"__repr__", "__str__"}


class Fault(NamedTuple):
    path: str
    line: int
    kind: str
    begin: int  # bytes of the file
    end: int
    new: str


# ---- faults of Python -------------------------------------------------------------------------------------------------


def python_faults(path: str, source: bytes) -> list[Fault]:
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]

    def begin(node: ast.AST) -> int:
        return starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]

    def end(node: ast.AST) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def text(node: ast.AST) -> str:
        return source[begin(node) : end(node)].decode()

    def fault(kind: str, node: ast.AST, new: str, first: int | None = None, last: int | None = None) -> Fault:
        return Fault(path, node.lineno, kind, begin(node) if first is None else first, end(node) if last is None else last, new)  # type: ignore[attr-defined]

    def between(kind: str, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Fault]:
        gap = source[end(left) : begin(right)].decode()
        word = re.search(rf"(?<!\w){re.escape(old)}(?!\w)" if old[0].isalpha() else re.escape(old), gap)
        if word:
            at = end(left) + len(gap[: word.start()].encode())
            yield fault(kind, right, new, at, at + len(old))

    def of(node: ast.AST) -> Iterator[Fault]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                old = {ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"}.get(type(op))
                signs = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
                yield from between("comparison", left, right, old or signs[type(op)], COMPARISONS[type(op)])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                if not any(isinstance(x, (ast.JoinedStr, ast.List, ast.Tuple)) or text(x)[0] in "\"'" for x in (left, right)):
                    yield from between("arithmetic", left, right, *ARITHMETIC[type(op)])
            case ast.BoolOp(op=op, values=[first, second, *_]):
                words = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                yield from between("and, or", first, second, *words)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield fault("sign", node, text(operand))
            case ast.Constant(value=bool()):
                yield fault("flag", node, str(not node.value))
            case ast.Constant(value=int() | float() as value):
                yield from (fault("number", node, repr(value + by)) for by in (1, -1) if value + by >= 0)
            case ast.IfExp(body=body, orelse=other):
                yield from (fault("choice", node, f"({text(x)})") for x in (body, other))
            case ast.Slice(lower=lower, upper=upper):
                yield from (fault("slice", x, "") for x in (lower, upper) if x)
            case ast.Name() if node.id in OTHER:
                yield fault("name", node, OTHER[node.id])
            case ast.Attribute() if node.attr in OTHER:
                yield fault("name", node, OTHER[node.attr], end(node) - len(node.attr))
            case ast.AugAssign(target=target, value=value):
                yield from between("assignment", target, value, source[end(target) : begin(value)].decode().strip(), "=")
        match node:
            case ast.Call(func=function, args=args, keywords=keywords):
                if isinstance(function, ast.Name) and function.id in WRAPPERS and len(args) == 1 and not keywords:
                    yield fault("wrapper", node, f"({text(args[0])})")
                if isinstance(function, ast.Attribute) and function.attr in CASTS and not args and not keywords:
                    yield fault("wrapper", node, text(function.value))
                for a, b in itertools.pairwise(args):
                    if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred) and text(a) != text(b):
                        yield fault("order", node, f"{text(b)}, {text(a)}", begin(a), end(b))
                items = sorted([*args, *keywords], key=begin)
                for item in keywords:
                    at = items.index(item)
                    if at:
                        yield fault("argument", item, "", end(items[at - 1]))
                    else:
                        yield fault("argument", item, "", None, begin(items[1]) if len(items) > 1 else None)
            case ast.If(test=test):
                yield fault("condition", node, f"not ({text(test)})", begin(test), end(test))
                if not node.orelse:
                    yield fault("condition", node, "False", begin(test), end(test))
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
                yield fault("statement", node, "pass")
            case ast.Return(value=None):
                yield fault("statement", node, "pass")
            case ast.Assign(targets=[target], value=value):
                names = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
                again = isinstance(target, ast.Name) and target.id in names
                if again or isinstance(target, (ast.Attribute, ast.Subscript)):
                    yield fault("statement", node, "pass")

    def below(node: ast.AST) -> Iterator[Fault]:
        yield from of(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
                    continue  # places inside an f-string are known from Python 3.12 on only
                if isinstance(child, ast.FunctionDef) and child.name in MENTIONS or "TYPE_CHECKING" in ast.dump(child)[:80]:
                    continue
                yield from below(child)

    return list(dict.fromkeys(f for f in below(ast.parse(source)) if source[f.begin : f.end].decode() != f.new))


# ---- faults of C++ ----------------------------------------------------------------------------------------------------

CPP = {
    "comparison": [(f" {a} ", f" {b} ") for a, b in ("< <=".split(), "<= <".split(), "> >=".split(), ">= >".split())]
    + [(" == ", " != "), (" != ", " == ")],
    "arithmetic": [(r" \+ ", " - "), (r" - ", " + "), (r" \* ", " + "), (r" / ", " * "), (r" % ", " / ")],
    "and, or": [(r" && ", " || "), (r" \|\| ", " && ")],
    "sign": [(r"(?<=\()-(?=\w)", ""), (r"!(?=\w)", "")],
    "number": [(rf"(?<![\w.]){a}(?![\w.])", b) for a, b in (("0", "1"), ("1", "2"), (r"1\.0f?", "2.0f"), (r"0\.0f?", "1.0f"))],
    "flag": [(r"\btrue\b", "false"), (r"\bfalse\b", "true")],
    "name": [(rf"(?<![\w]){a}\b(?! =)", b) for a, b in OTHER.items() if len(a) < 9],
    "assignment": [(r" \+= ", " = "), (r" \+= ", " -= "), (r" \*= ", " = ")],
    "choice": [(r" \? ([^:?]+) : [^:?;,]+(?=[;,])", r" ? \1 : \1")],
    "condition": [(r"\bif \((?!constexpr)(.*)\) (?=[{\w])", r"if (!(\1)) ")],
    "statement": [(r"(?<=  )[\w.\[\]>+-]+ [+*]?= [^;{]+;$", ";"), (r"(?<=  )[\w:<>]+\([^;{]*\);$", ";")]
    + [(r"\b(continue|break|return);", ";")],
}  # fmt: skip


def cpp_faults(path: str, source: bytes) -> list[Fault]:
    found, at = [], 0
    for number, raw in enumerate(source.splitlines(keepends=True), 1):
        line = raw.decode().rstrip("\n")
        code = line.split("//")[0].rstrip()
        fixed = re.match(r"\s*(#|template|static_assert|using|namespace|struct|class|\*|const \w+\* )", code) or '"' in code
        for kind, rules in CPP.items() if not fixed else ():
            for old, new in rules:
                for m in re.finditer(old, code):
                    first, last = len(code[: m.start()].encode()), len(code[: m.end()].encode())
                    found.append(Fault(path, number, kind, at + first, at + last, m.expand(new)))
        at += len(raw)
    return found


# ---- drawing and running ----------------------------------------------------------------------------------------------


def first(table: dict, path: str, default):
    return next((value for pattern, value in table.items() if re.search(pattern, path)), default)


def planted(fault: Fault) -> bytes:
    """The file with the fault in it."""
    source = (ROOT / fault.path).read_bytes()
    return source[: fault.begin] + fault.new.encode() + source[fault.end :]


def is_python(text: bytes) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def draw(options: argparse.Namespace) -> list[Fault]:
    """`options.count` faults: a file by its weight, then a kind, then a place: rare kinds come up as often as numbers."""
    chance = random.Random(options.seed)
    pools: dict[bool, dict[str, dict[str, list[Fault]]]] = {True: {}, False: {}}
    patterns = ("rat_ext/**/*.py", "csrc/cpu/*.inl", "csrc/cpu/*.cpp", "csrc/cpu/*.h", "csrc/ops/*.cpp", "csrc/ops/*.h")
    for path in sorted(p for pattern in patterns for p in ROOT.glob(pattern)):
        name = str(path.relative_to(ROOT))
        if first(WEIGHTS, name, 1.0) == 0 or not re.search(options.only, name) or re.search(r"kernels_|schemas|library", name):
            continue
        source = path.read_bytes()
        kinds: dict[str, list[Fault]] = {}
        for fault in (python_faults if path.suffix == ".py" else cpp_faults)(name, source):
            kinds.setdefault(fault.kind, []).append(fault)
        if kinds:
            pools[path.suffix != ".py"][name] = kinds
    chosen: list[Fault] = []
    for cpp, count in ((False, options.count - options.cpp), (True, options.cpp)):
        names = list(pools[cpp])
        weights = [first(WEIGHTS, name, 1.0) * (ROOT / name).stat().st_size ** 0.5 for name in names]
        until = len(chosen) + count
        for _ in range(100 * count if names else 0):
            kinds = pools[cpp][chance.choices(names, weights)[0]]
            fault = chance.choice(kinds[chance.choice(sorted(kinds))])
            if len(chosen) == until:
                break
            if all((fault.path, fault.line) != (o.path, o.line) for o in chosen) and (cpp or is_python(planted(fault))):
                chosen.append(fault)
    return chosen


def change(fault: Fault) -> str:
    """The lines before and after."""
    old = (ROOT / fault.path).read_bytes()
    start = old.rfind(b"\n", 0, fault.begin) + 1
    stop = old.find(b"\n", fault.end)
    after = old[start : fault.begin] + fault.new.encode() + old[fault.end : stop]
    return "\n".join(
        f"      {sign} {line}" for sign, part in (("-", old[start:stop]), ("+", after)) for line in part.decode().split("\n")
    )


def child(root: Path, tests: list[str], output: Path, limit: int, within: float) -> int:
    """In the forked process: pytest over the tests, up to the first that fails. One that hangs ends the process."""
    import pytest

    until = time.monotonic() + within

    class Alarm:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(self, item):
            if time.monotonic() > until:
                os._exit(OUT_OF_TIME)
            signal.alarm(limit)
            result = yield
            signal.alarm(0)
            return result

    os.setsid()
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(to, 1), os.dup2(to, 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)
    words = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--rootdir", str(root), *tests]
    words += ["--deselect", "tests/test_cpu.py::test_instruction_sets"]  # of which Workshop builds one
    return int(pytest.main(words, plugins=[Alarm()]))


def run(faults: list[Fault], options: argparse.Namespace, folder: Path) -> int:
    """Forks one process a fault from this one, which has imported what takes long but nothing of rat_ext."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.generation
    import transformers.modeling_utils  # noqa: F401

    torch.set_num_threads(1)
    base, suffix = folder / "base", sysconfig.get_config_var("EXT_SUFFIX")
    copy_tree(base)
    workshop = None
    if any(not f.path.endswith(".py") for f in faults):
        workshop = Workshop((options.work or folder).resolve(), cuda=False)
        workshop.prepare()
    ready = (workshop.clean if workshop else ROOT) / "rat_ext" / f"_C{suffix}"
    shutil.copy2(ready, base / "rat_ext" / ready.name)

    todo, jobs, found = list(enumerate(faults)), {}, {}
    while todo or jobs:
        while todo and len(jobs) < options.jobs:
            number, fault = todo.pop(0)
            root = folder / f"{number:03d}"
            shutil.copytree(base, root)
            (root / fault.path).write_bytes(planted(fault))
            if not fault.path.endswith(".py"):
                assert workshop
                workshop.planted(PRISTINE)
                (workshop.tree / fault.path).write_bytes(planted(fault))
                try:
                    workshop.build()
                except RuntimeError as error:
                    found[number] = f"does not compile: {str(error).strip().splitlines()[-1]}"
                    print(f"none     {fault.path}:{fault.line} {found[number]}", flush=True)
                    continue
                shutil.copy2(workshop.tree / "rat_ext" / ready.name, root / "rat_ext" / ready.name)
            tests = [f"tests/test_{word}.py" for word in first(TESTS, fault.path, OPS).split()]
            output = folder / f"{number:03d}.txt"
            pid = os.fork()
            if pid == 0:
                status = 99
                try:
                    status = child(root, [t for t in tests if (root / t).exists()], output, options.limit, options.within)
                finally:
                    os._exit(status)
            jobs[pid] = number, fault, root, output, time.perf_counter()
        if not jobs:
            break
        pid, status = os.wait()
        number, fault, root, output, began = jobs.pop(pid)
        code, said = os.waitstatus_to_exitcode(status), output.read_text(errors="replace")
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        who = failed[1] if failed else "a test hangs" if code == -signal.SIGALRM else f"ends with {code}"
        found[number] = {0: "lived", 5: "no test ran", OUT_OF_TIME: "lives"}.get(code, "caught")
        where = f"{fault.path}:{fault.line} ({fault.kind})"
        print(f"{found[number]:<8} {where:<55} {time.perf_counter() - began:4.0f} s  {who if code else ''}", flush=True)
        if found[number] != "caught" or options.show:
            print(change(fault), flush=True)
        shutil.rmtree(root, ignore_errors=True)
    caught, lived = (sum(x == word for x in found.values()) for word in ("caught", "lived"))
    print(f"seed {options.seed}: {caught} of {caught + lived} caught")
    return 1 if lived else 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--count", type=int, default=40, help="faults to draw (default: 40)")
    p.add_argument("--cpp", type=int, help="how many of them in C++ (default: a fifth)")
    p.add_argument("--only", default="", metavar="REGEX", help="files whose path matches")
    p.add_argument("--jobs", "-j", type=int, default=2, help="processes at a time (default: 2)")
    p.add_argument("--limit", type=int, default=240, metavar="S", help="seconds for one test (default: 240)")
    p.add_argument("--within", type=float, default=3600, metavar="S", help='seconds for one fault, which "lives" then')
    p.add_argument("--work", type=Path, metavar="DIR", help="keep the build without a fault there: the next call finds it")
    p.add_argument("--list", action="store_true", help="show the faults and run nothing")
    p.add_argument("--show", action="store_true", help="show the lines of faults that are caught, too")
    options = p.parse_args()
    options.cpp = options.count // 5 if options.cpp is None else options.cpp
    faults = draw(options)
    if options.list:
        for fault in faults:
            print(f"{fault.path}:{fault.line} ({fault.kind})\n{change(fault)}")
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="rat_ext_mutate_") as folder:
        return run(faults, options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
