"""Serving from a pool: prefill pieces, steps, drafts, rollbacks, copies, forks, pages, full caches, in any order and any batch.

The machine below holds every call against two things: the definition in float64 over each sequence's whole history, by the
rule of the tests; and, bit for bit, a shadow of each sequence: a cache of its own without options that sees its tokens one by
one. Whatever a pool does (batches, cuts, drafts, pages, rings, copies) must not change a bit of that.
"""

import copy
import io
import pickle

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import rat_ext
from rat_ext import RATCache, reference
from rat_ext.cache import OutOfPages, dequantise, quantise, state_dtype
from rat_ext.layers import RATLayer
from rat_ext.testing import Random, compare, cu_seqlens_of, name, same_bits

H, G, D, P, TOKENS = 2, 1, 8, 5, 40
WIDTHS = {"q": G, "k": G, "v": H, "gate": H, "out_gate": H}


class Serving(RuleBasedStateMachine):
    """``where``: the device. Slots' histories are lists, one entry per token: (its tensors, y, exact, the shadow after it)."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    @initialize(
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
        chunk_size=st.sampled_from([1, 2, 4, 5]),
        draft=st.sampled_from([0, 1, 3]),
        page=st.sampled_from([None, 1, 2, 4]),
        scarce=st.booleans(),
        fp8=st.booleans(),
        options=st.booleans(),
    )
    def begin(self, dtype, chunk_size, draft, page, scarce, fp8, options):
        if self.where.type == "cuda" and dtype == torch.float64:
            dtype = torch.float16
        if self.where.type == "cuda" and page is not None:
            page *= 8  # the least that the forward takes there
        self.dtype, self.chunk_size, self.draft, self.fp8 = dtype, chunk_size, draft, fp8
        pages = None
        if page is not None:
            pages = P * -(-(TOKENS // chunk_size) // page) // 2 + 1 if scarce else None
        self.pool = RATCache.empty(
            P, H, D, chunk_size, TOKENS, draft_tokens=draft, page_chunks=page, num_pages=pages, fp8=fp8, dtype=dtype,
            device=self.where,
        )  # fmt: skip
        self.random = Random(chunk_size, self.where, dtype)
        self.options = {}
        if options:
            acc = state_dtype(dtype)
            cos, sin = rat_ext.rotary_tables(self.pool.rows + 1, D, base=100.0, device=self.where, dtype=acc)
            self.options = {"gate_bias": self.random.normal(H, D, dtype=acc), "rotary_cos": cos, "rotary_sin": sin}
        self.out_gate = options
        self.histories = [[] for _ in range(P)]
        self.budgets = [0] * P  # tokens that may be rolled back
        self.calls = 0

    # ---- the model ----

    def one(self, slot):
        """The shadow of a slot: a cache of one sequence, without options but FP8."""
        history = self.histories[slot]
        if history:
            return history[-1][3].clone()
        sizes = (1, H, D, self.chunk_size, self.pool.capacity)
        return RATCache.empty(*sizes, fp8=self.fp8, dtype=self.dtype, device=self.where)

    def fits(self, slot, count):
        """Whether a slot has room for ``count`` tokens more; where it has pages, after asking for them."""
        total = len(self.histories[slot]) + count
        if total > self.pool.capacity:
            return False
        try:
            self.pool.allocate([slot], total)
        except OutOfPages:
            return False
        return True

    def tokens(self, count):
        """(count, width, D) by name."""
        names = WIDTHS if self.out_gate else [n for n in WIDTHS if n != "out_gate"]
        size = {"gate": 1.5}
        return {n: self.random.normal(count, WIDTHS[n], D, size=size.get(n, 1.0)) for n in names}

    def expect(self, slot, tokens, y, exact):
        """Checks the outputs ``y`` of new ``tokens`` of a slot, and remembers them."""
        history = self.histories[slot]
        count = y.shape[0]
        for t in range(count):
            shadow = self.one(slot)
            x = {n: v[None, t] for n, v in tokens.items()}
            alone = rat_ext.rat_decode_step(**x, cache=shadow, exact=exact, **self.options)
            assert same_bits(alone[0], y[t]), f"slot {slot}, token {len(history)}, exact {exact}"
            history.append((x, y[t], exact, shadow))
        if not count:
            return
        whole = {n: torch.cat([entry[0][n] for entry in history])[None] for n in tokens}

        def defined(dtype, fp8):
            wide = {n: x.to(dtype) for n, x in whole.items()}
            options = {n: x.to(state_dtype(dtype)) for n, x in self.options.items()}
            cache = RATCache.empty(1, H, D, self.chunk_size, self.pool.capacity, fp8=fp8, dtype=dtype, device=self.where)
            return reference.rat_attention(**wide, chunk_size=self.chunk_size, cache=cache, **options)[0, -count:]

        compare({"y": y}, {"y": defined(self.dtype, self.fp8)}, {"y": defined(torch.float64, False)}, self.dtype)
        if not self.fp8 and all(entry[2] for entry in history):
            plain = rat_ext.rat_attention(**whole, chunk_size=self.chunk_size, **self.options)[0]
            assert same_bits(plain[-count:], y), "a whole forward has other bits"
        self.budgets[slot] = min(self.budgets[slot] + count, self.draft)
        self.calls += 1

    def serve(self, slots, counts, call):
        """Runs a call that brings ``counts[i]`` tokens to ``slots[i]`` and returns their outputs one after the other."""
        tokens = self.tokens(sum(counts))
        y = call(tokens)
        at = 0
        for slot, count in zip(slots, counts, strict=True):
            part = slice(at, at + count)
            if slot < 0:
                assert not y[part].any()
            else:
                self.expect(slot, {n: x[part] for n, x in tokens.items()}, y[part], call.exact)
            at += count

    def tensor(self, slots):
        return torch.tensor(slots, dtype=torch.int64, device=self.where)

    def chosen(self, data, least=0):
        """Distinct slots in any order, -1 among them."""
        slots = data.draw(st.lists(st.integers(0, P - 1), unique=True, min_size=least, max_size=P), "slots")
        return [-1 if data.draw(st.integers(0, 7)) == 0 else slot for slot in slots]

    # ---- calls ----

    @rule(data=st.data(), count=st.integers(1, 4), exact=st.booleans(), flat=st.booleans())
    def step(self, data, count, exact, flat):
        slots = [s for s in self.chosen(data) if s < 0 or self.fits(s, count)]

        def call(tokens):
            x = {n: v.unflatten(0, (len(slots), count)) for n, v in tokens.items()}
            if flat and count == 1:
                x = {n: v[:, 0] for n, v in x.items()}
            y = rat_ext.rat_decode_step(**x, cache=self.pool, slots=self.tensor(slots), exact=exact, **self.options)
            return y if y.dim() == 3 else y.flatten(0, 1)

        call.exact = exact
        self.serve(slots, [count] * len(slots), call)

    @rule(data=st.data())
    def mixed(self, data):
        """Prefill pieces, single tokens, drafts and nothing, in one call."""
        slots = self.chosen(data)
        counts = [data.draw(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 13]), "tokens") for _ in slots]
        counts = [n if s < 0 or self.fits(s, n) else 0 for s, n in zip(slots, counts, strict=True)]

        def call(tokens):
            x = {n: v[None] for n, v in tokens.items()}
            cuts = cu_seqlens_of(counts, self.where)
            places = {"cu_seqlens": cuts, "cache": self.pool, "slots": self.tensor(slots)}
            return rat_ext.rat_attention(**x, chunk_size=self.chunk_size, **places, **self.options)[0]

        call.exact = True
        self.serve(slots, counts, call)

    @rule(data=st.data(), count=st.integers(0, 9), all_rows=st.booleans())
    def dense(self, data, count, all_rows):
        slots = list(range(P)) if all_rows else self.chosen(data, 1)
        if not all(s < 0 or self.fits(s, count) for s in slots):
            return

        def call(tokens):
            x = {n: v.unflatten(0, (len(slots), count)) for n, v in tokens.items()}
            places = {"cache": self.pool, "slots": None if all_rows else self.tensor(slots)}
            return rat_ext.rat_attention(**x, chunk_size=self.chunk_size, **places, **self.options).flatten(0, 1)

        call.exact = True
        self.serve(slots, [count] * len(slots), call)

    @rule(data=st.data(), wrong=st.sampled_from(["full", "outside", "twice"]), exact=st.booleans())
    def skipped(self, data, wrong, exact):
        """What cannot be served: a CPU refuses the call, a GPU serves the other rows and tells."""
        good = [s for s in self.chosen(data) if s >= 0 and self.fits(s, 1)]
        if wrong == "full":
            bad = [s for s in range(P) if s not in good and not self.fits(s, 1)]
        else:
            bad = [P + 3] if wrong == "outside" else good[:1]
        if not bad:
            return
        slots = [*good, bad[0]]
        tokens = self.tokens(len(slots))
        before = self.contents()
        call = lambda: rat_ext.rat_decode_step(  # noqa: E731
            **tokens, cache=self.pool, slots=self.tensor(slots), exact=exact, **self.options
        )
        if self.where.type == "cpu":
            with pytest.raises(ValueError, match=r"^rat_ext\.\w+: (slots|cache)[\w.]*\[.+: expected .+, got .+"):
                call()
            assert all(same_bits(a, b) for a, b in zip(self.contents(), before, strict=True))
            return
        y = call()
        assert not y[-1].any()
        with pytest.raises(RuntimeError, match=rf"row {len(good)}, slot {bad[0]}: expected"):
            self.pool.check()
        self.pool.check()
        for i, slot in enumerate(good):
            self.expect(slot, {n: x[i : i + 1] for n, x in tokens.items()}, y[i : i + 1], exact)

    # ---- what a scheduler does between calls ----

    @precondition(lambda self: self.draft)
    @rule(data=st.data(), as_tensor=st.booleans())
    def rollback(self, data, as_tensor):
        slots = [s for s in self.chosen(data) if s < 0 or self.budgets[s]]
        counts = [0 if s < 0 else data.draw(st.integers(1, self.budgets[s]), "tokens") for s in slots]
        if as_tensor:
            self.pool.rollback(self.tensor(slots), torch.tensor(counts, dtype=torch.int64, device=self.where))
        else:
            n = min([n for s, n in zip(slots, counts, strict=True) if s >= 0], default=0)
            counts = [n if s >= 0 else 0 for s in slots]
            self.pool.rollback(slots, n)
        for slot, n in zip(slots, counts, strict=True):
            if slot >= 0 and n:
                self.histories[slot] = self.histories[slot][:-n]
                self.budgets[slot] -= n

    @rule(data=st.data(), fork=st.booleans())
    def copies(self, data, fork):
        """Any choice of parents, themselves and each other too."""
        to = data.draw(st.lists(st.integers(0, P - 1), unique=True, max_size=P), "to")
        parents = [data.draw(st.integers(0, P - 1), "from") for _ in to]
        self.given_pages(lambda: (self.pool.fork if fork else self.pool.copy)(parents, to), parents, to, None)

    @rule(data=st.data())
    def fork_a_prefix(self, data):
        to = data.draw(st.lists(st.integers(0, P - 1), unique=True, max_size=2), "to")
        parents = [data.draw(st.integers(0, P - 1), "from") for _ in to]
        limits = [len(self.histories[s]) // self.chunk_size for s in parents]
        tokens = [self.chunk_size * data.draw(st.integers(0, n), "chunks") for n in limits]
        self.given_pages(lambda: self.pool.fork(parents, to, tokens), parents, to, tokens)

    def given_pages(self, call, parents, to, tokens):
        before = self.contents()
        try:
            call()
        except OutOfPages:
            assert self.pool.page_table is not None
            assert all(same_bits(a, b) for a, b in zip(self.contents(), before, strict=True))
            return
        histories = [list(self.histories[s][: None if tokens is None else tokens[i]]) for i, s in enumerate(parents)]
        budgets = [self.budgets[s] if tokens is None else 0 for s in parents]
        for slot, history, budget in zip(to, histories, budgets, strict=True):
            self.histories[slot], self.budgets[slot] = history, budget

    @rule(data=st.data(), everything=st.sampled_from([False] * 5 + [True]))
    def reset(self, data, everything):
        slots = [s for s in self.chosen(data) if s >= 0][: 5 if everything else 2]
        if everything:
            slots = list(range(P))
        self.pool.reset(None if everything else slots)
        for slot in slots:
            self.histories[slot], self.budgets[slot] = [], 0

    @rule(data=st.data())
    def move(self, data):
        """Out of the pool and into another slot, by way of the host."""
        a, b = (data.draw(st.integers(0, P - 1)) for _ in range(2))
        out = self.pool.read([a]).to("cpu", copy=True).to(self.where)
        try:
            self.pool.write([b], out)
        except OutOfPages:
            return
        self.histories[b], self.budgets[b] = list(self.histories[a]), self.budgets[a]

    @rule(way=st.sampled_from(["clone", "deepcopy", "pickle", "save", "to", "reserve"]))
    def another(self, way):
        """The pool becomes a copy of itself; the old one's memory is spoilt."""
        old = self.pool
        ways = {
            "clone": old.clone,
            "deepcopy": lambda: copy.deepcopy(old),
            "pickle": lambda: pickle.loads(pickle.dumps(old)),
            "save": lambda: loaded(old),
            "to": lambda: old.to(self.where, copy=True),
            "reserve": lambda: old.reserve(old.capacity),
        }
        self.pool = ways[way]()
        if way == "reserve":
            assert self.pool is old
            return
        assert self.pool.free_pages == old.free_pages
        for x in (*old.tensors(), *([] if old.page_table is None else [old.page_table])):
            x.fill_(77 if not x.is_floating_point() else float("nan"))

    # ---- what always holds ----

    def contents(self):
        extra = [getattr(self.pool, n) for n in ("page_table", "scale_k", "scale_v") if getattr(self.pool, n) is not None]
        return [x.clone() for x in (*self.pool.tensors(), *extra)]

    @invariant()
    def states_are_those_of_the_shadows(self):
        if not hasattr(self, "histories"):
            return
        lengths = [len(h) for h in self.histories]
        assert self.pool.lengths.tolist() == lengths
        assert max(lengths) <= self.pool.length_bound <= self.pool.capacity
        entries = self.pool.read(list(range(P)))
        for slot, history in enumerate(self.histories):
            if not history:
                continue
            closed, shadow = len(history) // self.chunk_size, history[-1][3]
            for x in ("chunk_k", "chunk_v", *(("scale_k", "scale_v") if self.fp8 else ())):
                assert same_bits(getattr(entries, x)[slot, :, :closed], getattr(shadow, x)[0, :, :closed]), (x, slot)
            for x in ("running_k", "running_v"):
                mine = getattr(entries, x)[slot]
                mine = mine[(len(history) - 1) % self.pool.ring] if self.draft else mine
                # After a prefix was taken, or at a chunk's end, nobody reads the running state.
                if len(history) % self.chunk_size:
                    assert same_bits(mine, getattr(shadow, x)[0]), (x, slot)
        self.pages_have_owners(lengths)
        self.pool.check()

    def pages_have_owners(self, lengths):
        """Pages are counted rightly; a page of two sequences is one that neither may write."""
        if self.pool.page_table is None:
            return
        table, pages = self.pool.page_table.tolist(), self.pool.chunk_k.shape[0]
        rows = [[page for page in row if page >= 0] for row in table]
        assert all(row == [*kept, *([-1] * (len(row) - len(kept)))] for row, kept in zip(table, rows, strict=True))
        held = [page for row in rows for page in row]
        assert self.pool.free_pages == pages - len(set(held))
        book = self.pool._pages()  # the host's, kept from call to call or read from the table again
        assert book.rows == rows and book.counts == [held.count(page) for page in range(pages)]
        assert sorted(book.unused) == [page for page in range(pages) if page not in held]
        for slot, row in enumerate(rows):
            assert len(set(row)) == len(row)
            writable = max(lengths[slot] - self.budgets[slot], 0) // self.chunk_size // self.pool.chunk_k.shape[2]
            assert all(held.count(page) == 1 for page in row[writable:]), "a shared page may be written"


