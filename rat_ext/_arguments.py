"""From the arguments of a public op to those of its operator: what each is, which types it may have, what it becomes.

The table of this module knows kinds (rows, tables, flags); ranks, shapes, dtypes, devices and values are checked in csrc/ops
for all devices alike, tracing included (_autograd.py). Either way a wrong argument raises ``ValueError``, one line that reads
``rat_ext.<op>: <argument>: expected <...>, got <...>``.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _build_info  # noqa: F401  (loading the extension registers the operators)
from .cache import RATCache, readable, state_dtype

Given = dict[str, Any]  # the arguments of a public op by name

# Tensors of tokens, in the dtype of the op: autocast casts them. The first that an op has tells dtype and device.
ROWS = ("projection", "q", "k", "v", "x", "gate", "out_gate")
# Small tensors, in the dtype of states.
TABLES = ("gate_bias", "rotary_cos", "rotary_sin")
# Facts without a derivative: a tensor that needs one is an error, not silence.
WITHOUT_GRADIENT = ("rotary_cos", "rotary_sin")
# What a cache brings, in the order of the operators' arguments: of a state to continue from, and of a pool that is updated in
# place.
STATE = ("chunk_k", "chunk_v", "running_k", "running_v", "lengths")
# What an operator takes and no public op: it is made here.
MADE = ("chunk_rows",)
POOL = ("page_table", "chunk_k", "chunk_v", "scale_k", "scale_v", "running_k", "running_v", "lengths", "error", "workspace")
# Flags that a brief call leaves out, and tensors that are None.
USUAL = {"return_state": False, "deterministic": True}


def wrong(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """``op``: an op of the package, or a class, which is known by its name alone."""
    subject = op if op[0].isupper() or op.startswith("rat_ext.") else f"rat_ext.{op}"
    raise ValueError(f"{subject}: {argument}: expected {expected}, got {got}")


# ---- types ------------------------------------------------------------------------------------------------------------


def _kind(x: object) -> str:
    """In a few words on one line, whatever it is."""
    if x is None:
        return "None"
    named = isinstance(x, (int, float, str))
    return f"{type(x).__name__} {reprlib.repr(x)}".replace("\n", " ") if named else type(x).__name__


def integer(op: str, name: str, x: Any) -> Any:
    """``x`` as an int; anything that counts, NumPy's ints too, but no tensor: reading it would wait for its device."""
    if type(x) is int or isinstance(x, torch.SymInt):
        value = x
    elif isinstance(x, (Tensor, bool)) or not hasattr(x, "__index__"):
        wrong(op, name, "an int", _kind(x))
    else:
        try:
            value = operator.index(x)
        except Exception:  # a class, an array of several numbers
            wrong(op, name, "an int", _kind(x))
    if type(value) is int and not -(2**63) <= value < 2**63:
        wrong(op, name, "an int of 64 bits", reprlib.repr(value))
    return value


def real(op: str, name: str, x: Any) -> Any:
    if isinstance(x, (torch.SymFloat, torch.SymInt)):
        return x
    if isinstance(x, (Tensor, bool, str)) or not hasattr(x, "__float__"):
        wrong(op, name, "a float or None", _kind(x))
    try:
        return float(x)
    except Exception:  # an array of several numbers, an int past the largest float
        wrong(op, name, "a float or None", _kind(x))


def flag(op: str, name: str, x: Any) -> bool:
    is_array = str(getattr(x, "dtype", "")) == "bool" and getattr(x, "ndim", None) == 0  # NumPy's bool
    if isinstance(x, Tensor) or not (is_array or (isinstance(x, int) and x in (0, 1))):
        wrong(op, name, "a bool", _kind(x))
    return bool(x)


def floating(op: str, name: str, x: Any) -> torch.dtype | None:
    """A dtype that the ops compute in, or None."""
    expected = "bfloat16, float16, float32, float64 (of torch) or None"
    if x is not None and not isinstance(x, torch.dtype):
        wrong(op, name, expected, _kind(x))
    if x not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wrong(op, name, expected, str(x).removeprefix("torch."))
    return x


def device_of(op: str, name: str, x: Any) -> torch.device | None:
    try:
        return None if x is None else torch.device(x)
    except (TypeError, RuntimeError, ValueError):
        wrong(op, name, "a torch.device, a name of one or None", _kind(x))


# Of each type of number that a schema may name: Python's, and what makes it of others.
_NUMBERS: dict[str, tuple[type, Callable[[str, str, Any], Any]]] = {
    "int": (int, integer),  # as SymInt appears too
    "float": (float, real),
    "bool": (bool, flag),
}


