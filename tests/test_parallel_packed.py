"""Packed sequences over ranks in one call of the op: what one rank computes, wherever they are cut; how little is sent."""

import functools
import itertools
import random
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import rat_ext
from rat_ext import _autograd, testing
from rat_ext.layers import RATLayer
from rat_ext.parallel import ContextParallel, packed
from rat_ext.parallel import checkpoint as checkpoints
from rat_ext.parallel.layout import Layout

# Rows that are small have more room than TOKENS_OF_A_ROW gives: all may go in one call.
ANY = functools.partial(mock.patch.object, packed, "TOKENS_OF_A_ROW", 1e-6)

# Arguments of attention_case; "one": through one projection; "cuts": by the number of pieces.
CASES = {
    "float64": dict(sequences=[40, 1, 0, 75, 30, 5], chunk_size=8),
    "bfloat16": dict(sequences=[30, 61, 0, 44, 7, 58], chunk_size=16, dtype=torch.bfloat16, heads=8),
    "float32, projection": dict(sequences=[33, 90, 8, 40], chunk_size=16, dtype=torch.float32, one=True),
    "bfloat16, projection": dict(sequences=[33, 90, 8, 40], chunk_size=4, dtype=torch.bfloat16, out_gate=False, one=True),
    "no bias, no rotation": dict(sequences=[50, 40], chunk_size=5, gate_bias=False, rotary=False, out_gate=False),
    "bfloat16, by the recurrence": dict(sequences=[30, 61, 0, 44, 7, 58], chunk_size=16, dtype=torch.bfloat16, few=0),
    "projection, by the recurrence": dict(sequences=[33, 90, 8, 40], chunk_size=16, dtype=torch.float32, one=True, few=0),
    "over all ranks": dict(sequences=[3, 200, 3], chunk_size=8),
    "over all ranks, bfloat16": dict(sequences=[3, 200, 3], chunk_size=8, dtype=torch.bfloat16, one=True),
    "one": dict(sequences=[160], chunk_size=16),
    "L = 1": dict(sequences=[20, 70, 9], chunk_size=1),
    "long chunks": dict(sequences=[60, 7, 33, 90], chunk_size=50),
    "whole sequences": dict(sequences=[24, 24, 48, 48, 24, 24], chunk_size=8, cuts=[0, 48, 96, 144, 192]),
    "short ones": dict(sequences=[1, 0, 2] * 20, chunk_size=4, dtype=torch.float32),
    "fewer tokens than pieces": dict(sequences=[2, 0, 1], chunk_size=2),
    "no tokens": dict(sequences=[0, 0], chunk_size=2),
}


def compare_all(rank: int, world: int) -> dict[str, str]:
    """By case, what went wrong, or nothing."""
    found = {}
    for name, arguments in CASES.items():
        arguments = {"dtype": ranks.EXACT, "dim": 16} | arguments
        one, cuts, few = arguments.pop("one", False), arguments.pop("cuts", None), arguments.pop("few", packed.FEW)
        case = testing.attention_case(ranks.KIND, **arguments)
        starts = list(itertools.accumulate([0, *arguments["sequences"]]))
        cp = ContextParallel(cu_seqlens=starts, cuts=cuts if cuts and len(cuts) == 2 * world + 1 else None)
        with ANY(), mock.patch.object(packed, "FEW", few):
            found[name] = ranks.what_is_wrong(case, one, cp)
    return found


