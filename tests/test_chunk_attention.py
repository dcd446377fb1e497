"""chunk_attention against float64, and together with chunk_recurrence against rat_attention."""

import pytest
import torch

import rat_ext
from rat_ext.testing import DTYPES, LAYOUTS, LOW, attention_case, check, evaluate, name

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
low = pytest.mark.parametrize("dtype", LOW, ids=name)


@dtypes
@pytest.mark.parametrize("chunk_size", [1, 2, 16, 17, 64, 2**40])
def test_chunk_size(device, dtype, chunk_size):
    check(attention_case(device, dtype, op="chunk_attention", tokens=110, chunk_size=chunk_size))


@low
@pytest.mark.parametrize("dim", [8, 40, 64, 96, 128, 136, 192, 200, 256])
def test_head_size(device, dtype, dim):
    check(attention_case(device, dtype, op="chunk_attention", dim=dim))


@low
@pytest.mark.parametrize("out_gate", [False, True], ids=["", "out_gate"])
@pytest.mark.parametrize("rotary", [False, True], ids=["still", "rotary"])
def test_optional_arguments(device, dtype, out_gate, rotary):
    check(attention_case(device, dtype, op="chunk_attention", out_gate=out_gate, rotary=rotary))


@low
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(device, dtype, scale):
    check(attention_case(device, dtype, op="chunk_attention", scale=scale))


@low
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, dtype, layout):
    dy_layout = "contiguous" if layout == "projection" else layout
    check(attention_case(device, dtype, op="chunk_attention", layout=layout, dy_layout=dy_layout, tokens=40))


@low
@pytest.mark.parametrize("sequences", [None, [10, 0, 35, 1, 16]])
def test_states(device, dtype, sequences):
    lengths = [0, 5, 16, 37, 3][: 2 if sequences is None else 5]
    check(attention_case(device, dtype, op="chunk_attention", sequences=sequences, lengths=lengths, return_state=True))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 2**40])
def test_with_the_recurrence_it_is_rat_attention(device, chunk_size):
    case = attention_case(device, torch.float32, chunk_size=chunk_size)

    def composed(q, k, v, gate, chunk_size, gate_bias, out_gate, **options):
        options.pop("return_state")
        options = {key: x for key, x in options.items() if x is not None}
        k_states = rat_ext.chunk_recurrence(k, gate, chunk_size, gate_bias=gate_bias)
        v_states = rat_ext.chunk_recurrence(v, gate, chunk_size, gate_bias=gate_bias)
        return rat_ext.chunk_attention(q, k_states, v_states, chunk_size, out_gate=out_gate, **options)

    check(case, function=composed)
    fused, grads = evaluate(rat_ext.rat_attention, case)
    parts, _ = evaluate(composed, case, grads=grads)
    for key in fused:
        torch.testing.assert_close(parts[key], fused[key], rtol=1e-4, atol=2e-5)
