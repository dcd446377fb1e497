"""What a model keeps between calls: one state per layer, of rows that may differ in length, in the shape generate expects."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from ..cache import RATCache, _usable_later, state_dtype
from ..ops import chunk_recurrence
from .config import RATConfig

# Tokens that a crop can take back where they are recorded: more than any draft.
DRAFT = 128
# More tokens than any sequence has: a chunk that never ends.
ENDLESS = 1 << 30


def wrong(method: str, argument: str, expected: str, got: object) -> ValueError:
    """The error for a wrong argument of a method of the cache."""
    return ValueError(f"rat_ext.RATModelCache.{method}: {argument}: expected {expected}, got {got}")


class Record:
    """The inputs of a recurrence in one call, and the states before it: enough to end it after fewer tokens."""

    def __init__(self, before: Tensor, lengths: Tensor, v: Tensor, gate: Tensor, bias: Tensor, counts: list[int]):
        self.before, self.lengths = before, lengths  # (B, H, D); (B,)
        self.v, self.gate, self.bias = v, gate, bias  # (B, T, H, D) each; (H, D)
        self.counts = counts  # tokens of each row; the rest of its T are not read

    def state(self, rows: slice, tokens: int) -> Tensor:
        """State of ``rows`` after their first ``tokens`` tokens of this call: what a call with no more would have left."""
        before = self.before[rows]
        if tokens == 0:
            return before
        return chunk_recurrence(
            self.v[rows, :tokens], self.gate[rows, :tokens], ENDLESS, gate_bias=self.bias, initial_state=before,
            lengths=self.lengths[rows], return_state=True,
        )[1]  # fmt: skip


class Layer:
    """State of one layer. Its tensors have one row per sequence, first."""

    recording = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; none before the first call."""
        return {}

    def assign(self, tensors: dict[str, Tensor]) -> None:
        """Takes tensors in place of those of :meth:`tensors`."""
        for name, x in tensors.items():
            setattr(self, name, x)

    def map(self, function: Callable[[Tensor], Tensor], in_place: bool) -> None:
        """Replaces, or overwrites, every tensor by what ``function`` makes of it."""
        old = self.tensors()
        new = {name: function(x) for name, x in old.items()}
        if in_place:
            for name, x in old.items():
                x.copy_(new[name])
        elif new:
            self.assign(new)
        self.forget()

    def record(self) -> None:
        """Keeps from now on what a crop needs."""
        self.recording = True

    def forget(self) -> None:
        """No crop goes back to before now."""

    def crop(self, removed: list[int]) -> None:
        """Takes ``removed`` tokens back from each row."""

    def recorded(self) -> list[int] | None:
        """Tokens of each row that a crop can take back, none where that is empty; None: all."""
        return None


class RATStates(Layer):
    """A RAT layer's: a :class:`rat_ext.RATCache`, with DRAFT draft tokens from the first call on that is recorded."""

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.counts: list[int] = []  # of each row, tokens that the pool can take back
        self.state: RATCache | None = None

    def tensors(self) -> dict[str, Tensor]:
        names = ("chunk_k", "chunk_v", "running_k", "running_v", "lengths")
        return {} if self.state is None else dict(zip(names, self.state.tensors(), strict=True))

    def assign(self, tensors: dict[str, Tensor]) -> None:
        if self.state is None:
            self.state = RATCache(**tensors, chunk_size=self.chunk_size, length_bound=0)
            if isinstance(self.state.chunk_k, Tensor) and self.state.chunk_k.dim() == 4:  # else a tree that is mapped
                self.state.length_bound = self.state.capacity
        else:
            self.state = self.state.replace(**tensors)

    def count(self, counts: list[int]) -> None:
        """The pool takes so many more tokens of each row."""
        self.counts = [min(old + new, DRAFT) for old, new in zip(self.counts or [0] * len(counts), counts, strict=True)]

    def forget(self) -> None:
        self.counts = []

    def recorded(self) -> list[int] | None:
        return None if self.state is None else self.counts

    def crop(self, removed: list[int]) -> None:
        if self.state is not None:
            self.state.rollback(list(range(len(removed))), torch.tensor(removed, dtype=torch.int32, device="cpu"))


