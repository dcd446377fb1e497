"""Every wrong argument raises, and the message names the argument, what was expected and what came."""

import os
import re
import subprocess
import sys

import pytest
import torch

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import Random, cu_seqlens_of, make_state

B, T, H, G, D, L = 2, 20, 4, 2, 16, 8


def attention(device, **changes):
    """A good call of rat_attention with some arguments changed: a tensor, or a function of the good one."""
    random = Random(0, device, torch.float32)
    good = {
        "q": random.normal(B, T, G, D),
        "k": random.normal(B, T, G, D),
        "v": random.normal(B, T, H, D),
        "gate": random.normal(B, T, H, D),
        "chunk_size": L,
        "gate_bias": random.normal(H, D),
        "out_gate": random.normal(B, T, H, D),
    }
    for key, change in changes.items():
        good[key] = change(good[key]) if callable(change) else change
    return rat_ext.rat_attention(**good)


def test_the_good_call_is_good(device):
    assert attention(device).isfinite().all()


def raises(argument: str, *words, error=ValueError):
    """``error`` whose message names the argument, says "expected" and "got", and contains every word."""
    pattern = rf"rat_ext[\w.]*: {re.escape(argument)}.*expected.*got" if argument else ""
    if words:
        pattern = "".join(rf"(?=.*{re.escape(str(word))})" for word in words) + ".*" + pattern
    return pytest.raises(error, match=re.compile(pattern, re.DOTALL))


TENSORS = ("q", "k", "v", "gate", "out_gate")


@pytest.mark.parametrize("name", TENSORS)
def test_rank(device, name):
    with raises(name):
        attention(device, **{name: lambda x: x[0]})


def test_rank_of_the_others(device):
    with raises("gate_bias", "(4, 16)"):
        attention(device, gate_bias=lambda x: x[0])
    with raises("projection", "3 dimensions"):
        rat_ext.rat_attention_packed(torch.zeros(4, 160, device=device), H, G, L)
    with raises("x", "4 dimensions"):
        rat_ext.chunk_recurrence(torch.zeros(4, 16, device=device), torch.zeros(1, 4, 4, 16, device=device), L)
    with raises("gate", "4 dimensions"):
        rat_ext.chunk_recurrence(torch.zeros(1, 4, 4, 16, device=device), torch.zeros(4, 16, device=device), L)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_shape(device, name, axis):
    """One entry less along the batch, the tokens or the head size."""

    def shorter(x):
        return x.narrow(axis, 0, x.shape[axis] - 1) if axis < 3 else x[..., :8]

    with pytest.raises(ValueError, match=r"rat_ext.rat_attention: \w+: expected shape \(.*\), got \("):
        attention(device, **{name: shorter})


@pytest.mark.parametrize("name", ["k", "gate", "out_gate"])
def test_number_of_heads(device, name):
    with raises(name, "expected shape"):
        attention(device, **{name: lambda x: x[:, :, :1]})


def test_bias_shape(device):
    with raises("gate_bias", "(4, 16)", "(3, 16)"):
        attention(device, gate_bias=lambda x: x[:3])


@pytest.mark.parametrize("name", TENSORS[1:])
def test_dtype(device, name):
    with raises(name, "float32", "bfloat16"):
        attention(device, **{name: lambda x: x.bfloat16()})


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_unsupported_dtype(device, dtype):
    with raises("q", "bfloat16"):
        attention(device, **{name: lambda x: x.to(dtype) for name in TENSORS})


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
        attention(device, **{name: torch.Tensor.double for name in TENSORS}, gate_bias=None)


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


def test_a_tensor_of_no_device():
    """Meta tensors have no data: an error, never a crash."""
    x = torch.zeros(1, 4, 2, 8, device="meta")
    y = rat_ext.rat_attention(x, x, x, x, 4)
    assert y.device.type == "meta" and y.shape == x.shape


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
        attention(device, chunk_size=chunk_size)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.chunk_recurrence(q, v, chunk_size)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.chunk_attention(q, v, v, chunk_size)
    with raises("chunk_size", "at least 1", chunk_size):
        rat_ext.rat_attention_packed(torch.zeros(1, T, 160, device=device), 2, 2, chunk_size)
    with pytest.raises(ValueError, match=f"chunk_size: expected at least 1, got {chunk_size}"):
        RATCache.empty(1, H, D, chunk_size, 64)


