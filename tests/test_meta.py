"""Shapes, dtypes and strides on meta tensors: those that the ops return where they compute."""

import pytest
import torch

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import LOW, STATE, Random, attention_case, make_state, name, recurrence_case

low = pytest.mark.parametrize("dtype", LOW, ids=name)


def to_meta(x):
    if isinstance(x, torch.Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta", requires_grad=x.requires_grad)
    if isinstance(x, RATCache):
        tensors = {key: to_meta(getattr(x, key)) for key in (*STATE, "lengths")}
        return RATCache(**tensors, chunk_size=x.chunk_size, length_bound=x.length_bound)
    return x


def run(function, tensors, chunk_size, state, options):
    """Outputs, then the gradients of all of them with respect to everything that may have one."""
    leaves = [x for x in tensors.values() if x.requires_grad]
    if state is not None:
        leaves += [getattr(state, key) for key in STATE]
        options = options | {"initial_state": state}
    result = function(**tensors, chunk_size=chunk_size, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if isinstance(outputs[-1], RATCache):
        outputs[-1:] = [getattr(outputs[-1], key) for key in (*STATE, "lengths")]
    differentiable = [x for x in outputs if x.requires_grad]
    grads = torch.autograd.grad(differentiable, leaves, [torch.zeros_like(x) for x in differentiable], allow_unused=True)
    return [*outputs, *grads]


def assert_alike(function, tensors, chunk_size, state=None, options=None):
    tensors = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in tensors.items()}
    if state is not None:
        state = state.replace(**{key: getattr(state, key).detach().requires_grad_() for key in STATE})
    if "x" not in tensors and options and options.get("cu_seqlens") is not None and options["return_state"]:
        options = options | {"max_seqlen": 35}  # which a CPU can find by itself
    real = run(function, tensors, chunk_size, state, dict(options or {}))
    meta = run(
        function,
        {key: to_meta(x) for key, x in tensors.items()},
        chunk_size,
        to_meta(state),
        {key: to_meta(x) for key, x in (options or {}).items()},
    )
    for i, (a, b) in enumerate(zip(real, meta, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert b.is_meta
            assert (a.shape, a.dtype, a.stride(), a.requires_grad) == (b.shape, b.dtype, b.stride(), b.requires_grad), i


OPTIONS = {
    "plain": {},
    "bare": {"gate_bias": False, "out_gate": False, "rotary": False},
    "returned": {"return_state": True},
    "continued": {"lengths": [5, 37]},
    "continued and returned": {"lengths": [5, 37], "return_state": True},
    "packed": {"sequences": [10, 0, 35]},
    "packed and returned": {"sequences": [10, 0, 35], "return_state": True},
    "packed and continued": {"sequences": [10, 0, 35], "lengths": [3, 16, 37], "return_state": True},
    "transposed": {"layout": "transposed", "dy_layout": "transposed"},
    "odd": {"layout": "odd"},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@low
@options
@pytest.mark.parametrize("op", ["rat_attention", "chunk_attention"])
def test_attention(device, dtype, op, options):
    case = attention_case(device, dtype, op=op, tokens=45, **options)
    assert_alike(getattr(rat_ext, op), case.tensors, 16, case.state, case.options)


@low
@options
def test_recurrence(device, dtype, options):
    options = {key: x for key, x in options.items() if key not in ("out_gate", "rotary")}
    case = recurrence_case(device, dtype, tokens=45, **options)
    assert_alike(rat_ext.chunk_recurrence, case.tensors, 16, None, case.options)


@low
@pytest.mark.parametrize("has_out_gate", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_packed_projection(device, dtype, has_out_gate, carried):
    random = Random(0, device, dtype)
    projection = random.normal(2, 45, (2 * 2 + (3 if has_out_gate else 2) * 4) * 32)
    bias = random.normal(4, 32, dtype=torch.float32)
    state = make_state(random, [5, 37], 4, 32, 16) if carried else None
    options = {"num_heads": 4, "num_groups": 2, "has_out_gate": has_out_gate, "return_state": carried}
    assert_alike(rat_ext.rat_attention_packed, {"projection": projection, "gate_bias": bias}, 16, state, options)


@low
def test_decode(device, dtype):
    random = Random(0, device, dtype)
    cache = make_state(random, [5, 37, 0], 4, 32, 16, rows=4)
    q, v = random.normal(2, 2, 32), random.normal(2, 4, 32)
    slots = torch.tensor([2, 0], device=device)
    y = rat_ext.rat_decode_step(q, q, v, v, cache, out_gate=v, slots=slots)
    q, v, slots = to_meta(q), to_meta(v), to_meta(slots)
    z = rat_ext.rat_decode_step(q, q, v, v, to_meta(cache), out_gate=v, slots=slots)
    assert z.is_meta and (y.shape, y.dtype, y.stride()) == (z.shape, z.dtype, z.stride())
