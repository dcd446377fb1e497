"""Context parallelism: the ranks together compute what one computes, outputs, states and gradients, by the rounding rule."""

import doctest
import functools
import importlib
import itertools
import re
from unittest import mock

import hypothesis
import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import rat_ext
from rat_ext import _autograd, testing
from rat_ext.layers import RATLayer
from rat_ext.parallel import ContextParallel, attention, use_context_parallel
from rat_ext.parallel.exchange import Exchange
from rat_ext.parallel.layout import Layout
from rat_ext.parallel.parts import Parts

# Arguments of attention_case, or recurrence_case. "ranks": sizes from the local tokens alone. "one": through one projection.
CASES = {
    "even": dict(tokens=192, chunk_size=16),
    "odd": dict(tokens=173, chunk_size=7),
    "float32": dict(tokens=150, chunk_size=8, dtype=torch.float32),
    "bfloat16": dict(tokens=203, chunk_size=16, dtype=torch.bfloat16, heads=8),
    "projection": dict(tokens=131, chunk_size=16, dtype=torch.float32, one=True),
    "state": dict(tokens=149, chunk_size=9, return_state=True),
    "state, projection": dict(tokens=100, chunk_size=4, return_state=True, out_gate=False, one=True),
    "no bias, no rotation": dict(tokens=90, chunk_size=5, gate_bias=False, rotary=False, out_gate=False),
    "L = 1": dict(tokens=61, chunk_size=1),
    "pieces inside chunks": dict(tokens=100, chunk_size=40, return_state=True),
    "an RNN": dict(tokens=77, chunk_size=1000),
    "fewer tokens than pieces": dict(tokens=3, chunk_size=2),
    "no tokens": dict(tokens=0, chunk_size=2),
    "packed": dict(sequences=[40, 1, 0, 75, 30, 5], chunk_size=8),
    "packed, one long": dict(sequences=[11, 150, 11], chunk_size=8, dtype=torch.bfloat16, one=True),
    "packed, long chunks": dict(sequences=[60, 7, 33], chunk_size=50),
    "packed, state": dict(sequences=[33, 1, 0, 90, 7, 20], chunk_size=8, return_state=True),
    "packed, state, in long chunks": dict(sequences=[50, 30, 0], chunk_size=40, return_state=True, one=True),
    "recurrence, packed, state": dict(sequences=[20, 0, 60, 9], chunk_size=16, op="chunk_recurrence", return_state=True),
    "packed at the cuts": dict(sequences=[24, 24, 48, 48], chunk_size=8),
    "recurrence": dict(tokens=117, chunk_size=12, op="chunk_recurrence", dtype=torch.float32),
    "recurrence, one chunk": dict(tokens=85, chunk_size=999, op="chunk_recurrence", return_state=True),
    "recurrence, packed": dict(sequences=[20, 60, 9], chunk_size=999, op="chunk_recurrence"),
    "all in one piece": dict(tokens=64, chunk_size=8),
    "cuts inside a chunk": dict(tokens=64, chunk_size=8, return_state=True),
}


def make(name: str, world: int) -> tuple[testing.Case, ContextParallel, bool]:
    arguments = {"dtype": ranks.EXACT, "dim": 16} | CASES[name]
    one = arguments.pop("one", False)
    if arguments.get("op") == "chunk_recurrence":
        case = testing.recurrence_case(ranks.KIND, **{key: x for key, x in arguments.items() if key != "op"})
    else:
        case = testing.attention_case(ranks.KIND, **arguments)
    pieces = 2 * world
    where: dict = {"tokens": arguments.get("tokens")}
    if name == "even":
        where = {}
    elif "sequences" in arguments:
        where = {"cu_seqlens": list(itertools.accumulate([0, *arguments["sequences"]]))}
    elif name == "all in one piece":
        where = {"cuts": [0] * (pieces - 1) + [64] * 2}
    elif name == "cuts inside a chunk":  # with empty pieces between
        where = {"cuts": [0, 9, 9, 11, *[12] * (pieces - 4), 64]}
    return case, ContextParallel(**where), one


