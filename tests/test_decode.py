"""rat_decode_step and RATCache: token by token equals the forward; slots, ragged lengths, a cache that fills up."""

import pytest
import torch

import rat_ext
from rat_ext import RATCache, reference
from rat_ext.cache import state_dtype
from rat_ext.testing import DTYPES, LOW, STATE, Random, compare, make_state, name, same_bits, valid_rows

low = pytest.mark.parametrize("dtype", LOW, ids=name)


def inputs(random: Random, batch: int, tokens: int, heads: int, groups: int, dim: int, size: float = 1.5):
    wide, narrow = (batch, tokens, heads, dim), (batch, tokens, groups, dim)
    return {
        "q": random.normal(*narrow),
        "k": random.normal(*narrow),
        "v": random.normal(*wide),
        "gate": random.normal(*wide, size=size),
        "out_gate": random.normal(*wide),
    }


def extras(random: Random, heads: int, dim: int, rows: int) -> dict:
    acc = state_dtype(random.dtype)
    cos, sin = rat_ext.rotary_tables(rows, dim, base=100.0, device=random.device, dtype=acc)
    return {"gate_bias": random.normal(heads, dim, dtype=acc), "rotary_cos": cos, "rotary_sin": sin}


def token(tensors: dict, t: int) -> dict:
    return {key: x[:, t] for key, x in tensors.items()}


def double(tensors: dict) -> dict:
    return {key: x.double() if x is not None and x.is_floating_point() else x for key, x in tensors.items()}


def double_all(options: dict) -> dict:
    """Tensors in float64, numbers as they are."""
    return {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in options.items()}


def double_state(state: RATCache) -> RATCache:
    wide = state.clone()
    for key in STATE:
        setattr(wide, key, getattr(wide, key).double())
    return wide


def contents(state: RATCache) -> dict:
    valid = valid_rows(state)
    values = {key: getattr(state, key) for key in STATE} | {"lengths": state.lengths}
    for key in ("chunk_k", "chunk_v"):
        values[key] = values[key].masked_fill(~valid, 0)
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize("prefill", [0, 13])
def test_equals_the_forward(device, dtype, chunk_size, prefill):
    """Prefill, then token by token across chunk boundaries, against one float64 forward over all tokens."""
    random = Random(0, device, dtype)
    tokens = 30
    x, options = inputs(random, 2, tokens, 4, 2, 32), extras(random, 4, 32, tokens)
    exact = reference.rat_attention(**double(x), chunk_size=chunk_size, **double(options))
    eager = reference.rat_attention(**x, chunk_size=chunk_size, **options)
    if prefill:
        first = {key: t[:, :prefill] for key, t in x.items()}
        y, cache = rat_ext.rat_attention(**first, chunk_size=chunk_size, return_state=True, **options)
        cache = cache.reserve(tokens)
        ys = [y]
    else:
        cache, ys = RATCache.empty(2, 4, 32, chunk_size, tokens, dtype=dtype, device=device), []
    for t in range(prefill, tokens):
        ys.append(rat_ext.rat_decode_step(**token(x, t), cache=cache, **options)[:, None])
    compare({"y": torch.cat(ys, dim=1)}, {"y": eager}, {"y": exact}, dtype)
    assert cache.lengths.tolist() == [tokens, tokens]


@low
@pytest.mark.parametrize(("heads", "groups", "dim"), [(1, 1, 8), (4, 4, 24), (6, 3, 64), (8, 1, 96), (4, 2, 128), (2, 1, 256)])
def test_one_step(device, dtype, heads, groups, dim):
    """Ragged lengths; y, states and lengths after one step against float64."""
    lengths, chunk_size = [0, 5, 15, 16, 40], 8
    random = Random(1, device, dtype)
    cache = make_state(random, lengths, heads, dim, chunk_size, rows=7)
    x = token(inputs(random, 5, 1, heads, groups, dim), 0)
    options = extras(random, heads, dim, 8)
    wide, narrow = double_state(cache), cache.clone()
    exact = {"y": reference.rat_decode_step(**double(x), cache=wide, **double(options))}
    eager = {"y": reference.rat_decode_step(**x, cache=narrow, **options)}
    actual = {"y": rat_ext.rat_decode_step(**x, cache=cache, **options)}
    compare(actual | contents(cache), eager | contents(narrow), exact | contents(wide), dtype)
    assert cache.lengths.tolist() == [1, 6, 16, 17, 41]


