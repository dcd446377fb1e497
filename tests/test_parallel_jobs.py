"""Jobs of several processes: a pipeline of layers; a rank that dies or hangs ends the job with an error."""

import contextlib
import os
import signal
import time

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.nn import functional as F

from rat_ext.layers import RATLayer
from rat_ext.parallel import ContextParallel


def pipeline(rank: int, world: int) -> list[float]:
    """The largest difference of a gradient from that of one process, by rank."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    model = ranks.model_of(32, 64, 4, 4, 2, 8)
    tokens, targets = torch.randint(0, 32, (2, 4, 40))

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    loss(model(tokens), targets).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    stage = PipelineStage(model[rank * 3 : rank * 3 + 3 + rank], rank, world, torch.empty(0).device)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss)
    schedule.step(*([tokens] if rank == 0 else []), **({"target": targets} if rank == world - 1 else {}))
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    worst = max(float((g - want[name]).abs().max() / want[name].abs().max()) for name, g in mine.items())
    total = torch.tensor([len(mine)])
    dist.all_reduce(total)
    assert int(total) == len(want)  # each parameter on one rank
    found = [torch.zeros(1) for _ in range(world)]
    dist.all_gather(found, torch.tensor([worst]))
    return [float(x) for x in found]


def test_a_pipeline_of_layers(tmp_path):
    assert max(ranks.run("test_parallel_jobs:pipeline", 2, tmp_path)) < 1e-4


def train(rank: int, world: int) -> None:
    """Steps without an end; rank 0 tells that the first is done."""
    layer, cp = RATLayer(64, 4, 2, 8), ContextParallel(tokens=60)
    while True:
        loss = layer(torch.randn(1, cp.shard(torch.empty(1, 60)).shape[1], 64), context_parallel=cp).sum()
        loss.backward()
        float(loss.detach())  # read, as jobs do: the host of a GPU stays beside it
        if rank == 0 and not os.path.exists(os.environ["RANKS_READY"]):
            open(os.environ["RANKS_READY"], "w").close()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_ends_the_job(tmp_path, how):
    """The one that is left raises: at once where the other is gone, after the group's timeout where it only hangs."""
    timeout = 4 if how == "SIGSTOP" else 100
    job = ranks.start("test_parallel_jobs:train", 2, tmp_path, RANKS_READY=str(tmp_path / "ready"), RANKS_TIMEOUT=str(timeout))
    try:
        begin = time.monotonic()
        while not (tmp_path / "ready").exists():
            assert time.monotonic() - begin < 90 and job.poll() is None
            time.sleep(0.05)
        left, lost = (int(pid) for pid in (tmp_path / "pids").read_text().split())
        os.kill(lost, getattr(signal, how))
        begin = time.monotonic()
        while os.path.exists(f"/proc/{left}") and "Z" not in open(f"/proc/{left}/stat").read().split()[2]:
            assert time.monotonic() - begin < 60, "it hangs"
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # killed and waited for already
            os.kill(lost, signal.SIGKILL)
        _, errors = job.communicate(timeout=60)
        assert job.returncode == 1 and b"RuntimeError" in errors
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