def compare_all(rank: int, world: int) -> dict[str, str]:
    """By case, what went wrong, or nothing."""
    found = {}
    for name in CASES:
        case, cp, one = make(name, world)
        found[name] = ranks.what_is_wrong(case, one, cp)
    return found


@pytest.fixture(scope="module", params=[2, 3, 4])
def by_case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return ranks.run("test_parallel_context:compare_all", request.param, folder)


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_does(by_case, name):
    assert not by_case[name], by_case[name]


def order_of_backward(rank: int, world: int) -> list[list[str]]:
    """What the backward calls, by rank."""
    said: list[str] = []

    def noted(name, function):
        def call(*arguments):
            said.append(name)
            return function(*arguments)

        return call

    case = testing.attention_case(ranks.KIND, ranks.EXACT, batch=1, tokens=192, chunk_size=16, dim=16)
    cp, op, kernels = ContextParallel(tokens=192), _autograd._DIFFERENTIABLE["rat_attention"], _autograd._KERNELS
    leaves = {key: cp.shard(x).requires_grad_() if x.dim() == 4 else x for key, x in case.tensors.items()}
    scan = noted("recurrence", kernels["chunk_recurrence_backward"])
    with (
        mock.patch.object(Exchange, "send", noted("send", Exchange.send)),
        mock.patch.object(op, "backward_kernel", noted("attention", op.backward_kernel)),
        mock.patch.object(op, "brief_backward_kernel", noted("attention", op.brief_backward_kernel)),
        mock.patch.dict(kernels, chunk_recurrence_backward=scan),
    ):
        y = rat_ext.rat_attention(**leaves, chunk_size=16, context_parallel=cp, **case.options)
        said.clear()
        y.sum().backward()
    found: list = [None] * world
    dist.all_gather_object(found, said)
    return found


def test_gradients_are_sent_after_attention(tmp_path):
    """Ranks come to the end of attention at the same time, and to that of one piece at unlike times."""
    found = ranks.run("test_parallel_context:order_of_backward", 2, tmp_path)
    before = ["attention"] * 2 + ["send"] * 2
    assert found == [before + ["recurrence"] * 2, before + ["recurrence"] * 4]  # of k and v of each piece but the last


# ---- layers and models --------------------------------------------------------------------------------------------------


def model_of_ranks(rank: int, world: int) -> dict[str, float]:
    """Largest differences of logits and gradients from those of one rank, with and without checkpoints; bytes that left."""
    tokens, sizes = 90, (32, 64, 2, 4, 2, 8)
    model = ranks.model_of(*sizes).to(ranks.EXACT)
    batch = torch.randint(0, 32, (2, tokens))
    weight = torch.randn(2, tokens, 32, dtype=ranks.EXACT)
    whole = model(batch)
    want = torch.autograd.grad((whole * weight).sum(), list(model.parameters()))
    cp = ContextParallel(tokens=tokens)
    assert use_context_parallel(model, cp) == 2
    found = {}
    for name in ("plain", "checkpointed"):
        sent = []
        with mock.patch.object(dist, "all_to_all_single", count_bytes(dist.all_to_all_single, rank, sent)):
            run = functools.partial(checkpoint, model, use_reentrant=False) if name == "checkpointed" else model
            y = run(cp.shard(batch))
            forward = sum(sent)
            got = torch.autograd.grad((y * cp.shard(weight)).sum(), list(model.parameters()))
        for g in got:
            dist.all_reduce(g)
        found[f"{name} y"] = float((y - cp.shard(whole)).abs().max())
        found[f"{name} gradients"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))
        said = cp.bytes_sent(2, 4, 16, 8, ranks.EXACT)
        back = said.pop("backward")
        expected = 2 * sum(said.values()), 2 * (sum(said.values()) * (2 if name == "checkpointed" else 1) + back)
        found[f"{name} bytes"] = abs(forward - expected[0]) + abs(sum(sent) - expected[1])
    layer, sent = RATLayer(64, 4, 2, 40).to(ranks.EXACT), []  # of which a piece lies inside one chunk: states are composed
    with mock.patch.object(dist, "all_to_all_single", count_bytes(dist.all_to_all_single, rank, sent)), torch.no_grad():
        layer(cp.shard(torch.randn(2, tokens, 64, dtype=ranks.EXACT)), context_parallel=cp)
    said = cp.bytes_sent(2, 4, 16, 40, ranks.EXACT)
    found["composed bytes"] = abs(sum(sent) - sum(said.values()) + said["backward"])
    return found


