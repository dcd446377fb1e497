"""How the ops are held against their definition, for the tests, the demo and whoever changes a kernel.

A :class:`Case` holds the arguments of one call; :func:`attention_case` and :func:`recurrence_case` draw one in any layout,
packed or continued. :func:`evaluate` runs an op on it and returns outputs, states and every gradient by name. :func:`check`
runs the compiled op, the definition in the same dtype and the definition in float64, and asserts that the compiled op is at
most twice as far from float64 as the eager one.

Example:
    >>> import torch
    >>> from rat_ext import testing
    >>> values = testing.check(testing.attention_case("cpu", torch.float32, tokens=20, chunk_size=8))
    >>> sorted(values)
    ['dgate', 'dgate_bias', 'dk', 'dout_gate', 'dq', 'dv', 'y']
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rat_ext
from rat_ext import RATCache, reference
from rat_ext.cache import state_dtype

if TYPE_CHECKING:
    from rat_ext.parallel import ContextParallel

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "odd", "projection", "expanded_batch", "expanded_tokens", "expanded_heads")
STATE = ("chunk_k", "chunk_v", "running_k", "running_v")


def name(value: object) -> str | None:
    """The id of a dtype among pytest's parameters; None, pytest's own choice, for anything else."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


class Random:
    """Seeded normal numbers, drawn on the CPU: the same ones on every device."""

    def __init__(self, seed: int, device: torch.device | str, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None, size: float = 1.0) -> Tensor:
        """A tensor of ``shape`` with standard deviation ``size``, in ``dtype`` or the one of this source."""
        x = torch.randn(shape, generator=self.generator, device="cpu") * size  # whatever the default device is
        return x.to(self.device, dtype or self.dtype)


# ---- strides ---------------------------------------------------------------------------------------------------------


def lay_out(x: Tensor, layout: str) -> Tensor:
    """``x`` (B, T, heads, D) with other strides: one of ``LAYOUTS`` but "projection".

    Expanded layouts repeat the first entry. Memory between rows is NaN.
    """
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "odd":  # rows begin at odd addresses: no vector access is legal
        batch, tokens, heads, dim = x.shape
        flat = x.new_full((batch * tokens * (heads * (dim + 3) + 1) + 1,), float("nan"))
        row = heads * (dim + 3) + 1
        view = flat[1:].as_strided(x.shape, (tokens * row, row, dim + 3, 1), 1)
        view.copy_(x)
        return view
    if layout.startswith("expanded"):
        axis = ("batch", "tokens", "heads").index(layout.removeprefix("expanded_"))
        return x.narrow(axis, 0, 1).expand(x.shape) if x.shape[axis] else x
    raise ValueError(layout)