def loaded(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file)


def test_any_order_of_calls(device):
    """Thousands of operations where the profile is long."""
    long = hypothesis.settings.default.max_examples >= 500
    settings = hypothesis.settings(
        max_examples=150 if long else 25, stateful_step_count=60 if long else 25, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck), phases=[p for p in hypothesis.Phase if p.name != "explain"],
    )  # fmt: skip
    run_state_machine_as_test(lambda: Serving(device), settings=settings)


# ---- one thing at a time -----------------------------------------------------------------------------------------------


def drawn(device, dtype=torch.float32, batch=1, tokens=20, dim=16, heads=4, groups=2):
    random = Random(3, device, dtype)
    widths = {"q": groups, "k": groups, "v": heads, "gate": heads, "out_gate": heads}
    return {key: random.normal(batch, tokens, n, dim) for key, n in widths.items()}


def pool_of(device, batch=4, max_length=64, **options):
    return RATCache.empty(batch, 4, 16, 4, max_length, device=device, **options)


OPTIONS = {
    "plain": {},
    "draft": {"draft_tokens": 3},
    "pages": {"page_chunks": 8},
    "fp8": {"fp8": True},
    "all": {"draft_tokens": 2, "page_chunks": 8, "fp8": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def test_quantise():
    """The least power of two that lets the largest element fit, exactly so around its bounds; what e4m3 has is kept."""
    x = torch.tensor([448.0, 448.1, 224.0, 225.0, 1.0, 0.0, 3e-5, 2.0**-126, float("inf"), float("nan")])
    kept, scale = quantise(x[:, None] * torch.tensor([1.0, -0.5]))
    assert scale.tolist() == [1.0, 2.0, 0.5, 1.0, 2.0**-8, 1.0, 2.0**-23, 2.0**-117, 1.0, 1.0]
    assert kept.dtype == torch.float8_e4m3fn and dequantise(kept, scale, torch.float32)[0, 0] == 448
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()][None] * torch.tensor([[2.0**-15], [1.0], [2.0**7]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantise(*quantise(values.to(dtype)), dtype), values.to(dtype))


@pytest.mark.parametrize("cuts", [[0, 0, 2], [0, 2, 2], [0, 1, 2], [0, 0, 0]])
def test_an_entry_that_two_rows_name(device, cuts):
    """Also where one of them, or both, bring no token: the second is at fault, on every device."""
    pool, x, slots = pool_of(device), drawn(device, tokens=2), torch.tensor([1, 1], device=device)
    x = {key: t[:1, : cuts[-1]] for key, t in x.items()}
    options = {"cache": pool, "slots": slots, "cu_seqlens": torch.tensor(cuts, dtype=torch.int32, device=device)}
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"slots\[1\]: expected an entry that no other row names, got 1"):
            rat_ext.rat_attention(**x, chunk_size=4, **options)
        assert not pool.lengths.any()
    else:
        rat_ext.rat_attention(**x, chunk_size=4, **options)
        assert pool.error.tolist() == [3, 1, 1, 0]


@pytest.mark.parametrize("step", [False, True])
def test_states_of_any_size_are_the_definitions_in_fp8(device, step):
    """Scales and elements, from the least normal number on; a chunk is one token here, which its gate lets in as it is."""
    values = torch.tensor([1.0, -0.75, 0.5, 0.3, 448 / 512, -0.9, 2.0**-9, 0.0], device=device)
    sizes = torch.exp2(torch.arange(-126, 128, 2, device=device, dtype=torch.float64)).float()
    v = torch.where((x := sizes[:, None] * values).abs() < 2.0**-126, 0.0, x)[None, :, None]
    zeros, pool = torch.zeros_like(v), RATCache.empty(1, 1, 8, 1, 127, fp8=True, device=device)
    for part in v.split(1 if step else 127, dim=1):
        x = {"q": zeros[:, : part.shape[1]], "k": -part, "v": part, "gate": torch.full_like(part, -torch.inf)}
        rat_ext.rat_decode_step(**x, cache=pool) if step else rat_ext.rat_attention(**x, chunk_size=1, cache=pool)
    for key, want in (("k", -v), ("v", v)):
        kept, scale = quantise(want[0, :, 0])
        assert torch.equal(getattr(pool, f"scale_{key}")[0, 0], scale)
        assert torch.equal(getattr(pool, f"chunk_{key}")[0, 0].float(), kept.float())


def test_the_definition_rounds_what_it_attends_to(device):
    """In FP8 a chunk is what it will be as soon as it closes: a call in one piece is calls in pieces."""
    x = drawn(device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    caches = [pool_of(device, 1, fp8=True, dtype=x["q"].dtype) for _ in range(2)]
    whole = reference.rat_attention(**x, chunk_size=4, cache=caches[0])
    steps = [reference.rat_decode_step(**{key: t[:, n] for key, t in x.items()}, cache=caches[1]) for n in range(20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, rtol=1e-5, atol=1e-5)


@options
def test_a_plain_state_joins_a_pool(device, options):
    """Prefill by a forward that returns a state, then write: the same as prefill in the pool, but for FP8's bits."""
    x, slots = drawn(device, batch=2, tokens=14), [2, 0]
    pool, other = pool_of(device, **options), pool_of(device, **options)
    state = rat_ext.rat_attention(**{key: t[:, :13] for key, t in x.items()}, chunk_size=4, return_state=True)[1]
    pool.write(slots, state)
    other.allocate(slots, 14)
    index = torch.tensor(slots, device=device)
    rat_ext.rat_attention(**{key: t[:, :13] for key, t in x.items()}, chunk_size=4, cache=other, slots=index)
    y, want = (
        rat_ext.rat_attention(**{key: t[:, 13:] for key, t in x.items()}, chunk_size=4, cache=c, slots=index)
        for c in (pool, other)
    )
    assert pool.lengths.tolist() == other.lengths.tolist() == [14, 0, 14, 0] and pool.free_pages == other.free_pages
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name)
def test_what_fp8_costs(device, dtype):
    """Against float64: the mean error that docs/serving.md states, for normal keys and values and open gates."""
    x = drawn(device, dtype, 2, 512, 64)
    x["gate"] = x["gate"] + 1
    y = {}
    for fp8 in (False, True):
        cache = RATCache.empty(2, 4, 64, 4, 512, fp8=fp8, dtype=dtype, device=device)
        y[fp8] = rat_ext.rat_attention(**x, chunk_size=4, cache=cache).double()
    exact = reference.rat_attention(**{key: t.double() for key, t in x.items()}, chunk_size=4)
    error = {fp8: float((got - exact).square().mean().sqrt() / exact.square().mean().sqrt()) for fp8, got in y.items()}
    assert error[False] < 4e-3 and 0.02 < error[True] < 0.03, error


def test_the_bytes(device):
    """The formulas of docs/serving.md."""
    n, h, d, rows = 4, 4, 16, 16
    running = 2 * n * h * d * 4
    assert pool_of(device).nbytes == 2 * n * h * rows * d * 4 + running + 4 * n
    assert pool_of(device, draft_tokens=3).nbytes == pool_of(device).nbytes + 3 * running
    assert pool_of(device, fp8=True).nbytes == 2 * n * h * rows * (d + 4) + running + 4 * n
    few = pool_of(device, page_chunks=8, num_pages=3)
    assert few.nbytes == 2 * 3 * h * 8 * d * 4 + running + 4 * n + 4 * n * 2 and few.free_pages == 3
    assert pool_of(device, num_pages=3).chunk_k.shape == (3, h, 16, d) and pool_of(device).free_pages == 0


def test_a_shared_prefix_costs_no_pages(device):
    """Full pages are shared, an open one is copied; the last owner frees a page."""
    pool = pool_of(device, max_length=128, page_chunks=8)  # pages of 32 tokens
    pool.allocate([0], 70)
    rat_ext.rat_attention(**drawn(device, tokens=70), chunk_size=4, cache=pool, slots=torch.tensor([0], device=device))
    free = pool.free_pages
    pool.fork([0, 0], [1, 2], 64)
    assert pool.free_pages == free
    pool.fork([0], [3])  # 70 tokens: 6 into the third page, of which one chunk has closed
    assert pool.free_pages == free - 1 and pool.lengths.tolist() == [70, 64, 64, 70]
    table = pool.page_table.tolist()
    assert table[1] == table[2] == [*table[0][:2], -1, -1] and table[3][:2] == table[0][:2] and table[3][2] != table[0][2]
    pool.reset([0])
    assert pool.free_pages == free  # the third page alone
    pool.reset()
    assert pool.free_pages == pool.chunk_k.shape[0] and (pool.page_table == -1).all()


def test_a_page_that_a_rollback_reaches_is_not_shared(device):
    pool = pool_of(device, max_length=64, draft_tokens=2, page_chunks=8)
    pool.allocate([0], 64)
    slot = torch.tensor([0], device=device)
    rat_ext.rat_attention(**drawn(device, tokens=32), chunk_size=4, cache=pool, slots=slot)
    pool.fork([0], [1])
    kept = pool.read([1])
    pool.rollback([0], 2)
    other = {key: x + 1 for key, x in drawn(device, tokens=2).items()}
    rat_ext.rat_attention(**other, chunk_size=4, cache=pool, slots=slot)
    now = pool.read([1])
    assert same_bits(now.chunk_k[:, :, :8], kept.chunk_k[:, :, :8]) and now.lengths.tolist() == [32]
    assert not same_bits(pool.read([0]).chunk_k[:, :, 7], kept.chunk_k[:, :, 7])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c: c.rollback([0], 4), "rollback: tokens: expected from 0 to the 3 draft tokens of the cache, got 4"),
        (lambda c: c.rollback([0], -1), "rollback: tokens: expected from 0 to the 3 draft tokens of the cache, got -1"),
        (lambda c: c.rollback([0], 2), "rollback: tokens: expected at most the 1 tokens of slot 0, got 2"),
        (lambda c: c.rollback([0], 1.0), "rollback: tokens: expected an int or a tensor of ints, got float"),
        (
            lambda c: c.rollback([0], torch.zeros(2, dtype=torch.int64)),
            r"rollback: tokens: expected .* \(1,\), got int64 of \(2,\)",
        ),
        (lambda c: c.rollback([0], torch.zeros(1)), r"rollback: tokens: expected an int or integers .* got float32 of \(1,\)"),
        (lambda c: c.rollback([0, 0], 1), "rollback: slots: expected entries that differ, got 0 twice"),
        (lambda c: c.rollback([7], 1), "rollback: slots: expected entries from 0 to 3, got 7"),
        (lambda c: c.copy([0], [1, 2]), r"copy: to_slots: expected shape \(1,\), got \(2,\)"),
        (lambda c: c.copy([0, 0], [1, 1]), "copy: to_slots: expected entries that differ, got 1 twice"),
        (lambda c: c.copy([9], [1]), "copy: from_slots: expected entries from 0 to 3, got 9"),
        (lambda c: c.fork([0], [1], 3), "fork: tokens: expected a multiple of chunk_size 4, got 3"),
        (lambda c: c.fork([0], [1], 8), "fork: tokens: expected at most the 1 of the source, got 8"),
        (lambda c: c.fork([0], [1], "x"), "fork: tokens: expected an int or 1 ints, got str 'x'"),
        (lambda c: c.fork([0], [1], [0, 0]), r"fork: tokens: expected an int or 1 ints, got list \[0, 0\]"),
        (lambda c: c.allocate([0], 10**6), "allocate: max_length: expected from 0 to the capacity 67, got 1000000"),
        (
            lambda c: c.allocate(torch.zeros(1, device="meta", dtype=torch.int64), 1),
            "allocate: slots: expected a tensor on cpu",
        ),
        (lambda c: RATCache.empty(1, 1, 8, 4, 8, page_chunks=3), "page_chunks: expected a power of two, got 3"),
        (lambda c: RATCache.empty(1, 1, 8, 4, 8, num_pages=0), "num_pages: expected at least 1, got 0"),
        (lambda c: RATCache.empty(1, 1, 8, 4, 8, draft_tokens=-1), "draft_tokens: expected at least 0, got -1"),
        (lambda c: RATCache.empty(1, 1, 8, 4, 8, fp8=1), "fp8: expected a bool, got 1"),
        (
            lambda c: RATCache.empty(1, 1, 8, 4, 8, dtype=torch.int8),
            "dtype: expected a floating dtype of the ops, got torch.int8",
        ),
        (lambda c: RATCache.empty(True, 1, 8, 4, 8), "batch: expected an int, got True"),
        (lambda c: RATCache(None, *[None] * 4, 4, 0), "chunk_k: expected a tensor, got NoneType"),
        (lambda c: RATCache(*c.tensors(), "x", 0), "chunk_size: expected an int, got 'x'"),
        (lambda c: RATCache(*c.tensors(), 4, 0, page_table=3), "page_table: expected a tensor, got int"),
    ],
)
def test_errors_of_a_pool(call, words):
    """One line, before anything is changed."""
    pool = pool_of("cpu", draft_tokens=3, page_chunks=8)
    pool.allocate([0], 1)
    x = {key: t[:, 0] for key, t in drawn("cpu", tokens=1).items()}
    rat_ext.rat_decode_step(**x, cache=pool, slots=torch.tensor([0]))
    before = pool.clone()
    with pytest.raises(ValueError, match=f"^RATCache(: |\\.){words}"):
        call(pool)
    assert all(same_bits(a, b) for a, b in zip(pool.tensors(), before.tensors(), strict=True))
    assert same_bits(pool.page_table, before.page_table) and pool.free_pages == before.free_pages


