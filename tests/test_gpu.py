"""What only a GPU can show: streams, devices, CUDA graphs, no host synchronisation, kernel families.

Sizes that only a GPU has room for are in test_gpu_sizes.py.
"""

import os
import re

import pytest
import torch

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import (
    Random,
    assert_same,
    attention_case,
    check,
    cu_seqlens_of,
    evaluate,
    make_state,
    name,
    recurrence_case,
    run_python,
    same_bits,
    training,
)

pytestmark = pytest.mark.gpu
low = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=name)


# 263 chunks of each sequence, and one that has begun: enough for the kernels that serve many.
MANY = {"batch": 2, "tokens": 4216, "chunk_size": 16, "heads": 16, "groups": 2, "dim": 128}

# ---- streams, devices, synchronisation -------------------------------------------------------------------------------


def test_a_process_that_forks_after_the_import():
    """The import leaves the CUDA driver alone: workers that are forked may use the GPU."""
    code = """
import os, torch, rat_ext
child = os.fork()
if child == 0:
    x = torch.randn(1, 40, 2, 16, device="cuda")
    os._exit(0 if rat_ext.rat_attention(x, x, x, x, 16).isfinite().all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@low
def test_side_stream(device, dtype):
    """Inputs made on a busy side stream are waited for there: the op runs on the current stream, not the default
    one.
    """
    case = attention_case(device, dtype, batch=4, tokens=500)
    values, grads = evaluate(rat_ext.rat_attention, case)
    originals = case.tensors
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.tensors = {key: torch.full_like(x, float("nan")) for key, x in originals.items()}
        torch.cuda._sleep(50_000_000)
        for key, x in originals.items():
            case.tensors[key].copy_(x)
        again, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
        recurrence, _ = evaluate(rat_ext.chunk_recurrence, recurrence_case(device, dtype))
    stream.synchronize()
    assert_same(values, again)
    assert_same(recurrence, evaluate(rat_ext.chunk_recurrence, recurrence_case(device, dtype))[0])


def equal_bits(a, b):
    """By name, whether all bits are equal: on the device, which the host does not wait for."""
    return {key: (a[key].contiguous().view(torch.uint8) == b[key].contiguous().view(torch.uint8)).all() for key in a}


def assert_all(found):
    torch.cuda.synchronize()
    assert not [(i, key) for i, equal in enumerate(found) for key, same in equal.items() if not same]


@pytest.mark.parametrize("dim", [64, 128])
def test_streams_at_once(device, dim, plain_memory):
    """Three training steps that share the chip, so that blocks of either wait for room: the bits of each alone."""
    sizes = MANY | {"dim": dim, "batch": 4}
    runs = [training(attention_case(device, torch.bfloat16, **sizes, seed=seed)) for seed in (0, 1)]
    runs.append(training(attention_case(device, torch.bfloat16, **sizes, sequences=[4000, 0, 1, 12000, 5])))
    alone = [run() for run in runs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in runs]
    found = []
    for _ in range(20):
        for run, expected, stream in zip(runs, alone, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(equal_bits(expected, run()))
    assert_all(found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    assert torch.cuda.current_device() == 0
    other = torch.device("cuda", 1)
    check(attention_case(other, torch.bfloat16))
    check(recurrence_case(other, torch.float32))
    cache = RATCache.empty(2, 4, 16, 8, 32, device=other)
    x = torch.randn(2, 4, 16, device=other)
    assert rat_ext.rat_decode_step(x, x, x, x, cache).isfinite().all()
    assert torch.cuda.current_device() == 0


def test_no_host_synchronisation(device):
    """Nothing is read back: forward, backward, packed sequences, states and decode under torch's sync detector."""
    cases = [
        attention_case(device, torch.bfloat16),
        attention_case(device, torch.float32, sequences=[10, 0, 35]),
        attention_case(device, torch.float32, lengths=[3, 37], return_state=True),
        attention_case(device, torch.bfloat16, **MANY),
    ]
    runs = [training(case) for case in cases]
    random = Random(0, device, torch.float32)
    cache = make_state(random, [3, 9], 4, 16, 8, rows=4)
    x = random.normal(2, 4, 16)
    slots = torch.tensor([1, 0], device=device)
    rat_ext.rat_decode_step(x, x, x, x, cache, slots=slots)

    def everything():
        for run in runs:
            run()
        rat_ext.chunk_recurrence(x[None], x[None], 8)
        rat_ext.rat_decode_step(x, x, x, x, cache, slots=slots)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


