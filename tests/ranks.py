"""What the tests of several processes share: a group of ranks of gloo, and an op on it against its definition.

Run as a program, ``python ranks.py FUNCTION WORLD FOLDER``, it forks the ranks: torch is imported once. FUNCTION,
``module:name``, is run by every rank with (rank, world); rank 0's result is written to FOLDER.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import rat_ext
from rat_ext import testing
from rat_ext.parallel import ContextParallel

HERE = Path(__file__).parent


def start(function: str, world: int, folder: Path, **environment: str) -> subprocess.Popen:
    """A process whose children are the ranks; their numbers are in ``folder / "pids"``."""
    path = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-W", "ignore", __file__, function, str(world), str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def run(function: str, world: int, folder: Path, timeout: float = 180):
    """Runs ``module:name`` on all ranks; returns rank 0's result."""
    ranks = start(function, world, folder)
    try:
        errors = ranks.communicate(timeout=timeout)[1].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    assert ranks.returncode == 0, errors
    return pickle.loads((folder / "out").read_bytes())


def evaluate(cp: ContextParallel, case: testing.Case, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As :func:`rat_ext.testing.evaluate`, of the row that the ranks hold together: each has its own part of everything."""
    options = {key: x for key, x in case.options.items() if key != "cu_seqlens"}
    leaves = {key: x.detach().clone().requires_grad_() for key, x in case.tensors.items()}
    mine = {key: cp.shard(x) if x.dim() == 4 else x for key, x in leaves.items()}
    if case.op == "rat_attention_packed":
        heads, groups = mine["v"].shape[2], mine["q"].shape[2]
        order = [key for key in ("q", "k", "v", "gate", "out_gate") if key in mine]
        projection = torch.cat([mine[key].flatten(2) for key in order], dim=2)
        result = rat_ext.rat_attention_packed(
            projection, heads, groups, case.chunk_size, has_out_gate="out_gate" in mine, gate_bias=mine.get("gate_bias"),
            context_parallel=cp, **options,
        )  # fmt: skip
    else:
        result = getattr(rat_ext, case.op)(**mine, chunk_size=case.chunk_size, context_parallel=cp, **options)
    y, state = result if isinstance(result, tuple) else (result, None)
    assert (state is not None) == (bool(options.get("return_state")) and cp.rank == 0)
    outputs = {"y": y}
    if isinstance(state, torch.Tensor):
        outputs["final_state"] = state
    elif state is not None:
        outputs |= {key: getattr(state, key) for key in testing.STATE}
    fed = {key: cp.shard(g) if key == "y" else g for key, g in grads.items() if key in outputs}
    got = torch.autograd.grad([outputs[key] for key in fed], list(leaves.values()), list(fed.values()), allow_unused=True)
    values = {}
    for (key, x), g in zip(leaves.items(), got, strict=True):
        total = torch.zeros_like(x) if g is None else g.contiguous()
        if x.dim() == 2:  # of a parameter every rank has a part
            dist.all_reduce(total)
        else:
            total = cp.gather(cp.shard(total))
        values["d" + key] = total
    with torch.no_grad():
        values["y"] = cp.gather(y)
    values |= {key: x.detach() for key, x in outputs.items() if key != "y"}
    if isinstance(state, rat_ext.RATCache):
        valid = testing.valid_rows(state)
        values |= {key: values[key].masked_fill(~valid, 0) for key in ("chunk_k", "chunk_v")} | {"lengths": state.lengths}
    return values


def rank_of(function: str, rank: int, world: int, folder: Path) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=float(os.environ.get("RANKS_TIMEOUT", 120)))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world, timeout=timeout)
    torch.manual_seed(0)
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(rank, world)
    if rank == 0:
        (folder / "out").write_bytes(pickle.dumps(result))
    dist.barrier()


def main(function: str, world: int, folder: Path) -> int:
    """Forks the ranks, and waits for all."""
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
