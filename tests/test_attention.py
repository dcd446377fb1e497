"""rat_attention against float64: outputs and every gradient, over sizes, options, gates and strides."""

import pytest
import torch

import rat_ext
from rat_ext.testing import DTYPES, LAYOUTS, LOW, attention_case, check, evaluate, name

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
low = pytest.mark.parametrize("dtype", LOW, ids=name)


@dtypes
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 17, 64, 110, 200, 2**40])
def test_chunk_size(device, dtype, chunk_size):
    check(attention_case(device, dtype, tokens=110, chunk_size=chunk_size))


@dtypes
@pytest.mark.parametrize("dim", [8, 16, 24, 40, 64, 72, 96, 128, 136, 192, 248, 256])
def test_head_size(device, dtype, dim):
    check(attention_case(device, dtype, dim=dim, chunk_size=8))


@low
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 257])
def test_tokens(device, dtype, tokens):
    check(attention_case(device, dtype, tokens=tokens))


@low
@pytest.mark.parametrize("dim", [64, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (128, 192))])
@pytest.mark.parametrize("tokens", [48, 384])
@pytest.mark.parametrize(
    "options",
    [{}, {"rotary": False, "gate_bias": False}, {"return_state": True}, {"batch": 2, "heads": 2, "groups": 2}],
    ids=["", "plain", "state", "rows and groups"],
)
def test_whole_tiles(device, dtype, dim, tokens, options):
    """Chunks of 16 tokens, all of them whole, and an odd number of heads that add to one dq: of 384 tokens Hopper's
    attention leaves dq in its tiles, and the reverse scan reads them there."""
    check(attention_case(device, dtype, dim=dim, tokens=tokens, **{"batch": 1, "heads": 3, "groups": 1} | options))


@low
@pytest.mark.parametrize("dim", [64, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (128, 192))])
@pytest.mark.parametrize("chunk_size", [4, 8])
@pytest.mark.parametrize("tokens", [48, pytest.param(400, marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "options",
    [{}, {"rotary": False, "gate_bias": False}, {"return_state": True}, {"batch": 2, "heads": 2, "groups": 2}],
    ids=["", "plain", "state", "rows and groups"],
)
def test_whole_tiles_of_short_chunks(device, dtype, dim, chunk_size, tokens, options):
    """Tiles of two or four whole chunks, and no others in the call: the reverse scan has a kernel for them."""
    options = {"batch": 1, "heads": 3, "groups": 1, "gate_mean": 1.0} | options
    check(attention_case(device, dtype, dim=dim, tokens=tokens, chunk_size=chunk_size, **options))


@pytest.mark.gpu
@low
@pytest.mark.parametrize("dim", [64, 128, 40])
@pytest.mark.parametrize("chunk_size, tokens", [(32, 192), (48, 144), (64, 256), (64, 250), (80, 240), (256, 768)])
@pytest.mark.parametrize(
    "options", [{}, {"return_state": True, "rotary": False}, {"heads": 8, "groups": 1}], ids=["", "state", "many heads"]
)
def test_chunks_of_tiles(device, dtype, dim, chunk_size, tokens, options):
    """Chunks of several tiles of 16 tokens, which the reverse scan takes from the last to the first."""
    check(attention_case(device, dtype, dim=dim, tokens=tokens, chunk_size=chunk_size, **{"heads": 3, "groups": 1} | options))


@low
@pytest.mark.parametrize("chunk_size", [4, 5, 6, 7, 8, 9, 12, 15, 17, 20, 33, 49, 63, 100])
@pytest.mark.parametrize("options", [{}, {"return_state": True}], ids=["", "state"])
def test_ends_inside_tiles(device, dtype, chunk_size, options):
    """Chunks that begin and end inside the tiles of the reverse scan, whose gradients it asks for ahead."""
    check(attention_case(device, dtype, batch=1, dim=64, tokens=203, chunk_size=chunk_size, gate_mean=1.0, **options))


@pytest.mark.gpu
@low
def test_more_heads_than_a_group_has_room_for(device, dtype):
    """Long chunks hand gradients from tile to tile in shared memory, for each head of a group: here there is no room, and
    another family serves the call."""
    check(attention_case(device, dtype, batch=1, dim=256, tokens=130, chunk_size=64, heads=96, groups=1))


@low
def test_a_key_that_is_not_finite_spoils_its_own_column(device, dtype):
    """A key of -inf in one column, of weight 0: NaN in that column of dq, and without rotation in no other."""
    case = attention_case(device, dtype, batch=1, tokens=128, heads=1, groups=1, dim=64, rotary=False, gate_mean=-3.0)
    q, k = case.tensors["q"], case.tensors["k"]
    q.copy_(q.abs() + 0.1)
    k[:, 15, :, 0] = -float("inf")
    result, _ = evaluate(rat_ext.rat_attention, case)
    dq = result["dq"][:, 16:]
    assert dq[..., 0].isnan().all()
    assert dq[..., 1:].isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_many_chunks(device, dtype, chunk_size):
    check(attention_case(device, dtype, batch=1, tokens=1501, heads=2, groups=1, dim=64, chunk_size=chunk_size))


@low
@pytest.mark.parametrize("dim", [136, 192, 200, 256])
@pytest.mark.parametrize(("tokens", "sequences"), [(421, None), (0, [301, 0, 5, 130])], ids=["dense", "packed"])
def test_wide_heads_over_several_tiles(device, dtype, dim, tokens, sequences):
    """Tiles of 64 chunk states and of 64 and 128 queries, ragged at both ends, heads that add to one q."""
    options = {"sequences": sequences} if sequences else {"batch": 1, "tokens": tokens}
    case = attention_case(device, dtype, heads=2, groups=1, dim=dim, chunk_size=2, **options)
    check(case)


@low
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (4, 4), (6, 3), (8, 2), (5, 1), (12, 2)])
def test_groups(device, dtype, heads, groups):
    check(attention_case(device, dtype, heads=heads, groups=groups))


