"""Every wrong argument raises one line that names the argument, what was expected and what came.

The table below is of every op, every argument and every kind of wrongness; each is tried on real tensors (the device of the
run), with and without gradients, on meta tensors and on those of tracing. Facts that depend on several arguments follow it.
"""

import inspect
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import STATE, Random, cu_seqlens_of, make_state

B, T, H, G, D, L = 2, 20, 4, 2, 16, 8


# ---- good calls -------------------------------------------------------------------------------------------------------


def good(op: str) -> dict:
    """Arguments by name, on the CPU."""
    random = Random(0, torch.device("cpu"), torch.float32)
    cos, sin = rat_ext.rotary_tables(9, D)
    tables = {"gate_bias": random.normal(H, D), "rotary_cos": cos, "rotary_sin": sin}
    q, k, v, gate, out_gate = (random.normal(B, T, n, D) for n in (G, G, H, H, H))
    options = {"scale": 0.25, "cu_seqlens": None, "initial_state": None, "return_state": False, "max_seqlen": None}
    options["deterministic"] = True
    beside = {"cache": None, "slots": None, "context_parallel": None}
    if op == "rat_attention":
        return {"q": q, "k": k, "v": v, "gate": gate, "chunk_size": L, "out_gate": out_gate, **tables, **options, **beside}
    if op == "chunk_attention":
        del tables["gate_bias"]
        return {"q": q, "k_states": v, "v_states": gate, "chunk_size": L, "out_gate": out_gate, **tables, **options}
    if op == "rat_attention_packed":
        projection = random.normal(B, T, (2 * G + 3 * H) * D)
        numbers = {"num_heads": H, "num_groups": G, "chunk_size": L, "has_out_gate": True}
        return {"projection": projection, **numbers, **tables, **options, **beside}
    if op == "chunk_recurrence":
        state = {"initial_state": random.normal(B, H, D), "lengths": torch.tensor([3, 9], dtype=torch.int32)}
        return {"x": k, "gate": gate, "chunk_size": L, "gate_bias": tables["gate_bias"], "cu_seqlens": None, **state,
                "return_state": False, "context_parallel": None}  # fmt: skip
    cache = make_state(random, [3, 9], H, D, L, rows=4)
    tokens = {"q": q[:, 0], "k": k[:, 0], "v": v[:, 0], "gate": gate[:, 0], "out_gate": out_gate[:, 0]}
    return {**tokens, "cache": cache, **tables, "scale": 0.25, "slots": torch.tensor([1, 0]), "exact": False}


OPS = ("rat_attention", "chunk_attention", "rat_attention_packed", "chunk_recurrence", "rat_decode_step")
CONTINUED = make_state(Random(0, torch.device("cpu"), torch.float32), [3, 9], H, D, L)


def moved(arguments: dict, where) -> dict:
    """Every tensor, those of states too, through ``where``."""

    def move(x):
        if isinstance(x, RATCache):
            return x.replace(**{name: where(getattr(x, name)) for name in (*STATE, "lengths")})
        return where(x) if isinstance(x, torch.Tensor) else x

    return {name: move(x) for name, x in arguments.items()}


@pytest.mark.parametrize("op", OPS)
def test_the_table_has_every_argument(op):
    assert set(good(op)) == set(inspect.signature(getattr(rat_ext, op)).parameters)


@pytest.mark.parametrize("op", OPS)
def test_the_good_calls_are_good(device, op):
    with torch.no_grad():
        assert getattr(rat_ext, op)(**moved(good(op), lambda x: x.to(device))).isfinite().all()
        assert getattr(rat_ext, op)(**moved(good(op), lambda x: x.to("meta"))).is_meta


# ---- the table --------------------------------------------------------------------------------------------------------

NO_TENSOR = {
    "a str": lambda x: "x",
    "a list": lambda x: [0, 3, 20],
    "a number": lambda x: 3,
    "a NumPy array": lambda x: np.zeros(3, dtype=np.int32),
}
OF_NO_KIND = {  # tensors that hold their numbers in a way that no kernel reads
    "sparse": lambda x: torch.zeros(x.shape, dtype=x.dtype).to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)], layout=torch.jagged),
    "nested, strided": lambda x: torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)]),
    "quantized": lambda x: torch.quantize_per_tensor(torch.zeros(x.shape), 0.1, 0, torch.qint8),
}
SHAPES = {
    "no dimension": lambda x: x.sum().to(x.dtype),
    "a dimension more": lambda x: x[None],
    "longer": lambda x: torch.cat((x, x[-1:])),
    "wider": lambda x: torch.cat((x, x), dim=-1) if x.dim() > 1 else torch.cat((x, x)),
}
NO_NUMBERS = {"int64": lambda x: x.to(torch.int64), "complex": lambda x: x.to(torch.complex64), "bool": lambda x: x > 0}
ROWS = NO_TENSOR | OF_NO_KIND | SHAPES | NO_NUMBERS
ROWS |= {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "beside": lambda x: x.to("meta"),
}
TABLES = NO_TENSOR | OF_NO_KIND | SHAPES | NO_NUMBERS | {"beside": lambda x: x.to("meta")}
STATES = NO_TENSOR | OF_NO_KIND | SHAPES | NO_NUMBERS
STATES |= {
    "float16": lambda x: x.half(),
    "strided": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "beside": lambda x: x.to("meta"),
}
INTEGERS = {
    "a float": lambda x: 8.0,
    "a str": lambda x: "8",
    "none": lambda x: None,
    "a bool": lambda x: True,
    "a tensor": lambda x: torch.tensor(8),
    "a list": lambda x: [8],
    "zero": lambda x: 0,
    "negative": lambda x: -(2**40),
    "2^63": lambda x: 2**63,
    "-2^70": lambda x: -(2**70),
}
FLAGS = {"a tensor": lambda x: torch.tensor(True), "a str": lambda x: "x", "none": lambda x: None, "two": lambda x: 2}
REALS = {
    "a bool": lambda x: True,
    "a str": lambda x: "x",
    "a tensor": lambda x: torch.tensor(1.0),
    "a list": lambda x: [1.0],
    "complex": lambda x: 1j,
}
CACHES = {"a str": lambda x: "x", "a number": lambda x: 3, "a tensor": lambda x: torch.zeros(2), "a dict": lambda x: {}}

