"""initial_state and return_state: a forward in pieces, cut anywhere, is the forward in one piece; gradients flow
through.
"""

import dataclasses
import re

import forks
import pytest
import torch

import rat_ext
from rat_ext import reference
from rat_ext.testing import (
    DTYPES,
    LOW,
    STATE,
    Random,
    attention_case,
    check,
    compare,
    evaluate,
    floors,
    name,
    run_python,
    valid_rows,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
low = pytest.mark.parametrize("dtype", LOW, ids=name)


def in_pieces(cuts):
    """rat_attention over [0, cuts[0]), [cuts[0], cuts[1]), ...: each piece continues from the state of the one
    before.
    """

    def run(q, k, v, gate, chunk_size, out_gate=None, initial_state=None, return_state=False, **options):
        state, ys = initial_state, []
        ends = [*cuts, q.shape[1]]
        for begin, end in zip([0, *cuts], ends, strict=True):
            part = slice(begin, end)
            y, state = rat_ext.rat_attention(
                q[:, part],
                k[:, part],
                v[:, part],
                gate[:, part],
                chunk_size,
                out_gate=None if out_gate is None else out_gate[:, part],
                initial_state=state,
                return_state=True,
                **options,
            )
            ys.append(y)
        y = torch.cat(ys, dim=1)
        return (y, state) if return_state else y

    return run


@dtypes
@pytest.mark.parametrize("cuts", [[1], [16], [5, 6, 7], [15, 17], [32, 33, 64], [0, 40], [69]], ids=str)
def test_pieces_equal_the_whole(device, dtype, cuts):
    """Outputs, the final state and every gradient, each of which passes through the states between the pieces."""
    check(attention_case(device, dtype, return_state=True), function=in_pieces(cuts))


@low
@pytest.mark.parametrize("chunk_size", [1, 3, 2**40])
def test_pieces_and_chunk_size(device, dtype, chunk_size):
    check(attention_case(device, dtype, chunk_size=chunk_size), function=in_pieces([10, 31]))


@dtypes
@pytest.mark.parametrize("lengths", [[0, 5, 16, 37], [15, 16, 17, 31], [0, 0, 0, 0], [100, 3, 48, 1]], ids=str)
def test_ragged_lengths(device, dtype, lengths):
    """Sequences of one batch that stand at different places of their chunks."""
    check(attention_case(device, dtype, batch=4, lengths=lengths, return_state=True))


@low
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 2**40])
def test_short_continuations(device, dtype, tokens, chunk_size):
    check(attention_case(device, dtype, batch=3, lengths=[0, 5, 16], tokens=tokens, chunk_size=chunk_size, return_state=True))


@low
@pytest.mark.parametrize("dim", [8, 24, 64, 128, 256])
def test_head_size(device, dtype, dim):
    check(attention_case(device, dtype, batch=3, lengths=[0, 5, 37], dim=dim, tokens=40, return_state=True))


@low
def test_without_the_optional_arguments(device, dtype):
    bare = {"gate_bias": False, "out_gate": False, "rotary": False}
    check(attention_case(device, dtype, batch=3, lengths=[0, 5, 37], return_state=True, **bare))


@low
@pytest.mark.parametrize("which", ["y", *STATE])
def test_one_gradient_at_a_time(device, dtype, which):
    """A loss on y alone, or on one tensor of the state alone."""
    case = attention_case(device, dtype, batch=3, lengths=[0, 5, 37], return_state=True)
    exact, grads = evaluate(reference.rat_attention, case, double=True)
    grads = {which: grads[which]}
    exact, _ = evaluate(reference.rat_attention, case, double=True, grads=grads)
    eager, _ = evaluate(reference.rat_attention, case, grads=grads)
    actual, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    compare(actual, eager, exact, dtype, floors(case, exact, grads))


