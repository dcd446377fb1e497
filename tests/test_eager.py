"""Eager calls take operators of their own (torch.ops.rat_ext_eager), whose small results may share memory. Nobody notices."""

import functools
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rat_ext
from rat_ext import _autograd
from rat_ext.testing import Random, attention_case, cu_seqlens_of, make_state, name, recurrence_case, same_bits

SMALL = dict(batch=2, tokens=50, heads=4, groups=2, dim=16, chunk_size=16)


def sharers(tensors: list) -> int:
    """How many of these tensors have their memory in common with another."""
    places = [x.untyped_storage().data_ptr() for x in tensors if x is not None]
    return sum(places.count(place) > 1 for place in places)


def calls(device: str, dtype: torch.dtype) -> list:
    """(operator, arguments): plain, of packed sequences, with a state in and out, of one projection; and the recurrence."""
    random, heads, groups, dim, chunk = Random(3, device, dtype), 4, 2, 16, 16
    q, k = (random.normal(1, 90, groups, dim) for _ in range(2))
    v, gate, out_gate, dy = (random.normal(1, 90, heads, dim) for _ in range(4))
    bias, tables = random.normal(heads, dim, dtype=torch.float32), rat_ext.rotary_tables(20, dim, device=device)
    cuts, state = cu_seqlens_of([40, 0, 50], device), make_state(random, [37], heads, dim, chunk).tensors()
    found = []
    for cu_seqlens, carried, returned in (
        (None, None, False),
        (None, None, True),
        (cuts, None, False),
        (cuts, None, True),
        (None, state, False),
        (None, state, True),
    ):
        inputs = (q, k, v, gate, bias, out_gate, *tables, cu_seqlens, *(carried or [None] * 5))
        forward = (*inputs, chunk, 0.25, 9, returned, True)
        y, lse, *states = torch.ops.rat_ext.rat_attention.default(*forward)
        grads = [None, None, *map(torch.ones_like, states[2:4])] if returned else [None] * 4
        found.append(("rat_attention", forward))
        found.append(("rat_attention_backward", (dy, *grads, *inputs, y, lse, *states[:2], chunk, 0.25, returned, True)))
    projection = torch.cat([x.flatten(2) for x in (q, k, v, gate, out_gate)], 2)
    inputs = (projection, heads, groups, True, bias, *tables, *[None] * 6)
    saved = torch.ops.rat_ext.rat_attention_packed.default(*inputs, chunk, 0.25, 5, False, True)[:4]
    found.append(("rat_attention_packed", (*inputs, chunk, 0.25, 5, False, True)))
    found.append(("rat_attention_packed_backward", (dy, *[None] * 4, *inputs, *saved, chunk, 0.25, False, True)))
    inputs = (q, gate, bias, None, None, None)
    y, last = torch.ops.rat_ext.chunk_recurrence.default(*inputs, chunk, True)
    found.append(("chunk_recurrence", (*inputs, chunk, True)))
    found += [("chunk_recurrence_backward", (dy, dlast, *inputs, y, chunk)) for dlast in (None, last)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_same_results(device, dtype):
    """Of both libraries, with and without the overload that leaves out what is seldom there."""
    brief = 0
    for operator, args in calls(device, dtype):
        spec, eager = _autograd._OPERATORS[operator], getattr(torch.ops.rat_ext_eager, operator)
        want = spec.overload(*args)
        found = [eager.default(*args), _autograd._KERNELS[operator](*args)]
        given = dict(zip(spec.arguments, args, strict=True))
        if all(args[place] is usual for place, usual in spec.left_out):
            found += [eager.brief(*spec.pick_brief(given)), _autograd._BRIEF[operator](*spec.pick_brief(given))]
            brief += 1
            if "y" in eager.overloads():  # y alone; what is not returned is not looked at
                y = eager.y(*spec.pick_brief(given))
                found.append((y, *found[0][1:]))
        if "saving" in eager.overloads():
            found.append(eager.saving(*args))
        for got in found:
            assert all(x is None for x in got[len(spec.results) :])  # copies of rows: these are aligned
            for result, a, b in zip(spec.results, want, got[: len(spec.results)], strict=True):
                where = f"{operator}: {result}"
                assert (a is None) == (b is None), where
                if a is None:
                    continue
                assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device), where
                if result.startswith("chunk_"):  # not all rows are written: two of the first sequence are, in every call
                    a, b = a[:1, :, :2], b[:1, :, :2]
                assert same_bits(a, b), where
    assert brief == 5


