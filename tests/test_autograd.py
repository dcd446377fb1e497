"""How the ops sit in autograd: gradcheck, what is saved, checkpointing, autocast, who needs a gradient, second
derivatives.
"""

import dataclasses
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rat_ext
from rat_ext import RATCache, reference
from rat_ext.testing import (
    LOW,
    Random,
    assert_same,
    attention_case,
    check,
    compare,
    cu_seqlens_of,
    evaluate,
    make_state,
    name,
    recurrence_case,
    same_bits,
)

on_cpu = pytest.mark.parametrize("dtype", [torch.float64], ids=name)

TINY = {"batch": 1, "heads": 2, "groups": 1, "dim": 8}


# ---- gradcheck: numerical derivatives, independent of the reference --------------------------------------------------


def numerically(function, case):
    keys = list(case.tensors)
    leaves = [case.tensors[key].detach().clone().requires_grad_() for key in keys]
    state_keys = []
    if case.state is not None:
        state_keys = ["chunk_k", "chunk_v", "running_k", "running_v"]
        leaves += [getattr(case.state, key).detach().nan_to_num(0.5).requires_grad_() for key in state_keys]

    def run(*tensors):
        options = dict(case.options)
        if state_keys:
            state = dict(zip(state_keys, tensors[len(keys) :], strict=True))
            options["initial_state"] = case.state.replace(**state)
        result = function(**dict(zip(keys, tensors, strict=False)), chunk_size=case.chunk_size, **options)
        if not isinstance(result, tuple):
            return result
        y, state = result
        if isinstance(state, torch.Tensor):
            return y, state
        valid = torch.arange(state.chunk_k.shape[2]) < (state.lengths // state.chunk_size)[:, None]
        valid = valid[:, None, :, None]
        return y, state.chunk_k.where(valid, 0), state.chunk_v.where(valid, 0), state.running_k, state.running_v

    assert torch.autograd.gradcheck(run, leaves, fast_mode=False, atol=1e-6, rtol=1e-4)


@on_cpu
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 2**40])
def test_gradcheck(device, dtype, chunk_size):
    numerically(rat_ext.rat_attention, attention_case(device, dtype, tokens=7, chunk_size=chunk_size, **TINY))


@on_cpu
def test_gradcheck_with_states(device, dtype):
    shape = TINY | {"batch": 2, "tokens": 4, "heads": 1}
    case = attention_case(device, dtype, lengths=[3, 2], chunk_size=2, return_state=True, **shape)
    numerically(rat_ext.rat_attention, case)


@on_cpu
def test_gradcheck_packed_sequences(device, dtype):
    numerically(rat_ext.rat_attention, attention_case(device, dtype, sequences=[3, 0, 4], chunk_size=2, **TINY))


@on_cpu
def test_gradcheck_chunk_attention(device, dtype):
    case = attention_case(device, dtype, op="chunk_attention", tokens=7, chunk_size=2, **TINY)
    numerically(rat_ext.chunk_attention, case)


@on_cpu
@pytest.mark.parametrize("chunk_size", [1, 3, 2**40])
def test_gradcheck_chunk_recurrence(device, dtype, chunk_size):
    shape = TINY | {"batch": 2, "heads": 2}
    case = recurrence_case(device, dtype, tokens=5, lengths=[2, 4], return_state=True, chunk_size=chunk_size, **shape)
    numerically(rat_ext.chunk_recurrence, case)


