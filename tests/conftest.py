"""Options, markers and the state that every test runs under: NaN in fresh memory, fixed seeds."""

from __future__ import annotations

import os
import re

# Processes side by side share the cores, but each keeps two threads: what threads do together is tested too. Nobody spins.
if (_processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, len(os.sched_getaffinity(0)) // _processes)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# cuBLAS is asked for deterministic results below, and reads this once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

import rat_ext

_COMMON = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("quick", max_examples=20, derandomize=True, database=None, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=500, print_blob=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors of the tests live")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--shard", metavar="K/N", help="every N-th test alone, from number K on: to share the tests among processes"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Of ``-n auto``: a process for each core, as far as memory goes; some take 3 GB."""
    with open("/proc/meminfo") as file:
        free = int(re.search(r"MemAvailable:\s+(\d+)", file.read())[1]) >> 20
    return max(1, min(len(os.sched_getaffinity(0)), free // 3, 32))


def pytest_configure(config):
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")


def pytest_report_header(config):
    info = rat_ext._C.build_info(kernels=False)
    forced = {key: value for key, value in os.environ.items() if key.startswith("RAT_EXT_")}
    where = torch.cuda.get_device_name() if config.getoption("--device") == "cuda" else f"CPU, {info['cpu_isa']}"
    return f"rat_ext {rat_ext.__version__} on {where}, torch {torch.__version__}, forced: {forced or 'nothing'}"


# The longest test of all: begun last, it would run while other processes have nothing left.
FIRST = ("test_train_docs.py",)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in FIRST)
    if shard := config.getoption("--shard"):
        first, step = (int(n) for n in shard.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step != first])
        items[:] = items[first::step]
    reasons = {}
    if config.getoption("--device") != "cuda":
        reasons["gpu"] = "needs a GPU: run with --device cuda"
    if not config.getoption("--slow"):
        reasons["slow"] = "takes minutes: run with --slow"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _float64_is_for_the_cpu(request):
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if request.config.getoption("--device") == "cuda" and torch.float64 in [
        value for value in params.values() if isinstance(value, torch.dtype)
    ]:
        pytest.skip("the ops take float64 on the CPU only")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty and the allocations of the ops return NaN (bytes: all bits set, which is NaN in every float)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def plain_memory(_poisoned_memory):
    """Filling what is about to be written costs seconds at large sizes, and memory traffic that hides races."""
    torch.utils.deterministic.fill_uninitialized_memory = False