@low
@pytest.mark.parametrize("bare", [False, True])
def test_many_chunks(device, dtype, bare):
    """Enough chunk states that several blocks share a sequence; one sequence has none."""
    random = Random(2, device, dtype)
    cache = make_state(random, [3000, 0, 777, 2999], 2, 64, 4, rows=760)
    x = token(inputs(random, 4, 1, 2, 1, 64), 0)
    options = {} if bare else extras(random, 2, 64, 760)
    if bare:
        del x["out_gate"]
    wide, narrow = double_state(cache), cache.clone()
    exact = {"y": reference.rat_decode_step(**double(x), cache=wide, **double(options))}
    eager = {"y": reference.rat_decode_step(**x, cache=narrow, **options)}
    for _ in range(2):  # the second run finds the workspace as the first left it
        mine = cache.clone()
        mine.workspace = cache.workspace
        actual = {"y": rat_ext.rat_decode_step(**x, cache=mine, **options)}
        cache.workspace = mine.workspace
        compare(actual | contents(mine), eager | contents(narrow), exact | contents(wide), dtype)


@low
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 3.0])
@pytest.mark.parametrize("chunks", [5, 900], ids=["few", "many"])
def test_scale(device, dtype, scale, chunks):
    """A scale that is not the default, through the own state and the chunk states."""
    random = Random(12, device, dtype)
    cache = make_state(random, [4 * chunks - 2, 4 * chunks - 1, 3], 4, 32, 4, rows=chunks)
    x = token(inputs(random, 3, 1, 4, 2, 32), 0)
    options = extras(random, 4, 32, chunks) | {"scale": scale}
    wide, narrow = double_state(cache), cache.clone()
    exact = {"y": reference.rat_decode_step(**double(x), cache=wide, **double_all(options))}
    eager = {"y": reference.rat_decode_step(**x, cache=narrow, **options)}
    actual = {"y": rat_ext.rat_decode_step(**x, cache=cache, **options)}
    compare(actual | contents(cache), eager | contents(narrow), exact | contents(wide), dtype)


@low
@pytest.mark.parametrize("dim", [8, 16, 40, 56, 64, 72, 120, 128, 136, 200, 248, 256])
def test_head_size(device, dtype, dim):
    """Chunks that close, with rotation: D / 2 is a multiple of 4 and not always of 8."""
    random = Random(13, device, dtype)
    cache = make_state(random, [7, 15, 30], 3, dim, 8, rows=5)
    x = token(inputs(random, 3, 1, 3, 1, dim), 0)
    options = extras(random, 3, dim, 6)
    wide, narrow = double_state(cache), cache.clone()
    exact = {"y": reference.rat_decode_step(**double(x), cache=wide, **double(options))}
    eager = {"y": reference.rat_decode_step(**x, cache=narrow, **options)}
    actual = {"y": rat_ext.rat_decode_step(**x, cache=cache, **options)}
    compare(actual | contents(cache), eager | contents(narrow), exact | contents(wide), dtype)