class Operator:
    """An operator and its schema, by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.overload = getattr(torch.ops.rat_ext, name).default
        schema = self.overload._schema
        self.types = {a.name: str(a.type) for a in schema.arguments}
        self.arguments = tuple(self.types)
        self.results = tuple(r.name for r in schema.returns)
        self.has_state = "chunk_rows" in self.types  # takes the tensors of a RATCache, and returns them
        self.pick = operator.itemgetter(*self.arguments)
        # Of a call without a state: its tensors are as absent as the state is.
        self.pick_without_state = operator.itemgetter(*("initial_state" if n in STATE else n for n in self.arguments))
        # The overload "brief" of eager calls leaves out what most do without. `decisive`: arguments of the public op that tell
        # whether a call is one, and their values then.
        self.eager = getattr(torch.ops.rat_ext_eager, name)
        self.brief = tuple(a.name for a in self.eager.brief._schema.arguments)
        self.pick_brief = operator.itemgetter(*self.brief)
        self.brief_saves = len(self.eager.brief._schema.returns) > len(self.results)  # returns copies of rows, for the backward
        self.left_out = tuple((i, USUAL.get(n)) for i, n in enumerate(self.arguments) if n not in self.brief)
        decisive = ["initial_state" if n in STATE and self.has_state else n for n in self.arguments if n not in self.brief]
        self.decisive = tuple((n, USUAL.get(n)) for n in dict.fromkeys(decisive))
        self.rows = tuple(n for n in ROWS if n in self.types)
        self.lead = self.rows[0]
        self.sized = next(n for n in ("projection", "v", "x") if n in self.types)  # its shape tells tokens and head size
        self.tables = tuple(n for n in TABLES if n in self.types)
        self.has_scale = "scale" in self.types
        self.numbers = tuple((n, *_NUMBERS[t]) for n, t in self.types.items() if t in _NUMBERS and n not in MADE)

    def whole(self, brief: tuple) -> list:
        """All arguments, from those of a brief call."""
        args = list(brief)
        for place, usual in self.left_out:
            args.insert(place, usual)
        return args


def check_types(op: str, spec: Operator, given: Given, names: dict[str, str]) -> None:
    """Called where a call has failed, and before one is traced: is each number one, and each tensor one that kernels know?

    ``names``: what the caller knows an argument by, where it is not its name.
    """
    for name, _, convert in spec.numbers:
        if given.get(name) is not None:
            convert(op, name, given[name])
    for name, kind in spec.types.items():
        x = given.get(name)
        optional = kind == "Optional[Tensor]"
        if (kind != "Tensor" and not optional) or (x is None and (optional or name not in given)):
            continue
        shown = names.get(name, name)
        if not isinstance(x, Tensor):
            wrong(op, shown, "a tensor or None" if optional else "a tensor", _kind(x))
        if x.is_nested:
            wrong(op, shown, "a dense tensor (of packed sequences one row, with cu_seqlens)", "a nested (jagged) one")
        if x.is_quantized:
            wrong(op, shown, "a tensor of floating numbers", "a quantized one")
        if x.layout != torch.strided:
            wrong(op, shown, "a dense tensor", f"one of layout {str(x.layout).removeprefix('torch.')}")
        if x.device.type not in ("cpu", "cuda", "meta"):
            wrong(op, shown, "a tensor on the CPU or a CUDA GPU", f"one on {x.device}")
        if name in TABLES and not x.is_floating_point():
            wrong(op, shown, "a floating dtype", str(x.dtype).removeprefix("torch."))


# ---- what arguments become ----------------------------------------------------------------------------------------------


def _cast(names: tuple[str, ...], given: Given, device: str) -> None:
    """Under autocast, float32 inputs are computed in the autocast dtype; their gradients come back in float32."""
    dtype = torch.get_autocast_dtype(device)
    for name in names:
        x = given[name]
        if x is not None and x.is_floating_point() and x.dtype != torch.float64:
            given[name] = x.to(dtype)


def take_pool(given: Given, cache: RATCache) -> None:
    """The tensors of a cache that is updated in place; its scratch is the caller's to make."""
    tensors = cache.tensors()
    given["chunk_k"], given["chunk_v"], given["running_k"], given["running_v"], given["lengths"] = tensors
    given["page_table"], given["scale_k"], given["scale_v"] = cache.page_table, cache.scale_k, cache.scale_v
    given["error"] = cache.error


def _longest(op: str, given: Given, tokens: int) -> int:
    """The most tokens that a sequence of the call can have, as far as the host knows."""
    limit, cu_seqlens = given["max_seqlen"], given["cu_seqlens"]
    if limit is not None:
        limit = integer(op, "max_seqlen", limit)
        if cu_seqlens is None:
            wrong(op, "max_seqlen", "None without cu_seqlens", limit)
        if limit < 0:
            wrong(op, "max_seqlen", "at least 0", limit)
    known = (
        isinstance(cu_seqlens, Tensor) and readable(cu_seqlens) and cu_seqlens.dtype == torch.int32 and cu_seqlens.dim() == 1
    )
    if known and cu_seqlens.numel() > 1:
        longest = min(max(int(cu_seqlens.diff().max()), 0), tokens)
        if limit is not None and limit < longest:
            wrong(op, "max_seqlen", f"at least the longest sequence's {longest} tokens", limit)
        return longest if limit is None else min(limit, tokens)
    return tokens if limit is None else min(limit, tokens)


