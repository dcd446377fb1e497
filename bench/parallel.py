"""Several GPUs: context parallelism beside one GPU and beside ring attention by PyTorch; FSDP2.

    torchrun --standalone --nproc-per-node 2 bench/parallel.py

Rows of context parallelism are `rat_attention`, forward and forward + backward of one row of T tokens on all ranks: time, the
same over what one GPU takes for the whole row divided by the ranks, peak memory per GPU over that of one GPU (inputs, output
and gradients included), bytes that a rank sends in forward + backward, the mean over ranks. The peer is PyTorch's
context-parallel `scaled_dot_product_attention` of H heads of keys and values, causal, over the same T; its bytes are those of
the algorithm: keys and values to every other rank, in the backward again, and their gradients back.

The FSDP2 row is a training step of a model of RAT layers (forward, backward, AdamW, bf16 of float32 weights) with the same
tokens per GPU on all and on one: the ratio is that of tokens per second.

A row is refused where outputs or gradients of a shorter row of its kind are further from float64 than twice the eager
definition. Times are medians of the slowest rank, from a barrier on.
"""

from __future__ import annotations

import datetime
import os
import re
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import Deadline, free, number, parser, record, save, sync, table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import rat_ext
from rat_ext import testing
from rat_ext.parallel import ContextParallel

HEADS, GROUPS, DIM, CHUNK = 16, 2, 128, 16
HEAD = ["context parallel", "forward ms", "f + b ms", "of one / ranks", "peak GB", "of one's", "MB sent", "of ring's"]


# ---- what ranks do together -------------------------------------------------------------------------------------------