@pytest.fixture(scope="module", params=[2, 3, 4])
def by_case(request, tmp_path_factory):
    return ranks.run("test_parallel_packed:compare_all", request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_does(by_case, name):
    assert not by_case[name], by_case[name]


# ---- anywhere cut -------------------------------------------------------------------------------------------------------


def layout_of(draw: random.Random, world: int) -> tuple[list[int], list[int] | None, int]:
    """cu_seqlens, cuts and a chunk size, of which many are at odds and some fall together."""
    chunk_size = draw.choice([1, 3, 8, 8, 16, 40])
    lengths = [draw.choice([0, 1, 2, 5, 8, 16, 33, 60, 120]) for _ in range(draw.randint(1, 9))]
    starts = list(itertools.accumulate([0, *lengths]))
    kind = draw.choice(["equal", "anywhere", "at sequences", "at chunks"])
    if kind == "equal":
        return starts, None, chunk_size
    places = {"anywhere": range(starts[-1] + 1), "at sequences": starts, "at chunks": range(0, starts[-1] + 1, chunk_size)}
    inner = sorted(draw.choice(places[kind]) for _ in range(2 * world - 1))
    return starts, [0, *inner, starts[-1]], chunk_size


def anywhere_cut(rank: int, world: int) -> dict[str, int]:
    """How many layouts went in one call, and how many transfers they took; all gave what the op gives."""
    draw, seen = random.Random(world), {"one call": 0, "several": 0, "no transfer": 0, "one transfer": 0, "two transfers": 0}
    send = dist.all_to_all_single
    for _ in range(40):
        starts, cuts, size = layout_of(draw, world)
        torch.manual_seed(draw.randint(0, 10**6))
        heads, dim, tokens = 4, 8, starts[-1]
        q, k = (torch.randn(1, tokens, 2, dim, dtype=ranks.EXACT) for _ in range(2))
        v, gate, out_gate, dy = (torch.randn(1, tokens, heads, dim, dtype=ranks.EXACT) for _ in range(4))
        bias = torch.randn(heads, dim, dtype=ranks.EXACT)
        leaves = [x.requires_grad_() for x in (q, k, v, gate, out_gate, bias)]
        cos, sin = rat_ext.rotary_tables(tokens // size + 1, dim, dtype=ranks.EXACT)

        def call(q, k, v, gate, out_gate, bias, size=size, cos=cos, sin=sin, **more):
            return rat_ext.rat_attention(
                q, k, v, gate, size, gate_bias=bias, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin, **more
            )

        whole = call(*leaves, cu_seqlens=torch.tensor(starts, dtype=torch.int32))
        want = torch.autograd.grad(whole, leaves, dy)
        sent: list[int] = []

        def counted(output, rows, received, parts, sent=sent, **options):
            sent.append(sum(n for to, n in enumerate(parts) if to != rank))
            return send(output, rows, received, parts, **options)

        few = mock.patch.object(packed, "FEW", draw.choice([0, 30, packed.FEW]))  # of which the op gives the states
        with ANY(), few, mock.patch.object(dist, "all_to_all_single", counted):
            cp = ContextParallel(cu_seqlens=starts, cuts=cuts)
            plan = cp._plan(cp._layout(tokens), size)
            mine = [cp.shard(x.detach()).requires_grad_() for x in leaves[:-1]] + [bias]
            runs = []
            for _ in range(2):
                y = call(*mine, context_parallel=cp)
                runs.append([y, *torch.autograd.grad(y, mine, cp.shard(dy))])
        (y, *got), again = runs
        assert all(testing.same_bits(a, b) for a, b in zip(runs[0], again, strict=True))
        assert torch.allclose(y, cp.shard(whole), rtol=0, atol=1e-12)
        dist.all_reduce(got[-1])
        for a, b in zip(got, [*map(cp.shard, want[:-1]), want[-1]], strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), (starts, cuts, size)
        seen["several" if plan is None else "one call"] += 1
        if plan is None:
            continue
        said = cp.bytes_sent(1, heads, dim, size, ranks.EXACT)
        assert sum(sent) == 2 * sum(said.values()), (starts, cuts, size)
        assert len(sent) == 4 * len(plan.ways)
        seen[("no transfer", "one transfer", "two transfers")[len(plan.ways)]] += 1
        if not plan.ways:  # each sequence is computed as it is alone
            assert testing.same_bits(y, cp.shard(whole))
    return seen


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sequences_cut_anywhere(tmp_path, world):
    seen = ranks.run("test_parallel_packed:anywhere_cut", world, tmp_path)
    assert min(seen.values()) > 0, seen


# ---- plans --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_agree_on_what_is_sent(world):
    """What one rank sends to another is what that one expects; tokens and sequences are all there, once."""
    draw = random.Random(world)
    for _ in range(200):
        starts, cuts, size = layout_of(draw, world)
        cuts = cuts or [i * starts[-1] // (2 * world) for i in range(2 * world + 1)]
        layout = Layout(world, cuts, starts)
        plans = [packed.Plan(layout, size, r, world) for r in range(world)]
        assert len({plan.fits for plan in plans}) == len({len(plan.ways) for plan in plans}) == 1
        for ways in zip(*(plan.ways for plan in plans), strict=True):
            assert all(ways[a].out[b] == ways[b].into[a] for a in range(world) for b in range(world))
            assert any(messages for way in ways for messages in way.out)
        assert sum(plan.cu_seqlens[-1] for plan in plans) == starts[-1]
        for plan in plans:
            assert len(plan.lengths) == len(plan.cu_seqlens) - 1
            for e in plan.entering:  # all chunks before the run, once
                assert plan.lengths[e.sequence] // size == sum(n for _, _, n in e.sources)
                covered = [c for _, first, n in e.sources for c in range(first, first + n)]
                assert covered == list(range(len(covered)))
                assert (e.running is not None) == (plan.lengths[e.sequence] % size > 0)


def test_the_last_rank_has_one_run():
    """Its two pieces follow each other: what crosses the cut between them is not cut."""
    layout = Layout(2, [0, 25, 50, 75, 100], [0, 10, 60, 100])
    plan = packed.Plan(layout, 8, 1, 2)
    assert plan.cu_seqlens == [0, 35, 50] and plan.lengths == [15, 0]
    assert [len(messages) for messages in plan.way.out] == [1, 0] and [len(messages) for messages in plan.way.into] == [1, 0]


def test_one_call_has_to_fit():
    """Many sequences of which one has a long past would each have its rows: then stretches are called one by one."""
    row = lambda starts: packed.Plan(Layout(2, [0, 4096, 8192, 12288, 16384], starts), 16, 0, 2)  # noqa: E731
    assert row([0, *range(1000, 15001, 1000), 16384]).fits  # rows of 1000 tokens: nearly what they have anyway
    assert not row([0, *range(10, 8000, 10), 8000, 16384]).fits  # 800 sequences beside one of 8384 tokens
    assert row([*range(0, 16385, 16)]).fits and not row([*range(0, 16385, 16)]).ways
    within = packed.Plan(Layout(2, [0, 10, 20, 30, 40], [0, 40]), 64, 0, 2)  # pieces inside one chunk: states are composed
    assert not within.fits


# ---- how much is called -------------------------------------------------------------------------------------------------


def calls_made(rank: int, world: int) -> list[dict[str, int]]:
    """Of a row in which one sequence crosses each cut, and few tokens leave a rank, or many."""
    case = testing.attention_case(ranks.KIND, torch.float32, dim=16, chunk_size=8, sequences=[110, 80, 120, 90])
    said: list[str] = []

    def noted(name, function):
        def call(*arguments, **options):
            said.append(name)
            return function(*arguments, **options)

        return call

    kernels = {name: noted(name, kernel) for name, kernel in _autograd._KERNELS.items()}
    sending = mock.patch.object(dist, "all_to_all_single", noted("send", dist.all_to_all_single))
    found = []
    with ANY(), sending, mock.patch.dict(_autograd._KERNELS, kernels):
        for few in (packed.FEW, 0):
            cp = ContextParallel(cu_seqlens=[0, 110, 190, 310, 400])
            leaves = {key: cp.shard(x).requires_grad_() if x.dim() == 4 else x for key, x in case.tensors.items()}
            options = {key: x for key, x in case.options.items() if key != "cu_seqlens"}
            with mock.patch.object(packed, "FEW", few):
                rat_ext.rat_attention(**leaves, chunk_size=8, context_parallel=cp, **options).sum().backward()
            found.append({name: said.count(name) for name in set(said)})
            said.clear()
    return found


def test_a_rank_makes_one_call(tmp_path):
    """And one more for the states of what leaves it, or a recurrence over k and v."""
    few, many = ranks.run("test_parallel_packed:calls_made", 2, tmp_path)
    back = {"rat_attention_backward": 1, "chunk_recurrence_backward": 2, "send": 2}
    assert few == {"rat_attention": 2} | back
    assert many == {"rat_attention": 1, "chunk_recurrence": 2} | back


def a_layer(rank: int, world: int) -> tuple[list[str], float]:
    """What a selective checkpoint keeps, and the largest difference of a gradient; under autocast too."""
    kept = []

    def watched(ctx, op, *args, **kwargs):
        decided = checkpoints.policy(ctx, op, *args, **kwargs)
        if decided.name == "MUST_SAVE" and not ctx.is_recompute:
            kept.append(str(op))
        return decided

    layer = RATLayer(64, 4, 2, 8).to(ranks.KIND, ranks.EXACT)
    with ANY():
        cp = ContextParallel(cu_seqlens=[0, 20, 50, 60])
        x = cp.shard(torch.randn(1, 60, 64, dtype=ranks.EXACT)).requires_grad_()
        contexts = functools.partial(create_selective_checkpoint_contexts, watched)
        run = functools.partial(layer, context_parallel=cp)
        results = [run(x), checkpoint(run, x, use_reentrant=False, context_fn=contexts)]
        results.append(checkpoint(run, x, use_reentrant=False))
        want, *others = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in results)
        with torch.autocast(ranks.KIND, torch.bfloat16):
            y = layer.float()(x.detach().float(), context_parallel=cp)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        weights = list(layer.parameters())[:1]
        (g,) = torch.autograd.grad(run(x.detach().float()).sum(), weights, create_graph=True)
        with pytest.raises(RuntimeError, match="the ops have first derivatives only"):
            g.sum().backward()
    differences = [float((a - b).abs().max()) for got in others for a, b in zip(got, want, strict=True)]
    return kept, max(differences)


def test_layers_and_checkpoints(tmp_path):
    kept, difference = ranks.run("test_parallel_packed:a_layer", 2, tmp_path)
    assert kept == ["rat_ext.rat_attention_packed.default"] and difference < 1e-12


# ---- many sequences -----------------------------------------------------------------------------------------------------


def more_than_a_grid_has_rows(rank: int, world: int) -> dict[str, float]:
    """70,000 sequences of a token or two, and as many rows of a batch, chunks of one token: differences from the op."""
    many, dim, dtype = 70_000, 8, torch.float32
    starts = list(itertools.accumulate([0, *([1, 2, 0, 1] * (many // 4))]))
    found = {}
    for name, shape, where in (("packed", (1, starts[-1]), {"cu_seqlens": starts}), ("batch", (many, 4), {"tokens": 4})):
        q, k, v, gate, dy = (torch.randn(*shape, 1, dim, dtype=dtype) for _ in range(5))
        leaves = [x.requires_grad_() for x in (q, k, v, gate)]
        cu_seqlens = torch.tensor(starts, dtype=torch.int32) if name == "packed" else None
        whole = rat_ext.rat_attention(*leaves, 1, cu_seqlens=cu_seqlens)
        want = torch.autograd.grad(whole, leaves, dy)
        cp = ContextParallel(**where)
        mine = [cp.shard(x.detach()).requires_grad_() for x in leaves]
        y = rat_ext.rat_attention(*mine, 1, context_parallel=cp)
        got = torch.autograd.grad(y, mine, cp.shard(dy))
        pairs = zip((y, *got), map(cp.shard, (whole, *want)), strict=True)
        found[name] = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return found


def test_more_sequences_than_a_grid_has_rows(tmp_path):
    assert max(ranks.run("test_parallel_packed:more_than_a_grid_has_rows", 2, tmp_path).values()) < 1e-5
