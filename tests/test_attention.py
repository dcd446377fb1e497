"""rat_attention against float64: outputs and every gradient, over sizes, options, gates and strides."""

import pytest
import torch

import rat_ext
from rat_ext.testing import DTYPES, LAYOUTS, LOW, attention_case, check, evaluate, name, same_bits

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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_many_chunks(device, dtype, chunk_size):
    check(attention_case(device, dtype, batch=1, tokens=1501, heads=2, groups=1, dim=64, chunk_size=chunk_size))


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
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 0.05])
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


def call_all(case, gate_bias, tables) -> dict[str, torch.Tensor]:
    """The ops that take a bias or tables, with these; by name."""
    q, k, v, gate = (case.tensors[key] for key in ("q", "k", "v", "gate"))
    projection = torch.cat([x.flatten(2) for x in (q, k, v, gate)], dim=2)
    both = {"gate_bias": gate_bias, "rotary_cos": tables[0], "rotary_sin": tables[1]}
    heads, groups, dim = v.shape[2], q.shape[2], v.shape[3]
    cache = rat_ext.RATCache.empty(v.shape[0], heads, dim, 4, 16, dtype=v.dtype, device=v.device)
    for t in range(6):
        y = rat_ext.rat_decode_step(q[:, t], k[:, t], v[:, t], gate[:, t], cache, **both)
    return {
        "rat_attention": rat_ext.rat_attention(q, k, v, gate, 4, **both),
        "packed": rat_ext.rat_attention_packed(projection, heads, groups, 4, has_out_gate=False, **both),
        "chunk_attention": rat_ext.chunk_attention(q, v, gate, 4, rotary_cos=tables[0], rotary_sin=tables[1]),
        "recurrence": rat_ext.chunk_recurrence(k, gate, 4, gate_bias=gate_bias),
        "decode": y,
    }


@low
@pytest.mark.parametrize("form", ["transposed", "strided", "unaligned"])
@pytest.mark.parametrize("dim", [8, 32, 128])
def test_strides_of_small_tensors(device, dtype, form, dim):
    """gate_bias and rotary tables of any strides, at any address: the bits of dense ones."""
    case = attention_case(device, dtype, tokens=20, chunk_size=4, dim=dim)
    cos, sin = rat_ext.rotary_tables(5, dim, base=100.0, device=device)
    dense = [case.tensors["gate_bias"], cos, sin]

    def other(x):
        if form == "transposed":
            return x.t().contiguous().t()
        if form == "strided":
            wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1), float("nan"))
            wide[:, 1::2] = x
            return wide[:, 1::2]
        flat = x.new_empty(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    bias, cos, sin = (other(x) for x in dense)
    with torch.no_grad():
        expected = call_all(case, dense[0], dense[1:])
        for key, y in call_all(case, bias, (cos, sin)).items():
            assert same_bits(y, expected[key]), key


def test_the_gradient_of_a_transposed_bias(device):
    case = attention_case(device, torch.float32, heads=2, groups=1, dim=8)
    values, grads = evaluate(rat_ext.rat_attention, case)
    case.tensors["gate_bias"] = case.tensors["gate_bias"].t().contiguous().t()
    again, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    assert same_bits(again["y"], values["y"]) and same_bits(again["dgate_bias"], values["dgate_bias"])


@pytest.mark.parametrize("table", [torch.float64, torch.bfloat16], ids=name)
def test_tables_of_another_dtype(device, table):
    """Tables are used in the state dtype, whatever they come in."""
    case = attention_case(device, torch.float32, tokens=20, chunk_size=4)
    bias = case.tensors["gate_bias"].to(table)
    cos, sin = (x.to(table) for x in rat_ext.rotary_tables(5, 32, base=100.0, device=device))
    with torch.no_grad():
        expected = call_all(case, bias.float(), (cos.float(), sin.float()))
        for key, y in call_all(case, bias, (cos, sin)).items():
            assert same_bits(y, expected[key]), key


def shifted(x: torch.Tensor, what: str) -> torch.Tensor:
    """x (B, T, heads, D) whose address, or one of whose strides, is no multiple of 16 bytes; all else is."""
    batch, tokens, heads, dim = x.shape
    token, begin = heads * dim, 0
    row, head = tokens * token, dim
    if what == "address":
        begin = 1
    elif what == "head":
        head, token, row = dim + 1, heads * (dim + 8), tokens * heads * (dim + 8)
    elif what == "token":
        token, row = token + 1, tokens * (token + 8)
    else:
        row = row + 1
    flat = x.new_full((begin + batch * row + tokens * token + heads * head,), float("nan"))
    view = flat.as_strided(x.shape, (row, token, head, 1), begin)
    view.copy_(x)
    return view


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
@pytest.mark.parametrize("which", ["q", "k", "v", "gate", "out_gate", "dy"])
@pytest.mark.parametrize("what", ["address", "batch", "token", "head"])
@pytest.mark.parametrize(("dim", "chunk_size"), [(64, 16), (128, 2), (32, 100)])
def test_one_tensor_off_the_grid(device, dtype, which, what, dim, chunk_size):
    """One address or stride of one tensor forbids 16-byte accesses: the numbers stay."""
    case = attention_case(device, dtype, tokens=72, dim=dim, chunk_size=chunk_size, groups=2)
    values, grads = evaluate(rat_ext.rat_attention, case)
    if which == "dy":
        grads["y"] = shifted(grads["y"], what)
    else:
        case.tensors[which] = shifted(case.tensors[which], what)
    again, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    unit = 16 * torch.finfo(dtype).eps
    for key in values:
        size = float(values[key].abs().max())
        torch.testing.assert_close(again[key], values[key], rtol=unit, atol=unit * size, msg=lambda m, key=key: f"{key}: {m}")
