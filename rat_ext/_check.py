"""Part ``check`` of ``python -m rat_ext``: the ops against their definition in float64.

The rule is that of the tests: an op may be at most twice as far from float64 as the eager definition in the op's own
dtype, plus a few units of rounding, for cases that the eager one happens to get exactly.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import reference
from ._console import Console
from .cache import RATCache, state_dtype
from .ops import rat_attention, rat_decode_step
from .rotary import rotary_tables

PHASES = ("forward", "backward", "prefill", "decode")
# Units of rounding of the dtype, relative to the largest value, that are allowed beside twice the eager error.
UNITS = {torch.float64: 4096, torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    name: str
    dtype: torch.dtype
    batch: int = 2
    tokens: int = 200
    heads: int = 4
    groups: int = 2
    dim: int = 64
    chunk_size: int = 16
    sequences: tuple[int, ...] = ()  # lengths of packed sequences: batch is 1, tokens their sum
    new_tokens: int = 0  # of the phase decode

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B={self.batch} T={self.tokens} H={self.heads} G={self.groups} D={self.dim} L={self.chunk_size}"
        return f"{dtype:<8} {self.name:<15} {sizes}"


def cases(device: torch.device) -> list[Case]:
    """A handful that covers dtypes, partial chunks, L = 1, L >= T, packing, decode across chunk boundaries."""
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    found = [
        Case("usual", f32, new_tokens=20),
        Case("odd sizes", f32, batch=3, tokens=101, heads=3, groups=1, dim=40, chunk_size=7, new_tokens=15),
        Case("attention", f32, tokens=90, chunk_size=1, new_tokens=5),
        Case("recurrence", f32, tokens=150, chunk_size=1 << 40, new_tokens=10),
        Case("packed rows", f32, batch=1, tokens=150, sequences=(1, 0, 77, 16, 56)),
        Case("usual", bf16, new_tokens=20),
        Case("wide heads", bf16, batch=1, tokens=130, groups=4, dim=256, chunk_size=32, new_tokens=20),
        Case("packed rows", bf16, batch=1, tokens=150, sequences=(1, 0, 77, 16, 56)),
        Case("usual", f16, new_tokens=20),
    ]
    if device.type == "cuda":
        found.append(Case("longer", bf16, batch=4, tokens=2048, heads=16, dim=128, new_tokens=20))
    else:
        found.append(Case("usual", torch.float64, new_tokens=20))
    return found


# ---- one case --------------------------------------------------------------------------------------------------------


def _inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    narrow = (case.batch, case.tokens + case.new_tokens, case.groups, case.dim)
    wide = (case.batch, case.tokens + case.new_tokens, case.heads, case.dim)
    tensors = {"q": normal(*narrow), "k": normal(*narrow), "v": normal(*wide), "gate": 2 * normal(*wide)}
    tensors["out_gate"] = normal(*wide)
    tensors["gate_bias"] = normal(case.heads, case.dim, dtype=state_dtype(case.dtype))
    tensors["dy"] = normal(case.batch, case.tokens, case.heads, case.dim)
    return tensors


def _cut(tensors: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {key: x[:, begin:end] if x.dim() == 4 else x for key, x in tensors.items()}


def _run(op, step, case: Case, tensors: dict[str, Tensor], options: dict) -> dict[str, dict[str, Tensor]]:
    """Results of every phase by name. ``op`` and ``step`` are rat_attention and rat_decode_step of ops or reference."""
    dy = tensors["dy"]
    tensors = {key: x for key, x in tensors.items() if key != "dy"}
    leaves = {key: x.detach().requires_grad_() for key, x in _cut(tensors, 0, case.tokens).items()}
    y = op(**leaves, chunk_size=case.chunk_size, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    found = {"forward": {"y": y.detach()}, "backward": {"d" + key: g for key, g in zip(leaves, grads, strict=True)}}
    if case.sequences:
        return found

    with torch.no_grad():
        middle = case.tokens * 3 // 5 + 1  # inside a chunk
        first, state = op(**_cut(tensors, 0, middle), chunk_size=case.chunk_size, return_state=True, **options)
        last, state = op(
            **_cut(tensors, middle, case.tokens),
            chunk_size=case.chunk_size,
            initial_state=state,
            return_state=True,
            **options,
        )
        closed = case.tokens // case.chunk_size
        found["prefill"] = {
            "y": torch.cat((first, last), dim=1),
            "running_k": state.running_k,
            "running_v": state.running_v,
        }
        found["prefill"] |= {"chunk_k": state.chunk_k[:, :, :closed], "chunk_v": state.chunk_v[:, :, :closed]}
        found["decode"] = {"y": _decode(step, case, tensors, state, options)}
    return found


def _define(case: Case, tensors: dict[str, Tensor], options: dict) -> dict[str, dict[str, Tensor]]:
    """:func:`_run` of the definition. Its many small operations gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(reference.rat_attention, reference.rat_decode_step, case, tensors, options)
    finally:
        torch.set_num_threads(threads)