@low
@pytest.mark.parametrize("chunks", [15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 1025])
def test_number_of_chunks(device, dtype, chunks):
    """Around the runs of keys that one block, group or split takes. One dominant key, at an end or in the middle."""
    random = Random(chunks, device, dtype)
    at = [0, chunks - 1, chunks // 2, chunks - 1]
    cache = make_state(random, [2 * chunks] * 4, 2, 32, 2, rows=chunks + 1)
    x = token(inputs(random, 4, 1, 2, 1, 32), 0)
    for n, key in enumerate(at):
        cache.chunk_k[n, :, key] = 3 * x["q"][n]
    wide, narrow = double_state(cache), cache.clone()
    exact = {"y": reference.rat_decode_step(**double(x), cache=wide)}
    eager = {"y": reference.rat_decode_step(**x, cache=narrow)}
    actual = {"y": rat_ext.rat_decode_step(**x, cache=cache)}
    compare(actual | contents(cache), eager | contents(narrow), exact | contents(wide), dtype)


@low
def test_strides(device, dtype):
    """The token's tensors as views of one projection, and of a (B, T, ...) tensor."""
    random = Random(3, device, dtype)
    projection = random.normal(3, 16, 32)
    q, k, v, gate, out_gate = projection.split([2, 2, 4, 4, 4], dim=1)
    x = {"q": q, "k": k, "v": v, "gate": gate, "out_gate": out_gate}
    odd = torch.full((3, 16, 35), float("nan"), dtype=dtype, device=device)
    odd[..., 1:33] = projection
    shifted = dict(zip(x, odd[..., 1:33].split([2, 2, 4, 4, 4], dim=1), strict=True))
    cache = make_state(random, [0, 5, 40], 4, 32, 8, rows=6)
    dense = {key: t.contiguous() for key, t in x.items()}
    results = []
    for tensors in (dense, x, shifted):
        mine = cache.clone()
        results.append({"y": rat_ext.rat_decode_step(**tensors, cache=mine)} | contents(mine))
    for other in results[1:]:
        compare(other, results[0], results[0], dtype)


@low
def test_slots(device, dtype):
    """A pool larger than the batch, entries in any order, -1 skips: y is 0 there and no other entry changes a bit."""
    random = Random(4, device, dtype)
    pool = make_state(random, [0, 5, 15, 16, 40, 7, 23], 4, 32, 8, rows=7)
    x = token(inputs(random, 4, 1, 4, 2, 32), 0)
    slots = torch.tensor([4, -1, 0, 2], device=device)
    before, expected = pool.clone(), pool.clone()
    y = rat_ext.rat_decode_step(**x, cache=pool, slots=slots)
    assert not y[1].any()
    assert pool.lengths.tolist() == [1, 5, 16, 16, 41, 7, 23]
    for entry in (1, 3, 5, 6):
        for key in STATE:
            assert same_bits(getattr(pool, key)[entry], getattr(before, key)[entry]), (key, entry)
    # Rows that are in use change no more than the one chunk that closed.
    assert same_bits(pool.chunk_k[2, :, 2:], before.chunk_k[2, :, 2:])
    assert same_bits(pool.chunk_k[2, :, :1], before.chunk_k[2, :, :1])
    for row, entry in ((0, 4), (2, 0), (3, 2)):
        one = expected.read(torch.tensor([entry], device=device))
        alone = rat_ext.rat_decode_step(**{key: t[row : row + 1] for key, t in x.items()}, cache=one)
        torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-5, atol=1e-6)
        got = pool.read(torch.tensor([entry], device=device))
        for key, value in contents(one).items():
            torch.testing.assert_close(contents(got)[key], value, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("slots", [[-1, -1], []], ids=str)
def test_nothing_to_do(device, slots):
    random = Random(5, device, torch.float32)
    cache = make_state(random, [3, 9], 4, 16, 8)
    before = cache.clone()
    x = token(inputs(random, len(slots), 1, 4, 2, 16), 0)
    y = rat_ext.rat_decode_step(**x, cache=cache, slots=torch.tensor(slots, dtype=torch.int64, device=device))
    assert y.shape == (len(slots), 4, 16) and not y.any()
    for key in (*STATE, "lengths"):
        assert same_bits(getattr(cache, key), getattr(before, key))


def long_pool(random: Random) -> RATCache:
    """Sequences that several blocks of a GPU, and several tasks of a CPU, share."""
    return make_state(random, [3000, 0, 777, 2999, 1503], 2, 64, 4, rows=760)


def test_one_entry_named_twice(device):
    """The first row that names it is served. A CPU refuses the call before anything is written."""
    random = Random(12, device, torch.float32)
    pool = long_pool(random)
    expected = pool.clone()
    options = extras(random, 2, 64, 760)
    for slots in ([3, 3, 0], [4, 2, 4], [3, 3, 3]):
        x = token(inputs(random, 3, 1, 2, 1, 64), 0)
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"slots\[[12]\]: expected an entry that no other row names"):
                rat_ext.rat_decode_step(**x, cache=pool, slots=torch.tensor(slots, device=device), **options)
            continue
        firsts = [slot if slot not in slots[:row] else -1 for row, slot in enumerate(slots)]
        y = rat_ext.rat_decode_step(**x, cache=pool, slots=torch.tensor(slots, device=device), **options)
        wanted = rat_ext.rat_decode_step(**x, cache=expected, slots=torch.tensor(firsts, device=device), **options)
        assert same_bits(y, wanted) and not pool.workspace.any()
        code, row, slot, _ = pool.error.tolist()
        assert code == 3 and slots[row] == slot and slot in slots[:row]
        pool.error.zero_()
    for key, value in contents(expected).items():
        assert same_bits(contents(pool)[key], value), key


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("row", [31, 32, 33, 543, 544, 545, 1199])
def test_one_entry_named_twice_in_many_rows(device, row, offset):
    """Wherever the two rows are, and however slots lie in memory: the second is skipped, the others are served."""
    random = Random(14, device, torch.float32)
    pool = make_state(random, [5] * 1200, 1, 8, 4, rows=4)
    x = token(inputs(random, 1200, 1, 1, 1, 8), 0)
    for first in sorted({0, 30, 31, 32, 33, 500, row - 1} & set(range(row))):
        cache, expected = pool.clone(), pool.clone()
        slots = torch.arange(-offset, 1200, device=device)[offset:]  # begins so many elements into memory
        slots[row] = first
        y = rat_ext.rat_decode_step(**x, cache=cache, slots=slots)
        assert cache.error.tolist()[:3] == [3, row, first]
        cache.error.zero_()
        slots[row] = -1
        assert same_bits(y, rat_ext.rat_decode_step(**x, cache=expected, slots=slots))
        assert same_bits(cache.lengths, expected.lengths)