def capture(function):
    """A CUDA graph of one call, and what that call returned: memory that each replay fills anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


SMALL = {"batch": 1, "tokens": 80}


@low
@pytest.mark.parametrize(
    "options",
    [SMALL, {"sequences": [30, 0, 41, 9]}, MANY, MANY | {"dim": 64, "sequences": [2100, 0, 16, 5001, 700]}],
    ids=["dense", "packed", "many chunks", "many packed chunks"],
)
def test_graph_of_forward_and_backward(device, dtype, options):
    """Captured once, replayed with other inputs (and other sequence boundaries): the bits of the eager call."""
    case = attention_case(device, dtype, **options)
    run = training(case)
    graph, captured = capture(run)
    for seed in (3, 4):
        fresh = attention_case(device, dtype, seed=seed, **options)
        for key, x in case.tensors.items():
            x.copy_(fresh.tensors[key])
        if sequences := options.get("sequences"):
            case.options["cu_seqlens"].copy_(
                cu_seqlens_of([seed, *sequences[1:-1], sequences[-1] + sequences[0] - seed], device)
            )
        graph.replay()
        replayed = {key: x.clone() for key, x in captured.items()}
        assert_same(replayed, run())


@low
def test_graph_of_decode(device, dtype):
    """One captured step, replayed across chunk boundaries with new tokens, ragged lengths and changing slots."""
    random = Random(0, device, dtype)
    steps, chunk_size = 20, 4
    start = make_state(random, [0, 3, 9, 6], 4, 32, chunk_size, rows=9)
    tokens = [[random.normal(3, n, 32) for n in (2, 2, 4, 4, 4)] for _ in range(steps)]
    slots = [torch.tensor(s, device=device) for s in ([0, 1, 2], [3, -1, 0], [2, 3, 1])]
    expected, pool = start.clone(), start.clone()
    wanted = []
    for t in range(steps):
        q, k, v, gate, out_gate = tokens[t]
        wanted.append(rat_ext.rat_decode_step(q, k, v, gate, expected, out_gate=out_gate, slots=slots[t % 3]))

    fixed, slot = [x.clone() for x in tokens[0]], slots[0].clone()

    def step():
        q, k, v, gate, out_gate = fixed
        return rat_ext.rat_decode_step(q, k, v, gate, pool, out_gate=out_gate, slots=slot)

    graph, y = capture(step)
    for key in ("chunk_k", "chunk_v", "running_k", "running_v", "lengths"):
        getattr(pool, key).copy_(getattr(start, key))
    for t in range(steps):
        for mine, new in zip(fixed, tokens[t], strict=True):
            mine.copy_(new)
        slot.copy_(slots[t % 3])
        graph.replay()
        assert same_bits(y, wanted[t]), t
    assert pool.lengths.tolist() == expected.lengths.tolist()
    assert same_bits(pool.running_k, expected.running_k) and same_bits(pool.chunk_v, expected.chunk_v)


# ---- repeatability ---------------------------------------------------------------------------------------------------


def repeat(device, dtype, times):
    cases = [
        attention_case(device, dtype, batch=3, tokens=700, heads=6, groups=2, dim=64),
        attention_case(device, dtype, batch=2, tokens=300, dim=128, chunk_size=3),
        attention_case(device, dtype, sequences=[300, 0, 17, 250, 1], dim=64),
        attention_case(device, dtype, batch=3, lengths=[0, 5, 100], tokens=200, return_state=True),
        recurrence_case(device, dtype, batch=2, tokens=3000, chunk_size=2**40),
    ]
    for case in cases:
        function = getattr(rat_ext, case.op)
        first, grads = evaluate(function, case)
        for _ in range(times):
            assert_same(first, evaluate(function, case, grads=grads)[0])


@low
def test_the_same_bits_every_time(device, dtype):
    repeat(device, dtype, 20)


@pytest.mark.slow
@low
def test_the_same_bits_200_times(device, dtype):
    repeat(device, dtype, 200)


@low
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 3, "tokens": 700, "heads": 6, "groups": 2, "dim": 64},
        MANY,
        MANY | {"dim": 64, "heads": 6, "groups": 3},
        MANY | {"sequences": [6000, 0, 1, 2500, 40]},
    ],
    ids=["few chunks", "many chunks", "many chunks of 64", "many packed chunks"],
)
def test_the_same_bits_beside_other_work(device, dtype, options, plain_memory):
    """Another stream keeps the chip busy meanwhile, so that blocks are scheduled in other orders."""
    run = training(attention_case(device, dtype, **options))
    first = run()
    noise, stream = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(20):
        with torch.cuda.stream(stream):
            for _ in range(8):
                noise @ noise
        found.append(equal_bits(first, run()))
    assert_all(found)


# ---- kernel families -------------------------------------------------------------------------------------------------

FAMILY = """
import torch, rat_ext
from rat_ext import testing
torch.use_deterministic_algorithms(True, warn_only=True)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for dim in (8, 24, 64, 72, 96, 128, 192, 256):
        testing.check(testing.attention_case("cuda", dtype, dim=dim, tokens=300, chunk_size=3))
    for layout in testing.LAYOUTS:
        testing.check(testing.attention_case("cuda", dtype, layout=layout, dim=64))
    testing.check(testing.attention_case("cuda", dtype, batch=3, lengths=[0, 5, 37], return_state=True, dim=128))
    testing.check(testing.attention_case("cuda", dtype, sequences=[10, 0, 350, 1], dim=128))
    testing.check(testing.attention_case("cuda", dtype, op="chunk_attention", dim=128, tokens=300))
    testing.check(testing.attention_case("cuda", dtype, heads=8, groups=1, dim=128, tokens=600, chunk_size=2))
    for dim in (136, 256):
        wide = {"dim": dim, "heads": 2, "groups": 1, "chunk_size": 2}
        testing.check(testing.attention_case("cuda", dtype, batch=1, tokens=421, **wide))
        testing.check(testing.attention_case("cuda", dtype, sequences=[301, 0, 5, 130], **wide))
    for dim in (64, 128):
        many = {"dim": dim, "heads": 16, "groups": 2}
        testing.check(testing.attention_case("cuda", dtype, tokens=4216, **many))
        testing.check(testing.attention_case("cuda", dtype, sequences=[2100, 0, 16, 5001, 700], **many))
