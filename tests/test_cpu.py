"""The CPU kernels: threads, and the instruction sets that one machine can be forced to use."""

import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
from forks import run_python

import rat_ext
from rat_ext import testing
from rat_ext.testing import Random, assert_same, attention_case, evaluate, make_state, recurrence_case


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


CASES = {
    "dense": {"batch": 3, "tokens": 100},
    "one long row": {"batch": 1, "heads": 2, "groups": 1, "tokens": 700},
    "packed": {"sequences": [100, 0, 33, 200]},
    "states": {"batch": 2, "lengths": [5, 32], "return_state": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("chunk_size", [1, 16, 2**40])
def test_threads_make_no_difference(threads, options, chunk_size):
    """1, 2 and 5 threads: the same bits."""
    results = []
    for count in (1, 2, 5):
        threads(count)
        case = attention_case("cpu", torch.float32, chunk_size=chunk_size, **options)
        values, _ = evaluate(rat_ext.rat_attention, case)
        other, _ = evaluate(rat_ext.chunk_recurrence, recurrence_case("cpu", torch.float32, chunk_size=chunk_size, **options))
        results.append(values | {"recurrence " + key: x for key, x in other.items()})
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def step_of(lengths, heads: int):
    """A decode step on one cache, put back to ``lengths`` first: y and what changes in the cache."""
    random = Random(0, "cpu", torch.float32)
    cache = make_state(random, lengths, heads, 64, 4, rows=760)
    before = [getattr(cache, key).clone() for key in ("running_k", "running_v", "lengths")]
    q, k, v, gate = (random.normal(len(lengths), heads, 64) for _ in range(4))
    cos, sin = rat_ext.rotary_tables(760, 64, base=100.0)

    def step():
        changed = [cache.running_k, cache.running_v, cache.lengths]
        for x, old in zip(changed, before, strict=True):
            x.copy_(old)
        y = rat_ext.rat_decode_step(q, k, v, gate, cache, rotary_cos=cos, rotary_sin=sin)
        return dict(zip(("y", "running_k", "running_v", "lengths"), (y, *changed), strict=True))

    return step


@pytest.mark.parametrize("lengths", [[3000], [3000, 5, 777, 2999], [3039] * 40], ids=["split", "ragged", "many rows"])
def test_threads_make_no_difference_to_a_step(threads, lengths):
    step, results = step_of(lengths, 2), []
    for count in (1, 2, 5):
        threads(count)
        results += [{key: x.clone() for key, x in step().items()} for _ in range(4)]
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.slow
def test_a_step_beside_other_processes(threads):
    """The median of a step of a few 0.1 ms, with a process on each core that wants all of it: not far from one thread's."""
    code = "while True: pass"
    cores = range(len(os.sched_getaffinity(0)))
    step = step_of([3039] * 4, 4)  # 6 MB

    def median(count: int) -> float:
        threads(count)
        times = []
        for _ in range(300):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in cores]
    try:
        alone = median(1)
        assert median(max(2, len(cores))) < 4 * alone
    finally:
        for other in others:
            other.kill()
            other.wait()


FORCED = """
import torch, rat_ext
from rat_ext import testing
assert rat_ext.build_info(kernels=False)["cpu_isa"].startswith("ISA"), rat_ext.build_info(kernels=False)["cpu_isa"]
torch.use_deterministic_algorithms(True)
for dtype in testing.DTYPES:
    for dim in (8, 24, 64, 136):
        testing.check(testing.attention_case("cpu", dtype, dim=dim))
    testing.check(testing.attention_case("cpu", dtype, batch=3, lengths=[0, 5, 37], return_state=True))
    testing.check(testing.attention_case("cpu", dtype, sequences=[10, 0, 35], layout="odd"))
    testing.check(testing.attention_case("cpu", dtype, gate_size=30.0, tokens=300))
    testing.check(testing.recurrence_case("cpu", dtype, chunk_size=2**40))
import test_decode
for dtype in testing.LOW:
    test_decode.test_many_chunks(torch.device("cpu"), dtype, False)
print("fine")
"""


def runs_here(isa: str) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    return isa == "baseline" or capability == "AVX512" or (isa == "avx2" and capability == "AVX2")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa):
    if not runs_here(isa):
        pytest.skip(f"this CPU does not run {isa}")
    done = run_python(FORCED.replace("ISA", isa), RAT_EXT_CPU_ISA=isa)
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("word", ["avx1024", "AVX2", "sse"])
def test_an_unknown_instruction_set(word):
    code = "import torch, rat_ext; x = torch.zeros(1, 4, 1, 8); rat_ext.rat_attention(x, x, x, x, 4)"
    done = run_python(code, RAT_EXT_CPU_ISA=word)
    assert done.returncode != 0
    assert "RAT_EXT_CPU_ISA" in done.stderr and word in done.stderr and "baseline, avx2 or avx512" in done.stderr