@pytest.mark.parametrize("name", TENSORS)
def test_last_dimension(device, name):
    with raises(name, "contiguous last dimension", "stride 2"):
        attention(device, **{name: lambda x: x.repeat_interleave(2, dim=-1)[..., ::2]})


def test_last_dimension_of_the_others(device):
    with raises("projection", "contiguous last dimension"):
        rat_ext.rat_attention_packed(torch.zeros(1, T, 320, device=device)[..., ::2], 2, 2, L)
    v = torch.zeros(1, T, H, 2 * D, device=device)[..., ::2]
    with raises("x", "contiguous last dimension"):
        rat_ext.chunk_recurrence(v, v.contiguous(), L)
    with raises("v", "contiguous last dimension"):
        x = torch.zeros(1, H, D, device=device)
        rat_ext.rat_decode_step(x, x, v[:, 0], x, RATCache.empty(1, H, D, L, 64, device=device))


@pytest.mark.parametrize("width", [159, 161, 8])
def test_projection_width(device, width):
    with raises("projection", "multiple of", width):
        rat_ext.rat_attention_packed(torch.zeros(1, T, width, device=device), 2, 2, L)


def test_projection_heads(device):
    with raises("num_heads", "at least 1", 0):
        rat_ext.rat_attention_packed(torch.zeros(1, T, 160, device=device), 0, 2, L)


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
    with raises("lengths"):
        rat_ext.rat_attention(*good_tensors("cpu"), L, initial_state=state)


def test_negative_lengths():
    state = state_of("cpu", [3, 9])
    state.lengths[0] = -1
    with raises("lengths"):
        rat_ext.rat_attention(*good_tensors("cpu"), L, initial_state=state)


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
    "full cache": ("full", "decode(length=23)"),
    "slot": ("slots", "decode(slot=7)"),
    "rotary and decode": ("rotary", "decode(length=16, table=2)"),
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
def decode(length=0, slot=0, table=0):
    cache = RATCache.empty(1, 4, 16, 8, 16, device="cuda")
    cache.lengths.fill_(length)
    q, v = wide(2, 1), wide(4, 1)
    slots = torch.tensor([slot], device="cuda")
    return rat_ext.rat_decode_step(q, q, v, v, cache, slots=slots, **tables(table))
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


@pytest.mark.parametrize("name", [*TENSORS[1:], "gate_bias"])
def test_a_meta_tensor_beside_others(device, name):
    """Dispatch would take the shape rule alone and return memory that nobody wrote."""
    with raises(name, "meta"):
        attention(device, **{name: lambda x: x.to("meta")})


def test_cu_seqlens_of_another_dtype(device):
    q, v = torch.zeros(1, T, G, D, device=device), torch.zeros(1, T, H, D, device=device)
    for dtype in (torch.int64, torch.float32, torch.bool):
        with raises("cu_seqlens", "int32", str(dtype).removeprefix("torch.")):
            rat_ext.rat_attention(q, q, v, v, L, cu_seqlens=torch.tensor([0, T], device=device).to(dtype))


def test_names_of_the_states(device):
    q, v = torch.zeros(1, T, G, D, device=device), torch.zeros(1, T, H, D, device=device)
    with raises("k_states", "shape"):
        rat_ext.chunk_attention(q, v[:, :-1], v, L)
    with raises("v_states", "dimensions"):
        rat_ext.chunk_attention(q, v, v[0], L)


@pytest.mark.parametrize("name", [*TENSORS, "gate_bias"])
def test_numbers_instead_of_tensors_of_rows(device, name):
    with raises(name, "got"):
        attention(device, **{name: lambda x: x.sum()})


@pytest.mark.parametrize("cache", [None, 3])
def test_no_cache(device, cache):
    q, v = torch.zeros(1, G, D, device=device), torch.zeros(1, H, D, device=device)
    with raises("cache", "RATCache"):
        rat_ext.rat_decode_step(q, q, v, v, cache)
