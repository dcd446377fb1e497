"""The state of a RAT layer between calls: what prefill returns, a later forward continues from and decode updates."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_NAMES = ("chunk_k", "chunk_v", "running_k", "running_v", "lengths")  # in the order of the ops' arguments


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running states, biases and tables for inputs of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class SlotError(ValueError, IndexError):
    """A slot outside the cache: a wrong argument, and an index that is out of range."""


class RATCache:
    """States of N sequences. A sequence of n tokens has n // L closed chunks, whose states the next tokens attend to.

    It can be copied, pickled, saved and loaded (by ``torch.load`` as it is by default), and is a pytree of its five tensors,
    for ``torch.export``. It is no dataclass: wrappers for mixed precision cast the fields of those, and a state's tensors have
    dtypes of their own.

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
        error: ``(4,)`` int32: code, row, slot and detail of the first row that a GPU skipped; zeros where there was none. Made
            by the first ``rat_decode_step`` where it is None; no part of the state.
        workspace: scratch of the decode kernel, made by the first ``rat_decode_step`` outside a graph; no part of the state.
    """

    def __init__(
        self,
        chunk_k: Tensor,
        chunk_v: Tensor,
        running_k: Tensor,
        running_v: Tensor,
        lengths: Tensor,
        chunk_size: int,
        length_bound: int,
        workspace: Tensor | None = None,
        error: Tensor | None = None,
    ):
        self.chunk_k, self.chunk_v = chunk_k, chunk_v
        self.running_k, self.running_v = running_k, running_v
        self.lengths = lengths
        self.chunk_size = chunk_size
        self.length_bound = length_bound
        self.workspace = workspace
        self.error = error

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
        for name, value, least in (
            ("batch", batch, 0),
            ("num_heads", num_heads, 0),
            ("head_dim", head_dim, 0),
            ("chunk_size", chunk_size, 1),
            ("max_length", max_length, 0),
        ):
            if not isinstance(value, (int, torch.SymInt)):
                raise ValueError(f"RATCache: {name}: expected an int, got {value!r}")
            if value < least:
                raise ValueError(f"RATCache: {name}: expected at least {least}, got {value}")
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
            error=torch.zeros(4, dtype=torch.int32, device=device),
        )

    # ---- what it is ----

    @property
    def batch(self) -> int:
        """Number of sequences N."""
        return self.chunk_k.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can hold: one short of closing a chunk for which there is no row."""
        return (self.chunk_k.shape[2] + 1) * self.chunk_size - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the states and lengths."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(chunk_k, chunk_v, running_k, running_v, lengths)``, in the order of the ops' arguments."""
        return self.chunk_k, self.chunk_v, self.running_k, self.running_v, self.lengths

    def __repr__(self) -> str:
        if not isinstance(self.chunk_k, Tensor) or self.chunk_k.dim() != 4:  # a tree of something else, while it is mapped
            return f"RATCache({self.chunk_k!r}, ...)"
        n, heads, rows, dim = self.chunk_k.shape
        dtype = str(self.chunk_k.dtype).removeprefix("torch.")
        return (
            f"RATCache({n} sequences, {heads} heads of {dim}, {rows} chunks of {self.chunk_size} tokens, {dtype}, "
            f"{self.chunk_k.device})"
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"workspace": None, "error": None}

    # ---- copies ----

    def _map(self, function: Callable[[Tensor], Tensor]) -> RATCache:
        return self.replace(**{name: function(getattr(self, name)) for name in _NAMES})

    def replace(self, **changes) -> RATCache:
        """A cache that shares this one's tensors except for ``changes``, by attribute name."""
        return RATCache(**self.__getstate__() | changes)

    def clone(self) -> RATCache:
        """A copy that shares no memory."""
        return self._map(torch.clone)

    def detach(self) -> RATCache:
        """The same memory, cut off from autograd: for truncated backpropagation through time, and for decoding."""
        return self._map(torch.detach)

    def to(self, *args, **kwargs) -> RATCache:
        """On another device, or for ops of another dtype: arguments as of ``Tensor.to``. Shares what does not change.

        ``dtype`` is that of the closed chunks, which are rounded to it; running states become float32 (float64 for float64),
        lengths stay int32.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"RATCache.to: dtype: expected a floating dtype, got {dtype}")
        running = None if dtype is None else state_dtype(dtype)
        dtypes = dict(zip(_NAMES, (dtype, dtype, running, running, None), strict=True))
        moved = {name: getattr(self, name).to(device=device, dtype=d, non_blocking=non_blocking) for name, d in dtypes.items()}
        return self.replace(**moved)

    def reserve(self, max_length: int) -> RATCache:
        """A cache with the same contents that holds ``max_length`` tokens per sequence; ``self`` if it already does.

        Prefill returns just the rows that it filled: reserve once before decoding. Continue with the result, not with
        ``self``: the two share running states and lengths. To branch from a state, :meth:`clone` it first.
        """
        rows = max_length // self.chunk_size
        have = self.chunk_k.shape[2]
        if rows <= have:
            return self

        def grown(old: Tensor) -> Tensor:
            new = old.new_empty(*old.shape[:2], rows, old.shape[3])
            new[:, :, :have] = old
            return new

        return self.replace(chunk_k=grown(self.chunk_k), chunk_v=grown(self.chunk_v))

    # ---- entries of a pool: distinct numbers from 0 to N - 1. -1, which skips a row in decoding, is an error here. ----

    def write(self, slots: Tensor, other: RATCache) -> None:
        """Copies the sequences of ``other`` into entries ``slots`` of this pool, in place: how prefill joins a batch.

        Args:
            slots: ``(other.batch,)`` int64, distinct entries of this cache.
            other: a cache of the same heads, head size, chunk size, dtype and device, with no more chunk rows than this one.
        """
        if not isinstance(other, RATCache):
            raise ValueError(f"RATCache.write: other: expected a RATCache, got {type(other).__name__}")
        for what, mine, theirs in (
            ("chunk_size", self.chunk_size, other.chunk_size),
            ("heads", self.chunk_k.shape[1], other.chunk_k.shape[1]),
            ("head_dim", self.chunk_k.shape[3], other.chunk_k.shape[3]),
            ("dtype", self.chunk_k.dtype, other.chunk_k.dtype),
            ("device", self.chunk_k.device, other.chunk_k.device),
        ):
            if mine != theirs:
                raise ValueError(f"RATCache.write: other: expected {what} {mine}, got {theirs}")
        rows = other.chunk_k.shape[2]
        if rows > self.chunk_k.shape[2]:
            raise ValueError(f"RATCache.write: other: expected at most {self.chunk_k.shape[2]} chunk rows, got {rows}")
        self._check_slots("write", slots, other.batch)
        with torch.no_grad():
            self.chunk_k[:, :, :rows].index_copy_(0, slots, other.chunk_k)
            self.chunk_v[:, :, :rows].index_copy_(0, slots, other.chunk_v)
            self.running_k.index_copy_(0, slots, other.running_k)
            self.running_v.index_copy_(0, slots, other.running_v)
            self.lengths.index_copy_(0, slots, other.lengths)
        self.length_bound = max(self.length_bound, other.length_bound)

    def read(self, slots: Tensor) -> RATCache:
        """A copy of entries ``slots``: ``(M,)`` int64."""
        self._check_slots("read", slots)
        return self._map(lambda x: x.index_select(0, slots))

    def reset(self, slots: Tensor | None = None) -> None:
        """Forgets every sequence, or the entries ``slots``, ``(M,)`` int64: their lengths become 0."""
        if slots is None:
            self.lengths.zero_()
            self.length_bound = 0
        else:
            self._check_slots("reset", slots)
            # index_copy_, unlike an assignment and index_fill_, takes -1 for an error and not for the last entry.
            self.lengths.index_copy_(0, slots, torch.zeros_like(slots, dtype=torch.int32))

    def _check_slots(self, method: str, slots: Tensor, count: int | None = None) -> None:
        """What the host knows of ``slots``. Their values it reads on the CPU only; on a GPU, torch's kernels check them."""

        def wrong(expected: str, got: object, kind: type[ValueError] = ValueError) -> ValueError:
            return kind(f"RATCache.{method}: slots: expected {expected}, got {got}")

        if not isinstance(slots, Tensor):
            raise wrong("a tensor", type(slots).__name__)
        if slots.dtype != torch.int64:
            raise wrong("dtype int64", str(slots.dtype).removeprefix("torch."))
        if slots.dim() != 1 or (count is not None and slots.shape[0] != count):
            raise wrong(f"shape ({'M' if count is None else count},)", tuple(slots.shape))
        if slots.device != self.lengths.device:
            raise wrong(f"a tensor on {self.lengths.device}", f"one on {slots.device}")
        if type(slots) is Tensor and slots.is_cpu and slots.numel() and not torch.compiler.is_compiling():
            low, high = (int(x) for x in slots.aminmax())
            if low < 0 or high >= self.batch:
                raise wrong(f"entries from 0 to {self.batch - 1}", low if low < 0 else high, SlotError)

    # ---- for the ops ----

    def decode_workspace(self) -> Tensor:
        """Scratch of the decode kernel: zeros at first, which the kernel leaves zero. Empty on the CPU."""
        if self.workspace is not None:
            return self.workspace
        on_gpu = self.chunk_k.is_cuda and self.chunk_k.dim() == 4  # another shape is the operator's to refuse
        size = _decode_workspace_bytes(*self.chunk_k.shape) if on_gpu else 0
        workspace = torch.zeros(size, dtype=torch.uint8, device=self.chunk_k.device)
        # Made in a CUDA graph, it belongs to the graph: zeroed by each replay, and by nothing before the first.
        if not (torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing())):
            self.workspace = workspace
        return workspace

    def error_word(self) -> Tensor:
        """:attr:`error`, made where there is none."""
        if self.error is not None:
            return self.error
        error = torch.zeros(4, dtype=torch.int32, device=self.lengths.device)
        if not torch.compiler.is_compiling():
            self.error = error
        return error

    def decoded(self, tokens: int) -> None:
        """A decode step has written every tensor: tells autograd, which may have saved some, and counts the tokens."""
        if not torch.compiler.is_compiling():  # the tracer reads the same from the operator's schema
            torch.autograd.graph.increment_version(self.tensors())
        self.length_bound += tokens


@torch.compiler.assume_constant_result  # an operator that returns a number cannot be traced
def _decode_workspace_bytes(pool: int, heads: int, rows: int, head_dim: int) -> int:
    return torch.ops.rat_ext.decode_workspace.default(pool, heads, rows, head_dim)


# ---- pytree, torch.load --------------------------------------------------------------------------------------------------


def _flatten(cache: RATCache) -> tuple[list[Tensor], tuple[int, int]]:
    return list(cache.tensors()), (cache.chunk_size, cache.length_bound)


def _flatten_with_keys(cache: RATCache):
    tensors, numbers = _flatten(cache)
    return [(pytree.GetAttrKey(name), x) for name, x in zip(_NAMES, tensors, strict=True)], numbers


pytree.register_pytree_node(
    RATCache,
    _flatten,
    lambda tensors, numbers: RATCache(*tensors, *numbers),
    serialized_type_name="rat_ext.RATCache",
    to_dumpable_context=json.dumps,
    from_dumpable_context=lambda text: tuple(json.loads(text)),
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([RATCache])
