"""bench/decode.py in small: every kind of row, its JSON, its page and its figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="no benches beside the tests")
KINDS = {"layer step", "", "chain of 15", "draft of 4", "e4m3", "pages of 16", "exact", "pieces"}


def run(*words) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(BENCH.parent), *sys.path])}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "decode-small.json"
    run(BENCH / "decode.py", "--device", "cpu", "--quick", "--time-limit", 200, "--out", path)
    return path


def test_every_kind_of_row(result):
    rows = json.loads(result.read_text())["rows"]
    assert {row["name"].partition("T=")[0].strip() for row in rows} == KINDS
    assert all(ms > 0 for row in rows for ms in row["ms"].values())
    layer, step = rows[:2]
    assert layer["weight_bytes"] > 0 and layer["floor_ms"] > step["floor_ms"]
    assert set(layer["ms"]) == {"rat_ext", "compiled"} and set(step["ms"]) == {"rat_ext", "sdpa", "compiled"}
    pieces, exact = (next(row for row in rows if row["name"].startswith(kind)) for kind in ("pieces", "exact"))
    assert pieces["equal_bits"] and set(pieces["ms"]) == {"rat_ext", "whole", "whole, with a cache"}
    assert set(exact["ms"]) == {"rat_ext", "one step"}
    assert all("one step" in row["ms"] for row in rows if row["name"].startswith(("draft", "pages", "e4m3")))


def test_the_page(result, tmp_path):
    """Every row has a line; what is held against another call of ours has one for each."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "README.md").write_text("<!-- bench:readme --><!-- /bench -->")
    run(BENCH / "table.py", "--folder", tmp_path, "--results", result.parent)
    page = (tmp_path / "bench" / "RESULTS.md").read_text()
    for row in json.loads(result.read_text())["rows"]:
        held = len({"one step", "whole", "whole, with a cache"} & set(row["ms"]))
        assert page.count(f"| `{row['name']}` |") == held + ("floor_ms" in row), row["name"]


def test_the_figure(result, tmp_path):
    """It names the device of the JSON. Without a result on a GPU there is none."""
    pytest.importorskip("matplotlib")
    run(BENCH / "plot.py", "--results", result.parent, "--out", tmp_path)
    assert not list(tmp_path.iterdir())
    found = json.loads(result.read_text()) | {"device": "Some GPU", "device_type": "cuda"}
    sizes = "H=16 G=2 D=128 L=16"
    found["rows"] = [
        {"name": f"T={t} B={b} {sizes}", "ms": {"rat_ext": t * b * 1e-6, "sdpa": t * b * 1e-5}, "floor_ms": t * b * 1e-7}
        for t in (1024, 4096)
        for b in (1, 64)
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "decode-gpu.json").write_text(json.dumps(found))
    words = f"""import sys, pathlib; sys.path.insert(0, {str(BENCH)!r}); import plot
fig = plot.decode_figure(plot.newest("decode", pathlib.Path({str(folder)!r})), "dark")
print(fig.get_suptitle(), [len(a.lines) for a in fig.axes], [a.get_title(loc="left") for a in fig.axes])"""
    assert run("-c", words).strip() == "Some GPU [3, 3] ['1 sequence', '64 sequences']"
    run(BENCH / "plot.py", "--results", folder, "--out", tmp_path / "images")
    assert sorted(x.name for x in (tmp_path / "images").iterdir()) == ["decode-dark.png", "decode-light.png"]
