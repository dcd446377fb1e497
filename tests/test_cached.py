"""The forward on a pool in place, operator rat_attention_cached: however rows are cut, mixed and placed, each token has the
bits of one forward over its whole sequence.
"""

import random as python_random

import pytest
import torch

import rat_ext
from rat_ext import reference
from rat_ext.cache import state_dtype
from rat_ext.testing import DTYPES, LOW, Random, compare, cu_seqlens_of, name, same_bits

HEADS, GROUPS = 4, 2
INPUTS = ("q", "k", "v", "gate", "out_gate")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
low = pytest.mark.parametrize("dtype", LOW, ids=name)
half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)


class Pool:
    """The tensors of a pool: ``sequences`` of up to ``rows`` chunks, in pages of ``page_rows`` where that is given."""

    def __init__(self, device, dtype, dim, rows, *, sequences=3, ring=1, page_rows=None, heads=HEADS, fp8=False):
        acc = state_dtype(dtype)
        self.device, self.dtype, self.ring = device, dtype, ring
        self.page_table = None
        states = (sequences, heads, rows, dim)
        if page_rows is not None:
            columns = rows // page_rows
            assert columns * page_rows == rows
            pages = sequences * columns + 2
            states = (pages, heads, page_rows, dim)
            order = torch.randperm(pages, generator=torch.Generator().manual_seed(5))[: sequences * columns]
            self.page_table = order.view(sequences, columns).to(device, torch.int32)
        nan = float("nan")
        kept = torch.float8_e4m3fn if fp8 else dtype
        self.chunk_k = torch.full(states, nan, device=device).to(kept)
        self.chunk_v = torch.full(states, nan, device=device).to(kept)
        self.scale_k = torch.full(states[:3], nan, device=device) if fp8 else None
        self.scale_v = torch.full(states[:3], nan, device=device) if fp8 else None
        running = (sequences, heads, dim) if ring == 1 else (sequences, ring, heads, dim)
        self.running_k = torch.full(running, nan, dtype=acc, device=device)
        self.running_v = torch.full(running, nan, dtype=acc, device=device)
        self.lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.error = torch.zeros(4, dtype=torch.int32, device=device)

    def tensors(self):
        return (self.chunk_k, self.chunk_v, self.running_k, self.running_v, self.lengths)

    def clone(self):
        copy = Pool.__new__(Pool)
        copy.__dict__ = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in self.__dict__.items()}
        return copy

    def chunks(self, slot, count):
        """The first ``count`` chunk states of a sequence: (2, H, count, D)."""
        both = torch.stack([self.chunk_k, self.chunk_v])
        if self.scale_k is not None:
            acc = state_dtype(self.dtype)
            both = both.to(acc) * torch.stack([self.scale_k, self.scale_v]).to(acc)[..., None]
        if self.page_table is not None:
            both = both[:, self.page_table[slot].long()].transpose(1, 2).flatten(2, 3)
        else:
            both = both[:, slot]
        return both[:, :, :count]

    def running(self, slot, position):
        """The running states after the token at ``position``: (2, H, D)."""
        both = torch.stack([self.running_k, self.running_v])[:, slot]
        return both if self.ring == 1 else both[:, position % self.ring]


def run(pool, x, options, chunk_size, slots=None, cu_seqlens=None, scale=None):
    """One call of the operator; ``x`` by name."""
    if slots is not None:
        slots = torch.as_tensor(slots, dtype=torch.int64, device=pool.device)
    return torch.ops.rat_ext.rat_attention_cached.default(
        *(x[key] for key in ("q", "k", "v", "gate")),
        options.get("gate_bias"),
        x.get("out_gate"),
        options.get("rotary_cos"),
        options.get("rotary_sin"),
        cu_seqlens,
        slots,
        pool.page_table,
        pool.chunk_k,
        pool.chunk_v,
        pool.scale_k,
        pool.scale_v,
        pool.running_k,
        pool.running_v,
        pool.lengths,
        pool.error,
        chunk_size,
        x["q"].shape[-1] ** -0.5 if scale is None else scale,
    )


