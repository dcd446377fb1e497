"""What tells of a call without changing it: rat_ext.explain and RAT_EXT_LOG."""

import forks
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rat_ext
from rat_ext.testing import attention_case, run_python

LOGGED = """
import sys, torch, rat_ext
x = torch.randn(1, 40, 2, 32, device=sys.argv[1], requires_grad=True)
rat_ext.rat_attention(x, x, x, x, 16, scale=0.5).sum().backward()
rat_ext.chunk_recurrence(x, x, 16)
with torch.no_grad():
    cache = rat_ext.RATCache.empty(1, 2, 32, 16, 64, device=sys.argv[1])
    rat_ext.rat_decode_step(*(x[:, 0],) * 4, cache)
assert cache.lengths.tolist() == [1]
"""


def lines_of(device, log):
    run = forks.run_python if device.type == "cpu" else run_python
    done = run(LOGGED, str(device), RAT_EXT_LOG=log)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("rat_ext: ")]


def test_log(device):
    lines = lines_of(device, "1")
    calls = [line.split()[1] for line in lines]
    assert calls == ["rat_attention", "rat_attention_backward", "chunk_recurrence", "rat_decode_step"]
    for word in ("q=(1, 40, 2, 32)/(2560, 64, 32, 1)", "scale=0.5", f"float32 {device}", "attention_fwd=", " ms"):
        assert word in lines[0], lines[0]
    assert "attention_bwd=" in lines[1] and "attention_fwd=" not in lines[1]


@pytest.mark.parametrize("log", ["", "0", "false", "No", "OFF"])
def test_no_log(device, log):
    assert lines_of(device, log) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explain(device, dtype):
    """One family of each phase is chosen, every row has a reason, and the arguments stay as they are."""
    case = attention_case(device, dtype, lengths=[5, 37], return_state=True)
    rows = rat_ext.explain(**case.tensors, chunk_size=16, initial_state=case.state, **case.options)
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    both = [kind + way for way in ("fwd", "bwd") for kind in ("attention_", "recurrence_")]
    assert phases == (both[::2] if device.type == "cpu" else both)
    for phase in phases:
        assert sum(row["chosen"] for row in rows if row["phase"] == phase) == 1, rows
    assert all(row["family"] and row["why"] for row in rows)
    if device.type == "cpu":
        assert {row["family"] for row in rows} == {rat_ext.build_info()["cpu_isa"]}


@pytest.mark.parametrize("fullgraph", [False, True])
def test_explain_in_a_compiled_function(device, fullgraph):
    """The graph is left for it; where that is forbidden, the error names it."""
    x = torch.randn(1, 40, 2, 32, device=device)

    def function(x):
        y = rat_ext.rat_attention(x, x, x, x, 16)
        return rat_ext.explain(x, x, x, x, 16), y + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=fullgraph)
    if fullgraph:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="explain"):
            compiled(x)
    else:
        rows, y = compiled(x)
        assert rows == rat_ext.explain(x, x, x, x, 16)
        assert torch.equal(y, function(x)[1])


def test_explain_of_what_has_no_memory(device):
    """The kernels depend on where tensors are."""
    x = torch.zeros(1, 8, 2, 8, device=device)
    expected = "rat_ext.explain: {}: expected a tensor with memory, whose place decides, got {}"
    with pytest.raises(ValueError, match=expected.format("q", "one on the meta device")):
        rat_ext.explain(*(x.to("meta"),) * 4, 4)
    mode = FakeTensorMode()
    fake = mode.from_tensor(x)
    with mode, pytest.raises(ValueError, match=expected.format("q", "a fake one")):
        rat_ext.explain(*(fake,) * 4, 4)
    with pytest.raises(ValueError, match=expected.format("out_gate", "a fake one")):
        rat_ext.explain(x, x, x, x, 4, out_gate=fake)


def test_explain_checks_its_arguments(device):
    x = torch.zeros(1, 8, 2, 8, device=device)
    with pytest.raises(ValueError, match="rat_ext.explain: chunk_size: expected an int, got str 'x'"):
        rat_ext.explain(x, x, x, x, "x")
    with pytest.raises(ValueError, match=r"rat_ext.rat_attention: gate: expected shape \(1, 8, 2, 8\), got \(1, 7, 2, 8\)"):
        rat_ext.explain(x, x, x, x[:, 1:], 4)


def test_explain_takes_slots_with_a_cache_alone():
    case = attention_case("cpu", torch.float32, tokens=8)
    with pytest.raises(ValueError, match="explain: slots: expected a cache"):
        rat_ext.explain(**case.tensors, chunk_size=case.chunk_size, slots=torch.tensor([0]))
