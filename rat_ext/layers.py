"""The RAT layer: one packed projection, the fused op, an output projection."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._arguments import device_of, flag, floating, integer, real, wrong
from .cache import RATCache, state_dtype
from .ops import rat_attention_packed, rat_decode_step
from .rotary import layer_tables

if TYPE_CHECKING:
    from .parallel import ContextParallel

Rotary = tuple[Tensor, Tensor]


def _without_gradient() -> contextlib.AbstractContextManager:
    """No gradient is recorded, but while exporting: a program with a change of gradient mode in it cannot be saved."""
    return contextlib.nullcontext() if torch.compiler.is_exporting() else torch.no_grad()


class Linear(nn.Linear):
    """``nn.Linear`` whose weights are drawn from a normal distribution, also by wrappers that reset module by module."""

    std: float | None = None  # None: in_features ** -0.5

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5 if self.std is None else self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class RATLayer(nn.Module):
    """A drop-in for a causal self-attention layer: ``(B, T, d_model) -> (B, T, d_model)``.

    Args:
        d_model: width of the input; H divides it.
        num_heads: H, heads of values and gates, each of size D = d_model / H (a multiple of 8, at most 256).
        num_groups: G, heads of queries and keys; divides H.
        chunk_size: L, tokens in a chunk.
        max_length: tokens for which the rotary tables are made at first; a call that needs more makes longer ones.
        rotary_base: base of the rotary frequencies; chunks, not tokens, are the positions. None: no rotation.

    The forget gates ``sigmoid(projection + gate_bias)`` start spread over time scales from about one token to a chunk.

    Parameters are the only state of the layer. Rotary tables are made at use, for the device and dtype of the projection, and
    shared by all layers.
    """

    context_parallel: ContextParallel | None = None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_groups: int,
        chunk_size: int,
        *,
        max_length: int = 2048,
        rotary_base: float | None = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"d_model": d_model, "num_heads": num_heads, "num_groups": num_groups, "chunk_size": chunk_size}
        sizes = {name: integer("RATLayer", name, size) for name, size in (sizes | {"max_length": max_length}).items()}
        d_model, num_heads, num_groups, chunk_size, max_length = sizes.values()
        if num_heads < 1 or d_model % num_heads:
            wrong("RATLayer", "num_heads", f"a divisor of d_model = {d_model}", num_heads)
        if d_model // num_heads not in range(8, 257, 8):
            expected = "heads whose size d_model / num_heads is a multiple of 8 from 8 to 256"
            wrong("RATLayer", "d_model", expected, f"{d_model} / {num_heads} = {d_model // num_heads}")
        if num_groups < 1 or num_heads % num_groups:
            wrong("RATLayer", "num_groups", f"a divisor of num_heads = {num_heads}", num_groups)
        if chunk_size < 1:
            wrong("RATLayer", "chunk_size", "at least 1", chunk_size)
        if max_length < 0:
            wrong("RATLayer", "max_length", "at least 0", max_length)
        if rotary_base is not None:
            rotary_base = real("RATLayer", "rotary_base", rotary_base)
            if not 0 < rotary_base < math.inf:
                wrong("RATLayer", "rotary_base", "a finite number above 0 or None", rotary_base)
        dtype, device = floating("RATLayer", "dtype", dtype), device_of("RATLayer", "device", device)
        self.num_heads, self.num_groups, self.chunk_size = num_heads, num_groups, chunk_size
        self.head_dim = d_model // num_heads
        self.max_length, self.rotary_base = max_length, rotary_base
        # Widths of q, k, v, gate and out_gate in the projection, in heads.
        self.parts = (num_groups, num_groups, num_heads, num_heads, num_heads)
        self.in_proj = Linear(d_model, sum(self.parts) * self.head_dim, bias=False, device=device, dtype=dtype)
        self.out_proj = Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
        self.gate_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / d_model; gate biases spread over D."""
        for child in self.children():
            if isinstance(child, Linear):  # what wraps or replaces a projection has means of its own
                child.reset_parameters()
        # A forget gate f remembers about 1 / (1 - f) = 1 + exp(bias) tokens: from 1.25 to 1 + L / 2, at most 513.
        first, last = math.log(0.25), math.log(max(min(self.chunk_size, 1024) / 2, 1))
        with torch.no_grad():
            # ones_like: on the bias's device and, where it is a DTensor, sharded as it is.
            place = torch.ones_like(self.gate_bias, dtype=state_dtype(self.gate_bias.dtype)).cumsum(-1) - 1
            self.gate_bias.copy_(first + (last - first) / (self.head_dim - 1) * place)

    def _bias(self, projection: Tensor, given: Tensor | None = None) -> Tensor:
        """The gate's bias or what was ``given``, made of it, beside ``projection``: this rank's heads, if split by heads."""
        bias: Any = self.gate_bias if given is None else given
        sharded = hasattr(type(bias), "to_local")  # of the type: a tracer finds it there alone
        return bias.to_local() if sharded and not hasattr(type(projection), "to_local") else bias

    def _rotary(self, tokens: int, projection: Tensor) -> Rotary | tuple[None, None]:
        """Tables for ``tokens`` tokens, of the device of ``projection`` and in the state dtype of its dtype."""
        if self.rotary_base is None:
            return None, None
        if torch.compiler.is_compiling():
            rows = tokens // self.chunk_size + 2  # never 0 or 1, of which the tracer makes graphs of their own
        else:
            rows = -(-max(tokens, self.max_length) // self.chunk_size)
        return layer_tables(rows, self.head_dim, self.rotary_base, projection.device, state_dtype(projection.dtype))

    def forward(
        self,
        x: Tensor,
        initial_state: RATCache | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        *,
        cache: RATCache | None = None,
        slots: Tensor | None = None,
        exact: bool | None = None,
        rotary: Rotary | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, RATCache]:
        """All tokens at once; or, with ``cache``, new tokens of sequences that a cache holds.

        Args:
            x: ``(B, T, d_model)``; with ``cache`` also ``(B, d_model)``, one token per sequence.
            initial_state: the state of B (packed: N) sequences to continue from.
            return_state: also return the state after the last token.
            cu_seqlens: ``(N + 1,)`` int32: sequences packed in one row, B = 1.
            cache: continue the sequences of this cache and update it in place: from :meth:`new_cache`, or from a forward with
                ``return_state`` and then :meth:`rat_ext.RATCache.reserve`. Has no gradient.
            slots: ``(B or N,)`` int64 entries of ``cache``, -1 to skip one; None: row b is entry b.
            exact: with ``cache``, the arithmetic: the forward's, with outputs of the same bits in any cut; or that of
                :func:`rat_ext.rat_decode_step`, faster for a few tokens per sequence. None: the forward's for 3 dimensions of
                x, decoding's for 2.
            rotary: tables ``(cos, sin)`` to use instead of the layer's own, as of :func:`rat_ext.rotary_tables`.
            context_parallel: x is this rank's part of a longer row, see :func:`rat_ext.rat_attention`. None: the layer's
                attribute of that name, which :func:`rat_ext.parallel.use_context_parallel` sets. Not used with ``cache``.

        Returns:
            y of the shape of x; with ``return_state``, that and a :class:`rat_ext.RATCache`.
        """
        self._check(x, getattr(self.in_proj, "in_features", None), initial_state, cache, rotary)
        if cache is not None:
            if initial_state is not None or return_state:
                raise ValueError(
                    "RATLayer: cache: expected no initial_state or return_state beside it (it is updated in place), got one of "
                    "them"
                )
            exact = x.dim() == 3 if exact is None else flag("RATLayer", "exact", exact)
            if cu_seqlens is not None and (x.dim() == 2 or not exact):
                raise ValueError("RATLayer: cu_seqlens: expected x (1, T, d_model) and exact arithmetic beside it, got others")
            with _without_gradient():
                return self._serve(x, cache, slots, cu_seqlens, exact, rotary)
        for name, value in (("slots", slots), ("exact", exact)):
            if value is not None:
                raise ValueError(f"RATLayer: {name}: expected a cache that it is for, got cache=None")
        projection = self.in_proj(x)
        context_parallel = self.context_parallel if context_parallel is None else context_parallel
        if context_parallel is not None and not hasattr(context_parallel, "positions"):
            wrong("RATLayer", "context_parallel", "a ContextParallel or None", type(context_parallel).__name__)
        past = 0 if initial_state is None else initial_state.length_bound
        tokens = past + x.shape[1] if context_parallel is None else context_parallel.length(x.shape[1])
        cos, sin = self._rotary(tokens, projection) if rotary is None else rotary
        result = rat_attention_packed(
            projection, self.num_heads, self.num_groups, self.chunk_size, gate_bias=self._bias(projection), rotary_cos=cos,
            rotary_sin=sin, cu_seqlens=cu_seqlens, initial_state=initial_state, return_state=return_state,
            context_parallel=context_parallel,
        )  # fmt: skip
        if isinstance(result, Tensor):
            return self.out_proj(result.flatten(2))
        y, state = result
        return self.out_proj(y.flatten(2)), state

    @staticmethod
    def _check(x: Tensor, width: object, initial_state: object, cache: object, rotary: object) -> None:
        """What would end in an error of something else's; the op checks the rest."""
        for name, state in (("initial_state", initial_state), ("cache", cache)):
            if state is not None and not isinstance(state, RATCache):
                raise ValueError(f"RATLayer: {name}: expected a RATCache or None, got {type(state).__name__}")
        form = "(B, T, d_model)" if cache is None else "(B, d_model) or (B, T, d_model) beside a cache"
        if not isinstance(x, Tensor) or x.dim() not in ((3,) if cache is None else (2, 3)):
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"RATLayer: x: expected a tensor {form}, got {got}")
        if type(width) is int and x.shape[-1] != width:  # what wraps or replaces a projection may have no width
            raise ValueError(f"RATLayer: x: expected a tensor {form} with d_model = {width}, got shape {tuple(x.shape)}")
        if rotary is not None and not (isinstance(rotary, (tuple, list)) and len(rotary) == 2):
            raise ValueError(f"RATLayer: rotary: expected a pair (cos, sin) or None, got {type(rotary).__name__}")

    def step(self, x: Tensor, cache: RATCache, slots: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """New tokens for every sequence of a batch: :meth:`forward` with ``cache``, by way of the layer's hooks.

        Args:
            x: ``(B, d_model)``, or ``(B, n, d_model)`` for a draft of n tokens.
            cache, slots, exact: as in :meth:`forward`; decoding's arithmetic, if not ``exact``.

        Returns:
            y of the shape of x.
        """
        if not isinstance(cache, RATCache):
            raise ValueError(f"RATLayer: cache: expected a RATCache, got {type(cache).__name__}")
        with _without_gradient():
            return self(x, cache=cache, slots=slots, exact=exact)

    def _serve(
        self,
        x: Tensor,
        cache: RATCache,
        slots: Tensor | None,
        cu_seqlens: Tensor | None,
        exact: bool,
        rotary: Rotary | None,
    ) -> Tensor:
        # Cast before the projection: the op's kernel then follows that of the projection, and may start while it ends.
        gate_bias = self.gate_bias.detach().to(state_dtype(self.gate_bias.dtype))
        projection = self.in_proj(x).detach()
        gate_bias = self._bias(projection, gate_bias)
        # A full cache has a chunk more: the open one, whose state has no row.
        cos, sin = self._rotary(cache.capacity + 1, projection) if rotary is None else rotary
        if exact and x.dim() == 3:
            y = rat_attention_packed(
                projection, self.num_heads, self.num_groups, self.chunk_size, gate_bias=gate_bias, rotary_cos=cos,
                rotary_sin=sin, cu_seqlens=cu_seqlens, cache=cache, slots=slots,
            )  # fmt: skip
            assert isinstance(y, Tensor)
        else:
            q, k, v, gate, out_gate = projection.unflatten(-1, (-1, self.head_dim)).split(self.parts, dim=-2)
            y = rat_decode_step(
                q, k, v, gate, cache, gate_bias=gate_bias, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin,
                slots=slots, exact=exact,
            )  # fmt: skip
        return self.out_proj(y.flatten(-2))

    def new_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | None = None,
        **options,
    ) -> RATCache:
        """An empty cache for ``batch`` sequences of up to ``max_length`` tokens.

        Args:
            batch: sequences.
            max_length: tokens of each.
            dtype: what the op computes in. None: the autocast dtype where autocast is on, else the projection's weights' or,
                where those are not of a floating dtype (quantised), the gate bias's. Name it under FSDP's mixed precision: the
                weights do not show what a wrapper casts them to.
            device: where the layer computes. None: where its weights are; name it where those are offloaded.
            options: those of a pool, as of :meth:`rat_ext.RATCache.empty`: draft_tokens, page_chunks, num_pages, fp8.
        """
        batch, max_length = (
            integer("RATLayer.new_cache", name, x) for name, x in (("batch", batch), ("max_length", max_length))
        )
        weight = getattr(self.in_proj, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            weight = self.gate_bias
        device = device_of("RATLayer.new_cache", "device", device) or weight.device
        dtype = floating("RATLayer.new_cache", "dtype", dtype)
        if dtype is None:
            dtype = weight.dtype
            kind = device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(kind)
        sizes = (batch, self.num_heads, self.head_dim, self.chunk_size, max_length)
        return RATCache.empty(*sizes, dtype=dtype, device=device, **options)

    def extra_repr(self) -> str:
        names = ("num_heads", "num_groups", "chunk_size", "head_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