def draw(random, batch, tokens, dim, heads=HEADS, groups=GROUPS):
    shapes = {key: (batch, tokens, groups if key in "qk" else heads, dim) for key in INPUTS}
    return {key: random.normal(*shape, size=1.5 if key == "gate" else 1.0) for key, shape in shapes.items()}


def extras(random, dim, rows, heads=HEADS):
    acc = state_dtype(random.dtype)
    cos, sin = rat_ext.rotary_tables(rows, dim, base=100.0, device=random.device, dtype=acc)
    return {"gate_bias": random.normal(heads, dim, dtype=acc), "rotary_cos": cos, "rotary_sin": sin}


def part(x, begin, end, n=slice(None)):
    return {key: t[n, begin:end] for key, t in x.items()}


def pack(pieces):
    """Rows of one batch entry each, one after the other: tensors (1, T, heads, D), cu_seqlens."""
    tensors = {key: torch.cat([piece[key] for piece in pieces], dim=1) for key in INPUTS}
    lengths = [piece["q"].shape[1] for piece in pieces]
    return tensors, cu_seqlens_of(lengths, tensors["q"].device)


def whole(x, options, chunk_size):
    with torch.no_grad():
        return rat_ext.rat_attention(**x, chunk_size=chunk_size, return_state=True, **options)


def cuts_of(chance, tokens, most):
    """Random ends of pieces, one token often."""
    ends, at = [], 0
    while at < tokens:
        at = min(tokens, at + (1 if chance.random() < 0.4 else chance.randint(1, most)))
        ends.append(at)
    return ends


def assert_state(pool, slot, state, n, tokens, chunk_size):
    """Sequence ``slot`` of the pool holds what sequence ``n`` of a returned state holds, bit for bit."""
    closed = tokens // chunk_size
    want = torch.stack([state.chunk_k[n], state.chunk_v[n]])[:, :, :closed]
    assert same_bits(pool.chunks(slot, closed), want), "chunk states"
    assert same_bits(pool.running(slot, tokens - 1), torch.stack([state.running_k[n], state.running_v[n]])), "running state"
    assert int(pool.lengths[slot]) == tokens


