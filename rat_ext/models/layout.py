"""Where the tokens of one call stand: rows, paddings, packed sequences, rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..cache import readable, state_dtype
from ..rotary import layer_tables
from .cache import RATModelCache
from .config import RATConfig

if TYPE_CHECKING:
    from ..parallel import ContextParallel


def wrong(argument: str, expected: str, got: object) -> ValueError:
    """The error for a wrong argument of a model."""
    return ValueError(f"rat_ext.RATModel: {argument}: expected {expected}, got {got}")


class Layout:
    """What all layers of one call share.

    A plain object on purpose: wrappers for mixed precision cast the tensors of tuples, dicts and dataclasses.

    Attributes:
        batch, tokens: B and T of the call.
        cache: what the layers continue from and write to, or None.
        start: columns that the cache has seen before; 0 without a cache.
        lengths: ``(B,)`` int32 tokens of each row before the call, or None without a cache.
        cu_seqlens: ``(N + 1,)`` int32 where the layers work on a packed row, else None.
        max_seqlen: a bound of the sequences' lengths that the host knows.
        counts: ``(B,)`` int32, new tokens of each row, where padding was taken out.
        index: ``(n,)`` columns of the batch, B * T in all, that make the packed row.
        place: ``(B * T,)`` the packed token whose output a column gets: its own; that of the last one before it where it is
            padding.
        rows: ``(B, T)`` the packed token that is a row's t-th (where t is past its count: some token).
        angles: cosine and sine of the rotations by token, ``(1 or B, T, 1, D / 2)``, or ``(1, n, ...)`` packed; None where no
            layer rotates by token.
        tables: rotary tables by chunk size; none without rotation.
        context_parallel: how the tokens are part of a row that several ranks hold, or None.
    """

    cache: RATModelCache | None = None
    start = 0
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    counts: Tensor | None = None
    index: Tensor | None = None
    place: Tensor | None = None
    rows: Tensor | None = None
    valid: Tensor | None = None
    angles: tuple[Tensor, Tensor] | None = None
    context_parallel: ContextParallel | None = None

    def __init__(self, batch: int, tokens: int):
        self.batch, self.tokens, self.max_seqlen = batch, tokens, tokens
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def to(self, device: Any, *args: Any, **kwargs: Any) -> Layout:
        """The same on another device, for models whose layers are on several."""
        device = torch.device(device)
        moved = Layout(self.batch, self.tokens)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        moved.tables = {size: (cos.to(device), sin.to(device)) for size, (cos, sin) in self.tables.items()}
        if self.angles is not None:
            moved.angles = (self.angles[0].to(device), self.angles[1].to(device))
        return moved

    # ---- the two forms of a batch ----

    def pack(self, x: Tensor) -> Tensor:
        """``(B, T, d)`` as the layers take it: ``(1, n, d)`` where there is padding."""
        return x if self.index is None else x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """What :meth:`pack` made, as ``(B, T, d)``."""
        return x if self.place is None else x[0].index_select(0, self.place).unflatten(0, (self.batch, self.tokens))

    def align(self, x: Tensor) -> Tensor:
        """``(1, n, ...)`` of a packed row as ``(B, T, ...)``, each row's tokens first; past its count, some token's."""
        return x if self.rows is None else x[0, self.rows]

    def unalign(self, x: Tensor) -> Tensor:
        """What :meth:`align` made, packed again."""
        if self.rows is None:
            return x
        assert self.counts is not None
        there = torch.arange(self.tokens, device=x.device) < self.counts[:, None]
        return x[there][None]


def make_layout(
    config: RATConfig,
    x: Tensor,
    cache: RATModelCache | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    context_parallel: ContextParallel | None = None,
) -> Layout:
    """The layout of a call on embeddings ``x`` ``(B, T, d)``."""
    batch, tokens = x.shape[:2]
    layout = Layout(batch, tokens)
    layout.context_parallel = context_parallel
    if cache is not None:
        layout.cache, layout.start = cache, cache.seen
        layout.lengths = cache.begin(batch, x.device)
    if cu_seqlens is not None:
        if batch != 1:
            raise wrong("cu_seq_lens_q", "with a batch of one row", f"{batch} rows")
        if cache is not None and cache.seen:
            raise wrong("cu_seq_lens_q", "without a cache", "one")
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            got = f"shape {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise wrong("cu_seq_lens_q", "a tensor (sequences + 1,) of ints", got)
        if max_seqlen is not None and readable(cu_seqlens) and cu_seqlens.shape[0] > 1:
            longest = int(cu_seqlens.diff().max())
            if max_seqlen < longest:
                raise wrong("max_length_q", f"at least the longest sequence's {longest} tokens", max_seqlen)
        layout.cu_seqlens = cu_seqlens.to(x.device, torch.int32)
        layout.max_seqlen = tokens if max_seqlen is None else max_seqlen
        layout.cache = layout.lengths = None
    elif attention_mask is not None:
        _unpad(layout, attention_mask, x)
    _rotations(layout, config, x)
    return layout


def packed_sequences(position_ids: Tensor) -> Tensor | None:
    """``cu_seqlens`` of a row ``(1, T)`` whose positions begin anew somewhere; None where they do not."""
    if position_ids.dim() != 2 or position_ids.shape[0] != 1 or torch.compiler.is_compiling():
        return None
    starts = (position_ids[0].diff() != 1).nonzero()[:, 0] + 1
    if starts.shape[0] == 0:
        return None
    return F.pad(F.pad(starts, (1, 0)), (0, 1), value=position_ids.shape[1]).to(torch.int32)


def _unpad(layout: Layout, mask: Tensor, x: Tensor) -> None:
    batch, tokens = layout.batch, layout.tokens
    if not isinstance(mask, Tensor):
        raise wrong("attention_mask", "a tensor or None", type(mask).__name__)
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        raise wrong("attention_mask", f"shape ({batch}, at least {tokens}), 1 for tokens and 0 for padding", tuple(mask.shape))
    valid = mask[:, -tokens:].to(x.device).bool()
    compiling = torch.compiler.is_compiling()
    if compiling and (tokens == 1 or layout.start != 0):
        return  # a step's tokens are no padding
    if not compiling and bool(valid.all()):
        return
    flat, counts = valid.flatten(), valid.sum(1, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32)
    layout.cu_seqlens = torch.cat((ends.new_zeros(1), ends))
    if compiling:
        # No size depends on the mask: padding comes last, as a sequence of its own.
        layout.index = (~flat).to(torch.uint8).argsort(stable=True)
        layout.cu_seqlens = torch.cat((layout.cu_seqlens, ends.new_full((1,), batch * tokens)))
        layout.max_seqlen = batch * tokens
    else:
        layout.index = flat.nonzero()[:, 0]
        if layout.index.shape[0] == 0:
            raise wrong("attention_mask", "at least one token among the new columns", "padding alone")
    last = layout.index.shape[0] - 1
    first = layout.cu_seqlens[:batch, None].long()
    layout.place = (first + valid.cumsum(1) - 1).maximum(first).clamp(max=last).flatten()
    layout.rows = (first + torch.arange(tokens, device=x.device)).clamp(max=last)
    layout.counts, layout.valid = counts, valid


def _rotations(layout: Layout, config: RATConfig, x: Tensor) -> None:
    """Rotations, for the layers that there are."""
    dtype, dim, base, cache = state_dtype(x.dtype), config.head_dim, config.rope_theta, layout.cache
    if base is None:
        return
    # Tokens of the longest row, or more.
    limit, ranks = layout.start + max(layout.tokens, layout.max_seqlen), layout.context_parallel
    if ranks is not None:
        limit = ranks.length(layout.tokens)
    if cache is not None and cache.static and cache.max_length is not None:
        limit = cache.max_length
    for size in {config.chunk_sizes[i] for i, kind in enumerate(config.layer_types) if kind == "rat"}:
        rows = limit // size + 2  # never 0 or 1, of which a tracer makes graphs of their own
        layout.tables[size] = layer_tables(rows, dim, base, x.device, dtype)
    if not {"attention", "sliding_attention"} & set(config.layer_types):
        return
    device, past = x.device, layout.lengths if layout.start != 0 else None
    if ranks is not None:
        position = ranks.positions(layout.tokens, device)[None]
    elif layout.cu_seqlens is not None:
        n = layout.tokens if layout.index is None else layout.index.shape[0]
        token = torch.arange(n, device=device)
        sequence = torch.searchsorted(layout.cu_seqlens[1:].contiguous(), token, right=True)
        position = (token - layout.cu_seqlens[sequence])[None]
        if past is not None:
            position = position + past[sequence]
    else:
        position = torch.arange(layout.tokens, device=device)[None]
        if past is not None:
            position = position + past[:, None]
    # float64: a position past 2^24 times a frequency is no float32.
    exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim
    angle = position[:, :, None, None] * base**-exponent
    layout.angles = (angle.cos().to(dtype), angle.sin().to(dtype))
