"""How the public ops call their operators: gradients, shape rules for tracing, errors.

All of it is derived from the operators' schemas (csrc/ops/schemas.h), whose names carry meaning: `x` of a backward operator is
the forward's argument or result `x`, saved; `dx` is the gradient of a result, coming in, or of an argument, going out.

Each op has its gradient twice, from the same operator. Tracing takes the operator itself, whose autograd torch.library
registers: one input and one output for each of the schema. In eager mode that costs the host more than a small op costs a GPU,
for autograd's work grows with every input and output, and torch.library looks up the schema argument by argument. There the ops
go through an autograd.Function that shows autograd only what has a gradient: `args`, all arguments of the operator in a tuple,
is opaque to it, and so are results that are only saved. Below it stands a second set of operators, torch.ops.rat_ext_eager, the
same without an autograd that would have to be switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad, profiler
from torch.utils._python_dispatch import _disable_current_modes

from . import _log
from ._arguments import (
    POOL,
    STATE,
    Given,
    Operator,
    check_types,
    flag,
    integer,
    prepare,
    split_projection,
    take_pool,
    wrong,
)
from .cache import LARGEST, RATCache, state_dtype

_OPERATORS = {
    name: Operator(name)
    for name in (
        "rat_attention",
        "rat_attention_backward",
        "rat_attention_packed",
        "rat_attention_packed_backward",
        "chunk_recurrence",
        "chunk_recurrence_backward",
        "rat_attention_cached",
        "rat_decode_step",
    )
}


def _by_name(spec: Operator, operator: Callable, overload: str) -> Callable:
    """An operator of torch.ops.rat_ext, called as an overload of the eager one is."""
    if overload == "default":
        return operator
    if overload == "saving":
        return lambda *args: (*operator(*args), None)  # no copies are at hand
    if overload == "brief" and spec.brief_saves:
        return lambda *args: (*operator(*spec.whole(args)), None)
    if overload == "brief":
        return lambda *args: operator(*spec.whole(args))
    return lambda *args: operator(*spec.whole(args))[0]  # "y"


def _kernel(spec: Operator, overload: str) -> Callable:
    """Calls an operator below autograd."""
    operator = _by_name(spec, _log.logged(spec), overload)

    def by_name(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    # The function behind the operator's overload: OpOverload.__call__ is a function of Python's that calls it.
    eager = getattr(spec.eager, overload)._op
    function_modes = torch._C._len_torch_function_stack  # make_fx(pre_dispatch=True) is one, and no dispatch mode

    def kernel(*args: Any) -> Any:
        return (by_name if profiler._is_profiler_enabled or function_modes() else eager)(*args)

    return by_name if _log.ENABLED else kernel


_KERNELS = {name: _kernel(spec, "default") for name, spec in _OPERATORS.items()}
_BRIEF = {name: _kernel(spec, "brief") for name, spec in _OPERATORS.items()}

# Dispatch modes and subclasses of tensors look at operators: they are shown those of torch.ops.rat_ext, as profilers and modes
# of functions are above. So is the meta device, which has rules of shapes alone.
_SHOWN_TO = [torch.library.Library("rat_ext_eager", "IMPL", key) for key in ("Python", "Meta")]
for _library in _SHOWN_TO:
    for _name, _spec in _OPERATORS.items():
        for _overload in _spec.eager.overloads():
            _library.impl(f"{_name}.{_overload}".removesuffix(".default"), _by_name(_spec, _spec.overload, _overload))


def call_kernel(name: str, **given: Any) -> tuple:
    """What an operator returns, for a backward that is written by hand. Arguments that are left out are None."""
    spec = _OPERATORS[name]
    return _once(spec.overload, _KERNELS[name], tuple([given.get(n) for n in spec.arguments]))


def _once(operator: Callable, kernel: Callable, args: tuple) -> Any:
    """What the kernel returns, where nothing is recorded. Else a second derivative may be wanted: the operator refuses it."""
    return operator(*args) if torch.is_grad_enabled() else kernel(*args)


def results_of(name: str, **given: Any) -> dict[str, Any]:
    """:func:`call_kernel`, results by name."""
    spec = _OPERATORS[name]
    return dict(zip(spec.results, call_kernel(name, **given), strict=True))


def call_forward(name: str, given: Given) -> dict[str, Any]:
    """All results of an operator by name, those too that are only saved, for a forward that is written by hand.

    ``given``: the arguments of the public op; afterwards those of the operator too.
    """
    spec = _OPERATORS[name]
    _refuse_jit(name)
    try:
        args = prepare(name, spec, given)
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            _refuse_transforms(name, args)
        return dict(zip(spec.results, _KERNELS[name](*args), strict=True))
    except (TypeError, AttributeError, RuntimeError, IndexError):
        check_types(name, spec, given, _SHOWN[name])
        raise


# ---- gradients --------------------------------------------------------------------------------------------------------


class _Passing:
    """What passes from a forward to its backward.

    Args:
        there: names of what is at hand after the forward, arguments and results.
        incoming: names of the gradients that come in.
        wanted: names of the backward's arguments, in order.
        backward: the backward's operator.
    """

    def __init__(self, there: tuple, incoming: list, wanted: tuple, backward: Operator) -> None:
        saved = [n for n in wanted if n in there and backward.types[n].endswith(("Tensor", "Tensor]"))]
        numbers = [n for n in wanted if n in there and n not in saved]
        self._saved = itemgetter(*(there.index(n) for n in saved))
        self._numbers = itemgetter(*(there.index(n) for n in (*numbers, numbers[0])))  # two at least, to get a tuple
        at_hand = [*incoming, *saved, *numbers]
        self._order = itemgetter(*(at_hand.index(n) for n in wanted))
        self._y = len(incoming) + saved.index("y")

    def save(self, ctx: Any, args: tuple, output: tuple) -> None:
        """``output``: what a kernel that saves has returned. Rows that it had to copy are saved as it copied them."""
        copies = output[-1]
        if copies is not None:
            args = tuple([x if copy is None else copy for x, copy in zip(args, copies, strict=True)])
        everything = args + output
        ctx.numbers = self._numbers(everything)
        ctx.save_for_backward(*self._saved(everything))

    def arguments(self, ctx: Any, incoming: tuple) -> tuple:
        """The backward's."""
        at_hand = (*incoming, *ctx.saved_tensors, *ctx.numbers)
        if incoming[0] is None:
            at_hand = (torch.zeros_like(at_hand[self._y]), *at_hand[1:])
        return self._order(at_hand)