print("fine")
"""


@pytest.mark.parametrize("family", ["auto", "sm80", "scan"])
def test_kernel_families(family):
    """Every family that this GPU runs, forced in a process of its own."""
    done = run_python(FAMILY, RAT_EXT_KERNELS=family)
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr


def kernels_of(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as session:
        function()
        torch.cuda.synchronize()
    return [event.key for event in session.key_averages()]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name)
@pytest.mark.parametrize("options", [{}, {"dim": 64}, {"sequences": [2100, 0, 16, 5001, 700]}], ids=["128", "64", "packed"])
@pytest.mark.parametrize("phase", ["fwd", "bwd"])
def test_many_chunks_take_the_kernels_of_this_gpu(device, dtype, options, phase):
    """What the tests of many chunks are for: where Hopper's kernels are built and run, they serve them."""
    built = [kernel["name"] for kernel in rat_ext.build_info()["kernels"]]
    forced = os.environ.get("RAT_EXT_KERNELS", "auto") != "auto"
    if forced or torch.cuda.get_device_capability() != (9, 0) or not any(f"{phase}_sm90" in kernel for kernel in built):
        pytest.skip("no such kernels here")
    run = training(attention_case(device, dtype, **MANY | options))
    ran = kernels_of(run)
    assert any(re.search(rf"chunk_attention_\w*{phase}_sm90_kernel", kernel) for kernel in ran), ran


def test_peak_memory_of_a_training_step(device, plain_memory):
    """T = 65,536: beside inputs, output and gradients, only chunk states, dq in float32 and scalars per head and
    token.
    """
    tokens, heads, groups, dim, chunk_size = 65536, 16, 2, 128, 16
    random = Random(0, device, torch.bfloat16)
    wide = random.normal(1, 1, heads, dim)
    q, k = (random.normal(1, tokens, groups, dim).requires_grad_() for _ in range(2))
    v, gate, out_gate = (wide.expand(1, tokens, heads, dim).contiguous().requires_grad_() for _ in range(3))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = rat_ext.rat_attention(q, k, v, gate, chunk_size, out_gate=out_gate)
    grads = torch.autograd.grad(y, (q, k, v, gate, out_gate), wide.expand_as(y))
    peak = torch.cuda.max_memory_allocated() - before
    results = y.nbytes + sum(g.nbytes for g in grads)
    chunk_states = tokens // chunk_size * heads * dim * 2 * (2 + 4)
    scalars = 5 * 4 * tokens * heads
    dq = 4 * tokens * groups * dim
    assert peak <= 1.03 * (results + chunk_states + scalars + dq), (peak, results, chunk_states, scalars, dq)
