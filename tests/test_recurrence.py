"""chunk_recurrence against float64, from one token to a recurrence over the whole sequence."""

import pytest
import torch

import rat_ext
from rat_ext.testing import DTYPES, LAYOUTS, LOW, check, evaluate, name, recurrence_case

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
low = pytest.mark.parametrize("dtype", LOW, ids=name)


@dtypes
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 17, 64, 110, 200, 2**40])
def test_chunk_size(device, dtype, chunk_size):
    check(recurrence_case(device, dtype, tokens=110, chunk_size=chunk_size))


@low
@pytest.mark.parametrize("dim", [8, 40, 64, 96, 128, 200, 256])
def test_head_size(device, dtype, dim):
    check(recurrence_case(device, dtype, dim=dim, tokens=40))


@low
@pytest.mark.parametrize("tokens", [1, 2, 16, 33, 129, 700])
def test_rnn(device, dtype, tokens):
    check(recurrence_case(device, dtype, tokens=tokens, chunk_size=tokens, return_state=True))


@low
@pytest.mark.parametrize(("size", "mean"), [(0.0, 30.0), (0.0, -30.0), (30.0, 0.0), (2.0, 6.0)])
def test_extreme_gates(device, dtype, size, mean):
    check(recurrence_case(device, dtype, tokens=300, chunk_size=2**40, gate_size=size, gate_mean=mean))


@low
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(device, dtype, layout):
    dy_layout = "contiguous" if layout == "projection" else layout
    check(recurrence_case(device, dtype, layout=layout, dy_layout=dy_layout, tokens=40))


@low
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("gate_bias", [False, True], ids=["", "gate_bias"])
def test_groups(device, dtype, heads, groups, gate_bias):
    check(recurrence_case(device, dtype, heads=heads, groups=groups, gate_bias=gate_bias))


@low
@pytest.mark.parametrize("chunk_size", [16, 2**40])
def test_states(device, dtype, chunk_size):
    """initial_state where it counts and where a chunk has just closed; the final state and its gradient."""
    check(recurrence_case(device, dtype, batch=4, lengths=[0, 5, 16, 37], chunk_size=chunk_size, return_state=True))


@low
@pytest.mark.parametrize("lengths", [None, [3, 16, 0, 7, 40, 0]])
@pytest.mark.parametrize("chunk_size", [16, 2**40])
def test_packed(device, dtype, lengths, chunk_size):
    sequences = [10, 0, 35, 1, 16, 8]
    check(recurrence_case(device, dtype, sequences=sequences, lengths=lengths, chunk_size=chunk_size, return_state=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_long_rnn(device, dtype):
    """Long enough for every way of splitting a sequence into segments, of which a CPU has one: segments of 64 tokens."""
    tokens = 5003 if device.type == "cuda" else 1003
    check(recurrence_case(device, dtype, batch=1, tokens=tokens, heads=2, groups=1, dim=16, chunk_size=tokens, gate_mean=4.0))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_final_state_without_tokens(device, batch):
    """It is the initial one, or zeros; dense and packed."""
    x, gate = torch.zeros(batch, 0, 2, 16, device=device), torch.zeros(batch, 0, 4, 16, device=device)
    initial, lengths = torch.randn(batch, 4, 16, device=device), torch.full((batch,), 5, dtype=torch.int32, device=device)
    cuts = {"cu_seqlens": torch.zeros(2, dtype=torch.int32, device=device)} if batch == 1 else {}
    for options in ({}, cuts):
        _, state = rat_ext.chunk_recurrence(x, gate, 4, return_state=True, **options)
        assert torch.equal(state, torch.zeros_like(initial))
        _, state = rat_ext.chunk_recurrence(x, gate, 4, initial_state=initial, lengths=lengths, return_state=True, **options)
        assert torch.equal(state, initial)


def test_no_tokens_have_a_bias_without_gradient(device):
    """T = 0: the gradient of gate_bias is 0, fresh or continued, dense or packed."""
    for options in ({}, {"lengths": [3, 16], "return_state": True}, {"sequences": [0, 0]}):
        values, _ = evaluate(rat_ext.chunk_recurrence, recurrence_case(device, torch.float32, tokens=0, **options))
        assert torch.equal(values["dgate_bias"], torch.zeros_like(values["dgate_bias"]))


def test_an_initial_state_that_is_not_contiguous_is_refused(device):
    case = recurrence_case(device, torch.float32, lengths=[3, 5])
    initial = case.tensors["initial_state"]
    case.tensors["initial_state"] = initial.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="initial_state: expected a contiguous tensor"):
        rat_ext.chunk_recurrence(**case.tensors, chunk_size=16, **case.options)


def test_only_the_final_state(device):
    """No gradient arrives for y: its absence is zero, not garbage."""
    case = recurrence_case(device, torch.float32, return_state=True)
    _, grads = evaluate(rat_ext.chunk_recurrence, case)
    del grads["y"]
    from rat_ext import reference

    expected, _ = evaluate(reference.chunk_recurrence, case, grads=grads)
    actual, _ = evaluate(rat_ext.chunk_recurrence, case, grads=grads)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-5)
