"""The RAT layer: one packed projection, the fused op, an output projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .cache import RATCache, state_dtype
from .ops import rat_attention_packed, rat_decode_step
from .rotary import rotary_tables


class RATLayer(nn.Module):
    """A drop-in for a causal self-attention layer: ``(B, T, d_model) -> (B, T, d_model)``.

    Args:
        d_model: width of the input; H divides it.
        num_heads: H, heads of values and gates, each of size D = d_model / H (a multiple of 8, at most 256).
        num_groups: G, heads of queries and keys; divides H.
        chunk_size: L, tokens in a chunk.
        max_length: tokens for which the rotary tables are made at first; they grow when a call needs more.
        rotary_base: base of the rotary frequencies; chunks, not tokens, are the positions. None: no rotation.

    The forget gates ``sigmoid(projection + gate_bias)`` start spread over time scales from about one token to a chunk.
    """

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
        self.rotary_base = rotary_base
        # Widths of q, k, v, gate and out_gate in the projection, in heads.
        self.parts = (num_groups, num_groups, num_heads, num_heads, num_heads)
        self.in_proj = nn.Linear(d_model, sum(self.parts) * self.head_dim, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
        self.gate_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, device=device, dtype=dtype))
        self._make_tables(-(-max_length // chunk_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / d_model; gate biases spread over D."""
        for linear in (self.in_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        # A forget gate f remembers about 1 / (1 - f) = 1 + exp(bias) tokens: from 1.25 to 1 + L / 2, at most 513.
        longest = max(min(self.chunk_size, 1024) / 2, 1)
        with torch.no_grad():
            self.gate_bias.copy_(torch.linspace(math.log(0.25), math.log(longest), self.head_dim).expand_as(self.gate_bias))

    # ---- rotary tables ----

    def _make_tables(self, rows: int) -> None:
        weight = self.in_proj.weight
        cos = sin = None
        if self.rotary_base is not None:
            with torch.inference_mode(False):  # tables made while sampling serve training later
                cos, sin = rotary_tables(
                    max(rows, 1),
                    self.head_dim,
                    base=self.rotary_base,
                    device=weight.device,
                    dtype=state_dtype(weight.dtype),
                )
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.rotary_cos is not None:
            self._make_tables(self.rotary_cos.shape[0])  # a cast of the layer to bfloat16 is not one of the tables
        return self

    def _tables(self, rows: int) -> dict[str, Tensor | None]:
        """Tables of at least ``rows`` chunks, by argument name."""
        if self.rotary_cos is not None and rows > self.rotary_cos.shape[0]:
            self._make_tables(max(rows, 2 * self.rotary_cos.shape[0]))
        return {"rotary_cos": self.rotary_cos, "rotary_sin": self.rotary_sin}

    # ---- computation ----

    def forward(
        self,
        x: Tensor,
        initial_state: RATCache | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RATCache]:
        """All tokens at once.

        Args:
            x: ``(B, T, d_model)``.
            initial_state: the state of B (packed: N) sequences to continue from.
            return_state: also return the state after the last token.
            cu_seqlens: ``(N + 1,)`` int32: sequences packed in one row, B = 1.

        Returns:
            ``(B, T, d_model)``; with ``return_state``, that and a :class:`rat_ext.RATCache`.
        """
        past = 0 if initial_state is None else initial_state.length_bound
        y = rat_attention_packed(
            self.in_proj(x),
            self.num_heads,
            self.num_groups,
            self.chunk_size,
            gate_bias=self.gate_bias,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            return_state=return_state,
            **self._tables(-(-(past + x.shape[1]) // self.chunk_size)),
        )
        y, state = y if return_state else (y, None)
        y = self.out_proj(y.flatten(2))
        return (y, state) if return_state else y

    @torch.no_grad()
    def step(self, x: Tensor, cache: RATCache, slots: Tensor | None = None) -> Tensor:
        """One new token for every sequence of a batch; updates ``cache`` in place. No gradient.

        Args:
            x: ``(B, d_model)``.
            cache: from :meth:`new_cache`, or from :meth:`forward` and then :meth:`rat_ext.RATCache.reserve`.
            slots: ``(B,)`` int64 entries of the cache, -1 to skip a row; None: row b is entry b.

        Returns:
            ``(B, d_model)``.
        """
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v, gate, out_gate = heads.split(self.parts, dim=-2)
        y = rat_decode_step(
            q, k, v, gate, cache, gate_bias=self.gate_bias, out_gate=out_gate, slots=slots,
            **self._tables(cache.chunk_k.shape[2] + 1),
        )  # fmt: skip
        return self.out_proj(y.flatten(-2))

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> RATCache:
        """An empty cache for ``batch`` sequences of up to ``max_length`` tokens, in the dtype the op computes in."""
        weight = self.in_proj.weight
        if dtype is None:
            autocast = torch.is_autocast_enabled(weight.device.type)
            dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        return RATCache.empty(
            batch, self.num_heads, self.head_dim, self.chunk_size, max_length, dtype=dtype, device=weight.device
        )

    def extra_repr(self) -> str:
        names = ("num_heads", "num_groups", "chunk_size", "head_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
