"""FLOP formulas against counts by hand, and checkpoints by the name of an operator."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rat_ext
from rat_ext import testing
from rat_ext.layers import RATLayer
from rat_ext.parallel import save_attention

D, H = 8, 4


def by_hand(sequences: list[tuple[int, int]], chunk_size: int, states: int = 2, attends: bool = True) -> tuple[int, int]:
    """Forward and backward, token by token. ``sequences``: (tokens before, tokens)."""
    forward = backward = 0
    for past, tokens in sequences:
        for t in range(past, past + tokens):
            keys = t // chunk_size + 1 if attends else 0
            forward += H * keys * (2 * D + 2 * D)
            backward += H * keys * 5 * 2 * D
            # s = f s + (1 - f) x: two products, a sum. a = g + f a: 2; dx: 1; a (s - x): 2; their sum and f (1 - f).
            forward += H * D * 3 * states
            backward += H * D * ((3 + 5) * states + states - 1 + 2)
    return forward, backward


def counted(function, *tensors) -> tuple[int, int]:
    with FlopCounterMode(display=False) as counter:
        y = function()
    forward = counter.get_total_flops()
    if not tensors:
        return forward, 0
    y = y[0] if isinstance(y, tuple) else y
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), tensors)
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
@pytest.mark.parametrize("kind", ["plain", "packed", "continued"])
def test_attention(device, chunk_size, kind):
    more = {"plain": {}, "packed": {"sequences": [7, 0, 30]}, "continued": {"lengths": [3, 21]}}[kind]
    case = testing.attention_case(device, torch.float32, batch=2, tokens=33, heads=H, dim=D, chunk_size=chunk_size, **more)
    leaves = {name: x.requires_grad_() for name, x in case.tensors.items()}
    call = functools.partial(rat_ext.rat_attention, **leaves, chunk_size=chunk_size, initial_state=case.state, **case.options)
    sequences = {"plain": [(0, 33)] * 2, "packed": [(0, 7), (0, 30)], "continued": [(3, 33), (21, 33)]}[kind]
    assert counted(call, *leaves.values()) == by_hand(sequences, chunk_size)


def test_other_ops(device):
    random = testing.Random(0, device, torch.float32)
    projection = random.normal(2, 21, (2 * 2 + 3 * H) * D).requires_grad_()
    call = functools.partial(rat_ext.rat_attention_packed, projection, H, 2, 4)
    assert counted(call, projection) == by_hand([(0, 21)] * 2, 4)
    q, k, v = random.normal(2, 21, 2, D).requires_grad_(), random.normal(2, 21, H, D), random.normal(2, 21, H, D)
    forward, backward = by_hand([(0, 21)] * 2, 4)
    recurrences = by_hand([(0, 21)] * 2, 4, attends=False)
    found = counted(lambda: rat_ext.chunk_attention(q, k, v, 4), q)
    assert found == (forward - recurrences[0], backward - recurrences[1])
    x, gate = random.normal(2, 21, 1, D).requires_grad_(), random.normal(2, 21, H, D)
    forward, backward = by_hand([(0, 21)] * 2, 4, states=1, attends=False)
    saved = 3 * gate.numel()  # y was kept
    assert counted(lambda: rat_ext.chunk_recurrence(x, gate, 4), x) == (forward, backward - saved)


def test_decode(device):
    random = testing.Random(0, device, torch.float32)
    cache = testing.make_state(random, [3, 9, 30], H, D, 4, rows=10)
    q, v = random.normal(2, 2, D), random.normal(2, H, D)
    slots = torch.tensor([2, -1], device=device)
    with torch.no_grad():
        found = counted(lambda: rat_ext.rat_decode_step(q, q, v, v, cache, slots=slots))
    assert found[0] == by_hand([(30, 1)], 4)[0]
    q, v = random.normal(2, 3, 2, D), random.normal(2, 3, H, D)
    with torch.no_grad():
        found = counted(lambda: rat_ext.rat_decode_step(q, q, v, v, cache))
    assert found[0] == by_hand([(3, 3), (9, 3)], 4)[0]


@pytest.mark.parametrize("page_chunks", [None, 8])
def test_in_place(device, page_chunks):
    """Pieces of prompts in a pool; a row that is skipped is no work."""
    random = testing.Random(0, device, torch.float32)
    pool = rat_ext.RATCache.empty(4, H, D, 4, 100, page_chunks=page_chunks, device=device)
    if page_chunks:
        pool.allocate(list(range(4)), 100)
    q, v = random.normal(1, 20, 2, D), random.normal(1, 20, H, D)
    cuts = torch.tensor([0, 9, 14, 20], dtype=torch.int32, device=device)
    slots = torch.tensor([2, -1, 0], device=device)
    call = functools.partial(rat_ext.rat_attention, q, q, v, v, 4, cache=pool, slots=slots, cu_seqlens=cuts)
    with torch.no_grad():
        assert counted(call)[0] == by_hand([(0, 9), (0, 6)], 4)[0]
        assert counted(call)[0] == by_hand([(9, 9), (6, 6)], 4)[0]


def test_without_values():
    """Fake tensors: equal packed sequences; states as long as they have rows for."""
    with FakeTensorMode():
        q, v = torch.empty(1, 24, 2, D), torch.empty(1, 24, H, D)
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        found = counted(lambda: rat_ext.rat_attention(q, q, v, v, 4, cu_seqlens=cu_seqlens))
        state = rat_ext.RATCache.empty(1, H, D, 4, 40)
        state.length_bound = 40
        continued = counted(lambda: rat_ext.rat_attention(q, q, v, v, 4, initial_state=state))
        pool = rat_ext.RATCache.empty(1, H, D, 4, 40, page_chunks=2)
        in_place = counted(lambda: rat_ext.rat_attention(q, q, v, v, 4, cache=pool))
    assert found[0] == by_hand([(0, 8)] * 3, 4)[0]
    assert continued[0] == by_hand([(40, 24)], 4)[0]
    assert in_place[0] == by_hand([(40, 24)], 4)[0]


class Ran(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def test_checkpoints_keep_what_the_op_gave(device):
    layer = RATLayer(64, 4, 2, 8).to(device)
    x = torch.randn(2, 50, 64, device=device, requires_grad=True)
    inputs = [x, *layer.parameters()]
    again, gradients = {}, {}
    for name, options in {"all": {}, "all but the op": {"context_fn": save_attention}}.items():
        y = checkpoint(layer, x, use_reentrant=False, **options)
        with Ran() as ran:
            y.sum().backward()
        again[name] = torch.ops.rat_ext.rat_attention_packed in ran.ops
        assert torch.ops.aten.mm in ran.ops
        gradients[name] = [leaf.grad for leaf in inputs]
        for leaf in inputs:
            leaf.grad = None
    assert again == {"all": True, "all but the op": False}
    plain = torch.autograd.grad(layer(x).sum(), inputs)
    for found in gradients.values():
        assert all(testing.same_bits(a, b) for a, b in zip(found, plain, strict=True))
