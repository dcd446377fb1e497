"""Generation at speed: a pool of slots, one packed prefill for the prompts that join, one CUDA graph for each step."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cache import RATCache, state_dtype
from ..ops import chunk_recurrence, rat_attention_packed, rat_decode_step
from ..rotary import layer_tables, rotary_tables
from . import attention
from .cache import ENDLESS
from .config import RATConfig
from .layout import Layout, make_layout
from .modeling import RATForCausalLM

# Stop tokens that a request can have.
STOPS = 16
# The highest temperature: the largest float32, in which rows keep it.
MOST = torch.finfo(torch.float32).max
# Steps that a GPU may be ahead of what the host has read.
LAG = 2
# Columns of keys that cuDNN reads, for a step's single queries, in the time in which the flash kernel reads one.
FLASH_COST = 1.8
# Columns that are read where all are, at the least: below, a graph for each number costs more than it saves.
FEWEST = 256
# What a step chooses tokens by; a row's token is the same in each that serves it.
GREEDY, SAMPLED, FILTERED = range(3)


def wrong(method: str, argument: str, expected: str, got: object) -> ValueError:
    """The error for a wrong argument of a method of the generator."""
    return ValueError(f"rat_ext.Generator.{method}: {argument}: expected {expected}, got {got}")


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its continuation. :meth:`Generator.submit` makes it and says what the options are.

    Attributes:
        tokens: new tokens that the host has read so far, the stop token included.
        finished: None while it goes on; then "stop", "length" or "cancelled".
    """

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: tuple[int, ...]
    on_token: Callable[[Request, int], Any] | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    finished: str | None = None

    @property
    def mode(self) -> int:
        """What it needs of a step."""
        if self.temperature == 0:
            return GREEDY
        return FILTERED if self.top_k > 0 or self.top_p < 1 else SAMPLED


# ---- choosing a token ----------------------------------------------------------------------------------------------------


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) for each pair of integers, float64: splitmix64 of the two. Nothing else decides it."""

    def shifted(x: Tensor, bits: int) -> Tensor:  # without the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = seed * -0x61C8864680B583EB + position.long() * 0x2545F4914F6CDD1D
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ shifted(x, 31)
    return shifted(x, 11).double() * 2.0**-53


def choose(
    logits: Tensor, mode: int, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """The next token of each row, ``(B,)``, from logits ``(B, V)``; the options are ``(B,)``, temperature 0 is greedy.

    Probabilities are integers in units of 2^-36 of the largest: their sums are exact in any order, so a token depends on its
    row's logits and options alone.
    """
    best = logits.argmax(-1)
    if mode == GREEDY:
        return best
    greedy = temperature == 0
    x = logits.float() / temperature.masked_fill(greedy, 1)[:, None]
    top = x.amax(-1, keepdim=True)

    def weights(x: Tensor) -> Tensor:
        return ((x - top).exp() * 2.0**36).long()

    weight = weights(x)
    if mode == FILTERED:
        ordered = weights(x.sort(-1, descending=True).values)
        rank = (top_k.clamp(1, logits.shape[-1]) - 1)[:, None]
        least = ordered.gather(1, rank).masked_fill(top_k[:, None] == 0, 0)
        weight, ordered = weight.masked_fill(weight < least, 0), ordered.masked_fill(ordered < least, 0)
        # The tokens before which less than top_p is taken: at least the first.
        before = ordered.cumsum(-1) - ordered
        kept = before < top_p.double()[:, None] * ordered.sum(-1, keepdim=True)
        kept[:, 0] = True
        least = ordered.masked_fill(~kept, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
        weight = weight.masked_fill(weight < least, 0)
    sums = weight.cumsum(-1)
    total = sums[:, -1:]
    goal = (uniform(seed, position)[:, None] * total).long().minimum(total - 1)
    drawn = (sums <= goal).sum(-1).clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, best, drawn)


# ---- rows and their states -----------------------------------------------------------------------------------------------


class Rows:
    """What a step knows of each of P slots, on the device: ``(P,)`` each.

    Attributes:
        slot: its own number where a sequence goes on, else -1.
        token: the newest token, in no state yet.
        length: tokens in the states.
        limit: tokens in all, prompt and new, with which the sequence ends.
        stop: ``(P, STOPS)`` tokens that end it; -1 is none.
        emitted: what the last step chose; -1 where no sequence goes on.
        temperature, top_k, top_p, seed: how it chooses.
    """

    def __init__(self, slots: int, device: torch.device):
        def full(value: float, dtype: torch.dtype, *more: int) -> Tensor:
            return torch.full((slots, *more), value, dtype=dtype, device=device)

        self.slot, self.token, self.emitted = full(-1, torch.int64), full(0, torch.int64), full(-1, torch.int64)
        self.length, self.limit = full(0, torch.int32), full(0, torch.int32)
        self.stop = full(-1, torch.int64, STOPS)
        self.temperature, self.top_p = full(0, torch.float32), full(1, torch.float32)
        self.top_k, self.seed = full(0, torch.int64), full(0, torch.int64)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return vars(self)

    def options(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For :func:`choose`."""
        return self.temperature, self.top_k, self.top_p, self.seed