def slowest(ms: float, device: torch.device) -> float:
    """The largest of all ranks."""
    worst = torch.tensor([ms], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return float(worst)


def once(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the slowest rank."""
    import time

    sync(device)
    dist.barrier()
    start = time.perf_counter()
    function()
    sync(device)
    return slowest((time.perf_counter() - start) * 1e3, device)


def median(function: Callable[[], object], device: torch.device, quick: bool) -> float:
    for _ in range(2):
        once(function, device)
    first = once(function, device)
    count = 1 if quick else int(min(10, max(3, 2000 / first)))
    return statistics.median([first, *(once(function, device) for _ in range(count - 1))])


def peak_gb(function: Callable[[], object], device: torch.device) -> float:
    """Of this rank's memory while it runs, or the largest of all ranks where all run."""
    if device.type != "cuda":
        return 0.0
    free()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    sync(device)
    return slowest(torch.cuda.max_memory_allocated(device) / 1e9, device)


# ---- context parallelism ----------------------------------------------------------------------------------------------


def wrong_at(tokens: int, sequences: list[int] | None, device: torch.device, dtype: torch.dtype) -> str:
    """What the rule says of a shorter row, on rank 0; or nothing."""
    where = {"cu_seqlens": testing.cu_seqlens_of(sequences, "cpu")} if sequences else {"tokens": tokens}
    case = testing.attention_case(
        device, dtype, batch=1, tokens=tokens, heads=4, groups=GROUPS, dim=DIM, chunk_size=CHUNK, sequences=sequences
    )
    exact, eager, grads, floor = testing.define(case)
    actual = testing.evaluate_on_ranks(ContextParallel(**where), case, grads)
    try:
        testing.compare(actual, eager, exact, dtype, floor)
    except AssertionError as error:
        return str(error)
    return ""


def inputs(tokens: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    heads = (GROUPS, GROUPS, HEADS, HEADS, HEADS)
    return [torch.randn(1, tokens, n, DIM, device=device, dtype=dtype).requires_grad_() for n in heads]


def both(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward + backward."""
    with torch.no_grad():
        dy = torch.randn_like(call())

    def forward() -> object:
        with torch.no_grad():
            return call()

    return forward, lambda: torch.autograd.grad(call(), leaves, dy)


def rat(tokens: int, sequences: list[int] | None, cp: ContextParallel | None, device: torch.device, dtype: torch.dtype):
    """The op on the local tokens of a row, or on the whole row of one GPU."""
    tables = rat_ext.rotary_tables(tokens // CHUNK + 1, DIM, device=device)
    local = tokens if cp is None else cp.shard(torch.empty(1, tokens, 0)).shape[1]
    q, k, v, gate, out_gate = leaves = inputs(local, device, dtype)
    cu_seqlens = testing.cu_seqlens_of(sequences, device) if sequences and cp is None else None
    return both(
        lambda: rat_ext.rat_attention(
            q, k, v, gate, CHUNK, out_gate=out_gate, rotary_cos=tables[0], rotary_sin=tables[1], cu_seqlens=cu_seqlens,
            context_parallel=cp,
        ),
        leaves,
    )  # fmt: skip


def ring(tokens: int, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, quick: bool) -> list[float]:
    """Forward, and forward + backward, of PyTorch's context-parallel attention."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (1, HEADS, tokens // mesh.size(), DIM)
    leaves = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    dy = torch.randn(shape, device=device, dtype=dtype)
    # It asks for a tensor to shard, and reads the device and the length from it; ours are sharded already.
    row = torch.empty(1, 1, 2 * mesh.size(), 1, device=device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), context_parallel(mesh, buffers=[row], buffer_seq_dims=[2]):

        def call() -> torch.Tensor:
            return F.scaled_dot_product_attention(*leaves, is_causal=True)

        def forward() -> object:
            with torch.no_grad():
                return call()

        steps = (forward, lambda: torch.autograd.grad(call(), leaves, dy))
        return [median(step, device, quick) for step in steps]


def context_row(tokens: int, packed: bool, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, options) -> dict:
    world, rank = mesh.size(), mesh.get_rank()
    sequences = None
    if packed:  # sixteen, of lengths from a half to one and a half of the mean
        weights = [0.5 + i / 15 for i in range(16)]
        sequences = [int(w / sum(weights) * tokens) for w in weights]
        sequences[-1] += tokens - sum(sequences)
    short = [int(n / tokens * 3000) for n in sequences] if sequences else None
    wrong = wrong_at(sum(short) if short else 3001, short, device, dtype)
    entry: dict = {"check": {"wrong": wrong}, "tokens": tokens, "ranks": world}
    if any(found := gathered(wrong)):
        entry["check"]["wrong"] = next(filter(None, found))
        return entry
    free()
    cp = ContextParallel(mesh, tokens, cu_seqlens=None if sequences is None else testing.cu_seqlens_of(sequences, "cpu"))
    ours = rat(tokens, sequences, cp, device, dtype)
    entry["ms"] = [median(step, device, options.quick) for step in ours]
    entry["peak_gb"] = peak_gb(ours[1], device)
    del ours
    free()
    # One GPU has the whole row, each of them: the ranks wait for each other, and run the same.
    alone = rat(tokens, sequences, None, device, dtype)
    entry["one_ms"] = [median(step, device, options.quick) for step in alone]
    entry["one_peak_gb"] = peak_gb(alone[1], device)
    del alone
    free()
    sent = sum(cp.bytes_sent(1, HEADS, DIM, CHUNK, dtype).values())
    total = torch.tensor([float(sent)], device=device)
    dist.all_reduce(total)
    entry["bytes_sent"] = float(total) / world
    entry["ring_bytes"] = 3 * (world - 1) * 2 * HEADS * DIM * dtype.itemsize * tokens / world
    if device.type == "cuda" and not packed and not options.no_peers:
        try:
            entry["ring_ms"] = ring(tokens, mesh, device, dtype, options.quick)
        except Exception as error:  # a prototype of PyTorch's: our rows stand without it
            entry["ring_error"] = f"{type(error).__name__}: {error}"
        free()
    if rank == 0:
        entry["of_share"] = [a / (b / world) for a, b in zip(entry["ms"], entry["one_ms"], strict=True)]
    return entry


def gathered(value: str) -> list[str]:
    """Of all ranks. Only rank 0 compares a state, which the others do not get."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


# ---- training ---------------------------------------------------------------------------------------------------------


def training_row(device: torch.device, options) -> dict:
    """Tokens per second of a step on all ranks and on one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from rat_ext.models import RATConfig, RATForCausalLM
    from rat_ext.models.config import PRESETS

    world = dist.get_world_size()
    # 1.3 billion parameters: 24 layers of width 2048.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} if options.quick else PRESETS["1.3b"]
    config = RATConfig(vocab_size=32000, layer_types="rat", chunk_size=CHUNK, num_groups=GROUPS, **sizes)
    batch, tokens = (2, 256) if options.quick else (2, 4096)
    if device.type == "cuda" and not options.quick and torch.cuda.get_device_properties(device).total_memory > 100e9:
        batch = 4
    meshes = init_device_mesh(device.type, (world, 1), mesh_dim_names=("all", "one"))
    entry: dict = {"tokens": tokens, "batch": batch, "ranks": world}
    for name in ("all", "one"):
        torch.manual_seed(0)
        with torch.device("meta"):
            model = RATForCausalLM(config)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in model.model.layers:
            fully_shard(block, mesh=meshes[name], mp_policy=policy)
        fully_shard(model, mesh=meshes[name], mp_policy=policy)
        model.to_empty(device=device)
        model.init_weights()
        entry["parameters"] = sum(p.numel() for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
        batch_of = torch.randint(0, config.vocab_size, (batch, tokens + 1), device=device)

        def step(model=model, optimizer=optimizer, batch_of=batch_of) -> None:
            model(batch_of[:, :-1], shift_labels=batch_of[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        entry[f"{name}_ms"] = median(step, device, options.quick)
        entry[f"{name}_peak_gb"] = peak_gb(step, device)
        del model, optimizer, step
        free()
    entry["speedup"] = world * entry["one_ms"] / entry["all_ms"]
    return entry


# ---- main -------------------------------------------------------------------------------------------------------------


def cells(row: dict) -> list[str]:
    """The figures of a row of context parallelism, under HEAD."""
    return [
        number(row["ms"][0]), number(row["ms"][1]), f"{row['of_share'][1]:.2f}x", number(row["peak_gb"]),
        f"{row['peak_gb'] / max(row['one_peak_gb'], 1e-9):.2f}x", number(row["bytes_sent"] / 1e6),
        f"1/{row['ring_bytes'] / max(row['bytes_sent'], 1):.1f}",
    ]  # fmt: skip


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--timeout", type=float, default=120.0, metavar="S", help="of a transfer whose other rank is gone (120)")
    options = p.parse_args()
    if "RANK" not in os.environ:
        sys.exit("bench/parallel.py: run it by torchrun --standalone --nproc-per-node 2 bench/parallel.py")
    cuda = options.device == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1 if not cuda else torch.get_num_threads())
    limit = datetime.timedelta(seconds=options.timeout)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=limit, device_id=device if cuda else None)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rank, deadline = dist.get_rank(), Deadline(options.time_limit)
    say = print if rank == 0 else lambda *words, **more: None
    dtype = torch.bfloat16 if cuda else torch.float32
    result = record("parallel", device, ranks=mesh.size(), rows=[])
    say(f"{mesh.size()} x {result['device']}, torch {result['torch']}, commit {result['commit']}", flush=True)
    lengths = [262144] if cuda and not options.quick else [4096]
    kind = f"H={HEADS} G={GROUPS} D={DIM} L={CHUNK} {str(dtype).removeprefix('torch.')}"
    wanted = [(f"T={n} B=1{' packed' if p else ''} {kind}", n, p) for n in lengths for p in (False, True)]
    shown, wrong = [], False
    for name, tokens, packed in wanted:
        over = any(gathered("over" if deadline.over() else ""))
        if not re.search(options.rows, name) or over:
            continue
        row = {"name": name} | context_row(tokens, packed, mesh, device, dtype, options)
        result["rows"].append(row)
        if rank == 0:
            save(result, options, quiet=True)  # what is done is kept if the rest is not
        if row["check"]["wrong"]:
            wrong = True
            say(f"{name}: WRONG, not timed: {row['check']['wrong']}")
        elif rank == 0:
            shown.append([name, *cells(row)])
            say(name, f"one GPU {number(row['one_ms'][0])}, {number(row['one_ms'][1])} ms", flush=True)
            if "ring_error" in row:
                say(f"  ring attention: {row['ring_error']}")
            if "ring_ms" in row:
                ratios = [b / a for a, b in zip(row["ms"], row["ring_ms"], strict=True)]
                say(
                    f"  ring attention {number(row['ring_ms'][0])}, {number(row['ring_ms'][1])} ms:",
                    *(f"{x:.1f}x" for x in ratios),
                )
    if re.search(options.rows, "FSDP2") and not any(gathered("over" if deadline.over() else "")):
        row = {"name": "FSDP2"} | training_row(device, options)
        row["name"] = f"FSDP2 {row['parameters'] / 1e9:.2g}B T={row['tokens']} B={row['batch']} per GPU"
        result["rows"].append(row)
        say(f"{row['name']}: {number(row['one_ms'])} ms on one, {number(row['all_ms'])} ms on {mesh.size()}, "
            f"{row['speedup']:.2f}x the tokens per second; {number(row['all_peak_gb'])} GB")  # fmt: skip
    if rank == 0:
        print()
        if shown:
            table(HEAD, shown)
        print(f"{deadline.seconds():.0f} s")
        save(result, options)
    dist.barrier()
    dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
