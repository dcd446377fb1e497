"""DTensor: every operator on sharded batches and heads gives what it gives on whole tensors."""

import pytest
import ranks
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

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