class RNNStates(Layer):
    """An RNN layer's: the running state alone."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.state: Tensor | None = None  # (B, H, D)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.state is None else {"state": self.state}

    def forget(self) -> None:
        self.records.clear()

    def recorded(self) -> list[int] | None:
        """What the records of all calls have; none where a call was not recorded."""
        if self.state is None:
            return None
        return [sum(counts) for counts in zip(*(r.counts for r in self.records), strict=True)]

    def keep(self, record: Record) -> None:
        """Adds the record of a call, and drops those that no draft reaches back to."""
        self.records.append(record)
        while sum(min(r.counts) for r in self.records[1:]) > DRAFT:
            self.records.pop(0)

    def crop(self, removed: list[int]) -> None:
        if self.state is None:
            return
        alike = all(n == removed[0] for n in removed) and all(len(set(r.counts)) == 1 for r in self.records)
        rows = [slice(None)] if alike else [slice(b, b + 1) for b in range(len(removed))]
        for row in rows:
            b = row.start or 0
            left, place = removed[b], len(self.records)
            if left == 0:
                continue
            while place and left > 0:
                place -= 1
                left -= self.records[place].counts[b]
            self.state[row] = self.records[place].state(row, -left)


class KeysAndValues(Layer):
    """An attention layer's keys and values, (B, H, S, D): the token at position p of its row in column p."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.keys is None or self.values is None else {"keys": self.keys, "values": self.values}

    def reserve(self, like: Tensor, columns: int) -> None:
        """Room for ``columns`` tokens per row; ``like`` is (B, T, H, D)."""
        have = 0 if self.keys is None else self.keys.shape[2]
        if have >= columns and self.keys is not None:
            return
        for name, old in (("keys", self.keys), ("values", self.values)):
            # Zeros: what no token has written yet has weight 0, and 0 times what memory holds may be NaN.
            with _usable_later():
                new = like.new_zeros(like.shape[0], like.shape[2], columns, like.shape[3])
            if old is not None:
                new[:, :, :have] = old
            setattr(self, name, new)

    def write(self, k: Tensor, v: Tensor, columns: Tensor) -> None:
        """Puts k, v (B, T, H, D) into columns (B, T)."""
        assert self.keys is not None and self.values is not None
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.keys[rows, :, columns] = k.to(self.keys.dtype)
        self.values[rows, :, columns] = v.to(self.values.dtype)


class Window(KeysAndValues):
    """A sliding-window layer's last R keys and values: position p in column p % R, and one column more for what is dropped."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.ring = window + 1

    def record(self) -> None:
        if not self.recording:
            super().record()
            self.ring += DRAFT

    def resize(self, lengths: Tensor) -> None:
        """Moves what a smaller ring holds into one of R columns; ``lengths`` (B,) are the tokens so far."""
        if self.keys is None or self.values is None or self.keys.shape[2] == self.ring + 1:
            return
        old = self.keys.shape[2] - 1
        position = ring_positions(lengths, self.ring)
        column = torch.where((position >= 0) & (lengths[:, None] - position <= old), position % old, old)
        index = column[:, None, :, None]
        for name, x in self.tensors().items():
            moved = x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
            setattr(self, name, torch.cat((moved, moved.new_zeros(moved[:, :, :1].shape)), dim=2))

    def columns(self, positions: Tensor, counts: Tensor | None) -> Tensor:
        """Where the tokens at ``positions`` (B, T) go: those that are among a row's first ``counts`` (B,), and its last R."""
        place = torch.arange(positions.shape[1], device=positions.device)
        left = (positions.shape[1] if counts is None else counts[:, None]) - place
        return torch.where((left > 0) & (left <= self.ring), positions % self.ring, self.ring)