def lay_out_all(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Every (B, T, heads, D) tensor in ``layout``; "projection" makes them views of one (B, T, width) tensor."""
    wide = [key for key, x in tensors.items() if x.dim() == 4]
    if layout != "projection":
        return {key: lay_out(x, layout) if key in wide else x for key, x in tensors.items()}
    one = torch.cat([tensors[key].flatten(2) for key in wide], dim=2)
    parts = one.split([tensors[key][0, 0].numel() if tensors[key].numel() else 0 for key in wide], dim=2)
    views = {key: part.unflatten(2, tensors[key].shape[2:]) for key, part in zip(wide, parts, strict=True)}
    return {key: views.get(key, x) for key, x in tensors.items()}


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """One call of an op.

    Attributes:
        op: its name in :mod:`rat_ext`.
        tensors: the differentiable arguments by name.
        chunk_size: L.
        options: the other arguments by name.
        state: a state to continue from; of chunk_recurrence it is among ``tensors`` and ``options``.
        dy_layout: strides of the gradient of y.
        seed: of the gradients, which are drawn with seed + 1.
    """

    op: str
    tensors: dict[str, Tensor]
    chunk_size: int
    options: dict[str, Any]
    state: RATCache | None = None
    dy_layout: str = "contiguous"
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the op."""
        return self.tensors["gate" if self.op == "chunk_recurrence" else "q"].dtype


def make_state(
    random: Random, lengths: Sequence[int], heads: int, dim: int, chunk_size: int, rows: int | None = None
) -> RATCache:
    """A state of sequences of ``lengths``; what no token may read (dead rows, running states at a reset) is NaN."""
    closed = [length // chunk_size for length in lengths]
    rows = max(closed, default=0) if rows is None else rows
    n, acc = len(lengths), state_dtype(random.dtype)
    chunk_k, chunk_v = (random.normal(n, heads, rows, dim) for _ in range(2))
    running_k, running_v = (random.normal(n, heads, dim, dtype=acc) for _ in range(2))
    for i, length in enumerate(lengths):
        chunk_k[i, :, closed[i] :] = float("nan")
        chunk_v[i, :, closed[i] :] = float("nan")
        if length % chunk_size == 0:
            running_k[i] = running_v[i] = float("nan")
    device_lengths = torch.tensor(lengths, dtype=torch.int32, device=random.device)
    return RATCache(chunk_k, chunk_v, running_k, running_v, device_lengths, chunk_size, max(lengths, default=0))


def attention_case(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    op: str = "rat_attention",
    batch: int = 2,
    tokens: int = 70,
    heads: int = 4,
    groups: int = 2,
    dim: int = 32,
    chunk_size: int = 16,
    gate_size: float = 1.5,
    gate_mean: float = 0.0,
    gate_bias: bool = True,
    out_gate: bool = True,
    rotary: bool = True,
    scale: float | None = None,
    layout: str = "contiguous",
    dy_layout: str = "contiguous",
    sequences: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    return_state: bool = False,
    seed: int = 0,
) -> Case:
    """A random call of rat_attention or chunk_attention.

    Args:
        device, dtype: of the inputs; gate_bias and rotary tables are in the state dtype.
        gate_size, gate_mean: standard deviation and mean of the logits of the forget gate, which are cut at +-30.
        gate_bias, out_gate, rotary: whether the call has them.
        layout, dy_layout: strides of the inputs and of the gradient of y, see ``LAYOUTS``.
        sequences: lengths of packed sequences: batch is 1, tokens their sum.
        lengths: how many tokens each sequence had before: the call continues from a state.
        return_state, scale, seed: as they say.
    """
    random = Random(seed, device, dtype)
    if sequences is not None:
        batch, tokens = 1, sum(sequences)
    wide = (batch, tokens, heads, dim)
    narrow = (batch, tokens, groups, dim)
    q = random.normal(*narrow)
    if op == "rat_attention":
        gate = (random.normal(*wide, dtype=torch.float32, size=gate_size) + gate_mean).clamp(-30, 30).to(dtype)
        tensors = {"q": q, "k": random.normal(*narrow), "v": random.normal(*wide), "gate": gate}
        if gate_bias:
            tensors["gate_bias"] = random.normal(heads, dim, dtype=state_dtype(dtype))
    else:
        tensors = {"q": q, "k_states": random.normal(*wide), "v_states": random.normal(*wide)}
    if out_gate:
        tensors["out_gate"] = random.normal(*wide)
    options: dict[str, Any] = {"scale": scale, "return_state": return_state}
    if sequences is not None:
        options["cu_seqlens"] = cu_seqlens_of(sequences, device)
        if return_state and torch.device(device).type != "cpu":
            options["max_seqlen"] = max(sequences, default=0)  # which a CPU finds by itself
    longest = max(lengths, default=0) if lengths else 0
    if rotary:
        rows = -(-(longest + max(tokens, 1)) // chunk_size)
        cos, sin = rat_ext.rotary_tables(rows, dim, base=100.0, device=device, dtype=state_dtype(dtype))
        options |= {"rotary_cos": cos, "rotary_sin": sin}
    state = None if lengths is None else make_state(random, lengths, heads, dim, chunk_size)
    return Case(op, lay_out_all(tensors, layout), chunk_size, options, state, dy_layout, seed)


def recurrence_case(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    batch: int = 2,
    tokens: int = 70,
    heads: int = 4,
    groups: int = 2,
    dim: int = 32,
    chunk_size: int = 16,
    gate_size: float = 1.5,
    gate_mean: float = 0.0,
    gate_bias: bool = True,
    layout: str = "contiguous",
    dy_layout: str = "contiguous",
    sequences: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    return_state: bool = False,
    seed: int = 0,
) -> Case:
    """A random call of chunk_recurrence; the arguments are those of :func:`attention_case`."""
    random = Random(seed, device, dtype)
    if sequences is not None:
        batch, tokens = 1, sum(sequences)
    gate = random.normal(batch, tokens, heads, dim, dtype=torch.float32, size=gate_size) + gate_mean
    tensors = {"x": random.normal(batch, tokens, groups, dim), "gate": gate.clamp(-30, 30).to(dtype)}
    acc = state_dtype(dtype)
    if gate_bias:
        tensors["gate_bias"] = random.normal(heads, dim, dtype=acc)
    options: dict[str, Any] = {"return_state": return_state}
    if sequences is not None:
        options["cu_seqlens"] = cu_seqlens_of(sequences, device)
    tensors = lay_out_all(tensors, layout)
    if lengths is not None:
        initial = random.normal(len(lengths), heads, dim, dtype=acc)
        initial[[i for i, length in enumerate(lengths) if length % chunk_size == 0]] = float("nan")
        tensors["initial_state"] = initial
        options["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Case("chunk_recurrence", tensors, chunk_size, options, None, dy_layout, seed)


def cu_seqlens_of(sequences: Sequence[int], device: torch.device | str) -> Tensor:
    """(N + 1,) int32 of the lengths of N packed sequences."""
    return torch.tensor([0, *sequences], dtype=torch.int64).cumsum(0).to(device, torch.int32)


# ---- running an op ---------------------------------------------------------------------------------------------------


def valid_rows(state: RATCache) -> Tensor:
    """(N, 1, C, 1): which chunk rows of a state hold something."""
    rows = torch.arange(state.chunk_k.shape[2], device=state.lengths.device)
    return (rows < (state.lengths.long() // state.chunk_size)[:, None])[:, None, :, None]


def cotangents(case: Case, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random gradients of the outputs; those of dead chunk rows are NaN, which the op has to ignore."""
    like = case.tensors["gate" if case.op == "chunk_recurrence" else "q"]
    random = Random(case.seed + 1, like.device, like.dtype)
    acc = state_dtype(like.dtype)
    result = {}
    for key, x in outputs.items():
        if key == "y":
            result[key] = lay_out(random.normal(*x.shape), case.dy_layout)
        elif key in ("chunk_k", "chunk_v"):
            result[key] = random.normal(*x.shape).masked_fill(~outputs["valid"], float("nan"))
        elif key in ("running_k", "running_v", "final_state"):
            result[key] = random.normal(*x.shape, dtype=acc)
    return result


def evaluate(
    function: Callable[..., Any],
    case: Case,
    *,
    double: bool = False,
    grads: dict[str, Tensor] | None = None,
    backward: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs ``function`` on the case, forward and backward.

    Args:
        function: an op, its definition, or something with the same arguments.
        double: with all tensors in float64.
        grads: gradients of the outputs by name; by default those of :func:`cotangents`.
        backward: whether to ask for gradients.

    Returns:
        ``(values, grads)``: y, the tensors of a returned state, and "d" + name for the gradient of each input; dead chunk rows
        are 0. And the gradients that were fed in.
    """

    def leaf(x: Tensor, differentiable: bool = True) -> Tensor:
        x = x.detach()
        if double:
            x = x.double()
        return x.requires_grad_(backward and differentiable)

    inputs = {key: leaf(x) for key, x in case.tensors.items()}
    options = dict(case.options)
    for key in ("rotary_cos", "rotary_sin"):
        if options.get(key) is not None:
            options[key] = leaf(options[key], differentiable=False)
    leaves = dict(inputs)
    if case.state is not None:
        tensors = {key: leaf(getattr(case.state, key)) for key in STATE}
        options["initial_state"] = case.state.replace(**tensors)
        leaves |= {f"initial_{key}": x for key, x in tensors.items()}
    result = function(**inputs, chunk_size=case.chunk_size, **options)
    outputs: dict[str, Tensor] = {}
    lengths = None
    if not isinstance(result, tuple):
        outputs["y"] = result
    elif case.op == "chunk_recurrence":
        outputs["y"], outputs["final_state"] = result
    else:
        outputs["y"], state = result
        outputs |= {key: getattr(state, key) for key in STATE}
        lengths = state.lengths
        outputs["valid"] = valid_rows(state)
    if grads is None:
        grads = cotangents(case, outputs)
    values: dict[str, Tensor] = {}
    if backward:
        fed = {key: g.double() if double else g for key, g in grads.items() if outputs[key].requires_grad}
        got: Sequence[Tensor | None] = [None] * len(leaves)
        if fed:
            got = torch.autograd.grad([outputs[k] for k in fed], list(leaves.values()), list(fed.values()), allow_unused=True)
        for (key, x), g in zip(leaves.items(), got, strict=True):
            values["d" + key] = torch.zeros_like(x) if g is None else g
            assert values["d" + key].dtype == x.dtype and values["d" + key].shape == x.shape
    for key in ("chunk_k", "chunk_v"):
        if key in outputs:
            outputs[key] = outputs[key].masked_fill(~outputs["valid"], 0)
    outputs.pop("valid", None)
    values |= {key: x.detach() for key, x in outputs.items()}
    if lengths is not None:
        values["lengths"] = lengths
    return values, grads


def evaluate_on_ranks(cp: ContextParallel, case: Case, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """As :func:`evaluate`, of the row that the ranks hold together: each has its own part of everything.

    Values, a state that is returned included, are those of the whole row; a state is on rank 0 alone.
    """
    options = {key: x for key, x in case.options.items() if key not in ("cu_seqlens", "max_seqlen")}
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
    if isinstance(state, Tensor):
        outputs["final_state"] = state
    elif state is not None:
        outputs |= {key: getattr(state, key) for key in STATE}
    fed = {key: cp.shard(g) if key == "y" else g for key, g in grads.items() if key in outputs}
    got = torch.autograd.grad([outputs[key] for key in fed], list(leaves.values()), list(fed.values()), allow_unused=True)
    values = {}
    for (key, x), g in zip(leaves.items(), got, strict=True):
        total = torch.zeros_like(x) if g is None else g.contiguous()
        if x.dim() == 2:  # of a parameter every rank has a part
            torch.distributed.all_reduce(total, group=cp.group)
        else:
            total = cp.gather(cp.shard(total))
        values["d" + key] = total
    with torch.no_grad():
        values["y"] = cp.gather(y)
    values |= {key: x.detach() for key, x in outputs.items() if key != "y"}
    if isinstance(state, RATCache):
        valid = valid_rows(state)
        values |= {key: values[key].masked_fill(~valid, 0) for key in ("chunk_k", "chunk_v")} | {"lengths": state.lengths}
    return values


def training(case: Case) -> Callable[[], dict[str, Tensor]]:
    """Forward + backward of y alone and nothing else, on tensors that stay: what graphs capture and streams run."""
    leaves = {key: x.detach().requires_grad_() for key, x in case.tensors.items()}
    dy = Random(case.seed + 1, leaves["q"].device, case.dtype).normal(*leaves["v" if "v" in leaves else "v_states"].shape)

    def run() -> dict[str, Tensor]:
        result = getattr(rat_ext, case.op)(**leaves, chunk_size=case.chunk_size, initial_state=case.state, **case.options)
        y = result[0] if isinstance(result, tuple) else result
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach()} | {"d" + key: g for key, g in zip(leaves, grads, strict=True)}

    return run


# ---- the rule --------------------------------------------------------------------------------------------------------


def floors(case: Case, exact: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, float]:
    """What rounding y to its dtype may cost a gradient, however exact the rest.

    The backward gets Delta_t = sum_d dy_t y_t from the saved y, which is rounded: an error of up to (eps / 2) sum
    |dy y| in ds_tj = p_tj (do_t . V_j - Delta_t), also where the two terms cancel (a query that sees one key has no dq
    at all). From there it reaches dq times scale and a key, dk times scale, a query and 1 - f, dgate times a key
    more and f (1 - f).
    """
    if "y" not in grads or "dq" not in exact or not exact["y"].numel():
        return {}
    q, k = case.tensors["q"].double(), case.tensors["k" if "k" in case.tensors else "k_states"].double()
    heads, dim = exact["y"].shape[2:]
    scale = abs(dim**-0.5 if case.options.get("scale") is None else case.options["scale"])
    rounding = torch.finfo(case.dtype).eps / 2 * scale
    delta = rounding * float((grads["y"].double() * exact["y"]).abs().sum(-1).max())
    per_group = (heads // q.shape[2]) ** 0.5
    q_max, k_max = float(q.abs().max()), float(k.abs().max())
    if case.state is not None:
        k_max = max(
            k_max,
            *(float(x.nan_to_num().abs().max()) if x.numel() else 0.0 for x in (case.state.chunk_k, case.state.running_k)),
        )
    key = 2 * delta * q_max
    if "gate" in case.tensors:
        logits = case.tensors["gate"].double()
        if "gate_bias" in case.tensors:
            logits = logits + case.tensors["gate_bias"].double()
        keep, take = float(torch.sigmoid(logits).max()), float(torch.sigmoid(-logits).max())
        slope = float((torch.sigmoid(logits) * torch.sigmoid(-logits)).max())
    else:
        keep, take, slope = 0.0, 1.0, 0.0
    gate = 4 * slope * key * k_max
    tokens = (q.shape[0] * q.shape[1]) ** 0.5
    return {
        "dq": delta * k_max * per_group,
        "dk": take * key * per_group,
        "dk_states": key * per_group,
        "dgate": gate,
        "dgate_bias": gate * tokens,
        "dinitial_chunk_k": key,
        "dinitial_running_k": keep * key,
    }


# Units of rounding, relative to the largest value, that the compiled op may be off where the eager one happens to be exact.
# A float32 op sums hundreds of terms in its own order and has its own exponential; low precisions round once, at the end.
ULPS = {torch.float64: 4096, torch.float32: 16, torch.bfloat16: 2, torch.float16: 2}


def judge(
    actual: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    floor: dict[str, float] | None = None,
    factor: float = 2.0,
) -> Iterator[dict[str, Any]]:
    """err(actual) <= factor * err(eager) + a floor of a few roundings, by the largest and by the mean square error.

    Beside them a few of the smallest normal numbers of the state dtype: below that what is lost is lost to underflow, and a
    gate that is shut leaves 1e-38 where the exact value is 0.

    Yields both for every tensor: ``tensor, measure, error, eager, limit, largest`` (value) and ``worst`` (index).
    """
    for key, want in exact.items():
        got = actual[key]
        assert got.shape == want.shape, f"{key}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if key == "lengths":
            assert got.tolist() == want.tolist()
            continue
        if not got.numel():
            continue
        # A running state at a length of 0 is undefined in, and passed on by an empty sequence.
        undefined = want.isnan()
        want, got, mine = (x.double().masked_fill(undefined, 0) for x in (want, got, eager[key]))
        assert got.isfinite().all(), f"{key}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
        error, allowed = (got - want).abs(), (mine - want).abs()
        unit = ULPS[dtype] * torch.finfo(dtype).eps
        extra = (floor or {}).get(key, 0.0)
        # Where the truth is 0: a gate that is shut is 2^-125 in kernels of two-byte types, times what it multiplies, summed.
        least = 64 * torch.finfo(state_dtype(dtype)).tiny
        # The floor is for D roundings that all point one way. They are independent: their mean square is 1 / D of that.
        share = {"max": 1.0, "rms": want.shape[-1] ** -0.5}
        for measure, reduce in (("max", Tensor.max), ("rms", lambda x: x.square().mean().sqrt())):
            limit = factor * float(reduce(allowed)) + unit * float(reduce(want.abs())) + extra * share[measure] + least
            yield {
                "tensor": key,
                "measure": measure,
                "error": float(reduce(error)),
                "eager": float(reduce(allowed)),
                "limit": limit,
                "largest": float(want.abs().max()),
                "worst": tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)),
            }


def compare(
    actual: dict[str, Tensor],
    eager: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    floor: dict[str, float] | None = None,
    factor: float = 2.0,
) -> None:
    """Asserts what :func:`judge` measures."""
    assert actual.keys() == exact.keys()
    for row in judge(actual, eager, exact, dtype, floor, factor):
        assert row["error"] <= row["limit"], (
            f"{row['tensor']}: {row['measure']} error {row['error']:.3e} is over {row['limit']:.3e} (eager {row['eager']:.3e}, "
            f"largest value {row['largest']:.3e}, worst at {row['worst']})"
        )


def define(
    case: Case, backward: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """What the definition gives in float64 and in the case's dtype, the gradients fed in, and the floors of the rule."""
    definition = getattr(reference, case.op)
    exact, grads = evaluate(definition, case, double=True, backward=backward)
    grads = {key: g.to(case.dtype if key in ("y", "chunk_k", "chunk_v") else g.dtype) for key, g in grads.items()}
    eager = exact if case.dtype == torch.float64 else evaluate(definition, case, grads=grads, backward=backward)[0]
    return exact, eager, grads, floors(case, exact, grads) if backward else {}


def check(case: Case, *, function: Callable[..., Any] | None = None, backward: bool = True) -> dict[str, Tensor]:
    """The twice-eager rule for outputs, states and every gradient of a case. Returns what the compiled op computed."""
    exact, eager, grads, floor = define(case, backward)
    actual, _ = evaluate(function or getattr(rat_ext, case.op), case, grads=grads, backward=backward)
    assert actual["y"].dtype == case.dtype
    compare(actual, eager, exact, case.dtype, floor)
    return actual


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; NaN counts as equal to itself."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Asserts that two results have the same names and, by name, the same bits."""
    assert a.keys() == b.keys()
    for key in a:
        assert same_bits(a[key], b[key]), f"{key} differs in its bits"


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs ``code`` in a process of its own, whose modules are found as those of this one are."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