def count_bytes(function, rank: int, sent: list[int]):
    """``all_to_all_single`` that notes the bytes it sends to other ranks."""

    def call(output, rows, received, parts, **options):
        width = rows[0].numel() if rows.shape[0] else 0
        sent.append(sum(n for to, n in enumerate(parts) if to != rank) * width)
        return function(output, rows, received, parts, **options)

    return call


def test_a_model_on_ranks(tmp_path):
    for name, difference in ranks.run("test_parallel_context:model_of_ranks", 3, tmp_path).items():
        assert difference < 1e-12, name


def under_autocast(rank: int, world: int) -> bool:
    layer, cp = RATLayer(64, 4, 2, 8), ContextParallel(tokens=75)
    x = torch.randn(2, 75, 64)
    with torch.autocast(ranks.KIND, torch.bfloat16):
        whole, y = layer(x), layer(cp.shard(x), context_parallel=cp)
    y.sum().backward()
    return y.dtype == torch.bfloat16 and torch.allclose(cp.gather(y), whole, rtol=2e-2, atol=2e-2)


def test_autocast(tmp_path):
    assert ranks.run("test_parallel_context:under_autocast", 2, tmp_path)


# ---- attention of hybrids -----------------------------------------------------------------------------------------------

DENSE = {
    "all": ([90], None, 4),
    "groups": ([90], None, 2),
    "window": ([90], 17, 4),
    "a window over pieces": ([70], 40, 4),
    "blocks of queries": ([300], 9, 4),
    "packed": ([40, 3, 0, 60, 10], None, 4),
    "packed, window": ([40, 3, 60, 10], 9, 2),
}


def dense_on_ranks(rank: int = 0, world: int = 1) -> dict[str, float]:
    found = {}
    for name, (sequences, window, groups) in DENSE.items():
        starts, tokens = list(itertools.accumulate([0, *sequences])), sum(sequences)
        cp = ContextParallel(cu_seqlens=starts)
        q, k, v, dy = (torch.randn(1, tokens, n, 8, dtype=ranks.EXACT) for n in (4, groups, groups, 4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        place = torch.arange(tokens)
        sequence = torch.bucketize(place, torch.tensor(starts[1:]), right=True)
        back = place[:, None] - place
        mask = (back >= 0) & (sequence[:, None] == sequence) & (back <= (tokens if window is None else window))
        whole = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), mask, enable_gqa=True).transpose(1, 2)
        want = torch.autograd.grad(whole, leaves, dy)
        y = attention(*(cp.shard(x) for x in leaves), cp, window=window)
        assert tuple(y.shape) == tuple(cp.shard(dy).shape)
        got = [cp.gather(cp.shard(g)) for g in torch.autograd.grad(y, leaves, cp.shard(dy))]
        differences = [float((a - b).abs().max()) for a, b in zip((cp.gather(y), *got), (whole, *want), strict=True)]
        found[name] = max(differences)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_attention_of_hybrids(tmp_path, world):
    for name, difference in ranks.run("test_parallel_context:dense_on_ranks", world, tmp_path).items():
        assert difference < 1e-12, name


def test_attention_of_one_rank():
    assert max(dense_on_ranks().values()) < 1e-12


@pytest.mark.parametrize("window", [None, 17])
def test_scale_of_attention(window):
    """Of queries that are as much larger the scores are the same."""
    q, k, v = (torch.randn(1, 90, 2, 16, dtype=torch.float64) for _ in range(3))
    cp = ContextParallel(cu_seqlens=[0, 20, 90])
    y = attention(q, k, v, cp, window=window, scale=0.5)
    torch.testing.assert_close(y, attention(2 * q, k, v, cp, window=window))  # by default 1 / 4


