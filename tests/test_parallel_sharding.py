"""DTensor: every operator on sharded batches and heads gives what it gives on whole tensors."""

import copy
import functools
import itertools

import pytest
import ranks
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import rat_ext
import rat_ext.parallel  # noqa: F401  (registers the rules)
from rat_ext import testing

BATCH, HEADS = "batch", "heads"


def spread(x, name: str, by: str, mesh):
    """A tensor of a case, sharded by batch or heads where it has them and they divide."""
    at = {BATCH: 0 if x.dim() != 2 else None, HEADS: {4: 2, 3: 1, 2: 0}.get(x.dim())}[by]
    if name.startswith("rotary") or (name == "lengths" and by == HEADS):
        at = None
    if name == "lengths" and by == BATCH:
        at = 0
    if name in ("chunk_k", "chunk_v") and by == HEADS:
        at = 1
    placement = Replicate() if at is None or x.shape[at] % mesh.size() else Shard(at)
    return distribute_tensor(x, mesh, [placement])


def results(case: testing.Case, spread_one=lambda name, x: x) -> tuple[dict, dict]:
    leaves = {name: spread_one(name, x.detach()).requires_grad_() for name, x in case.tensors.items()}
    options = {name: spread_one(name, x) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
    if case.state is not None:
        names = (*testing.STATE, "lengths")
        options["initial_state"] = case.state.replace(**{name: spread_one(name, getattr(case.state, name)) for name in names})
    result = getattr(rat_ext, case.op)(**leaves, chunk_size=case.chunk_size, **options)
    outputs = {"y": result[0] if isinstance(result, tuple) else result}
    if isinstance(result, tuple):
        state = result[1]
        names = () if isinstance(state, torch.Tensor) else ("running_k", "running_v")
        outputs |= {name: getattr(state, name) for name in names} or {"final_state": state}
    weight = spread_one("y", torch.linspace(-1, 1, outputs["y"].numel(), dtype=case.dtype).view(outputs["y"].shape))
    grads = torch.autograd.grad((outputs["y"] * weight).sum(), list(leaves.values()))
    return outputs, outputs | {"d" + name: g for name, g in zip(leaves, grads, strict=True)}


CASES = {
    "rat_attention": lambda groups, **more: testing.attention_case(
        "cpu", torch.float64, batch=4, tokens=20, heads=8, groups=groups, dim=8, chunk_size=4, **more
    ),
    "chunk_attention": lambda groups, **more: testing.attention_case(
        "cpu", torch.float64, op="chunk_attention", batch=4, tokens=20, heads=8, groups=groups, dim=8, chunk_size=4, **more
    ),
    "chunk_recurrence": lambda groups, **more: testing.recurrence_case(
        "cpu", torch.float64, batch=4, tokens=20, heads=8, groups=groups, dim=8, chunk_size=4, **more
    ),
}
STATES = {"plain": {}, "continued": {"lengths": [3, 8, 0, 5], "return_state": True}}


# Options of a pool, and calls on it: tokens of each of 4 rows, None for one without a dimension of tokens.
POOLS = {"plain": {}, "drafts": {"draft_tokens": 3}, "pages": {"page_chunks": 8}, "fp8": {"fp8": True, "draft_tokens": 1}}
CALLS = {"token": None, "draft": 3, "piece": 9}


def in_place(pool: rat_ext.RATCache, call: str, groups: int, slots, place) -> dict:
    """y of a call that continues a pool, and what it wrote. ``place``: (tensor, dimension of rows, of heads) to the mesh."""
    random, tokens = testing.Random(3, "cpu", torch.float32), CALLS[call]
    shape = (4,) if tokens is None else (4, tokens)
    given = {
        name: place(random.normal(*shape, n, 8), 0, len(shape)) for name, n in dict(q=groups, k=groups, v=8, gate=8).items()
    }
    running = pool.running_k.dim() - 2
    made = rat_ext.RATCache(
        place(pool.chunk_k, 0, 1),
        place(pool.chunk_v, 0, 1),
        place(pool.running_k, 0, running),
        place(pool.running_v, 0, running),
        place(pool.lengths, 0, None),
        pool.chunk_size,
        pool.length_bound,
        place(pool.decode_workspace(), None, None),
        scale_k=place(pool.scale_k, 0, 1),
        scale_v=place(pool.scale_v, 0, 1),
        page_table=place(pool.page_table, 0, None),
        error=place(pool.error, None, None),
    )
    given["slots"] = place(slots, None, None)
    if call == "piece":
        y = rat_ext.rat_attention(**given, chunk_size=pool.chunk_size, cache=made)
    else:
        y = rat_ext.rat_decode_step(**given, cache=made)
    return {"y": y, "chunk_k": made.chunk_k} | {name: getattr(made, name) for name in ("running_k", "running_v", "lengths")}


def part(by: str, rank: int, world: int, paged: bool, x, rows, heads):
    """A copy of this rank's part, and how it is placed. Entries of a pool are of all rows."""
    at = heads if by == HEADS else None if paged else rows
    if at is None or x.shape[at] % world:
        return x.clone(), Replicate()
    return x.chunk(world, at)[rank].clone(memory_format=torch.contiguous_format), Shard(at)


def every_call_in_place(rank: int, world: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for (kind, options), call, groups in itertools.product(POOLS.items(), CALLS, (1, 4)):
        paged = "page_chunks" in options
        entries = rat_ext.RATCache.empty(6 if paged else 4, 8, 8, 4, 60, **options)
        slots = torch.tensor([4, -1, 0, 2]) if paged else None
        if paged:
            entries.allocate(list(range(6)), 60)
        for name in ("chunk_k", "chunk_v"):
            getattr(entries, name).view(torch.uint8).zero_()
        with torch.no_grad():
            x = testing.Random(4, "cpu", torch.float32)
            rat_ext.rat_attention(x.normal(4, 7, 1, 8), x.normal(4, 7, 1, 8), *(x.normal(4, 7, 8, 8) for _ in range(2)), 4,
                                  cache=entries, slots=slots)  # fmt: skip
            want = in_place(copy.deepcopy(entries), call, groups, slots, lambda x, rows, heads: x)
            for by in (BATCH, HEADS):
                own = functools.partial(part, by, rank, world, paged)
                got = in_place(
                    copy.deepcopy(entries),
                    call,
                    groups,
                    slots,
                    lambda x, *at, own=own: None if x is None else DTensor.from_local(own(x, *at)[0], mesh, [own(x, *at)[1]]),
                )
                key = f"{call}, {kind}, G = {groups}, {by}"
                found[key] = ""
                at = {"y": want["y"].dim() - 2, "chunk_k": 1, "lengths": None}
                for name, x in want.items():
                    local, placement = own(x, 0, at.get(name, x.dim() - 2))
                    if got[name].placements[0] != placement:
                        found[key] += f" {name} is {got[name].placements}"
                    elif not torch.equal(got[name].to_local().contiguous().view(torch.uint8), local.view(torch.uint8)):
                        found[key] += f" {name} differs"
    return found


def written_elsewhere(rank: int, world: int) -> str:
    """A cache that no rule takes as it is."""
    mesh = init_device_mesh("cpu", (world,))
    pool = rat_ext.RATCache.empty(4, 8, 8, 4, 60)
    try:
        in_place(pool, "token", 4, None, lambda x, *at: None if x is None else distribute_tensor(x, mesh, [Shard(x.dim() - 1)]))
    except Exception as error:
        return str(error)
    return "no error"


def every_op(rank: int, world: int) -> dict[str, str]:
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for op, make in CASES.items():
        for kind, more in STATES.items():
            for groups in (1, 2, 4):
                case = make(groups, **more)
                case.tensors = {name: x.nan_to_num() for name, x in case.tensors.items()}
                if case.state is not None:
                    case.state = case.state._map(lambda x: x.nan_to_num() if x.is_floating_point() else x)
                _, want = results(case)
                for by in (BATCH, HEADS):
                    outputs, got = results(case, lambda name, x, by=by: spread(x, name, by, mesh))
                    key = f"{op}, {kind}, G = {groups}, {by}"
                    found[key] = ""
                    divides = by == BATCH or groups == 1 or groups % world == 0
                    placed = outputs["y"].placements[0]
                    if divides and placed != Shard(0 if by == BATCH else 2):
                        found[key] += f"y is {placed}"
                    for name, x in want.items():
                        if not torch.allclose(got[name].full_tensor(), x, rtol=1e-9, atol=1e-9):
                            found[key] += f" {name} differs"
    return found


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(request, tmp_path_factory):
    return ranks.run("test_parallel_sharding:every_op", request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("op", CASES)
def test_sharded_ops(of_ranks, op):
    mine = {key: wrong for key, wrong in of_ranks.items() if key.startswith(op)}
    assert len(mine) == 12
    assert not any(mine.values()), {key: wrong for key, wrong in mine.items() if wrong}


def test_calls_in_place(tmp_path):
    found = ranks.run("test_parallel_sharding:every_call_in_place", 2, tmp_path)
    assert len(found) == 48
    assert not any(found.values()), {key: wrong for key, wrong in found.items() if wrong}


def test_a_cache_is_not_moved(tmp_path):
    """Else a copy of it would be written."""
    assert "cache: expected tensors sharded by heads" in ranks.run("test_parallel_sharding:written_elsewhere", 2, tmp_path)