KINDS = {
    **dict.fromkeys(("q", "k", "v", "gate", "out_gate", "k_states", "v_states", "projection", "x"), ROWS),
    **dict.fromkeys(("gate_bias", "rotary_cos", "rotary_sin"), TABLES),
    **dict.fromkeys(("chunk_size", "num_heads", "num_groups"), INTEGERS),
    **dict.fromkeys(("has_out_gate", "return_state", "deterministic", "exact"), FLAGS),
    "max_seqlen": {key: f for key, f in INTEGERS.items() if key not in ("none", "zero")},
    "scale": REALS,
    "context_parallel": CACHES,
    "lengths": {key: f for key, f in STATES.items() if key != "float16"} | {"int16": lambda x: x.to(torch.int16)},
}
REQUIRED = ("q", "k", "v", "gate", "k_states", "v_states", "projection", "x")


def kinds(op: str, argument: str) -> dict:
    if argument == "initial_state":
        return STATES if op == "chunk_recurrence" else CACHES
    if argument == "cache":
        return CACHES | ({"none": lambda x: None} if op == "rat_decode_step" else {})
    if argument in ("cu_seqlens", "slots"):
        integers = {key: f for key, f in STATES.items() if key not in ("float16", "int64", "strided")}
        return integers | {"int16": lambda x: x.to(torch.int16), "float32": lambda x: x.float()}
    found = KINDS[argument]
    if argument in ("num_heads", "num_groups"):
        found = found | {"that does not divide": lambda x: 3}
    return found | {"none": lambda x: None} if argument in REQUIRED else found


# What a call may well be given, or what only its values make wrong.
FINE = [("slots", "int64"), ("cu_seqlens", "longer"), ("cu_seqlens", "wider"), ("projection", "longer")]
TABLE = [
    (op, argument, kind) for op in OPS for argument in good(op) for kind in kinds(op, argument) if (argument, kind) not in FINE
]
TABLE += [("rat_attention", f"initial_state.{name}", kind) for name in STATE for kind in STATES]
TABLE += [(op, f"cache.{name}", kind) for op in ("rat_attention", "rat_decode_step") for name in STATE for kind in STATES]
# Sizes come from these arguments, so that another one may be found not to fit them.
LEADS = ("q", "v", "v_states", "x", "gate", "projection", "num_heads", "num_groups", "rotary_cos", "cache.chunk_k")


def arguments_of(op: str, argument: str) -> dict:
    arguments = good(op)
    if op.startswith("rat_attention") and argument.partition(".")[0] in ("cache", "slots"):
        arguments |= {name: good("rat_decode_step")[name] for name in ("cache", "slots")}
    if argument in ("cu_seqlens", "max_seqlen"):
        one = {name: x[:1] if isinstance(x, torch.Tensor) and x.dim() > 2 else x for name, x in arguments.items()}
        arguments = one | {"cu_seqlens": torch.tensor([0, T], dtype=torch.int32)}
        if op == "chunk_recurrence":
            arguments["lengths"] = arguments["lengths"][:1]
    if argument.startswith("initial_state."):
        arguments["initial_state"] = CONTINUED
    return arguments


def said(op: str, arguments: dict) -> str:
    """What the call raises."""
    try:
        getattr(rat_ext, op)(**arguments)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("op", "argument", "kind"), TABLE)
@pytest.mark.filterwarnings("ignore:.*(prototype|quantiz|inplace).*")
def test_a_wrong_argument(device, op, argument, kind):
    parent, _, field = argument.partition(".")

    def spoil(arguments):
        if field:
            state = arguments[parent]
            change = STATES[kind](getattr(state, field))
            return arguments | {parent: state.replace(**{field: change})}
        return arguments | {parent: kinds(op, parent)[kind](arguments[parent])}

    def on(where, mode=None):
        arguments = moved(arguments_of(op, argument), where)
        with mode or torch.no_grad():
            return said(op, spoil(arguments))

    places = {"real": on(lambda x: x.to(device))}
    with torch.enable_grad():
        arguments = moved(
            arguments_of(op, argument),
            lambda x: x.to(device).requires_grad_(
                arguments_of(op, argument).get("cache") is None and x.is_floating_point() and x.shape[-1] != D // 2
            ),
        )
        places["with gradients"] = said(op, spoil(arguments))
    if kind not in OF_NO_KIND and kind != "beside":
        places["meta"] = on(lambda x: x.to("meta"))
        mode = FakeTensorMode()
        places["fake"] = on(mode.from_tensor, mode)
    names = r"[\w.]+" if argument in LEADS and kind not in NO_TENSOR | OF_NO_KIND else re.escape(argument)
    wanted = re.compile(rf"rat_ext\.{op}: {names}: expected .+, got .+")
    for place, message in places.items():
        assert wanted.fullmatch(message), f"{place}: {message}"


