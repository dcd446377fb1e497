"""build_info(): what was compiled, as a dict and as text."""

import pytest
import torch

import rat_ext


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