def test_arguments_of_attention():
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    cp = ContextParallel(tokens=9)
    whole = attention(q, k, v, cp)
    assert torch.equal(whole, attention(q, k, v, cp, window=np.int64(8), scale=np.float64(8**-0.5)))
    torch.testing.assert_close(attention(q, k, v, cp, window=0), v)  # a token sees itself alone
    assert not torch.allclose(whole, attention(q, k, v, cp, window=7))
    for options, words in (
        ({"window": -1}, "window: expected at least 0 or None, got -1"),
        ({"window": 1.5}, "window: expected an int, got float 1.5"),
        ({"window": True}, "window: expected an int, got bool True"),
        ({"scale": "x"}, "scale: expected a float or None, got str 'x'"),
    ):
        with pytest.raises(ValueError, match=f"attention: {words}$"):
            attention(q, k, v, cp, **options)


# ---- a process alone ----------------------------------------------------------------------------------------------------


def test_one_rank_is_the_op(device):
    case = testing.attention_case(device, torch.float32, tokens=50, chunk_size=8)
    cp = ContextParallel(tokens=50)
    want, got = (rat_ext.rat_attention(**case.tensors, chunk_size=8, context_parallel=c, **case.options) for c in (None, cp))
    assert testing.same_bits(want, got) and testing.same_bits(cp.gather(cp.shard(want)), want)
    assert cp.gather(want).data_ptr() != want.data_ptr()  # the caller's own, as on several ranks
    packed = ContextParallel(cu_seqlens=torch.tensor([0, 20, 50]))
    one = {key: x[:1] if x.dim() == 4 else x for key, x in case.tensors.items()}
    got = rat_ext.rat_attention(**one, chunk_size=8, context_parallel=packed, **case.options)
    cu_seqlens = torch.tensor([0, 20, 50], dtype=torch.int32, device=device)
    assert testing.same_bits(got, rat_ext.rat_attention(**one, chunk_size=8, cu_seqlens=cu_seqlens, **case.options))
    assert packed.positions(device=device).tolist() == [*range(20), *range(30)]


@pytest.mark.parametrize("module", ["checkpoint", "context", "heads"])
def test_docstring_examples(module):
    found = doctest.testmod(importlib.import_module(f"rat_ext.parallel.{module}"))
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        ({}, {"tokens": 60}, "context_parallel: expected 60 tokens on rank 0 of 1, got 50"),
        ({"cu_seqlens": torch.tensor([0, 50])}, {}, "cu_seqlens: expected None beside context_parallel, which takes them"),
        ({"initial_state": 3}, {}, "initial_state: expected None beside context_parallel, got int"),
        ({"rotary_cos": torch.ones(3, 16), "rotary_sin": torch.ones(3, 16)}, {}, "rotary_cos: expected at least 7 rows"),
        ({"rotary_cos": None}, {}, "rotary_cos, rotary_sin: expected both or neither"),
        ({"chunk_size": 0}, {}, "chunk_size: expected at least 1, got 0"),
        ({"chunk_size": 8.7}, {}, "chunk_size: expected an int, got float 8.7"),
        ({"chunk_size": None}, {}, "chunk_size: expected an int, got None"),
        ({}, {"cu_seqlens": [0, 50]}, "context_parallel: expected B = 1 for packed sequences, got 2"),
        ({"return_state": True}, {"cuts": [0, 50, 50]}, "return_state: expected False where the last piece of context_par"),
    ],
)
def test_wrong_calls(change, where, message):
    case = testing.attention_case("cpu", torch.float32, tokens=50, chunk_size=8)
    arguments = {"chunk_size": 8, "context_parallel": ContextParallel(**where)} | case.tensors | case.options | change
    with pytest.raises(ValueError, match=f"^rat_ext.rat_attention: {message}"):
        rat_ext.rat_attention(**arguments)