def ring_positions(lengths: Tensor, ring: int) -> Tensor:
    """(B, R): the position whose token each column of a ring holds after ``lengths`` tokens; negative for none."""
    last = lengths.long()[:, None] - 1
    return last - (last - torch.arange(ring, device=lengths.device)) % ring


class RATModelCache(Cache):
    """Between calls: chunk states for RAT layers, running states for RNN layers, keys and values for attention layers.

    Rows may differ in length: what is padding in the batch is in no state. A cache carries no gradient.

    Args:
        config: of the model.
        max_length: tokens, padding included, for which room is made at once; more than that is made at need.
        static: room for ``max_length`` tokens and no more, and every tensor is updated in place: for compiled steps, CUDA
            graphs and ``torch.export``.
        batch, dtype, device: make every tensor now, empty. Otherwise the first call does.
    """

    def __init__(
        self,
        config: RATConfig,
        max_length: int | None = None,
        static: bool = False,
        *,
        batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        if not isinstance(config, RATConfig):
            raise wrong("__init__", "config", "a rat_ext.models.RATConfig", type(config).__name__)
        for name, value in (("max_length", max_length), ("batch", batch)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0):
                raise wrong("__init__", name, "an int of at least 0 or None", repr(value))
        if static and max_length is None:
            raise wrong("__init__", "max_length", "a number beside static=True", None)
        self.config, self.max_length, self.static = config, max_length, static
        self.states = [_layer(config, i) for i in range(config.num_hidden_layers)]
        super().__init__(layers=self.states)
        self.seen = 0  # columns of the batch so far, padding included
        self.lengths: Tensor | None = None  # (B,) int32, tokens of each row
        self.valid: Tensor | None = None  # (B, seen) bool; None: no padding so far
        if batch is not None:
            self.allocate(batch, dtype, device)

    def allocate(self, batch: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Makes the tensors of a static cache."""
        if self.max_length is None:
            raise wrong("__init__", "max_length", "a number beside batch", None)
        heads, dim = self.config.num_attention_heads, self.config.head_dim
        like = torch.empty(batch, 0, heads, dim, dtype=dtype, device=device)
        with _usable_later():
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        for layer in self.states:
            if isinstance(layer, RATStates):
                layer.state = RATCache.empty(batch, heads, dim, layer.chunk_size, self.max_length, dtype=dtype, device=device)
            elif isinstance(layer, RNNStates):
                with _usable_later():
                    layer.state = torch.zeros(batch, heads, dim, dtype=state_dtype(dtype), device=device)
            elif isinstance(layer, KeysAndValues):
                layer.reserve(like, layer.ring + 1 if isinstance(layer, Window) else self.max_length)

    def __repr__(self) -> str:
        kind = "static" if self.static else "dynamic"
        return f"RATModelCache({len(self.states)} layers, {self.batch_size} rows, {self.seen} tokens, {kind})"

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(x.nbytes for layer in self.states for x in layer.tensors().values())

    # ---- for the model ----

    def begin(self, batch: int, device: torch.device) -> Tensor:
        """Lengths (B,) before a call."""
        if self.lengths is None:
            with _usable_later():
                self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        if self.lengths.shape[0] != batch:
            raise wrong("begin", "batch", f"{self.lengths.shape[0]} rows, as in the calls before", batch)
        return self.lengths

    def room(self, columns: int) -> int:
        """Columns to make room for where ``columns`` are needed."""
        if self.max_length is not None and columns <= self.max_length:
            return self.max_length
        if self.static:
            raise wrong("room", "tokens", f"at most max_length = {self.max_length} in a static cache", columns)
        return max(2 * columns, 64)

    def advance(self, columns: int, counts: Tensor | None, valid: Tensor | None) -> None:
        """After a call: ``columns`` more, of which row b had ``counts[b]`` tokens, in columns ``valid`` (None: all)."""
        assert self.lengths is not None
        if valid is not None or self.valid is not None:
            batch, device = self.lengths.shape[0], self.lengths.device
            old = self.valid if self.valid is not None else torch.ones(batch, self.seen, dtype=torch.bool, device=device)
            new = valid if valid is not None else torch.ones(batch, columns, dtype=torch.bool, device=device)
            self.valid = torch.cat((old, new.to(device)), dim=1)
        new_tokens = columns if counts is None else counts.to(self.lengths.device)
        if self.static and self.seen == 0 and not torch.compiler.is_compiling():
            for x in (self.lengths, *(x for layer in self.states for x in layer.tensors().values())):
                torch._dynamo.mark_static_address(x)  # compiled steps in a CUDA graph write there
        # A new tensor where that may be: autograd may have saved the old one.
        self.lengths = self.lengths.add_(new_tokens) if self.static else self.lengths + new_tokens
        self.seen += columns

    # ---- what transformers calls ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that it can hold; -1: any number."""
        return self.max_length if self.static and self.max_length is not None else -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """As :meth:`get_max_length`."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys, first key) of a mask over all tokens. The model makes its own masks."""
        return self.seen + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token was seen."""
        return self.seen > 0

    def early_initialization(self, batch_size: int, num_heads: Any, head_dim: Any, dtype: torch.dtype, device: Any) -> None:
        """Makes the tensors now."""
        if self.lengths is None and self.static:
            self.allocate(batch_size, dtype, device)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Of attention layers of other models; this model's layers write their own states."""
        raise wrong("update", "a call", "none: the layers of RATModel write their states themselves", "one")

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.lengths is None:
            return
        for layer in self.states:
            layer.map(function, self.static)
        if self.static:
            self.lengths.copy_(function(self.lengths))
        else:
            self.lengths = function(self.lengths)
        if self.valid is not None:
            self.valid = function(self.valid)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row ``beam_idx[b]`` was: (B,) int64."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows ``indices``: numbers, or a bool for each."""
        if self.static:
            raise wrong("batch_select_indices", "static", "False: a static cache keeps its rows", True)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        if self.static:
            raise wrong("batch_repeat_interleave", "static", "False: a static cache keeps its rows", True)
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Forgets every token."""
        for layer in self.states:
            layer.forget()
            if isinstance(layer, RATStates) and layer.state is not None:
                layer.state.reset()
            elif isinstance(layer, RNNStates) and layer.state is not None:
                layer.state.zero_()
        if self.lengths is not None:
            self.lengths.zero_()
        self.valid, self.seen = None, 0

    def activate_past_recording(self) -> None:
        """From now on keeps what :meth:`crop` needs: of RAT layers the running states of 128 tokens more in each row, of
        windows as many keys and values. Calls have no gradient then.
        """
        for layer in self.states:
            layer.record()
            if isinstance(layer, Window) and self.lengths is not None:
                layer.resize(self.lengths)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last columns back: the states become those of never having seen them, bit for bit where a token's
        projections do not depend on how many there are (on a CPU with one thread).

        Needs :meth:`activate_past_recording` before the calls that saw them, and goes back to the last crop at most; RAT layers
        and windows take back 128 tokens at most. Zero forgets what was recorded. RAT layers copy and compute nothing
        (:meth:`rat_ext.RATCache.rollback`).

        Args:
            tokens_to_remove: how many columns, as a negative number; a positive one is how many to keep.
        """
        try:
            tokens_to_remove = int(tokens_to_remove)
        except (TypeError, ValueError):
            raise wrong("crop", "tokens_to_remove", "an int", type(tokens_to_remove).__name__) from None
        n = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if n > self.seen:
            raise wrong("crop", "tokens_to_remove", f"at most the {self.seen} tokens seen", n)
        if n == self.seen:
            self.reset()
        elif n > 0:
            self._crop(n)
        for layer in self.states:
            layer.forget()

    def _crop(self, n: int) -> None:
        assert self.lengths is not None
        batch = self.lengths.shape[0]
        removed = [n] * batch if self.valid is None else [int(x) for x in self.valid[:, -n:].sum(1)]
        for layer in self.states:
            limit = layer.recorded()
            short = limit is not None and (not limit or any(a < b for a, b in zip(limit, removed, strict=True)))
            if isinstance(layer, Window) and self.seen > layer.ring:
                short = n > (DRAFT if layer.recording else 0)
            if short:
                kept = f"as many as were recorded (activate_past_recording() before they were seen; at most {DRAFT})"
                raise wrong("crop", "tokens_to_remove", kept, n)
        counts = torch.tensor(removed, dtype=torch.int32)
        self.lengths.sub_(counts.to(self.lengths.device))
        for layer in self.states:
            layer.crop(removed)
        self.valid = None if self.valid is None else self.valid[:, :-n]
        self.seen -= n

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def is_compileable(self) -> bool:
        """False: generate() compiles nothing by itself, since what says which columns are padding grows with each step."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether its tensors are there."""
        return self.lengths is not None

    @property
    def is_croppable(self) -> bool:
        """True: :meth:`crop` leaves no trace."""
        return True

    @property
    def is_sliding(self) -> list[bool]:
        """False for each layer: the model makes its own masks."""
        return [False] * len(self.states)

    @property
    def is_linear(self) -> list[bool]:
        """False for each layer: all know how many tokens they saw."""
        return [False] * len(self.states)


def _layer(config: RATConfig, i: int) -> Layer:
    kind = config.layer_types[i]
    if kind == "rat":
        return RATStates(config.chunk_sizes[i])
    if kind == "sliding_attention":
        return Window(config.sliding_window)
    return RNNStates() if kind == "rnn" else KeysAndValues()


# ---- pytree: torch.export takes and updates a cache --------------------------------------------------------------------------


class _Context:
    """What of a cache is no tensor. How many columns were seen makes no other structure: an exported step takes any."""

    def __init__(self, config: str, max_length: int | None, static: bool, names: list[list[str]], seen: int):
        self.structure, self.seen = (config, max_length, static, names), seen

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.structure == other.structure

    def __hash__(self) -> int:
        return hash(self.structure[:3])


def _flatten(cache: RATModelCache) -> tuple[list[Tensor], _Context]:
    tensors = [layer.tensors() for layer in cache.states]
    names = [list(named) for named in tensors]
    leaves = [] if cache.lengths is None else [cache.lengths]
    leaves += [x for named in tensors for x in named.values()]
    config = cache.config.to_json_string(use_diff=False)
    return leaves, _Context(config, cache.max_length, cache.static, names, cache.seen)


def _unflatten(leaves: Iterable[Any], context: _Context) -> RATModelCache:
    config, max_length, static, names = context.structure
    cache = RATModelCache(RATConfig.from_dict(json.loads(config)), max_length, static)
    left = iter(leaves)
    if any(names):
        cache.lengths = next(left)
    for layer, wanted in zip(cache.states, names, strict=True):
        if wanted:
            layer.assign({name: next(left) for name in wanted})
    cache.seen = context.seen
    return cache


pytree.register_pytree_node(
    RATModelCache,
    _flatten,
    _unflatten,
    serialized_type_name="rat_ext.models.RATModelCache",
    to_dumpable_context=lambda context: json.dumps([*context.structure, context.seen]),
    from_dumpable_context=lambda text: _Context(*json.loads(text)),
    flatten_with_keys_fn=lambda cache: (
        [(pytree.SequenceKey(i), x) for i, x in enumerate(_flatten(cache)[0])],
        _flatten(cache)[1],
    ),
)
