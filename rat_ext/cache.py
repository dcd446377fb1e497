"""The state of a RAT layer between calls: what prefill returns, a later forward continues from and decode updates."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running states, biases and tables for inputs of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclasses.dataclass(eq=False, repr=False)
class RATCache:
    """States of N sequences. A sequence of n tokens has n // L closed chunks, whose states the next tokens attend to.

    Attributes:
        chunk_k: ``(N, H, C, D)`` keys of closed chunks, rotated by chunk index; rows from ``lengths // chunk_size`` on are
            uninitialised.
        chunk_v: ``(N, H, C, D)`` values of closed chunks.
        running_k: ``(N, H, D)`` float32 (float64 for float64 ops): k~ of the last token, not rotated.
        running_v: ``(N, H, D)``: v~ of the last token.
        lengths: ``(N,)`` int32, tokens so far, on the device of the states. Sequences may differ.
        chunk_size: L.
        length_bound: an upper bound of ``lengths`` that the host knows, in tokens; it decides how many chunk rows a forward
            that continues from here allocates. The ops keep it. Who writes ``lengths`` or replays decode steps in a CUDA
            graph, and then continues with a forward, sets it too; a bound that is too low is an error, not a wrong result.
        workspace: scratch of the decode kernel, made by the first ``rat_decode_step``.
    """

    chunk_k: Tensor
    chunk_v: Tensor
    running_k: Tensor
    running_v: Tensor
    lengths: Tensor
    chunk_size: int
    length_bound: int
    workspace: Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        num_heads: int,
        head_dim: int,
        chunk_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RATCache:
        """A cache for ``batch`` sequences of up to ``max_length`` tokens, all of length 0."""
        if chunk_size < 1:
            raise ValueError(f"RATCache: chunk_size: expected at least 1, got {chunk_size}")
        if max_length < 0:
            raise ValueError(f"RATCache: max_length: expected at least 0, got {max_length}")
        states = (batch, num_heads, max_length // chunk_size, head_dim)
        running = (batch, num_heads, head_dim)
        return cls(
            chunk_k=torch.empty(states, dtype=dtype, device=device),
            chunk_v=torch.empty(states, dtype=dtype, device=device),
            running_k=torch.zeros(running, dtype=state_dtype(dtype), device=device),
            running_v=torch.zeros(running, dtype=state_dtype(dtype), device=device),
            lengths=torch.zeros(batch, dtype=torch.int32, device=device),
            chunk_size=chunk_size,
            length_bound=0,
        )

    @property
    def batch(self) -> int:
        """Number of sequences N."""
        return self.chunk_k.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can hold: one short of closing a chunk for which there is no row."""
        return (self.chunk_k.shape[2] + 1) * self.chunk_size - 1

    def __repr__(self) -> str:
        n, heads, rows, dim = self.chunk_k.shape
        dtype = str(self.chunk_k.dtype).removeprefix("torch.")
        return (
            f"RATCache({n} sequences, {heads} heads of {dim}, {rows} chunks of {self.chunk_size} tokens, {dtype}, "
            f"{self.chunk_k.device})"
        )

    def _map(self, function) -> RATCache:
        return RATCache(
            *(function(getattr(self, name)) for name in _TENSORS), chunk_size=self.chunk_size, length_bound=self.length_bound
        )

    def clone(self) -> RATCache:
        """A copy that shares no memory."""
        return self._map(torch.clone)

    def detach(self) -> RATCache:
        """The same memory, cut off from autograd: for truncated backpropagation through time, and for decoding."""
        return self._map(torch.detach)

    def reserve(self, max_length: int) -> RATCache:
        """A cache with the same contents that holds ``max_length`` tokens a sequence; ``self`` if it already does.

        Prefill returns just the rows that it filled: reserve once before decoding. Continue with the result, not with
        ``self``: the two share running states and lengths. To branch from a state, :meth:`clone` it first.
        """
        rows = max_length // self.chunk_size
        have = self.chunk_k.shape[2]
        if rows <= have:
            return self
        grown = self._map(lambda x: x)
        for name in ("chunk_k", "chunk_v"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], rows, old.shape[3])
            new[:, :, :have] = old
            setattr(grown, name, new)
        return grown

    def write(self, slots: Tensor, other: RATCache) -> None:
        """Copies the sequences of ``other`` into entries ``slots`` of this pool, in place: how prefill joins a batch.

        Args:
            slots: ``(other.batch,)`` int64, distinct entries of this cache. -1 is an error here: nothing is skipped.
            other: a cache of the same heads, head size, chunk size and dtype, with no more chunk rows than this one.
        """
        self._check_like(other, "other")
        rows = other.chunk_k.shape[2]
        if rows > self.chunk_k.shape[2]:
            raise ValueError(f"RATCache.write: other: expected at most {self.chunk_k.shape[2]} chunk rows, got {rows}")
        if slots.shape != (other.batch,):
            raise ValueError(f"RATCache.write: slots: expected shape ({other.batch},), got {tuple(slots.shape)}")
        with torch.no_grad():
            # index_copy_, unlike an assignment to [slots], takes -1 for an error and not for the last entry.
            self.chunk_k[:, :, :rows].index_copy_(0, slots, other.chunk_k)
            self.chunk_v[:, :, :rows].index_copy_(0, slots, other.chunk_v)
            self.running_k.index_copy_(0, slots, other.running_k)
            self.running_v.index_copy_(0, slots, other.running_v)
            self.lengths.index_copy_(0, slots, other.lengths)
        self.length_bound = max(self.length_bound, other.length_bound)

    def read(self, slots: Tensor) -> RATCache:
        """A copy of entries ``slots``: ``(M,)`` int64."""
        return self._map(lambda x: x.index_select(0, slots))

    def reset(self, slots: Tensor | None = None) -> None:
        """Forgets every sequence, or the entries ``slots``: their lengths become 0."""
        if slots is None:
            self.lengths.zero_()
            self.length_bound = 0
        else:
            self.lengths[slots] = 0

    def _check_like(self, other: RATCache, name: str) -> None:
        for what in ("chunk_size", "heads", "head_dim", "dtype"):
            mine, theirs = _trait(self, what), _trait(other, what)
            if mine != theirs:
                raise ValueError(f"RATCache: {name}: expected {what} {mine}, got {theirs}")


_TENSORS = ("chunk_k", "chunk_v", "running_k", "running_v", "lengths")


def _trait(cache: RATCache, what: str):
    return {
        "chunk_size": cache.chunk_size,
        "heads": cache.chunk_k.shape[1],
        "head_dim": cache.chunk_k.shape[3],
        "dtype": cache.chunk_k.dtype,
    }[what]