# ---- facts of several arguments ---------------------------------------------------------------------------------------

TENSORS = ("q", "k", "v", "gate", "out_gate")


def attention(device, **changes):
    """A good call with some arguments changed, each by a function of the good one."""
    arguments = moved(good("rat_attention"), lambda x: x.to(device))
    return rat_ext.rat_attention(**(arguments | {name: change(arguments[name]) for name, change in changes.items()}))


def raises(argument: str, *words, error=ValueError):
    """``error`` whose message names op and argument, says "expected" and "got", and contains every word."""
    pattern = rf"rat_ext\.\w+: {re.escape(argument)}.*expected.*got" if argument else ""
    if words:
        pattern = "".join(rf"(?=.*{re.escape(str(word))})" for word in words) + ".*" + pattern
    return pytest.raises(error, match=re.compile(pattern, re.DOTALL))


@pytest.mark.parametrize("capability", [(7, 5), (6, 0)])
def test_older_gpu(capability):
    with pytest.raises(RuntimeError, match=r"device: expected .* 8.0 or newer, got Tesla of compute capability [67]\.[05]"):
        rat_ext._build_info.extension.require_capability(*capability, "Tesla")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_newer_gpu(capability):
    rat_ext._build_info.extension.require_capability(*capability, "GPU")


@pytest.mark.gpu
def test_float64_on_the_gpu(device):
    with raises("q", "float64"):
        attention(device, **{name: torch.Tensor.double for name in TENSORS})


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*TENSORS[1:], "gate_bias"])
def test_device(device, name):
    with raises(name, "cuda:", "CPU"):
        attention(device, **{name: torch.Tensor.cpu})


@pytest.mark.gpu
def test_device_of_the_small_tensors(device):
    q, v = torch.zeros(1, T, G, D, device=device), torch.zeros(1, T, H, D, device=device)
    with raises("cu_seqlens", "cuda:", "CPU"):
        rat_ext.rat_attention(q, q, v, v, L, cu_seqlens=cu_seqlens_of([5, 15], "cpu"))
    with raises("rotary_cos", "cuda:", "CPU"):
        cos, sin = rat_ext.rotary_tables(9, D)
        rat_ext.rat_attention(q, q, v, v, L, rotary_cos=cos, rotary_sin=sin)
    with raises("initial_state", "cuda:", "CPU"):
        state = make_state(Random(0, "cpu", torch.float32), [3], H, D, L)
        rat_ext.rat_attention(q, q, v, v, L, initial_state=state)


@pytest.mark.parametrize(("heads", "groups"), [(4, 3), (4, 8), (2, 4), (4, 0)])
def test_groups(device, heads, groups):
    q, v = torch.zeros(1, T, groups, D, device=device), torch.zeros(1, T, heads, D, device=device)
    with raises("q", "divides", heads, groups):
        rat_ext.rat_attention(q, q, v, v, L)
    with raises("x", "divides", heads, groups):
        rat_ext.chunk_recurrence(q, v, L)
    with raises("num_groups", "divides", heads, groups):
        rat_ext.rat_attention_packed(torch.zeros(1, T, 480, device=device), heads, groups, L)


@pytest.mark.parametrize("dim", [0, 4, 12, 30, 257, 264, 512])
def test_head_size(device, dim):
    q, v = torch.zeros(1, T, G, dim, device=device), torch.zeros(1, T, H, dim, device=device)
    for call in (
        lambda: rat_ext.rat_attention(q, q, v, v, L, scale=1.0),
        lambda: rat_ext.chunk_recurrence(q, v, L),
        lambda: rat_ext.chunk_attention(q, v, v, L, scale=1.0),
        lambda: rat_ext.rat_decode_step(
            q[:, 0], q[:, 0], v[:, 0], v[:, 0], RATCache.empty(1, H, dim, L, 64, device=device), scale=1.0
        ),
    ):
        with raises("", "multiple of 8", dim):
            call()


def test_head_size_of_the_default_scale(device):
    """D = 0 is an error of D, not a division by zero."""
    with raises("", "multiple of 8"):
        rat_ext.rat_attention(*(torch.zeros(1, T, H, 0, device=device) for _ in range(4)), L)


@pytest.mark.parametrize("chunk_size", [0, -1, -(2**40)])
def test_chunk_size(device, chunk_size):
    q, v = torch.zeros(1, T, G, D, device=device), torch.zeros(1, T, H, D, device=device)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.rat_attention(q, q, v, v, chunk_size)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.chunk_recurrence(q, v, chunk_size)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.chunk_attention(q, v, v, chunk_size)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.rat_attention_packed(torch.zeros(1, T, 160, device=device), 2, 2, chunk_size)
    with pytest.raises(ValueError, match=f"chunk_size: expected at least 1, got {chunk_size}"):
        RATCache.empty(1, H, D, chunk_size, 64)


