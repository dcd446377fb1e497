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
from rat_ext.cache import OutOfPages, state_dtype
from rat_ext.testing import Random, compare, cu_seqlens_of, same_bits

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
        self.dtype, self.chunk_size, self.draft, self.fp8 = dtype, chunk_size, draft, fp8
        pages = None
        if page is not None:
            pages = P * -(-(TOKENS // chunk_size) // page) // (2 if scarce else 1)
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
        max_examples=150 if long else 12, stateful_step_count=60 if long else 20, deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(lambda: Serving(device), settings=settings)
