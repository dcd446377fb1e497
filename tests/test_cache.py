"""RATCache as an object: copies, devices and dtypes, files, pytrees, entries of a pool, bounds, autograd's in-place check."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import STATE, Random, make_state, same_bits

H, G, D, L = 4, 2, 16, 8


def state(device="cpu", dtype=torch.float32, lengths=(3, 20, 0), rows=None) -> RATCache:
    cache = make_state(Random(0, torch.device(device), dtype), list(lengths), H, D, L, rows)
    return cache.replace(**{name: getattr(cache, name).nan_to_num(0.5) for name in STATE})


def filled(device, batch: int, tokens: int) -> RATCache:
    """What a forward over ``tokens`` tokens returns."""
    random = Random(tokens, device, torch.float32)
    q, k = random.normal(batch, tokens, G, D), random.normal(batch, tokens, G, D)
    v, gate = random.normal(batch, tokens, H, D), random.normal(batch, tokens, H, D)
    return rat_ext.rat_attention(q, k, v, gate, L, return_state=True)[1]


def new_token(cache, batch=None):
    random = Random(7, cache.chunk_k.device, cache.chunk_k.dtype)
    batch = batch or cache.batch
    q, k = random.normal(batch, G, D), random.normal(batch, G, D)
    return q, k, random.normal(batch, H, D), random.normal(batch, H, D)


def decode(cache, batch=None, **options):
    return rat_ext.rat_decode_step(*new_token(cache, batch), cache, **options)


def assert_equal(a: RATCache, b: RATCache) -> None:
    assert all(same_bits(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    assert (a.chunk_size, a.length_bound) == (b.chunk_size, b.length_bound)


def saved(cache):
    file = io.BytesIO()
    torch.save({"cache": cache}, file)
    file.seek(0)
    return torch.load(file)["cache"]  # weights_only, as it is by default


COPIES = {
    "clone": RATCache.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "save": saved,
}


@pytest.mark.parametrize("way", COPIES)
def test_copies(device, way):
    """The same state in memory of its own; the scratch of the kernel is not part of it. Both go on alike."""
    cache = state(device).reserve(40)
    decode(cache)
    assert cache.workspace is not None
    made = COPIES[way](cache)
    assert isinstance(made, RATCache) and made.workspace is not cache.workspace
    assert_equal(made, cache)
    assert not {x.data_ptr() for x in made.tensors()} & {x.data_ptr() for x in cache.tensors()}
    assert torch.equal(decode(made), decode(cache))
    assert_equal(made, cache)


def test_to_dtype(device):
    """Chunk states take the dtype, running states that of the ops' states, lengths none."""
    cache = state(device)
    for dtype, running in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.float32)):
        for made in (cache.to(dtype), cache.to(dtype=dtype), cache.to(device, dtype), cache.to(cache.chunk_k.to(dtype))):
            assert {made.chunk_k.dtype, made.chunk_v.dtype} == {dtype}
            assert {made.running_k.dtype, made.running_v.dtype} == {running}
            assert made.lengths.dtype == torch.int32 and made.length_bound == cache.length_bound
            assert torch.equal(made.chunk_k, cache.chunk_k.to(dtype))
    if device.type == "cpu":
        decode(cache.to(torch.float64).reserve(40))
    decode(cache.to(torch.bfloat16).reserve(40))
    with pytest.raises(ValueError, match="RATCache.to: dtype: expected a floating dtype, got torch.int8"):
        cache.to(torch.int8)


def test_to_device(device):
    cache = state(device)
    assert all(a is b for a, b in zip(cache.to(device).tensors(), cache.tensors(), strict=True))
    for made in (cache.to("meta"), cache.to(device="meta", dtype=torch.bfloat16)):
        assert {x.device.type for x in made.tensors()} == {"meta"}
        assert [x.shape for x in made.tensors()] == [x.shape for x in cache.tensors()]
    assert_equal(cache.to("cpu").to(device), cache)


