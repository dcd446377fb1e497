"""tools/gpu_check.py: what its hash sees, and what CI is told about the record."""

import argparse
import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "gpu_check.py"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="no tools/ beside the tests")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A tree of its own with one kernel, one list of flags and a setup.py."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").write_text(
        'int a = 1;  // one\n\n/* two\n   three */\nconst char* s = "// no comment";\n'
    )
    (tmp_path / "csrc" / "build.txt").write_text("# flags\n-O3\n")
    (tmp_path / "setup.py").write_text("FLAGS = ['-O3']  # fast\n")
    return tmp_path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("csrc/cuda/a.cu", "// one", "// another"), ("csrc/cuda/a.cu", "\n\n", "\n\n\n"),
     ("csrc/cuda/a.cu", "three", "four\nfive"), ("csrc/cuda/a.cu", "  // one", ""),
     ("csrc/build.txt", "# flags", "# all flags"), ("setup.py", "# fast", "# faster")],
)  # fmt: skip
def test_the_hash_does_not_see_comments_and_blank_lines(tool, tree, file, old, new):
    before = tool.hash_of_sources(tree)
    change(tree / file, old, new)
    assert tool.hash_of_sources(tree) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("csrc/cuda/a.cu", "a = 1", "a = 2"), ("csrc/cuda/a.cu", "// no comment", "// a comment"),
     ("csrc/cuda/a.cu", "int a", "long a"), ("csrc/build.txt", "-O3", "-O2"), ("setup.py", "-O3", "-O2")],
)  # fmt: skip
def test_the_hash_sees_code(tool, tree, file, old, new):
    before = tool.hash_of_sources(tree)
    change(tree / file, old, new)
    assert tool.hash_of_sources(tree) != before


def test_the_hash_does_not_see_what_python_keeps(tool, tree):
    before = tool.hash_of_sources(tree)
    (tree / "csrc" / "__pycache__").mkdir()
    (tree / "csrc" / "__pycache__" / "toolkit.cpython-311.pyc").write_bytes(b"\xff\x00")
    assert tool.hash_of_sources(tree) == before


def test_the_hash_sees_files(tool, tree):
    before = tool.hash_of_sources(tree)
    (tree / "csrc" / "cuda" / "a.cu").rename(tree / "csrc" / "cuda" / "b.cu")
    renamed = tool.hash_of_sources(tree)
    (tree / "csrc" / "cuda" / "c.cuh").write_text("// nothing yet\n")
    assert len({before, renamed, tool.hash_of_sources(tree)}) == 3


@pytest.mark.parametrize(
    ("text", "left"),
    [("a /* b */ c", "a   c"), ('s = "/* no */"; // yes', 's = "/* no */";'), ("c = '\"'; // yes", "c = '\"';"),
     ('R"(// kept)" // gone', 'R"(// kept)"'), ('R"x(" // kept )x" /* gone */', 'R"x(" // kept )x"'), ("1'000 // '", "1'000"),
     ('"\\\\" // gone', '"\\\\"'), ('"a\\"// b" + c', '"a\\"// b" + c')],
)  # fmt: skip
def test_comments_of_cpp(tool, text, left):
    assert tool.cpp_code(text).rstrip() == left.rstrip()


def test_the_sources_of_this_tree_keep_their_code(tool):
    """Nothing but comments goes: braces balance as before in every file."""
    for path in (ROOT / "csrc").rglob("*.cu*"):
        code = tool.code(path)
        assert code.count("{") == code.count("}") > 0 or path.suffix == ".cuh", path
        assert "/*" not in code and "\n\n" not in code, path


def record_of(tool, tree, **changes) -> Path:
    path = tree / "gpu_record.json"
    good = {"sources": tool.hash_of_sources(tree), "date": "2000-01-01", "device": "a GPU", "failed": []}
    path.write_text(json.dumps(good | changes))
    return path


def test_verify_passes(tool, tree, capsys):
    assert tool.verify(record_of(tool, tree), tree) == 0
    assert "a GPU" in capsys.readouterr().out


def test_verify_fails_where_kernels_are_newer(tool, tree, capsys):
    path = record_of(tool, tree)
    change(tree / "csrc" / "cuda" / "a.cu", "a = 1", "a = 2")
    assert tool.verify(path, tree) == 1
    said = capsys.readouterr().out.strip()
    assert "\n" not in said and "tools/gpu_check.py" in said and "2000-01-01" in said


