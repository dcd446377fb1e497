"""cu_seqlens: packed sequences equal the same sequences one by one."""

import dataclasses

import pytest
import torch

import rat_ext
from rat_ext.testing import DTYPES, LOW, STATE, Random, assert_same, attention_case, check, cu_seqlens_of, evaluate, name

low = pytest.mark.parametrize("dtype", LOW, ids=name)

SHAPES = {
    "mixed": [10, 0, 35, 1, 16, 8],
    "one": [40],
    "short": [1, 1, 2, 3, 1],
    "chunks": [16, 32, 48],
    "empty ends": [0, 0, 20, 0],
    "odd ends": [15, 17, 31, 33],
    "all empty": [0, 0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("sequences", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(device, dtype, sequences):
    check(attention_case(device, dtype, sequences=sequences))


@low
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 2**40])
def test_chunk_size(device, dtype, chunk_size):
    check(attention_case(device, dtype, sequences=[10, 0, 35, 1, 66], chunk_size=chunk_size))


@low
@pytest.mark.parametrize("dim", [8, 64, 128, 136, 192, 256])
def test_head_size(device, dtype, dim):
    check(attention_case(device, dtype, sequences=[10, 0, 35, 1], dim=dim, layout="projection"))


@low
@pytest.mark.parametrize("heads, groups", [(8, 1), pytest.param(6, 2, marks=pytest.mark.gpu), (3, 3)])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_long_ones_among_short_ones(device, dtype, heads, groups, chunk_size):
    """Sequences of up to six tiles of keys between many of one: their gradients of q are sums over tiles and heads in an order
    of their own, which each tile of queries sees a part of.
    """
    sequences = [*[3] * 28, 700, 5, 300, 1, 0, *[3] * 8, 129, 40, 257, *[17] * 12]
    case = attention_case(device, dtype, sequences=sequences, heads=heads, groups=groups, chunk_size=chunk_size)
    assert_same(check(case), evaluate(rat_ext.rat_attention, case)[0])


@low
def test_with_states(device, dtype):
    check(attention_case(device, dtype, sequences=[10, 0, 35, 1, 16], lengths=[5, 3, 32, 0, 15], return_state=True))
    check(attention_case(device, dtype, sequences=[10, 0, 35, 1, 16], lengths=[5, 3, 32, 0, 15]))
    check(attention_case(device, dtype, sequences=[10, 0, 35, 1, 16], return_state=True))


def test_no_sequences(device):
    random = Random(0, device, torch.float32)
    q, v = random.normal(1, 0, 2, 16), random.normal(1, 0, 4, 16)
    y, state = rat_ext.rat_attention(q, q, v, v, 4, cu_seqlens=cu_seqlens_of([], device), return_state=True)
    assert y.shape == v.shape and state.batch == 0


@low
@pytest.mark.parametrize("carried", [False, True])
def test_equals_a_loop(device, dtype, carried):
    """Outputs, states and gradients of each sequence are those of its own call."""
    sequences = [10, 0, 35, 1, 16]
    lengths = [5, 3, 32, 0, 15] if carried else None
    case = attention_case(device, dtype, sequences=sequences, lengths=lengths, return_state=True)
    whole, grads = evaluate(rat_ext.rat_attention, case)
    bias = torch.zeros_like(whole["dgate_bias"])
    begin = 0
    for n, size in enumerate(sequences):
        if size == 0:
            continue
        cut = slice(begin, begin + size)
        tensors = {key: x if key == "gate_bias" else x[:, cut] for key, x in case.tensors.items()}
        options = {key: x for key, x in case.options.items() if key not in ("cu_seqlens", "max_seqlen")}
        state = None
        if carried:
            state = case.state.read(torch.tensor([n], device=device))
        one = dataclasses.replace(case, tensors=tensors, options=options, state=state)
        rows = evaluate(rat_ext.rat_attention, one, backward=False)[0]["chunk_k"].shape[2]
        fed = {"y": grads["y"][:, cut]} | {key: grads[key][n : n + 1] for key in STATE}
        fed |= {key: fed[key][:, :, :rows] for key in ("chunk_k", "chunk_v")}
        alone, _ = evaluate(rat_ext.rat_attention, one, grads=fed)
        unit = 8 * torch.finfo(dtype).eps
        for key, x in alone.items():
            if key == "dgate_bias":
                bias += x
                continue
            if key.startswith("dinitial_") or key in (*STATE, "lengths"):
                same = whole[key][n : n + 1]
                same = same[:, :, :rows] if "chunk" in key and not key.startswith("d") else same
            else:
                same = whole[key][:, cut]
            torch.testing.assert_close(same, x, rtol=unit, atol=unit, msg=lambda m, key=key, n=n: f"{key} of {n}: {m}")
        begin += size
    torch.testing.assert_close(bias, whole["dgate_bias"], rtol=1e-4, atol=1e-4)
