"""Tensor parallelism: a model split by heads computes what it computes whole, and decodes."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from rat_ext.layers import RATLayer
from rat_ext.parallel import full_state_dict, parallelize_plan, share_copies


def decoded(layer: RATLayer, x: torch.Tensor) -> torch.Tensor:
    """Some tokens by a forward, then one by one."""
    y, state = layer(x[:, :11], return_state=True)
    cache = state.reserve(x.shape[1])
    return torch.cat((y, torch.stack([layer.step(x[:, t], cache) for t in range(11, x.shape[1])], dim=1)), dim=1)


def split_model(rank: int, world: int) -> dict[str, float]:
    mesh = init_device_mesh(ranks.KIND, (world,))
    found = {}
    for groups in (1, 2, 4):
        whole = ranks.model_of(32, 64, 2, 8, groups, 8).to(ranks.EXACT)
        if groups < 4:  # biases, which no layer of ours has by itself
            for block in whole[1:3]:
                for linear in (block.rat.in_proj, block.rat.out_proj):
                    linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, dtype=ranks.EXACT))
        model = parallelize_module(copy.deepcopy(whole), mesh, parallelize_plan(whole))
        local = model[1].rat
        assert (local.num_heads, local.num_groups) == (8 // world, max(groups // world, 1))
        assert isinstance(local.gate_bias, DTensor) and local.gate_bias.to_local().shape[0] == 8 // world
        state = full_state_dict(model)
        found[f"G = {groups}, state"] = max(float((state[name] - x).abs().max()) for name, x in whole.state_dict().items())
        tokens = torch.randint(0, 32, (2, 30))
        weight = torch.randn(2, 30, 32, dtype=ranks.EXACT)
        want, got = whole(tokens), model(tokens)
        found[f"G = {groups}, logits"] = float((got - want).detach().abs().max())
        (want * weight).sum().backward()
        (got * weight).sum().backward()
        with torch.no_grad():  # a step: copies of a group stay alike, and weights come out as they would
            for parameters in (whole.parameters(), model.parameters()):
                for p in parameters:
                    p -= 0.1 * p.grad
        state = full_state_dict(model)
        found[f"G = {groups}, step"] = max(float((state[name] - x).abs().max()) for name, x in whole.state_dict().items())
        weight = model[2].rat.in_proj.weight.full_tensor()
        rows = model[2].rat.rank_rows
        back = torch.empty(int(rows.max()) + 1, 64, dtype=ranks.EXACT)
        back[rows] = weight
        found[f"G = {groups}, copies"] = float((back[rows] - weight).abs().max())
        x = torch.randn(2, 20, 64, dtype=ranks.EXACT)
        with torch.no_grad():
            layers = whole[1].rat, model[1].rat
            want, got = (decoded(layer, x) for layer in layers)
        found[f"G = {groups}, decoded"] = float((got - want).abs().max())
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_a_model_split_by_heads(tmp_path, world):
    for name, difference in ranks.run("test_parallel_heads:split_model", world, tmp_path).items():
        assert difference < 1e-10, name


def split_and_sharded(rank: int, world: int) -> dict[str, float]:
    """By heads over two ranks, of which each has the one group, and FSDP2 over two."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.KIND, (2, 2), mesh_dim_names=("data", "heads"))
    whole = ranks.model_of(32, 64, 2, 8, 1, 8).to(ranks.EXACT)
    model = parallelize_module(copy.deepcopy(whole), mesh["heads"], parallelize_plan(whole))
    for block in model[1:3]:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    tokens = torch.randint(0, 32, (2, 30))
    for m in (whole, model):
        m(tokens).logsumexp(-1).sum().backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    state = full_state_dict(model)
    return {name: float((state[name] - x).abs().max()) for name, x in whole.state_dict().items()}


def test_beside_fsdp2(tmp_path):
    for name, difference in ranks.run("test_parallel_heads:split_and_sharded", 4, tmp_path).items():
        assert difference < 1e-10, name


def drawn_after(rank: int, world: int) -> list[bool]:
    """Whether the copies of the one group are alike, before :func:`share_copies` and after, on their mesh and beside FSDP2."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for mesh in (init_device_mesh(ranks.KIND, (4,)), init_device_mesh(ranks.KIND, (2, 2), mesh_dim_names=("data", "heads"))):
        heads = mesh if mesh.ndim == 1 else mesh["heads"]
        with torch.device("meta"):
            model = ranks.model_of(32, 64, 2, 8, 1, 8)
        parallelize_module(model, heads, parallelize_plan(model))
        if mesh.ndim == 2:
            for block in model[1:3]:
                fully_shard(block, mesh=mesh["data"])
        model.to_empty(device=ranks.KIND)
        torch.manual_seed(rank)
        for p in model.parameters():
            (p.to_local() if isinstance(p, DTensor) else p).detach().normal_()
        for _ in range(2):
            alike = True
            for block in model[1:3]:
                weight = block.rat.in_proj.weight.full_tensor()
                groups = weight.unflatten(0, (heads.size(), -1))[:, : 2 * 8]  # q and k of each rank
                alike = alike and bool((groups == groups[0]).all()) and bool((groups.std(-1) > 0.1).all())
            found.append(alike)
            share_copies(model)
    return found


def test_copies_that_were_drawn_apart(tmp_path):
    assert ranks.run("test_parallel_heads:drawn_after", 4, tmp_path) == [False, True] * 2


def too_many(rank: int, world: int) -> str:
    model = ranks.model_of(32, 48, 1, 6, 3, 8)
    try:
        parallelize_module(model, init_device_mesh(ranks.KIND, (world,)), parallelize_plan(model))
    except ValueError as error:
        return str(error)
    dist.barrier()
    return ""


def test_heads_that_do_not_divide(tmp_path):
    said = ranks.run("test_parallel_heads:too_many", 2, tmp_path)
    assert said.startswith("rat_ext.parallelize_plan: mesh: expected ranks that divide 6 heads, and groups") and said.endswith(
        "3"
    )
