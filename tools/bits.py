"""The bits that the ops compute, to compare two builds: a few hundred random calls, a SHA-256 per output.

    python tools/bits.py --device cuda --out before.json        # once per build, from the folder of each
    python tools/bits.py --device cuda --out after.json
    python tools/bits.py --compare before.json after.json       # names what differs; exit status 1

It uses the public ops alone, so it runs against any version of the package. The package is the one that Python finds
(PYTHONPATH). Numbers are drawn on the CPU (very large tensors on the device), so both runs need one torch, and bits compare
on one kind of device alone. Every call runs twice: an output that differs between the two is marked "unstable" and is not
compared. Rows of a state that hold nothing are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import json
import os
import random
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

import rat_ext

STATES = ("chunk_k", "chunk_v", "running_k", "running_v")
LAYOUTS = ("contiguous", "contiguous", "projection", "transposed", "odd", "expanded_batch", "expanded_tokens", "expanded_heads")
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)
ON_DEVICE = 1 << 23  # elements from which a tensor is drawn on the device


# ---- calls -----------------------------------------------------------------------------------------------------------


def random_call(seed: int, dtypes: tuple[torch.dtype, ...]) -> dict:
    """What call number ``seed`` is: plain numbers, so that the list of calls is the same in every version of the package."""
    r = random.Random(seed)
    op = r.choice(("rat_attention",) * 4 + ("rat_attention_packed", "chunk_attention", "chunk_recurrence", "decode", "decode"))
    groups = r.choice((1, 1, 2, 3))
    call = {
        "op": op,
        "dtype": r.choice(dtypes),
        "batch": r.choice((1, 2, 3)),
        "tokens": r.choice((0, 1, 2, 7, 16, 33, 64, 70, 100, 128, 131, 200, 257, 300, 520)),
        "groups": groups,
        "heads": groups * r.choice((1, 2, 4)),
        "dim": r.choice((8, 16, 24, 32, 40, 64, 64, 72, 80, 96, 128, 128, 136, 192, 256)),
        "chunk": r.choice((1, 2, 3, 8, 16, 16, 16, 17, 32, 33, 64, 100, 130, 1 << 20)),
        "gate_mean": r.choice((0.0, 0.0, 2.0, 5.0, -3.0)),
        "gate_bias": r.random() < 0.6,
        "out_gate": r.random() < 0.6,
        "rotary": r.random() < 0.6,
        "scale": r.choice((None, None, None, 0.3, -0.2, 0.0)),
        "layout": r.choice(LAYOUTS),
        "dy_layout": r.choice(LAYOUTS),
        "packed": None,
        "return_state": r.random() < 0.3,
        "before": None,
        "steps": r.choice((1, 3, 20)),
        "slots": r.random() < 0.5,
        "autocast": r.random() < 0.05,
    }
    if r.random() < 0.35 and op != "decode":
        call["packed"] = [r.choice((0, 1, 5, 15, 16, 17, 64, 90, 150)) for _ in range(r.choice((1, 2, 5, 9)))]
    if r.random() < 0.3 or op == "decode":  # tokens of each sequence before the call
        n = call["batch"] if call["packed"] is None else len(call["packed"])
        call["before"] = [r.choice((0, 1, 7, 16, 31, 40, 129)) for _ in range(n)]
    return call


def large_calls() -> list[dict]:
    """Calls of the size at which the GPU chooses its long tiles, its splits and its segments."""
    usual = random_call(0, (torch.bfloat16,)) | {
        "op": "rat_attention", "layout": "projection", "dy_layout": "contiguous", "packed": None, "before": None,
        "return_state": False, "autocast": False, "gate_bias": True, "out_gate": True, "rotary": True, "scale": None,
        "gate_mean": 1.0, "heads": 16, "groups": 2, "dim": 128, "chunk": 16, "batch": 2, "tokens": 4096, "steps": 20,
    }  # fmt: skip
    changes = [
        {}, {"dtype": torch.float16}, {"dim": 64}, {"dim": 96}, {"dim": 256, "batch": 1}, {"dim": 40, "tokens": 4095},
        {"chunk": 64}, {"chunk": 33}, {"chunk": 1, "tokens": 2048, "heads": 4}, {"chunk": 8, "tokens": 2000},
        {"chunk": 1 << 20, "op": "chunk_recurrence", "tokens": 16384, "batch": 1},
        {"chunk": 1 << 20, "tokens": 8192, "heads": 4},
        {"chunk": 1000, "tokens": 8192, "heads": 4}, {"chunk": 256, "tokens": 8192, "heads": 4, "batch": 1},
        {"batch": 48, "tokens": 320}, {"batch": 64, "tokens": 130, "dim": 64}, {"batch": 1, "tokens": 32768, "heads": 4},
        {"batch": 1, "tokens": 32768, "heads": 2, "dim": 64}, {"batch": 9, "tokens": 1023, "groups": 16, "heads": 16},
        {"layout": "odd", "tokens": 2048}, {"layout": "odd", "dim": 64, "tokens": 2047}, {"layout": "transposed"},
        {"out_gate": False, "rotary": False}, {"rotary": False, "groups": 1, "tokens": 3000},
        {"dtype": torch.float32, "tokens": 1024}, {"dtype": torch.float32, "tokens": 1024, "dim": 64, "chunk": 5},
        {"op": "chunk_attention", "groups": 4}, {"op": "rat_attention_packed"}, {"op": "rat_attention_packed", "dim": 64},
        {"packed": [4096, 1, 0, 1000, 333, 2048, 16, 15]}, {"packed": [64] * 100, "dim": 64}, {"packed": [7] * 300},
        {"packed": [4096, 100, 1500], "before": [40, 0, 1000], "return_state": True},
        {"before": [1600, 777], "return_state": True, "tokens": 2100}, {"before": [33, 0], "tokens": 4096, "dim": 64},
        {"op": "chunk_recurrence", "tokens": 8192},
        {"op": "chunk_recurrence", "tokens": 8192, "chunk": 100, "dtype": torch.float32},
        {"op": "decode", "before": [4000, 16, 0, 1234, 4095, 1, 7, 2222], "batch": 8},
        {"op": "decode", "before": [3000] * 64, "batch": 64, "dim": 64, "heads": 8},
        {"op": "decode", "before": [30000], "batch": 1, "chunk": 16},
        {"op": "decode", "before": [2000] * 4, "batch": 4, "dtype": torch.float32, "chunk": 1, "heads": 4},
    ]  # fmt: skip
    return [usual | change for change in changes]


def name_of(index: str, call: dict) -> str:
    parts = [index, call["op"], str(call["dtype"]).removeprefix("torch."), f"B={call['batch']} T={call['tokens']}"]
    parts += [f"H={call['heads']} G={call['groups']} D={call['dim']} L={call['chunk']} {call['layout']}"]
    parts += [f"packed={call['packed'][:9]}"] if call["packed"] is not None else []
    parts += [f"before={call['before'][:9]}"] if call["before"] is not None else []
    parts += [key for key in ("gate_bias", "out_gate", "rotary", "return_state", "autocast") if call[key]]
    return " ".join(parts)


# ---- inputs ----------------------------------------------------------------------------------------------------------


class Numbers:
    """Normal numbers by a seed: the same ones in every run."""

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self.cpu = torch.Generator().manual_seed(seed)
        self.own = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype, size: float = 1.0, mean: float = 0.0) -> Tensor:
        count = 1
        for n in shape:
            count *= n
        if count >= ON_DEVICE:
            x = torch.randn(shape, generator=self.own, device=self.device)
        else:
            x = torch.randn(shape, generator=self.cpu).to(self.device)
        return (x * size + mean).clamp(-30, 30).to(dtype)


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":  # rows begin at odd addresses
        batch, tokens, heads, dim = x.shape
        row = heads * (dim + 3) + 1
        flat = x.new_zeros(batch * tokens * row + 1)
        view = flat.as_strided(x.shape, (tokens * row, row, dim + 3, 1), 1)
        view.copy_(x)
        return view
    if layout.startswith("expanded"):
        axis = ("batch", "tokens", "heads").index(layout.removeprefix("expanded_"))
        return x.narrow(axis, 0, 1).expand(x.shape) if x.shape[axis] else x
    return x


def draw(numbers: Numbers, call: dict, batch: int, tokens: int, leaves: dict, prefix: str = "") -> dict[str, Tensor]:
    """The token tensors of a call; the differentiable ones join ``leaves``."""
    dtype = torch.float32 if call["autocast"] else call["dtype"]
    narrow, wide = (batch, tokens, call["groups"], call["dim"]), (batch, tokens, call["heads"], call["dim"])
    shapes = {
        "rat_attention": {"q": narrow, "k": narrow, "v": wide, "gate": wide},
        "chunk_attention": {"q": narrow, "k_states": wide, "v_states": wide},
        "chunk_recurrence": {"x": narrow, "gate": wide},
    }[call["op"] if call["op"] in ("chunk_attention", "chunk_recurrence") else "rat_attention"]
    if call["out_gate"] and "q" in shapes:
        shapes["out_gate"] = wide
    drawn = {
        key: numbers(*shape, dtype=dtype, size=1.5 if key == "gate" else 1.0, mean=call["gate_mean"] if key == "gate" else 0.0)
        for key, shape in shapes.items()
    }
    if call["op"] == "rat_attention_packed" or call["layout"] == "projection":
        one = torch.cat([x.flatten(2) for x in drawn.values()], dim=2).requires_grad_()
        leaves[prefix + "projection"] = one
        if call["op"] == "rat_attention_packed":
            return {"projection": one}
        parts = one.split([shape[2] * shape[3] for shape in shapes.values()], dim=2)
        return {key: part.unflatten(2, shapes[key][2:]) for key, part in zip(shapes, parts, strict=True)}
    drawn = {key: lay_out(x, call["layout"]).detach().requires_grad_() for key, x in drawn.items()}
    leaves |= {prefix + key: x for key, x in drawn.items()}
    return drawn


def cu_seqlens(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


# ---- outputs ---------------------------------------------------------------------------------------------------------


def digest(x: Tensor) -> str:
    x = x.detach().cpu().contiguous()
    data = ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()) if x.numel() else b""
    return hashlib.sha256(f"{tuple(x.shape)} {x.dtype}".encode() + data).hexdigest()[:32]


def closed_rows(state: rat_ext.RATCache, x: Tensor) -> list[Tensor]:
    """Of a (N, H, C, D) tensor the rows of closed chunks, sequence by sequence."""
    return [x[n, :, : length // state.chunk_size] for n, length in enumerate(state.lengths.tolist())]


def state_values(state: rat_ext.RATCache) -> dict[str, Tensor]:
    rows = {key: torch.cat([x.flatten() for x in closed_rows(state, getattr(state, key))]) for key in STATES[:2]}
    return rows | {key: getattr(state, key) for key in (*STATES[2:], "lengths")}


def state_gradients(numbers: Numbers, state: rat_ext.RATCache) -> list[Tensor]:
    """Random gradients of the four state tensors, zero in rows that hold nothing."""
    found = []
    for key in STATES:
        x = getattr(state, key)
        gradient = torch.zeros_like(x)
        parts = closed_rows(state, gradient) if key in STATES[:2] else [gradient]
        for part in parts:
            part.copy_(numbers(*part.shape, dtype=x.dtype))
        found.append(gradient)
    return found


# ---- one call --------------------------------------------------------------------------------------------------------


def run(call: dict, seed: int, device: torch.device) -> dict[str, Tensor]:
    """Outputs, states and gradients of a call by name."""
    numbers = Numbers(seed, device)
    acc = torch.float64 if call["dtype"] == torch.float64 else torch.float32
    batch, tokens = (call["batch"], call["tokens"]) if call["packed"] is None else (1, sum(call["packed"]))
    leaves: dict[str, Tensor] = {}
    bias = {}
    if call["gate_bias"] and call["op"] != "chunk_attention":
        bias["gate_bias"] = leaves["gate_bias"] = numbers(call["heads"], call["dim"], dtype=acc).requires_grad_()
    packing = {} if call["packed"] is None else {"cu_seqlens": cu_seqlens(call["packed"], device)}
    cast = contextlib.nullcontext()
    if call["autocast"] and call["dtype"] in (torch.bfloat16, torch.float16):
        cast = torch.autocast(device.type, call["dtype"])
    with cast:
        if call["op"] == "chunk_recurrence":
            return _recurrence(call, numbers, batch, tokens, acc, leaves, bias, packing)
        common = dict(bias)
        if call["rotary"]:
            rows = (max(call["before"] or [0]) + max(tokens, 1) + call["steps"]) // call["chunk"] + 1
            cos, sin = rat_ext.rotary_tables(rows, call["dim"], base=100.0)
            common |= {"rotary_cos": cos.to(device, acc), "rotary_sin": sin.to(device, acc)}
        common["scale"] = call["scale"]

        def forward(batch: int, tokens: int, prefix: str = "", **options):
            inputs = draw(numbers, call, batch, tokens, leaves, prefix)
            if call["op"] == "rat_attention_packed":
                options |= {"num_heads": call["heads"], "num_groups": call["groups"], "has_out_gate": call["out_gate"]}
            op = getattr(rat_ext, "rat_attention" if call["op"] == "decode" else call["op"])
            return op(**inputs, chunk_size=call["chunk"], **common, **options)

        state = None
        if call["before"] is not None:
            packed = cu_seqlens(call["before"], device)
            _, state = forward(1, sum(call["before"]), "before_", cu_seqlens=packed, return_state=True)
        if call["op"] == "decode":
            return _decode(call, numbers, common, state)
        result = forward(batch, tokens, initial_state=state, return_state=call["return_state"], **packing)
    y, state = result if call["return_state"] else (result, None)
    outputs, gradients = [y], [lay_out(numbers(*y.shape, dtype=y.dtype), call["dy_layout"])]
    values = {"y": y}
    if state is not None:
        outputs += [getattr(state, key) for key in STATES]
        gradients += state_gradients(numbers, state)
        values |= state_values(state)
    return values | _gradients(outputs, gradients, leaves)


def _gradients(outputs: list[Tensor], gradients: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    pairs = [(x, g) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad]
    got = torch.autograd.grad([x for x, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    return {"d" + key: g for key, g in zip(leaves, got, strict=True) if g is not None}


def _recurrence(call, numbers, batch, tokens, acc, leaves, bias, packing) -> dict[str, Tensor]:
    options = {}
    if call["before"] is not None:
        initial = numbers(len(call["before"]), call["heads"], call["dim"], dtype=acc).requires_grad_()
        leaves["initial_state"] = initial
        lengths = torch.tensor(call["before"], dtype=torch.int32, device=numbers.device)
        options = {"initial_state": initial, "lengths": lengths}
    inputs = draw(numbers, call, batch, tokens, leaves)
    result = rat_ext.chunk_recurrence(
        **inputs, chunk_size=call["chunk"], return_state=call["return_state"], **bias, **packing, **options
    )
    outputs = list(result) if call["return_state"] else [result]
    gradients = [lay_out(numbers(*outputs[0].shape, dtype=outputs[0].dtype), call["dy_layout"])]
    gradients += [numbers(*x.shape, dtype=x.dtype) for x in outputs[1:]]
    return dict(zip(("y", "final_state"), outputs, strict=False)) | _gradients(outputs, gradients, leaves)


@torch.no_grad()
def _decode(call, numbers, common, state) -> dict[str, Tensor]:
    dtype = torch.float32 if call["autocast"] else call["dtype"]
    narrow, wide = (call["batch"], call["groups"], call["dim"]), (call["batch"], call["heads"], call["dim"])
    state = state.detach().reserve(max(call["before"]) + call["steps"])
    slots = None
    if call["slots"]:
        order = list(range(call["batch"]))
        random.Random(call["tokens"]).shuffle(order)
        slots = torch.tensor([-1, *order[1:]], device=numbers.device)
    values = {}
    for step in range(call["steps"]):
        options = {"out_gate": numbers(*wide, dtype=dtype)} if call["out_gate"] else {}
        q, k = numbers(*narrow, dtype=dtype), numbers(*narrow, dtype=dtype)
        v, gate = numbers(*wide, dtype=dtype), numbers(*wide, dtype=dtype, mean=call["gate_mean"])
        values[f"y{step}"] = rat_ext.rat_decode_step(q, k, v, gate, state, slots=slots, **common, **options)
    return values | state_values(state)


# ---- the program -----------------------------------------------------------------------------------------------------


def record(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    dtypes = GPU_DTYPES if cuda else CPU_DTYPES
    calls = {f"{seed:03d}": random_call(seed, dtypes) for seed in range(options.calls)}
    if cuda and not options.small:
        calls |= {f"large{i:02d}": call for i, call in enumerate(large_calls())}
    found, begin = {}, time.perf_counter()
    for index, call in calls.items():
        name, seed = name_of(index, call), zlib.crc32(index.encode())
        try:
            first = {key: digest(x) for key, x in run(call, seed, device).items()}
            again = {key: digest(x) for key, x in run(call, seed, device).items()}
        except (ValueError, torch.OutOfMemoryError, NotImplementedError) as error:
            found[name] = {"error": str(error).splitlines()[0][:120]}
            print(f"{name}: {found[name]['error']}", file=sys.stderr)
            continue
        found[name] = {key: sha if sha == again[key] else "unstable" for key, sha in first.items()}
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    result = {
        "device": where, "torch": torch.__version__, "package": str(Path(rat_ext.__file__).parent),
        "forced": {key: value for key, value in os.environ.items() if key.startswith("RAT_EXT_")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "calls": found,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    outputs = sum(map(len, found.values()))
    unstable = sum(sha == "unstable" for call in found.values() for sha in call.values())
    errors = sum("error" in call for call in found.values())
    seconds = time.perf_counter() - begin
    print(f"{len(found)} calls, {outputs} outputs, {unstable} unstable, {errors} refused, {seconds:.0f} s: {options.out}")
    return 0


def compare(paths: list[Path]) -> int:
    before, after = (json.loads(path.read_text()) for path in paths)
    for key in ("device", "torch", "forced"):
        if before[key] != after[key]:
            print(f"note: {key} differs: {before[key]} and {after[key]}")
    same = different = skipped = 0
    for name in sorted({*before["calls"], *after["calls"]}):
        one, two = before["calls"].get(name), after["calls"].get(name)
        if one is None or two is None or one.keys() != two.keys():
            different += 1
            print(f"{name}: {sorted(one) if one else 'absent'} became {sorted(two) if two else 'absent'}")
            continue
        unlike = [key for key in one if one[key] != two[key] and "unstable" not in (one[key], two[key])]
        unstable = sum("unstable" in (one[key], two[key]) for key in one)
        skipped += unstable
        same += len(one) - len(unlike) - unstable
        different += len(unlike)
        if unlike:
            print(f"{name}: {', '.join(unlike)}")
    print(f"{same} outputs have the same bits, {different} differ, {skipped} are unstable")
    return 1 if different else 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--calls", type=int, default=300, help="random calls (default: 300)")
    p.add_argument("--small", action="store_true", help="leave out the large calls that a GPU runs beside them")
    p.add_argument("--out", type=Path, help="JSON file to write")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    options = p.parse_args()
    if options.compare:
        return compare(options.compare)
    if not options.out:
        p.error("--out or --compare is needed")
    return record(options)


if __name__ == "__main__":
    sys.exit(main())
