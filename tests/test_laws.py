"""What holds whatever the numbers are."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import rat_ext
from rat_ext.testing import (
    Random,
    assert_same,
    attention_case,
    check,
    cu_seqlens_of,
    evaluate,
    name,
    recurrence_case,
    same_bits,
)

dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)


def near(a, b, dtype):
    unit = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(a, b, rtol=unit, atol=unit)


@dtypes
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 2**40])
@pytest.mark.parametrize("at", [0, 1, 15, 16, 40, 69])
def test_causality(device, dtype, chunk_size, at):
    """Huge inputs from token t on change no y before t, and a loss that ends before t has no gradient from t on."""
    case = attention_case(device, dtype, chunk_size=chunk_size)
    clean, grads = evaluate(rat_ext.rat_attention, case)
    for key in ("q", "k", "v", "gate", "out_gate"):
        case.tensors[key] = case.tensors[key].clone()
        case.tensors[key][:, at:] = 3e4 * case.tensors[key][:, at:].sign()
    spoiled, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    assert (spoiled["y"][:, at:] != clean["y"][:, at:]).any()
    near(spoiled["y"][:, :at], clean["y"][:, :at], dtype)
    grads["y"][:, at:] = 0
    case = attention_case(device, dtype, chunk_size=chunk_size)
    early, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    for key in ("dq", "dk", "dv", "dgate", "dout_gate"):
        assert not early[key][:, at:].any(), key


@dtypes
def test_packed_sequences_do_not_meet(device, dtype):
    """NaN in one packed sequence stays in it, forward and backward."""
    case = attention_case(device, dtype, sequences=[20, 30, 25])
    for key in ("q", "k", "v", "gate", "out_gate"):
        case.tensors[key] = case.tensors[key].clone()
        case.tensors[key][:, 20:50] = float("nan")
    values, _ = evaluate(rat_ext.rat_attention, case)
    for key in ("y", "dq", "dk", "dv", "dgate", "dout_gate"):
        assert values[key][:, 20:50].isnan().all(), key
        assert values[key][:, :20].isfinite().all() and values[key][:, 50:].isfinite().all(), key


@dtypes
def test_rows_of_the_batch_do_not_meet(device, dtype):
    case = attention_case(device, dtype, batch=3)
    for key in ("q", "k", "v", "gate", "out_gate"):
        case.tensors[key] = case.tensors[key].clone()
        case.tensors[key][1] = float("nan")
    values, _ = evaluate(rat_ext.rat_attention, case)
    for key in ("y", "dq", "dk", "dv", "dgate", "dout_gate"):
        assert values[key][1].isnan().all(), key
        assert values[key][[0, 2]].isfinite().all(), key


@dtypes
@pytest.mark.parametrize("gated", [False, True])
def test_chunks_of_one_are_attention(device, dtype, gated):
    """L = 1: dense causal attention over (1 - f) k and (1 - f) v, by torch's own kernel."""
    random = Random(0, device, torch.float32)
    q, k = (random.normal(2, 50, 2, 32) for _ in range(2))
    v, gate = (random.normal(2, 50, 4, 32) for _ in range(2))
    gate = gate if gated else torch.full_like(gate, -200.0)
    take = torch.sigmoid(-gate)
    args = [x.to(dtype) for x in (q, k, v, gate)]
    y = rat_ext.rat_attention(*args, 1)
    q, k, v, take = (x.to(dtype).float() for x in (q, k, v, take))
    keys = take * k.repeat_interleave(2, dim=2)
    q, keys, values = (x.transpose(1, 2) for x in (q.repeat_interleave(2, dim=2), keys, take * v))
    expected = scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(1, 2)
    unit = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    torch.testing.assert_close(y.float(), expected, rtol=unit, atol=unit)