@dtypes
@pytest.mark.parametrize("dim", [8, 40, 64, 128, 192, 256])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64, 100])
def test_any_cut(device, dtype, dim, chunk_size):
    """Dense rows in pieces, all cut at the same places."""
    random, tokens = Random(1, device, dtype), 230
    rows = tokens // chunk_size + 2
    x, options = draw(random, 2, tokens, dim), extras(random, dim, rows)
    y, state = whole(x, options, chunk_size)
    pool = Pool(device, dtype, dim, rows)
    ends = cuts_of(python_random.Random(dim + chunk_size), tokens, 60)
    pieces = [run(pool, part(x, a, b), options, chunk_size, [2, 0]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert same_bits(torch.cat(pieces, dim=1), y)
    assert_state(pool, 2, state, 0, tokens, chunk_size)
    assert_state(pool, 0, state, 1, tokens, chunk_size)
    assert pool.lengths.tolist() == [tokens, 0, tokens] and pool.error.tolist() == [0] * 4


@low
@pytest.mark.parametrize("chunk_size", [150, 300])
def test_long_chunks(device, dtype, chunk_size):
    """Longer than what is scanned at once: on the CPU any cut, on a GPU cuts between chunks."""
    random, tokens, dim = Random(2, device, dtype), 700, 32
    x, options = draw(random, 1, tokens, dim), extras(random, dim, 8)
    y, state = whole(x, options, chunk_size)
    cuts = [1, 149, 150, 151, 400, 650] if device.type == "cpu" else [chunk_size, 2 * chunk_size]
    pool, ends = Pool(device, dtype, dim, 6, ring=2), [*cuts, tokens]
    pieces = [run(pool, part(x, a, b), options, chunk_size, [1]) for a, b in zip([0, *cuts], ends, strict=True)]
    assert same_bits(torch.cat(pieces, dim=1), y)
    assert_state(pool, 1, state, 0, tokens, chunk_size)


@low
@pytest.mark.parametrize("cut", [1, 70, 130, 299])
def test_long_chunks_cut_anywhere(device, dtype, cut):
    random, tokens, dim, chunk_size = Random(3, device, dtype), 400, 32, 300
    x, options = draw(random, 1, tokens, dim), extras(random, dim, 8)
    pool = Pool(device, dtype, dim, 4)
    y = torch.cat([run(pool, part(x, a, b), options, chunk_size, [0]) for a, b in ((0, cut), (cut, tokens))], dim=1)
    assert_near(y, x, options, chunk_size)


def assert_near(y, x, options, chunk_size):
    """The rule of the tests: at most twice as far from float64 as the definition in this dtype."""

    def double(tensors):
        return {key: t.double() for key, t in tensors.items()}

    exact = reference.rat_attention(**double(x), chunk_size=chunk_size, **double(options))
    compare({"y": y}, {"y": reference.rat_attention(**x, chunk_size=chunk_size, **options)}, {"y": exact}, y.dtype)


@dtypes
def test_against_float64(device, dtype):
    random, tokens, dim = Random(4, device, dtype), 90, 32
    x, options = draw(random, 3, tokens, dim), extras(random, dim, 30)
    pool = Pool(device, dtype, dim, 30)
    y = torch.cat([run(pool, part(x, a, b), options, 4, [1, 2, 0]) for a, b in ((0, 33), (33, 34), (34, tokens))], dim=1)
    assert_near(y, x, options, 4)


@dtypes
@pytest.mark.parametrize("ring, page_rows", [(1, None), (4, None), (1, 8), (3, 16)])
def test_mixed_batches(device, dtype, ring, page_rows):
    """Packed rows of none to many tokens, in any order and company, skipped ones among them."""
    random, chance = Random(5, device, dtype), python_random.Random(6)
    dim, chunk_size, sequences = 64, 4, 6
    totals = [chance.randint(1, 150) for _ in range(sequences)]
    options = extras(random, dim, 48)
    xs = [draw(random, 1, total, dim) for total in totals]
    wholes = [whole(x, options, chunk_size) for x in xs]
    slots = chance.sample(range(8), sequences)
    pool = Pool(device, dtype, dim, 48, sequences=8, ring=ring, page_rows=page_rows)
    done = [0] * sequences
    junk = draw(random, 1, 7, dim)
    while any(a < b for a, b in zip(done, totals, strict=True)):
        named, pieces, spans = [], [], []
        for i in chance.sample(range(sequences), sequences):
            count = min(totals[i] - done[i], chance.choice([0, 1, 1, 2, 5, 40]))
            named.append(slots[i])
            pieces.append(part(xs[i], done[i], done[i] + count))
            spans.append((i, done[i], done[i] + count))
            if chance.random() < 0.3:
                named.append(-1)
                pieces.append(part(junk, 0, chance.randint(0, 7)))
                spans.append(None)
        tensors, cu = pack(pieces)
        y = run(pool, tensors, options, chunk_size, named, cu)
        for row, span in enumerate(spans):
            got = y[:, int(cu[row]) : int(cu[row + 1])]
            if span is None:
                assert not got.any() and not got.isnan().any()
            else:
                i, begin, end = span
                assert same_bits(got, wholes[i][0][:, begin:end]), f"tokens {begin} to {end} of {totals[i]}"
                done[i] = end
    for i, slot in enumerate(slots):
        assert_state(pool, slot, wholes[i][1], 0, totals[i], chunk_size)
    assert pool.error.tolist() == [0] * 4
    assert all(int(pool.lengths[slot]) == 0 for slot in range(8) if slot not in slots)


@half
@pytest.mark.parametrize("dim, tokens", [(64, 1300), (128, 4400)])
def test_many_keys(device, dtype, dim, tokens):
    """Queries on both sides of where a GPU's kernels change their blocks, in a pool that has far more room."""
    random = Random(7, device, dtype)
    x, options = draw(random, 1, tokens, dim, 2, 1), extras(random, dim, tokens + 600, 2)
    y, state = whole(x, options, 1)
    pool = Pool(device, dtype, dim, tokens + 600, sequences=2, heads=2)
    ends = [300, 301, tokens - 300, tokens - 299, tokens]
    pieces = [run(pool, part(x, a, b), options, 1, [1]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert same_bits(torch.cat(pieces, dim=1), y)
    assert_state(pool, 1, state, 0, tokens, 1)
    short = whole(part(x, 0, 100), options, 1)[0]
    assert same_bits(short, y[:, :100]), "a forward of fewer tokens"


@low
def test_fewer_tokens_than_a_chunk(device, dtype):
    """A forward without any chunk state, and the same in a pool that has room for many."""
    random = Random(8, device, dtype)
    x, options = draw(random, 2, 10, 64), extras(random, 64, 20)
    y = whole(x, options, 16)[0]
    for rows in (0, 20):
        pool = Pool(device, dtype, 64, rows, sequences=2)
        assert same_bits(torch.cat([run(pool, part(x, a, b), options, 16) for a, b in ((0, 3), (3, 10))], dim=1), y)


@low
@pytest.mark.parametrize("layout", ["projection", "odd"])
def test_layouts(device, dtype, layout):
    random = Random(9, device, dtype)
    x = rat_ext.testing.lay_out_all(draw(random, 1, 60, 64), layout)
    options = extras(random, 64, 20)
    y = whole(x, options, 4)[0]
    pool = Pool(device, dtype, 64, 16)
    pieces = [run(pool, part(x, a, b), options, 4, [2]) for a, b in ((0, 17), (17, 18), (18, 60))]
    assert same_bits(torch.cat(pieces, dim=1), y)


@low
@pytest.mark.parametrize("bare", [True, False])
def test_optional_arguments(device, dtype, bare):
    random = Random(10, device, dtype)
    x, options = draw(random, 1, 50, 32), extras(random, 32, 13)
    if bare:
        del x["out_gate"]
        options = {}
    y = whole(x, options | {"scale": -0.3}, 4)[0]
    pool = Pool(device, dtype, 32, 12)
    pieces = [run(pool, part(x, a, b), options, 4, scale=-0.3) for a, b in ((0, 20), (20, 50))]
    assert same_bits(torch.cat(pieces, dim=1), y)


@low
@pytest.mark.parametrize("chunk_size", [1, 6, 16, 90])
@pytest.mark.parametrize("ring", [2, 5, 40])
def test_ring(device, dtype, ring, chunk_size):
    """Each of the last R running states has its place; taking tokens back is a smaller length, as if they had never been."""
    random, tokens, dim = Random(11, device, dtype), 120, 32
    x, options = draw(random, 1, tokens, dim), extras(random, dim, 130)
    y, _ = whole(x, options, chunk_size)
    pool = Pool(device, dtype, dim, tokens, ring=ring)
    wrong = {key: t.flip(1) for key, t in x.items()}
    chance, at = python_random.Random(ring), 0
    while at < tokens:
        draft = min(chance.randint(1, ring - 1), tokens - at)
        run(pool, part(wrong, at, at + draft), options, chunk_size, [1])
        pool.lengths[1] -= draft
        end = min(tokens, at + chance.choice([1, 2, 33]))
        got = run(pool, part(x, at, end), options, chunk_size, [1])
        assert same_bits(got, y[:, at:end])
        for t in range(max(0, end - ring), end):
            if t >= at:
                state = whole(part(x, 0, t + 1), options, chunk_size)[1]
                assert same_bits(pool.running(1, t), torch.stack([state.running_k[0], state.running_v[0]])), t
        at = end


@low
def test_shared_pages(device, dtype):
    """Sequences that share the pages of a common start: none is written but the page of the chunk that closes."""
    random, dim, chunk_size = Random(12, device, dtype), 64, 4
    common, tails = draw(random, 1, 64, dim), draw(random, 2, 40, dim)
    options = extras(random, dim, 40)
    pool = Pool(device, dtype, dim, 32, page_rows=8)
    run(pool, common, options, chunk_size, [0])
    pool.page_table[1, :2] = pool.page_table[0, :2]
    pool.running_k[1], pool.running_v[1], pool.lengths[1] = pool.running_k[0], pool.running_v[0], 64
    y = run(pool, tails, options, chunk_size, [0, 1])
    for n in range(2):
        joined = {key: torch.cat([common[key], tails[key][n : n + 1]], dim=1) for key in INPUTS}
        want, state = whole(joined, options, chunk_size)
        assert same_bits(y[n : n + 1], want[:, 64:])
        assert_state(pool, n, state, 0, 104, chunk_size)


# ---- e4m3 states ----------------------------------------------------------------------------------------------------------


def quantise(x):
    """What a state (..., D) becomes: e4m3 times the least power of two that brings its largest element to 448."""
    amax = x.double().abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
    return ((x.double() / scale).float().to(torch.float8_e4m3fn).double() * scale).to(x.dtype)


@dtypes
@pytest.mark.parametrize("page_rows", [None, 8])
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_e4m3(device, dtype, dim, page_rows):
    """States are those of a pool in float, quantised as they close, and tokens attend to what is kept of them."""
    random, tokens, chunk_size = Random(20, device, dtype), 70, 4
    x, options = draw(random, 2, tokens + 9, dim), extras(random, dim, 24)
    pool = Pool(device, dtype, dim, 24, fp8=True, page_rows=page_rows, ring=3)
    plain = Pool(device, dtype, dim, 24, ring=3)
    run(pool, part(x, 0, tokens), options, chunk_size, [2, 1])
    run(plain, part(x, 0, tokens), options, chunk_size, [2, 1])
    closed = tokens // chunk_size
    for slot in (1, 2):
        kept, want = pool.chunks(slot, closed), plain.chunks(slot, closed)
        if dtype in (torch.float32, torch.float64):
            assert same_bits(kept, quantise(want))
        else:  # rounded once, from float32
            assert (
                (kept - want.float()).abs() <= want.float().abs() / 15 + want.float().abs().amax(-1, keepdim=True) / 1e5
            ).all()
        assert same_bits(pool.running(slot, tokens - 1), plain.running(slot, tokens - 1))
        plain.chunk_k[slot, :, :closed], plain.chunk_v[slot, :, :closed] = kept.to(dtype)
    at = tokens
    for end in (tokens + 1, tokens + 2):  # up to the end of a chunk
        got, want = (run(p, part(x, at, end), options, chunk_size, [2, 1]) for p in (pool, plain))
        assert same_bits(got, want)
        at = end


@dtypes
@pytest.mark.parametrize("page_rows", [None, 16])
def test_e4m3_in_any_cut(device, dtype, page_rows):
    random, tokens, dim = Random(21, device, dtype), 150, 64
    x, options = draw(random, 2, tokens, dim), extras(random, dim, 40)
    pools = [Pool(device, dtype, dim, 48, fp8=True, page_rows=page_rows) for _ in range(2)]
    y = run(pools[0], x, options, 4, [0, 2])
    ends = cuts_of(python_random.Random(3), tokens, 50)
    pieces = [run(pools[1], part(x, a, b), options, 4, [0, 2]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert same_bits(torch.cat(pieces, dim=1), y)
    for slot in (0, 2):
        assert same_bits(pools[0].chunks(slot, 37), pools[1].chunks(slot, 37))


@low
def test_e4m3_skips_rows(device, dtype):
    random, dim = Random(22, device, dtype), 64
    x, options = draw(random, 2, 20, dim), extras(random, dim, 40)
    pool = Pool(device, dtype, dim, 8, fp8=True)
    before = pool.clone()
    y = run(pool, x, options, 4, [-1, 1])
    assert not y[0].any() and y[1].isfinite().all() and pool.lengths.tolist() == [0, 20, 0]
    assert same_bits(pool.chunk_k[0], before.chunk_k[0]) and same_bits(pool.scale_v[2], before.scale_v[2])


# ---- errors: a GPU skips the row and leaves a word, the CPU throws before anything is written ------------------------------

ERRORS = {
    "slot": ([0, 3], {}, (1, 1, 3, 0), r"rat_attention_cached: slots\[1\]: expected less than the cache's 3 entries, got 3"),
    "full": ([0, 1], {"lengths": {1: 30}}, (2, 1, 1, 30), r"cache\.lengths\[1\]: expected room for 6 more tokens .*cache full"),
    "twice": ([1, 1], {}, (3, 1, 1, 0), r"slots\[1\]: expected an entry that no other row names, got 1"),
    "rotary": ([0, 1], {"lengths": {1: 15}, "tables": 5}, (4, 1, 1, 5), r"rotary_cos: expected at least 6 rows"),
    "negative": ([0, 1], {"lengths": {1: -2}}, (5, 1, 1, -2), r"cache\.lengths\[1\]: expected 0 or more, got -2"),
    "page": ([0, 1], {"page": 1}, (2, 1, 1, 0), r"cache\.page_table\[1, 0\]: .*cache full"),
    "no such page": ([0, 1], {"page": 99}, (2, 1, 1, 0), r"cache\.page_table\[1, 0\]: .*cache full"),
}


@low
@pytest.mark.parametrize("error", ERRORS)
def test_a_row_with_an_error(device, dtype, error):
    slots, change, word, message = ERRORS[error]
    random, dim = Random(13, device, dtype), 32
    x, options = draw(random, 2, 6, dim), extras(random, dim, change.get("tables", 20))
    good = whole(part(x, 0, 6, slice(0, 1)), options, 4)[0]
    page_rows = 8 if "page" in change else None
    pool = Pool(device, dtype, dim, 8, page_rows=page_rows, ring=2)
    for slot, length in change.get("lengths", {}).items():
        pool.lengths[slot] = length
    if "page" in change:
        pool.page_table[1, 0] = -1 if change["page"] == 1 else 99
    before = pool.clone()
    if device.type == "cpu":
        with pytest.raises(ValueError, match=message):
            run(pool, x, options, 4, slots)
        assert all(same_bits(a, b) for a, b in zip(pool.tensors(), before.tensors(), strict=True))
        return
    y = run(pool, x, options, 4, slots)
    assert tuple(pool.error.tolist()) == word
    assert same_bits(y[:1], good) and not y[1].any() and not y[1].isnan().any()
    if slots[1] < 3 and slots[1] != slots[0]:
        for a, b in zip(pool.tensors()[2:], before.tensors()[2:], strict=True):
            assert same_bits(a[slots[1]], b[slots[1]])
        if page_rows is None:
            assert same_bits(pool.chunks(1, 8), before.chunks(1, 8))
    assert int(pool.lengths[slots[0]]) == 6
    # The word stays, a later legal call is right.
    y = run(pool, x, options, 4, [-1, 2])
    assert tuple(pool.error.tolist()) == word and int(pool.lengths[2]) == 6
    assert same_bits(y[1:], whole(part(x, 0, 6, slice(1, 2)), options, 4)[0]) and not y[0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("page_rows", [None, 8])
def test_entries_named_twice_in_many_rows(device, page_rows):
    """Wherever the rows are, and where they bring no tokens too: the first is served alone. A graph may be replayed."""
    random, dim, count, sequences = Random(24, device, torch.float32), 8, 1100, 9000
    chance = torch.Generator().manual_seed(4)
    order = torch.randperm(sequences, generator=chance)[:count]
    assert (order >= 8192).sum() > 50
    lengths = torch.randint(0, 4, (count,), generator=chance)
    slots, firsts = order.clone(), order.clone()
    pairs = ((1, 0), (33, 32), (40, 3), (700, 699), (1025, 1), (1099, 40))
    for row, first in pairs:
        slots[row], firsts[row] = slots[first], -1
    slots[500], firsts[500], slots[501], firsts[501] = sequences, -1, -1, -1
    lengths[0], lengths[40] = 0, 0
    x, options = draw(random, 1, int(lengths.sum()), dim, 1, 1), extras(random, dim, 10, 1)
    cu = cu_seqlens_of(lengths.tolist(), device)
    pool = Pool(device, torch.float32, dim, 8, sequences=sequences, heads=1, page_rows=page_rows)
    expected, static = pool.clone(), torch.full((count,), -1, device=device)
    run(pool, x, options, 4, static, cu)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(pool, x, options, 4, static, cu)
    for named, served in ((slots, firsts), (slots, firsts), (firsts, firsts)):
        static.copy_(named)
        graph.replay()
        assert same_bits(y, run(expected, x, options, 4, served, cu))
        assert torch.equal(pool.lengths, expected.lengths)
        code, row, slot, _ = pool.error.tolist()
        if named is firsts:
            assert code == 0
        else:
            assert (code, row) == (1, 500) or (code == 3 and row in dict(pairs) and slot == slots[row])
        pool.error.zero_()
    assert not expected.error.any() and pool.lengths.any()


@low
@pytest.mark.parametrize("offsets", [[0, 4, 3, 12], [1, 4, 8, 12], [0, 4, 8, 11], [0, -1, 8, 12]], ids=str)
def test_bad_offsets(device, dtype, offsets):
    random, dim = Random(14, device, dtype), 32
    x, options = draw(random, 1, 12, dim), extras(random, dim, 20)
    pool = Pool(device, dtype, dim, 8)
    before = pool.clone()
    cu = torch.tensor(offsets, dtype=torch.int32, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens"):
            run(pool, x, options, 4, [0, 1, 2], cu)
    else:
        y = run(pool, x, options, 4, [0, 1, 2], cu)
        assert int(pool.error[0]) == 6
        assert not y.any() and not y.isnan().any()
    assert all(same_bits(a, b) for a, b in zip(pool.tensors(), before.tensors(), strict=True))


def test_full_to_the_last_token(device):
    """The chunk after the last row fills up but for one token; a call of no tokens changes nothing and is no error."""
    random = Random(15, device, torch.float32)
    x, options = draw(random, 1, 12, 32), extras(random, 32, 20)
    pool = Pool(device, torch.float32, 32, 2)
    y = whole(part(x, 0, 11), options, 4)[0]
    assert same_bits(run(pool, part(x, 0, 11), options, 4, [0]), y)
    before = pool.clone()
    assert run(pool, part(x, 0, 0), options, 4, [0]).shape == (1, 0, HEADS, 32)
    assert all(same_bits(a, b) for a, b in zip(pool.tensors(), before.tensors(), strict=True))
    assert pool.error.tolist() == [0] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"error": torch.zeros(3, dtype=torch.int32)}, r"cache\.error: expected shape \(4\)"),
        ({"lengths": torch.zeros(3)}, r"cache\.lengths: expected dtype int32"),
        ({"running_v": torch.zeros(3, 2, HEADS, 32)}, r"cache\.running_v: expected shape \(3, 4, 32\)"),
        ({"chunk_k": torch.zeros(3, HEADS, 7, 32)}, r"cache\.chunk_v: expected shape \(3, 4, 7, 32\)"),
    ],
)
def test_wrong_tensors(device, change, message):
    random = Random(16, device, torch.float32)
    pool = Pool(device, torch.float32, 32, 8)
    for key, x in change.items():
        setattr(pool, key, x.to(device))
    with pytest.raises(ValueError, match=message):
        run(pool, draw(random, 1, 4, 32), {}, 4, [0])


def test_tracing(device):
    """The operator's shape rule, and that it says what it writes."""
    random = Random(17, device, torch.float32)
    pool = Pool(device, torch.float32, 32, 8)
    x, options = draw(random, 2, 6, 32), extras(random, 32, 20)
    run(pool, x, options, 4, [0, 1])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return run(pool, x, options, 4, torch.tensor([0, 1], device=device)) + 1

    eager = pool.clone()
    want = run(eager, x, options, 4, [0, 1]) + 1
    assert same_bits(step(x), want)
    assert all(same_bits(a, b) for a, b in zip(pool.tensors(), eager.tensors(), strict=True))


@pytest.mark.gpu
@low
def test_graph(device, dtype):
    """One captured call, replayed for other lengths, slots and offsets: the host takes no part."""
    random, dim, chunk_size = Random(18, device, dtype), 64, 4
    options = extras(random, dim, 200)
    pool, eager = (Pool(device, dtype, dim, 160, sequences=4, ring=3) for _ in range(2))
    calls = []
    for lengths, slots in (
        [[30, 1, 9], [2, 0, 1]],
        [[1, 38, 1], [0, 2, -1]],
        [[0, 1, 39], [3, 1, 2]],
        [[13, 13, 14], [1, 0, 0]],
    ):
        calls.append((draw(random, 1, 40, dim), cu_seqlens_of(lengths, device), torch.tensor(slots, device=device)))
    static = [{key: t.clone() for key, t in calls[0][0].items()}, calls[0][1].clone(), calls[0][2].clone()]
    run(pool.clone(), static[0], options, chunk_size, static[2], static[1])  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(pool, static[0], options, chunk_size, static[2], static[1])
    for x, cu, slots in calls:
        for key, t in x.items():
            static[0][key].copy_(t)
        static[1].copy_(cu)
        static[2].copy_(slots)
        graph.replay()
        want = run(eager, x, options, chunk_size, slots, cu)
        assert same_bits(y, want)
    for a, b in zip(pool.tensors(), eager.tensors(), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert pool.error.tolist() == eager.error.tolist() == [3, 2, 0, 0]


@pytest.mark.gpu
def test_a_batch_that_fills_the_chip(device):
    """Tiles of one warpgroup and of several: the same bits for a token."""
    random, dim = Random(19, device, torch.bfloat16), 128
    x, options = draw(random, 24, 200, dim, 16, 2), extras(random, dim, 60, 16)
    y = whole(x, options, 4)[0]
    for n in (0, 23):
        pool = Pool(device, torch.bfloat16, dim, 60, sequences=1, heads=16)
        one = part(x, 0, 200, slice(n, n + 1))
        pieces = [run(pool, part(one, a, b), options, 4) for a, b in ((0, 150), (150, 200))]
        assert same_bits(torch.cat(pieces, dim=1), y[n : n + 1])
        assert same_bits(whole(one, options, 4)[0], y[n : n + 1])


@pytest.mark.gpu
@half
@pytest.mark.parametrize("dim, tokens, heads", [(64, 640, 8), (128, 640, 8), (64, 1300, 4), (128, 4400, 1)])
def test_warpgroups_that_share_a_tile(device, dtype, dim, tokens, heads):
    """Of a few tiles, more, and enough to fill the chip, which are three kernels, a token has the same bits. Queries are large:
    the maximum is raised on the way, and what was summed before shrinks.
    """
    random = Random(20, device, dtype)
    x, options = draw(random, 30, tokens, dim, heads, 1), extras(random, dim, tokens, heads)
    x["q"] *= 6
    y = whole(x, options, 1)[0]
    assert same_bits(whole(part(x, 0, tokens, slice(7, 9)), options, 1)[0], y[7:9])
    one = part(x, 0, tokens, slice(29, 30))
    assert same_bits(whole(one, options, 1)[0], y[29:])
    pool = Pool(device, dtype, dim, tokens, sequences=1, heads=heads)
    ends = [*range(150, tokens, 150), tokens - 1, tokens]
    pieces = [run(pool, part(one, a, b), options, 1) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert same_bits(torch.cat(pieces, dim=1), y[29:])