def many_rows(device, rows: int = 700, sequences: int = 9000, seed: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of a pool of which two are named twice, far apart, and one three times; and the same without the later rows."""
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed)).tolist()
    high, low = ([slot for slot in order if (slot >= 8192) == late] for late in (True, False))
    firsts = [slot for pair in zip(high, low[: len(high)], strict=True) for slot in pair][:rows]
    firsts[7], firsts[300] = -1, -1
    slots = list(firsts)
    for row, first in ((650, 3), (rows - 1, 130), (131, 130), (513, 512)):
        firsts[row], slots[row] = -1, slots[first]
    return torch.tensor(slots, device=device), torch.tensor(firsts, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_many_rows_of_a_large_pool(device, tokens):
    """Entries named twice by rows that are far apart, one outside the pool, rows that are skipped: the others are served."""
    random = Random(16, device, torch.float32)
    pool = make_state(random, [5] * 9000, 1, 8, 4, rows=4)
    x = inputs(random, 700, tokens, 1, 1, 8)
    slots, firsts = many_rows(device)
    for outside in (9000, 1 << 40):
        cache, expected = pool.clone(), pool.clone()
        slots[400], firsts[400] = outside, -1
        y = rat_ext.rat_decode_step(**x, cache=cache, slots=slots)
        assert same_bits(y, rat_ext.rat_decode_step(**x, cache=expected, slots=firsts))
        assert not y[[650, 699, 131, 513, 400, 7]].any() and y[[3, 130, 512]].abs().amax(dim=(1, 2, 3)).all()
        code, row, slot, _ = cache.error.tolist()
        assert (code, row) == (1, 400) or (code == 3 and row in (650, 699, 131, 513) and slot == slots[row])
        assert not expected.error.any() and not cache.workspace.any()
        for key, value in contents(expected).items():
            assert same_bits(contents(cache)[key], value), key


@pytest.mark.gpu
def test_a_graph_of_many_rows(device):
    """Replayed for slots that change: a replay knows nothing of the one before."""
    random = Random(17, device, torch.float32)
    pool = make_state(random, [5] * 9000, 1, 8, 4, rows=8)
    expected, x = pool.clone(), token(inputs(random, 700, 1, 1, 1, 8), 0)
    static = torch.full((700,), -1, device=device)
    rat_ext.rat_decode_step(**x, cache=pool, slots=static)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rat_ext.rat_decode_step(**x, cache=pool, slots=static)
    slots, firsts = many_rows(device)
    other = many_rows(device, seed=16)
    # Twice the same; rows in another order, where other rows are the first; then none twice.
    for named, served in ((slots, firsts), (slots, firsts), (slots.flip(0), None), other, (firsts, firsts)):
        static.copy_(named)
        graph.replay()
        if served is None:
            seen, rows = set(), named.tolist()
            served = torch.tensor([-1 if s in seen or seen.add(s) else s for s in rows], device=device)
        assert same_bits(y, rat_ext.rat_decode_step(**x, cache=expected, slots=served))
        assert (pool.error[0] == 3) == (named is not firsts)
        pool.error.zero_()
    assert same_bits(pool.lengths, expected.lengths) and not pool.workspace.any()


@pytest.mark.gpu
def test_two_streams_of_many_rows(device):
    """Two streams step disjoint entries of one pool at once, each with entries named twice."""
    random = Random(18, device, torch.float32)
    pool = make_state(random, [5] * 9000, 1, 8, 4, rows=16)
    expected, x = pool.clone(), token(inputs(random, 350, 1, 1, 1, 8), 0)
    halves = []
    for half in torch.randperm(9000, generator=torch.Generator().manual_seed(2))[:700].split(350):
        slots, firsts = half.to(device), half.to(device)
        slots[[349, 200, 33]], firsts[[349, 200, 33]] = slots[[0, 199, 32]], -1
        halves.append((slots, firsts))
    wanted = [[rat_ext.rat_decode_step(**x, cache=expected, slots=firsts) for _ in range(40)] for _, firsts in halves]
    streams, got = [torch.cuda.Stream() for _ in halves], [[], []]
    torch.cuda.synchronize()
    for _ in range(40):
        for stream, (slots, _), ys in zip(streams, halves, got, strict=True):
            with torch.cuda.stream(stream):
                ys.append(rat_ext.rat_decode_step(**x, cache=pool, slots=slots))
    torch.cuda.synchronize()
    for mine, theirs in zip(got, wanted, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))
    assert pool.error[0] == 3 and same_bits(pool.lengths, expected.lengths) and not pool.workspace.any()


@pytest.mark.gpu
def test_two_streams(device):
    """Steps over disjoint entries of one cache, on two streams at once: the bits of one after the other."""
    random = Random(13, device, torch.bfloat16)
    start = long_pool(random)
    halves = [torch.tensor(s, device=device) for s in ([0, 1], [4, 2, 3])]
    tokens = [token(inputs(random, len(s), 1, 2, 1, 64), 0) for s in halves]
    options = extras(random, 2, 64, 800)
    cache, expected = start.reserve(3200).clone(), start.reserve(3200).clone()
    wanted = [[rat_ext.rat_decode_step(**x, cache=expected, slots=s, **options) for _ in range(100)]
              for x, s in zip(tokens, halves, strict=True)]  # fmt: skip
    rat_ext.rat_decode_step(**tokens[0], cache=cache, slots=torch.tensor([-1, -1], device=device), **options)
    streams = [torch.cuda.Stream() for _ in halves]
    got = [[], []]
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, x, s, ys in zip(streams, tokens, halves, got, strict=True):
            with torch.cuda.stream(stream):
                ys.append(rat_ext.rat_decode_step(**x, cache=cache, slots=s, **options))
    torch.cuda.synchronize()
    for mine, theirs in zip(got, wanted, strict=True):
        assert all(same_bits(a, b) for a, b in zip(mine, theirs, strict=True))
    assert cache.lengths.tolist() == expected.lengths.tolist() and not cache.workspace.any()


def test_a_smaller_batch_than_the_cache(device):
    random = Random(6, device, torch.float32)
    cache = make_state(random, [3, 9, 20], 4, 16, 8, rows=4)
    rat_ext.rat_decode_step(**token(inputs(random, 2, 1, 4, 2, 16), 0), cache=cache)
    assert cache.lengths.tolist() == [4, 10, 20]


def test_capacity_is_exact(device):
    """The cache takes exactly ``capacity`` tokens, and so does a cache without a single chunk row."""
    random = Random(7, device, torch.float32)
    for rows, max_length in ((0, 7), (2, 16)):
        cache = RATCache.empty(1, 4, 16, 8, max_length, device=device)
        assert cache.chunk_k.shape[2] == rows and cache.capacity == 8 * (rows + 1) - 1
        x = inputs(random, 1, cache.capacity, 4, 2, 16)
        for t in range(cache.capacity):
            y = rat_ext.rat_decode_step(**token(x, t), cache=cache)
        expected = rat_ext.rat_attention(**x, chunk_size=8)
        torch.testing.assert_close(y[:, None], expected[:, -1:], rtol=1e-4, atol=1e-5)


def test_forward_continues_from_decode(device):
    """Prefill, decode, then a forward again: the same state object all the way."""
    random = Random(8, device, torch.float32)
    x = inputs(random, 2, 60, 4, 2, 16)
    whole, state = rat_ext.rat_attention(**x, chunk_size=8, return_state=True)
    part = {key: t[:, :21] for key, t in x.items()}
    y1, cache = rat_ext.rat_attention(**part, chunk_size=8, return_state=True)
    cache = cache.reserve(60)
    y2 = [rat_ext.rat_decode_step(**token(x, t), cache=cache)[:, None] for t in range(21, 35)]
    rest = {key: t[:, 35:] for key, t in x.items()}
    y3, end = rat_ext.rat_attention(**rest, chunk_size=8, initial_state=cache, return_state=True)
    torch.testing.assert_close(torch.cat((y1, *y2, y3), dim=1), whole, rtol=1e-4, atol=1e-5)
    mine, theirs = contents(end), contents(state)
    rows = state.chunk_k.shape[2]
    for key in mine:
        value = mine[key][:, :, :rows] if "chunk" in key else mine[key]
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5)


def test_a_forward_makes_room_for_what_decode_added(device):
    """A full cache continues: the forward counts the tokens of the decode steps before it when it allocates."""
    random = Random(14, device, torch.float32)
    x = inputs(random, 2, 24, 4, 2, 16)
    whole = rat_ext.rat_attention(**x, chunk_size=8)
    _, cache = rat_ext.rat_attention(**{key: t[:, :21] for key, t in x.items()}, chunk_size=8, return_state=True)
    for t in (21, 22):
        rat_ext.rat_decode_step(**token(x, t), cache=cache)
    assert cache.capacity == 23 and cache.length_bound == 23
    y, state = rat_ext.rat_attention(
        **{key: t[:, 23:] for key, t in x.items()}, chunk_size=8, initial_state=cache, return_state=True
    )
    torch.testing.assert_close(y, whole[:, 23:], rtol=1e-4, atol=1e-5)
    assert state.chunk_k.shape[2] == 3 and state.lengths.tolist() == [24, 24]


# ---- the cache as a container ----------------------------------------------------------------------------------------


def test_reserve(device):
    cache = make_state(Random(9, device, torch.float32), [3, 20], 4, 16, 8)
    assert cache.reserve(1) is cache
    grown = cache.reserve(100)
    assert grown.chunk_k.shape[2] == 12 and grown.capacity == 103 and cache.chunk_k.shape[2] == 2
    assert same_bits(grown.chunk_k[:, :, :2], cache.chunk_k) and same_bits(grown.chunk_v[:, :, :2], cache.chunk_v)
    assert grown.lengths is cache.lengths


def test_write_read_reset(device):
    random = Random(10, device, torch.float32)
    pool = RATCache.empty(5, 4, 16, 8, 64, device=device)
    one = make_state(random, [3, 20], 4, 16, 8)
    pool.write(torch.tensor([4, 1], device=device), one)
    assert pool.lengths.tolist() == [0, 20, 0, 0, 3] and pool.length_bound == 20
    back = pool.read(torch.tensor([4, 1], device=device))
    assert same_bits(back.chunk_k[:, :, :2], one.chunk_k) and same_bits(back.running_v, one.running_v)
    pool.reset(torch.tensor([1], device=device))
    assert pool.lengths.tolist() == [0, 0, 0, 0, 3]
    # A recycled entry remembers nothing: its first token is as in a fresh cache.
    x = token(inputs(random, 5, 1, 4, 2, 16), 0)
    y = rat_ext.rat_decode_step(**x, cache=pool)
    fresh = rat_ext.rat_decode_step(**x, cache=RATCache.empty(5, 4, 16, 8, 64, device=device))
    assert torch.equal(y[:4], fresh[:4])
    pool.reset()
    assert pool.lengths.tolist() == [0] * 5 and pool.length_bound == 0


def test_clone_shares_nothing_and_detach_everything(device):
    cache = make_state(Random(11, device, torch.float32), [3, 20], 4, 16, 8)
    copy, view = cache.clone(), cache.detach()
    for key in (*STATE, "lengths"):
        assert getattr(copy, key).data_ptr() != getattr(cache, key).data_ptr()
        assert getattr(view, key).data_ptr() == getattr(cache, key).data_ptr()


@pytest.mark.parametrize("past", [255, 256, 510])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_draft_across_a_slice_of_keys(device, past, chunk_size):
    """Keys are read in slices of 256; a draft whose last tokens see one slice more than its first is as many steps."""
    random = Random(past, device, torch.float32)
    caches = []
    for _ in range(2):
        made = make_state(Random(1, device, torch.float32), [past * chunk_size, 0], 2, 8, chunk_size, rows=past + 8)
        caches.append(made)
    rows = [random.normal(2, 5 * chunk_size, heads, 8) for heads in (1, 1, 2, 2)]
    y = rat_ext.rat_decode_step(*rows, caches[0])
    steps = [rat_ext.rat_decode_step(*(x[:, t] for x in rows), caches[1]) for t in range(5 * chunk_size)]
    assert torch.equal(y, torch.stack(steps, dim=1)) and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("new", [1, 3])
def test_a_row_among_many_long_ones(device, dtype, new):
    """Rows of several slices of keys, and more than a GPU holds blocks: each has the bits that it has alone."""
    batch, dim = (300, 128) if device.type == "cuda" else (6, 8)
    random = Random(new, device, dtype)
    lengths = [(37 * i + 777 * (i % 3)) % 1200 for i in range(batch)]
    rows = [random.normal(batch, new, 1, dim) for _ in range(5)]
    many = make_state(Random(2, device, dtype), lengths, 1, dim, 1, rows=1210)
    kept = many.clone()
    y = rat_ext.rat_decode_step(*rows[:4], many, out_gate=rows[4])
    assert y.isfinite().all()
    for i in {lengths.index(max(lengths)), lengths.index(min(lengths)), 5, batch // 2, batch - 1}:
        one = kept.clone()
        slots = torch.tensor([i], device=device)
        alone = rat_ext.rat_decode_step(*(x[i : i + 1] for x in rows[:4]), one, out_gate=rows[4][i : i + 1], slots=slots)
        assert torch.equal(alone[0], y[i]), (i, lengths[i])
