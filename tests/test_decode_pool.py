"""rat_decode_step on a pool as the operator takes it: drafts, a ring of states, pages, e4m3 states, errors; bits that depend on
a row's own length alone."""

import pytest
import torch

import rat_ext
from rat_ext import RATCache, reference
from rat_ext.cache import state_dtype
from rat_ext.testing import DTYPES, LOW, Random, compare, name, same_bits

OPS = torch.ops.rat_ext
low = pytest.mark.parametrize("dtype", LOW, ids=name)
STATES = ("chunk_k", "chunk_v", "scale_k", "scale_v")


class Pool:
    """The tensors of a pool, with sequences of ``lengths`` whose states are random and whose unused rows are NaN."""

    def __init__(self, random, lengths, heads, dim, chunk_size, rows, ring=1, fp8=False):
        n, acc = len(lengths), state_dtype(random.dtype)
        self.chunk_size, self.page_table, self.scale_k, self.scale_v = chunk_size, None, None, None
        self.chunk_k, self.chunk_v = (random.normal(n, heads, rows, dim) for _ in range(2))
        for s, length in enumerate(lengths):
            self.chunk_k[s, :, length // chunk_size :] = self.chunk_v[s, :, length // chunk_size :] = float("nan")
        if fp8:
            self.chunk_k, self.scale_k = quantised(self.chunk_k)
            self.chunk_v, self.scale_v = quantised(self.chunk_v)
        self.running_k, self.running_v = (random.normal(n, ring, heads, dim, dtype=acc) for _ in range(2))
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=random.device)
        self.error = torch.zeros(4, dtype=torch.int32, device=random.device)
        size = OPS.decode_workspace.default(n, heads, rows, dim) if random.device.type == "cuda" else 0
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=random.device)

    def clone(self):
        other = object.__new__(Pool)
        other.__dict__ = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in self.__dict__.items()}
        return other

    def step(self, x, slots=None, out_gate=None, gate_bias=None, rotary_cos=None, rotary_sin=None, scale=None):
        if slots is not None:
            slots = torch.tensor(slots, dtype=torch.int64, device=self.lengths.device)
        dim = x["v"].shape[-1]
        return OPS.rat_decode_step.default(
            x["q"], x["k"], x["v"], x["gate"], gate_bias, x.get("out_gate", out_gate), rotary_cos, rotary_sin, slots,
            self.page_table, self.chunk_k, self.chunk_v, self.scale_k, self.scale_v, self.running_k, self.running_v,
            self.lengths, self.error, self.workspace, self.chunk_size, dim**-0.5 if scale is None else scale,
        )  # fmt: skip

    def states(self, s):
        """Closed chunk states of sequence ``s`` with their scales, and its last running states."""
        length = int(self.lengths[s])
        closed = length // self.chunk_size
        out = {}
        for key in STATES:
            x = getattr(self, key)
            if x is None:
                continue
            if self.page_table is not None:
                x = torch.cat([x[page] for page in self.page_table[s].tolist() if page >= 0] or [x[0]], dim=1)[None]
                out[key] = x[0, :, :closed]
            else:
                out[key] = x[s, :, :closed]
        for key in ("running_k", "running_v"):
            x = getattr(self, key)
            out[key] = x[s, (length - 1) % x.shape[1]] if length % self.chunk_size else None
        return out

    def paged(self, page_rows, spare=3, seed=0):
        """The same pool in pages that lie in any order."""
        n, heads, rows, _ = self.chunk_k.shape
        columns = -(-rows // page_rows)
        order = torch.randperm(n * columns + spare, generator=torch.Generator().manual_seed(seed))[: n * columns]
        other = self.clone()
        other.page_table = order.reshape(n, columns).to(torch.int32).to(self.lengths.device)
        for key in STATES:
            x = getattr(self, key)
            if x is None:
                continue
            padded = x.new_zeros(n, heads, columns * page_rows, *x.shape[3:])
            padded[:, :, :rows] = x
            pages = padded.unflatten(2, (columns, page_rows)).transpose(1, 2).flatten(0, 1)
            made = x.new_zeros(n * columns + spare, *pages.shape[1:])
            made[order.to(x.device)] = pages
            setattr(other, key, made)
        return other


def quantised(x):
    """e4m3 elements and the scale of each state."""
    x = x.float()
    amax = x.abs().amax(dim=-1)
    scale = torch.where(amax == 0, 1.0, torch.exp2(torch.ceil(torch.log2(amax / 448))))
    return (x / scale[..., None]).to(torch.float8_e4m3fn), scale


def same_states(mine, theirs, sequences):
    for s in sequences:
        a, b = mine.states(s), theirs.states(s)
        for key in a:
            if a[key] is not None:
                assert same_bits(a[key].view(torch.uint8), b[key].view(torch.uint8)), (key, s)


def tokens_of(random, batch, tokens, heads, groups, dim):
    wide, narrow = (batch, tokens, heads, dim), (batch, tokens, groups, dim)
    shapes = {"q": narrow, "k": narrow, "v": wide, "gate": wide, "out_gate": wide}
    return {key: random.normal(*shape) for key, shape in shapes.items()}


def part(x, t, to=None):
    """Token ``t``, or tokens ``t`` to ``to``."""
    return {key: y[:, t] if to is None else y[:, t:to] for key, y in x.items()}


def tables(random, heads, dim, rows):
    acc = state_dtype(random.dtype)
    cos, sin = rat_ext.rotary_tables(rows, dim, base=100.0, device=random.device, dtype=acc)
    return {"gate_bias": random.normal(heads, dim, dtype=acc), "rotary_cos": cos, "rotary_sin": sin}


@low
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize(("tokens", "ring"), [(2, 1), (3, 2), (4, 4), (5, 6), (8, 3), (13, 5)])
@pytest.mark.parametrize("chunk_size", [1, 3, 16])
def test_a_draft_is_its_steps(device, dtype, tokens, ring, chunk_size, fp8):
    """Bit for bit, y and states; chunks close inside the draft, and begin a slice there."""
    random = Random(tokens, device, dtype)
    for dim, heads, groups in ((24, 2, 1), (64, 2, 2), (128, 4, 2), (256, 1, 1)):
        lengths = [0, 5, 256 * chunk_size - 2, 256 * chunk_size, 255 * chunk_size + chunk_size // 2, 600 * chunk_size - 1]
        rows = 600 + tokens
        pool = Pool(random, lengths, heads, dim, chunk_size, rows, ring, fp8)
        steps, options = pool.clone(), tables(random, heads, dim, rows + 1)
        x = tokens_of(random, len(lengths), tokens, heads, groups, dim)
        y = pool.step(x, **options)
        singles = torch.stack([steps.step(part(x, t), **options) for t in range(tokens)], dim=1)
        assert not y.isnan().any() and not pool.error.any()
        assert same_bits(y, singles)
        assert pool.lengths.tolist() == steps.lengths.tolist() == [n + tokens for n in lengths]
        same_states(pool, steps, range(len(lengths)))


@low
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [6, 16])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_draft_of_many_pairs_is_its_steps(device, dtype, dim, heads, chunk_size):
    """More pairs than a GPU has multiprocessors, or blocks that share pairs: other warps join slices there. Bits are those of
    steps, and of a batch of few."""
    random = Random(heads, device, dtype)
    lengths = [n * chunk_size + n % chunk_size for n in (0, 3, 250, 254, 255, 256, 257, 300, 511, 600, 1000, 1023)]
    pool = Pool(random, lengths, heads, dim, chunk_size, rows=1030)
    few, mixed, steps, options = pool.clone(), pool.clone(), pool.clone(), tables(random, heads, dim, 1031)
    x = tokens_of(random, len(lengths), 4, heads, 2, dim)
    y = pool.step(x, **options)
    singles = torch.stack([steps.step(part(x, t), **options) for t in range(4)], dim=1)
    assert not y.isnan().any() and not pool.error.any()
    assert same_bits(y, singles)
    same_states(pool, steps, range(len(lengths)))
    assert same_bits(few.step({key: z[4:6] for key, z in x.items()}, slots=[4, 5], **options), y[4:6])
    same_states(pool, few, [4, 5])
    slots = [11, -1, 9, 8, 7, 6, -1, 4, 3, 2, 1, 0]
    z = mixed.step({key: z[slots] for key, z in x.items()}, slots=slots, **options)
    for row, slot in enumerate(slots):
        assert same_bits(z[row], y[slot] if slot >= 0 else torch.zeros_like(z[row])), row


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dim", [40, 64, 128, 200])
def test_bits_depend_on_the_own_length_alone(device, dtype, dim):
    """Each row alone, in a pool of another capacity, has the bits that it has in the batch."""
    random = Random(1, device, dtype)
    lengths = [0, 3, 1023, 1024, 1027, 2048, 3001, 4096, 9000]
    pool = Pool(random, lengths, 2, dim, 4, rows=2400)
    x, options = tokens_of(random, len(lengths), 1, 2, 1, dim), tables(random, 2, dim, 2400)
    whole = pool.clone()
    y = whole.step(part(x, 0), **options)
    for s, length in enumerate(lengths):
        rows = length // 4 + 1
        one = Pool(random, [length], 2, dim, 4, rows)
        for key in ("chunk_k", "chunk_v"):
            getattr(one, key).copy_(getattr(pool, key)[s : s + 1, :, :rows])
        for key in ("running_k", "running_v"):
            getattr(one, key).copy_(getattr(pool, key)[s : s + 1])
        alone = one.step({key: z[s : s + 1, 0] for key, z in x.items()}, **options)
        assert same_bits(alone, y[s : s + 1]), length
    for slots in ([8, 0, 4], [4, 8], [2, 7, 6, 5, 1, 0, 3]):
        other = pool.clone()
        rows = torch.tensor(slots, device=device)
        assert same_bits(other.step({key: z[rows, 0] for key, z in x.items()}, slots=slots, **options), y[rows])


@low
@pytest.mark.parametrize("back", [1, 3, 4])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64])
def test_rollback_is_a_shorter_length(device, dtype, back, chunk_size):
    """After a draft of 4 in a ring of 5, ``lengths -= back``: what follows has the bits of a pool that never saw them."""
    random = Random(2, device, dtype)
    lengths = [0, 5, 13, 64, 127]
    pool = Pool(random, lengths, 2, 64, chunk_size, 150, ring=5)
    options = tables(random, 2, 64, 151)
    expected = pool.clone()
    draft, after = (tokens_of(random, len(lengths), 4, 2, 1, 64) for _ in range(2))
    pool.step(draft, **options)
    pool.lengths -= back
    if back < 4:
        expected.step(part(draft, 0, 4 - back), **options)
    for t in range(4):
        assert same_bits(pool.step(part(after, t), **options), expected.step(part(after, t), **options))
    same_states(pool, expected, range(len(lengths)))