@pytest.mark.parametrize("width", [159, 161, 8])
def test_projection_width(device, width):
    with raises("projection", "multiple of", width):
        rat_ext.rat_attention_packed(torch.zeros(1, T, width, device=device), 2, 2, L)


# ---- rotary tables ---------------------------------------------------------------------------------------------------


def test_rotary_tables_too_short(device):
    cos, sin = rat_ext.rotary_tables(2, D, device=device)
    with raises("rotary_cos", "at least 3 rows", "got 2"):
        rat_ext.rat_attention(*good_tensors(device), L, rotary_cos=cos, rotary_sin=sin)


def good_tensors(device, batch=B, tokens=T):
    random = Random(0, device, torch.float32)
    q, k = random.normal(batch, tokens, G, D), random.normal(batch, tokens, G, D)
    return q, k, random.normal(batch, tokens, H, D), random.normal(batch, tokens, H, D)


def test_one_rotary_table(device):
    cos, sin = rat_ext.rotary_tables(9, D, device=device)
    with raises("rotary_sin", "both"):
        rat_ext.rat_attention(*good_tensors(device), L, rotary_cos=cos)
    with raises("rotary_cos", "both"):
        rat_ext.rat_attention(*good_tensors(device), L, rotary_sin=sin)


def test_rotary_tables_of_another_head_size(device):
    cos, sin = rat_ext.rotary_tables(9, 2 * D, device=device)
    with raises("rotary_cos", "(9, 8)", "(9, 16)"):
        rat_ext.rat_attention(*good_tensors(device), L, rotary_cos=cos, rotary_sin=sin)
    cos, sin = rat_ext.rotary_tables(9, D, device=device)
    with raises("rotary_sin", "(9, 8)", "(8, 8)"):
        rat_ext.rat_attention(*good_tensors(device), L, rotary_cos=cos, rotary_sin=sin[:8])


def test_rotary_tables_have_no_gradient(device):
    cos, sin = rat_ext.rotary_tables(9, D, device=device)
    with raises("rotary_cos", "needs no gradient"):
        rat_ext.rat_attention(*good_tensors(device), L, rotary_cos=cos.requires_grad_(), rotary_sin=sin)


def test_rotary_tables_of_an_odd_head_size():
    with pytest.raises(ValueError, match="head_dim: expected an even number, got 7"):
        rat_ext.rotary_tables(4, 7)


# ---- packed sequences ------------------------------------------------------------------------------------------------

BAD_SEQUENCES = {
    "begin": [1, 5, 20],
    "end early": [0, 5, 19],
    "end late": [0, 5, 21],
    "falling": [0, 12, 5, 20],
    "negative": [0, -3, 20],
}


@pytest.mark.parametrize("cuts", BAD_SEQUENCES.values(), ids=BAD_SEQUENCES.keys())
def test_cu_seqlens_on_the_cpu(cuts):
    """On a GPU these are facts of the device: see test_device_errors."""
    q, k, v, gate = good_tensors("cpu", batch=1)
    cu_seqlens = torch.tensor(cuts)
    with raises("cu_seqlens"):
        rat_ext.rat_attention(q, k, v, gate, L, cu_seqlens=cu_seqlens)
    with raises("cu_seqlens"):
        rat_ext.chunk_recurrence(k, gate, L, cu_seqlens=cu_seqlens)
    with raises("cu_seqlens"):
        rat_ext.chunk_attention(q, v, v, L, cu_seqlens=cu_seqlens)


def test_form_of_cu_seqlens(device):
    with raises("cu_seqlens", "batch of 1", "got a batch of 2"):
        rat_ext.rat_attention(*good_tensors(device), L, cu_seqlens=cu_seqlens_of([5, 15], device))
    one = good_tensors(device, batch=1)
    with raises("cu_seqlens", "1 dimension"):
        rat_ext.rat_attention(*one, L, cu_seqlens=cu_seqlens_of([5, 15], device)[None])
    with raises("cu_seqlens", "20", "no sequence"):
        rat_ext.rat_attention(*one, L, cu_seqlens=cu_seqlens_of([], device))
    with raises("cu_seqlens", "at least one"):
        rat_ext.rat_attention(*one, L, cu_seqlens=cu_seqlens_of([], device)[:0])


# ---- states ----------------------------------------------------------------------------------------------------------


def state_of(device, lengths=(3, 9), heads=H, dim=D, chunk_size=L, dtype=torch.float32, **options):
    return make_state(Random(0, device, dtype), list(lengths), heads, dim, chunk_size, **options)


def test_states_of_another_shape(device):
    args = good_tensors(device)
    for state, words in (
        (state_of(device, [3, 9, 4]), ["(2, 4, 1, 16)", "(3, 4, 1, 16)"]),
        (state_of(device, heads=2), ["(2, 4, 1, 16)", "(2, 2, 1, 16)"]),
        (state_of(device, dim=8), ["(2, 4, 1, 16)", "(2, 4, 1, 8)"]),
        (state_of(device, dtype=torch.bfloat16), ["float32", "bfloat16"]),
    ):
        with raises("initial_state", *words):
            rat_ext.rat_attention(*args, L, initial_state=state)