def _take_state(op: str, given: Given, shape: tuple, compiling: bool) -> None:
    """The tensors of ``initial_state``, the chunk rows to allocate, and the host's bound of the lengths afterwards."""
    state: RATCache | None = given["initial_state"]
    chunk_size = given["chunk_size"]
    tokens = shape[1] if len(shape) > 1 else 0
    step = chunk_size if chunk_size > 1 else 1
    longest = _longest(op, given, tokens) if given["cu_seqlens"] is not None or given["max_seqlen"] is not None else tokens
    if state is None:
        given["bound"] = longest
        if given["cu_seqlens"] is not None and not given["return_state"]:
            chunks = tokens // step + max(given["cu_seqlens"].numel() - 1, 0)
        else:
            chunks = longest // step
    else:
        if not isinstance(state, RATCache):
            wrong(op, "initial_state", "a RATCache or None", _kind(state))
        if state.chunk_size != chunk_size:
            wrong(op, "initial_state", f"a cache of chunk_size {chunk_size}", f"one of {state.chunk_size}")
        given["chunk_k"], given["chunk_v"], given["running_k"], given["running_v"], given["lengths"] = state.tensors()
        if not state.plain:
            wrong(op, "initial_state", "a cache without draft tokens, pages and FP8 (such a one is for cache=)", repr(state))
        given["bound"] = state.length_bound + longest
        chunks = max(state.rows, given["bound"] // step)
    # The tracer makes a graph of its own for a size of 0 or 1: with two rows at least, one graph serves every length.
    given["chunk_rows"] = max(chunks, 2) if compiling else chunks


def split_projection(op: str, given: Given) -> None:
    """q, k, v, gate and out_gate as views of the projection: what an operator without a packed form takes."""
    projection = given["projection"]
    if not isinstance(projection, Tensor) or projection.dim() != 3:
        got = f"shape {tuple(projection.shape)}" if isinstance(projection, Tensor) else _kind(projection)
        wrong(op, "projection", "a tensor (B, T, width)", got)
    for name in ("num_heads", "num_groups"):
        given[name] = integer(op, name, given[name])
    given["has_out_gate"] = flag(op, "has_out_gate", given["has_out_gate"])
    heads, groups = given["num_heads"], given["num_groups"]
    if heads < 1:
        wrong(op, "num_heads", "at least 1", heads)
    if groups < 1 or heads % groups:
        wrong(op, "num_groups", f"a divisor of the number of heads {heads}", groups)
    sizes = [groups, groups, heads, heads] + [heads] * given["has_out_gate"]
    if projection.shape[2] % sum(sizes):
        wrong(op, "projection", f"a width that is a multiple of {sum(sizes)}", projection.shape[2])
    device = "cuda" if projection.is_cuda else "cpu"
    if torch.is_autocast_enabled(device):
        _cast(("projection",), given, device)
        projection = given["projection"]
    parts = projection.unflatten(2, (sum(sizes), -1)).split(sizes, dim=2)
    given["q"], given["k"], given["v"], given["gate"] = parts[:4]
    given["out_gate"] = parts[4] if given["has_out_gate"] else None
    del given["projection"]


def _default_scale(given: Given, shape: tuple) -> float:
    dim = shape[-1] if shape else 1
    if "projection" in given:
        parts = 2 * given["num_groups"] + (3 if given["has_out_gate"] else 2) * given["num_heads"]
        dim = dim // parts if parts > 1 else dim
    return dim**-0.5 if dim > 1 else 1.0


def prepare(op: str, spec: Operator, given: Given, compiling: bool = False, brief: bool = False) -> tuple:
    """The operator's arguments, in order. Adds to ``given`` what the operator takes and the public op does not.

    Every small call pays for each line here, about as much as for a tensor that it allocates.

    Args:
        brief: those of the overload "brief", which are fewer, where the call needs no others.
    """
    shape = tuple(given[spec.sized].shape)
    if spec.has_scale and given["scale"] is None:
        given["scale"] = _default_scale(given, shape)
    for name, exact, convert in spec.numbers:
        if type(given[name]) is not exact:
            given[name] = convert(op, name, given[name])
    lead = given[spec.lead]
    if compiling or torch._C._is_any_autocast_enabled():
        device = "cuda" if lead.is_cuda else "cpu"  # asking a torch.device for its type makes a string each time
        if torch.is_autocast_enabled(device) and (lead.is_cuda or lead.is_cpu):
            _cast(spec.rows, given, device)
            lead = given[spec.lead]
    acc = state_dtype(lead.dtype)
    for name in spec.tables:
        x = given[name]
        if x is None:
            continue
        if x.dtype is not acc:
            if not x.is_floating_point():
                wrong(op, name, "a floating dtype", str(x.dtype).removeprefix("torch."))
            given[name] = x.to(acc)
        if name in WITHOUT_GRADIENT and x.requires_grad and torch.is_grad_enabled():
            wrong(op, name, "a tensor that needs no gradient (the op has none for it)", "one that does")
    if spec.has_state:
        _take_state(op, given, shape, compiling)
    if compiling:
        return tuple([given.get(name) for name in spec.arguments])
    if brief:
        for name, usual in spec.decisive:
            if given[name] is not usual:
                break
        else:
            return spec.pick_brief(given)
    return (spec.pick_without_state if spec.has_state and given["initial_state"] is None else spec.pick)(given)
