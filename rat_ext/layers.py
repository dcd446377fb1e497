"""The RAT layer: one packed projection, the fused op, an output projection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .cache import RATCache, state_dtype
from .ops import rat_attention_packed, rat_decode_step
from .rotary import layer_tables

if TYPE_CHECKING:
    from .parallel import ContextParallel

Rotary = tuple[Tensor, Tensor]


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
        for name, size in (sizes | {"max_length": max_length}).items():
            if not isinstance(size, int):
                raise ValueError(f"RATLayer: {name}: expected an int, got {size!r}")
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"RATLayer: num_heads: expected a divisor of d_model = {d_model}, got {num_heads}")
        if d_model // num_heads not in range(8, 257, 8):
            raise ValueError(
                "RATLayer: d_model: expected heads whose size d_model / num_heads is a multiple of 8 from 8 to 256, got "
                f"{d_model} / {num_heads} = {d_model // num_heads}"
            )
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(f"RATLayer: num_groups: expected a divisor of num_heads = {num_heads}, got {num_groups}")
        if chunk_size < 1:
            raise ValueError(f"RATLayer: chunk_size: expected at least 1, got {chunk_size}")
        self.num_heads, self.num_groups, self.chunk_size = num_heads, num_groups, chunk_size
        self.head_dim = d_model // num_heads
        if rotary_base is not None and not 0 < rotary_base < math.inf:
            raise ValueError(f"RATLayer: rotary_base: expected a finite number above 0 or None, got {rotary_base}")
        if max_length < 0:
            raise ValueError(f"RATLayer: max_length: expected at least 0, got {max_length}")
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

    def _bias(self, projection: Tensor) -> Tensor:
        """The gate's bias beside ``projection``: this rank's heads, where the layer is split by heads."""
        local = getattr(self.gate_bias, "to_local", None)
        return self.gate_bias if local is None or hasattr(projection, "to_local") else local()

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
        rotary: Rotary | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor | tuple[Tensor, RATCache]:
        """All tokens at once; or, with ``cache``, one new token per sequence.

        Args:
            x: ``(B, T, d_model)``; with ``cache``, ``(B, d_model)``.
            initial_state: the state of B (packed: N) sequences to continue from.
            return_state: also return the state after the last token.
            cu_seqlens: ``(N + 1,)`` int32: sequences packed in one row, B = 1.
            cache: decode one token for every row, and update this cache in place: from :meth:`new_cache`, or from a forward
                with ``return_state`` and then :meth:`rat_ext.RATCache.reserve`. Has no gradient.
            slots: ``(B,)`` int64 entries of ``cache``, -1 to skip a row; None: row b is entry b.
            rotary: tables ``(cos, sin)`` to use instead of the layer's own, as of :func:`rat_ext.rotary_tables`.
            context_parallel: x is this rank's part of a longer row, see :func:`rat_ext.rat_attention`. None: the layer's
                attribute of that name, which :func:`rat_ext.parallel.use_context_parallel` sets. Not used with ``cache``.

        Returns:
            y of the shape of x; with ``return_state``, that and a :class:`rat_ext.RATCache`.
        """
        if cache is not None:
            if initial_state is not None or return_state or cu_seqlens is not None:
                raise ValueError(
                    "RATLayer: cache: expected no initial_state, return_state or cu_seqlens beside it (it is updated in "
                    "place), got one of them"
                )
            self._check(x, initial_state, cache, rotary)
            return self._decode(x, cache, slots, rotary)
        if slots is not None:
            raise ValueError("RATLayer: slots: expected a cache that they index, got cache=None")
        self._check(x, initial_state, cache, rotary)
        projection = self.in_proj(x)
        context_parallel = self.context_parallel if context_parallel is None else context_parallel
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
    def _check(x: Tensor, initial_state: object, cache: object, rotary: object) -> None:
        """What would end in an error of something else's; the op checks the rest."""
        for name, state in (("initial_state", initial_state), ("cache", cache)):
            if state is not None and not isinstance(state, RATCache):
                raise ValueError(f"RATLayer: {name}: expected a RATCache or None, got {type(state).__name__}")
        dims, form = (3, "(B, T, d_model)") if cache is None else (2, "(B, d_model) beside a cache")
        if not isinstance(x, Tensor) or x.dim() != dims:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"RATLayer: x: expected a tensor {form}, got {got}")
        if rotary is not None and not (isinstance(rotary, (tuple, list)) and len(rotary) == 2):
            raise ValueError(f"RATLayer: rotary: expected a pair (cos, sin) or None, got {type(rotary).__name__}")

    @torch.no_grad()
    def step(self, x: Tensor, cache: RATCache, slots: Tensor | None = None) -> Tensor:
        """One new token for every sequence of a batch: :meth:`forward` with ``cache``, by way of the layer's hooks."""
        if not isinstance(cache, RATCache):
            raise ValueError(f"RATLayer: cache: expected a RATCache, got {type(cache).__name__}")
        return self(x, cache=cache, slots=slots)

    @torch.no_grad()
    def _decode(self, x: Tensor, cache: RATCache, slots: Tensor | None, rotary: Rotary | None) -> Tensor:
        projection = self.in_proj(x)
        # A full cache has a chunk more: the open one, whose state has no row.
        tokens = (cache.chunk_k.shape[2] + 1) * self.chunk_size
        cos, sin = self._rotary(tokens, projection) if rotary is None else rotary
        q, k, v, gate, out_gate = projection.unflatten(-1, (-1, self.head_dim)).split(self.parts, dim=-2)
        y = rat_decode_step(
            q,
            k,
            v,
            gate,
            cache,
            gate_bias=self._bias(projection),
            out_gate=out_gate,
            rotary_cos=cos,
            rotary_sin=sin,
            slots=slots,
        )
        return self.out_proj(y.flatten(-2))

    def new_cache(
        self,
        batch: int,
        max_length: int,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> RATCache:
        """An empty cache for ``batch`` sequences of up to ``max_length`` tokens.

        Args:
            batch: sequences.
            max_length: tokens of each.
            dtype: what the op computes in. None: the autocast dtype where autocast is on, else the projection's weights' or,
                where those are not of a floating dtype (quantised), the gate bias's.
            device: where the layer computes. None: where its weights are; name it where those are offloaded.
        """
        weight = getattr(self.in_proj, "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            weight = self.gate_bias
        device = weight.device if device is None else torch.device(device)
        if dtype is None:
            dtype = weight.dtype
            kind = device.type
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(kind)
        return RATCache.empty(batch, self.num_heads, self.head_dim, self.chunk_size, max_length, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        names = ("num_heads", "num_groups", "chunk_size", "head_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