@low
@pytest.mark.parametrize("page_rows", [1, 4, 16, 512])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_pages_have_the_same_bits(device, dtype, page_rows, fp8):
    random = Random(3, device, dtype)
    for dim in (40, 128):
        lengths = [0, 7, 1028, 2047, 4000]
        pool = Pool(random, lengths, 2, dim, 4, rows=1024, fp8=fp8)
        paged, options = pool.paged(page_rows), tables(random, 2, dim, 1025)
        for tokens in (1, 4, 6):
            x = tokens_of(random, len(lengths), tokens, 2, 1, dim)
            assert same_bits(pool.step(x, **options), paged.step(x, **options))
        same_states(pool, paged, range(len(lengths)))
        assert pool.lengths.tolist() == paged.lengths.tolist() and not paged.error.any()


def test_pages_that_are_shared(device):
    """Two sequences with the same first pages: the step reads them, and writes the pages of each alone."""
    random = Random(4, device, torch.float32)
    pool = Pool(random, [128, 128], 2, 64, 4, rows=48).paged(16)
    pool.chunk_k.nan_to_num_(0.0)
    pool.page_table[1, :2] = pool.page_table[0, :2]
    before = pool.clone()
    x = tokens_of(random, 2, 5, 2, 1, 64)
    y = pool.step(x)
    used = pool.page_table[0, :2].long()
    assert y.isfinite().all() and same_bits(pool.chunk_k[used], before.chunk_k[used])
    assert same_bits(pool.chunk_k[pool.page_table[0, 2].long(), :, 1:], before.chunk_k[pool.page_table[0, 2].long(), :, 1:])