@on_cpu
def test_gradcheck_packed_projection(device, dtype):
    projection = Random(0, device, dtype).normal(1, 5, 8 * (2 + 3 * 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rat_ext.rat_attention_packed(x, 2, 1, 2), projection)


# ---- what is kept for the backward -----------------------------------------------------------------------------------


def saved_by(run):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = run()
    return kept, result


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("sequences", [None, [100, 0, 300, 112]], ids=["dense", "packed"])
def test_saved_tensors(device, dtype, sequences):
    """Inputs, y, lse and chunk states: beside inputs and y nothing that grows like T x D."""
    case = attention_case(device, dtype, batch=2, tokens=512, dim=64, sequences=sequences)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    kept, y = saved_by(lambda: rat_ext.rat_attention(**leaves, chunk_size=16, **case.options))
    tables = [x for x in case.options.values() if isinstance(x, torch.Tensor)]
    known = {x.data_ptr() for x in (*leaves.values(), *tables, y)}
    rest = [x for x in kept if x.data_ptr() not in known]
    tokens, heads, dim = y.shape[0] * y.shape[1], y.shape[2], y.shape[3]
    rows = tokens // 16 + (0 if sequences is None else len(sequences))
    lse, states = tokens * heads * 4, 2 * rows * heads * dim * dtype.itemsize
    assert sum(x.nbytes for x in rest) <= lse + states, [tuple(x.shape) for x in rest]
    assert len(kept) == len({x.data_ptr() for x in kept if x.numel()}), "something is saved twice"


def test_saved_tensors_of_the_packed_entry(device):
    projection = Random(0, device, torch.float32).normal(2, 512, (2 * 2 + 3 * 4) * 64).requires_grad_()
    kept, y = saved_by(lambda: rat_ext.rat_attention_packed(projection, 4, 2, 16))
    rest = [x for x in kept if x.data_ptr() not in (projection.data_ptr(), y.data_ptr())]
    assert sum(x.nbytes for x in rest) <= 4 * (2 * 512 * 4 + 2 * 2 * 32 * 4 * 64)


def test_saved_tensors_of_the_recurrence(device):
    case = recurrence_case(device, torch.float32)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    kept, y = saved_by(lambda: rat_ext.chunk_recurrence(**leaves, chunk_size=16))
    assert {x.data_ptr() for x in kept} <= {x.data_ptr() for x in (*leaves.values(), y)}


# ---- checkpointing, autocast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_checkpoint(device, dtype):
    """Non-reentrant checkpointing recomputes the same bits."""
    case = attention_case(device, dtype, batch=3, lengths=[0, 5, 37], return_state=True)
    values, grads = evaluate(rat_ext.rat_attention, case)

    def run(**arguments):
        return checkpoint(rat_ext.rat_attention, use_reentrant=False, **arguments)

    assert_same(values, evaluate(run, case, grads=grads)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_autocast(device, dtype):
    """float32 in, low precision inside, gradients back in float32: what casting by hand gives, to the bit."""
    case = attention_case(device, torch.float32)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    with torch.autocast(device.type, dtype):
        y = rat_ext.rat_attention(**leaves, chunk_size=16, **case.options)
    assert y.dtype == dtype
    dy = Random(1, device, dtype).normal(*y.shape)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(g.dtype == torch.float32 for g in grads)
    cast = {key: x if key == "gate_bias" else x.to(dtype) for key, x in leaves.items()}
    by_hand = rat_ext.rat_attention(**cast, chunk_size=16, **case.options)
    assert same_bits(y, by_hand)
    for a, b in zip(grads, torch.autograd.grad(by_hand, list(leaves.values()), dy), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("entry", ["recurrence", "packed", "attention", "decode"])
def test_autocast_of_the_other_ops(device, entry):
    random = Random(0, device, torch.float32)
    wide, narrow = random.normal(2, 20, 4, 16), random.normal(2, 20, 2, 16)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        if entry == "recurrence":
            y = rat_ext.chunk_recurrence(narrow, wide, 4)
        elif entry == "packed":
            y = rat_ext.rat_attention_packed(random.normal(2, 20, 16 * 16), 4, 2, 4)
        elif entry == "attention":
            y = rat_ext.chunk_attention(narrow, wide, wide, 4)
        else:
            cache = RATCache.empty(2, 4, 16, 4, 16, dtype=torch.bfloat16, device=device)
            y = rat_ext.rat_decode_step(narrow[:, 0], narrow[:, 0], wide[:, 0], wide[:, 0], cache)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize("entry", ["recurrence", "packed", "attention", "decode"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_autocast_reaches_every_input(device, dtype, entry):
    """Whichever of the inputs are float32: the bits of casting all of them by hand. gate_bias and tables stay as they are."""
    random = Random(0, device, torch.float32)
    q, k = random.normal(2, 20, 2, 16), random.normal(2, 20, 2, 16)
    v, gate, out_gate = (random.normal(2, 20, 4, 16) for _ in range(3))
    bias = random.normal(4, 16)
    cos, sin = rat_ext.rotary_tables(5, 16, base=100.0, device=device)
    tables = {"rotary_cos": cos, "rotary_sin": sin}

    def call(q, k, v, gate, out_gate):
        if entry == "recurrence":
            return rat_ext.chunk_recurrence(k, gate, 4, gate_bias=bias)
        if entry == "packed":
            projection = torch.cat([x.flatten(2) for x in (q, k, v, gate, out_gate)], dim=2)
            return rat_ext.rat_attention_packed(projection, 4, 2, 4, gate_bias=bias, **tables)
        if entry == "attention":
            return rat_ext.chunk_attention(q, v, gate, 4, out_gate=out_gate, **tables)
        cache = RATCache.empty(2, 4, 16, 4, 16, dtype=dtype, device=device)
        for t in range(6):
            token = {"q": q[:, t], "k": k[:, t], "v": v[:, t], "gate": gate[:, t], "out_gate": out_gate[:, t]}
            y = rat_ext.rat_decode_step(**token, cache=cache, gate_bias=bias, **tables)
        return y

    inputs = [q, k, v, gate, out_gate]
    with torch.no_grad():
        by_hand = call(*(x.to(dtype) for x in inputs))
        assert by_hand.dtype == dtype
        for wide in range(6):  # all in float32, then each in turn beside others that are cast already
            mixed = [x if wide in (5, i) else x.to(dtype) for i, x in enumerate(inputs)]
            with torch.autocast(device.type, dtype):
                assert same_bits(call(*mixed), by_hand), wide


def test_autocast_leaves_float64_alone():
    q, v = torch.randn(1, 9, 2, 8, dtype=torch.float64), torch.randn(1, 9, 4, 8, dtype=torch.float64)
    plain = rat_ext.rat_attention(q, q, v, v, 4, out_gate=v)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(rat_ext.rat_attention(q, q, v, v, 4, out_gate=v), plain)


def test_autocast_continues_a_state(device):
    """The state that a call under autocast returns is taken by the next one."""
    random = Random(0, device, torch.float32)
    q, v = random.normal(2, 20, 2, 16), random.normal(2, 20, 4, 16)
    with torch.autocast(device.type, torch.bfloat16):
        _, state = rat_ext.rat_attention(q, q, v, v, 4, return_state=True)
        y = rat_ext.rat_attention(q, q, v, v, 4, initial_state=state)
    assert state.chunk_k.dtype == torch.bfloat16 and state.running_k.dtype == torch.float32
    assert y.dtype == torch.bfloat16


# ---- who needs a gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["q", "k", "v", "gate", "gate_bias", "out_gate"])
def test_one_input_needs_a_gradient(device, wanted):
    case = attention_case(device, torch.float32)
    values, grads = evaluate(rat_ext.rat_attention, case)
    leaves = {key: x.detach().requires_grad_(key == wanted) for key, x in case.tensors.items()}
    y = rat_ext.rat_attention(**leaves, chunk_size=16, **case.options)
    (got,) = torch.autograd.grad(y, leaves[wanted], grads["y"])
    assert same_bits(got, values["d" + wanted])


def test_no_input_needs_a_gradient(device):
    case = attention_case(device, torch.float32, return_state=True)
    y, state = rat_ext.rat_attention(**case.tensors, chunk_size=16, **case.options)
    assert not y.requires_grad and not state.running_k.requires_grad


def test_a_state_that_needs_a_gradient_alone(device):
    case = attention_case(device, torch.float32, lengths=[5, 37])
    values, grads = evaluate(rat_ext.rat_attention, case)
    state = case.state.replace(running_v=case.state.running_v.clone().requires_grad_())
    y = rat_ext.rat_attention(**case.tensors, chunk_size=16, initial_state=state, **case.options)
    (got,) = torch.autograd.grad(y, state.running_v, grads["y"])
    assert same_bits(got, values["dinitial_running_v"])


def test_the_same_tensor_twice(device):
    """q and k, v and gate one tensor: their gradients add up."""
    random = Random(0, device, torch.float32)
    x, z = random.normal(2, 40, 4, 32), random.normal(2, 40, 4, 32)
    dy = random.normal(2, 40, 4, 32)
    separate = [t.clone().requires_grad_() for t in (x, x, z, z)]
    parts = torch.autograd.grad(rat_ext.rat_attention(*separate, 8), separate, dy)
    x.requires_grad_()
    z.requires_grad_()
    both = torch.autograd.grad(rat_ext.rat_attention(x, x, z, z, 8), (x, z), dy)
    torch.testing.assert_close(both[0], parts[0] + parts[1])
    torch.testing.assert_close(both[1], parts[2] + parts[3])


def test_gate_bias_of_another_dtype(device):
    case = attention_case(device, torch.bfloat16)
    bias = case.tensors["gate_bias"].to(torch.bfloat16)
    values, grads = evaluate(rat_ext.rat_attention, dataclasses.replace(case, tensors=case.tensors | {"gate_bias": bias}))
    assert values["dgate_bias"].dtype == torch.bfloat16
    wide, _ = evaluate(
        rat_ext.rat_attention,
        dataclasses.replace(case, tensors=case.tensors | {"gate_bias": bias.float()}),
        grads=grads,
    )
    assert same_bits(wide["y"], values["y"])
    assert same_bits(wide["dgate_bias"].to(torch.bfloat16), values["dgate_bias"])


def test_what_is_returned_without_a_gradient(device):
    """Lengths are numbers of tokens; y and the states are functions of the inputs."""
    case = attention_case(device, torch.float32, return_state=True)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    y, state = rat_ext.rat_attention(**leaves, chunk_size=16, **case.options)
    assert all(x.requires_grad for x in (y, state.chunk_k, state.chunk_v, state.running_k, state.running_v))
    assert not state.lengths.requires_grad


def test_a_tensor_without_elements_has_a_gradient_too(device):
    """No heads: what is absent is told from what is empty."""
    q, v = (
        torch.zeros(1, 4, 1, 8, device=device, requires_grad=True),
        torch.zeros(1, 4, 0, 8, device=device, requires_grad=True),
    )
    bias = torch.zeros(0, 8, device=device, requires_grad=True)
    y = rat_ext.rat_attention(q, q, v, v, 2, gate_bias=bias, out_gate=v)
    got = torch.autograd.grad(y.sum(), (q, v, bias))
    assert [x.shape for x in got] == [q.shape, v.shape, bias.shape]


# ---- the gradient that comes in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["rat_attention", "chunk_recurrence"])
@pytest.mark.parametrize("form", ["sum", "stride of last dimension", "expanded rows", "transposed"])
def test_strides_of_dy(device, op, form):
    case = attention_case(device, torch.float32) if op == "rat_attention" else recurrence_case(device, torch.float32)
    shape = (2, 70, 4, 32)
    random = Random(1, device, torch.float32)
    if form == "sum":
        dy = torch.ones((), device=device).expand(shape)
    elif form == "stride of last dimension":
        dy = random.normal(32, 4, 70, 2).permute(3, 2, 1, 0)
    elif form == "expanded rows":
        dy = random.normal(1, 1, 1, 32).expand(shape)
    else:
        dy = random.normal(2, 4, 70, 32).transpose(1, 2)
    function = getattr(rat_ext, op)
    values, _ = evaluate(function, case, grads={"y": dy})
    expected, _ = evaluate(function, case, grads={"y": dy.contiguous()})
    for key in values:
        torch.testing.assert_close(values[key], expected[key], rtol=1e-5, atol=1e-5)


class Forgets(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("op", ["rat_attention", "chunk_recurrence"])
def test_a_gradient_that_does_not_come_is_zero(device, op, return_state):
    make = attention_case if op == "rat_attention" else recurrence_case
    case = make(device, torch.float32, return_state=return_state)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    result = getattr(rat_ext, op)(**leaves, chunk_size=16, **case.options)
    y = result[0] if return_state else result
    grads = torch.autograd.grad(Forgets.apply(y).sum(), list(leaves.values()))
    assert all(not g.any() for g in grads)


def test_sum_backward(device):
    case = attention_case(device, torch.float32)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    rat_ext.rat_attention(**leaves, chunk_size=16, **case.options).sum().backward()
    exact, _ = evaluate(reference.rat_attention, case, grads={"y": torch.ones(2, 70, 4, 32, device=device)})
    for key, x in leaves.items():
        torch.testing.assert_close(x.grad, exact["d" + key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("which", ["chunk_k", "chunk_v", "running_k", "running_v", "final_state"])
def test_an_expanded_gradient_of_a_state(device, dtype, which):
    """The gradient that a sum hands back has strides of 0: it is what a dense one of ones would be."""
    results = []
    for dense in (False, True):
        if which == "final_state":
            case = recurrence_case(device, dtype, return_state=True)
        else:
            case = attention_case(device, dtype, tokens=64, return_state=True)
        leaves = [x.requires_grad_() for x in case.tensors.values()]
        _, state = getattr(rat_ext, case.op)(**case.tensors, chunk_size=16, **case.options)
        x = state if which == "final_state" else getattr(state, which)
        dx = torch.ones_like(x) if dense else torch.ones((), dtype=x.dtype, device=device).expand(x.shape)
        results.append([g for g in torch.autograd.grad(x, leaves, dx, allow_unused=True) if g is not None])
    assert any(g.any() for g in results[0])
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_backward_twice_gives_the_same_bits(device, dtype):
    """retain_graph: the backward leaves what it read as it was."""
    case = attention_case(device, dtype, batch=3, lengths=[0, 5, 37])
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    y = rat_ext.rat_attention(**leaves, chunk_size=16, initial_state=case.state, **case.options)
    dy = Random(1, device, dtype).normal(*y.shape)
    before = y.clone()
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert same_bits(before, y)
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_sums_in_any_order(device, dtype):
    """deterministic=False: many key tiles and heads add to one dq."""
    tokens = 1500 if device.type == "cuda" else 300  # a CPU sums in one order, whatever it may
    case = attention_case(device, dtype, tokens=tokens, heads=8, chunk_size=4, dim=64)
    check(case, function=functools.partial(rat_ext.rat_attention, deterministic=False))


@pytest.mark.parametrize("op", ["rat_attention", "chunk_recurrence", "packed"])
def test_second_derivatives_raise(device, op):
    random = Random(0, device, torch.float32)
    x, gate = random.normal(1, 8, 2, 8).requires_grad_(), random.normal(1, 8, 2, 8)
    if op == "rat_attention":
        y = rat_ext.rat_attention(x, x, x, gate, 4)
    elif op == "chunk_recurrence":
        y = rat_ext.chunk_recurrence(x, gate, 4)
    else:
        x = random.normal(1, 8, 5 * 8).requires_grad_()
        y = rat_ext.rat_attention_packed(x, 1, 1, 4)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.square().sum().backward()


def test_inputs_changed_after_the_forward_raise(device):
    """The inputs are saved, not copied: autograd notices when one was written to."""
    case = attention_case(device, torch.float32)
    leaves = {key: x.requires_grad_() for key, x in case.tensors.items()}
    v = leaves["v"] * 1
    y = rat_ext.rat_attention(**(leaves | {"v": v}), chunk_size=16, **case.options)
    v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fresh_memory_is_poisoned(device):
    """What the other tests rely on: torch.empty, and allocations made through the stable ABI, hold NaN."""
    assert torch.empty(8, device=device).isnan().all()
    v = torch.randn(1, 8, 1, 8, device=device)
    y, state = rat_ext.rat_attention(v, v, v, v, 4, return_state=True, cu_seqlens=cu_seqlens_of([3, 5], device))
    assert y.isfinite().all()
    assert state.chunk_k[0].isnan().all() and state.chunk_k[1, :, :1].isfinite().all()


def test_states_in_the_dtype_of_the_op(device):
    cache = make_state(Random(0, device, torch.bfloat16), [3], 1, 8, 4)
    assert cache.chunk_k.dtype == torch.bfloat16 and cache.running_k.dtype == torch.float32


def test_frozen_projection(device):
    """Only gate_bias learns: the packed entry returns its gradient alone."""
    random = Random(0, device, torch.float32)
    projection, bias = random.normal(2, 40, 16 * 32), random.normal(4, 32).requires_grad_()
    y = rat_ext.rat_attention_packed(projection, 4, 2, 8, gate_bias=bias)
    (got,) = torch.autograd.grad(y.sum(), bias)
    exact = {}
    for precision in (torch.float32, torch.float64):
        x = projection.to(precision)
        q, k, v, gate, out_gate = (t.unflatten(2, (-1, 32)) for t in x.split([64, 64, 128, 128, 128], dim=2))
        wide = bias.detach().to(precision).requires_grad_()
        z = reference.rat_attention(q, k, v, gate, 8, gate_bias=wide, out_gate=out_gate)
        (exact[precision],) = torch.autograd.grad(z.sum(), wide)
    compare({"d": got}, {"d": exact[torch.float32]}, {"d": exact[torch.float64]}, torch.float32)


# ---- derivatives that the ops do not have ------------------------------------------------------------------------------

OPS = ("rat_attention", "chunk_attention", "rat_attention_packed", "chunk_recurrence", "rat_decode_step")


def of_one_tensor(op, x):
    """The op as a function of a tensor (1, 8, 2, 8)."""
    if op == "rat_attention_packed":
        return rat_ext.rat_attention_packed(torch.cat([x.flatten(2)] * 4, dim=2), 2, 2, 4, has_out_gate=False)
    if op == "rat_decode_step":
        return rat_ext.rat_decode_step(*(x[:, 0],) * 4, RATCache.empty(1, 2, 8, 4, 16, device=x.device))
    if op == "chunk_recurrence":
        return rat_ext.chunk_recurrence(x, x, 4)
    return rat_ext.rat_attention(x, x, x, x, 4) if op == "rat_attention" else rat_ext.chunk_attention(x, x, x, 4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_transforms_raise(device, op, mode):
    """No tangent and no mapped dimension is left out in silence, whether gradients are recorded or not."""
    x = Random(0, device, torch.float32).normal(1, 8, 2, 8)
    function = functools.partial(of_one_tensor, op)
    with mode():
        for transform in (
            lambda: torch.func.jvp(function, (x,), (x,)),
            lambda: torch.func.vmap(function)(x[None]),
            lambda: torch.func.grad(lambda x: function(x).sum())(x),
        ):
            # Decoding says of a gradient that it has none, however it is asked for.
            with pytest.raises((RuntimeError, ValueError), match=f"rat_ext.{op}: .*(not supported|needs no gradient)"):
                transform()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_tangents_raise(device, op, mode):
    x = Random(0, device, torch.float32).normal(1, 8, 2, 8)
    with torch.autograd.forward_ad.dual_level(), mode():
        assert of_one_tensor(op, x).isfinite().all(), "no input has a tangent"
        with pytest.raises(RuntimeError, match=f"rat_ext.{op}: forward-mode derivatives are not supported"):
            of_one_tensor(op, torch.autograd.forward_ad.make_dual(x, x))


# ---- memory of any alignment -------------------------------------------------------------------------------------------


def off_by_one(x):
    """The same numbers, contiguous, at an address that no vector load may take."""
    if x is None or not isinstance(x, torch.Tensor):
        return x
    moved = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("carried", [False, True])
def test_unaligned_memory_of_everything_but_rows(device, dtype, carried):
    """A direct call of both operators with tables, states, lengths, lse and saved chunk states at odd addresses."""
    random = Random(0, device, dtype)
    tokens, heads, dim, chunk = 300, 4, 64, 16
    q, k = random.normal(2, tokens, 2, dim), random.normal(2, tokens, 2, dim)
    v, gate, out_gate, dy = (random.normal(2, tokens, heads, dim) for _ in range(4))
    bias = random.normal(heads, dim, dtype=torch.float32)
    cos, sin = rat_ext.rotary_tables(40, dim, device=device)
    state = make_state(random, [5, 37], heads, dim, chunk).tensors() if carried else (None,) * 5
    rows = (tokens + 37 if carried else tokens) // chunk
    forward = torch.ops.rat_ext.rat_attention.default
    backward = torch.ops.rat_ext.rat_attention_backward.default
    results = []
    for move in (lambda x: x, off_by_one):
        inputs = (q, k, v, gate, move(bias), out_gate, move(cos), move(sin), None, *map(move, state))
        y, lse, chunk_k, chunk_v, *_ = forward(*inputs, chunk, 0.125, rows, False, True)
        saved = (y, move(lse), move(chunk_k), move(chunk_v))
        results.append((y, lse, *backward(dy, *(None,) * 4, *inputs, *saved, chunk, 0.125, False, True)))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or same_bits(a, b)