def _decode(step, case: Case, tensors: dict[str, Tensor], state: RATCache, options: dict) -> Tensor:
    state = state.reserve(case.tokens + case.new_tokens)
    bias = {"gate_bias": tensors["gate_bias"]}
    ys = []
    for t in range(case.tokens, case.tokens + case.new_tokens):
        token = {key: x[:, t] for key, x in tensors.items() if x.dim() == 4}
        ys.append(step(**token, **bias, cache=state, **options))
    return torch.stack(ys, dim=1)


def _floors(case: Case, tensors: dict[str, Tensor], y: Tensor) -> dict[str, float]:
    """What rounding the saved y to its dtype may cost a gradient: ds = p (do . V - Delta), and Delta = sum dy y."""
    scale = case.dim**-0.5
    delta = torch.finfo(case.dtype).eps / 2 * scale * float((tensors["dy"].double() * y).abs().sum(-1).max())
    q, k = (float(tensors[key].abs().max()) for key in ("q", "k"))
    per_group, tokens = (case.heads / case.groups) ** 0.5, (case.batch * case.tokens) ** 0.5
    gate = 2 * delta * q * k
    return {"dq": delta * k * per_group, "dk": 2 * delta * q * per_group, "dgate": gate, "dgate_bias": gate * tokens}


def _worst(case: Case, actual: dict, eager: dict, exact: dict, floors: dict[str, float]) -> dict:
    """The tensor of a phase that is nearest to, or furthest over, its limit. Figures: relative to its largest value."""
    worst = None
    for key, want in exact.items():
        if not want.numel():
            continue
        want = want.double()
        largest = float(want.abs().max())
        error = float((actual[key].double() - want).abs().max())
        allowed = float((eager[key].double() - want).abs().max())
        limit = 2 * allowed + UNITS[case.dtype] * torch.finfo(case.dtype).eps * largest + floors.get(key, 0.0)
        size = largest or 1.0
        ratio = error / limit if error == error else float("inf")
        row = {
            "tensor": key,
            "error": error / size,
            "eager_error": allowed / size,
            "limit": limit / size,
            "ratio": ratio,
        }
        row["ok"] = ratio <= 1
        if worst is None or row["ratio"] > worst["ratio"]:
            worst = row
    return worst


def check_case(case: Case, device: torch.device) -> list[dict]:
    """One row a phase: error, eager_error, limit (relative to the largest value of ``tensor``), ok."""
    tensors = _inputs(case, device)
    total = case.tokens + case.new_tokens
    options: dict = {}
    if case.sequences:
        options["cu_seqlens"] = torch.tensor((0, *case.sequences)).cumsum(0).to(device, torch.int32)
    rows = -(-total // case.chunk_size)

    def tables(dtype: torch.dtype) -> dict[str, Tensor]:
        cos, sin = rotary_tables(rows, case.dim, base=100.0, device=device, dtype=state_dtype(dtype))
        return {"rotary_cos": cos, "rotary_sin": sin}

    low = options | tables(case.dtype)
    double = options | {key: x.double() for key, x in tables(case.dtype).items()}
    exactly = {key: x.double() for key, x in tensors.items()}
    actual = _run(rat_attention, rat_decode_step, case, tensors, low)
    eager = exact = _define(case, exactly, double)
    if case.dtype != torch.float64:
        eager = _define(case, tensors, low)
    floors = _floors(case, tensors, exact["forward"]["y"])
    found = []
    for phase in PHASES:
        if phase in exact:
            worst = _worst(case, actual[phase], eager[phase], exact[phase], floors)
            found.append({"case": str(case), "phase": phase, **worst})
    return found


def run(console: Console, device: torch.device) -> dict:
    """All cases; prints the table. Returns ``{"rows": [...], "ok": bool}``."""
    console.title("check: compiled ops against the definition in float64")
    rows = []
    listed = cases(device)
    with console.bar(len(listed), "check") as advance:
        for case in listed:
            rows += check_case(case, device)
            advance(1, str(case))
    shown, last = [], None
    for row in rows:
        case = row["case"] if row["case"] != last else ""
        last = row["case"]
        figures = (f"{row[key]:.1e}" for key in ("error", "eager_error", "limit"))
        shown.append((case, row["phase"], *figures, row["tensor"], "ok" if row["ok"] else "WRONG"))
    console.table(("case", "phase", "rat_ext", "eager", "limit", "worst tensor", ""), shown)
    wrong = sum(not row["ok"] for row in rows)
    console.print(
        "Errors are relative to the largest value of the tensor nearest to its limit: twice the eager error and "
        "a few roundings."
    )
    console.print(f"{len(rows) - wrong} of {len(rows)} agree" + (f", {wrong} DISAGREE" if wrong else ""))
    return {"rows": rows, "ok": not wrong}
