"""The driver of compute-sanitizer: its cases have names, and one of them runs alone. tools/gpu_check.py runs them all."""

import pytest
import sanitize


def test_names_are_of_one_case_each():
    names = [name for name, _ in sanitize.cases()]
    assert len(set(names)) == len(names)


def test_one_case_runs(device, capsys):
    sanitize.main([str(device), "--only", "^rat_decode_step float32 dim=24 "])
    assert capsys.readouterr().out == f"1 cases ran on {device}\n"


def test_list_runs_nothing(capsys):
    sanitize.main(["nowhere", "--only", "chunk_attention", "--list"])
    assert all(line.startswith("chunk_attention ") for line in capsys.readouterr().out.splitlines())


def test_no_case_is_an_error(capsys):
    with pytest.raises(SystemExit):
        sanitize.main(["--only", "no such case"])
    assert "no case matches 'no such case'" in capsys.readouterr().err