def test_its_size_and_text(device):
    cache = RATCache.empty(3, H, D, L, 40, dtype=torch.bfloat16, device=device)
    assert cache.nbytes == 2 * 3 * H * 5 * D * 2 + 2 * 3 * H * D * 4 + 3 * 4
    assert (cache.batch, cache.capacity) == (3, 47)
    assert repr(cache) == f"RATCache(3 sequences, 4 heads of 16, 5 chunks of 8 tokens, bfloat16, {cache.lengths.device})"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"chunk_size": 8.0}, "chunk_size: expected an int, got 8.0"),
        ({"max_length": -1}, "max_length: expected at least 0, got -1"),
        ({"batch": "x"}, "batch: expected an int, got 'x'"),
    ],
)
def test_errors_of_empty(change, words):
    with pytest.raises(ValueError, match=f"^RATCache: {words}$"):
        RATCache.empty(**{"batch": 1, "num_heads": H, "head_dim": D, "chunk_size": L, "max_length": 64} | change)


# ---- pytree, export --------------------------------------------------------------------------------------------------


def test_pytree(device):
    cache = state(device)
    leaves, spec = pytree.tree_flatten({"a": [cache]})
    assert all(a is b for a, b in zip(leaves, (*cache.tensors(), cache.error), strict=True))
    again = pytree.tree_unflatten(leaves, spec)["a"][0]
    assert all(a is b for a, b in zip(again.tensors(), cache.tensors(), strict=True)) and again.error is cache.error
    assert again.chunk_size == L and again.length_bound == again.capacity
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(cache)[0]]
    assert paths == [".chunk_k", ".chunk_v", ".running_k", ".running_v", ".lengths", ".error"]
    doubled = pytree.tree_map(lambda x: 2 * x, cache)
    assert torch.equal(doubled.lengths, 2 * cache.lengths) and doubled.chunk_size == L


class Continue(torch.nn.Module):
    def forward(self, q, k, v, gate, cache):
        return rat_ext.rat_attention(q, k, v, gate, L, initial_state=cache, return_state=True)


class Step(torch.nn.Module):
    def forward(self, q, k, v, gate, cache):
        return rat_ext.rat_decode_step(q, k, v, gate, cache)


def test_export(device):
    """A cache goes into an exported program and out of it, also from a file; a decode step updates the caller's tensors."""
    random = Random(0, device, torch.float32)
    args = [random.normal(3, 9, n, D) for n in (G, G, H, H)]
    cache = state(device)
    program = torch.export.export(Continue(), (*args, cache))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    want_y, want = Continue()(*args, cache)
    for module in (program.module(), torch.export.load(file).module()):
        y, after = module(*args, cache)
        torch.testing.assert_close(y, want_y)
        assert isinstance(after, RATCache)
        assert after.lengths.tolist() == want.lengths.tolist() == [12, 29, 9]
        torch.testing.assert_close(after.running_k, want.running_k)
    args = [x[:, 0] for x in args]
    first, second = state(device).reserve(40), state(device).reserve(40)
    step = torch.export.export(Step(), (*args, first.clone())).module()
    for _ in range(6):  # also at a bound that the export did not see
        torch.testing.assert_close(step(*args, first), Step()(*args, second))
        first.length_bound += 1
    assert first.lengths.tolist() == second.lengths.tolist()
    torch.testing.assert_close(first.chunk_k[:, :, :2], second.chunk_k[:, :, :2])


# ---- entries of a pool -----------------------------------------------------------------------------------------------


def entries(draw_bad: bool):
    good = st.permutations(range(4)).flatmap(lambda p: st.integers(0, 4).map(lambda n: list(p[:n])))
    if not draw_bad:
        return good
    bad = st.sampled_from([-1, -4, -(2**62), 4, 5, 2**62])
    return st.tuples(good, bad, st.integers(0, 4)).map(lambda t: t[0][: t[2]] + [t[1]] + t[0][t[2] :])


@given(slots=entries(draw_bad=True))
def test_a_wrong_entry_changes_nothing(slots):
    """-1 too, which decoding skips: a pool's entries are named one by one."""
    pool = state(lengths=[4, 3, 9, 3], rows=2)
    before = pool.clone()
    slots = torch.tensor(slots)
    other = state(lengths=[1] * len(slots))
    for method, args in (("reset", (slots,)), ("read", (slots,)), ("write", (slots, other))):
        for slots_given in (args, (args[0].tolist(), *args[1:])):
            words = rf"^RATCache.{method}: slots: expected entries from 0 to 3, got -?\d+$"
            with pytest.raises(ValueError, match=words) as found:
                getattr(pool, method)(*slots_given)
            assert isinstance(found.value, IndexError)
    assert_equal(pool, before)