def test_a_state_of_another_chunk_size(device):
    with raises("initial_state", "chunk_size 8", "got one of 4"):
        rat_ext.rat_attention(*good_tensors(device), L, initial_state=state_of(device, chunk_size=4))


def test_what_is_no_state(device):
    with raises("initial_state", "RATCache", "Tensor"):
        rat_ext.rat_attention(*good_tensors(device), L, initial_state=torch.zeros(2, device=device))


def test_a_state_with_less_than_its_lengths_say():
    state = state_of("cpu", [3, 9])
    state.lengths[0] = 40
    with raises("initial_state.lengths[0]"):
        rat_ext.rat_attention(*good_tensors("cpu"), L, initial_state=state)


def test_negative_lengths():
    state = state_of("cpu", [3, 9])
    state.lengths[0] = -1
    with raises("initial_state.lengths[0]"):
        rat_ext.rat_attention(*good_tensors("cpu"), L, initial_state=state)


def test_values_on_the_cpu_name_op_and_argument():
    """As the caller knows both: each op that reads cu_seqlens or lengths, and its backward."""
    q, k, v, gate = good_tensors("cpu")
    state = state_of("cpu", [3, 9])
    state.lengths[1] = -7
    for argument, call in (
        ("rat_attention: initial_state.lengths", lambda: rat_ext.rat_attention(q, k, v, gate, L, initial_state=state)),
        ("chunk_attention: initial_state.lengths", lambda: rat_ext.chunk_attention(q, v, v, L, initial_state=state)),
        (
            "chunk_recurrence: lengths",
            lambda: rat_ext.chunk_recurrence(k, gate, L, initial_state=state.running_k, lengths=state.lengths),
        ),
        ("rat_decode_step: cache.lengths", lambda: step("cpu", state)),
    ):
        with pytest.raises(ValueError, match=re.escape(f"rat_ext.{argument}[1]: expected 0 or more, got -7") + "$"):
            call()
    packed = torch.zeros(1, T, (2 * G + 3 * H) * D)
    cuts = torch.tensor([0, 12, 5, T], dtype=torch.int32)
    found = r"^rat_ext\.rat_attention_packed: cu_seqlens\[2\]: expected at least cu_seqlens\[1\] = 12, got 5$"
    with pytest.raises(ValueError, match=found):
        rat_ext.rat_attention_packed(packed, H, G, L, cu_seqlens=cuts)
    lengths = torch.tensor([3, 9], dtype=torch.int32)
    x = k.requires_grad_()
    y = rat_ext.chunk_recurrence(x, gate, L, initial_state=torch.zeros(B, H, D), lengths=lengths)
    lengths.data[0] = -1
    with pytest.raises(ValueError, match=r"^rat_ext\.chunk_recurrence_backward: lengths\[0\]: expected 0 or more, got -1$"):
        y.sum().backward()


def test_a_state_past_the_rotary_tables():
    cos, sin = rat_ext.rotary_tables(3, D)
    with raises("rotary_cos", "at least 4"):
        rat_ext.rat_attention(*good_tensors("cpu"), L, initial_state=state_of("cpu"), rotary_cos=cos, rotary_sin=sin)


def test_recurrence_states(device):
    _, k, v, gate = good_tensors(device)
    initial = torch.zeros(B, H, D, device=device)
    lengths = torch.zeros(B, dtype=torch.int32, device=device)
    with raises("lengths", "together"):
        rat_ext.chunk_recurrence(k, gate, L, initial_state=initial)
    with raises("initial_state", "together"):
        rat_ext.chunk_recurrence(k, gate, L, lengths=lengths)
    with raises("initial_state", "(2, 4, 16)"):
        rat_ext.chunk_recurrence(k, gate, L, initial_state=initial[:1], lengths=lengths)
    with raises("initial_state", "float32"):
        rat_ext.chunk_recurrence(k, gate, L, initial_state=initial.half(), lengths=lengths)
    with raises("lengths", "(2)"):
        rat_ext.chunk_recurrence(v, gate, L, initial_state=initial, lengths=lengths[:1])


# ---- decode ----------------------------------------------------------------------------------------------------------


def step(device, cache, batch=2, **changes):
    q, k, v, gate = (x[:, 0] for x in good_tensors(device, batch=batch))
    return rat_ext.rat_decode_step(**({"q": q, "k": k, "v": v, "gate": gate, "cache": cache} | changes))


def test_a_full_cache():
    cache = RATCache.empty(2, H, D, L, 16)
    cache.lengths[1] = cache.capacity
    before = cache.clone()
    with raises("", "lengths[1]", "full", cache.capacity, error=ValueError):
        step("cpu", cache)
    assert torch.equal(cache.lengths, before.lengths), "a step that raises changes nothing"
    assert torch.equal(cache.running_k, before.running_k)


@pytest.mark.parametrize("slot", [2, 10**12])
def test_a_slot_outside_the_cache(slot):
    with raises("slots", "got", slot):
        step("cpu", RATCache.empty(2, H, D, L, 16), slots=torch.tensor([0, slot]))