def test_a_slot_takes_its_capacity():
    pool = pool_of("cpu", page_chunks=8)
    pool.allocate([0], pool.capacity)
    assert (pool.page_table[0] >= 0).all() and (pool.page_table[1:] < 0).all()


@pytest.mark.parametrize("way", [RATCache.clone, copy.deepcopy, lambda pool: pool.reserve(100), lambda pool: pool])
def test_a_page_is_free_when_its_last_owner_goes(way):
    """Also in a copy, which reads the table again to learn who holds what."""
    pool = pool_of("cpu", page_chunks=2, num_pages=10)
    pool.allocate([0], 40)  # five pages
    pool.lengths[0] = pool.length_bound = 40
    pool.fork([0, 0], [1, 2], 16)  # two of them for three
    pool = way(pool)
    assert pool.free_pages == 5
    for slot, free in ((1, 5), (0, 8), (2, 10)):
        pool.reset([slot])
        assert pool.free_pages == free and (pool.page_table[slot] < 0).all()
    pool.allocate([3, 1], [32, 48])
    taken = pool.page_table[pool.page_table >= 0].tolist()
    assert sorted(taken) == list(range(10)) and pool.free_pages == 0


def test_out_of_pages():
    pool = pool_of("cpu", page_chunks=8, num_pages=3)
    pool.allocate([0], 40)
    with pytest.raises(OutOfPages, match="^RATCache: pages: expected 2 that are free, got 1$"):
        pool.allocate([1], 64)
    assert pool.free_pages == 1 and pool.page_table[1].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ([1, 3, 9, 0], "row 3, slot 9: expected a slot from 0 to 4 - 1, got 9"),
        ([2, 0, 2, 67], "row 0, slot 2: expected room for one more token, got a full cache at a length of 67"),
        ([3, 5, 2, 0], "row 5, slot 2: expected a slot that no other row of the call names, got one named twice"),
        ([4, 1, 1, 7], "row 1, slot 1: expected rotary tables with a row for each chunk, got 7 rows"),
        ([5, 1, 1, -3], "row 1, slot 1: expected a length that the cache can have, got -3"),
        ([6, 0, 0, 0], "cu_seqlens: expected it to rise from 0 to the number of tokens, got something else"),
    ],
)
def test_check(device, error, words):
    """What kernels leave in the error word is raised in one line, once."""
    pool = pool_of(device)
    pool.check()
    pool.error.copy_(torch.tensor(error))
    with pytest.raises(RuntimeError, match=f"^RATCache: {words}$"):
        pool.check()
    pool.check()
    assert not pool.error.any()