@low
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batch(device, dtype, batch):
    check(attention_case(device, dtype, batch=batch, tokens=40))


@low
@pytest.mark.parametrize("rotary", [False, True], ids=["still", "rotary"])
@pytest.mark.parametrize("out_gate", [False, True], ids=["", "out_gate"])
@pytest.mark.parametrize("gate_bias", [False, True], ids=["", "gate_bias"])
def test_optional_arguments(device, dtype, gate_bias, out_gate, rotary):
    check(attention_case(device, dtype, gate_bias=gate_bias, out_gate=out_gate, rotary=rotary))


@dtypes
@pytest.mark.parametrize(("size", "mean"), [(0.0, 30.0), (0.0, -30.0), (30.0, 0.0), (5.0, 8.0)])
def test_extreme_gates(device, dtype, size, mean):
    check(attention_case(device, dtype, gate_size=size, gate_mean=mean, gate_bias=False))
    check(attention_case(device, dtype, gate_size=size, gate_mean=mean, chunk_size=2**40))


@low
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 0.05, 1e-40, 1e-46, -1e-46])  # 1e-46 is 0 in float32
def test_scale(device, dtype, scale):
    check(attention_case(device, dtype, scale=scale))


@low
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [24, 32])
def test_strides(device, dtype, layout, dim):
    dy_layout = "contiguous" if layout == "projection" else layout
    check(attention_case(device, dtype, layout=layout, dy_layout=dy_layout, dim=dim, tokens=40))


@low
def test_strides_make_no_difference(device, dtype):
    """The same numbers in another layout give the same result, up to the order of sums."""
    plain = attention_case(device, dtype)
    values, grads = evaluate(rat_ext.rat_attention, plain)
    for layout in ("transposed", "odd", "projection"):
        other, _ = evaluate(rat_ext.rat_attention, attention_case(device, dtype, layout=layout), grads=grads)
        for key in values:
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(other[key], values[key], rtol=16 * unit, atol=16 * unit)


@low
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_nothing(device, dtype, batch, tokens):
    values, _ = evaluate(rat_ext.rat_attention, attention_case(device, dtype, batch=batch, tokens=tokens))
    assert values["y"].shape == (batch, tokens, 4, 32)
    assert not values["dgate_bias"].any()


@low
@pytest.mark.parametrize(
    "options",
    [{"batch": 2, "lengths": [3, 37]}, {"batch": 2, "lengths": [3, 37], "return_state": True}, {"sequences": [0, 0]},
     {"sequences": [0], "lengths": [16], "return_state": True}],
    ids=str,
)  # fmt: skip
def test_no_tokens_have_a_bias_without_gradient(device, dtype, options):
    values, _ = evaluate(rat_ext.rat_attention, attention_case(device, dtype, tokens=0, **options))
    assert torch.equal(values["dgate_bias"], torch.zeros_like(values["dgate_bias"]))


def test_bias_is_added_before_the_sigmoid(device):
    """A check by hand that owes nothing to the reference: one token, one head."""
    k, v, gate = torch.ones(1, 1, 1, 8), torch.full((1, 1, 1, 8), 3.0), torch.zeros(1, 1, 1, 8)
    bias, out_gate = torch.full((1, 8), 1.0), torch.full((1, 1, 1, 8), 2.0)
    args = [x.to(device) for x in (k, k, v, gate)]
    y = rat_ext.rat_attention(*args, 4, gate_bias=bias.to(device), out_gate=out_gate.to(device))
    expected = torch.sigmoid(torch.tensor(2.0)) * torch.sigmoid(torch.tensor(-1.0)) * 3
    torch.testing.assert_close(y.cpu(), expected.expand(1, 1, 1, 8))


@dtypes
@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("bias", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_bias_that_shuts_every_gate(device, dtype, dim, bias):
    """f = 0: each token's state is its own key and value. The last tile is not whole."""
    case = attention_case(device, dtype, tokens=17, dim=dim)
    case.tensors["gate_bias"].fill_(bias)
    check(case)
