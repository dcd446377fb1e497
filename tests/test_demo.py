"""``python -m rat_ext``: arguments, what is refused before the work, the check, the report of the doctor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rat_ext
from rat_ext import __main__ as command
from rat_ext.demo import check, doctor
from rat_ext.demo.console import Console
from rat_ext.testing import attention_case


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, which finds this package."""
    environment = os.environ | {"PYTHONPATH": str(Path(rat_ext.__file__).parents[1])} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_parts():
    assert command.parse([]).parts == ["info", "check", "train", "time"]
    assert command.parse(["time", "info"]).parts == ["info", "time"]
    assert command.parse(["doctor"]).parts == ["doctor"]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command.parse(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bogus"], "unknown part 'bogus'"),
        (["doctor", "time"], "doctor stands alone"),
        (["--train-seconds", "0"], "--train-seconds: expected more than 0, got 0.0"),
        (["--train-seconds", "nan"], "--train-seconds: expected more than 0, got nan"),
        (["--train-seconds", "inf"], "--train-seconds: expected more than 0, got inf"),
        (["--out", "plot"], "--out: expected a name that ends in .png, .pdf, .svg, got 'plot'"),
    ],
)
def test_wrong_arguments(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize("option", ["--json", "--out"])
def test_paths_are_tried_before_the_work(capsys, tmp_path, option):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert f"argument {option}: cannot write {str(folder)!r}: Is a directory" in refused(capsys, option, str(folder))
    absent = tmp_path / "absent" / "x.png"
    assert f"argument {option}: no folder {absent.parent}" in refused(capsys, option, str(absent))
    assert "File name too long" in refused(capsys, option, str(tmp_path / ("x" * 300 + ".png")))
    assert "null byte" in refused(capsys, option, str(tmp_path / "\0.png"))
    there, new = tmp_path / "there.png", tmp_path / "new.png"
    there.write_text("kept")
    for path in (there, new):
        command.parse([option, str(path)])
    assert there.read_text() == "kept" and not new.exists()


def test_a_disk_that_fills_up(capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    assert command.main(["info", "--json", "/dev/full", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "python -m rat_ext: argument --json: cannot write '/dev/full': No space left on device\n"


def piped(words: str, **options) -> subprocess.CompletedProcess:
    """``python -m rat_ext`` by a shell; what it prints on the two streams, as far as it reaches us."""
    environment = os.environ | {"PYTHONPATH": str(Path(rat_ext.__file__).parents[1]), "PYTHON": sys.executable}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse passes over what fails at once
    line = words.replace("rat_ext", '"$PYTHON" -m rat_ext', 1)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("rat_ext doctor > /dev/full", "No space left on device"),
        ("rat_ext info --device cpu > /dev/full", "No space left on device"),
        ("rat_ext info --device cpu --json - > /dev/full", "No space left on device"),
        ("rat_ext --help > /dev/full", "No space left on device"),
        ("rat_ext doctor | true", "Broken pipe"),
        ("rat_ext info --device cpu --json - | true", "Broken pipe"),
    ],
)
def test_an_output_that_cannot_be_written(words, why):
    """One line and an exit status; no traceback, nothing that Python adds at its end."""
    if "/dev/full" in words and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = piped(words)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert said[-1] == f"python -m rat_ext: cannot write what it prints: {why}"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("stream", ["1>&-", "2>&-"])
def test_a_closed_stream(stream):
    done = piped(f"rat_ext info --device cpu {stream}")
    assert done.returncode == 2
    # Where stderr is closed, the line goes to what print() takes without a file.
    assert (done.stderr + done.stdout).strip() == "python -m rat_ext: stdout and stderr: expected both open, got one closed"


def test_a_full_stderr():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    assert piped("rat_ext info --device cpu --json - 2> /dev/full").returncode == 2


def test_info_for_machines(capsys):
    assert command.main(["info", "--json", "-", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert results["ok"] and results["info"]["version"] == rat_ext.__version__
    assert rat_ext.build_info(kernels=False)["compiler"] in captured.err


def test_the_check_finds_a_wrong_op(monkeypatch, device):
    """One case right, then with each phase's op off by a thousandth or not finite."""
    case = attention_case(device, torch.float32, tokens=60, return_state=True)
    assert [row["phase"] for row in check.check_case(case)] == ["forward", "backward", "prefill", "decode"]
    assert all(row["ok"] for row in check.check_case(case))
    right = {"rat_attention": check.rat_attention, "rat_decode_step": check.rat_decode_step}

    def off(name, factor):
        def op(*args, **options):
            result = right[name](*args, **options)
            return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor

        return op

    for factor in (1.001, float("nan")):
        monkeypatch.setattr(check, "rat_decode_step", off("rat_decode_step", factor))
        assert [row["phase"] for row in check.check_case(case) if not row["ok"]] == ["decode"]
        monkeypatch.undo()
        monkeypatch.setattr(check, "rat_attention", off("rat_attention", factor))
        wrong = check.check_case(case)
        assert [row["ok"] for row in wrong] == [False] * 4
        monkeypatch.setattr(check, "cases", lambda device: {"a": case})
        assert check.run(Console(open(os.devnull, "w")), device)["ok"] is False
        monkeypatch.undo()


def test_the_cases_of_the_check(device):
    named = check.cases(device)
    assert {case.dtype for case in named.values()} >= {torch.float32, torch.bfloat16, torch.float16}
    assert any(case.chunk_size == 1 for case in named.values()) and any("cu_seqlens" in c.options for c in named.values())


# ---- what stands in the way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["info", "time"])
def test_a_wrong_variable_is_one_line(part, tmp_path):
    found = run("-m", "rat_ext", part, "--out", str(tmp_path / "x.png"), RAT_EXT_CPU_ISA="bogus")
    assert found.returncode == 2 and not found.stdout
    (line,) = found.stderr.splitlines()
    assert line.startswith("python -m rat_ext: rat_ext: RAT_EXT_CPU_ISA: expected") and "got 'bogus'" in line


def test_an_import_still_raises():
    """Only the command turns an error into a line: a program that imports the package gets the exception."""
    found = run("-c", "import rat_ext", "rat_ext", RAT_EXT_CPU_ISA="bogus")
    assert found.returncode == 1 and found.stderr.splitlines()[-1].startswith("ValueError: rat_ext: RAT_EXT_CPU_ISA: expected")


def test_without_the_extras(tmp_path):
    """No progress bar and no plot, but every number; one line says what to install."""
    code = f"""
import dataclasses, sys
sys.modules |= dict.fromkeys(("tqdm", "matplotlib", "numpy"))
from rat_ext.demo import time
time.SIZES["cpu"] = dataclasses.replace(time.SIZES["cpu"], lengths=(64,), budget=0.01)
from rat_ext.__main__ import main
sys.exit(main(["time", "--device", "cpu", "--out", {str(tmp_path / "x.png")!r}]))
"""
    found = run("-W", "ignore", "-c", code)
    assert found.returncode == 0, found.stderr
    (line,) = (line for line in found.stdout.splitlines() if "rat_ext[demo]" in line)
    assert line.startswith("no plot: matplotlib is not installed")
    assert "Traceback" not in found.stderr


def test_without_transformers():
    """No model; one line says what to install."""
    code = """
import sys
sys.modules["transformers"] = None
from rat_ext.__main__ import main
sys.exit(main(["train", "--device", "cpu", "--train-seconds", "1"]))
"""
    found = run("-W", "ignore", "-c", code)
    assert found.returncode == 0, found.stderr
    (line,) = (line for line in found.stdout.splitlines() if "rat_ext[models]" in line)
    assert line.startswith("no model: transformers is not installed")
    assert "Traceback" not in found.stderr and "text:" not in found.stdout


def test_train():
    """It learns, writes, and its steps agree with its forward."""
    pytest.importorskip("transformers", reason="rat_ext.models needs transformers")
    found = run("-W", "ignore", "-m", "rat_ext", "train", "--device", "cpu", "--train-seconds", "2", "--json", "-")
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)["train"]
    assert results["ok"] and len(results["text"]) == 300 and results["losses"][-1]["bits"] < results["losses"][0]["bits"]


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor():
    found = run("-m", "rat_ext", "doctor", "--json", "-")
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    answers = results["answers"]
    assert results["ok"] and answers["cpu check"] == doctor.AGREES
    assert torch.__version__ in answers["torch"] and rat_ext.__version__ in answers["rat_ext"]
    for name in ("python", "system", "CPU", "driver", "toolkit", "GPU", "variables", "build", "cpu takes"):
        assert answers[name]
    assert all(any(line in printed for printed in found.stderr.splitlines()) for line in answers["build"].splitlines())


def test_doctor_of_a_package_that_does_not_load():
    found = run("-m", "rat_ext", "doctor", RAT_EXT_CPU_ISA="bogus")
    assert found.returncode == 1 and not found.stderr
    assert "RAT_EXT_CPU_ISA=bogus" in found.stdout
    assert "rat_ext does not load: ValueError: rat_ext: RAT_EXT_CPU_ISA: expected" in found.stdout


@pytest.mark.parametrize("broken", ["torch.cuda.is_available", "torch.get_num_threads", "subprocess.run", "platform.platform"])
def test_doctor_never_fails(monkeypatch, broken):
    """Whatever raises becomes the answer."""

    def raises(*args, **options):
        raise OSError("broken\nin two lines")

    monkeypatch.setattr(broken, raises)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/false")
    monkeypatch.setattr(doctor, "_agrees", lambda device: doctor.AGREES)
    answers = dict(doctor.report())
    if broken != "torch.cuda.is_available" or torch.version.cuda:
        assert any("OSError: broken in two lines" in answer for answer in answers.values())
    assert answers["build"] and [name for name in answers if name.endswith("check")]


def test_doctor_with_a_wrong_op(monkeypatch):
    right = rat_ext.rat_attention

    def wrong(*args, **options):
        y, state = right(*args, **options)
        return 1.01 * y, state

    monkeypatch.setattr(rat_ext, "rat_attention", wrong)
    answer = doctor.ask(lambda: doctor._agrees("cpu"))
    assert answer.startswith("AssertionError: ") and "is over" in answer


def test_doctor_is_not_well_with_a_wrong_op(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_agrees", lambda device: "AssertionError: y is over")
    assert not doctor.run(sys.stdout)["ok"]
    assert "cpu check  AssertionError: y is over\n" in capsys.readouterr().out


def test_doctor_tells_the_families(monkeypatch):
    rows = [{"phase": "forward", "family": "simd", "why": "the only one"}]
    monkeypatch.setattr(rat_ext, "explain", lambda q, k, v, gate, chunk_size, *, out_gate: rows, raising=False)
    text = doctor._families("cpu")
    assert text.splitlines()[1] == "forward: simd, the only one"
    monkeypatch.delattr(rat_ext, "explain")
    assert doctor._families("cpu") == "this build does not tell"