@given(slots=entries(draw_bad=False))
def test_entries(slots):
    """Writing, reading and resetting some entries is doing so to each alone; the others stay as they are."""
    pool = state(lengths=[4, 3, 9, 3], rows=2)
    others = [n for n in range(4) if n not in slots]
    before, index = pool.clone(), torch.tensor(slots, dtype=torch.int64)
    new = state(lengths=[n + 10 for n in range(len(slots))], rows=1)
    pool.write(index, new)
    back = pool.read(index)
    assert back.lengths.tolist() == new.lengths.tolist()
    assert same_bits(back.chunk_k[:, :, :1], new.chunk_k) and same_bits(back.running_v, new.running_v)
    pool.reset(index)
    assert [int(pool.lengths[n]) for n in slots] == [0] * len(slots)
    for mine, theirs in zip(pool.tensors(), before.tensors(), strict=True):
        assert same_bits(mine[others], theirs[others])


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (["x"], "expected ints, got str"),
        ([True], "expected ints, got bool"),
        ([0.0], "expected ints, got float"),
        ([3], "expected entries from 0 to 2, got 3"),
        ([-1], "expected entries from 0 to 2, got -1"),
        ([-(2**70)], "expected entries from 0 to 2, got -1"),
        ([2**70], "expected entries from 0 to 2, got 4611686018427387904"),
        (0, "expected a tensor or a list of ints, got int"),
        (None, "expected a tensor or a list of ints, got NoneType"),
        (torch.zeros(1, dtype=torch.int32), "expected dtype int64, got int32"),
        (torch.zeros(1, dtype=torch.bool), "expected dtype int64, got bool"),
        (torch.zeros(1), "expected dtype int64, got float32"),
        (torch.tensor(0), r"expected shape \(.\,?\), got \(\)"),
        (torch.zeros(1, 1, dtype=torch.int64), r"expected shape \(.\,?\), got \(1, 1\)"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "expected a tensor on cpu, got one on meta"),
    ],
)
def test_errors_of_slots(slots, words):
    pool = state()
    for method, args in (("read", ()), ("write", (state(lengths=[1], rows=0),)), ("reset", ())):
        if slots is None and method == "reset":
            continue
        with pytest.raises(ValueError, match=f"^RATCache.{method}: slots: {words}$"):
            getattr(pool, method)(slots, *args)


