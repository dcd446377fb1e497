"""The state of a RAT layer between calls: what prefill returns, and the pool of sequences that serving updates in place."""

from __future__ import annotations

import contextlib
import json
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_NAMES = ("chunk_k", "chunk_v", "running_k", "running_v", "lengths")  # in the order of the ops' arguments
_OPTIONS = ("scale_k", "scale_v", "page_table")  # None where the option is off
FP8 = torch.float8_e4m3fn
Slots = Tensor | Sequence[int]
LARGEST = 2**31 - 1  # length; as a bound: one that only the capacity tells
# What the kernels write into `error`: (code, row, slot, detail).
_ERRORS = {
    1: "expected a slot from 0 to {batch} - 1, got {slot}",
    2: "expected room for one more token, got a full cache at a length of {detail}",
    3: "expected a slot that no other row of the call names, got one named twice",
    4: "expected rotary tables with a row for each chunk, got {detail} rows",
    5: "expected a length that the cache can have, got {detail}",
    6: "cu_seqlens: expected it to rise from 0 to the number of tokens, got something else",
}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running states, biases and tables for inputs of ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class SlotError(ValueError, IndexError):
    """A slot outside the cache: a wrong argument, and an index that is out of range."""


class OutOfPages(RuntimeError):
    """A paged cache has no more pages to give. Nothing was changed."""


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Chunk states ``(..., D)`` in e4m3, and their scales ``(...)`` float32: powers of two, the least that lets D values fit.

    ``x = e4m3 * scale``, exactly so for values of e4m3. ``scale = 2 ** ceil(log2(amax / 448))``, 2^-117 at least (no product
    is below the least normal float32, 2^-126, then), and 1 for states of zeros or with values that are not finite (which become
    NaN). The product is exact in float32 and bfloat16; in float16 where the scale is 2^-15 or more, which is so for states
    whose largest value is 0.0069 or more.
    """
    amax = x.abs().amax(-1)
    mantissa, exponent = torch.frexp(amax.float() if x.dtype != torch.float64 else amax)  # 448 = 0.875 * 2^9
    exponent = (exponent - torch.where(mantissa <= 0.875, 9, 8)).clamp(min=-117)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent)
    scale = torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))
    return (x / scale.to(x.dtype)[..., None]).to(FP8), scale.float()


def dequantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantise` kept, in ``dtype``."""
    wide = state_dtype(dtype)
    return (x.to(wide) * scale.to(wide)[..., None]).to(dtype)


# ---- pages -----------------------------------------------------------------------------------------------------------


class _Pages:
    """Who holds which page: the host's book, which can always be rebuilt from the page table.

    Attributes:
        rows: of each sequence its pages in order; the table on the device is the same, with -1 after the last.
        counts: how many sequences hold each page.
        unused: pages that nobody holds.
    """

    def __init__(self, table: list[list[int]], pages: int):
        self.rows = [[page for page in row if page >= 0] for row in table]
        self.counts = [0] * pages
        for row in self.rows:
            for page in row:
                self.counts[page] += 1
        self.unused = [page for page in reversed(range(pages)) if not self.counts[page]]

    def need(self, pages: int) -> None:
        if pages > len(self.unused):
            raise OutOfPages(f"RATCache: pages: expected {pages} that are free, got {len(self.unused)}")

    def take(self) -> int:
        page = self.unused.pop()
        self.counts[page] = 1
        return page

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.counts[page] -= 1
            if not self.counts[page]:
                self.unused.append(page)


