"""bench/study.py in small: every part, its JSON and its page."""

import json
import sys
from pathlib import Path

import pytest
from train_helper import launch

pytest.importorskip("transformers", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.is_dir(), reason="no benches beside the tests")
def test_the_study(tmp_path):
    (tmp_path / "text").mkdir()
    for i, file in enumerate(sorted(Path(json.__file__).parent.parent.glob("*.py"))[:80]):
        (tmp_path / "text" / f"{i}.py").write_text(file.read_text())
    out = tmp_path / "study.json"
    found = launch(str(BENCH / "study.py"), "--quick", "--device", "cpu", "--text", str(tmp_path / "text"), "--out", str(out))
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads(out.read_text())
    names = ["rat L=16", "rat L=64", "attention", "rnn", "rat-swa", "attention-swa"]
    assert list(result["language"]) == list(result["recall"]) == names
    assert all(0 < model["bits_per_byte"] < 9 and len(model["curve"]) == 4 for model in result["language"].values())
    assert set(result["long"]) == {"rat L=16", "attention"} and result["step"]["ratio"] > 0
    sys.path.insert(0, str(BENCH))
    try:
        import study
    finally:
        sys.path.remove(str(BENCH))
    study.report(result, tmp_path / "STUDY.md")
    page = (tmp_path / "STUDY.md").read_text()
    for name in ("study-tokens.png", "study-seconds.png", "study-recall.png"):
        assert name in page and (tmp_path / "images" / name).exists()
    assert all(f"| {name} |" in page for name in names)
