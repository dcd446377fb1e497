"""rat_attention against its peers, forward and forward + backward.

Peers: the eager definition (rat_ext.reference), the compiled definition (bench/compiled.py: torch.compile, associative
scan, FlexAttention; CUDA), dense causal attention by scaled_dot_product_attention with H heads of keys and values
(CUDA: the flash and cuDNN backends, each by name; CPU: its only one). RAT's rows have G = 2, an output gate and
rotation; the dense ones have none of these. A row is refused when rat_ext is further from float64 than twice the eager
definition. --kernels auto,sm80 times the portable kernels too, in rows of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys

import torch
from common import (
    FAMILIES,
    Clock,
    Deadline,
    add_kernels,
    ceilings,
    each_family,
    free,
    kernels,
    number,
    parser,
    record,
    save,
    table,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rat_ext
from rat_ext import reference

NAMES = ("q", "k", "v", "gate", "out_gate")
ROUNDINGS = 8  # of the dtype, relative to the largest value, allowed beside twice the eager error
COMPILED = "T=(4096 B=64|16384 B=16|131072 B=2|4096 B=1) H=16 G=2 D=128 L=16"  # rows that the compiled peer joins
EAGER_BYTES = 40 << 30  # the eager definition is left out where its scores would need more than this


@dataclasses.dataclass(frozen=True)
class Row:
    batch: int
    tokens: int
    heads: int
    groups: int
    dim: int
    chunk_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T={self.tokens} B={self.batch} H={self.heads} G={self.groups} D={self.dim} L={self.chunk_size} {dtype}"

    def label(self) -> str:
        """The name in results: with the kernel family that was forced, if one was."""
        return f"{self}{FAMILIES[kernels()]}"

    def flops(self, backward: bool) -> float:
        """Needed products only: 2 in the forward, 5 in the backward, each T x C / 2 x D a head, 2 operations an
        element.
        """
        chunks = self.tokens / self.chunk_size
        product = 2 * self.tokens * chunks / 2 * self.dim * self.heads * self.batch
        return product * (7 if backward else 2)

    def bytes(self, backward: bool) -> float:
        """Needed traffic only: inputs and y once; the backward reads inputs, y and dy and writes the gradients."""
        row = self.dim * self.dtype.itemsize * self.batch * self.tokens
        inputs, y = (2 * self.groups + 3 * self.heads) * row, self.heads * row
        return inputs + y + (2 * inputs + 2 * y if backward else 0)


def rows(device: torch.device, quick: bool) -> list[Row]:
    if device.type == "cpu":
        lengths = (1024,) if quick else (4096, 16384)
        return [Row(1, t, 8, 2, 64, 16, torch.float32) for t in lengths]
    if quick:
        return [Row(4, 4096, 16, 2, 128, 16, torch.bfloat16)]
    lengths = (1024, 4096, 16384, 65536, 131072)
    found = [Row(262144 // t, t, 16, 2, dim, size, torch.bfloat16) for dim in (128, 64) for size in (16, 64) for t in lengths]
    return found + [Row(1, t, 16, 2, 128, 16, torch.bfloat16) for t in (4096, 16384, 65536, 131072)]


def inputs(row: Row, device: torch.device, batch: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    heads = (row.groups, row.groups, row.heads, row.heads, row.heads)
    return [torch.randn(batch, tokens, h, row.dim, generator=generator, device=device, dtype=row.dtype) for h in heads]


def rat(function, row: Row, tensors, tables, **more):
    q, k, v, gate, out_gate = tensors
    cos, sin = tables
    return function(q, k, v, gate, row.chunk_size, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin, **more)


def tables(row: Row, device: torch.device, tokens: int, dtype: torch.dtype = torch.float32):
    return rat_ext.rotary_tables(-(-tokens // row.chunk_size), row.dim, device=device, dtype=dtype)


# ---- right? ----------------------------------------------------------------------------------------------------------


def results(function, row: Row, tensors, table_pair, dy) -> dict[str, torch.Tensor]:
    """y and the gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = rat(function, row, leaves, table_pair)
    grads = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach()} | {"d" + n: g for n, g in zip(NAMES, grads, strict=True)}