@low
@pytest.mark.parametrize("dim", [8, 24, 64, 128, 256])
def test_e4m3_states(device, dtype, dim):
    """y against the definition over the states as they are kept; a chunk that closes is kept as torch rounds it."""
    random = Random(5, device, dtype)
    lengths = [0, 3, 40, 1400, 2003]
    pool = Pool(random, lengths, 2, dim, 4, rows=502, fp8=True)
    x, options = tokens_of(random, len(lengths), 1, 2, 1, dim), tables(random, 2, dim, 502)
    kept = [(getattr(pool, key).float() * getattr(pool, scale)[..., None]).nan_to_num(0.0)
            for key, scale in (("chunk_k", "scale_k"), ("chunk_v", "scale_v"))]  # fmt: skip
    results = []
    for to in (torch.float64, dtype):
        running = (pool.running_k[:, 0].to(state_dtype(to)), pool.running_v[:, 0].to(state_dtype(to)))
        cache = RATCache(kept[0].to(to), kept[1].to(to), *(r.clone() for r in running), pool.lengths.clone(), 4, 2003)
        acc = {key: t.to(state_dtype(to)) for key, t in options.items()}
        results.append((reference.rat_decode_step(**{k: t.to(to) for k, t in part(x, 0).items()}, cache=cache, **acc), cache))
    (exact, state), (eager, _) = results
    compare({"y": pool.step(part(x, 0), **options)}, {"y": eager}, {"y": exact}, dtype)
    for s in (1, 4):  # their chunks have closed
        for key in ("k", "v"):
            row = lengths[s] // 4
            got, scale = getattr(pool, f"chunk_{key}")[s, :, row], getattr(pool, f"scale_{key}")[s, :, row]
            wanted = getattr(state, f"chunk_{key}")[s, :, row]
            codes, wanted_scale = quantised(wanted)
            assert torch.equal(scale, wanted_scale)
            off = (got.float() - codes.float()).abs() > 0  # a sum that falls the other side of a rounding boundary
            assert off.float().mean() < 0.05
            assert ((got.float() * scale[:, None] - wanted).abs() <= 0.07 * wanted.abs() + 2.0**-9 * scale[:, None]).all()