def test_forms_of_decode(device):
    cache = RATCache.empty(2, H, D, L, 16, device=device)
    with raises("q", "at most 2 rows", "got 3"):
        step(device, cache, batch=3)
    with raises("slots", "(2)", "(3)"):
        step(device, cache, slots=torch.tensor([0, 1, -1], device=device))
    with raises("slots", "int64", "int32"):
        step(device, cache, slots=torch.tensor([0, 1], device=device, dtype=torch.int32))
    with raises("cache", "(2, 4, 2, 16)", "(2, 2, 2, 16)"):
        step(device, RATCache.empty(2, 2, D, L, 16, device=device))
    with raises("cache", "float32", "bfloat16"):
        step(device, RATCache.empty(2, H, D, L, 16, device=device, dtype=torch.bfloat16))
    with raises("q", "3 dimensions"):
        step(device, cache, q=torch.zeros(2, 1, G, D, device=device))
    with raises("k", "(2, 2, 16)"):
        step(device, cache, k=torch.zeros(2, 4, D, device=device))
    with raises("gate", "(2, 4, 16)"):
        step(device, cache, gate=torch.zeros(2, 2, D, device=device))
    with raises("rotary_sin", "both"):
        step(device, cache, rotary_cos=rat_ext.rotary_tables(4, D, device=device)[0])


def test_decode_past_the_rotary_tables():
    cache = RATCache.empty(2, H, D, L, 64)
    cache.lengths[1] = 16
    cos, sin = rat_ext.rotary_tables(2, D)
    with raises("rotary_cos", "at least 3", "got 2"):
        step("cpu", cache, rotary_cos=cos, rotary_sin=sin)


@pytest.mark.parametrize("name", ["q", "k", "v", "gate"])
def test_decode_has_no_gradient(device, name):
    cache = RATCache.empty(2, H, D, L, 16, device=device)
    heads = G if name in "qk" else H
    changed = {name: torch.zeros(2, heads, D, device=device, requires_grad=True)}
    with raises(name, "needs no gradient"):
        step(device, cache, **changed)
    assert cache.lengths.tolist() == [0, 0]
    with torch.no_grad():
        step(device, cache, **changed)


def test_decode_from_a_state_with_a_gradient(device):
    state = state_of(device, [3, 9], rows=3)
    state.running_k.requires_grad_()
    with raises("cache", "needs no gradient", "detach"):
        step(device, state)
    step(device, state.detach())


def test_caches_that_do_not_fit():
    pool = RATCache.empty(4, H, D, L, 16)
    slots = torch.tensor([0, 1])
    for other, word in (
        (state_of("cpu", heads=2), "heads"),
        (state_of("cpu", dim=8), "head_dim"),
        (state_of("cpu", chunk_size=4), "chunk_size"),
        (state_of("cpu", dtype=torch.bfloat16), "dtype"),
    ):
        with pytest.raises(ValueError, match=f"other: expected {word} .*, got"):
            pool.write(slots, other)
    with pytest.raises(ValueError, match="other: expected at most 2 chunk rows, got 5"):
        pool.write(slots, state_of("cpu", [3, 40]))
    with pytest.raises(ValueError, match=r"slots: expected shape \(2,\), got \(1,\)"):
        pool.write(slots[:1], state_of("cpu"))
    with pytest.raises(IndexError):
        pool.write(torch.tensor([0, -1]), state_of("cpu"))
    with pytest.raises(ValueError, match="max_length: expected at least 0, got -1"):
        RATCache.empty(4, H, D, L, -1)


# ---- what only the GPU finds out -------------------------------------------------------------------------------------

DEVICE_ERRORS = {
    **{f"cu_seqlens {key}": ("cu_seqlens", f"forward(cu={cuts})") for key, cuts in BAD_SEQUENCES.items()},
    "cu_seqlens of the recurrence": ("cu_seqlens", "recurrence(cu=[0, 30, 20])"),
    "state rows": ("lengths", "forward(lengths=[40], rows=1)"),
    "negative length": ("lengths", "forward(lengths=[-5], rows=1)"),
    "rotary and state": ("rotary", "forward(lengths=[9], rows=1, table=2)"),
    "rotary and packing": ("rotary", "forward(cu=[0, 2, 20], table=2)"),
}

DEVICE_SCRIPT = """
import torch, rat_ext
from rat_ext import RATCache
def wide(n, *shape): return torch.zeros(*shape, n, 16, device="cuda")
def tables(rows):
    if not rows: return {}
    cos, sin = rat_ext.rotary_tables(rows, 16, device="cuda")
    return {"rotary_cos": cos, "rotary_sin": sin}
def ints(x): return torch.tensor(x, dtype=torch.int32, device="cuda")
def forward(cu=None, lengths=None, rows=0, table=0):
    state = None
    if lengths is not None:
        state = RATCache.empty(1, 4, 16, 8, 8 * rows, device="cuda")
        state.lengths.copy_(ints(lengths))
        state.length_bound = max(lengths + [0])
    cu = None if cu is None else ints(cu)
    q, v = wide(2, 1, 20), wide(4, 1, 20)
    return rat_ext.rat_attention(q, q, v, v, 8, cu_seqlens=cu, initial_state=state, **tables(table))
def recurrence(cu):
    return rat_ext.chunk_recurrence(wide(2, 1, 20), wide(4, 1, 20), 8, cu_seqlens=ints(cu))
try:
    CALL
    torch.cuda.synchronize()
except RuntimeError as error:
    print("RuntimeError:", str(error).splitlines()[0])
else:
    print("no error")
"""