class Prefill:
    """Where the tokens of one packed prefill go: sequence n takes slot ``slots[n]``."""

    def __init__(self, slots: list[int], counts: list[int], device: torch.device):
        self.device = device
        self.count, self.slot = torch.tensor(counts), torch.tensor(slots)
        ends = self.count.cumsum(0)
        self.cu_seqlens = on_device(F.pad(ends, (1, 0)).to(torch.int32), device)
        self.slots = on_device(self.slot, device)
        self.last = on_device(ends - 1, device)  # (N,) each sequence's last token
        self.longest = max(counts)
        self.places: dict[int, tuple[Tensor, Tensor]] = {}

    def kept(self, columns: int) -> tuple[Tensor, Tensor]:
        """For slots of ``columns`` tokens each: which of the packed tokens stay, and where each goes among all columns."""
        if columns not in self.places:
            count, slot = (x.repeat_interleave(self.count) for x in (self.count, self.slot))
            position = torch.cat([torch.arange(n) for n in self.count.tolist()])
            token = (count - position <= columns).nonzero()[:, 0]
            place = (slot * columns + position % columns)[token]
            self.places[columns] = (on_device(token, self.device), on_device(place, self.device))
        return self.places[columns]


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor of the host that waits for nothing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class RATPool:
    """States of a RAT layer: a :class:`rat_ext.RATCache`. A step writes the gate's bias to ``bias``, in the states' dtype."""

    def __init__(self, config: RATConfig, layer: int, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        self.heads, self.groups, self.chunk_size = config.num_attention_heads, config.num_groups, config.chunk_sizes[layer]
        dim = config.head_dim
        self.cache = RATCache.empty(slots, self.heads, dim, self.chunk_size, length, dtype=dtype, device=device)
        self.tables: tuple[Tensor | None, Tensor | None] = (None, None)
        if config.rope_theta is not None and device.type != "meta":
            rows = length // self.chunk_size + 2
            self.tables = layer_tables(rows, dim, config.rope_theta, device, state_dtype(dtype))
        self.bias = torch.empty(self.heads, dim, dtype=state_dtype(dtype), device=device)

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def prefill(self, mixer: Any, projection: Tensor, layout: Layout, plan: Prefill) -> Tensor:
        cos, sin = self.tables
        self.cache.reset(plan.slots)
        y = rat_attention_packed(
            projection, self.heads, self.groups, self.chunk_size, gate_bias=mixer.gate_bias, rotary_cos=cos, rotary_sin=sin,
            cu_seqlens=plan.cu_seqlens, cache=self.cache, slots=plan.slots,
        )  # fmt: skip
        assert isinstance(y, Tensor)
        return y

    def step(self, mixer: Any, projection: Tensor, step: Step) -> Tensor:
        q, k, v, gate, out_gate = mixer.split(projection)
        cos, sin = self.tables
        return rat_decode_step(
            q, k, v, gate, self.cache, gate_bias=self.bias, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin,
            slots=step.slot,
        )  # fmt: skip


class RNNPool:
    """States of an RNN layer, ``(P, H, D)``; ``bias`` as of :class:`RATPool`."""

    def __init__(self, config: RATConfig, layer: int, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (slots, config.num_attention_heads, config.head_dim)
        self.state = torch.zeros(shape, dtype=state_dtype(dtype), device=device)
        self.bias = self.state.new_empty(shape[1:])

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def prefill(self, mixer: Any, projection: Tensor, layout: Layout, plan: Prefill) -> Tensor:
        v, gate, out_gate = mixer.split(projection)
        y, state = chunk_recurrence(v, gate, ENDLESS, gate_bias=mixer.gate_bias, cu_seqlens=plan.cu_seqlens, return_state=True)
        self.state.index_copy_(0, plan.slots, state)
        return y * out_gate.sigmoid()

    def step(self, mixer: Any, projection: Tensor, step: Step) -> Tensor:
        v, gate, out_gate = (x[:, None] for x in mixer.split(projection))
        y, state = chunk_recurrence(
            v, gate, ENDLESS, gate_bias=self.bias, initial_state=self.state, lengths=step.length, return_state=True
        )
        self.state.copy_(torch.where(step.active[:, None, None], state, self.state))
        return (y * out_gate.sigmoid())[:, 0]


class Read(NamedTuple):
    """How a step reads the columns of rings of one size. The host decides it, and a graph is of one such decision."""

    columns: int  # the first ones of every slot; 0: those that are used, which only the device knows
    masked: bool  # some of them are not used


@dataclasses.dataclass
class Ring:
    """What layers share in one step whose keys are in rings of one size."""

    place: Tensor  # (P,) int64: where a slot's new token goes among the columns of all slots
    used: Tensor  # (P,) int32: columns that hold tokens, the new one included; 1 in a slot without a sequence
    columns: int  # as of Read
    bias: Tensor | None  # (P, 1, 1, columns), added to scores: 0, or far below all; None: every column is used


def make_ring(size: int, read: Read, step: Step, dtype: torch.dtype) -> Ring:
    """For rings of ``size`` columns each; ``dtype`` is that of the scores' bias."""
    device, length = step.length.device, step.length.long()
    place = torch.arange(length.shape[0], device=device) * size + length % size
    used = (length + 1).clamp(max=size).where(step.active, 1)
    bias = None
    if read.columns and read.masked:
        # Rows that begin at 32 bytes. Not -inf, of which some kernels make NaN; the sum is the same, exp(-60000) is 0.
        row = -(-read.columns // 16) * 16
        beyond = torch.arange(row, device=device) >= used[:, None]
        bias = torch.zeros_like(beyond, dtype=dtype).masked_fill(beyond, -60000.0)[:, None, None, : read.columns]
    return Ring(place, used.int(), read.columns, bias)


class KeysPool:
    """Keys and values of an attention or sliding-window layer, ``(P, R, H, D)``: the token at position p in column p % R.

    A slot without a sequence writes one column of its own, which nobody reads before a sequence has written it.

    Attributes:
        flash: there is a kernel that reads the used columns of each slot and no others.
        dense: there is one for as many columns of every slot: cuDNN's, which is faster for each column, or PyTorch's choice.
    """

    def __init__(self, config: RATConfig, layer: int, slots: int, length: int, dtype: torch.dtype, device: torch.device):
        self.window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
        self.columns = length if self.window is None else min(length, self.window + 1)
        shape = (slots, self.columns, config.num_attention_heads, config.head_dim)
        # Zeros: what no token has written yet has weight 0, and 0 times what memory holds may be NaN.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.rows = torch.arange(slots + 1, dtype=torch.int32, device=device)  # of one query each
        self.first = self.rows * self.columns  # (P + 1,) where the columns of a slot begin
        self.flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
        self.dense = not self.flash or self._cudnn()

    def _cudnn(self) -> bool:
        """Whether cuDNN takes one query for each slot: of this GPU, dtype and head size, where it is not switched off."""
        q, keys, values = (x.transpose(1, 2) for x in (self.keys[:, :1], self.keys, self.values))
        with torch.cuda.device(self.keys.device):
            return can_use_cudnn_attention(SDPAParams(q, keys, values, None, 0.0, False, False))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def prefill(self, mixer: Any, projection: Tensor, layout: Layout, plan: Prefill) -> Tensor:
        q, k, v = mixer.split(projection)
        if layout.angles is not None:
            q, k = attention.rotate(q, layout.angles), attention.rotate(k, layout.angles)
        token, place = plan.kept(self.columns)
        for pool, x in ((self.keys, k), (self.values, v)):
            pool.flatten(0, 1).index_copy_(0, place, x[0].index_select(0, token).to(pool.dtype))
        return attention.attend(q, k, v, layout, self.window)

    def step(self, mixer: Any, projection: Tensor, step: Step) -> Tensor:
        queries, keys, values = mixer.parts
        rotated, v = projection.unflatten(-1, (-1, mixer.head_dim)).split((queries + keys, values), dim=-2)
        if step.angles is not None:
            rotated = step.rotate(rotated[:, None], step.angles)[:, 0]
        q, k = rotated.split((queries, keys), dim=-2)
        ring = step.rings[self.columns]
        for pool, x in ((self.keys, k), (self.values, v)):
            pool.flatten(0, 1).index_copy_(0, ring.place, x.to(pool.dtype))
        return self.attend(q, ring)

    def attend(self, q: Tensor, ring: Ring) -> Tensor:
        """Queries ``(P, H, D)`` attend to the used columns of their slots, in any order."""
        keys, values = self.keys, self.values
        if not ring.columns:
            return torch.ops.aten._flash_attention_forward(
                q.contiguous(), keys.flatten(0, 1), values.flatten(0, 1), self.rows, self.first, 1, self.columns, 0.0, False,
                False, seqused_k=ring.used,
            )[0]  # fmt: skip
        keys, values = (x[:, : ring.columns].transpose(1, 2).to(q.dtype) for x in (keys, values))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.flash else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=ring.bias)[:, :, 0]


Pool = RATPool | RNNPool | KeysPool
POOLS: dict[str, type[RATPool] | type[RNNPool] | type[KeysPool]] = {
    "rat": RATPool,
    "rnn": RNNPool,
    "attention": KeysPool,
    "sliding_attention": KeysPool,
}


def make_pools(config: RATConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> list[Pool]:
    """States of every layer, for ``slots`` sequences of up to ``length`` tokens."""
    return [POOLS[kind](config, i, slots, length, dtype, device) for i, kind in enumerate(config.layer_types)]


def state_bytes(config: RATConfig, max_length: int, dtype: torch.dtype) -> int:
    """Bytes that a :class:`Generator` keeps for each slot."""
    return sum(pool.nbytes for pool in make_pools(config, 1, max_length, dtype, torch.device("meta")))


@dataclasses.dataclass
class Step:
    """What the layers share in one step."""

    slot: Tensor  # (P,) int64
    active: Tensor  # (P,) bool
    length: Tensor  # (P,) int32
    angles: tuple[Tensor, Tensor] | None  # (P, 1, 1, D / 2)
    rotate: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor]
    rings: dict[int, Ring] = dataclasses.field(default_factory=dict)  # by their size


@dataclasses.dataclass
class Sent:
    """Tokens on their way to the host."""

    tokens: Tensor  # (N,) int64 on the host, -1 for none
    owners: list[Request | None]
    ready: torch.cuda.Event | None
    of_step: bool = False  # its buffer and event serve another step


def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """The residual sum, and its norm."""
    x = x + y
    return x, F.rms_norm(x, (x.shape[-1],), weight, eps)


# ---- the generator -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: a graph of somebody else's that is freed ends the capture of this one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Generator:
    """Continues many prompts at once: requests come, share each step, and leave; a slot is free for the next one at once.

    Greedy tokens are those of ``model.generate``. On a GPU a step, with its choice of tokens, is one CUDA graph; the host reads
    tokens up to two steps later and never waits for the newest. On a CPU it is a plain loop.

    Args:
        model: a :class:`RATForCausalLM` on one device. Its weights may change in place between steps, not its modules.
        max_batch: slots: sequences that go on at the same time. More requests wait for a slot.
        max_length: tokens of a sequence, prompt and new. All memory for states is taken now: :func:`state_bytes` per slot.
        prefill_tokens: prompt tokens in one prefill, which comes between two steps; a longer prompt has one of its own.
        compile: fuse residual sums and norms, and in a step rotations by token, by ``torch.compile``: faster, after seconds of
            compilation at the start.

    Example:
        >>> import torch
        >>> from rat_ext.models import Generator, RATConfig, RATForCausalLM
        >>> config = RATConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> generator = Generator(RATForCausalLM(config), max_batch=2, max_length=64)
        >>> [len(tokens) for tokens in generator.generate([[1, 2, 3], [4], [5, 6]], max_new_tokens=5)]
        [5, 5, 5]
    """

    def __init__(
        self,
        model: RATForCausalLM,
        max_batch: int,
        max_length: int,
        *,
        prefill_tokens: int = 16384,
        compile: bool = False,
    ):
        if not isinstance(model, RATForCausalLM):
            raise wrong("__init__", "model", "a rat_ext.models.RATForCausalLM", type(model).__name__)
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("max_length", max_length, 2),
            ("prefill_tokens", prefill_tokens, 1),
        ):
            if type(value) is not int or value < least:
                raise wrong("__init__", name, f"an int from {least} on", repr(value))
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1:
            raise wrong("__init__", "model", "parameters on one device", ", ".join(sorted(map(str, devices))))
        self.model, self.max_batch, self.max_length, self.prefill_tokens = model, max_batch, max_length, prefill_tokens
        self.config: RATConfig = model.config
        self.device = devices.pop()
        self.dtype = model.get_input_embeddings().weight.dtype
        self.rows = Rows(max_batch, self.device)
        self.pools = make_pools(self.config, max_batch, max_length, self.dtype, self.device)
        self.angles: tuple[Tensor, Tensor] | None = None
        if self.config.rope_theta is not None and {"attention", "sliding_attention"} & set(self.config.layer_types):
            base, dtype = self.config.rope_theta, state_dtype(self.dtype)
            self.angles = rotary_tables(max_length, self.config.head_dim, base=base, device=self.device, dtype=dtype)
        keys = [pool for pool in self.pools if isinstance(pool, KeysPool)]
        self.rings = sorted({pool.columns for pool in keys})
        self.flash, self.dense = any(pool.flash for pool in keys), all(pool.dense for pool in keys)
        self.add_norm = torch.compile(add_norm) if compile else add_norm
        self.add_norm_packed = torch.compile(add_norm, dynamic=True) if compile else add_norm  # of any number of tokens
        self.rotate = torch.compile(attention.rotate) if compile else attention.rotate
        self.graphs: dict[tuple[int, tuple[Read, ...]], torch.cuda.CUDAGraph] = {}
        self.lag = LAG if self.device.type == "cuda" else 0

        self.waiting: collections.deque[Request] = collections.deque()
        self.owner: list[Request | None] = [None] * max_batch
        # Of a slot's sequence: its tokens in the states after a step, less the steps begun before it.
        self.base = [0] * max_batch
        self.unused = list(reversed(range(max_batch)))
        self.modes = [0, 0, 0]  # requests in slots, by mode
        self.ends: dict[int, list[tuple[int, Request]]] = {}  # by step: slots that are free after it at the latest
        self.steps = 0  # begun so far
        self.sent: collections.deque[Sent] = collections.deque()
        self.buffers: list[tuple[Tensor, torch.cuda.Event]] = []  # of steps whose tokens have been read

    def __repr__(self) -> str:
        return (
            f"Generator({self.max_batch} slots of {self.max_length} tokens, {self.nbytes / 1e6:.1f} MB, "
            f"{self.running} running, {len(self.waiting)} waiting, {self.device})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all slots."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def running(self) -> int:
        """Requests that have a slot, as far as the host knows."""
        return self.max_batch - len(self.unused)

    # ---- requests ----

    def submit(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int = 100,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: int | Iterable[int] = (),
        on_token: Callable[[Request, int], Any] | None = None,
        wait: bool = True,
    ) -> Request:
        """Takes a request. Nothing is computed before :meth:`step` or :meth:`run`.

        Args:
            prompt: token numbers, at least one: a sequence of ints or a 1-D tensor.
            max_new_tokens: at least 1; with the prompt at most ``max_length``.
            temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn.
            top_k: draw from the k likeliest tokens; 0: from all.
            top_p: draw from the least number of likeliest tokens whose probabilities reach p, after ``top_k``; 1: from all.
            seed: with the number of tokens so far it decides each draw, whatever the other rows are.
            stop: a token that ends the sequence, or up to 16 of them. It is the last of ``tokens``.
            on_token: called with the request and each new token, in order, when the host reads it.
            wait: False refuses the request where every slot is taken.
        """
        if isinstance(prompt, Tensor) and (prompt.dim() != 1 or prompt.is_meta):
            got = "one on the meta device" if prompt.is_meta else f"shape {tuple(prompt.shape)}"
            raise wrong("submit", "prompt", "one row of tokens", got)
        for what, numbers in (("prompt", prompt), ("stop", (stop,) if isinstance(stop, int) else stop)):
            if not isinstance(numbers, Iterable):
                raise wrong("submit", what, "a sequence of ints", type(numbers).__name__)
        prompt = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        stops = (stop,) if isinstance(stop, int) else tuple(stop)
        vocab = self.config.vocab_size
        if not _tokens_below(vocab, prompt):
            bad = [token for token in prompt if type(token) is not int or not 0 <= token < vocab]
            got = repr(bad[0]) if bad else "none"
            raise wrong("submit", "prompt", f"at least one token, each from 0 to {vocab - 1}", got)
        for name, value, fits, expected in (
            ("max_new_tokens", max_new_tokens, type(max_new_tokens) is int and max_new_tokens >= 1, "an int from 1 on"),
            ("temperature", temperature, _number(temperature) and 0 <= temperature <= MOST, "a finite number from 0 on"),
            ("top_k", top_k, type(top_k) is int and 0 <= top_k < 2**63, "an int of 64 bits from 0 on"),
            ("top_p", top_p, _number(top_p) and 0 < top_p <= 1, "a number above 0, up to 1"),
            ("seed", seed, type(seed) is int and -(2**63) <= seed < 2**63, "an int of 64 bits"),
            (
                "stop",
                stops,
                len(stops) <= STOPS and all(type(t) is int and 0 <= t < 2**63 for t in stops),
                f"up to {STOPS} tokens",
            ),
            ("on_token", on_token, on_token is None or callable(on_token), "a function or None"),
            ("wait", wait, isinstance(wait, bool), "a bool"),
        ):
            if not fits:
                raise wrong("submit", name, expected, repr(value))
        if len(prompt) + max_new_tokens > self.max_length:
            got = f"{len(prompt)} + {max_new_tokens} max_new_tokens"
            raise wrong("submit", "prompt", f"at most max_length = {self.max_length} tokens with the new ones", got)
        if not wait and len(self.waiting) >= len(self.unused):
            under_way = self.running + len(self.waiting)
            raise wrong("submit", "max_batch", f"a free slot among {self.max_batch}", f"{under_way} requests under way")
        request = Request(prompt, max_new_tokens, temperature, top_k, top_p, seed, stops, on_token)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free. Tokens that the host has not read yet are dropped."""
        if not isinstance(request, Request):
            raise wrong("cancel", "request", "what submit() has returned", type(request).__name__)
        if request.finished is not None:
            return
        request.finished = "cancelled"
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.owner:
            slot = self.owner.index(request)
            self.rows.slot[slot] = -1
            self._release(slot)

    def generate(self, prompts: Iterable[Sequence[int] | Tensor], max_new_tokens: int = 100, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt. Options: those of :meth:`submit`, for all; prompt i draws with ``seed + i``."""
        seed = options.pop("seed", 0)
        if type(seed) is not int:
            raise wrong("generate", "seed", "an int", repr(seed))
        if not isinstance(prompts, Iterable):
            raise wrong("generate", "prompts", "a sequence of prompts", type(prompts).__name__)
        requests: list[Request] = []
        try:
            for i, prompt in enumerate(prompts):
                requests.append(self.submit(prompt, max_new_tokens, seed=seed + i, **options))
            self.run()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise
        return [request.tokens for request in requests]

    def run(self) -> None:
        """Steps until every request has finished."""
        while self.step():
            pass

    @torch.no_grad()
    def step(self) -> bool:
        """Lets requests in, begins one step, and reads what has come. False: nothing is left to do."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            self._admit()
            if self.running:
                self._launch()
            while len(self.sent) > (self.lag if self.running or self.waiting else 0):
                self._read(self.sent.popleft())
        return bool(self.running or self.waiting or self.sent)

    # ---- slots ----

    def _admit(self) -> None:
        batch: list[Request] = []
        tokens = 0
        while self.waiting and len(batch) < len(self.unused):
            tokens += len(self.waiting[0].prompt)
            if batch and tokens > self.prefill_tokens:
                break
            batch.append(self.waiting.popleft())
        if not batch:
            return
        slots = [self.unused.pop() for _ in batch]
        for slot, request in zip(slots, batch, strict=True):
            self.owner[slot] = request
            self.base[slot] = len(request.prompt) + 1 - self.steps
            self.modes[request.mode] += 1
            # The prefill gives the first token, each step one more.
            self.ends.setdefault(self.steps + request.max_new_tokens - 1, []).append((slot, request))
        self._prefill(batch, slots)
        self._free_ended()

    def _free_ended(self) -> None:
        """Frees the slots of sequences that end with the steps begun so far: the device does later what comes later."""
        for slot, request in self.ends.pop(self.steps, ()):
            if self.owner[slot] is request:
                self._release(slot)

    def _release(self, slot: int) -> None:
        request = self.owner[slot]
        assert request is not None
        self.owner[slot] = None
        self.unused.append(slot)
        self.modes[request.mode] -= 1

    # ---- the device ----

    def _layers(self) -> list[tuple[Any, Pool, nn.RMSNorm]]:
        """Layer, states and the norm that follows, for each layer."""
        layers: list[Any] = list(self.model.model.layers)
        norms = [layer.input_layernorm for layer in layers[1:]] + [self.model.model.norm]
        return list(zip(layers, self.pools, norms, strict=True))

    def _prefill(self, batch: list[Request], slots: list[int]) -> None:
        device, rows = self.device, self.rows
        plan = Prefill(slots, [len(request.prompt) for request in batch], device)
        tokens = array.array("q", itertools.chain.from_iterable(request.prompt for request in batch))
        ids = on_device(torch.frombuffer(tokens, dtype=torch.int64), device)
        x = self.model.model.embed_tokens(ids[None])
        layout = make_layout(self.config, x, None, None, plan.cu_seqlens, plan.longest)
        layers = self._layers()
        h = layers[0][0].input_layernorm(x)
        for layer, pool, norm in layers:
            y = layer.mixer.out_proj(pool.prefill(layer.mixer, layer.mixer.in_proj(h), layout, plan).flatten(2))
            x, h = self.add_norm_packed(x, y, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps)
            x, h = self.add_norm_packed(x, layer.mlp(h), norm.weight, norm.eps)
        logits = self.model.lm_head(h[0, plan.last])

        def column(values: Iterable[Any], like: Tensor) -> Tensor:
            return on_device(torch.tensor(list(values), dtype=like.dtype), device)

        new = {
            "length": column((len(r.prompt) for r in batch), rows.length),
            "limit": column((len(r.prompt) + r.max_new_tokens for r in batch), rows.limit),
            "stop": column(([*r.stop, *[-1] * (STOPS - len(r.stop))] for r in batch), rows.stop),
            **{name: column((getattr(r, name) for r in batch), getattr(rows, name)) for name in OPTIONS},
        }
        options = {name: new[name] for name in OPTIONS}
        token = choose(logits, max(r.mode for r in batch), **options, position=new["length"])
        new["token"] = token
        new["slot"] = plan.slots.masked_fill(_ended(token, new["length"], new["limit"], new["stop"]), -1)
        for name, values in new.items():
            rows.tensors()[name].index_copy_(0, plan.slots, values)
        self._send(token, list(batch))

    def _reads(self, tokens: list[int]) -> tuple[Read, ...]:
        """How a step reads each size of rings, where running sequences come to at most ``tokens`` each with it."""
        return tuple(self._read_of(size, tokens) for size in self.rings)

    def _read_of(self, size: int, tokens: list[int]) -> Read:
        most = max(tokens, default=1)
        # Up to the next power of two or one and a half times one: few graphs, which read at most half as much again.
        grain = max(FEWEST, 1 << max((most - 1).bit_length() - 2, 0))
        columns = min(size, -(-most // grain) * grain)
        if self.flash:
            used = sum(min(n, size) for n in tokens)
            if not self.dense or FLASH_COST * used < self.max_batch * columns:
                return Read(0, True)
        # Full rings need no mask. All of max_length is used in a last step only: not worth a graph.
        return Read(columns, size == self.max_length or min(tokens, default=1) < size)

    def _compute(self, mode: int, reads: tuple[Read, ...]) -> None:
        """One token for every slot that has a sequence. Every tensor that outlives it is updated in place."""
        rows = self.rows
        step = Step(rows.slot, rows.slot >= 0, rows.length, None, self.rotate)
        if self.angles is not None:
            place = rows.length.clamp(max=self.max_length - 1)
            cos, sin = (x.index_select(0, place)[:, None, None] for x in self.angles)
            step.angles = (cos, sin)
        for size, read in zip(self.rings, reads, strict=True):
            step.rings[size] = make_ring(size, read, step, self.dtype)
        layers = self._layers()
        gated = [(pool.bias, layer.mixer.gate_bias) for layer, pool, _ in layers if not isinstance(pool, KeysPool)]
        if gated:  # one kernel casts those of all layers
            kept, given = zip(*gated, strict=True)
            torch._foreach_copy_(list(kept), list(given))
        x = self.model.model.embed_tokens(rows.token)
        h = layers[0][0].input_layernorm(x)
        for layer, pool, norm in layers:
            y = layer.mixer.out_proj(pool.step(layer.mixer, layer.mixer.in_proj(h), step).flatten(1))
            x, h = self.add_norm(x, y, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.eps)
            x, h = self.add_norm(x, layer.mlp(h), norm.weight, norm.eps)
        rows.length.add_(step.active)
        token = choose(self.model.lm_head(h), mode, *rows.options(), rows.length)
        rows.emitted.copy_(token.masked_fill(~step.active, -1))
        rows.token.copy_(torch.where(step.active, token, rows.token))
        rows.slot.masked_fill_(_ended(token, rows.length, rows.limit, rows.stop), -1)

    def _launch(self) -> None:
        mode = max(mode for mode in range(3) if self.modes[mode] or mode == GREEDY)
        tokens: list[int] = []
        if self.rings:
            tokens = [base + self.steps for base, owner in zip(self.base, self.owner, strict=True) if owner is not None]
        reads = self._reads(tokens)
        if self.device.type == "cuda":
            if (mode, reads) not in self.graphs:
                reads = self._prepare(mode, reads, tokens)
            self.graphs[mode, reads].replay()
        else:
            self._compute(mode, reads)
        self._send(self.rows.emitted, list(self.owner))
        self.steps += 1
        self._free_ended()

    def _prepare(self, mode: int, reads: tuple[Read, ...], tokens: list[int]) -> tuple[Read, ...]:
        """Makes the graph of a step, and says how it reads: otherwise than ``reads`` where cuDNN has no kernel after all."""
        try:
            self.graphs[mode, reads] = self._capture(mode, reads)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not self.flash or not any(read.columns for read in reads):
                raise
            self.dense = False
            reads = self._reads(tokens)
            if (mode, reads) not in self.graphs:
                self.graphs[mode, reads] = self._capture(mode, reads)
        return reads

    def _capture(self, mode: int, reads: tuple[Read, ...]) -> torch.cuda.CUDAGraph:
        """The graph of a step. What is tried before has no sequence in any slot, so that no state moves."""
        saved = {name: x.clone() for name, x in self.rows.tensors().items()}
        try:
            self.rows.slot.fill_(-1)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):
                    for _ in range(2):  # workspaces, libraries and compiled code are made here
                        self._compute(mode, reads)
            finally:
                torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            with _no_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._compute(mode, reads)
        finally:
            for name, x in self.rows.tensors().items():
                x.copy_(saved[name])
        return graph

    # ---- to the host ----

    def _send(self, tokens: Tensor, owners: list[Request | None]) -> None:
        if self.device.type != "cuda":
            self.sent.append(Sent(tokens.clone(), owners, None))
            return
        if tokens is self.rows.emitted and self.buffers:
            host, ready = self.buffers.pop()
        else:
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            ready = torch.cuda.Event(blocking=True)  # the host sleeps meanwhile
        host.copy_(tokens, non_blocking=True)
        ready.record()
        self.sent.append(Sent(host, owners, ready, tokens is self.rows.emitted))

    def _read(self, sent: Sent) -> None:
        if sent.ready is not None:
            sent.ready.synchronize()
        error: BaseException | None = None
        tokens = sent.tokens.tolist()
        if sent.ready is not None and sent.of_step:
            self.buffers.append((sent.tokens, sent.ready))
        for token, request in zip(tokens, sent.owners, strict=True):
            if request is None or token < 0 or request.finished is not None:
                continue
            request.tokens.append(token)
            if token in request.stop:
                request.finished = "stop"
                if request in self.owner:  # it has ended on the device; its slot may be free since its limit
                    self._release(self.owner.index(request))
            elif len(request.tokens) == request.max_new_tokens:
                request.finished = "length"
            if request.on_token is not None:
                try:
                    request.on_token(request, token)
                except BaseException as raised:  # every row's token is taken before the first error goes on
                    error = error or raised
        if error is not None:
            raise error


OPTIONS = ("temperature", "top_k", "top_p", "seed")  # of a request and of the rows, in the order of choose()


def _tokens_below(vocab: int, prompt: list[Any]) -> bool:
    """Whether there are tokens and all are ints in range. No loop in Python: prompts may be long, and many."""
    if set(map(type, prompt)) != {int}:
        return False
    try:
        least, most = torch.frombuffer(array.array("q", prompt), dtype=torch.int64).aminmax()
    except OverflowError:  # beyond 64 bits
        return False
    return int(least) >= 0 and int(most) < vocab


def _number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _ended(token: Tensor, length: Tensor, limit: Tensor, stop: Tensor) -> Tensor:
    """Where ``token``, which follows ``length`` tokens in the states, is a sequence's last."""
    return (token[:, None] == stop).any(-1) | (length + 1 >= limit)