def test_a_state_that_is_not_returned_costs_no_gradient(device):
    """return_state changes neither y nor the gradients."""
    case = attention_case(device, torch.float32, batch=3, lengths=[0, 5, 37])
    values, grads = evaluate(rat_ext.rat_attention, case)
    case.options["return_state"] = True
    again, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    for key in values:
        torch.testing.assert_close(again[key], values[key], rtol=1e-5, atol=1e-6)


def test_no_tokens_pass_the_state_on(device):
    case = attention_case(device, torch.float32, batch=3, tokens=0, lengths=[3, 5, 37], return_state=True)
    values, grads = evaluate(rat_ext.rat_attention, case)
    assert values["lengths"].tolist() == [3, 5, 37]
    valid = valid_rows(case.state)
    for key in ("running_k", "running_v"):
        assert torch.equal(values[key], getattr(case.state, key))
        assert torch.equal(values["dinitial_" + key], grads[key])
    for key in ("chunk_k", "chunk_v"):
        assert torch.equal(values[key], getattr(case.state, key).masked_fill(~valid, 0))
        assert torch.equal(values["dinitial_" + key], grads[key].masked_fill(~valid, 0))


def test_truncated_backpropagation(device):
    """detach() cuts the gradient and nothing else."""
    case = attention_case(device, torch.float32, tokens=40, return_state=True)
    k = case.tensors["k"].requires_grad_()
    args = [case.tensors[key] for key in ("q", "k", "v", "gate")]
    _, state = rat_ext.rat_attention(*(x[:, :20] for x in args), 16, return_state=True)
    y = rat_ext.rat_attention(*(x[:, 20:] for x in args), 16, initial_state=state.detach())
    (dk,) = torch.autograd.grad(y.sum(), k)
    assert not dk[:, :20].any() and dk[:, 20:].any()