@pytest.mark.parametrize("value", [0.0, 448.0, 449.0, 1e-30, float("inf"), float("nan")])
def test_e4m3_scales(device, value):
    """Of a chunk that one token closes: L = 1, a gate that lets it all in."""
    random = Random(6, device, torch.float32)
    pool = Pool(random, [0], 1, 16, 1, rows=2, fp8=True)
    x = {key: torch.zeros(1, 1, 16, device=device) for key in ("q", "k", "v", "gate")}
    x["gate"] -= 100.0
    x["v"][..., 3], x["v"][..., 5] = value, value / 3
    pool.step(x)
    codes, scale = quantised(x["v"])
    got = pool.chunk_v[0, :, 0].float() * pool.scale_v[0, :, 0, None]
    if value - value == 0:
        assert torch.equal(pool.scale_v[0, :, 0], scale[0].clamp(min=2.0**-117))
        torch.testing.assert_close(got, codes[0].float() * scale[0, :, None], rtol=0.07, atol=1e-38)
    else:
        assert got[0, 3].isnan()


@pytest.mark.parametrize("place", [0, 5, 15])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_one_value_that_is_not_finite_makes_a_state_nan(device, value, place):
    """All of it, wherever the value stands, whatever comes after it; the other heads' stay as they are."""
    random = Random(6, device, torch.float32)
    pool = Pool(random, [0], 2, 16, 1, rows=2, fp8=True)
    x = {key: random.normal(1, 2, 16) for key in ("q", "k", "v", "gate")}
    x["gate"] -= 100.0
    x["v"][0, 1, place] = value
    pool.step(x)
    got = pool.chunk_v[0, :, 0].float() * pool.scale_v[0, :, 0, None]
    assert got[1].isnan().all()
    torch.testing.assert_close(got[0], x["v"][0, 0], rtol=0.07, atol=1e-2)


BAD = {
    "a slot outside the pool": (1, 1, 7, {"slots": [0, 7, 2]}),
    "a full cache": (2, 1, 1, {"lengths": [3, 51, 5]}),
    "an entry named twice": (3, 2, 0, {"slots": [0, 1, 0]}),
    "too few rotary rows": (4, 2, 2, {"lengths": [0, 4, 20], "rotary": 4}),
    "a negative length": (5, 1, 1, {"lengths": [3, -2, 5]}),
    "a length beyond the pool": (5, 0, 0, {"lengths": [4000, 3, 5]}),
    "no page": (2, 1, 1, {"page": (1, 0)}),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_errors(device, kind, tokens):
    """On a GPU the row is skipped and told of; others are right, and a later call is. A CPU raises before it writes."""
    code, row, slot, change = BAD[kind]
    random = Random(7, device, torch.float32)
    lengths, slots = [4, 11, 5], change.get("slots", [0, 1, 2])
    pool = Pool(random, lengths, 2, 64, 4, rows=12)
    options = tables(random, 2, 64, 13)
    x = tokens_of(random, 3, tokens, 2, 1, 64)
    if "rotary" in change:
        options |= {key: options[key][: change["rotary"]] for key in ("rotary_cos", "rotary_sin")}
    if "page" in change:
        pool = pool.paged(4)
        pool.page_table[change["page"]] = -1
    if "lengths" in change:
        pool.lengths.copy_(torch.tensor(change["lengths"]))
    before = pool.clone()
    if device.type == "cpu":
        with pytest.raises(ValueError):
            pool.step(x, slots=slots, **options)
        for key in (*STATES[:2], "running_k", "running_v", "lengths"):
            assert same_bits(getattr(pool, key), getattr(before, key)), key
        return
    others = [s if b != row else -1 for b, s in enumerate(slots)]
    expected = before.clone()
    wanted = expected.step(x, slots=others, **options)
    assert not expected.error.any()
    y = pool.step(x, slots=slots, **options)
    assert same_bits(y, wanted) and not y[row].any() and pool.error.tolist()[:3] == [code, row, slot]
    for key in (*STATES[:2], "running_k", "running_v", "lengths"):
        assert same_bits(getattr(pool, key), getattr(expected, key)), key
    pool.step(part(x, 0), slots=[-1, 1, 0] if row != 1 else [2, -1, 0], **{**options, "rotary_cos": None, "rotary_sin": None})
    assert pool.error.tolist()[:3] == [code, row, slot], "the first error stays"
    if pool.workspace.numel():
        assert not pool.workspace.any()