def test_what_is_given_arrives(device):
    """A call that needs more arguments than a brief one hands over all of them."""
    op = _autograd._DIFFERENTIABLE["rat_attention"]
    case = attention_case(device, torch.float32, **(SMALL | {"batch": 1}), rotary=False)
    names, said = op.forward.arguments, []
    tensors = {key: x.requires_grad_() for key, x in case.tensors.items()}
    call = functools.partial(rat_ext.rat_attention, **tensors, chunk_size=16, **(case.options | {"return_state": True}))
    cuts, (_, state) = cu_seqlens_of([20, 30], device), call()

    def noted(name, function):
        def kernel(*args):
            said.append((name, dict(zip(names, args, strict=False))))
            return function(*args)

        return mock.patch.object(op, name, kernel)

    with noted("kernel", op.kernel), noted("brief_kernel", op.brief_kernel):
        call(return_state=False)
        call()
        call(return_state=False, deterministic=False)
        call(return_state=False, cu_seqlens=cuts)
        call(return_state=False, initial_state=state)
    (first, _), *others = said
    assert first == "brief_kernel" and [name for name, _ in others] == ["kernel"] * 4
    given = [tuple(x[key] for key in ("return_state", "deterministic", "cu_seqlens", "lengths")) for _, x in others]
    want = [(True, True, None, None), (False, False, None, None), (False, True, cuts, None), (False, True, None, state.lengths)]
    assert given == want  # tensors by identity


def test_small_results_share_memory(device):
    """Gradients of rows in one allocation, chunk states in one that y and what a caller keeps have no part in."""
    case = attention_case(device, torch.float32, **SMALL, out_gate=True)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    y = rat_ext.rat_attention(**leaves, chunk_size=16, **case.options)
    saved = [x for x in y.grad_fn.saved_tensors if x is not None]
    assert sharers(saved) == 2  # chunk_k, chunk_v
    assert sharers([y, *leaves.values()]) == 0
    grads = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert sharers([g for g in grads if g.dim() == 4]) == 5
    assert sharers([y, *grads]) == 6  # that of gate_bias too, which is of the same dtype
    kept = [g.clone() for g in grads]
    for g, want in zip(grads, kept, strict=True):  # writing one changes no other
        assert same_bits(g, want)
        g.fill_(float("nan"))


def test_large_results_do_not(device):
    """Nor states that the caller gets: each would keep the others' memory."""
    case = attention_case(device, torch.float32, **(SMALL | {"tokens": 1000}), out_gate=True)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    y = rat_ext.rat_attention(**dict(zip(case.tensors, leaves, strict=True)), chunk_size=16, **case.options)
    assert sharers(torch.autograd.grad(y.sum(), leaves)) == 0
    case = attention_case(device, torch.float32, **SMALL, return_state=True)
    y, state = rat_ext.rat_attention(**case.tensors, chunk_size=16, **case.options)
    assert sharers([y, *state.tensors()]) == 0


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


FORWARD, BACKWARD = "rat_ext.rat_attention.default", "rat_ext.rat_attention_backward.default"


def forward_and_backward(case) -> None:
    leaves = {key: x.detach().requires_grad_() for key, x in case.tensors.items()}
    rat_ext.rat_attention(**leaves, chunk_size=16, **case.options).sum().backward()


def test_modes_see_the_operators(device):
    case = attention_case(device, torch.float32, **SMALL)
    for mode, backward in ((Operators(), [BACKWARD]), (Functions(), [])):  # torch runs a backward without modes of functions
        with mode:
            forward_and_backward(case)
        with mode, torch.no_grad():
            rat_ext.rat_attention(**case.tensors, chunk_size=16, **case.options)
        assert [x for x in mode.seen if "rat_attention" in x] == [FORWARD, *backward, FORWARD]


def test_profilers_see_the_operators(device):
    case = attention_case(device, torch.float32, **SMALL)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        forward_and_backward(case)
    names = {event.key for event in found.key_averages()}
    assert {"rat_ext::rat_attention", "rat_ext::rat_attention_backward"} <= names
    assert not any("rat_ext_eager" in x for x in names)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_tracers_see_the_operators(device, pre_dispatch):
    case = attention_case(device, torch.float32, **SMALL)

    def function(**tensors):
        return rat_ext.rat_attention(**tensors, chunk_size=16, **case.options)

    graph = make_fx(lambda *xs: function(**dict(zip(case.tensors, xs, strict=True))), pre_dispatch=pre_dispatch)
    targets = [str(node.target) for node in graph(*case.tensors.values()).graph.nodes]
    assert FORWARD in targets and not any("eager" in x for x in targets)


def test_recurrence_and_negative_views(device):
    """A view that negates lazily is read as what it stands for."""
    case = recurrence_case(device, torch.float32, batch=1, tokens=20, heads=2, groups=1, dim=8, chunk_size=4)
    tensors = dict(case.tensors)
    lazy = torch._neg_view(tensors["x"])
    got = rat_ext.chunk_recurrence(**(tensors | {"x": lazy}), chunk_size=4, **case.options)
    want = rat_ext.chunk_recurrence(**(tensors | {"x": -tensors["x"]}), chunk_size=4, **case.options)
    assert same_bits(got, want)