def test_state_of_more_rows(device):
    """Spare rows (reserve) change nothing, and are kept."""
    case = attention_case(device, torch.float32, lengths=[5, 37], return_state=True)
    values, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    roomy = dataclasses.replace(case, state=case.state.reserve(500))
    _, state = rat_ext.rat_attention(**roomy.tensors, chunk_size=16, initial_state=roomy.state, **roomy.options)
    assert state.chunk_k.shape[2] == 500 // 16
    again, _ = evaluate(rat_ext.rat_attention, roomy, backward=False)
    torch.testing.assert_close(again["y"], values["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16])
def test_a_returned_state_has_room_for_its_chunks_and_no_more(device, chunk_size):
    random = Random(3, device, torch.float32)
    rows = [random.normal(1, 100, heads, 8) for heads in (1, 1, 2, 2)]
    cuts = torch.tensor([0, 60, 60, 100], device=device, dtype=torch.int32)
    longest = 60 if device.type == "cpu" else 100  # on a GPU nobody reads the lengths
    for options, tokens in (({}, 100), ({"cu_seqlens": cuts}, longest), ({"cu_seqlens": cuts, "max_seqlen": 61}, 61)):
        _, state = rat_ext.rat_attention(*rows, chunk_size, return_state=True, **options)
        assert state.chunk_k.shape[2] == tokens // chunk_size, options
        assert state.length_bound <= tokens


@pytest.mark.parametrize("key", [*STATE, "lengths"])
def test_a_state_that_is_not_contiguous_is_refused(device, key):
    """The kernels take states as dense rows: a transposed one is named, not misread."""
    case = attention_case(device, torch.float32, batch=2, lengths=[5, 37])
    x = getattr(case.state, key)
    if key == "lengths":
        strided = torch.stack((x, x), dim=1)[:, 0]
    else:
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(strided.nan_to_num(), x.nan_to_num()) and not strided.is_contiguous()
    state = case.state.replace(**{key: strided})
    with pytest.raises(ValueError, match=rf"initial_state.{key}: expected a contiguous tensor"):
        rat_ext.rat_attention(**case.tensors, chunk_size=16, initial_state=state, **case.options)


TOO_LONG = """
import sys, torch, rat_ext
device, op = sys.argv[1:]
x = torch.randn(2, 5, 2, 16, device=device)
lengths = torch.tensor([3, 2**31 - 4], dtype=torch.int32, device=device)
running = torch.zeros(2, 2, 16, device=device)
if op == "chunk_recurrence":
    call = lambda x: rat_ext.chunk_recurrence(x, x, 2**40, initial_state=running, lengths=lengths)
else:
    rows = torch.zeros(2, 2, 0, 16, device=device)
    state = rat_ext.RATCache(rows, rows, running, running, lengths, 2**40, 2**31 - 4)
    if op == "rat_attention":
        call = lambda x: rat_ext.rat_attention(x, x, x, x, 2**40, initial_state=state)
    else:
        call = lambda x: [rat_ext.rat_decode_step(*(x[:, t],) * 4, state) for t in range(x.shape[1])]
call(x[:, :3])  # 2^31 - 1 in all
if x.is_cuda:
    torch.cuda.synchronize()
print("the longest is fine", flush=True)
call(x)
if x.is_cuda:
    torch.cuda.synchronize()
    if op == "rat_decode_step" and state.error[0] == 2:
        sys.exit(f"lengths[{state.error[2]}] is {state.error[3]}")
"""


@pytest.mark.parametrize("op", ["rat_attention", "chunk_recurrence", "rat_decode_step"])
def test_no_more_than_2_31_tokens_in_all(device, op):
    """Lengths are 32-bit: one token more than they hold is an error that names them, in a process of its own."""
    run = forks.run_python if device.type == "cpu" else run_python
    done = run(TOO_LONG, str(device), op)
    said = done.stdout + done.stderr
    assert "the longest is fine" in said, said
    assert done.returncode != 0
    assert re.search(r"lengths\[1\].*2147483647|sequence 1 .*2147483647", said), said


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("empty", [[0], [1], [0, 1], [0, 2], [2], [0, 1, 2]])
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_gradients_of_a_sequence_without_tokens(device, empty, returned, chunk_size):
    """Those of its state pass through, closed chunks and running state: what the caller has for them, or zeros."""
    torch.manual_seed(0)
    past = 2 * chunk_size + 1
    x = {name: torch.randn(3, past, n, 16, device=device) for name, n in (("q", 1), ("k", 1), ("v", 2), ("gate", 2))}
    state = rat_ext.rat_attention(**x, chunk_size=chunk_size, return_state=True)[1]
    names = ("chunk_k", "chunk_v", "running_k", "running_v")
    leaves = {name: getattr(state, name).detach().clone().requires_grad_() for name in names}
    state = state.replace(**leaves)
    cuts = [0]
    for n in range(3):
        cuts.append(cuts[-1] + (0 if n in empty else 4))
    new = {name: t[:1, :1].repeat(1, cuts[-1], 1, 1).requires_grad_() for name, t in x.items()}
    y, after = rat_ext.rat_attention(
        **new, chunk_size=chunk_size, initial_state=state, return_state=True,
        cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device=device),
    )  # fmt: skip
    weights = {name: torch.randn_like(getattr(after, name)) for name in names}
    loss = y.square().sum()
    if returned:
        # Rows past a sequence's closed chunks are of nobody.
        kept = {name: getattr(after, name)[:, :, :2] if name.startswith("chunk") else getattr(after, name) for name in names}
        loss = loss + sum((kept[name] * weights[name][tuple(map(slice, kept[name].shape))]).sum() for name in names)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for key, leaf, gradient in zip(names, leaves.values(), gradients, strict=True):
        want = weights[key][tuple(map(slice, leaf.shape))] if returned else torch.zeros_like(leaf)
        if gradient is None:
            assert not returned
            continue
        assert gradient.isfinite().all()
        for n in empty:
            assert torch.equal(gradient[n], want[n])