@pytest.mark.gpu
def test_a_row_that_cannot_be_served_is_skipped(device):
    """Full, outside, twice, too few tables, malformed: nothing stops, the others are right, and a later call too."""
    x = drawn(device, batch=2, tokens=3)
    cos, sin = rat_ext.rotary_tables(1, 16, device=device)
    for change, given in (
        ("full", {}),
        ("row 1, slot 9", {"slots": [0, 9]}),
        ("row 1, slot 0: .* twice", {"slots": [0, 0]}),
        ("slot 1: .* 1 rows", {"rotary_cos": cos, "rotary_sin": sin}),
    ):
        pool = pool_of(device)
        pool.lengths[1] = 66 if change == "full" else 4
        slots = torch.tensor(given.pop("slots", [0, 1]), device=device)
        y = rat_ext.rat_attention(**x, chunk_size=4, cache=pool, slots=slots, **given)
        assert not y[1].any() and y[0].isfinite().all() and pool.lengths[0] == 3
        with pytest.raises(RuntimeError, match=change):
            pool.check()
        pool.reset()
        assert same_bits(y[:1], rat_ext.rat_attention(**{k: t[:1] for k, t in x.items()}, chunk_size=4, cache=pool, **given))
        pool.check()


def call_on(pool, x, exact, **given):
    """The same new tokens as pieces, by the forward's arithmetic, or as a draft."""
    if exact:
        return rat_ext.rat_attention(**x, chunk_size=pool.chunk_size, cache=pool, **given)
    return rat_ext.rat_decode_step(**x, cache=pool, **given)