# Tensors of 24 tokens on each rank, heads 4, groups 2, heads of 8; chunks of 10, so 5 of them in all.
MISFITS = {
    "k: expected shape (2, 24, 2, 8), got (2, 23, 2, 8)": {"k": (2, 23, 2, 8)},
    "k: expected 4 dimensions (B, T, G, D), got shape (24, 2, 8)": {"k": (24, 2, 8)},
    "gate: expected shape (2, 24, 4, 8), got (2, 24, 2, 8)": {"gate": (2, 24, 2, 8)},
    "out_gate: expected shape (2, 24, 4, 8), got (2, 24, 4, 4)": {"out_gate": (2, 24, 4, 4)},
    "rotary_sin: expected shape (5, 4), got (2, 4)": {"rotary_sin": (2, 4)},
    "rotary_sin: expected shape (5, 4), got (5, 3)": {"rotary_sin": (5, 3)},
}


def misfits(rank: int, world: int) -> dict[str, str]:
    """What calls whose tensors do not fit each other, alike on all ranks, end in."""
    cp, found = ContextParallel(tokens=48), {}
    for message, change in MISFITS.items():
        shapes = dict(
            q=(2, 24, 2, 8), k=(2, 24, 2, 8), v=(2, 24, 4, 8), gate=(2, 24, 4, 8), rotary_cos=(5, 4), rotary_sin=(5, 4)
        )
        tensors = {name: torch.ones(shape, device=ranks.KIND) for name, shape in (shapes | change).items()}
        try:
            rat_ext.rat_attention(**tensors, chunk_size=10, context_parallel=cp)
            found[message] = "nothing was said"
        except ValueError as error:
            found[message] = str(error)
    return found


def test_tensors_that_do_not_fit(tmp_path):
    """Told before any transfer: else ranks wait for each other."""
    found = ranks.run("test_parallel_context:misfits", 2, tmp_path, timeout=60)
    assert found == {message: f"rat_ext.rat_attention: {message}" for message in MISFITS}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"cuts": [0, 5]}, "cuts: expected 3 numbers from 0 to T that never fall, got"),
        ({"cuts": [0, 7, 5]}, "cuts: expected"),
        ({"cuts": [0, 3, 5], "tokens": 6}, "cuts: expected 3 numbers from 0 to 6"),
        ({"cu_seqlens": [1, 5]}, "cu_seqlens: expected numbers that begin at 0 and never fall"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, "cu_seqlens: expected numbers"),
        ({"cu_seqlens": [0, 5], "tokens": 6}, "tokens: expected the end of cu_seqlens, 5, got 6"),
        ({"cu_seqlens": [0, 5.7]}, "cu_seqlens: expected an int, got float 5.7"),
        ({"cu_seqlens": "x"}, "cu_seqlens: expected a list or 1-D tensor of ints, got str"),
        ({"cu_seqlens": 5}, "cu_seqlens: expected a list or 1-D tensor of ints, got int"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens: expected a list or .* got int64 of shape \(1, 2\)"),
        ({"cu_seqlens": torch.tensor([0.0, 5.5])}, "cu_seqlens: expected a list or 1-D tensor of ints, got float32"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32, device="meta")}, "cu_seqlens: expected a list .* on meta"),
        ({"cuts": [0, 2.5, 5]}, "cuts: expected an int, got float 2.5"),
        ({"cuts": 5}, "cuts: expected a list or 1-D tensor of ints, got int"),
        ({"tokens": -3}, "tokens: expected at least 0, got -3"),
        ({"tokens": 2.5}, "tokens: expected an int, got float 2.5"),
        ({"tokens": "x"}, "tokens: expected an int, got str 'x'"),
        ({"tokens": True}, "tokens: expected an int, got bool True"),
    ],
)
def test_wrong_layouts(where, message):
    with pytest.raises(ValueError, match=f"^rat_ext.ContextParallel: {message}"):
        ContextParallel(**where)