def test_errors_of_write():
    pool, slots = state(), torch.tensor([0])
    for other, words in (
        (state(lengths=[30]), "expected at most 2 chunk rows, got 3"),
        (state(lengths=[3]).to(torch.bfloat16), "expected dtype torch.float32, got torch.bfloat16"),
        (state(lengths=[3]).to("meta"), "expected device cpu, got meta"),
        (state(lengths=[3]).replace(chunk_size=4), "expected chunk_size 8, got 4"),
        (RATCache.empty(1, 2, D, L, 0), "expected heads 4, got 2"),
        (RATCache.empty(1, H, 32, L, 0), "expected head_dim 16, got 32"),
        (None, "expected a RATCache, got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"^RATCache.write: other: {words}$"):
            pool.write(slots, other)
    with pytest.raises(ValueError, match=r"slots: expected shape \(2,\), got \(1,\)"):
        pool.write(slots, state(lengths=[1, 1]))


def test_entries_on_the_device(device):
    pool = RATCache.empty(4, H, D, L, 40, device=device)
    slots = torch.tensor([2, 0], device=device)
    pool.write(slots, filled(device, 2, 20))
    pool.reset(torch.tensor([2], device=device))
    assert pool.lengths.tolist() == [20, 0, 0, 0]
    assert torch.equal(pool.read(slots).lengths, torch.tensor([0, 20], dtype=torch.int32, device=device))


# ---- the host's bound of the lengths ---------------------------------------------------------------------------------


def test_bounds(device):
    """The bound never falls under a length, and rises by no more than it has to. The host knows the slots of lists."""
    pool = RATCache.empty(4, H, D, L, 40, device=device)
    assert pool.length_bound == 0
    pool.write([1], filled(device, 1, 20))
    assert pool.length_bound == 20
    pool.write([2], filled(device, 1, 3))
    assert pool.length_bound == 20
    decode(pool)
    assert pool.length_bound == 21 and pool.lengths.tolist() == [1, 21, 4, 1]
    for made in (pool.clone(), pool.detach(), pool.read([1]), pool.reserve(99), pool.to(device)):
        assert made.length_bound == 21
    assert pool.read([2]).length_bound == 4
    pool.copy([1], [0])
    pool.reset([1])
    assert pool.length_bound == 21
    pool.copy([2], [0])
    assert pool.length_bound == 4
    pool.reset()
    assert pool.length_bound == 0 and not pool.lengths.any()


def test_bounds_of_what_was_read():
    """Each entry has its own, and so has what is made of it."""
    pool = RATCache.empty(4, H, D, L, 40)
    pool.write([1, 2], filled(torch.device("cpu"), 2, 20))
    pool.write([2], filled(torch.device("cpu"), 1, 3))
    for taken in (
        pool.read([0, 1, 2]),
        pool.read(torch.tensor([0, 1, 2])),
        pool.read([0, 1, 2]).clone(),
        pool.clone().read([0, 1, 2]),
    ):
        assert [taken._bound(n) for n in range(3)] == [0, 20, 3] and taken.length_bound == 20
        other = RATCache.empty(3, H, D, L, 40)
        other.write([2, 1, 0], taken)
        assert [other._bound(n) for n in range(3)] == [3, 20, 0]
        taken.reset([1])
        assert taken.length_bound == 3 and other.length_bound == pool.length_bound == 20
        assert taken.reserve(100).length_bound == taken.detach().length_bound == 3


def test_bounds_where_the_device_knows_the_slots(device):
    """Where the host cannot know the slots, the bound stays one; with either, it is never above the capacity."""
    pool = RATCache.empty(4, H, D, L, 40, device=device)
    slots = [torch.tensor([n], device=device) for n in range(4)]
    pool.write(slots[1], filled(device, 1, 20))
    pool.write(slots[2], filled(device, 1, 3))
    pool.reset(slots[1])
    assert pool.length_bound == (3 if device.type == "cpu" else 20)
    for _ in range(100):  # one sequence after another in the same slot
        decode(pool, 1, slots=slots[3])
        pool.reset(slots[3])
    assert pool.length_bound == (3 if device.type == "cpu" else pool.capacity == 47 and 47)
    assert pool.lengths.tolist() == [0, 0, 3, 0]
    pool.length_bound = 1000
    assert pool.length_bound == pool.capacity


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["decode", "write", "reset", "reset some"])
def test_a_state_that_changes_before_the_backward(device, change):
    """A forward saves the state that it continues from. What writes to it makes the backward an error, not a wrong gradient."""
    cache = filled(device, 2, 13).reserve(40)
    random = Random(1, device, torch.float32)
    q, k, v, gate = (random.normal(2, 5, n, D).requires_grad_() for n in (G, G, H, H))
    y = rat_ext.rat_attention(q, k, v, gate, L, initial_state=cache)
    with torch.no_grad():
        if change == "decode":
            decode(cache)
        elif change == "write":
            cache.write(torch.tensor([0], device=device), filled(device, 1, 3))
        elif change == "reset":
            cache.reset()
        else:
            cache.reset(torch.tensor([0], device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_decoding_from_a_copy_leaves_the_backward_alone(device):
    cache = filled(device, 2, 13).reserve(40)
    random = Random(1, device, torch.float32)
    leaves = [random.normal(2, 5, n, D).requires_grad_() for n in (G, G, H, H)]
    want = torch.autograd.grad(rat_ext.rat_attention(*leaves, L, initial_state=cache).sum(), leaves)
    y = rat_ext.rat_attention(*leaves, L, initial_state=cache)
    decode(cache.clone())
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), want, strict=True):
        assert torch.equal(a, b)


def test_decoding_in_inference_mode(device):
    """Tensors of inference mode have no version to raise."""
    with torch.inference_mode():
        cache = filled(device, 2, 13).reserve(40)
        decode(cache)
        assert cache.lengths.tolist() == [14, 14]


@pytest.mark.gpu
def test_a_first_step_in_a_capture():
    """What a step writes beside the states is made with the cache: nothing of it belongs to a graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    caches = [filled(device, 2, 300).reserve(400) for _ in range(2)]
    token = new_token(caches[0])
    workspace, error = caches[0].workspace, caches[0].error
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rat_ext.rat_decode_step(*token, caches[0])
    assert caches[0].workspace is workspace and caches[0].error is error
    for _ in range(3):
        want = decode(caches[1])
        graph.replay()
        assert torch.equal(y, want)
    torch.testing.assert_close(decode(caches[0]), decode(caches[1]))


# ---- what copies share, what the host knows --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"draft_tokens": 2}, {"page_chunks": 2, "fp8": True}])
@pytest.mark.parametrize("way", [RATCache.clone, lambda cache: cache.to(copy=True), copy.deepcopy])
def test_a_copy_shares_nothing(device, options, way):
    """Nor the error: a row that the copy skips is none of the original's."""
    cache = RATCache.empty(2, H, D, L, 32, device=device, **options)
    other = way(cache)
    for name in (*cache._present(), "error"):
        assert getattr(other, name).data_ptr() != getattr(cache, name).data_ptr(), name
    other.error.fill_(2)
    cache.check()


def test_an_entry_that_was_read_has_no_error_of_the_pool():
    pool = state()
    pool.error.fill_(2)
    pool.read([1]).check()
    with pytest.raises(RuntimeError, match="^RATCache: row 2, slot 2: "):
        pool.check()


CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.lists(st.integers(0, 2), unique=True, min_size=1, max_size=3)),
        st.tuples(st.just("all"), st.just([0, 1, 2])),
        st.tuples(st.just("back"), st.lists(st.integers(0, 2), unique=True, min_size=1, max_size=3)),
        st.tuples(st.just("reset"), st.lists(st.integers(0, 2), unique=True, min_size=1, max_size=2)),
        st.tuples(st.just("copy"), st.lists(st.integers(0, 2), min_size=2, max_size=2)),
    ),
    min_size=6,
    max_size=12,
)