def errors(values: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """How far values are from exact ones: the largest difference relative to the largest value, and root mean squares alike."""
    largest, rms = {}, {}
    for key, want in exact.items():
        off = values[key].double() - want
        largest[key] = float(off.abs().max() / want.abs().max())
        rms[key] = float(off.square().mean().sqrt() / want.square().mean().sqrt())
    return largest, rms


def check_row(row: Row, device: torch.device) -> Row:
    """What stands for all rows of one configuration in its check: the same but for B and T. On a GPU 256 chunks and
    several sequences, so that the kernels that need many of them run too; what float64 scores take bounds it.
    """
    tokens = max(4096, 256 * row.chunk_size) if device.type == "cuda" else max(1024, 16 * row.chunk_size)
    return dataclasses.replace(row, batch=max(1, 32768 // tokens) if device.type == "cuda" else 1, tokens=tokens)


def check(row: Row, device: torch.device, peer: bool) -> dict:
    """Errors of rat_ext, the eager definition and the compiled peer against float64 at the size of ``row``."""
    tensors = inputs(row, device, row.batch, row.tokens, seed=1)
    dy = torch.randn(tensors[2].shape, device=device, dtype=row.dtype, generator=torch.Generator(device).manual_seed(2))
    low, double = tables(row, device, row.tokens), tables(row, device, row.tokens, torch.float64)
    exact = results(reference.rat_attention, row, [x.double() for x in tensors], double, dy.double())
    functions = {"rat_ext": rat_ext.rat_attention, "eager": reference.rat_attention}
    if peer:
        import compiled

        functions["compiled"] = compiled.rat_attention
    found: dict = {"batch": row.batch, "tokens": row.tokens, "rms": {}}
    for name, function in functions.items():
        found[name], found["rms"][name] = errors(results(function, row, tensors, low, dy), exact)
    unit = ROUNDINGS * torch.finfo(row.dtype).eps
    found["wrong"] = [key for key, e in found["rat_ext"].items() if not e <= 2 * found["eager"][key] + unit]
    return found


def checked(row: Row, device: torch.device, known: dict, peer: bool = False) -> dict:
    """The beginning of a row's entry in the results, with its check, kept in ``known`` for other rows; says how it went."""
    small = check_row(row, device)
    if small not in known:
        known[small] = check(small, device, peer)
        free()
    found = known[small]
    figures = ", ".join(f"{n} {max(found[n].values()):.1e}" for n in found["rms"])
    print(f"{row.label()}\n  largest relative error at T={small.tokens} B={small.batch}: {figures}")
    if found["wrong"]:
        print(f"  WRONG in {', '.join(found['wrong'])}: not timed\n")
    fields = dataclasses.asdict(row) | {"dtype": str(row.dtype).removeprefix("torch."), "kernels": kernels()}
    return {"name": row.label(), **fields, "check": found}


# ---- fast? -----------------------------------------------------------------------------------------------------------


def both(clock: Clock, function, leaves, dy, budget_ms: float) -> tuple[float, float]:
    """(forward, forward + backward) in milliseconds."""
    with torch.no_grad():
        forward = clock.median(function, budget_ms)
    for x in leaves:
        x.requires_grad_()
    whole = clock.median(lambda: torch.autograd.grad(function(), leaves, dy), budget_ms)
    return forward, whole


def attempt(name: str, result: dict, measure) -> None:
    """Notes why a peer has no figure instead of stopping the bench."""
    try:
        result["ms"][name] = measure()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        result["left_out"][name] = str(error).strip().splitlines()[0][:200]
    free()


def dense_peers(row: Row, device: torch.device, clock: Clock) -> dict:
    """Causal attention of H heads of the row's size by scaled_dot_product_attention. It knows nothing of chunks."""
    result: dict = {"ms": {}, "left_out": {}}
    generator = torch.Generator(device).manual_seed(0)
    shape = (row.batch, row.tokens, row.heads, row.dim)
    dense = [torch.randn(shape, generator=generator, device=device, dtype=row.dtype).transpose(1, 2) for _ in range(3)]
    backends = {"sdpa": None}
    if device.type == "cuda":
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():

        def measure(backend=backend):
            leaves = [x.detach() for x in dense]
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                function = lambda: F.scaled_dot_product_attention(*leaves, is_causal=True)  # noqa: E731
                return both(clock, function, leaves, torch.ones_like(dense[0]), 300.0)

        attempt(name, result, measure)
    return result


def time_row(row: Row, device: torch.device, clock: Clock, peers: bool, compiled_peer: bool, dense: dict) -> dict:
    """``dense`` keeps the peers that rows of the same size share."""
    result: dict = {"ms": {}, "left_out": {}}
    tensors = inputs(row, device, row.batch, row.tokens)
    dy = torch.randn_like(tensors[2])
    pair = tables(row, device, row.tokens)

    def measure_rat(function, budget_ms=400.0):
        leaves = [x.detach() for x in tensors]
        return both(clock, lambda: rat(function, row, leaves, pair), leaves, dy, budget_ms)

    result["ms"]["rat_ext"] = measure_rat(rat_ext.rat_attention, 600.0)
    if not peers:
        return result
    scores = row.batch * row.heads * row.tokens * (row.tokens // row.chunk_size) * row.dtype.itemsize
    scan = 8 * tensors[2].numel() * row.dtype.itemsize
    if device.type == "cpu" or 8 * scores + scan < EAGER_BYTES:
        attempt("eager", result, lambda: measure_rat(reference.rat_attention))
    else:
        result["left_out"]["eager"] = f"its scores alone take {scores / 1e9:.0f} GB"
    if compiled_peer:
        import compiled

        attempt("compiled", result, lambda: measure_rat(compiled.rat_attention))
    tensors = dy = None
    free()
    size = (row.batch, row.tokens, row.heads, row.dim, row.dtype)
    if size not in dense:
        dense[size] = dense_peers(row, device, clock)
    return {key: result[key] | dense[size][key] for key in result}


# ---- memory on the CPU -----------------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Bytes: VmRSS, what is resident now; VmHWM, its high-water mark."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{what}:\s+(\d+) kB", file.read(), re.MULTILINE)[1]) * 1024


def memory_child(tokens: int) -> None:
    """Prints bytes: the process's resident high-water mark over a forward + backward, less what it held before its
    inputs.
    """
    row = Row(1, tokens, 8, 2, 64, 16, torch.float32)
    device = torch.device("cpu")
    small = dataclasses.replace(row, tokens=64)
    pair = tables(row, device, tokens)

    def train(t: int) -> int:
        """A forward and a backward into .grad; returns bytes of inputs, outputs, gradients."""
        leaves = [x.requires_grad_() for x in inputs(small, device, 1, t)]
        dy = torch.ones_like(leaves[2]).detach()
        y = rat(rat_ext.rat_attention, row, leaves, pair)
        y.backward(dy)
        return sum(2 * x.numel() * x.element_size() for x in leaves) + 2 * y.numel() * y.element_size()

    train(64)  # loads what is loaded on first use
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark becomes what is resident now
    before = resident("VmRSS")
    needed = train(tokens)
    peak = resident("VmHWM")
    print(json.dumps({"tokens": tokens, "peak_bytes": peak - before, "needed_bytes": needed}))


def memory(tokens: int) -> dict:
    """Runs :func:`memory_child` in a fresh process. needed = inputs, y, dy and gradients."""
    done = subprocess.run([sys.executable, __file__, "--memory-child", str(tokens)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"ratio": found["peak_bytes"] / found["needed_bytes"]}


# ---- the bench -------------------------------------------------------------------------------------------------------


def main() -> int:
    p = parser(__doc__)
    p.add_argument(
        "--compiled", default=COMPILED, metavar="REGEX", help="rows with the compiled peer: it takes half a minute each"
    )
    add_kernels(p)
    options = p.parse_args()
    deadline = Deadline(options.time_limit)
    if (code := each_family(p, options, deadline)) is not None:
        return code
    device = torch.device(options.device)
    listed = [row for row in rows(device, options.quick) if re.search(options.rows, str(row))]
    if not listed:
        p.error(f"--rows {options.rows!r} matches none")
    clock = Clock(device, options.quick)
    limits = ceilings(device, listed[0].dtype, options.quick)
    result = record("op", device, ceilings=limits, rows=[])
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}")
    print(
        f"measured ceilings: copy {limits['copy_gb_s']:.0f} GB/s, matmul {limits['matmul_tflop_s']:.3g} TFLOP/s\n",
        flush=True,
    )

    def compiled_peer(row: Row) -> bool:
        return device.type == "cuda" and not options.no_peers and re.search(options.compiled, str(row)) is not None

    checks: dict = {}
    dense: dict = {}
    with_peer = {check_row(row, device) for row in listed if compiled_peer(row)}
    wrong = False
    for row in listed:
        if deadline.over():
            print(f"time limit of {options.time_limit:.0f} s: stopped before {row}")
            result["stopped_before"] = str(row)
            break
        if result["rows"]:  # what is done is kept if the run is cut off
            save(result | {"stopped_before": str(row)}, options, quiet=True)
        free()
        entry = checked(row, device, checks, check_row(row, device) in with_peer)
        result["rows"].append(entry)
        if entry["check"]["wrong"]:
            wrong = True
            continue
        entry |= time_row(row, device, clock, not options.no_peers, compiled_peer(row), dense)
        show(row, entry, limits)
    if device.type == "cpu" and not wrong and not options.rows:
        result["memory"] = memory(1024 if options.quick else 16384)
        m = result["memory"]
        print(
            f"peak memory, forward + backward at T={m['tokens']}: {m['peak_bytes'] / 1e6:.1f} MB, {m['ratio']:.2f}x of "
            "inputs, output and gradients (resident high-water mark of a fresh process)"
        )
    print(f"{deadline.seconds():.0f} s")
    save(result, options)
    return 1 if wrong else 0


def show(row: Row, entry: dict, limits: dict) -> None:
    cells = []
    for i, phase in enumerate(("forward", "fwd+bwd")):
        mine = entry["ms"]["rat_ext"][i]
        flops, size = row.flops(bool(i)), row.bytes(bool(i))
        floor = max(flops / limits["matmul_tflop_s"] / 1e9, size / limits["copy_gb_s"] / 1e6)
        entry.setdefault("share_of_ceiling", []).append(floor / mine)
        for name, times in entry["ms"].items():
            line = [phase if name == "rat_ext" else "", name, number(times[i]), f"{times[i] / mine:.2f}x"]
            if name == "rat_ext":
                line[3] = ""
                line += [number(flops / mine / 1e9), number(size / mine / 1e6), f"{floor / mine:.0%}"]
            else:
                line += ["", "", ""]
            cells.append(line)
    table(["", "", "ms", "ratio", "TFLOP/s", "GB/s", "of ceiling"], cells)
    for name, why in entry["left_out"].items():
        print(f"  {name}: left out, {why}")
    print(flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-child"]:
        memory_child(int(sys.argv[2]))
    else:
        sys.exit(main())
