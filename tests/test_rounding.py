"""Numbers on their way between memory and registers: every value of the 16-bit formats, rounding to nearest, no bias."""

import pytest
import torch

import rat_ext
from rat_ext.testing import STATE, Random, attention_case, evaluate, name, recurrence_case, same_bits

half = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name)


def every_value(dtype: torch.dtype, device, head_dim: int) -> torch.Tensor:
    """All 65,536 bit patterns as (1, 1, heads, head_dim)."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    return bits.view(dtype).view(1, 1, -1, head_dim).to(device)


def test_the_same_bits_of_two_formats_are_not_the_same():
    x = torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)
    assert same_bits(x, x.clone()) and not same_bits(x, -x)
    assert not same_bits(x, x.view(torch.float16)) and not same_bits(x, x[:1])


def one_token(v: torch.Tensor, **options) -> torch.Tensor:
    """A token alone whose gate is shut: y = sigmoid(out_gate) v."""
    q = torch.zeros_like(v[:, :, :1])
    return rat_ext.rat_attention(q, q, v, torch.full_like(v, -100.0), 4, **options)


@half
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_every_value_passes(device, dtype, head_dim):
    """Normal, subnormal, infinite, NaN: what goes in comes out. Subnormal bfloat16 are subnormal floats, which may be 0."""
    v = every_value(dtype, device, head_dim)
    y = one_token(v)
    assert torch.equal(y.isnan(), v.isnan())
    expected = v
    if dtype == torch.bfloat16:
        small = v.float().abs() < torch.finfo(torch.float32).tiny
        expected, y = v.masked_fill(small, 0), y.masked_fill(small, 0)
    assert torch.equal(y.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
    recurrence = rat_ext.chunk_recurrence(v, torch.full_like(v, -100.0), 4)
    assert torch.equal(recurrence.nan_to_num(nan=0.0)[v.abs() >= 1e-30], v.nan_to_num(nan=0.0)[v.abs() >= 1e-30])


@half
def test_every_value_halved(device, dtype):
    """out_gate = 0 halves. Of float16 below 2^-13 the halves are subnormal, and half of them lie between two neighbours."""
    v = every_value(dtype, device, 64)
    v = v[v.isfinite() & (v.float().abs() >= 2 * torch.finfo(torch.float32).tiny)]
    v = v[: v.numel() // 64 * 64].view(1, 1, -1, 64)
    assert torch.equal(one_token(v, out_gate=torch.zeros_like(v)), (v.float() / 2).to(dtype))


def test_a_half_of_a_small_float16_is_exact(device):
    v = torch.full((1, 1, 1, 8), 1.5 * 2**-14, dtype=torch.float16, device=device)
    assert torch.equal(one_token(v, out_gate=torch.zeros_like(v)), v / 2)


def test_what_float16_cannot_hold_is_infinite(device):
    """dv of the first of three tokens that attend alike to all before them: 60,000 (1 + 1/2 + 1/3), and its negative."""
    v = torch.zeros(1, 3, 1, 8, dtype=torch.float16, device=device, requires_grad=True)
    q = torch.zeros_like(v)
    y = rat_ext.rat_attention(q, q, v, torch.full_like(v, -100.0), 1)
    signs = torch.tensor([1.0, -1.0], device=device).repeat(4)
    (dv,) = torch.autograd.grad(y, v, (60000 * signs).half().expand_as(y))
    assert torch.equal(dv[0, 0, 0].float(), float("inf") * signs)
    assert dv[0, 1:].isfinite().all()


@half
def test_to_nearest(device, dtype):
    """k~ of two tokens with gates of 0 is v_0 / 4 + v_1 / 2: between two neighbours, but for no tie."""
    eps = torch.finfo(dtype).eps
    offsets = torch.tensor([0.25, 0.75, 1.25, 1.75, -0.25, -0.75, 2.6, 3.4]) * eps
    v = torch.stack((4 * offsets, torch.full((8,), 2.0))).to(device, dtype).view(1, 2, 1, 8)
    exact = v[:, :1].double() / 4 + v[:, 1:].double() / 2
    zeros = torch.zeros_like(v)
    y, state = rat_ext.rat_attention(zeros, zeros, v, zeros, 2, return_state=True)
    expected = exact.to(torch.float32).to(dtype)
    assert (expected.float() != exact.float()).all(), "nothing to round"
    assert torch.equal(y[:, 1:], expected)
    assert torch.equal(state.chunk_v.flatten(), expected.flatten())
    recurrence = rat_ext.chunk_recurrence(v, zeros, 2)
    assert torch.equal(recurrence[:, 1:], expected)


def bias_of(got: torch.Tensor, want: torch.Tensor, eps: float) -> float:
    """Mean error away from zero, in roundings: about -0.35 where values are truncated, 0 where they are rounded."""
    got, want = got.double(), want.double()
    return float((((got - want) * want.sign()).sum() / (want.abs().sum() * eps)).nan_to_num(0.0))


@half
@pytest.mark.parametrize(
    "options",
    [{}, {"dim": 64, "chunk_size": 3}, {"dim": 128, "out_gate": False, "rotary": False}, {"dim": 40, "layout": "odd"},
     {"chunk_size": 2**40, "gate_mean": 3.0}, {"lengths": [40, 130], "return_state": True}, {"op": "chunk_attention"},
     {"sequences": [100, 0, 311, 1]}, {"dim": 256, "chunk_size": 20}],
    ids=str,
)  # fmt: skip
def test_rounding_has_no_bias(device, dtype, options):
    """Over thousands of values errors point both ways: outputs, chunk states and every gradient of 16 bits."""
    case = attention_case(device, dtype, **{"tokens": 400, "dim": 32} | options)
    actual, grads = evaluate(getattr(rat_ext, case.op), case)
    case.tensors = {key: x.float() for key, x in case.tensors.items()}
    if case.state is not None:
        for key in STATE:
            setattr(case.state, key, getattr(case.state, key).float())
    exact, _ = evaluate(getattr(rat_ext, case.op), case, grads={key: g.float() for key, g in grads.items()})
    found = {
        key: bias_of(got, exact[key], torch.finfo(dtype).eps)
        for key, got in actual.items()
        if got.dtype == dtype and got.numel() > 2000
    }
    assert len(found) >= 4
    assert all(abs(bias) < 0.1 for bias in found.values()), found


@half
@pytest.mark.parametrize("chunk_size", [4, 2**40])
def test_rounding_of_the_recurrence_has_no_bias(device, dtype, chunk_size):
    case = recurrence_case(device, dtype, tokens=400, chunk_size=chunk_size)
    actual, grads = evaluate(rat_ext.chunk_recurrence, case)
    case.tensors = {key: x.float() for key, x in case.tensors.items()}
    exact, _ = evaluate(rat_ext.chunk_recurrence, case, grads={key: g.float() for key, g in grads.items()})
    for key in ("y", "dx", "dgate"):
        assert abs(bias_of(actual[key], exact[key], torch.finfo(dtype).eps)) < 0.1, key


@half
def test_decode_rounding_has_no_bias(device, dtype):
    """y and the states of the chunks that close, against the same steps in float32."""
    random = Random(0, device, dtype)
    x = [random.normal(40, 8, n, 32) for n in (2, 2, 4, 4, 4)]
    found = []
    for precision in (dtype, torch.float32):
        cache = rat_ext.RATCache.empty(40, 4, 32, 4, 8, dtype=precision, device=device)
        for t in range(8):
            q, k, v, gate, out_gate = (a[:, t].to(precision) for a in x)
            y = rat_ext.rat_decode_step(q, k, v, gate, cache, out_gate=out_gate)
        found.append((y, cache.chunk_k, cache.chunk_v))
    for got, want in zip(*found, strict=True):
        assert abs(bias_of(got, want, torch.finfo(dtype).eps)) < 0.1