X = torch.zeros(2, 20, 4, 8)
WRONG_USE = {
    "ContextParallel.shard: x: expected a tensor, got str": lambda cp: cp.shard("x"),
    r"ContextParallel.shard: dim: expected a dimension of shape \(2, 20, 4, 8\), got 7": lambda cp: cp.shard(X, 7),
    "ContextParallel.gather: dim: expected an int, got str '1'": lambda cp: cp.gather(X, "1"),
    "ContextParallel.gather: dim: expected a dimension .*, got -5": lambda cp: cp.gather(X, -5),
    "ContextParallel: tokens: expected at least 0, got -5": lambda cp: cp.positions(-5),
    "ContextParallel: tokens: expected an int, got str 'x'": lambda cp: cp.length("x"),
    "ContextParallel.bytes_sent: chunk_size: expected at least 1, got 0": lambda cp: cp.bytes_sent(1, 2, 8, 0, torch.float32),
    "ContextParallel.bytes_sent: dtype: expected .*, got str 'x'": lambda cp: cp.bytes_sent(1, 2, 8, 4, "x"),
    "attention: window: expected at least 0 or None, got -1": lambda cp: attention(X, X, X, cp, window=-1),
    "attention: window: expected an int, got float 2.5": lambda cp: attention(X, X, X, cp, window=2.5),
    "attention: window: expected an int, got bool True": lambda cp: attention(X, X, X, cp, window=True),
    "attention: scale: expected a float or None, got str 'x'": lambda cp: attention(X, X, X, cp, scale="x"),
    "attention: q: expected a tensor of 4 dimensions, got str": lambda cp: attention("x", X, X, cp),
    r"attention: v: expected a tensor of 4 dimensions, got shape \(20, 4, 8\)": lambda cp: attention(X, X, X[0], cp),
    "attention: k: expected dtype torch.float32, that of q, got torch.float16": lambda cp: attention(X, X.half(), X, cp),
    "attention: v: expected device cpu, that of q, got meta": lambda cp: attention(X, X, X.to("meta"), cp),
    r"attention: k: expected shape \(2, 20, 4, 8\), got": lambda cp: attention(X, X[:, :3], X, cp),
    r"attention: v: expected shape \(2, 20, 2, 8\), got": lambda cp: attention(X, X[:, :, :2], X, cp),
    "attention: k: expected a number of groups that divides the 4 heads, got 3": lambda cp: attention(
        X, X[:, :, :3], X[:, :, :3], cp
    ),
    "attention: context_parallel: expected one, got int": lambda cp: attention(X, X, X, 3),
    "use_context_parallel: model: expected a module, got str": lambda cp: use_context_parallel("x", cp),
    "use_context_parallel: context_parallel: expected one or None, got str": lambda cp: use_context_parallel(
        RATLayer(64, 4, 2, 8), "x"
    ),
}


@pytest.mark.parametrize("words", WRONG_USE)
def test_wrong_use(words):
    with pytest.raises(ValueError, match=f"^rat_ext.{words}"):
        WRONG_USE[words](ContextParallel(tokens=20))


@pytest.mark.parametrize("used", ["abcd", "dcba", "b", "d", "bd", "db", "a", "cc"])
def test_gradients_of_parts_meet_in_one_buffer(used):
    """Whichever part's gradient comes first, and whether a stretch gets one at all."""
    x = torch.randn(2, 10, 6, requires_grad=True)
    views = {
        "a": (lambda y: y[:, :4], (0, 4)),
        "b": (lambda y: y[:, 5:8], (5, 3)),
        "c": (lambda y: y[:, 4:], (4, 6)),
        "d": (lambda y: y[:, 1:3, 2:].unflatten(-1, (2, 2)), (1, 2, (2, 2, 2))),
    }
    weights = {name: torch.randn(view(x).shape) for name, (view, _) in views.items()}
    want = torch.autograd.grad(sum((views[name][0](x) * weights[name]).sum() for name in used), x)[0]
    parts = Parts(x, [0, 4, 4, 10])
    loss = sum((parts.part(*views[name][1]) * weights[name]).sum() for name in used)
    for _ in range(2):  # the buffer begins anew
        got = torch.autograd.grad(loss, x, retain_graph=True)[0]
        torch.testing.assert_close(got, want)


