"""torch.library.opcheck on every op: schema, fake kernel, autograd registration, tracing with symbolic shapes."""

import pytest
import torch
from torch.library import opcheck

import rat_ext
from rat_ext.testing import Random, cu_seqlens_of, make_state

OPS = torch.ops.rat_ext
B, T, H, G, D, L = 2, 21, 4, 2, 16, 4


def arguments(device, kind: str, grad: bool):
    """Positional arguments of rat_ext::rat_attention."""
    random = Random(0, device, torch.float32)
    batch = 1 if kind == "packed" else B
    q, k = random.normal(batch, T, G, D), random.normal(batch, T, G, D)
    v, gate, out_gate = (random.normal(batch, T, H, D) for _ in range(3))
    bias = random.normal(H, D)
    cos, sin = rat_ext.rotary_tables(20, D, device=device)
    cu, state, rows, keep = None, (None,) * 5, T // L, False
    if kind == "packed":
        cu, rows = cu_seqlens_of([5, 0, 8, 8], device), T // L + 4
    elif kind == "state":
        s = make_state(random, [3, 16], H, D, L)
        # Dead rows are NaN in the other tests; here opcheck compares whole tensors.
        tensors = [x.nan_to_num(0.0) for x in (s.chunk_k, s.chunk_v, s.running_k, s.running_v)]
        state, rows, keep = (*tensors, s.lengths), (16 + T) // L, True
    elif kind == "bare":
        out_gate = bias = cos = sin = None
    inputs = [x.requires_grad_() if grad and x is not None else x for x in (q, k, v, gate, bias, out_gate)]
    state = [x.requires_grad_() if grad and x is not None and x.is_floating_point() else x for x in state]
    return [*inputs, cos, sin, cu, *state, L, D**-0.5, rows, keep, True]


@pytest.fixture(autouse=True)
def _zero_memory(_poisoned_memory):
    """opcheck compares every element of every output, dead chunk rows too."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["dense", "bare"])
@pytest.mark.parametrize("grad", [False, True])
def test_rat_attention(device, kind, grad):
    opcheck(OPS.rat_attention.default, arguments(device, kind, grad))


SHAPES_ONLY = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("kind", ["packed", "state"])
@pytest.mark.parametrize("grad", [False, True])
def test_rat_attention_with_dead_rows(device, kind, grad):
    """Chunk rows past the last closed chunk are uninitialised, so that values cannot be compared."""
    opcheck(OPS.rat_attention.default, arguments(device, kind, grad), test_utils=SHAPES_ONLY)


@pytest.mark.parametrize("kind", ["dense", "bare", "packed", "state"])
def test_rat_attention_backward(device, kind):
    *args, scale, rows, keep, deterministic = arguments(device, kind, False)
    y, lse, chunk_k, chunk_v, running_k, running_v, _ = OPS.rat_attention.default(*args, scale, rows, keep, deterministic)
    random = Random(1, device, torch.float32)
    dy = random.normal(*y.shape)
    state = [random.normal(*x.shape) if keep else None for x in (chunk_k, chunk_v, running_k, running_v)]
    *inputs, chunk_size = args
    call = [dy, *state, *inputs, y, lse, chunk_k, chunk_v, chunk_size, scale, keep, deterministic]
    opcheck(OPS.rat_attention_backward.default, call)


@pytest.mark.parametrize("grad", [False, True])
def test_rat_attention_packed(device, grad):
    projection = Random(0, device, torch.float32).normal(B, T, (2 * G + 3 * H) * D).requires_grad_(grad)
    args = [projection, H, G, True, *(None,) * 9, L, D**-0.5, T // L, False, True]
    opcheck(OPS.rat_attention_packed.default, args)


def test_rat_attention_packed_backward(device):
    projection = Random(0, device, torch.float32).normal(B, T, (2 * G + 3 * H) * D)
    args = [projection, H, G, True, *(None,) * 9]
    y, lse, chunk_k, chunk_v, *_ = OPS.rat_attention_packed.default(*args, L, D**-0.5, T // L, False, True)
    call = [torch.ones_like(y), *(None,) * 4, *args, y, lse, chunk_k, chunk_v, L, D**-0.5, False, True]
    opcheck(OPS.rat_attention_packed_backward.default, call)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_chunk_recurrence(device, grad, keep):
    random = Random(0, device, torch.float32)
    x, gate, bias = random.normal(B, T, G, D), random.normal(B, T, H, D), random.normal(H, D)
    initial = random.normal(B, H, D)
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=device)
    x, gate, bias, initial = (t.requires_grad_(grad) for t in (x, gate, bias, initial))
    opcheck(OPS.chunk_recurrence.default, [x, gate, bias, None, initial, lengths, L, keep])


def test_chunk_recurrence_backward(device):
    random = Random(0, device, torch.float32)
    x, gate = random.normal(1, T, G, D), random.normal(1, T, H, D)
    cu = cu_seqlens_of([5, 0, 8, 8], device)
    y, final = OPS.chunk_recurrence.default(x, gate, None, cu, None, None, L, True)
    call = [torch.ones_like(y), torch.ones_like(final), x, gate, None, cu, None, None, y, L]
    opcheck(OPS.chunk_recurrence_backward.default, call)


def test_rat_decode_step(device):
    random = Random(0, device, torch.float32)
    cache = make_state(random, [3, 16, 7], H, D, L, rows=6)
    for key in ("chunk_k", "chunk_v", "running_k", "running_v"):
        setattr(cache, key, getattr(cache, key).nan_to_num(0.0))
    size = OPS.decode_workspace.default(3, H, 6, D) if device.type == "cuda" else 0
    workspace = torch.zeros(size, dtype=torch.uint8, device=device)
    q, k, v, gate = random.normal(3, G, D), random.normal(3, G, D), random.normal(3, H, D), random.normal(3, H, D)
    slots = torch.tensor([2, -1, 0], device=device)
    states = [cache.chunk_k, cache.chunk_v, None, None, cache.running_k, cache.running_v, cache.lengths, cache.error]
    opcheck(OPS.rat_decode_step.default, [q, k, v, gate, None, None, None, None, slots, None, *states, workspace, L, D**-0.5])


@pytest.mark.parametrize("pages", [False, True])
def test_rat_attention_cached(device, pages):
    random = Random(0, device, torch.float32)
    q, k, v, gate = random.normal(1, 9, G, D), random.normal(1, 9, G, D), random.normal(1, 9, H, D), random.normal(1, 9, H, D)
    cu = cu_seqlens_of([5, 0, 4], device)
    slots = torch.tensor([2, -1, 0], device=device)
    lengths = torch.tensor([3, 16, 7], dtype=torch.int32, device=device)
    table = torch.tensor([[4], [0], [2]], dtype=torch.int32, device=device) if pages else None
    states = [random.normal(5 if pages else 3, H, 8, D) for _ in "kv"]
    running = [random.normal(3, 2, H, D) for _ in "kv"]
    error = torch.zeros(4, dtype=torch.int32, device=device)
    args = [q, k, v, gate, None, None, None, None, cu, slots, table, *states, None, None, *running, lengths, error, L, D**-0.5]
    opcheck(OPS.rat_attention_cached.default, args)
