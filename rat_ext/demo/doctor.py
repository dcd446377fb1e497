"""``python -m rat_ext doctor``: what a bug report needs, in one paste. Nothing here may fail: what does is an answer.

So no import at the top needs torch or the compiled part, and each answer is asked for alone.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from .._version import __version__

VARIABLES = ("CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "MAX_JOBS")


def ask(question: Callable[[], str]) -> str:
    """The answer, or the error in its place."""
    try:
        return question()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _output(*command: str) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if found.returncode:
        raise RuntimeError(f"{command[0]} ends with {found.returncode}: {(found.stderr or found.stdout).strip()[:200]}")
    return found.stdout.strip()


def processor() -> str:
    """The CPU's name, and the threads that torch uses."""
    name = platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    import torch

    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _driver() -> str:
    if shutil.which("nvidia-smi"):
        query = _output("nvidia-smi", "--query-gpu=driver_version,name,memory.total,mig.mode.current", "--format=csv,noheader")
        return "; ".join(query.splitlines()) or "nvidia-smi names no GPU"
    version = Path("/proc/driver/nvidia/version")
    return version.read_text().splitlines()[0] if version.exists() else "none: neither nvidia-smi nor /proc/driver/nvidia"


def _toolkit() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None:
        return f"none: no nvcc {'in CUDA_HOME=' + home if home else 'on PATH'}"
    release = [line for line in _output(nvcc, "--version").splitlines() if "release" in line]
    return f"{nvcc}: {release[0].strip() if release else 'no release in its --version'}"


def _torch() -> str:
    import torch

    cuda = torch.version.cuda
    return f"{torch.__version__}, {'for CUDA ' + cuda if cuda else 'without CUDA'}, {Path(torch.__file__).parent}"


def _gpu() -> str:
    import torch

    if not torch.version.cuda:
        return "none that torch could use: it is built without CUDA"
    if not torch.cuda.is_available():
        torch.cuda.init()  # says why
    described = []
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        described.append(f"{of.name}, {of.major}.{of.minor}, {of.multi_processor_count} SMs, {of.total_memory / 2**30:.0f} GiB")
    return "; ".join(described)


def _build() -> str:
    from .._build_info import build_info

    return str(build_info(kernels=False))


def _environment() -> str:
    found = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("RAT_EXT_") or k in VARIABLES]
    return "; ".join(found) or "nothing of note"


def _devices() -> str:
    import torch

    from .._build_info import build_info

    return "cpu cuda" if build_info(kernels=False)["cuda"] and torch.cuda.is_available() else "cpu"


def _families(device: str) -> str:
    """Which kernels a typical call of rat_attention takes, and why."""
    import torch

    import rat_ext

    explain = getattr(rat_ext, "explain", None)
    if explain is None:
        return "this build does not tell"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def x(heads: int) -> torch.Tensor:
        return torch.empty(2, 4096, heads, 128, device=device, dtype=dtype, requires_grad=True)

    rows = explain(x(2), x(2), x(16), x(16), 16, out_gate=x(16))
    call = f"rat_attention, {str(dtype).removeprefix('torch.')}, B=2 T=4096 H=16 G=2 D=128 L=16"
    return "\n".join([call, *(f"{row['phase']}: {row['family']}, {row['why']}" for row in rows)])


def _agrees(device: str) -> str:
    """A small forward and backward against the definition."""
    import torch

    from ..testing import attention_case, check

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    check(attention_case(device, dtype, tokens=40, return_state=True))
    return AGREES


AGREES = "agrees with the definition"


def report() -> Iterator[tuple[str, str]]:
    """Names and answers; an answer may have several lines."""
    yield "rat_ext", f"{__version__}, {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", ask(lambda: f"{platform.platform()}, {' '.join(platform.libc_ver())}")
    yield "CPU", ask(processor)
    yield "driver", ask(_driver)
    yield "toolkit", ask(_toolkit)
    yield "torch", ask(_torch)
    yield "GPU", ask(_gpu)
    yield "variables", ask(_environment)
    yield "build", ask(_build)
    devices = ask(_devices)
    if not devices.startswith("cpu"):
        yield "check", f"none, rat_ext does not load: {devices}"
        return
    for device in devices.split():
        yield f"{device} takes", ask(partial(_families, device))
        yield f"{device} check", ask(partial(_agrees, device))


def run(stream: TextIO) -> dict:
    """Prints the report, as it comes. ``ok``: every check agreed."""
    answers = {}
    for name, answer in report():
        answers[name] = answer
        for i, line in enumerate(answer.splitlines() or [""]):
            print(f"{'' if i else name:<11}{line}", file=stream, flush=True)
    return {"answers": answers, "ok": all(answer == AGREES for name, answer in answers.items() if name.endswith("check"))}