def assert_skips_the_last_row(pool, x, exact, words, **given):
    """At once an error where the host knows; on a GPU zeros, a length that stays, and the error later."""
    last, before = x["v"].shape[0] - 1, pool.lengths.tolist()
    if pool.lengths.is_cuda:
        y = call_on(pool, x, exact, **given)
        assert not y[last].any() and y[:last].isfinite().all() and pool.lengths[last] == before[last]
        with pytest.raises(RuntimeError, match=words):
            pool.check()
    else:
        with pytest.raises(ValueError, match=words):
            call_on(pool, x, exact, **given)
        assert pool.lengths.tolist() == before


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (3, 1), (4, 1), (4, 3), (7, 1), (7, 2), (6, 9), (40, 1), (39, 2)])
def test_tables_that_end_before_the_new_tokens(device, before, tokens, exact):
    """One row for each chunk that has a token, the open one's too: as many are enough, one less is an error."""
    x = drawn(device, batch=2, tokens=tokens)
    rows = (before + tokens - 1) // 4 + 1
    for count in (rows, rows - 1):
        cos, sin = rat_ext.rotary_tables(count, 16, device=device)
        pool = pool_of(device, batch=2).clone()
        for states in ("chunk_k", "chunk_v"):
            getattr(pool, states).zero_()
        pool.lengths[1] = before
        if count == 0:  # without memory: no other device knows more, and they are not taken for none
            with pytest.raises(ValueError, match="rotary_cos: expected at least 1 row, one for each chunk, got 0"):
                call_on(pool, x, exact, rotary_cos=cos, rotary_sin=sin)
        elif count == rows:
            assert call_on(pool, x, exact, rotary_cos=cos, rotary_sin=sin).isfinite().all()
            pool.check()
        elif before >= tokens:  # the row of a new sequence has tables enough
            assert_skips_the_last_row(pool, x, exact, "rotary", rotary_cos=cos, rotary_sin=sin)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("page", ["one more", -1])