class RATCache:
    """States of N sequences. A sequence of n tokens has n // L closed chunks, whose states the next tokens attend to.

    It can be copied, pickled, saved and loaded (by ``torch.load`` as it is by default), and is a pytree of its tensors,
    for ``torch.export``. It is no dataclass: wrappers for mixed precision cast the fields of those, and a state's tensors have
    dtypes of their own. What the options of :meth:`empty` change is in brackets.

    Attributes:
        chunk_k: ``(N, H, C, D)`` keys of closed chunks, rotated by chunk index; rows from ``lengths // chunk_size`` on are
            uninitialised. [Pages: ``(pages, H, page_chunks, D)``. FP8: float8_e4m3fn.]
        chunk_v: ``(N, H, C, D)`` values of closed chunks.
        running_k: ``(N, H, D)`` float32 (float64 for float64 ops): k~ of the last token, not rotated. [Draft tokens:
            ``(N, R, H, D)``, R = draft_tokens + 1: of the last R tokens, the one at position t in entry ``t % R``.]
        running_v: like ``running_k``: v~.
        lengths: ``(N,)`` int32, tokens so far, on the device of the states. Sequences may differ.
        chunk_size: L.
        length_bound: an upper bound of ``lengths`` that the host knows, in tokens, never above :attr:`capacity`; it decides
            how many chunk rows a forward that continues from here allocates. The ops keep it, for each sequence where they are
            told the slots on the host. Who writes ``lengths`` or replays steps in a CUDA graph, and then continues with a
            forward that returns a state, sets it too; a bound that is too low is an error, not a wrong result.
        scale_k, scale_v: ``(N, H, C)`` float32 [pages: ``(pages, H, page_chunks)``] where states are FP8, else None.
        page_table: ``(N, columns)`` int32 pages of each sequence in order, -1 for none; None where it has no pages.
        workspace: scratch of the decode kernel; no part of the state.
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
        *,
        scale_k: Tensor | None = None,
        scale_v: Tensor | None = None,
        page_table: Tensor | None = None,
        error: Tensor | None = None,
    ):
        self.chunk_k, self.chunk_v = chunk_k, chunk_v
        self.running_k, self.running_v = running_k, running_v
        self.lengths = lengths
        self.chunk_size = chunk_size
        self.workspace = workspace
        self.scale_k, self.scale_v, self.page_table = scale_k, scale_v, page_table
        self._error = error
        self._book: _Pages | None = None
        for name in (*_NAMES, *_OPTIONS):
            x = getattr(self, name)
            if not isinstance(x, Tensor) and not (x is None and name in _OPTIONS):
                raise ValueError(f"RATCache: {name}: expected a tensor, got {type(x).__name__}")
        _check_numbers(("chunk_size", chunk_size, 1))
        self.length_bound = length_bound

    @classmethod
    def empty(
        cls,
        batch: int,
        num_heads: int,
        head_dim: int,
        chunk_size: int,
        max_length: int,
        *,
        draft_tokens: int = 0,
        page_chunks: int | None = None,
        num_pages: int | None = None,
        fp8: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RATCache:
        """A cache for ``batch`` sequences of up to ``max_length`` tokens, all of length 0.

        Made in inference mode, it may be written outside of it too.

        Args:
            batch, num_heads, head_dim, chunk_size, max_length: N, H, D, L, tokens.
            draft_tokens: how many tokens :meth:`rollback` can take back. Each costs ``2 * H * D * 4`` bytes per sequence.
            page_chunks: chunk states in a page, a power of two; None: no pages, and room for ``max_length`` in each sequence.
                With pages, a sequence has room for the tokens that :meth:`allocate` was told.
            num_pages: pages of the cache. None: enough for every sequence at its longest. Without ``page_chunks``, pages of 16.
            fp8: chunk states in float8_e4m3fn with one float32 scale per head and chunk: half the bytes of bfloat16.
            dtype: of the ops.
            device: where the states are.
        """
        _check_numbers(
            ("batch", batch, 0),
            ("num_heads", num_heads, 0),
            ("head_dim", head_dim, 0),
            ("chunk_size", chunk_size, 1),
            ("max_length", max_length, 0),
            ("draft_tokens", draft_tokens, 0),
        )
        if max_length > LARGEST:
            raise ValueError(f"RATCache: max_length: expected at most {LARGEST}, got {max_length}")
        device = _device("RATCache", device)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(f"RATCache: dtype: expected a floating dtype of the ops, got {dtype}")
        if not isinstance(fp8, bool):
            raise ValueError(f"RATCache: fp8: expected a bool, got {fp8!r}")
        blocks, rows, table = batch, max_length // chunk_size, None
        if page_chunks is not None or num_pages is not None:
            page_chunks = 16 if page_chunks is None else page_chunks
            _check_numbers(("page_chunks", page_chunks, 1))
            if page_chunks & (page_chunks - 1):
                raise ValueError(f"RATCache: page_chunks: expected a power of two, got {page_chunks}")
            columns = -(-rows // page_chunks)
            num_pages = batch * columns if num_pages is None else num_pages
            _check_numbers(("num_pages", num_pages, min(columns, 1)))
            with _usable_later():
                table = torch.full((batch, columns), -1, dtype=torch.int32, device=device)
            blocks, rows = num_pages, page_chunks
        states, stored = (blocks, num_heads, rows, head_dim), FP8 if fp8 else dtype
        ring = (draft_tokens + 1,) if draft_tokens else ()
        running = (batch, *ring, num_heads, head_dim)
        with _usable_later():
            made = cls(
                chunk_k=torch.empty(states, dtype=stored, device=device),
                chunk_v=torch.empty(states, dtype=stored, device=device),
                running_k=torch.zeros(running, dtype=state_dtype(dtype), device=device),
                running_v=torch.zeros(running, dtype=state_dtype(dtype), device=device),
                lengths=torch.zeros(batch, dtype=torch.int32, device=device),
                chunk_size=chunk_size,
                length_bound=0,
                scale_k=torch.empty(states[:3], dtype=torch.float32, device=device) if fp8 else None,
                scale_v=torch.empty(states[:3], dtype=torch.float32, device=device) if fp8 else None,
                page_table=table,
            )
            if table is not None:
                made._book = _Pages([[]] * batch, blocks)
            return made._with_scratch()

    # ---- what it is ----

    @property
    def batch(self) -> int:
        """Number of sequences N."""
        return self.lengths.shape[0]

    @property
    def rows(self) -> int:
        """Chunk states that there are for a sequence."""
        rows = self.chunk_k.shape[2] if self.chunk_k.dim() == 4 else 0  # another shape is the operator's to refuse
        return rows if self.page_table is None else rows * self.page_table.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can hold: one short of closing a chunk for which there is no row."""
        return (self.rows + 1) * self.chunk_size - 1

    @property
    def draft_tokens(self) -> int:
        """Tokens that :meth:`rollback` can take back."""
        return self.ring - 1

    @property
    def ring(self) -> int:
        """Running states that are kept of a sequence: R."""
        return self.running_k.shape[1] if self.running_k.dim() == 4 else 1

    @property
    def fp8(self) -> bool:
        """Whether chunk states are FP8."""
        return self.scale_k is not None

    @property
    def plain(self) -> bool:
        """Whether it has none of the options of a pool: what a forward returns and takes as ``initial_state``."""
        ring = self.running_k.dim() == 4 and self.running_v.dim() == 4
        return not ring and self.page_table is None and self.scale_k is None

    @property
    def length_bound(self) -> int:
        return self.capacity if self._top >= LARGEST else _least(self._top + self._ahead, self.capacity)

    @length_bound.setter
    def length_bound(self, bound: int) -> None:
        if not isinstance(bound, torch.SymInt) and (type(bound) is not int or not 0 <= bound <= LARGEST):
            raise ValueError(f"RATCache: length_bound: expected an int from 0 to {LARGEST}, got {reprlib.repr(bound)}")
        # Of sequence n at most _bounds[n] + _ahead; _top is the largest of _bounds, or stands for all of them where that is
        # None. What may be of any sequence raises _ahead, so that a step costs the host the same whatever N is.
        self._top, self._ahead = bound, 0
        self._bounds: list[int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the states, of what tells where they are, and of the lengths."""
        return sum(getattr(self, name).nbytes for name in self._present())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(chunk_k, chunk_v, running_k, running_v, lengths)``, in the order of the ops' arguments."""
        return self.chunk_k, self.chunk_v, self.running_k, self.running_v, self.lengths

    def _present(self) -> list[str]:
        return [*_NAMES, *(name for name in _OPTIONS if getattr(self, name) is not None)]

    def __repr__(self) -> str:
        if not isinstance(self.chunk_k, Tensor) or self.chunk_k.dim() != 4:  # a tree of something else, while it is mapped
            return f"RATCache({self.chunk_k!r}, ...)"
        _, heads, page, dim = self.chunk_k.shape
        words = [f"{self.batch} sequences, {heads} heads of {dim}, {self.rows} chunks of {self.chunk_size} tokens"]
        if self.page_table is not None:
            words.append(f"{self.chunk_k.shape[0]} pages of {page} chunks")
        if self.draft_tokens:
            words.append(f"{self.draft_tokens} draft tokens")
        words += [str(self.chunk_k.dtype).removeprefix("torch."), str(self.chunk_k.device)]
        return f"RATCache({', '.join(words)})"

    def __getstate__(self) -> dict:
        # FP8 as bytes: torch cannot pickle tensors of it.
        fp8 = {name: _bytes(getattr(self, name)) for name in ("chunk_k", "chunk_v")}
        return self.__dict__ | fp8 | {"workspace": None, "_book": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.fp8:
            self.chunk_k, self.chunk_v = self.chunk_k.view(FP8), self.chunk_v.view(FP8)

    # ---- errors that only the device knows ----

    @property
    def error(self) -> Tensor:
        """``(4,)`` int32 on the device: (code, row, slot, detail) of the first row that a call had to skip; zeros for none."""
        error = self._error
        if error is None:
            error = torch.zeros(4, dtype=torch.int32, device=self.lengths.device)
            if not self._in_a_graph():
                self._error = error
        return error

    def check(self) -> None:
        """Waits for the device and raises what :attr:`error` says, if anything. The error is cleared: later calls go on.

        Raises:
            RuntimeError: in one line the row, the slot and why the row was skipped. Its y is 0 and its state untouched; all
                other rows, and later calls, are right.
        """
        code, row, slot, detail = self.error.tolist()
        if not code:
            return
        self.error.zero_()
        expected = _ERRORS.get(code, "expected no error, got code {code}")
        words = expected.format(code=code, slot=slot, detail=detail, batch=self.batch)
        raise RuntimeError(f"RATCache: {words}" if code == 6 else f"RATCache: row {row}, slot {slot}: {words}")

    # ---- copies ----

    def _map(self, function: Callable[[Tensor], Tensor], **changes) -> RATCache:
        return self.replace(**{name: function(getattr(self, name)) for name in self._present()}, **changes)

    def replace(self, **changes) -> RATCache:
        """A cache that shares this one's tensors except for ``changes``, by attribute name."""
        known = (*_NAMES, *_OPTIONS, "chunk_size", "length_bound", "workspace", "error")
        if unknown := [name for name in changes if name not in known]:
            raise ValueError(f"RATCache.replace: {unknown[0]}: expected one of {', '.join(known)}, got another name")
        made = object.__new__(RATCache)
        fields = (*_NAMES, *_OPTIONS, "chunk_size", "_error", "_top", "_ahead", "_bounds")
        for name in fields:
            setattr(made, name, getattr(self, name))
        made.workspace, made._book = None, None
        if self.page_table is not None and "page_table" not in changes:
            made._book = self._pages()  # one book for those that share a table
        if (
            isinstance(made._error, Tensor)
            and getattr(changes.get("lengths"), "device", made._error.device) != made._error.device
        ):
            made._error = None
        for name, value in changes.items():
            setattr(made, "_error" if name == "error" else name, value)
        made._bounds = None if made._bounds is None or "length_bound" in changes else list(made._bounds)
        return made

    def clone(self) -> RATCache:
        """A copy that shares no memory."""
        return self._map(torch.clone, error=self.error.clone())._with_scratch()

    def detach(self) -> RATCache:
        """The same memory, cut off from autograd: for truncated backpropagation through time, and for decoding."""
        return self._map(torch.detach, error=self.error)

    def to(self, *args, copy: bool = False, **kwargs) -> RATCache:
        """On another device, or for ops of another dtype: arguments as of ``Tensor.to``. Shares what does not change.

        ``dtype`` is that of the closed chunks, which are rounded to it (FP8 ones stay what they are); running states become
        float32 (float64 for float64), lengths stay int32. With ``copy``, nothing is shared.
        """
        try:
            if args and isinstance(args[0], (bool, float, complex)):  # to torch a tensor of that number, whose dtype is meant
                raise TypeError
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        except (TypeError, RuntimeError):
            got = reprlib.repr(args[0] if args else kwargs).replace("\n", " ")
            raise ValueError(f"RATCache.to: device, dtype: expected those of Tensor.to, got {got}") from None
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"RATCache.to: dtype: expected a floating dtype, got {dtype}")
        running = None if dtype is None else state_dtype(dtype)
        dtypes = {"running_k": running, "running_v": running}
        if not self.fp8:
            dtypes |= {"chunk_k": dtype, "chunk_v": dtype}

        def moved(name: str) -> Tensor:
            return getattr(self, name).to(device=device, dtype=dtypes.get(name), non_blocking=non_blocking, copy=copy)

        return self.replace(**{name: moved(name) for name in (*self._present(), "error")})

    def reserve(self, max_length: int) -> RATCache:
        """A cache with the same contents that holds ``max_length`` tokens per sequence; ``self`` if it already does.

        Prefill returns just the rows that it filled: reserve once before decoding. Continue with the result, not with
        ``self``: the two share running states and lengths. To branch from a state, :meth:`clone` it first. With pages it is the
        table that grows; there are as many pages as before.
        """
        _check_numbers(("max_length", max_length, 0))
        if not isinstance(max_length, torch.SymInt) and max_length > LARGEST:
            raise ValueError(f"RATCache: max_length: expected at most {LARGEST}, got {max_length}")
        rows = max_length // self.chunk_size
        if rows <= self.rows:
            return self._with_scratch()
        table = self.page_table
        if table is not None:
            more = -(-rows // self.chunk_k.shape[2]) - table.shape[1]
            book = self._pages()
            with _usable_later():
                longer = torch.cat((table, table.new_full((self.batch, more), -1)), dim=1)
            made = self.replace(page_table=longer)
            made._book = book
            return made._with_scratch()

        def grown(old: Tensor) -> Tensor:
            with _usable_later():
                new = old.new_empty(*old.shape[:2], rows, *old.shape[3:])
            new[:, :, : old.shape[2]] = old
            return new

        names = ("chunk_k", "chunk_v", "scale_k", "scale_v") if self.fp8 else ("chunk_k", "chunk_v")
        return self.replace(**{name: grown(getattr(self, name)) for name in names})._with_scratch()

    # ---- entries of a pool -----------------------------------------------------------------------------------------------
    # Distinct numbers from 0 to N - 1; -1, which skips a row of a call, is an error here but in rollback. They are (M,) int64
    # on the cache's device; or known to the host: a list of ints, or a tensor of the CPU.

    def write(self, slots: Slots, other: RATCache) -> None:
        """Copies the sequences of ``other`` into entries ``slots`` of this pool, in place: how prefill joins a batch.

        Args:
            slots: M = other.batch distinct entries of this cache. With pages, known to the host.
            other: a cache of the same heads, head size, chunk size, dtype and device, with no more chunk rows than this one,
                and without pages: what a forward or :meth:`read` returns. Where this cache has draft tokens or FP8 states,
                that one may have the same, or neither: its states are rounded to FP8 then.
        """
        if not isinstance(other, RATCache):
            raise ValueError(f"RATCache.write: other: expected a RATCache, got {type(other).__name__}")
        if other.page_table is not None:
            raise ValueError("RATCache.write: other: expected a cache without pages (RATCache.read makes one), got pages")
        for what, mine, theirs in (
            ("chunk_size", self.chunk_size, other.chunk_size),
            ("heads", self.chunk_k.shape[1], other.chunk_k.shape[1]),
            ("head_dim", self.chunk_k.shape[3], other.chunk_k.shape[3]),
            ("dtype", other.chunk_k.dtype if self.fp8 and not other.fp8 else self.chunk_k.dtype, other.chunk_k.dtype),
            ("running dtype", self.running_k.dtype, other.running_k.dtype),
            ("device", self.chunk_k.device, other.chunk_k.device),
            ("draft_tokens", self.draft_tokens if other.draft_tokens else 0, other.draft_tokens),
        ):
            if mine != theirs:
                raise ValueError(f"RATCache.write: other: expected {what} {mine}, got {theirs}")
        rows = other.rows
        if rows > self.rows:
            raise ValueError(f"RATCache.write: other: expected at most {self.rows} chunk rows, got {rows}")
        index, known = self._slots("write", slots, other.batch, distinct=True, on_host=self.page_table is not None)
        states = {name: getattr(other, name) for name in other._present() if name.startswith(("chunk", "scale"))}
        if self.fp8 and not other.fp8:
            for x in ("k", "v"):
                states[f"chunk_{x}"], states[f"scale_{x}"] = quantise(states[f"chunk_{x}"])
        bounds = [other._bound(m) for m in range(other.batch)]
        with torch.no_grad():
            if self.page_table is None:
                for name, x in states.items():
                    _bytes(getattr(self, name))[:, :, :rows].index_copy_(0, index, _bytes(x))
            elif known is not None:
                self._write_pages(known, states, [n // self.chunk_size for n in bounds])
            for name in ("running_k", "running_v"):
                mine, theirs = getattr(self, name), getattr(other, name)
                if mine.dim() == theirs.dim():
                    mine.index_copy_(0, index, theirs)
                else:
                    mine[index, (other.lengths.long() - 1) % self.ring] = theirs
            self.lengths.index_copy_(0, index, other.lengths)
        self._set_bounds(known, bounds, other.length_bound)

    def read(self, slots: Slots) -> RATCache:
        """A copy of entries ``slots``, M of them, with the draft tokens and FP8 states of this cache, and without pages."""
        index, known = self._slots("read", slots)
        pages = None if self.page_table is None else self.page_table.index_select(0, index).clamp(min=0).long()
        made = {}
        for name in self._present():
            x = getattr(self, name)
            if pages is None or name in ("running_k", "running_v", "lengths"):
                made[name] = _bytes(x).index_select(0, index).view(x.dtype)
            elif name != "page_table":  # (M, columns, H, page_chunks, ...) -> (M, H, columns * page_chunks, ...)
                made[name] = _bytes(x)[pages].transpose(1, 2).flatten(2, 3).contiguous().view(x.dtype)
        bound = self.length_bound if known is None else max((self._bound(n) for n in known), default=0)
        bounds = None if known is None else [self._bound(n) for n in known]
        copy = self.replace(**made, page_table=None, error=None, length_bound=bound)
        if bounds is not None:
            copy._set_bounds(list(range(len(bounds))), bounds, 0)
        return copy

    def reset(self, slots: Slots | None = None) -> None:
        """Forgets every sequence, or the entries ``slots``: their lengths become 0. Pages that no other entry shares are free.

        Args:
            slots: M entries; None: all. With pages, known to the host.
        """
        if slots is None:
            self.lengths.zero_()
            self.length_bound = 0
            if self.page_table is not None:
                self._set_pages(list(range(self.batch)), [[]] * self.batch)
            return
        index, known = self._slots("reset", slots, on_host=self.page_table is not None)
        # index_copy_, unlike an assignment and index_fill_, takes -1 for an error and not for the last entry.
        self.lengths.index_copy_(0, index, torch.zeros_like(index, dtype=torch.int32))
        if known is not None:
            if self.page_table is not None:
                self._set_pages(known, [[]] * len(known))
            self._set_bounds(known, [0] * len(known), 0)

    def rollback(self, slots: Slots, tokens: int | Tensor) -> None:
        """Takes back the last ``tokens`` tokens of entries ``slots``: the state is, bit for bit, as if they had never come.

        No state is copied and nothing is read by the host. It is for tokens of the last draft, at most :attr:`draft_tokens`
        since the longest that the sequence has been: running states of older tokens are gone.

        Args:
            slots: ``(M,)`` int64, distinct entries as in a step: a negative one is skipped. Or a list of ints.
            tokens: how many of each, from 0 to ``draft_tokens``: an int, or ``(M,)`` of ints on the device of the cache.
        """
        slots, known = self._slots("rollback", slots, distinct=True, skips=True)
        most, index = self.draft_tokens, slots.clamp(0, max(self.batch - 1, 0))

        def wrong(expected: str, got: object) -> ValueError:
            return ValueError(f"RATCache.rollback: tokens: expected {expected}, got {got}")

        if isinstance(tokens, Tensor):
            if tokens.shape != slots.shape or tokens.is_floating_point() or tokens.dtype == torch.bool:
                dtype = str(tokens.dtype).removeprefix("torch.")
                raise wrong(f"an int or integers of shape {tuple(slots.shape)}", f"{dtype} of {tuple(tokens.shape)}")
            if tokens.device != self.lengths.device and not tokens.is_cpu:
                raise wrong(f"a tensor on {self.lengths.device}", f"one on {tokens.device}")
            counts = tokens.tolist() if readable(tokens) else None
            tokens = tokens.to(self.lengths.device, torch.int32, non_blocking=True)
        elif type(tokens) is int:
            counts = [tokens] * slots.shape[0]
        else:
            raise wrong("an int or a tensor of ints", type(tokens).__name__)
        for count in () if counts is None else counts:
            if not 0 <= count <= most:
                raise wrong(f"from 0 to the {most} draft tokens of the cache", count)
        if known is not None and counts is not None:
            for slot, count in zip(known, counts, strict=True):
                if slot >= 0 and count > self._bound(slot):
                    raise wrong(f"at most the {self._bound(slot)} tokens of slot {slot}", count)
        if not index.numel() or not self.batch:
            return
        taken = torch.where(index == slots, -tokens, 0).to(torch.int32)
        self.lengths.index_add_(0, index, taken)
        if known is not None and counts is not None:
            live = [(slot, count) for slot, count in zip(known, counts, strict=True) if slot >= 0]
            self._set_bounds([s for s, _ in live], [self._bound(s) - n for s, n in live], 0)

    def copy(self, from_slots: Slots, to_slots: Slots) -> None:
        """Entries ``to_slots`` become what ``from_slots`` are, all at once: beam search, with any choice of parents.

        Args:
            from_slots: M entries, which may repeat.
            to_slots: M distinct entries. With pages both are known to the host, and the copies share pages as by :meth:`fork`.
        """
        self._copy("copy", from_slots, to_slots, None)

    def fork(self, from_slots: Slots, to_slots: Slots, tokens: int | Sequence[int] | None = None) -> None:
        """Entries ``to_slots`` begin as ``from_slots`` did: with their first ``tokens`` tokens, exactly.

        Without pages the states are copied. With pages, full ones are shared and cost nothing; of a page that either entry may
        still write, the copy gets one of its own, and so :meth:`allocate` its next ones.

        Args:
            from_slots: M entries, which may repeat. With pages, known to the host.
            to_slots: M distinct entries. With pages, known to the host; the pages that they held are released.
            tokens: a multiple of L that the source has reached, an int or M ints: a state at a chunk's boundary needs nothing
                but its closed chunks, so that a prefix may be taken from a sequence that is long past it. None: all tokens, the
                open chunk's too; with pages, the host waits for the device to learn the lengths.

        Raises:
            OutOfPages: a page was needed and none was free. Nothing was changed.
        """
        self._copy("fork", from_slots, to_slots, tokens)

    def allocate(self, slots: Slots, max_length: int | Sequence[int]) -> None:
        """With pages: room for ``max_length`` tokens in each of ``slots``, in all. Pages that they have stay; it may be called
        before every call, and without pages it does nothing.

        Args:
            slots: M entries, known to the host.
            max_length: tokens, at most :attr:`capacity`: an int or M ints.

        Raises:
            OutOfPages: there are fewer than that free. Nothing was changed.
        """
        if self.page_table is None:
            return
        known = self._slots("allocate", slots, distinct=True, on_host=True)[1] or []
        lengths = self._counts("allocate", "max_length", max_length, len(known))
        book, page = self._pages(), self.chunk_k.shape[2]
        missing = [-(-(n // self.chunk_size) // page) - len(book.rows[slot]) for slot, n in zip(known, lengths, strict=True)]
        more = [(slot, n) for slot, n in zip(known, missing, strict=True) if n > 0]
        if not more:
            return
        book.need(sum(n for _, n in more))
        places, pages = [], []
        for slot, n in more:
            for _ in range(n):
                places.append(slot * self.page_table.shape[1] + len(book.rows[slot]))
                pages.append(book.take())
                book.rows[slot].append(pages[-1])
        device = self.page_table.device
        index, values = _host(places), _host(pages, torch.int32)
        self.page_table.view(-1).index_copy_(0, index.to(device, non_blocking=True), values.to(device, non_blocking=True))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds; 0 for a cache without pages."""
        return 0 if self.page_table is None else len(self._pages().unused)

    # ---- what methods of entries share ----

    def _slots(
        self,
        method: str,
        slots: Slots,
        count: int | None = None,
        *,
        name: str = "slots",
        distinct: bool = False,
        skips: bool = False,
        on_host: bool = False,
    ) -> tuple[Tensor, list[int] | None]:
        """Entries as a tensor on the cache's device, and as ints where the host knows them.

        Of a tensor on a GPU the host knows what its shape tells; torch's kernels check its values.
        """

        def wrong(expected: str, got: object, kind: type[ValueError] = ValueError) -> ValueError:
            return kind(f"RATCache.{method}: {name}: expected {expected}, got {got}")

        if isinstance(slots, (list, tuple, range)):
            strange = [x for x in slots if type(x) is not int]
            if strange:
                raise wrong("ints", type(strange[0]).__name__)
            slots = _host([max(-1, min(x, 2**62)) for x in slots])
        if not isinstance(slots, Tensor):
            raise wrong("a tensor or a list of ints", type(slots).__name__)
        if slots.dtype != torch.int64:
            raise wrong("dtype int64", str(slots.dtype).removeprefix("torch."))
        if slots.dim() != 1 or (count is not None and slots.shape[0] != count):
            raise wrong(f"shape ({'M' if count is None else count},)", tuple(slots.shape))
        device = self.lengths.device
        if slots.device != device and not slots.is_cpu:
            raise wrong(f"a tensor on {device}", f"one on {slots.device}")
        if not readable(slots):
            if on_host:
                raise wrong("a list of ints or a tensor on the CPU (pages are counted on the host)", f"one on {slots.device}")
            return slots, None
        known = slots.tolist()
        for slot in known:
            if slot >= self.batch or (slot < 0 and not skips):
                raise wrong(f"entries from 0 to {self.batch - 1}", slot, SlotError)
        if distinct:
            named = [slot for slot in known if slot >= 0]
            if len(set(named)) < len(named):
                raise wrong("entries that differ", f"{next(n for n in named if named.count(n) > 1)} twice", SlotError)
        return slots.to(device, non_blocking=True), known

    def _counts(self, method: str, name: str, value: int | Sequence[int], count: int) -> list[int]:
        """``value``, or each of its ``count`` numbers, as tokens of a sequence."""
        values = [value] * count if isinstance(value, int) else value
        if not isinstance(values, (list, tuple)) or len(values) != count or any(type(n) is not int for n in values):
            got = f"{type(value).__name__} {reprlib.repr(value)}"
            raise ValueError(f"RATCache.{method}: {name}: expected an int or {count} ints, got {got}")
        for n in values:
            if not 0 <= n <= self.capacity:
                raise ValueError(f"RATCache.{method}: {name}: expected from 0 to the capacity {self.capacity}, got {n}")
        return list(values)

    def _copy(self, method: str, from_slots: Slots, to_slots: Slots, tokens: int | Sequence[int] | None) -> None:
        paged = self.page_table is not None
        source, known = self._slots(method, from_slots, name="from_slots", on_host=paged)
        target, known_target = self._slots(
            method, to_slots, source.shape[0], name="to_slots", distinct=True, on_host=paged
        )  # fmt: skip
        bounds = None if known is None else [self._bound(n) for n in known]
        counts = None
        if tokens is not None:
            counts = self._counts(method, "tokens", tokens, source.shape[0])
            limits = [self.capacity] * len(counts) if bounds is None else bounds
            for n, limit in zip(counts, limits, strict=True):
                if n % self.chunk_size:
                    raise ValueError(f"RATCache.{method}: tokens: expected a multiple of chunk_size {self.chunk_size}, got {n}")
                if n > limit:
                    raise ValueError(f"RATCache.{method}: tokens: expected at most the {limit} of the source, got {n}")
            bounds = counts
        with torch.no_grad():
            names = ["running_k", "running_v", "lengths"]
            if known is not None and known_target is not None and paged:
                self._share(known, known_target, counts)
            else:
                names += ["chunk_k", "chunk_v", *(("scale_k", "scale_v") if self.fp8 else ())]
            for name in names:
                x = _bytes(getattr(self, name))
                x.index_copy_(0, target, x.index_select(0, source))
            if counts is not None:
                after = _host(counts, torch.int32).to(self.lengths.device, non_blocking=True)
                self.lengths.index_copy_(0, target, after)
        if bounds is None or known_target is None:
            self._set_bounds(None, [], self.length_bound)
        else:
            self._set_bounds(known_target, bounds, 0)

    # ---- pages ----

    def _pages(self) -> _Pages:
        if self._book is None:
            assert self.page_table is not None
            self._book = _Pages(self.page_table.tolist(), self.chunk_k.shape[0])
        return self._book

    def _set_pages(self, slots: list[int], rows: list[list[int]]) -> None:
        """Gives entries other pages, which are counted for them already, and releases those that they had."""
        assert self.page_table is not None
        book, columns = self._pages(), self.page_table.shape[1]
        for slot, row in zip(slots, rows, strict=True):
            book.release(book.rows[slot])
            book.rows[slot] = list(row)
        if not slots:
            return
        device = self.page_table.device
        table = _host([row + [-1] * (columns - len(row)) for row in rows], torch.int32)
        index = _host(slots).to(device, non_blocking=True)
        self.page_table.index_copy_(0, index, table.view(len(slots), columns).to(device, non_blocking=True))

    def _share(self, sources: list[int], targets: list[int], counts: list[int] | None) -> None:
        """The targets' pages: full ones are the sources', the others copies.

        Full is what no rollback reaches: kernels write the row of a chunk that closes, and nobody may write a shared page.
        """
        book, page = self._pages(), self.chunk_k.shape[2]
        lengths = [int(n) for n in self.lengths.tolist()] if counts is None else []
        plan: list[tuple[list[int], list[int]]] = []  # of each target the pages that it shares, and those that it copies
        for i, source in enumerate(sources):
            held, n = book.rows[source], lengths[source] if counts is None else counts[i]
            if counts is None and source == targets[i]:
                plan.append((held, []))
                continue
            used = -(-(n // self.chunk_size) // page)
            if used > len(held):
                raise ValueError(f"RATCache.fork: tokens: expected at most those of slot {source}, got {n}")
            shared = max(n - self.draft_tokens, 0) // (self.chunk_size * page)
            plan.append((held[:shared], held[shared:used]))
        book.need(sum(len(old) for _, old in plan))
        rows, old_pages, new_pages = [], [], []
        for shared_pages, old in plan:
            new = [book.take() for _ in old]
            for p in shared_pages:
                book.counts[p] += 1
            rows.append(shared_pages + new)
            old_pages += old
            new_pages += new
        if new_pages:
            device = self.chunk_k.device
            old_index, new_index = (_host(x).to(device, non_blocking=True) for x in (old_pages, new_pages))
            for name in ("chunk_k", "chunk_v", *(("scale_k", "scale_v") if self.fp8 else ())):
                x = _bytes(getattr(self, name))
                x.index_copy_(0, new_index, x.index_select(0, old_index))
        self._set_pages(targets, rows)

    def _write_pages(self, slots: list[int], states: dict[str, Tensor], chunks: list[int]) -> None:
        """Puts states ``(M, H, C, ...)``, of which sequence m has at most ``chunks[m]``, into new pages of ``slots``."""
        book, page = self._pages(), self.chunk_k.shape[2]
        counts = [-(-n // page) for n in chunks]
        book.need(sum(counts))
        rows = [[book.take() for _ in range(n)] for n in counts]
        for column in range(max(counts, default=0)):
            having = [m for m, n in enumerate(counts) if n > column]
            device = self.chunk_k.device
            index = _host([rows[m][column] for m in having]).to(device, non_blocking=True)
            which = _host(having).to(device, non_blocking=True)
            for name, x in states.items():
                part = _bytes(x)[:, :, column * page : (column + 1) * page].index_select(0, which)
                _bytes(getattr(self, name))[:, :, : part.shape[2]].index_copy_(0, index, part)
        self._set_pages(slots, rows)

    # ---- bounds of the lengths ----

    def _bound(self, slot: int) -> int:
        if self._top >= LARGEST or self._bounds is None:
            return self.length_bound
        return min(self._bounds[slot] + self._ahead, self.capacity)

    def _set_bounds(self, slots: list[int] | None, bounds: list[int], worst: int) -> None:
        """Entries ``slots`` have new bounds; where the host does not know the slots, any entry may have ``worst``."""
        if slots is None:
            if self._bounds is not None:
                self._bounds = [max(n, worst - self._ahead) for n in self._bounds]
            self._top = max(self._top, worst - self._ahead)
            return
        if not slots:
            return
        if self._bounds is None:
            top = self.capacity - self._ahead if self._top >= LARGEST else self._top
            self._bounds = [top] * self.batch
        for slot, bound in zip(slots, bounds, strict=True):
            self._bounds[slot] = bound - self._ahead
        self._top = max(self._bounds)

    # ---- for the ops ----

    def _in_a_graph(self) -> bool:
        """Whether a tensor made now belongs to a graph: each replay zeroes it, and nothing does before the first."""
        return torch.compiler.is_compiling() or (self.lengths.is_cuda and torch.cuda.is_current_stream_capturing())

    def _with_scratch(self) -> RATCache:
        """Makes what calls write beside the states, so that no capture has to."""
        if not self._in_a_graph():
            self.error  # noqa: B018
            self.decode_workspace()
        return self

    def decode_workspace(self) -> Tensor:
        """Scratch of the decode kernel: zeros at first, which the kernel leaves zero. Empty on the CPU."""
        if self.workspace is not None:
            return self.workspace
        on_gpu = self.chunk_k.is_cuda and self.chunk_k.dim() == 4  # another shape is the operator's to refuse
        size = _decode_workspace_bytes(self.batch, self.chunk_k.shape[1], self.rows, self.chunk_k.shape[3]) if on_gpu else 0
        workspace = torch.zeros(size, dtype=torch.uint8, device=self.chunk_k.device)
        if not self._in_a_graph():
            self.workspace = workspace
        return workspace

    def wrote(self, tokens: int, rows: int, slots: Tensor | None, cu_seqlens: Tensor | None = None) -> None:
        """A call has written the cache in place: tells autograd, which may have saved its tensors, and counts the tokens.

        ``tokens``: of each of ``rows`` rows, or with ``cu_seqlens`` of all of them.
        """
        if torch.compiler.is_compiling():  # the tracer reads the same from the operator's schema
            self._ahead += tokens
            return
        torch.autograd.graph.increment_version(self.tensors())
        of_some = slots is not None or cu_seqlens is not None or rows != self.batch
        if self._top >= LARGEST or not of_some or not all(x is None or readable(x) for x in (slots, cu_seqlens)):
            self._ahead += tokens
            return
        each = [tokens] * rows if cu_seqlens is None else cu_seqlens.diff().tolist()
        named = list(range(rows)) if slots is None else slots.tolist()
        live = [(slot, n) for slot, n in zip(named, each, strict=True) if slot >= 0]
        self._set_bounds([slot for slot, _ in live], [self._bound(slot) + n for slot, n in live], 0)


def _check_numbers(*numbers: tuple[str, Any, int]) -> None:
    for name, value, least in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise ValueError(f"RATCache: {name}: expected an int, got {value!r}")
        if value < least:
            raise ValueError(f"RATCache: {name}: expected at least {least}, got {value}")


def _device(method: str, device: Any) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (TypeError, RuntimeError, ValueError):
        got = f"{type(device).__name__} {reprlib.repr(device)}".replace("\n", " ")
        raise ValueError(f"{method}: device: expected a torch.device, a name of one or None, got {got}") from None


def _usable_later() -> contextlib.AbstractContextManager:
    """What is made while sampling in inference mode may be written outside of it too."""
    sampling = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if sampling else contextlib.nullcontext()


def _least(a: int, b: int) -> int:
    return torch.sym_min(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else min(a, b)


def readable(x: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device, and outside of tracing."""
    return type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling()


def _host(numbers: list, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of the CPU, whatever torch's default device is."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _bytes(x: Tensor) -> Tensor:
    """FP8 as bytes: torch can index those on every device."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def _decode_workspace_bytes(pool: int, heads: int, rows: int, head_dim: int) -> int:
    return torch.ops.rat_ext.decode_workspace.default(pool, heads, rows, head_dim)


# An operator that returns a number cannot be traced. This is what torch.compiler.assume_constant_result does, which imports all
# of Dynamo too: with it `import rat_ext` takes twice as long. Where torch has another name for it, tests/test_compile.py fails.
_decode_workspace_bytes._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- pytree, torch.load --------------------------------------------------------------------------------------------------
# The bound of the lengths is no part of the tree's structure: an exported program, whose structure is fixed, serves every
# length. A cache that comes out of a tree has the bound that its capacity gives.

_Context = tuple[int, tuple[str, ...]]


def _flatten(cache: RATCache) -> tuple[list[Tensor], _Context]:
    names = (*cache._present(), "error")
    return [getattr(cache, name) for name in names], (cache.chunk_size, names)


def _flatten_with_keys(cache: RATCache):
    tensors, context = _flatten(cache)
    return [(pytree.GetAttrKey(name), x) for name, x in zip(context[1], tensors, strict=True)], context


def _unflatten(tensors, context: _Context) -> RATCache:
    chunk_size, names = context
    made = object.__new__(RATCache)  # the leaves may be anything, while a tree is mapped
    made.chunk_size, made.workspace, made._book = chunk_size, None, None
    for name in _OPTIONS:
        setattr(made, name, None)
    for name, x in zip(names, tensors, strict=True):
        setattr(made, "_error" if name == "error" else name, x)
    made.length_bound = LARGEST
    return made


def _load_context(text: str) -> _Context:
    chunk_size, names = json.loads(text)
    return chunk_size, tuple(names)


pytree.register_pytree_node(
    RATCache,
    _flatten,
    _unflatten,
    serialized_type_name="rat_ext.RATCache",
    to_dumpable_context=json.dumps,
    from_dumpable_context=_load_context,
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([RATCache])