@dtypes
@pytest.mark.parametrize("chunk_size", [50, 51, 2**40])
def test_one_chunk_is_a_recurrence(device, dtype, chunk_size):
    """L >= T: every token sees itself alone, so y is the gated state of v whatever q and k are."""
    random = Random(0, device, dtype)
    q, k = (random.normal(2, 50, 2, 32) for _ in range(2))
    v, gate, out_gate = (random.normal(2, 50, 4, 32) for _ in range(3))
    y = rat_ext.rat_attention(q, k, v, gate, chunk_size, out_gate=out_gate)
    states = rat_ext.chunk_recurrence(v, gate, chunk_size)
    near(y.float(), torch.sigmoid(out_gate.float()) * states.float(), dtype)
    other = rat_ext.rat_attention(q.flip(1) * 5, k.flip(1), v, gate, chunk_size, out_gate=out_gate)
    near(other, y, dtype)


@dtypes
def test_permuting_the_batch(device, dtype):
    """A row's result does not depend on its place in the batch: equal bits."""
    case = attention_case(device, dtype, batch=4, gate_bias=False)
    order = torch.tensor([2, 0, 3, 1], device=device)
    values, grads = evaluate(rat_ext.rat_attention, case)
    case.tensors = {key: x[order] for key, x in case.tensors.items()}
    permuted, _ = evaluate(rat_ext.rat_attention, case, grads={"y": grads["y"][order]})
    assert_same({key: x[order] for key, x in values.items()}, permuted)


@dtypes
def test_permuting_the_heads(device, dtype):
    """Groups may be permuted, and the heads inside a group: y and dv follow."""
    case = attention_case(device, dtype, heads=6, groups=2, gate_bias=True)
    values, grads = evaluate(rat_ext.rat_attention, case)
    heads, groups = torch.tensor([4, 3, 5, 0, 2, 1], device=device), torch.tensor([1, 0], device=device)
    pick = {"q": groups, "k": groups, "v": heads, "gate": heads, "out_gate": heads}
    case.tensors = {key: x[heads] if key == "gate_bias" else x[:, :, pick[key]] for key, x in case.tensors.items()}
    permuted, _ = evaluate(rat_ext.rat_attention, case, grads={"y": grads["y"][:, :, heads]})
    for key, x in values.items():
        want = x[heads] if key == "dgate_bias" else x[:, :, groups if key in ("dq", "dk") else heads]
        near(permuted[key], want, dtype)


@dtypes
@pytest.mark.parametrize("extra", [{}, {"sequences": [10, 0, 35, 25]}, {"lengths": [3, 37], "return_state": True}], ids=str)
def test_twice_the_same_bits(device, dtype, extra):
    case = attention_case(device, dtype, **extra)
    first, grads = evaluate(rat_ext.rat_attention, case)
    for _ in range(3):
        assert_same(first, evaluate(rat_ext.rat_attention, case, grads=grads)[0])
    case = recurrence_case(device, dtype, **extra)
    first, grads = evaluate(rat_ext.chunk_recurrence, case)
    for _ in range(3):
        assert_same(first, evaluate(rat_ext.chunk_recurrence, case, grads=grads)[0])


@dtypes
def test_shifting_all_chunks_changes_nothing(device, dtype):
    """Rotations are relative: tables that begin at chunk 5 give the same y."""
    case = attention_case(device, dtype)
    cos, sin = rat_ext.rotary_tables(20, 32, base=100.0, device=device)
    rows = case.options["rotary_cos"].shape[0]
    results = []
    for first in (0, 5):
        case.options |= {"rotary_cos": cos[first : first + rows], "rotary_sin": sin[first : first + rows]}
        results.append(evaluate(rat_ext.rat_attention, case, backward=False)[0]["y"])
    near(results[0], results[1], dtype)


@dtypes
def test_rotation_does_something(device, dtype):
    case = attention_case(device, dtype)
    turned, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    case.options |= {"rotary_cos": None, "rotary_sin": None}
    still, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    assert same_bits(turned["y"][:, :16], still["y"][:, :16])
    assert not torch.allclose(turned["y"][:, 32:], still["y"][:, 32:], atol=1e-2)