def kept_by_checkpoints(rank: int, world: int) -> tuple[list[str], list[float]]:
    """The operators whose results a checkpoint keeps of a layer, by its policy; and the largest difference of a gradient."""
    from rat_ext.parallel.checkpoint import policy

    cp, kept = ContextParallel(tokens=60), []

    def watched(ctx, op, *args, **kwargs):
        decided = policy(ctx, op, *args, **kwargs)
        if decided.name == "MUST_SAVE" and not ctx.is_recompute:
            kept.append(str(op))
        return decided

    layer = RATLayer(64, 4, 2, 8).to(ranks.KIND, ranks.EXACT)
    x = cp.shard(torch.randn(1, 60, 64, dtype=ranks.EXACT)).requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, watched)
    run = functools.partial(layer, context_parallel=cp)
    results = run(x), checkpoint(run, x, use_reentrant=False, context_fn=contexts)
    want, got = (torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in results)
    return kept, [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]


def test_checkpoints_keep_what_the_op_gave_alone(tmp_path):
    """Not the states of all tokens, which make the chunk states: they are twice as large as its result."""
    kept, differences = ranks.run("test_parallel_context:kept_by_checkpoints", 2, tmp_path)
    assert kept == ["rat_ext.rat_attention_packed.default"] * 2
    assert max(differences) < 1e-12


# ---- uses that every rank has to go through alike -------------------------------------------------------------------------

SEVERAL = [0, *range(3, 200, 3), 300]  # more sequences than go in one call
USES = {
    "a rank without tokens": (dict(tokens=300, cuts="empty"), "qkvgob", False, None),
    "one token": (dict(tokens=1), "qkvgob", False, None),
    "a rank without tokens, q alone": (dict(tokens=300, cuts="empty"), "q", False, None),
    "a rank without tokens, checkpoint": (dict(tokens=300, cuts="empty"), "qkvgob", False, "checkpoint"),
    "states, q alone": (dict(cu_seqlens=[0, 300]), "q", True, None),
    "states, out_gate alone": (dict(cu_seqlens=[0, 30, 300]), "o", True, None),
    "states, k alone": (dict(cu_seqlens=[0, 300]), "k", True, None),
    "inference before, one call": (dict(cu_seqlens=[0, 110, 190, 300]), "qkvgob", False, "inference"),
    "inference before, several calls": (dict(cu_seqlens=SEVERAL), "qkvgob", False, "inference"),
}


def by_values(call, names, cp, *values):
    return call(dict(zip(names, values, strict=True)), context_parallel=cp)


def use(rank: int, world: int) -> dict[str, str]:
    """By use, what is wrong with the gradients of this rank's tokens, or nothing."""
    found, of = {}, {"dtype": ranks.EXACT, "device": ranks.KIND}
    near = 1e-9 if ranks.EXACT == torch.float64 else 1e-3
    for name, (where, wanted, returned, how) in USES.items():
        if where.get("cuts"):
            where = where | {"cuts": [0, 100, *[100] * (2 * world - 2), 300]}
        cp = ContextParallel(**where)
        torch.manual_seed(0)
        shapes = {"q": 2, "k": 2, "v": 4, "g": 4, "o": 4}
        whole = {key: torch.randn(1, cp.tokens, n, 16, **of) for key, n in shapes.items()}
        whole["b"] = torch.randn(4, 16, **of)

        def call(x, **more):
            return rat_ext.rat_attention(x["q"], x["k"], x["v"], x["g"], 8, out_gate=x["o"], gate_bias=x["b"], **more)

        leaves = {key: x.clone().requires_grad_(key in wanted) for key, x in whole.items()}
        cu_seqlens = torch.tensor(where.get("cu_seqlens", [0, cp.tokens]), dtype=torch.int32, device=ranks.KIND)
        call(leaves, cu_seqlens=cu_seqlens).sum().backward()
        mine = {key: (x if key == "b" else cp.shard(x)).clone().requires_grad_(key in wanted) for key, x in whole.items()}
        if how == "inference":
            with torch.inference_mode():
                call(mine, context_parallel=cp)
        if how == "checkpoint":
            run = functools.partial(by_values, call, list(mine), cp)
            y = checkpoint(run, *mine.values(), use_reentrant=False)
        else:
            y = call(mine, context_parallel=cp, return_state=returned)
        (y[0] if returned else y).sum().backward()
        wrong = []
        for key in wanted:
            got, want = mine[key].grad, leaves[key].grad
            if got is None:
                wrong.append(f"{key}: none")
                continue
            if key == "b":
                dist.all_reduce(got)
            wrong += [] if torch.allclose(got, want if key == "b" else cp.shard(want), atol=near, rtol=near) else [key]
        found[name] = ", ".join(wrong)
    everyone: list = [None] * world
    dist.all_gather_object(everyone, found)
    return {name: "; ".join(filter(None, (f[name] for f in everyone))) for name in USES}