@pytest.mark.parametrize("word", ["sm20", "attention_fwd=sm20", "sm80x,auto"])
def test_an_unknown_kernel_family(word):
    """Refused by every build, when the package is imported."""
    done = run_python("import rat_ext", RAT_EXT_KERNELS=word)
    assert done.returncode != 0
    found = done.stderr.splitlines()[-1]
    got = word.split(",")[0] if rat_ext.build_info(kernels=False)["cuda"] else word
    assert found.startswith("ValueError: rat_ext: RAT_EXT_KERNELS: expected auto") and found.endswith(f"got '{got}'"), found


@pytest.mark.parametrize("word", ["", "auto"])
def test_no_kernel_family(word):
    assert run_python("import rat_ext", RAT_EXT_KERNELS=word).returncode == 0


def test_an_infinite_value_that_weighs_nothing():
    """Its weight underflows to 0, and what 0 times infinity would be stays out of the gradient of the score."""
    ones = torch.ones(1, 3, 1, 8)
    q = (30 * ones).requires_grad_()
    k = ones * torch.tensor([-30.0, 0.0, 30.0]).view(1, 3, 1, 1)
    v = ones * torch.tensor([float("inf"), 1.0, 1.0]).view(1, 3, 1, 1)
    y = rat_ext.rat_attention(q, k, v, -100 * ones, 1)
    (dq,) = torch.autograd.grad(y, q, ones)
    assert dq[:, 2].isfinite().all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_ties_go_to_even(isa):
    """A value halfway between two of bfloat16 or float16 takes the even one, as torch does."""
    if not runs_here(isa):
        pytest.skip(f"this CPU does not run {isa}")
    done = run_python(TIES, RAT_EXT_CPU_ISA=isa)
    assert done.returncode == 0 and "fine" in done.stdout, done.stdout + done.stderr


TIES = """
import torch, rat_ext
for dtype in (torch.bfloat16, torch.float16):
    eps = torch.finfo(dtype).eps
    # k~ of two tokens with gates of 0 is v_0 / 4 + v_1 / 2, here 1 + (n + 1/2) eps.
    v = torch.stack((4 * (torch.arange(8) + 0.5) * eps, torch.full((8,), 2.0))).view(1, 2, 1, 8)
    assert torch.equal(v.to(dtype).float(), v)
    y = rat_ext.chunk_recurrence(v.to(dtype), torch.zeros_like(v, dtype=dtype), 2)
    assert torch.equal(y[:, 1], (v[:, 0] / 4 + v[:, 1] / 2).to(dtype)), y
print("fine")
"""


def test_memory():
    """Forward and backward at T = 4096: peak memory under 1.5 times inputs, outputs and gradients."""
    done = testing.run_python(MEMORY)
    assert done.returncode == 0, done.stdout + done.stderr


MEMORY = """
import resource, torch, rat_ext
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def call(tokens):
    q, k = (torch.randn(1, tokens, 2, 64, requires_grad=True) for _ in range(2))
    v, gate, out_gate = (torch.randn(1, tokens, 8, 64, requires_grad=True) for _ in range(3))
    dy = torch.randn(1, tokens, 8, 64)
    y = rat_ext.rat_attention(q, k, v, gate, 16, out_gate=out_gate)
    grads = torch.autograd.grad(y, (q, k, v, gate, out_gate), dy)
    return sum(x.nbytes for x in (q, k, v, gate, out_gate, dy, y, *grads))
call(64)
before = peak()
held = call(16384)
used = peak() - before
assert used <= 1.5 * held, (used, held, used / held)
"""