@dtypes
def test_scale_moves_between_q_and_scale(device, dtype):
    """scale s on q equals scale 1 on s q (s a power of two, so that q scales exactly)."""
    case = attention_case(device, dtype, scale=0.25)
    first, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    case.tensors["q"], case.options["scale"] = case.tensors["q"] * 0.25, 1.0
    second, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    near(first["y"], second["y"], dtype)
    case.options["scale"] = None
    case.tensors["q"] = case.tensors["q"] * 32**0.5
    third, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    unit = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(third["y"], second["y"], rtol=unit, atol=unit)


@dtypes
def test_values_enter_linearly(device, dtype):
    case = attention_case(device, dtype)
    first, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    case.tensors["v"] = case.tensors["v"] * 4
    second, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    near(first["y"] * 4, second["y"], dtype)


@dtypes
def test_equal_values_come_out(device, dtype):
    """Open gates and v = 1 everywhere: the weights of the softmax sum to one."""
    random = Random(0, device, dtype)
    q, k = (random.normal(2, 70, 2, 32) for _ in range(2))
    ones = torch.ones(2, 70, 4, 32, dtype=dtype, device=device)
    y = rat_ext.rat_attention(q, k, ones, ones * -30, 16)
    near(y, ones, dtype)


@dtypes
@pytest.mark.parametrize("op", ["rat_attention", "chunk_recurrence"])
@pytest.mark.parametrize("chunk_size", [16, 40, 100])
def test_the_gradient_of_the_bias_is_a_sum(device, dtype, op, chunk_size):
    """Of dgate over all tokens: on a GPU, of so many that blocks take several tiles and their sums are summed again."""
    batch = 64 if device.type == "cuda" else 3
    sizes = {"batch": batch, "tokens": 4096, "heads": 2, "groups": 1, "dim": 8, "chunk_size": chunk_size}
    make = attention_case if op == "rat_attention" else recurrence_case
    values, _ = evaluate(getattr(rat_ext, op), make(device, dtype, **sizes))
    terms = values["dgate"].double()
    # A thread adds thousands of terms one after the other: as many roundings of a sum that may be as large as the whole.
    size = terms.square().sum((0, 1)).sqrt() + terms.sum((0, 1)).abs()
    error = (values["dgate_bias"].double() - terms.sum((0, 1))).abs()
    assert (error <= 16 * torch.finfo(dtype).eps * size).all()


@dtypes
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_key_that_outweighs_the_others(device, dtype, dim, chunk_size):
    """Scores far apart: the maximum rises again and again, and what was summed shrinks by as much."""
    case = attention_case(device, dtype, tokens=400, dim=dim, chunk_size=chunk_size, gate_mean=-4.0, gate_bias=False, scale=1.5)
    check(case)
    # The greatest key comes last, or first: every block raises the maximum, or none does.
    for order in (1, -1):
        size = torch.linspace(0.1, 3.0, 400, device=device)
        size = size if order > 0 else size.flip(0)
        case = attention_case(device, dtype, tokens=400, dim=dim, chunk_size=chunk_size, gate_bias=False, rotary=False)
        case.tensors["q"] = torch.ones_like(case.tensors["q"])
        case.tensors["k"] = (size[:, None, None] * torch.ones_like(case.tensors["k"])).to(dtype)
        case.tensors["gate"] = torch.full_like(case.tensors["gate"], -20.0)
        check(case, backward=False)


@dtypes
def test_packing_order(device, dtype):
    """Swapping two packed sequences swaps their results."""
    case = attention_case(device, dtype, sequences=[20, 33], gate_bias=False)
    values, grads = evaluate(rat_ext.rat_attention, case)
    swap = lambda x: torch.cat((x[:, 20:], x[:, :20]), dim=1)  # noqa: E731
    case.tensors = {key: swap(x) for key, x in case.tensors.items()}
    case.options["cu_seqlens"] = cu_seqlens_of([33, 20], device)
    swapped, _ = evaluate(rat_ext.rat_attention, case, grads={"y": swap(grads["y"])})
    for key, x in values.items():
        near(swapped[key], swap(x), dtype)