@pytest.mark.parametrize("world", [2, 3])
def test_uses_that_all_ranks_go_through_alike(tmp_path, world):
    """No gradient is missing on a rank, and no rank leaves the others waiting."""
    assert ranks.run("test_parallel_context:use", world, tmp_path) == dict.fromkeys(USES, "")


def test_types_are_told_before_anything_is_sent():
    x, cp = torch.randn(1, 8, 2, 16), ContextParallel(tokens=8)
    for change, message in (
        ({"k": None}, "rat_ext.rat_attention: k: expected a tensor, got None"),
        ({"gate": None}, "rat_ext.rat_attention: gate: expected a tensor, got None"),
        ({"return_state": "x"}, "rat_ext.rat_attention: return_state: "),
        (
            {"gate_bias": torch.ones(2, 16, dtype=torch.int32)},
            "rat_ext.rat_attention: gate_bias: expected a floating dtype, got int32",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rat_ext.rat_attention(**{"q": x, "k": x, "v": x, "gate": x, "chunk_size": 4} | change, context_parallel=cp)


@hypothesis.given(
    sizes=st.integers(1, 3).flatmap(lambda w: st.lists(st.integers(0, 7), min_size=2 * w, max_size=2 * w)),
    lengths=st.none() | st.lists(st.integers(0, 20), max_size=9),
    chunk_size=st.integers(1, 6),
)
def test_pieces_of_a_row_by_counting(sizes, lengths, chunk_size):
    """Whatever a layout says of its pieces is what one finds by looking at each token."""
    cuts = [0, *itertools.accumulate(sizes)]
    inner = [] if lengths is None else [n for n in itertools.accumulate(lengths) if n < cuts[-1]]
    layout = Layout(len(sizes) // 2, cuts, None if lengths is None else [0, *inner, cuts[-1]])
    sequences = [(a, b) for a, b in itertools.pairwise([0, *inner, cuts[-1]]) if a < b]
    for p, piece in enumerate(layout.pieces):
        crossed = [(a, b) for a, b in sequences if a < piece.begin < b]
        assert [piece.inward] == (crossed or [None])
        start = crossed[0][0] if crossed else piece.begin
        opened = piece.begin - (piece.begin - start) % chunk_size
        for found, since in ((layout.earlier(p), start), (layout.chain(p, chunk_size), opened)):
            held = [q for q in range(p) if any(since <= t < piece.begin for t in range(cuts[q], cuts[q + 1]))]
            assert found == held
        ended = [(b - a, int(a >= piece.begin)) for a, b in sequences if piece.begin < b <= piece.end]
        assert [found[:2] for found in piece.ending()] == ended
        states = piece.states(chunk_size)
        left = [a for a, b in sequences if a < piece.end < b]
        assert (states is None) == (not left)
        if states is None:
            continue
        held = [t - left[0] for t in range(max(piece.begin, left[0]), piece.end)]
        closing = [t // chunk_size for t in held if (t + 1) % chunk_size == 0]
        assert states.before + len(held) == piece.tokens
        assert states.head + states.whole * chunk_size + states.tail == len(held)
        assert (states.closed, states.open) == (len(closing), (piece.end - left[0]) % chunk_size)
        if closing:
            assert states.first == closing[0]
        if held:
            assert states.offset == held[0] % chunk_size and states.through == (bool(states.offset) and not closing)