class Differentiable:
    """An operator with a backward operator."""

    def __init__(self, name: str) -> None:
        self.forward, self.backward = _OPERATORS[name], _OPERATORS[f"{name}_backward"]
        self.kernel, self.backward_kernel = _kernel(self.forward, "saving"), _KERNELS[f"{name}_backward"]
        self.brief_kernel, self.brief_backward_kernel = _BRIEF[name], _BRIEF[f"{name}_backward"]
        self.y_kernel, self.whole_kernel = _kernel(self.forward, "y"), _KERNELS[name]
        arguments, results, brief = self.forward.arguments, self.forward.results, self.forward.brief
        wanted = self.backward.arguments
        incoming = [f"d{n}" for n in results]
        self._passing = _Passing((*arguments, *results), incoming, wanted, self.backward)
        self._passing_brief = _Passing((*brief, *results), ["dy"], self.backward.brief, self.backward)

        # Arguments with a gradient, in the order of the backward's results. Those of a state come last; often there is none.
        inputs = [n.removeprefix("d") for n in self.backward.results]
        without_state = [n for n in inputs if n not in STATE and n != "initial_state"]
        self._inputs = itemgetter(*map(arguments.index, inputs))
        self._inputs_without_state = itemgetter(*map(arguments.index, without_state))
        self._inputs_brief = itemgetter(*map(brief.index, without_state))
        self._lengths = arguments.index("lengths")
        self._gradients_of_arguments = [inputs.index(n) if n in inputs else None for n in arguments]

        # A result that is saved and has no gradient stays hidden from autograd and from the caller.
        self._differentiable = [d in wanted for d in incoming]
        hidden = [n in wanted and f"d{n}" not in wanted for n in results]
        self._visible = [i for i in range(len(results)) if not hidden[i]]
        self._incoming = [self._visible.index(i) if d else None for i, d in enumerate(self._differentiable)]

        self._recorded = _by_name(self.backward, self.backward.overload, "brief")
        self._eager = self._function(name, self._eager_forward, self._eager_backward)
        self._eager_brief = self._function(name, self._brief_forward, self._brief_backward)
        torch.library.register_autograd(f"rat_ext::{name}", self._traced_backward, setup_context=self._traced_context)

    def __call__(self, args: tuple, compiling: bool) -> tuple:
        """y alone, or y and the returned state. ``args``: all of the operator's, or those of a brief call."""
        if compiling:
            output = self.forward.overload(*args)
        elif len(args) < len(self.forward.arguments):
            if torch.is_grad_enabled():
                return (self._eager_brief(args, *self._inputs_brief(args)),)
            return (self.y_kernel(*args),)
        elif torch.is_grad_enabled():
            inputs = self._inputs_without_state if args[self._lengths] is None else self._inputs
            output = self._eager(args, *inputs(args))
            return output if isinstance(output, tuple) else (output,)
        else:
            output = self.whole_kernel(*args)
        return output[:1] if output[-1] is None else self._shown(output)

    def _shown(self, output: tuple) -> tuple:
        return tuple(output[i] for i in self._visible)

    # Tracing: context and gradient of the operator.

    def _traced_context(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        no_state = output[-1] is None  # then chunk states are only saved
        without = [x for i, x in enumerate(output) if x is not None and (not self._differentiable[i] or (no_state and i > 0))]
        ctx.mark_non_differentiable(*without)
        ctx.set_materialize_grads(False)
        self._passing.save(ctx, inputs, (*output, None))

    def _traced_backward(self, ctx: Any, *incoming: Tensor | None) -> tuple:
        operator = self.backward.overload
        grads = _once(operator, operator, self._passing.arguments(ctx, incoming))
        return tuple(None if i is None else grads[i] for i in self._gradients_of_arguments)

    # Eager mode: functions of all arguments of the operator in a tuple, and of those that may have a gradient.

    def _eager_forward(self, ctx: Any, args: tuple, *inputs: Tensor | None) -> Tensor | tuple:
        output = self.kernel(*args)
        self._passing.save(ctx, args, output)
        if output[-2] is None:  # no state is returned, and autograd gives zeros for a gradient of y that is missing
            return output[0]
        ctx.set_materialize_grads(False)
        return self._shown(output)

    def _eager_backward(self, ctx: Any, *grads: Tensor | None) -> tuple:
        incoming = tuple(grads[i] if i is not None and i < len(grads) else None for i in self._incoming)
        # Gradients past the last input (of a state that was not given) are None, which autograd takes.
        return _once(self.backward.overload, self.backward_kernel, self._passing.arguments(ctx, incoming))

    def _brief_forward(self, ctx: Any, args: tuple, *inputs: Tensor | None) -> Tensor:
        output = self.brief_kernel(*args)
        self._passing_brief.save(ctx, args, output)
        return output[0]

    def _brief_backward(self, ctx: Any, *grads: Tensor) -> tuple:
        return _once(self._recorded, self.brief_backward_kernel, self._passing_brief.arguments(ctx, grads))

    def _function(self, name: str, forward: Callable, gradients: Callable) -> Callable:
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            try:
                return None, *gradients(ctx, *grads)
            except RuntimeError:
                if not any(map(_is_batched, grads)):
                    raise
            raise RuntimeError(
                f"rat_ext.{name}: a backward of several gradients at once (is_grads_batched=True, vectorize=True, vmap over a "
                "backward) is not supported; call it once for each"
            )

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(name, (torch.autograd.Function,), methods)
        # What Function.apply comes to outside torch.func, whose wrappers it looks for in every argument.
        return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _is_batched(x: Tensor | None) -> bool:
    """Does vmap stand for several tensors by this one?"""
    known = torch._C._functorch
    return x is not None and (known.is_batchedtensor(x) or known.is_legacy_batchedtensor(x))


def refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """The backward of a gradient."""
    raise RuntimeError("rat_ext: the ops have first derivatives only; this needs a second one (create_graph=True?)")


def _refuse_jit(op: str) -> None:
    """Shapes would be constants of the graph, without a word."""
    if torch._C._is_tracing():
        raise RuntimeError(f"rat_ext.{op}: torch.jit.trace is not supported; use torch.compile or torch.export")


def _refuse_transforms(op: str, args: tuple) -> None:
    """Derivatives that the ops do not have. Autograd would leave tangents out in silence where no gradient is recorded."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"rat_ext.{op}: the transforms of torch.func (grad, vjp, jvp, vmap and what is made of them) are not supported; "
            "gradients come from torch.autograd, and a mapped dimension can be part of the batch"
        )
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"rat_ext.{op}: forward-mode derivatives are not supported, and an input has a tangent")


# ---- shape rules for tracing ------------------------------------------------------------------------------------------


class _NoHint(Exception):
    """A size that tracing knows nothing of."""


def _hint(n: Any) -> Any:
    """The number that a symbol stands for in the call that is traced. No guard is made: every call checks its own sizes."""
    if not isinstance(n, torch.SymInt):
        return n
    if not n.node.has_hint():
        raise _NoHint
    return int(n.node.hint)


def _stand_in(x: Any) -> Any:
    """A tensor as one of the meta device, a symbol as its number."""
    if not isinstance(x, Tensor):
        return _hint(x)
    return torch.empty_strided([_hint(n) for n in x.shape], [_hint(n) for n in x.stride()], dtype=x.dtype, device="meta")


def _place(x: Any) -> int:
    """Where a tensor is, as csrc/ops counts: a GPU's index, or -1 for the CPU, -2 for the meta device, -3 for others."""
    if not isinstance(x, Tensor):
        return 0
    return (x.device.index or 0) if x.device.type == "cuda" else {"cpu": -1, "meta": -2}.get(x.device.type, -3)


def _check(name: str, args: tuple) -> None:
    """Checks tensors that have no memory as csrc/ops checks those that have. Sizes without a value are checked when it runs."""
    with _disable_current_modes():
        try:
            stand_ins = [_stand_in(x) for x in args]
        except _NoHint:
            return
        getattr(torch.ops.rat_ext_check, name).default([_place(x) for x in args], *stand_ins)


def _attention_shapes(given: Given, like: Tensor, batch: int, tokens: int, heads: int, dim: int) -> tuple:
    acc = state_dtype(like.dtype)
    sequences = batch if given["cu_seqlens"] is None else given["cu_seqlens"].shape[0] - 1
    kept = given["return_state"]
    owners = 1 if given["cu_seqlens"] is not None and given["lengths"] is None and not kept else sequences
    return (
        like.new_empty(batch, tokens, heads, dim),
        like.new_empty(batch, heads, tokens, dtype=acc),
        like.new_empty(owners, heads, given["chunk_rows"], dim),
        like.new_empty(owners, heads, given["chunk_rows"], dim),
        like.new_empty(sequences, heads, dim, dtype=acc) if kept else None,
        like.new_empty(sequences, heads, dim, dtype=acc) if kept else None,
        like.new_empty(sequences, dtype=torch.int32) if kept else None,
    )


def _rat_attention_shapes(given: Given) -> tuple:
    return _attention_shapes(given, given["q"], *given["v"].shape)


def _rat_attention_packed_shapes(given: Given) -> tuple:
    projection, heads = given["projection"], given["num_heads"]
    batch, tokens, width = projection.shape
    dim = width // (2 * given["num_groups"] + (3 if given["has_out_gate"] else 2) * heads)
    return _attention_shapes(given, projection, batch, tokens, heads, dim)


def _chunk_recurrence_shapes(given: Given) -> tuple:
    x, gate, cu_seqlens = given["x"], given["gate"], given["cu_seqlens"]
    batch, _, heads, dim = gate.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty(sequences, heads, dim, dtype=state_dtype(x.dtype)) if given["return_state"] else None
    return x.new_empty(gate.shape), state


def _in_place_shapes(given: Given) -> Tensor:
    return given["v"].new_empty(given["v"].shape)


def _register_fake(spec: Operator, shapes: Callable[[Given], Any]) -> None:
    """Meta tensors reach the rule too, and with them any tensor beside them."""

    def rule(*args: Any) -> Any:
        _check(spec.name, args)
        return shapes(dict(zip(spec.arguments, args, strict=True)))

    torch.library.register_fake(f"rat_ext::{spec.name}")(rule)


def _gradient_shapes(spec: Operator) -> Callable[[Given], tuple]:
    inputs = [n.removeprefix("d") for n in spec.results]
    return lambda given: tuple(None if given[n] is None else given[n].new_empty(given[n].shape) for n in inputs)


_register_fake(_OPERATORS["rat_attention"], _rat_attention_shapes)
_register_fake(_OPERATORS["rat_attention_packed"], _rat_attention_packed_shapes)
_register_fake(_OPERATORS["chunk_recurrence"], _chunk_recurrence_shapes)
_register_fake(_OPERATORS["rat_attention_cached"], _in_place_shapes)
_register_fake(_OPERATORS["rat_decode_step"], _in_place_shapes)
for _name, _spec in _OPERATORS.items():
    if _name.endswith("_backward"):
        _register_fake(_spec, _gradient_shapes(_spec))
        torch.library.register_autograd(f"rat_ext::{_name}", refuse_second_derivative)

_DIFFERENTIABLE = {n: Differentiable(n) for n in ("rat_attention", "rat_attention_packed", "chunk_recurrence")}


# ---- calls ------------------------------------------------------------------------------------------------------------

# What the caller knows an argument of an operator by, where it is not its name.
_SHOWN_STATE = {n: f"initial_state.{n}" for n in STATE}
_SHOWN = {
    "rat_attention": _SHOWN_STATE,
    "rat_attention_packed": _SHOWN_STATE,
    "chunk_attention": {**_SHOWN_STATE, "k": "k_states", "v": "v_states"},
    "chunk_recurrence": {},
}
_SHOWN_CACHE = {n: f"cache.{n}" for n in POOL}


def _check_gate(op: str, given: Given) -> None:
    if op == "rat_attention" and given["gate"] is None:  # the operator would take k and v for states
        wrong(op, "gate", "a tensor", "None")


def check_given(op: str, given: Given) -> None:
    """Tells of arguments of wrong types what the op tells. For calls that are put together by hand, before they begin."""
    _check_gate(op, given)
    check_types(op, _OPERATORS[op], given, _SHOWN[op])


def call(name: str, given: Given, op: str | None = None) -> Any:
    """What a public op returns: y, or y and the returned state.

    Args:
        name: the operator.
        given: its arguments by name; it is changed.
        op: what the caller calls it.
    """
    op, spec = op or name, _OPERATORS[name]
    if given.get("cache") is not None:
        return _attention_in_place(op, given)
    if given.get("slots") is not None:
        wrong(op, "slots", "a cache whose entries they name", "none")
    compiling = torch.compiler.is_compiling()
    _check_gate(op, given)
    if not compiling:
        _refuse_jit(op)
    try:
        if compiling:
            check_types(op, spec, given, _SHOWN[op])
        args = prepare(op, spec, given, compiling, brief=True)
        if not compiling and (forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()):
            _refuse_transforms(op, args)
        result = _DIFFERENTIABLE[name](args, compiling)
    except (TypeError, AttributeError, RuntimeError, IndexError):
        check_types(op, spec, given, _SHOWN[op])
        raise
    if len(result) == 1:
        return result[0]
    if "bound" not in given:
        return result
    y, chunk_k, chunk_v, running_k, running_v, lengths = result
    bound: Any = given["bound"]
    bound = bound if isinstance(bound, torch.SymInt) else min(bound, LARGEST)
    return y, RATCache(chunk_k, chunk_v, running_k, running_v, lengths, given["chunk_size"], bound)


def _attention_in_place(op: str, given: Given) -> Tensor:
    """rat_attention and rat_attention_packed with a cache."""
    _check_beside_a_cache(op, given)
    if "projection" in given:
        split_projection(op, given)
    return _in_place("rat_attention_cached", op, given, given["cache"])


def _check_beside_a_cache(op: str, given: Given) -> None:
    cache = given["cache"]
    if not isinstance(cache, RATCache):
        wrong(op, "cache", "a RATCache or None", type(cache).__name__)
    for name in ("initial_state", "return_state", "max_seqlen"):
        if given[name] is not None and given[name] is not False:
            wrong(op, name, "none beside a cache, which is updated in place", "one")
    given["chunk_size"] = integer(op, "chunk_size", given["chunk_size"])
    flag(op, "deterministic", given["deterministic"])
    if given["chunk_size"] != cache.chunk_size:
        wrong(op, "cache", f"a cache of chunk_size {given['chunk_size']}", f"one of {cache.chunk_size}")


def decode(given: Given) -> Tensor:
    """rat_decode_step."""
    op, cache, exact = "rat_decode_step", given["cache"], given["exact"]
    if not isinstance(cache, RATCache):
        wrong(op, "cache", "a RATCache", type(cache).__name__)
    given["chunk_size"] = cache.chunk_size
    if not flag(op, "exact", exact):
        return _in_place(op, op, given, cache)
    given["cu_seqlens"] = None
    one = isinstance(given["q"], Tensor) and given["q"].dim() == 3
    for name in ("q", "k", "v", "gate", "out_gate"):
        if one and isinstance(given[name], Tensor):
            given[name] = given[name].unsqueeze(1)
    y = _in_place("rat_attention_cached", op, given, cache)
    return y.squeeze(1) if one else y


def _in_place(name: str, op: str, given: Given, cache: RATCache) -> Tensor:
    """An operator that writes its cache and has no gradient."""
    spec = _OPERATORS[name]
    take_pool(given, cache)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _refuse_jit(op)
    try:
        if torch.is_grad_enabled():
            for argument in spec.arguments:
                x = given.get(argument)
                if isinstance(x, Tensor) and x.requires_grad:
                    expected = "a tensor that needs no gradient (decoding has none; use torch.no_grad() or RATCache.detach())"
                    wrong(op, _SHOWN_CACHE.get(argument, argument), expected, "one that does")
        if "workspace" in spec.types:
            given["workspace"] = cache.decode_workspace()
        if compiling:
            check_types(op, spec, given, _SHOWN_CACHE)
        args = prepare(op, spec, given, compiling, brief=True)
        if compiling:
            y = spec.overload(*args)
        else:
            if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
                _refuse_transforms(op, args)
            y = (_BRIEF if len(args) < len(spec.arguments) else _KERNELS)[name](*args)
    except (TypeError, AttributeError, RuntimeError, IndexError):
        check_types(op, spec, given, _SHOWN_CACHE)
        raise
    except ValueError as error:
        if name == op:
            raise
        raise ValueError(str(error).replace(name, op, 1)) from None
    cu_seqlens = given.get("cu_seqlens")
    rows = y.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    cache.wrote(y.shape[1] if y.dim() == 4 else 1, rows, given["slots"], cu_seqlens)
    return y


@torch._disable_dynamo  # torch.compile leaves its graph for it. (torch.compiler.disable would import all of dynamo here.)
def explain(name: str, given: Given) -> list[dict[str, Any]]:
    """Which kernel families a call takes: one dict for each phase and family."""
    shown, cache = _SHOWN_STATE, given["cache"]
    if given["gate"] is None:
        wrong("explain", "gate", "a tensor", "None")
    if cache is not None:
        name, shown = "rat_attention_cached", _SHOWN_CACHE
        _check_beside_a_cache("explain", given)
        take_pool(given, cache)
    elif given["slots"] is not None:
        wrong("explain", "slots", "a cache whose entries they name", "none")
    spec = _OPERATORS[name]
    for argument in spec.rows:
        x = given[argument]
        if isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta):
            expected = "a tensor with memory, whose place decides"
            wrong("explain", argument, expected, "a fake one" if isinstance(x, FakeTensor) else "one on the meta device")
    try:
        return _log.choices(name, prepare("explain", spec, given))
    except (TypeError, AttributeError, RuntimeError, IndexError):
        check_types("explain", spec, given, shown)
        raise