@example(
    calls=[("all", [0, 1, 2]), ("back", [1, 2]), ("step", [0]), ("reset", [2]), ("copy", [0, 1]), ("back", [1])],
    counts=[3, 2, 1, 1, 1, 2],
    branch=2,
)
@given(calls=CALLS, counts=st.lists(st.integers(1, 3), min_size=12, max_size=12), branch=st.integers(0, 11))
def test_bounds_are_the_lengths_where_the_host_knows_all(calls, counts, branch):
    """Not only above them: bounds that creep up allocate more with each call. A copy has bounds of its own."""
    cache = RATCache.empty(3, H, D, L, 64, draft_tokens=3)
    lengths, other, before = [0, 0, 0], None, []
    for i, ((call, slots), n) in enumerate(zip(calls, counts, strict=False)):
        if i == branch:
            other, before = cache.clone(), list(lengths)
        if call in ("step", "all"):
            named = None if call == "all" else torch.tensor(slots)
            tokens = [x[:, None].expand(-1, n, -1, -1) for x in new_token(cache, len(slots))]
            rat_ext.rat_decode_step(*tokens, cache, slots=named)
            lengths = [length + n * (slot in slots) for slot, length in enumerate(lengths)]
        elif call == "back":
            taken = [min(n, lengths[slot]) for slot in slots]
            cache.rollback(slots, torch.tensor(taken))
            for slot, m in zip(slots, taken, strict=True):
                lengths[slot] -= m
        elif call == "reset":
            cache.reset(slots)
            lengths = [0 if slot in slots else length for slot, length in enumerate(lengths)]
        else:
            cache.copy(slots[:1], slots[1:])
            lengths[slots[1]] = lengths[slots[0]]
        for mine, want in ((cache, lengths), (other, before)):
            if mine is not None:
                assert mine.lengths.tolist() == want
                assert [mine._bound(slot) for slot in range(3)] == want and mine.length_bound == max(want)
