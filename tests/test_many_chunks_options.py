"""The options of rat_attention over more chunk states than a tile of any kernel holds, see test_many_chunks.py."""

import pytest
from test_many_chunks import dims, low, many

from rat_ext.testing import check


@low
@pytest.mark.parametrize("dim", [8, 40, 72, 96, 104])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_head_size(device, dtype, dim, groups):
    check(many(device, dtype, dim=dim, heads=4, groups=groups))


@low
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups(device, dtype, groups):
    check(many(device, dtype, dim=128, heads=6, groups=groups))


# Sequences of 514, 0, 129, 128, 64, 0 and 0 chunks; then of thousands.
PACKED = [0, 1029, 1, 0, 258, 257, 129, 0, 1, 0]
LONG = [0, 7001, 0, 1, 300, 3, 4096, 0, 2]


@low
@dims
@pytest.mark.parametrize("sequences", [PACKED, pytest.param(LONG, marks=pytest.mark.gpu)], ids=["hundreds", "thousands"])
def test_packed(device, dtype, dim, sequences):
    check(many(device, dtype, dim=dim, sequences=sequences))


@low
@dims
def test_packed_many_short_ones(device, dtype, dim):
    """Far more sequences than tiles: each has a tile of its own, nearly empty."""
    check(many(device, dtype, dim=dim, sequences=[3, 0, 7, 1, 2, 5] * 40))


@low
@dims
def test_packed_and_continued(device, dtype, dim):
    check(many(device, dtype, dim=dim, sequences=[301, 0, 2, 131], lengths=[3, 259, 260, 0], return_state=True))


@low
@dims
@pytest.mark.parametrize("lengths", [[2063, 0, 1024, 5], [16 * 64 - 1, 16 * 64, 16 * 128 - 1, 16 * 128]], ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_continued(device, dtype, dim, lengths, tokens):
    """Cut inside a chunk or at its end, with gradients of the state that is returned; spare rows of the state are NaN."""
    case = many(device, dtype, batch=4, tokens=tokens, dim=dim, chunk_size=16, lengths=lengths, return_state=True)
    case.state = case.state.reserve(4000)
    assert case.state.chunk_k[:, :, 129:].isnan().all()
    check(case)


@low
@dims
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(device, dtype, dim, scale):
    check(many(device, dtype, dim=dim, scale=scale))


@low
@pytest.mark.parametrize("dim", [40, 64, pytest.param(128, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bare", [False, True], ids=["", "bare"])
@pytest.mark.parametrize(
    ("layout", "dy_layout"),
    [
        ("contiguous", "transposed"),
        ("odd", "odd"),
        ("contiguous", "odd"),
        ("transposed", "expanded_batch"),
        ("projection", "expanded_tokens"),
        ("contiguous", "expanded_heads"),
    ],
)
def test_strides(device, dtype, dim, bare, layout, dy_layout):
    """Bare, attention reads q and dy where they are: there is neither a rotated q nor a gated dy."""
    options = {"out_gate": False, "rotary": False} if bare else {}
    check(many(device, dtype, batch=2, dim=dim, layout=layout, dy_layout=dy_layout, **options))


@low
@dims
@pytest.mark.parametrize(("size", "mean"), [(0.0, 30.0), (0.0, -30.0), (30.0, 0.0)])
def test_extreme_gates(device, dtype, dim, size, mean):
    check(many(device, dtype, dim=dim, chunk_size=3, gate_size=size, gate_mean=mean, gate_bias=False))


@low
@dims
def test_states_that_any_recurrence_made(device, dtype, dim):
    check(many(device, dtype, op="chunk_attention", dim=dim))
    check(many(device, dtype, op="chunk_attention", dim=dim, sequences=PACKED, return_state=True))
