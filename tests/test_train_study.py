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

    def run(*words):
        words = ("--quick", "--device", "cpu", *(str(word) for word in words))
        found = launch(str(BENCH / "study.py"), *words)
        assert found.returncode == 0, found.stderr[-3000:]

    run("--text", tmp_path / "text", "--out", out)
    result = json.loads(out.read_text())
    names = ["rat L=16", "attention", "rat-swa", "attention-swa", "rat L=64", "rnn"]
    assert list(result["language"]) == list(result["recall"]) == names
    assert all(0 < model["bits_per_byte"] < 9 and len(model["curve"]) == 4 for model in result["language"].values())
    assert set(result["long"]) == {"rat L=16", "attention"} and result["step"]["ratio"] > 0
    # Text that is prepared before, a fixed number of tokens, and the other parts of the first run.
    run("--text", tmp_path / "text", "--prepare", tmp_path / "kept", "--processes", 1)
    later = tmp_path / "later.json"
    run("--data", tmp_path / "kept", "--tokens", "2100", "--parts", "language", "--merge", out, "--out", later)
    second = json.loads(later.read_text())
    assert second["tokens"] == 2048 and len(second["language"]["rnn"]["curve"]) == 2
    assert all(second[part] == result[part] for part in ("long", "step", "recall"))
    assert second["origin"]["recall"]["date"] == result["date"] and second["origin"]["language"]["date"] == second["date"]
    sys.path.insert(0, str(BENCH))
    try:
        import study
    finally:
        sys.path.remove(str(BENCH))
    stopped = {"failed": "stopped after 9 s", **dict.fromkeys(("bits_per_byte", "memory_gb")), "curve": []}
    cut = second | {"language": second["language"] | {"rnn": stopped}, "step": {"failed": "no time left"}}
    again = study.merged(cut, result)
    assert again["step"] == result["step"] and again["language"]["rnn"] == stopped
    study.report(again, tmp_path / "cut" / "STUDY.md")
    page = (tmp_path / "cut" / "STUDY.md").read_text()
    assert "language of rnn: stopped after 9 s" in page and "nan" not in page
    study.report(result, tmp_path / "STUDY.md")
    page = (tmp_path / "STUDY.md").read_text()
    for name in ("study-tokens.png", "study-seconds.png", "study-recall.png"):
        assert name in page and (tmp_path / "images" / name).exists()
    assert all(f"| {name} |" in page for name in names)