def test_verify_fails_without_a_record_and_with_failures(tool, tree, capsys):
    assert tool.verify(tree / "none.json", tree) == 1
    assert tool.verify(record_of(tool, tree, failed=["tests/test_x.py::test_y"]), tree) == 1
    assert "test_y" in capsys.readouterr().out


def test_verify_warns_while_pending(tool, tree, capsys):
    path = record_of(tool, tree, pending="no GPU here")
    assert tool.verify(path, tree) == 0
    assert "WARNING" in (said := capsys.readouterr().out) and "no GPU here" in said
    change(tree / "csrc" / "cuda" / "a.cu", "a = 1", "a = 2")
    assert tool.verify(path, tree) == 1, "a pending record is of one state of the sources"


def test_pending_keeps_the_last_record(tool, tmp_path):
    path = tmp_path / "gpu_record.json"
    path.write_text(json.dumps({"sources": "old", "date": "2000-01-01", "failed": []}))
    assert tool.main(["--pending", " ", "--out", str(path)]) == 1
    for reason in ("first", "second"):
        assert tool.main(["--pending", reason, "--out", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["pending"] == "second" and record["last"]["sources"] == "old"
    assert tool.verify(path) == 0


def test_a_run_is_recorded(tool, tmp_path, monkeypatch, capsys):
    """A run over two files of three outcomes: counts, names of failures, skips for want of something."""
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "csrc").mkdir()
    (root / "setup.py").write_text("")
    shutil.copytree(ROOT / "rat_ext", root / "rat_ext")
    (root / "tests" / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--device')\n    parser.addoption('--shard', default='0/1')\n"
        "def pytest_collection_modifyitems(config, items):\n"
        "    k, n = config.getoption('--shard').split('/')\n    items[:] = items[int(k)::int(n)]\n"
    )
    (root / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    (root / "tests" / "test_a.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\n"
        "def test_lacks(): pytest.skip('needs 70 GiB of free GPU memory')\ndef test_other(): pytest.skip('not here')\n"
    )
    (root / "tests" / "test_b.py").write_text("import pytest\n@pytest.mark.alone\ndef test_big(): pass\n")
    monkeypatch.setattr(tool, "ROOT", root)
    monkeypatch.setattr(tool, "RECORD", root / "tests" / "gpu_record.json")
    monkeypatch.setattr(tool, "hash_of_sources", lambda: "hash")
    out = tmp_path / "record.json"
    assert tool.main(["--device", "cpu", "--jobs", "2", "--logs", str(tmp_path), "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    counts = record["families"]["auto"]["tests/test_a.py"]
    assert (counts["passed"], counts["skipped"], counts["failed"]) == (1, 2, 1)
    assert record["failed"] == ["tests/test_a.py::test_bad [auto]"]
    assert record["missing"] == {"tests/test_a.py::test_lacks [auto]": "needs 70 GiB of free GPU memory"}
    assert record["alone"]["tests/test_b.py"]["passed"] == 1
    assert "1 passed" in (tmp_path / "alone-auto.log").read_text()
    assert "FAILED: tests/test_a.py::test_bad" in capsys.readouterr().out.splitlines()[-3]


def record_of_one_file(sources: str, counts: dict, failed: list[str]) -> dict:
    """A record of one test file."""
    machine = {"device": "G", "devices": 1, "torch": "2"}
    nothing = {"alone": {}, "missing": {}, "sanitizer": {}}
    run = {"families": {"auto": {"tests/test_a.py": counts}}, "failed": failed, "date": "1", "seconds": 1}
    return {"sources": sources} | machine | nothing | run


def test_some_files_run_again(tool, tmp_path, capsys):
    """They take the place of their old counts and failures; other sources are refused."""
    counts = {"passed": 1, "skipped": 0, "failed": 1, "seconds": 1.0}
    record = record_of_one_file("a", counts, ["tests/test_a.py::test_x [auto]"])
    again = record | {"families": {"auto": {"tests/test_a.py": counts | {"passed": 2, "failed": 0}}}, "failed": [], "date": "2"}
    path, later = tmp_path / "record.json", tmp_path / "again.json"
    path.write_text(json.dumps(record))
    later.write_text(json.dumps(again | {"sources": "b"}))
    assert tool.main(["--out", str(path), "--merge", str(later)]) == 1 and json.loads(path.read_text()) == record
    assert "expected a run of the same sources" in capsys.readouterr().out
    later.write_text(json.dumps(again))
    assert tool.main(["--out", str(path), "--merge", str(later)]) == 0
    found = json.loads(path.read_text())
    assert found["failed"] == [] and found["families"]["auto"]["tests/test_a.py"]["passed"] == 2
    assert found["again"] == {"tests/test_a.py [auto]": "2"} and found["date"] == "1"


def test_a_file_that_skips_itself_counts_once_under_its_own_name(tool, tmp_path):
    """Every process collects it, and pytest reports no class for it."""
    whole = '<testcase classname="" name="tests.test_titan" time="0"><skipped message="no torchtitan"/></testcase>'
    case = '<testcase classname="tests.test_ops" name="test_{}" time="1.0">{}</testcase>'
    jobs = []
    for number, inside in enumerate(["", '<skipped message="needs 2 GPUs"/>', '<failure message="wrong"/>']):
        report = tmp_path / f"{number}.xml"
        report.write_text(f"<testsuites><testsuite>{whole}{case.format(number, inside)}</testsuite></testsuites>")
        jobs.append(tool.Job(f"part-{number}", "auto", []))
        jobs[-1].read(report)
    assert tool.by_file(jobs) == {
        "tests/test_ops.py": {"passed": 1, "skipped": 1, "failed": 1, "seconds": 3.0},
        "tests/test_titan.py": {"passed": 0, "skipped": 1, "failed": 0, "seconds": 0.0},
    }
    assert jobs[1].missing == {"tests/test_ops.py::test_1 [auto]": "needs 2 GPUs"}
    assert jobs[2].failures == ["tests/test_ops.py::test_2 [auto]"]


def test_a_process_that_is_cut_off_has_told_what_it_ran(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # or its start takes seconds, and more beside others
    options = argparse.Namespace(jobs=1, device="cpu", slow=False, logs=None, limit=20.0)
    own = "def pytest_addoption(parser):\n    parser.addoption('--device')\n"
    (tmp_path / "conftest.py").write_text(own)
    tests = "import time\n\n\ndef test_quick():\n    pass\n\n\ndef test_endless():\n    time.sleep(600)\n"
    (tmp_path / "test_two.py").write_text(tests)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as where all of this runs in the background of a shell
    try:
        tool.let_processes_be_interrupted()
        job = tool.Job("part", "auto", ["test_two.py"]).run("", options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert job.files["test_two.py"]["passed"] == 1
    assert "part [auto]: over 20 s" in job.failures


def test_failures_without_a_device_run_again_here(tool, tree, monkeypatch, capsys):
    """Those that pass are no failures any more, and the record says so; what uses a device, or fails here too, stays."""
    (tree / "tests").mkdir()
    (tree / "tests" / "conftest.py").write_text("import pytest\n\n\n@pytest.fixture\ndef device():\n    return 1\n")
    (tree / "tests" / "test_a.py").write_text(
        "def test_good():\n    pass\n\n\ndef test_bad():\n    assert False\n\n\ndef test_gpu(device):\n    pass\n"
    )
    monkeypatch.setattr(tool, "ROOT", tree)
    counts = {"passed": 0, "skipped": 0, "failed": 3, "seconds": 1.0}
    names = [f"tests/test_a.py::test_{name} [auto]" for name in ("good", "bad", "gpu")]
    record = record_of_one_file(tool.hash_of_sources(tree), counts, names)
    path = tree / "record.json"
    path.write_text(json.dumps(record))
    assert tool.main(["--out", str(path), "--here"]) == 1
    found = json.loads(path.read_text())
    assert found["failed"] == names[1:] and list(found["without_gpu"]) == names[:1]
    assert (found["families"]["auto"]["tests/test_a.py"]["passed"], found["families"]["auto"]["tests/test_a.py"]["failed"]) == (
        1,
        2,
    )
    out = capsys.readouterr().out
    assert f"{names[1]}: fails here too" in out and f"{names[2]}: left, it uses a device" in out
    path.write_text(json.dumps(record | {"sources": "b"}))
    assert tool.main(["--out", str(path), "--here"]) == 1 and json.loads(path.read_text())["failed"] == names
