"""What the documentation shows, runs."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rat_ext

README = Path(__file__).parents[1] / "README.md"
CHECKPOINT = Path(__file__).parent / "data" / "official_rat.pth"
MODULES = sorted(m.name for m in pkgutil.iter_modules(rat_ext.__path__) if m.name not in ("_C", "__main__"))
MODULES += ["models.config"]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    if module.startswith("models"):
        pytest.importorskip("transformers", reason="rat_ext.models needs transformers")
    found = importlib.import_module(f"rat_ext.{module}")
    torch.manual_seed(0)
    failed, _ = doctest.testmod(found, verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not failed


def test_the_ops_have_examples():
    for op in ("rat_attention", "rat_attention_packed", "rat_decode_step"):
        assert ">>>" in inspect.getdoc(getattr(rat_ext, op)), op


@pytest.mark.parametrize("name", rat_ext.__all__)
def test_public_names_are_documented(name):
    value = getattr(rat_ext, name)
    if callable(value):
        assert inspect.getdoc(value)
        if inspect.isclass(value):
            for attribute, member in vars(value).items():
                if not attribute.startswith("_") and callable(member):
                    assert inspect.getdoc(member), f"{name}.{attribute}"


@pytest.mark.parametrize("op", ["rat_attention", "chunk_attention", "chunk_recurrence", "rat_decode_step"])
def test_the_reference_has_the_same_arguments(op):
    """The oracle is called as the op is: names, order and defaults. It knows one rank."""
    from rat_ext import reference

    mine = dict(inspect.signature(getattr(rat_ext, op)).parameters)
    mine.pop("context_parallel", None)
    theirs = inspect.signature(getattr(reference, op)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in theirs.values()):
        theirs = {key: p for key, p in theirs.items() if p.kind is not p.VAR_KEYWORD}
        mine = dict(list(mine.items())[: len(theirs)])
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [(p.name, p.default, p.kind) for p in theirs.values()]


def pages() -> list[Path]:
    root = README.parent
    return [page for page in (README, root / "CONTRIBUTING.md", *sorted(root.glob("docs/*.md"))) if page.exists()]


def blocks() -> list[tuple[str, str]]:
    """(name, code) of every Python block of the documentation."""
    found = []
    for page in pages():
        code = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        found += [(f"{page.name}-{i + 1}", text) for i, text in enumerate(code)]
    return found


def commands() -> list[str]:
    """Lines of the documentation's shell blocks that run the models' command."""
    text = "".join(page.read_text() for page in pages())
    return re.findall(r"^python -m rat_ext\.models .*$", text, re.MULTILINE)


@pytest.mark.skipif(not README.exists(), reason="no README beside the tests")
def test_the_readme_has_examples():
    assert sum(name.startswith("README.md") for name, _ in blocks()) >= 2


@pytest.mark.parametrize(("name", "code"), blocks(), ids=[name for name, _ in blocks()])
def test_documented_example(name, code, tmp_path, monkeypatch):
    """Each block runs by itself, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    if "rat_ext.models" in code:
        pytest.importorskip("transformers", reason="rat_ext.models needs transformers")
    if "from peft" in code:
        pytest.importorskip("peft", reason="the example needs peft")
    if "checkpoint.pth" in code:
        shutil.copy(CHECKPOINT, "checkpoint.pth")
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("line", commands(), ids=lambda line: " ".join(line.split()[2:4]))
def test_documented_command(line, tmp_path):
    """Each line runs as a reader would type it, beside a checkpoint."""
    pytest.importorskip("transformers", reason="rat_ext.models needs transformers")
    shutil.copy(CHECKPOINT, tmp_path / "checkpoint.pth")
    environment = os.environ | {"PYTHONPATH": str(README.parent)}
    command = [sys.executable, *shlex.split(line)[1:]]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    """Links to files, and paths in backticks that begin with a folder of the repository."""
    root, text = README.parent, page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    missing = [target for target in links if not (page.parent / target).exists()]
    paths = re.findall(r"`((?:csrc|rat_ext|tests|bench|tools|docs|attention|recurrence|ptx|device|host)/[\w./]*)`", text)
    bases = (root, root / "csrc" / "cuda")
    missing += [path for path in paths if not any((base / path).exists() for base in bases)]
    assert not missing
