"""torch.compile: one graph, dynamic batch and length, no recompilation after the second shape."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import Random, cu_seqlens_of, make_state

H, G, D, L = 4, 2, 16, 8
SHAPES = [(2, 20), (3, 37), (4, 53), (2, 64), (5, 11)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(device, batch, tokens, dtype=torch.float32):
    random = Random(batch * 1000 + tokens, device, dtype)
    wide, narrow = (batch, tokens, H, D), (batch, tokens, G, D)
    q, k = random.normal(*narrow), random.normal(*narrow)
    return [x.requires_grad_() for x in (q, k, *(random.normal(*wide) for _ in range(3)))]


def same(function, compiled, args, extra=()):
    """Values and gradients of the compiled function equal those of the function."""
    results = []
    for run in (function, compiled):
        outputs = run(*args, *extra)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(x.float().square().sum() for x in outputs if x.is_floating_point())
        leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        results.append([*outputs, *(torch.autograd.grad(loss, leaves) if leaves else ())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def compiled_once(function, calls, shapes_until_stable=2):
    """Runs every call; no compilation may follow the first ``shapes_until_stable`` ones."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for i, (args, extra) in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=i >= shapes_until_stable):
            same(function, compiled, args, extra)
    assert counter.frame_count <= shapes_until_stable


def test_rat_attention(device):
    cos, sin = rat_ext.rotary_tables(10, D, device=device)
    bias = torch.zeros(H, D, device=device)

    def run(q, k, v, gate, out_gate):
        return rat_ext.rat_attention(q, k, v, gate, L, gate_bias=bias, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin)

    compiled_once(run, [(tensors(device, *shape), ()) for shape in SHAPES])


def test_marked_dynamic(device):
    """Batch and length marked dynamic: a single compilation serves every shape."""
    calls = []
    for shape in SHAPES:
        args = tensors(device, *shape)
        for x in args:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        calls.append((args, ()))

    def run(q, k, v, gate, out_gate):
        return rat_ext.rat_attention(q, k, v, gate, L, out_gate=out_gate)

    compiled_once(run, calls, shapes_until_stable=1)


def test_packed_projection_in_a_layer(device):
    """The shape that models use: a linear layer before, another one after, under autocast."""
    into = torch.nn.Linear(32, (2 * G + 3 * H) * D, device=device)
    out = torch.nn.Linear(H * D, 32, device=device)

    def run(x):
        with torch.autocast(device.type, torch.bfloat16):
            y = rat_ext.rat_attention_packed(into(x), H, G, L)
            return out(y.flatten(2))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for i, (batch, tokens) in enumerate(SHAPES):
        x = Random(i, device, torch.float32).normal(batch, tokens, 32).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            y = compiled(x)
            (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        z = run(x)
        torch.testing.assert_close(y, z, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(dx, torch.autograd.grad(z.float().square().sum(), x)[0], rtol=5e-2, atol=2e-2)
    assert counter.frame_count <= 2


def test_packed_sequences(device):
    def run(q, k, v, gate, out_gate, cu_seqlens):
        return rat_ext.rat_attention(q, k, v, gate, L, out_gate=out_gate, cu_seqlens=cu_seqlens)

    calls = []
    for sequences in ([5, 20], [9, 0, 12], [40, 3, 3, 3], [7, 7, 7, 7, 7]):
        calls.append((tensors(device, 1, sum(sequences)), (cu_seqlens_of(sequences, device),)))
    compiled_once(run, calls)


def test_recurrence(device):
    def run(x, gate):
        return rat_ext.chunk_recurrence(x, gate, L, return_state=True)

    calls = []
    for shape in SHAPES:
        _, k, v, *_ = tensors(device, *shape)
        calls.append(((k, v), ()))
    compiled_once(run, calls)


def test_chunk_attention(device):
    def run(q, k, v):
        return rat_ext.chunk_attention(q, k, v, L)

    calls = []
    for shape in SHAPES:
        q, _, k, v, _ = tensors(device, *shape)
        calls.append(((q, k, v), ()))
    compiled_once(run, calls)


def test_states(device):
    """A state made, passed on and returned inside one graph."""

    def run(q, k, v, gate, out_gate):
        half = q.shape[1] // 2
        first = [x[:, :half] for x in (q, k, v, gate)]
        rest = [x[:, half:] for x in (q, k, v, gate)]
        y1, state = rat_ext.rat_attention(*first, L, out_gate=out_gate[:, :half], return_state=True)
        y2 = rat_ext.rat_attention(*rest, L, out_gate=out_gate[:, half:], initial_state=state)
        return torch.cat((y1, y2), dim=1), state.running_k, state.lengths

    compiled_once(run, [(tensors(device, *shape), ()) for shape in SHAPES])


def test_decode(device):
    """One graph of a step, called token after token on a cache that it updates."""
    random = Random(0, device, torch.float32)
    q, k, v, gate = (random.normal(2, 12, n, D) for n in (G, G, H, H))
    caches = [RATCache.empty(2, H, D, L, 32, device=device) for _ in range(2)]

    def step(q, k, v, gate, cache):
        return rat_ext.rat_decode_step(q, k, v, gate, cache) * 2

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for t in range(12):
            args = [x[:, t].contiguous() for x in (q, k, v, gate)]
            y = compiled(*args, caches[0])
            torch.testing.assert_close(y, step(*args, caches[1]))
    assert counter.frame_count <= 3, "the host's bound of the lengths must not be a constant of the graph"
    assert caches[0].lengths.tolist() == [12, 12]


def test_prefill_from_a_state(device):
    state = make_state(Random(0, device, torch.float32), [3, 20], H, D, L)

    def run(q, k, v, gate, out_gate):
        return rat_ext.rat_attention(q, k, v, gate, L, out_gate=out_gate, initial_state=state)

    compiled_once(run, [(tensors(device, 2, tokens), ()) for tokens in (20, 37, 53, 8)])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(device):
    def run(q, k, v, gate, out_gate):
        return rat_ext.rat_attention(q * 2, k, v.sin(), gate, L, out_gate=out_gate) + 1

    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for i, shape in enumerate(SHAPES):
        with torch._dynamo.config.patch(error_on_recompile=i >= 2):
            same(run, compiled, tensors(device, *shape))
