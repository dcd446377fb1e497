"""Ranks on GPUs, over NCCL: what the tests of ranks on CPUs ask, in float32 and bfloat16; and a lost rank."""

import contextlib
import os
import signal
import time

import pytest
import ranks
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GPUS = {"RANKS_DEVICE": "cuda"}


def test_context_parallel(tmp_path):
    """By the rounding rule, every case of the CPU's."""
    found = ranks.run("test_parallel_context:compare_all", 2, tmp_path, **GPUS)
    assert found and not any(found.values()), {name: wrong for name, wrong in found.items() if wrong}


def test_packed_sequences_in_one_call(tmp_path):
    found = ranks.run("test_parallel_packed:compare_all", 2, tmp_path, **GPUS)
    assert found and not any(found.values()), {name: wrong for name, wrong in found.items() if wrong}


def test_more_sequences_than_a_grid_has_rows(tmp_path):
    assert max(ranks.run("test_parallel_packed:more_than_a_grid_has_rows", 2, tmp_path, **GPUS).values()) < 1e-5


@pytest.mark.parametrize(
    "function",
    ["context:model_of_ranks", "context:dense_on_ranks", "models:rows_over_ranks", "models:heads_over_ranks",
     "models:sharded_with_its_embedding", "heads:split_model"],
)  # fmt: skip
def test_models(tmp_path, function):
    """Differences from one GPU, of numbers around 1, in float32; bytes that were sent and texts that were generated: none."""
    if function.startswith("models"):
        pytest.importorskip("transformers", reason="rat_ext.models needs transformers: pip install 'rat_ext[models]'")
    found = ranks.run(f"test_parallel_{function}", 2, tmp_path, **GPUS)
    differences = found.values() if isinstance(found, dict) else [found]
    assert max(differences) < 1e-3, found


def test_autocast(tmp_path):
    assert ranks.run("test_parallel_context:under_autocast", 2, tmp_path, **GPUS)


def test_a_pipeline_of_layers(tmp_path):
    assert max(ranks.run("test_parallel_jobs:pipeline", 2, tmp_path, **GPUS)) < 1e-3


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_ends_the_job(tmp_path, how):
    """A transfer whose other rank is gone ends after the group's timeout, and the process with it.

    Between the two PyTorch waits four times as long as a dump of what was under way may take: a minute, if nobody sets less.
    """
    ready = tmp_path / "ready"
    settings = GPUS | {"RANKS_TIMEOUT": "20", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "500", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    settings["TORCH_FR_BUFFER_SIZE"] = "0"  # records of transfers, whose Python frames the watchdog needs the interpreter for
    job = ranks.start("test_parallel_jobs:train", 2, tmp_path, RANKS_READY=str(ready), **settings)
    try:
        begin = time.monotonic()
        while not ready.exists():
            assert time.monotonic() - begin < 90 and job.poll() is None
            time.sleep(0.05)
        left, lost = (int(pid) for pid in (tmp_path / "pids").read_text().split())
        os.kill(lost, getattr(signal, how))
        begin = time.monotonic()
        while os.path.exists(f"/proc/{left}") and "Z" not in open(f"/proc/{left}/stat").read().split()[2]:
            assert time.monotonic() - begin < 45, "it hangs"
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(lost, signal.SIGKILL)
        job.communicate(timeout=60)
        assert job.returncode == 1
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
