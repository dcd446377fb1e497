"""Infinities and NaN in queries, keys and values: forward, decode step and definition make the same of them.

The definition is a softmax over the keys that a token sees and its own, then a sum of weights times values, in IEEE arithmetic:
a score of -inf weighs 0; one of +inf or NaN, or nothing but -inf, makes y NaN; 0 * inf is NaN, for a key that the token sees.
A value that it does not see is no part of it. Weights stay far from the smallest number here: what underflows first is not
what is tested.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decode import contents, double, double_state, extras, inputs, token

import rat_ext
from rat_ext import reference
from rat_ext.testing import DTYPES, Random, attention_case, make_state, name

INF, NAN = float("inf"), float("nan")
HEADS, GROUPS, DIM, CHUNK, ROWS = 4, 2, 16, 4, 160
LENGTHS = [3, 4, 21, 6 * CHUNK + 3, 150 * CHUNK + 1]  # no key; one; a few, two of them closing a chunk; several blocks of a GPU

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
bad = st.sampled_from([INF, -INF, NAN])
places = st.sampled_from(["q", "k", "v", "chunk_k", "chunk_v", "running_k", "running_v"])
indices = st.integers(0, 10**6)
fractions = st.floats(0, 1, exclude_max=True)


def check_kinds(actual: dict, expected: dict, dtype: torch.dtype) -> None:
    """NaN, inf and -inf stand in the same places, and what is finite is near."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for key, want in expected.items():
        torch.testing.assert_close(actual[key].double(), want.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=key)


def check_step(device, dtype, place, rotary: bool = True) -> torch.Tensor:
    """One step on sequences of LENGTHS; ``place(tensors, state)`` puts the bad numbers in. y (N, H, D)."""
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    random = Random(20, device, dtype)
    state = make_state(random, LENGTHS, HEADS, DIM, CHUNK, rows=ROWS)
    x = token(inputs(random, len(LENGTHS), 1, HEADS, GROUPS, DIM), 0)
    options = extras(random, HEADS, DIM, ROWS) if rotary else {}
    place(x, state)
    wide = double_state(state)
    expected = {"y": reference.rat_decode_step(**double(x), cache=wide, **double(options))} | contents(wide)
    actual = {"y": rat_ext.rat_decode_step(**x, cache=state, **options)}
    check_kinds(actual | contents(state), expected, dtype)
    return actual["y"]


