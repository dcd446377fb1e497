"""The layer inside torch's wrappers: one process, gloo, CPU; two processes where a fault needs two."""

import copy
import math
import socket
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rat_ext.layers import RATLayer

dist = pytest.importorskip("torch.distributed")
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = (64, 4, 2, 8)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def fsdp1(group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(module, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True, **options)

    return wrap


@pytest.fixture
def fsdp2(group):
    from torch.distributed.fsdp import fully_shard

    return lambda module, **options: fully_shard(module, mesh=group, **options)


def check_initialised(layer: nn.Module) -> None:
    """The distributions of RATLayer(512, ...): weights N(0, 1 / 512), gate biases spread."""
    parameters = {name.removeprefix("_fsdp_wrapped_module."): p for name, p in layer.named_parameters()}
    full = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in parameters.items()}
    for name in ("in_proj.weight", "out_proj.weight"):
        assert abs(float(full[name].std()) * 512**0.5 - 1) < 0.02, name
    want = torch.linspace(math.log(0.25), math.log(4.0), 64).expand(8, 64)
    torch.testing.assert_close(full["gate_bias"].view(8, 64), want, rtol=1e-6, atol=1e-6)


def meta_layer() -> RATLayer:
    with torch.device("meta"):
        return RATLayer(512, 8, 2, 8)


def test_fsdp1_meta(fsdp1):
    check_initialised(fsdp1(meta_layer()))


def test_fsdp1_meta_with_a_projection_of_its_own(fsdp1):
    """Wrapped inside out: what is drawn and sharded already is left alone by the layer's reset."""
    layer = meta_layer()
    layer.in_proj = fsdp1(layer.in_proj)
    wrapped = fsdp1(layer)
    with type(wrapped).summon_full_params(wrapped):
        assert abs(float(layer.in_proj.weight.std()) * 512**0.5 - 1) < 0.02
    assert wrapped(torch.randn(2, 20, 512)).isfinite().all()


def test_fsdp2_meta(fsdp2):
    layer = fsdp2(meta_layer())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    check_initialised(layer)
    layer(torch.randn(2, 20, 512)).sum().backward()
    assert layer.in_proj.weight.grad is not None


@pytest.mark.parametrize("which", [1, 2])
def test_mixed_precision_leaves_states_alone(fsdp1, fsdp2, which):
    """Wrappers cast what goes in and out; running states stay float32 and the caller's cache is the one that is updated."""
    torch.manual_seed(0)
    layer = RATLayer(*SIZES)
    if which == 1:
        from torch.distributed.fsdp import MixedPrecision

        policy = MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16, cast_forward_inputs=True)
        layer = fsdp1(layer, mixed_precision=policy)
    else:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        layer = fsdp2(layer, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.bfloat16))
    x = torch.randn(2, 30, 64)
    whole = layer(x)
    first, state = layer(x[:, :13], return_state=True)
    assert (state.running_k.dtype, state.chunk_k.dtype) == (torch.float32, torch.bfloat16)
    second, state = layer(x[:, 13:20], state, return_state=True)
    cache = state.detach().reserve(30)
    with torch.no_grad():
        steps = [layer(x[:, t], cache=cache) for t in range(20, 30)]
    assert cache.lengths.tolist() == [30, 30] and 30 <= cache.length_bound <= cache.capacity
    pieces = torch.cat((first, second, torch.stack(steps, dim=1)), dim=1)
    torch.testing.assert_close(pieces, whole, rtol=3e-2, atol=3e-2)
    (second.sum() + first.sum()).backward()


def test_ddp_and_averaging_have_only_parameters(group):
    layer = RATLayer(*SIZES, max_length=8)
    assert not list(layer.buffers()) and set(layer.state_dict()) == {"in_proj.weight", "out_proj.weight", "gate_bias"}
    wrapped = DistributedDataParallel(layer)
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    for tokens in (8, 64, 16, 200):
        wrapped(torch.randn(2, tokens, 64)).sum().backward()
        average.update_parameters(layer)
    torch.testing.assert_close(average(torch.ones(1, 90, 64)), layer(torch.ones(1, 90, 64)))


def on_two_ranks(script: str, folder) -> None:
    """Runs ``script`` in two processes of one group; it finds its ``rank``."""
    head = textwrap.dedent("""
        import copy, os, sys, torch, torch.distributed as dist
        from rat_ext.layers import RATLayer
        rank = int(sys.argv[1])
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        torch.manual_seed(0)
    """)
    tail = "\ndist.barrier()\nos._exit(0)"  # gloo's threads abort a process that leaves them behind
    command = [sys.executable, "-W", "ignore", "-c", head + textwrap.dedent(script) + tail]
    ranks = [subprocess.Popen([*command, str(rank), str(folder / "store")], stderr=subprocess.PIPE) for rank in (0, 1)]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


def test_compiled_ddp_and_fsdp_in_one_process(group, fsdp1, fsdp2):
    """A compiled DDP, and after it both FSDPs, give the gradients of the layer alone."""
    torch.manual_seed(0)
    layer = RATLayer(*SIZES)
    torch._dynamo.reset()
    wrappers = {
        "ddp": torch.compile(DistributedDataParallel(copy.deepcopy(layer)), backend="aot_eager"),
        "fsdp1": fsdp1(copy.deepcopy(layer)),
        "fsdp2": fsdp2(copy.deepcopy(layer)),
    }
    for tokens in (5, 40):
        x = torch.randn(2, tokens, 64)
        layer.zero_grad()
        layer(x).square().sum().backward()
        want = layer.out_proj.weight.grad.norm()
        for name, wrapped in wrappers.items():
            wrapped.zero_grad()
            wrapped(x).square().sum().backward()
            grads = [p.grad for p in wrapped.parameters() if p.grad is not None and p.grad.numel() == 64 * 64]
            full = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
            assert any(torch.isclose(g.norm(), want, rtol=1e-5) for g in full), name
    torch._dynamo.reset()


def test_ddp_with_lengths_by_rank(tmp_path):
    """Ranks whose sequences differ in length compute what each computes alone."""
    script = """
        layer = RATLayer(64, 4, 2, 8, max_length=32)
        wrapped = torch.nn.parallel.DistributedDataParallel(layer)
        for lengths in ((16, 64), (16, 16), (16, 64), (64, 16)):
            x = torch.randn(1, lengths[rank], 64)
            y = wrapped(x)
            alone = RATLayer(64, 4, 2, 8)
            alone.load_state_dict(layer.state_dict())
            torch.testing.assert_close(y, alone(x))
            y.sum().backward()
    """
    on_two_ranks(script, tmp_path)