@pytest.mark.parametrize(("before", "tokens"), [(31, 1), (3, 1), (30, 3), (63, 1)])
def test_a_page_that_the_pool_does_not_have(device, before, tokens, page, exact):
    """Of any page that the chunks take that are closed after the call; the pages behind are nobody's business."""
    x = drawn(device, batch=2, tokens=tokens)
    taken = -(-((before + tokens) // 4) // 8)
    for place in range(taken + 1):
        pool = pool_of(device, batch=2, max_length=96, page_chunks=8)
        pool.allocate([0, 1], 96)
        for states in ("chunk_k", "chunk_v"):
            getattr(pool, states).zero_()
        pool.lengths[1] = before
        pool.page_table[1, place] = pool.chunk_k.shape[0] if page == "one more" else page
        if place < taken:
            assert_skips_the_last_row(pool, x, exact, "full|page")
        else:
            assert call_on(pool, x, exact).isfinite().all()
            pool.check()


@pytest.mark.gpu
@options
def test_a_graph_of_a_mixed_batch(device, options):
    """Captured once, replayed as lengths, slots and cuts change, a rollback in it too."""
    pool = pool_of(device, max_length=200, **options)
    pool.allocate(list(range(4)), 200)
    want = pool.clone()
    x = drawn(device, tokens=9)
    slots, cuts = torch.tensor([2, -1, 0], device=device), cu_seqlens_of([4, 2, 3], device)
    back = torch.tensor([min(1, pool.draft_tokens), 0, 0], device=device)

    def run(pool):
        y = rat_ext.rat_attention(**x, chunk_size=4, cache=pool, slots=slots, cu_seqlens=cuts)
        pool.rollback(slots, back)
        return y

    run(pool)
    pool.reset()
    pool.allocate(list(range(4)), 200)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(pool)
    for named, sizes in (([2, -1, 0], [4, 2, 3]), ([1, 2, 3], [0, 8, 1]), ([0, 2, -1], [1, 1, 7])):
        slots.copy_(torch.tensor(named))
        cuts.copy_(cu_seqlens_of(sizes, device))
        for value in x.values():
            value.normal_()
        graph.replay()
        assert same_bits(y, run(want)) and pool.lengths.tolist() == want.lengths.tolist()
    pool.check()


# ---- arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"initial_state": True}, "initial_state: expected none beside a cache, which is updated in place, got one"),
        ({"return_state": True}, "return_state: expected none beside a cache, which is updated in place, got one"),
        ({"max_seqlen": 3}, "max_seqlen: expected none beside a cache, which is updated in place, got one"),
        ({"chunk_size": 8}, "cache: expected a cache of chunk_size 8, got one of 4"),
        ({"cache": 3}, "cache: expected a RATCache or None, got int"),
        ({"cache": None, "slots": torch.tensor([0])}, "slots: expected a cache whose entries they name, got none"),
        ({"cache": None, "max_seqlen": 3}, "max_seqlen: expected None without cu_seqlens, got 3"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_does_not_go_with_a_cache(change, words, packed):
    pool = pool_of("cpu")
    x = drawn("cpu", tokens=3)
    arguments = {"chunk_size": 4, "cache": pool} | change
    if change.get("initial_state"):
        arguments["initial_state"] = pool_of("cpu", 1)
    op = "rat_attention_packed" if packed else "rat_attention"
    tensors = {"projection": torch.cat([t.flatten(2) for t in x.values()], 2), "num_heads": 4, "num_groups": 2} if packed else x
    with pytest.raises(ValueError, match=f"^rat_ext.{op}: {words}$"):
        getattr(rat_ext, op)(**tensors, **arguments)


def test_inputs_that_need_a_gradient(device):
    pool, x = pool_of(device), drawn(device, tokens=3)
    for key in x:
        with pytest.raises(ValueError, match=f"^rat_ext.rat_attention: {key}: expected a tensor that needs no gradient"):
            rat_ext.rat_attention(**x | {key: x[key].clone().requires_grad_()}, chunk_size=4, cache=pool)
    assert not pool.lengths.any()


@pytest.mark.parametrize("options", [{"draft_tokens": 1}, {"page_chunks": 8}, {"fp8": True}], ids=str)
def test_a_pool_with_options_is_no_initial_state(device, options):
    with pytest.raises(ValueError, match="initial_state: expected a cache without draft tokens, pages and FP8"):
        rat_ext.rat_attention(**drawn(device, tokens=3), chunk_size=4, initial_state=pool_of(device, 1, **options))


def test_max_seqlen(device):
    """512 sequences of 16 tokens have a chunk each, not the 512 that all tokens would need."""
    x = drawn(device, tokens=512 * 16, dim=8)
    cuts = cu_seqlens_of([16] * 512, device)
    y, state = rat_ext.rat_attention(**x, chunk_size=16, cu_seqlens=cuts, return_state=True, max_seqlen=16)
    assert state.chunk_k.shape == (512, 4, 1, 8) and state.length_bound == 16
    wide = rat_ext.rat_attention(**x, chunk_size=16, cu_seqlens=cuts, return_state=True, max_seqlen=10**9)[1]
    assert wide.chunk_k.shape == (512, 4, 512, 8) and same_bits(wide.chunk_k[:, :, :1], state.chunk_k)
    assert same_bits(wide.running_k, state.running_k)
    more, after = rat_ext.rat_attention(
        **x, chunk_size=16, cu_seqlens=cuts, initial_state=state, return_state=True, max_seqlen=16
    )  # fmt: skip
    assert after.chunk_k.shape[2] == 2 and after.length_bound == 32
    if device.type == "cpu":
        known = rat_ext.rat_attention(**x, chunk_size=16, cu_seqlens=cuts, return_state=True)[1]
        assert known.chunk_k.shape == state.chunk_k.shape
        with pytest.raises(ValueError, match="max_seqlen: expected at least the longest sequence's 16 tokens, got 15"):
            rat_ext.rat_attention(**x, chunk_size=16, cu_seqlens=cuts, return_state=True, max_seqlen=15)


@options
def test_packed_projection_and_the_definition(device, options):
    """The packed form, and the definition, take a pool with any options."""
    pool = pool_of(device, **options)
    pool.allocate([0, 1, 2, 3], 30)
    other, defined = pool.clone(), pool.clone()
    x, slots = drawn(device, batch=2, tokens=13), torch.tensor([3, 1], device=device)
    projection = torch.cat([t.flatten(2) for t in x.values()], dim=2)
    y = rat_ext.rat_attention(**x, chunk_size=4, cache=pool, slots=slots)
    assert same_bits(y, rat_ext.rat_attention_packed(projection, 4, 2, 4, cache=other, slots=slots))
    torch.testing.assert_close(y, reference.rat_attention(**x, chunk_size=4, cache=defined, slots=slots), rtol=1e-4, atol=2e-2)
    assert pool.lengths.tolist() == other.lengths.tolist() == defined.lengths.tolist() == [0, 13, 0, 13]
    mine, theirs = pool.read([1, 3]), defined.read([1, 3])
    for key in ("running_k", "running_v"):
        a, b = (getattr(c, key) for c in (mine, theirs))
        kept = [(12 - i) % pool.ring for i in range(pool.ring)]
        a, b = (a[:, kept], b[:, kept]) if pool.ring > 1 else (a, b)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    wide = [c.chunk_k if not pool.fp8 else dequantise(c.chunk_k, c.scale_k, torch.float32) for c in (mine, theirs)]
    torch.testing.assert_close(wide[0][:, :, :3], wide[1][:, :, :3], rtol=0.13 if pool.fp8 else 1e-4, atol=1e-5)


def test_autocast(device):
    """Tokens are cast to what the pool holds."""
    x = drawn(device, batch=2, tokens=7)
    pool = pool_of(device, 2, dtype=torch.bfloat16)
    projection = torch.cat([t.flatten(2) for t in x.values()], dim=2)
    with torch.autocast(device.type, torch.bfloat16):
        y = rat_ext.rat_attention(**x, chunk_size=4, cache=pool)
        pool.reset()
        assert same_bits(y, rat_ext.rat_attention_packed(projection, 4, 2, 4, cache=pool))
    assert y.dtype == torch.bfloat16
    pool.reset()
    assert same_bits(y, rat_ext.rat_attention(**{key: t.bfloat16() for key, t in x.items()}, chunk_size=4, cache=pool))


def test_a_state_that_a_forward_saved(device):
    """A call that writes a cache makes a backward that needs its old contents an error."""
    x = drawn(device, batch=2, tokens=5)
    cache = pool_of(device, 2)
    y = rat_ext.rat_attention(**{key: t.clone().requires_grad_() for key, t in x.items()}, chunk_size=4, initial_state=cache)
    rat_ext.rat_attention(**x, chunk_size=4, cache=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_explain(device):
    rows = rat_ext.explain(**drawn(device), chunk_size=4, cache=pool_of(device, 1))
    phases = {"attention_fwd", "recurrence_fwd"} if device.type == "cuda" else {"attention_fwd"}
    assert {row["phase"] for row in rows if row["chosen"]} == {row["phase"] for row in rows} == phases


# ---- tracing ------------------------------------------------------------------------------------------------------------


@options
def test_opcheck(device, options):
    torch.use_deterministic_algorithms(False)  # it compares every element, dead rows too
    pool = pool_of(device, **options)
    pool.allocate([0, 1, 2, 3], 30)
    for x in (pool.chunk_k, pool.chunk_v):
        x.view(torch.uint8).zero_()
    x, slots = drawn(device, tokens=9), torch.tensor([2, -1, 0], device=device)
    tensors = [x[key] for key in ("q", "k", "v", "gate")]
    states = [
        getattr(pool, key) for key in ("page_table", "chunk_k", "chunk_v", "scale_k", "scale_v", "running_k", "running_v")
    ]
    call = [*tensors, None, x["out_gate"], None, None, cu_seqlens_of([4, 2, 3], device), slots, *states]
    checks = ("test_autograd_registration", "test_faketensor")
    if not pool.fp8:  # torch cannot compare float8
        checks = ("test_schema", *checks)
    torch.library.opcheck(
        torch.ops.rat_ext.rat_attention_cached.default, [*call, pool.lengths, pool.error, 4, 0.25], test_utils=checks
    )


@options
def test_compiled(device, options):
    """One graph of a serving step, of batches that change."""
    layer = RATLayer(64, 4, 2, 4, device=device)
    pool = pool_of(device, **options)
    pool.allocate([0, 1, 2, 3], 60)
    other = pool.clone()

    def serve(x, cuts, token, slots, cache):
        first = layer(x, cache=cache, slots=slots, cu_seqlens=cuts)
        return first, layer.step(token, cache, slots)

    compiled = torch.compile(serve, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ([4, 2, 3], [1, 1, 5], [2, 9, 2], [6, 1, 0]):
        x, token = torch.randn(1, sum(sizes), 64, device=device), torch.randn(3, 64, device=device)
        cuts, slots = cu_seqlens_of(sizes, device), torch.tensor([2, 0, 3], device=device)
        for a, b in zip(compiled(x, cuts, token, slots, pool), serve(x, cuts, token, slots, other), strict=True):
            torch.testing.assert_close(a, b)
        assert pool.lengths.tolist() == other.lengths.tolist()


class Step(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, cache):
        return self.layer.step(x, cache), cache


@options
def test_export(device, options):
    """A program of a layer's step takes a cache and gives it back, from a file too, at any length."""
    layer = RATLayer(64, 4, 2, 4, device=device)
    pool = pool_of(device, 2, **options)
    pool.allocate([0, 1], 60)
    want = pool.clone()
    x = torch.randn(2, 64, device=device)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Step(layer), (x, pool.clone())), file)
    file.seek(0)
    program = torch.export.load(file).module()
    cache = pool
    for _ in range(9):
        y, cache = program(x, cache)
        torch.testing.assert_close(y, layer.step(x, want))
        assert isinstance(cache, RATCache) and cache.length_bound <= cache.capacity
    assert cache.lengths.tolist() == pool.lengths.tolist() == [9, 9]


# ---- the layer ----------------------------------------------------------------------------------------------------------


@options
def test_layer(device, options):
    """Prefill pieces and tokens of a mixed batch, drafts and single steps, in a pool: the layer's forward."""
    layer = RATLayer(64, 4, 2, 4, device=device)
    pool = layer.new_cache(4, 60, **options)
    pool.allocate([0, 1, 2, 3], 60)
    x = torch.randn(2, 20, 64, device=device)
    whole = layer(x).detach()
    slots = torch.tensor([3, 1], device=device)
    parts = [layer(x[:, :5], cache=pool, slots=slots)]
    mixed = layer(
        torch.cat((x[:1, 5:12], x[1:, 5:6]), dim=1), cache=pool, slots=slots, cu_seqlens=cu_seqlens_of([7, 1], device)
    )  # fmt: skip
    exact = layer.step(x[1:, 6:12], pool, slots[1:], exact=True)
    parts.append(torch.cat((mixed[:, :7], torch.cat((mixed[:, 7:], exact), dim=1))))
    drafts = [layer.step(x[:, 12:15], pool, slots), layer.step(x[:, 15], pool, slots)[:, None]]
    exact_one = layer(x[:, 16], cache=pool, slots=slots, exact=True)[:, None]
    got = torch.cat([*parts, *drafts, exact_one], dim=1)
    near = {"rtol": 1e-4, "atol": 1e-4} if not pool.fp8 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(got, whole[:, :17], **near)
    assert not got.requires_grad and pool.lengths.tolist() == [0, 17, 0, 17]


@pytest.mark.slow
def test_drift(device):
    """What docs/serving.md says: errors of 100,000 steps do not add up, since each chunk begins anew."""
    tokens, dim, chunk_size = 100_000, 8, 16
    random = Random(0, device, torch.float32)
    x = {key: random.normal(1, tokens, 1, dim) for key in WIDTHS}
    cache = RATCache.empty(1, 1, dim, chunk_size, tokens, device=device)
    steps = {t: None for t in (10, 1000, tokens - 1)}
    for t in range(tokens):
        y = rat_ext.rat_decode_step(**{key: v[:, t] for key, v in x.items()}, cache=cache)
        if t in steps:
            steps[t] = y
    wide = {key: v.double() for key, v in x.items()}
    exact = rat_ext.rat_attention(**{key: v.cpu() for key, v in wide.items()}, chunk_size=chunk_size)
    for t, y in steps.items():
        error = (y.cpu().double() - exact[:, t]).abs().max() / exact[:, t].abs().max()
        assert error < 1e-5, (t, error)