@dtypes
@given(where=st.lists(st.tuples(places, indices, bad), min_size=1, max_size=6))
def test_decode_step(device, dtype, where):
    def place(x, state):
        for key, index, value in where:
            if key in x:
                x[key].view(-1)[index % x[key].numel()] = value
                continue
            tensor, n = getattr(state, key), index % len(LENGTHS)
            if "running" in key:
                if LENGTHS[n] % CHUNK:
                    tensor[n].view(-1)[index // 7 % (HEADS * DIM)] = value
            elif LENGTHS[n] >= CHUNK:
                tensor[n, index % HEADS, index // 5 % (LENGTHS[n] // CHUNK), index // 11 % DIM] = value

    check_step(device, dtype, place)


def shut(*, keys, own):
    """Scores of -inf: of ``keys``, a slice of every sequence's chunks, and of the token itself if ``own``."""

    def place(x, state):
        x["q"].abs_()
        state.chunk_k[:, :, keys] = torch.where(state.chunk_k[:, :, keys].isnan(), NAN, -INF)
        if own:
            x["k"].fill_(-INF)

    return place


@dtypes
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("keys", [slice(0, 100), slice(0, 149), slice(1, None), slice(3, 70)], ids=str)
def test_keys_that_weigh_nothing(device, dtype, keys, own):
    """Runs of keys with a score of -inf, longer than what one block or lane group reads."""
    y = check_step(device, dtype, shut(keys=keys, own=own), rotary=False)
    assert y[-1].isfinite().all()


@dtypes
def test_nothing_but_minus_infinity(device, dtype):
    y = check_step(device, dtype, shut(keys=slice(None), own=False), rotary=False)
    assert y.isfinite().all()  # the token's own value
    y = check_step(device, dtype, shut(keys=slice(None), own=True), rotary=False)
    assert y.isnan().all()


@dtypes
def test_weight_times_value(device, dtype):
    """A key that is seen: 0 * inf is NaN, a positive weight times inf is inf, and the other elements do not notice."""

    def place(x, state):
        shut(keys=slice(0, 1), own=False)(x, state)
        state.chunk_v[:, :, 0, 3] = INF
        state.chunk_v[-1, :, 140, 5] = -INF

    y = check_step(device, dtype, place, rotary=False)
    assert y[1:, :, 3].isnan().all() and (y[-1, :, 5] == -INF).all()
    assert y[..., :3].isfinite().all() and y[..., 6:].isfinite().all()


@pytest.mark.parametrize("rotary", [True, False])
@dtypes
@given(where=st.lists(st.tuples(st.sampled_from("qkv"), fractions, fractions, bad), min_size=1, max_size=3))
def test_forward(device, dtype, rotary, where):
    """Every token: also those of a tile of queries of which only later ones see a value that is not finite."""
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    tokens = 150
    case = attention_case(device, dtype, tokens=tokens, chunk_size=8, dim=16, heads=2, groups=2, rotary=rotary, out_gate=False)
    for key, t, d, value in where:
        case.tensors[key].data[:, int(t * tokens), :, int(d * 16)] = value
    with torch.no_grad():
        options = case.tensors | {key: x for key, x in case.options.items() if isinstance(x, torch.Tensor)}
        actual = rat_ext.rat_attention(chunk_size=8, **options)
        expected = reference.rat_attention(chunk_size=8, **double(options))
    check_kinds({"y": actual}, {"y": expected}, dtype)


@dtypes
@pytest.mark.parametrize("dim", [16, 128])
@pytest.mark.parametrize("opened, first", [(slice(0, 1), 3), (slice(200, None), 803), (slice(0, 0), 1202)], ids=str)
def test_forward_where_the_own_score_weighs_nothing(device, dtype, dim, opened, first):
    """Own scores of -inf and whole blocks of keys with none but -inf, at either end of the keys: y is finite from ``first`` on,
    the token that ends the first chunk of ``opened``.
    """
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    tokens, chunk = 1202, 4
    random = Random(22, device, dtype)
    x = {key: random.normal(1, tokens, 2, dim) for key in ("q", "k_states", "v_states")}
    x["q"].abs_()
    ends = x["k_states"][:, chunk - 1 :: chunk]
    keys = ends[:, opened].clone()
    x["k_states"].fill_(-INF)
    ends[:, opened] = keys
    y = rat_ext.chunk_attention(**x, chunk_size=chunk)
    check_kinds({"y": y}, {"y": reference.chunk_attention(**double(x), chunk_size=chunk)}, dtype)
    assert y[:, :first].isnan().all() and y[:, first:].isfinite().all()


@dtypes
def test_the_forward_of_one_token(device, dtype):
    """No keys to see: the softmax of one score is 1 where the score is finite and NaN where it is not."""
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("float64 is for the CPU")
    random = Random(21, device, dtype)
    x = inputs(random, 4, 3, 2, 2, 16)
    for n, value in enumerate((INF, -INF, NAN)):
        x["q"][n, 1, 0, 5] = value
    y = rat_ext.rat_attention(**x, chunk_size=4)
    check_kinds({"y": y}, {"y": reference.rat_attention(**double(x), chunk_size=4)}, dtype)
    assert y[:3, 1, 0].isnan().all() and y[:, 0].isfinite().all() and y[:, 2].isfinite().all() and y[:, :, 1].isfinite().all()


@dtypes
@pytest.mark.parametrize("dim", [16, 40, 128, 256])
def test_values_that_some_queries_see(device, dtype, dim):
    """Queries before and after values that are not finite, in tiles that hold both; with gates, rotation, packed sequences."""
    case = attention_case(device, dtype, sequences=[70, 300, 1], chunk_size=4, dim=dim)
    for t, value in ((9, INF), (150, NAN), (200, -INF)):
        case.tensors["v"].data[:, t, :, t % dim] = value
    with torch.no_grad():
        options = case.tensors | {key: x for key, x in case.options.items() if isinstance(x, torch.Tensor)}
        actual = rat_ext.rat_attention(chunk_size=4, **options)
        wide = {key: x if key == "cu_seqlens" else x.double() for key, x in options.items()}
        check_kinds({"y": actual}, {"y": reference.rat_attention(chunk_size=4, **wide)}, dtype)
    assert actual[:, :9].isfinite().all() and actual[:, 70:150].isfinite().all()


def test_what_comes_later_is_not_seen():
    """On the CPU: an infinite value leaves the tokens before it as they were, bit for bit."""
    case = attention_case("cpu", torch.float32, tokens=300, chunk_size=4)
    with torch.no_grad():
        before = rat_ext.rat_attention(chunk_size=4, **case.options, **case.tensors)
        case.tensors["v"][:, 130:] = INF
        after = rat_ext.rat_attention(chunk_size=4, **case.options, **case.tensors)
    assert torch.equal(before[:, :130], after[:, :130]) and not after[:, 130:].isfinite().any()
