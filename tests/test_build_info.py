"""build_info(): what was compiled, as a dict and as text."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rat_ext

ROOT = Path(__file__).parents[1]
TOOLKIT = ROOT / "csrc" / "toolkit.py"


@pytest.fixture(scope="module")
def info():
    return rat_ext.build_info()


def test_what_is_built(info):
    assert info["version"] == rat_ext.__version__
    assert info["torch"] == torch.__version__
    major, minor = (int(n) for n in info["torch_target"].split("."))
    assert (major, minor) == (2, 11)
    assert info["head_dims"] == list(range(8, 257, 8))
    assert info["cpu_dtypes"] == ["bfloat16", "float16", "float32", "float64"]
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")
    assert info["build"] and info["compiler"]


def test_cuda_part(info):
    if info["cuda"] is None:
        assert not info["cuda_architectures"] and not info["cuda_dtypes"] and info["kernels"] is None
        assert "CPU only" in info["kernels_problem"]
    else:
        assert info["cuda_architectures"]
        assert info["cuda_dtypes"] == ["bfloat16", "float16", "float32"]
        assert (info["kernels"] is None) == (info["kernels_problem"] is not None)


def test_it_prints(info):
    text = str(info)
    assert rat_ext.__version__ in text and info["build"] in text and torch.__version__ in text
    assert info["cpu_isa"] in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_without_kernels():
    info = rat_ext.build_info(kernels=False)
    assert info["kernels"] is None and info["kernels_problem"]


@pytest.mark.gpu
def test_kernels(info):
    """Each kernel's resources, as the GPU at hand reports them."""
    assert info["device"] and info["cuda_driver"]
    assert info["kernels"], info["kernels_problem"]
    for kernel in info["kernels"]:
        assert kernel["name"] and 0 < kernel["registers"] <= 255, kernel
        assert kernel["local"] >= 0 and kernel["static_shared"] >= 0 and kernel["max_threads"] >= 32, kernel
        assert kernel["binary_version"] >= 80, kernel
    names = [kernel["name"] for kernel in info["kernels"]]
    assert len(names) == len(set(names))
    assert any("bf16" in name for name in names)
    assert names[0] in str(info)


@pytest.mark.parametrize(
    ("text", "names", "codes"),
    [
        ("8.0 9.0", ["8.0", "9.0a"], ["80,sm_80", "90a,sm_90a"]),
        ("10.0+PTX;12.0", ["10.0+PTX", "12.0"], ["100,sm_100", "100,compute_100", "100,sm_120"]),  # two chips from one PTX
        ("12.0+PTX,10.0", ["12.0+PTX", "10.0"], ["100,sm_120", "120,compute_120", "100,sm_100"]),
        ("10.0a 12.0", ["10.0a", "12.0"], ["100a,sm_100a", "120,sm_120"]),  # that of 10.0a is for 10.0 alone
        ("10.0 12.0a", ["10.0", "12.0a"], ["100,sm_100", "120a,sm_120a"]),
        ("7.5 12.0", ["12.0"], ["120,sm_120"]),
    ],
)
def test_architectures(text, names, codes):
    flags = [f"-gencode=arch=compute_{code.replace(',', ',code=')}" for code in codes]
    assert runpy.run_path(str(TOOLKIT))["architectures"](text) == (names, flags)


def test_a_kernel_in_two_objects(tmp_path):
    """tools/check_stubs.py finds a kernel template that two files instantiate under one name."""

    def run(*kernels):
        report = tmp_path / "report.json"
        report.write_text(json.dumps([dict(zip(("symbol", "arch", "source"), kernel, strict=True)) for kernel in kernels]))
        command = [sys.executable, str(ROOT / "tools" / "check_stubs.py"), str(report)]
        return subprocess.run(command, capture_output=True, text=True)

    one = [("_Zf", "sm_80", "a.cu"), ("_Zf", "sm_90a", "a.cu"), ("_Zg", "sm_80", "b.cu")]
    assert run(*one).returncode == 0
    both = run(*one, ("_Zf", "sm_80", "b.cu"))
    assert both.returncode and "_Zf: a.cu, b.cu" in both.stdout and "1 kernels" in both.stderr