@pytest.mark.gpu
@pytest.mark.parametrize(("words", "call"), DEVICE_ERRORS.values(), ids=DEVICE_ERRORS.keys())
def test_device_errors(words, call):
    """The kernel prints the argument and stops; the next CUDA call raises. It takes the context along: own process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", DEVICE_SCRIPT.replace("CALL", call)], capture_output=True, text=True, env=environment
    )
    output = done.stdout + done.stderr
    assert "RuntimeError:" in done.stdout, output
    assert words in output, output


def test_names_of_the_states(device):
    q, v = torch.zeros(1, T, G, D, device=device), torch.zeros(1, T, H, D, device=device)
    with raises("k_states", "shape"):
        rat_ext.chunk_attention(q, v[:, :-1], v, L)
    with raises("v_states", "dimensions"):
        rat_ext.chunk_attention(q, v, v[0], L)


@pytest.mark.parametrize("bound", [-5, 1.5, "x", 2**31, 2**63])
def test_a_wrong_bound_of_lengths(device, bound):
    """Where it is set."""
    cache = rat_ext.RATCache.empty(1, 2, 8, 4, 16, device=device)
    for change in (lambda: setattr(cache, "length_bound", bound), lambda: RATCache(*cache.tensors(), 4, bound)):
        with pytest.raises(ValueError, match="^RATCache: length_bound: expected an int from 0 to 2147483647, got .{1,40}$"):
            change()
    assert cache.length_bound == 0


# ---- memory, and what the ops cannot do ---------------------------------------------------------------------------------


def huge(*shape, dtype=torch.float32):
    """A tensor of 8 elements that claims many."""
    return torch.zeros(1, 1, 1, shape[-1], dtype=dtype).expand(shape)


@pytest.mark.parametrize("op", ["rat_attention", "chunk_attention", "chunk_recurrence"])
def test_results_that_no_memory_holds(op):
    def call(x):
        rows = {"rat_attention": 4, "chunk_attention": 3, "chunk_recurrence": 2}[op]
        return getattr(rat_ext, op)(*(x,) * rows, chunk_size=4)

    shape = (2**31, 2**27, 1, 8)
    sizes = re.escape(str(shape))
    with pytest.raises(ValueError, match=rf"^rat_ext\.{op}: y: expected a tensor of less than 2\^63 bytes, got shape {sizes}$"):
        call(huge(*shape, dtype=torch.float64))
    found = rf"^rat_ext\.{op}: y: expected memory for shape .* float32, \d+ bytes, got none: .*can't allocate memory"
    with pytest.raises(RuntimeError, match=found) as error:
        call(huge(2**30, 2**27, 1, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_more_tokens_than_31_bits_count(where):
    """Before anything is allocated."""
    x = torch.zeros(1, 1, 1, 8, device=where).expand(1, 2**31, 1, 8)
    found = "tokens: expected at most 2147483647 tokens in a row, got 2147483648$"
    with pytest.raises(ValueError, match=f"^rat_ext.rat_attention: {found}"):
        rat_ext.rat_attention(x, x, x, x, 2**20)
    with pytest.raises(ValueError, match=f"^rat_ext.chunk_recurrence: {found}"):
        rat_ext.chunk_recurrence(x, x, 2**20)


def test_a_batch_of_gradients(device):
    x = torch.randn(1, 9, 2, 8, device=device, requires_grad=True)
    found = r"rat_ext\.rat_attention: a backward of several gradients at once .* is not supported; call it once for each"
    y = rat_ext.rat_attention(x, x, x, x, 4)
    batch = torch.randn(3, *y.shape, device=device)
    with pytest.raises(RuntimeError, match=found):
        torch.autograd.grad(y, x, batch, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=found):
        torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(batch)
    with pytest.raises(RuntimeError, match=r"rat_ext\.chunk_recurrence: a backward of several"):
        torch.autograd.functional.jacobian(lambda x: rat_ext.chunk_recurrence(x, x, 4), x, vectorize=True)
    torch.autograd.grad(y, x, batch[0])


@pytest.mark.filterwarnings("ignore")
def test_jit_trace():
    x = torch.randn(1, 9, 2, 8)
    cache = RATCache.empty(1, 2, 8, 4, 16)
    for op, call in (
        ("rat_attention", lambda x: rat_ext.rat_attention(x, x, x, x, 4, scale=0.5)),
        ("chunk_recurrence", lambda x: rat_ext.chunk_recurrence(x, x, 4)),
        ("rat_decode_step", lambda x: rat_ext.rat_decode_step(*(x[:, 0],) * 4, cache, scale=0.5)),
    ):
        with pytest.raises(RuntimeError, match=rf"rat_ext\.{op}: torch.jit.trace is not supported; use"):
            torch.jit.trace(call, x)
    assert int(cache.lengths[0]) == 0


@pytest.mark.parametrize("size", ["x" * 3000, "a\nb", 10**400, int])
def test_a_message_is_one_short_line(size):
    x = torch.randn(1, 3, 2, 8)
    with pytest.raises(ValueError) as error:
        rat_ext.rat_attention(x, x, x, x, size)
    assert "chunk_size: expected an int" in str(error.value) and len(str(error.value)) < 200 and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="rat_ext.explain: gate: expected a tensor, got None"):
        rat_ext.explain(x, x, x, None, 4)


# ---- caches, tables, layers -------------------------------------------------------------------------------------------


def small(**changes) -> RATCache:
    return RATCache.empty(**{"batch": 2, "num_heads": 2, "head_dim": 8, "chunk_size": 4, "max_length": 16} | changes)


X = torch.zeros(2, 5, 32)
ODD = {
    "RATCache: device: expected a torch.device, a name of one or None, got str 'nowhere'": lambda: small(device="nowhere"),
    "RATCache: device: expected .*, got float 3.5": lambda: small(device=3.5),
    "RATCache: max_length: expected at most 2147483647, got 2147483648": lambda: small(max_length=2**31),
    "RATCache: max_length: expected at most 2147483647, got 4611686018427387904": lambda: small().reserve(2**62),
    "RATCache.to: device, dtype: expected those of Tensor.to, got 'nowhere'": lambda: small().to("nowhere"),
    "RATCache.to: device, dtype: expected those of Tensor.to, got 3.5": lambda: small().to(3.5),
    "RATCache.to: device, dtype: expected those of Tensor.to, got {'device': 'x'}": lambda: small().to(device="x"),
    "RATCache.replace: lengthes: expected one of .*, got another name": lambda: small().replace(lengthes=None),
    "rotary_tables: num_chunks: expected an int, got '3'": lambda: rat_ext.rotary_tables("3", 8),
    "rotary_tables: num_chunks: expected an int, got 3.0": lambda: rat_ext.rotary_tables(3.0, 8),
    "rotary_tables: num_chunks: expected an int, got True": lambda: rat_ext.rotary_tables(True, 8),
    "rotary_tables: head_dim: expected an int, got None": lambda: rat_ext.rotary_tables(3, None),
    "rotary_tables: base: expected a finite number above 0, got 'x'": lambda: rat_ext.rotary_tables(3, 8, base="x"),
    "rotary_tables: dtype: expected a floating one, got 'float32'": lambda: rat_ext.rotary_tables(3, 8, dtype="float32"),
    "rotary_tables: dtype: expected a floating one, got int32": lambda: rat_ext.rotary_tables(3, 8, dtype=torch.int32),
    "rotary_tables: device: expected .*, got str 'nowhere'": lambda: rat_ext.rotary_tables(3, 8, device="nowhere"),
    "RATLayer: exact: expected a bool, got str 'x'": lambda: layer()(X, cache=layer().new_cache(2, 16), exact="x"),
    "RATLayer: context_parallel: expected a ContextParallel or None, got str": lambda: layer()(X, context_parallel="x"),
    r"RATLayer: x: expected .* with d_model = 32, got shape \(2, 5, 16\)": lambda: layer()(X[..., :16]),
}


def layer():
    from rat_ext.layers import RATLayer

    return RATLayer(32, 4, 2, 4)


@pytest.mark.parametrize("words", ODD)
def test_odd_arguments(words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        ODD[words]()


def test_numbers_of_numpy_make_tables():
    for a, b in zip(
        rat_ext.rotary_tables(np.int64(3), 8, base=np.float32(100)), rat_ext.rotary_tables(3, 8, base=100), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("limit", [0, 6, 7, 8, 20])
@pytest.mark.parametrize("return_state", [False, True])
def test_a_bound_below_the_longest_sequence(limit, return_state):
    """Where the host knows the sequences, the error names the bound."""
    arguments = good("rat_attention") | {"cu_seqlens": cu_seqlens_of([5, 8, 7], "cpu"), "return_state": return_state}
    rows = {name: x[:1] for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.dim() == 4}
    call = arguments | rows | {"max_seqlen": limit}
    if limit >= 8:
        rat_ext.rat_attention(**call)
        return
    with pytest.raises(ValueError, match=f"max_seqlen: expected at least the longest sequence's 8 tokens, got {limit}$"):
        rat_ext.rat_attention(**call)


@pytest.mark.parametrize("options", [{}, {"draft_tokens": 2}, {"page_chunks": 1}, {"fp8": True}])
def test_a_cache_made_while_sampling_serves_later(device, options):
    """Made in inference mode, it is written in and outside of it, with the bits of one that was made outside."""
    random = Random(0, device, torch.float32)
    rows = [random.normal(2, n, 8) for n in (2, 2, 2, 2)]
    with torch.inference_mode():
        cache = small(device=device, **options).reserve(40)
        cache.allocate([0, 1], 16)
        rat_ext.rat_decode_step(*rows, cache)
    other = small(device=device, **options).reserve(40)
    other.allocate([0, 1], 16)
    with torch.no_grad():
        rat_ext.rat_decode_step(*rows, other)
        for _ in range(5):
            assert torch.equal(rat_ext.rat_decode_step(*rows, cache), rat_ext.rat_decode_step(*rows, other))
    cache.copy([0], [1])
    cache.reset([0])
    assert cache.lengths.tolist() == [0, 6]
    cache.check()
    cache.reset()
