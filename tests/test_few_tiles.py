"""The forward recurrence of a call of few tiles has a kernel of its own: the same bits as in a call of many, on every path."""

import os

import pytest
import torch

import rat_ext
from rat_ext.testing import Random, name

pytestmark = pytest.mark.gpu

ROWS, HEADS, GROUPS = 160, 8, 2  # rows that have over 8 tiles for each multiprocessor together, and fewer alone


def recurrence(*arguments, **options):
    """The family of the forward recurrence that serves the call."""
    rows = rat_ext.explain(*arguments, **options)
    return next(row["family"] for row in rows if row["phase"] == "recurrence_fwd" and row["chosen"])


def inputs(device, dtype, tokens, dim, scale=1.0, seed=0):
    """q, k, v, gate, out_gate of ROWS rows, and what a call takes beside them."""
    random = Random(seed, device, dtype)
    counts = (GROUPS, GROUPS, HEADS, HEADS, HEADS)
    tensors = [random.normal(ROWS, tokens, count, dim) for count in counts]
    tensors[3] = tensors[3] * scale
    cos, sin = rat_ext.rotary_tables(tokens + 200, dim, device=device)
    bias = random.normal(HEADS, dim).float()
    return tensors, {"gate_bias": bias, "rotary_cos": cos, "rotary_sin": sin}


def call(tensors, chunk_size, **options):
    q, k, v, gate, out_gate = tensors
    return rat_ext.rat_attention(q, k, v, gate, chunk_size, out_gate=out_gate, **options)


def check_families(tensors, chunk_size, few):
    if os.environ.get("RAT_EXT_KERNELS", "auto") != "auto":
        return  # the bits are compared all the same
    assert recurrence(*tensors[:4], chunk_size) == "scan"
    assert recurrence(*(x[:1] for x in tensors[:4]), chunk_size) == few


def equal(got, want):
    """The same bits, in every tensor of a state."""
    assert got.dtype == want.dtype and got.shape == want.shape
    as_bits = torch.int16 if got.element_size() == 2 else torch.int32
    assert torch.equal(got.contiguous().view(as_bits), want.contiguous().view(as_bits))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name)
@pytest.mark.parametrize("dim", (8, 40, 64, 72, 128, 136, 256))
@pytest.mark.parametrize("chunk_size", (1, 3, 8, 16, 17))
def test_rows_alone(device, dtype, dim, chunk_size):
    tensors, options = inputs(device, dtype, 210, dim)
    check_families(tensors, chunk_size, "few" if chunk_size <= 16 else "scan")
    y, state = call(tensors, chunk_size, return_state=True, **options)
    for n in (0, 7, ROWS - 1):
        alone, its = call([x[n : n + 1] for x in tensors], chunk_size, return_state=True, **options)
        equal(alone, y[n : n + 1])
        closed = 210 // chunk_size
        for part in ("chunk_k", "chunk_v"):
            equal(getattr(its, part)[:, :, :closed], getattr(state, part)[n : n + 1, :, :closed])
        for part in ("running_k", "running_v"):
            equal(getattr(its, part), getattr(state, part)[n : n + 1])


@pytest.mark.parametrize("scale", (30.0, float("inf")))
def test_gates_at_their_ends(device, scale):
    tensors, options = inputs(device, torch.bfloat16, 210, 128, scale)
    tensors[3][torch.isnan(tensors[3])] = 0.0
    y = call(tensors, 16, **options)
    equal(call([x[3:4] for x in tensors], 16, **options), y[3:4])


def test_without_gates_and_tables(device):
    tensors, _ = inputs(device, torch.bfloat16, 210, 128)
    q, _, v, gate, out_gate = tensors
    y = rat_ext.chunk_attention(q, gate, v, 16, out_gate=out_gate)
    some = [x[5:6] for x in (q, gate, v)]
    equal(rat_ext.chunk_attention(*some, 16, out_gate=out_gate[5:6]), y[5:6])


@pytest.mark.parametrize("chunk_size", (5, 16))
@pytest.mark.parametrize("rollback", (0, 3, 40), ids="rollback_{}".format)
def test_pieces_of_a_pool(device, chunk_size, rollback):
    """All rows at once, and each in pieces that end anywhere: states in place, a ring of running states, skipped rows."""
    tokens = 210
    tensors, options = inputs(device, torch.bfloat16, tokens, 128)
    make = {"dtype": torch.bfloat16, "device": device, "draft_tokens": rollback}
    whole, pieces = (rat_ext.RATCache.empty(ROWS, HEADS, 128, chunk_size, tokens, **make) for _ in range(2))
    for cache in (whole, pieces):  # what nothing has written is seen by nobody
        for part in (cache.chunk_k, cache.chunk_v, cache.running_k, cache.running_v):
            part.fill_(float("nan"))
    y = call(tensors, chunk_size, cache=whole, **options)
    cuts = (0, 1, 18, 32, 33, 100, 164, tokens)
    for n in (2, ROWS - 1):
        slot = torch.tensor([n], device=device)
        for begin, end in zip(cuts, cuts[1:], strict=False):
            some = [x[n : n + 1, begin:end] for x in tensors]
            equal(call(some, chunk_size, cache=pieces, slots=slot, **options), y[n : n + 1, begin:end])
        skipped = call(
            [x[:1, :5] for x in tensors], chunk_size, cache=pieces, slots=torch.tensor([-1], device=device), **options
        )
        assert bool((skipped == 0).all())
    pieces.check()
    for n in (2, ROWS - 1):
        closed = tokens // chunk_size
        for part in ("chunk_k", "chunk_v"):
            equal(getattr(pieces, part)[n, :, :closed], getattr(whole, part)[n, :, :closed])
        slot = torch.tensor([n], device=device)
        for cache in (whole, pieces):
            cache.rollback(slot, rollback)
        step = [x[n : n + 1, 0] for x in tensors]
        got, want = (
            rat_ext.rat_decode_step(*step[:4], cache, out_gate=step[4], slots=slot, **options) for cache in (pieces, whole)
        )
        equal(got, want)


@pytest.mark.parametrize("pool", (False, True), ids=("alone", "in_a_pool"))
def test_captured_after_work_of_other_kinds(device, pool):
    """The kernels may start before earlier ones are through: copies, fills and other streams are waited for all the same."""
    tensors, options = inputs(device, torch.bfloat16, 210, 128)
    one = [x[:1] for x in tensors]
    want = call(one, 16, **options)
    cache = rat_ext.RATCache.empty(1, HEADS, 128, 16, 210, dtype=torch.bfloat16, device=device) if pool else None
    side = torch.cuda.Stream()
    held = [torch.empty_like(x) for x in one]

    def attend():
        if not pool:
            return call(held, 16, **options)
        cache.reset()
        return call(held, 16, cache=cache, **options)

    def run():
        for to in held:
            to.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for to, x in zip(held[:2], one[:2], strict=True):
                to.copy_(x)
        for to, x in zip(held[2:], one[2:], strict=True):
            to.copy_(x)
        torch.cuda.current_stream().wait_stream(side)
        first = attend()
        for to in held:
            to.zero_()  # the call before has read it
        for to, x in zip(held, one, strict=True):
            to.copy_(x)
        return first, attend()

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        for y in results:
            equal(y, want)
    for _ in range(20):
        for y in run():
            equal(y, want)
