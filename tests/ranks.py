"""What the tests of several processes share: ranks, and what they are told to do.

Run as a program, ``python ranks.py FUNCTION WORLD FOLDER``, it forks the ranks: torch is imported once. FUNCTION,
``module:name``, is run by every rank with (rank, world); rank 0's result is written to FOLDER. With RANKS_DEVICE=cuda each rank
has a GPU, on which its tensors lie, and NCCL in place of gloo; only the ranks import rat_ext then. Else they see no GPU: FSDP2
would move weights to it. :func:`run` without variables forks the program itself, too, from one parent for all tests.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from forks import Parent
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
KIND = os.environ.get("RANKS_DEVICE", "cpu")
EXACT = torch.float64 if KIND == "cpu" else torch.float32  # the ops take float64 on the CPU only
if KIND == "cpu":
    importlib.import_module("rat_ext.layers")  # once, for all ranks


def start(function: str, world: int, folder: Path, **environment: str) -> subprocess.Popen:
    """A process whose children are the ranks; their numbers are in ``folder / "pids"``."""
    path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    hidden = {} if environment.get("RANKS_DEVICE", KIND) != "cpu" else {"CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | hidden | environment
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", __file__, function, str(world), str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True)


@functools.cache
def parent() -> Parent:
    """Of ranks on the CPU; no thread of OpenMP may start in it."""
    return Parent("torch", "ranks", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def run(function: str, world: int, folder: Path, timeout: float = 180, **environment: str):
    """Runs ``module:name`` on all ranks; returns rank 0's result."""
    if KIND == "cpu" and not environment:
        folder.mkdir(parents=True, exist_ok=True)
        code = "import sys, pathlib, ranks\nsys.exit(ranks.main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])))"
        modules = (function.partition(":")[0],)
        done = parent().run(code, function, str(world), str(folder), modules=modules, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return pickle.loads((folder / "out").read_bytes())
    ranks = start(function, world, folder, **environment)
    try:
        errors = ranks.communicate(timeout=timeout)[1].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode == 0, errors
    return pickle.loads((folder / "out").read_bytes())


def what_is_wrong(case, one: bool, cp) -> str:
    """Of a case over ranks, by the rounding rule: nothing where all is right, and on ranks but 0. ``one``: one projection."""
    from rat_ext import testing

    exact, eager, grads, floor = testing.define(case)
    case.op = "rat_attention_packed" if one else case.op
    actual = testing.evaluate_on_ranks(cp, case, grads)
    if cp.rank == 0:
        try:
            testing.compare(actual, eager, exact, case.dtype, floor)
        except AssertionError:
            return traceback.format_exc(limit=-1)
    return ""


class Block(nn.Module):
    """A RAT layer and a gated feed-forward, each with its norm."""

    def __init__(self, width: int, heads: int, groups: int, chunk_size: int):
        from rat_ext.layers import RATLayer

        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.rat = RATLayer(width, heads, groups, chunk_size)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 4 * width), "down": nn.Linear(2 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.rat(self.norm1(x))
        gate, up = self.mlp["up"](self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp["down"](F.silu(gate) * up)


def model_of(words: int, width: int, layers: int, heads: int, groups: int, chunk_size: int) -> nn.Sequential:
    """Token numbers to logits."""
    blocks = [Block(width, heads, groups, chunk_size) for _ in range(layers)]
    return nn.Sequential(nn.Embedding(words, width), *blocks, nn.RMSNorm(width), nn.Linear(width, words, bias=False))


def rank_of(function: str, rank: int, world: int, folder: Path) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", 120)))
    options: dict = {"init_method": f"file://{folder / 'store'}", "rank": rank, "world_size": world, "timeout": timeout}
    if KIND == "cpu":
        dist.init_process_group("gloo", **options)
    else:
        device = torch.device(KIND, rank)
        torch.cuda.set_device(device)
        torch.set_default_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    torch.manual_seed(0)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(rank, world)
    if rank == 0:
        (folder / "out").write_bytes(pickle.dumps(result))
    dist.barrier()
    if KIND != "cpu":
        dist.destroy_process_group()


def main(function: str, world: int, folder: Path) -> int:
    """Forks the ranks, and waits for all."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a rank that NCCL's watchdog aborts
    if KIND == "cpu":
        importlib.import_module(function.partition(":")[0])  # once, for all ranks
    ranks = []
    for rank in range(world):
        if child := os.fork():
            ranks.append(child)
            continue
        code = 1
        try:
            rank_of(function, rank, world, folder)
            code = 0
        except Exception:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads abort a process that leaves them behind
    (folder / "pids").write_text(" ".join(map(str, ranks)))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
