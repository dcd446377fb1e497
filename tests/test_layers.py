"""The layer: pieces equal the whole, its initialisation, what replaces or moves its weights, wrong arguments say so.

Rotary tables are in test_rotary.py, torch's distributed wrappers in test_parallel_wrappers.py.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rat_ext import RATCache, rat_attention, rat_attention_packed, rotary_tables
from rat_ext.layers import RATLayer


def test_layer_in_pieces(device):
    torch.manual_seed(0)
    layer = RATLayer(64, 4, 2, 8, max_length=16, device=device)  # a table of two chunks, which has to grow
    x = torch.randn(2, 50, 64, device=device)
    whole = layer(x)
    first, state = layer(x[:, :21], return_state=True)
    second, state = layer(x[:, 21:40], state, return_state=True)
    cache = state.detach().reserve(50)
    steps = [layer.step(x[:, t], cache) for t in range(40, 50)]
    pieces = torch.cat((first, second, torch.stack(steps, dim=1)), dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_layer_packed(device):
    torch.manual_seed(0)
    layer = RATLayer(64, 4, 2, 8, device=device)
    x = torch.randn(1, 50, 64, device=device)
    cuts = [0, 13, 13, 50]
    packed = layer(x, cu_seqlens=torch.tensor(cuts, dtype=torch.int32, device=device))
    alone = [layer(x[:, a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((64, 5, 1, 4), "num_heads: expected a divisor of d_model = 64, got 5"),
        ((64, 0, 1, 4), "num_heads: expected a divisor of d_model = 64, got 0"),
        ((64, 4, 3, 4), "num_groups: expected a divisor of num_heads = 4, got 3"),
        ((60, 4, 2, 4), "d_model: expected heads whose size .* is a multiple of 8 from 8 to 256, got 60 / 4 = 15"),
        ((2048, 4, 2, 4), "d_model: expected heads whose size .* got 2048 / 4 = 512"),
        ((64, 4, 2, 0), "chunk_size: expected at least 1, got 0"),
        ((-64, 4, 2, 8), "d_model: expected heads whose size .* got -64 / 4 = -16"),
        ((64, -4, 2, 8), "num_heads: expected a divisor of d_model = 64, got -4"),
        ((64, 4, -2, 8), "num_groups: expected a divisor of num_heads = 4, got -2"),
    ],
)
def test_layer_errors(arguments, words):
    with pytest.raises(ValueError, match=f"^RATLayer: {words}$"):
        RATLayer(*arguments)


@pytest.mark.parametrize("dim", [8, 256])
def test_the_least_and_the_largest_heads(device, dim):
    layer = RATLayer(2 * dim, 2, 1, 4, device=device)
    assert layer.head_dim == dim and layer(torch.randn(1, 5, 2 * dim, device=device)).isfinite().all()


class Mute:
    """What has no length, no number and no short text."""

    def __repr__(self):
        return "a\nb" * 999


OF_NO_TYPE = ["x" * 999, [8], (), Mute(), 1j, torch.tensor(8), torch.ones(2), np.ones(2), object, print]
NO_DTYPE = ["float32", 3, float, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *((name, x) for name in ("d_model", "num_heads", "num_groups", "chunk_size") for x in (None, *OF_NO_TYPE)),
        *((name, x) for name in ("d_model", "chunk_size", "max_length") for x in (8.0, True, 2**63, -(2**70))),
        *(("rotary_base", x) for x in (*OF_NO_TYPE, True, 0, -1.0, float("nan"), float("inf"), 10**400)),
        *(("dtype", x) for x in (*OF_NO_TYPE, *NO_DTYPE)),
        *(("device", x) for x in (*OF_NO_TYPE[1:5], "nope", 3.5, "cuda:x")),
        ("max_length", -1),
    ],
)
def test_the_constructor_answers_in_one_line(argument, value):
    arguments = {"d_model": 64, "num_heads": 4, "num_groups": 2, "chunk_size": 8} | {argument: value}
    with pytest.raises(ValueError, match=rf"^RATLayer: {argument}: expected .+, got .+$") as error:
        RATLayer(**arguments)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *((name, x) for name in ("batch", "max_length") for x in (None, *OF_NO_TYPE, 8.0, True, 2**63)),
        *(("dtype", x) for x in (*OF_NO_TYPE, *NO_DTYPE)),
        *(("device", x) for x in (*OF_NO_TYPE[1:5], "nope", 3.5)),
    ],
)
def test_new_cache_answers_in_one_line(argument, value):
    arguments = {"batch": 2, "max_length": 20} | {argument: value}
    with pytest.raises(ValueError, match=rf"^RATLayer\.new_cache: {argument}: expected .+, got .+$") as error:
        RATLayer(64, 4, 2, 8).new_cache(**arguments)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


def test_numbers_of_other_kinds():
    """Anything that counts is an int: NumPy's too."""
    layer = RATLayer(np.int64(64), np.int32(4), np.uint8(2), np.int64(8), max_length=np.int64(99), rotary_base=np.float32(100))
    assert all(type(getattr(layer, name)) is int for name in ("num_heads", "num_groups", "chunk_size", "max_length"))
    assert layer.rotary_base == 100.0 and layer.new_cache(np.int64(2), np.int64(20)).batch == 2
    assert layer(torch.randn(1, 9, 64)).shape == (1, 9, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"return_state": True}, "cache: expected no initial_state or return_state"),
        ({"initial_state": RATCache.empty(2, 4, 16, 8, 20)}, "cache: expected no initial_state or return_state"),
        ({"initial_state": "state"}, "initial_state: expected a RATCache or None, got str"),
        ({"cu_seqlens": "cuts"}, r"cu_seqlens: expected x \(1, T, d_model\) and exact"),
        ({"cu_seqlens": "cuts", "x": torch.zeros(1, 3, 64), "exact": False}, "cu_seqlens: expected .* exact arithmetic"),
        (
            {"cache": None, "x": torch.zeros(2, 3, 64), "slots": "slots"},
            "slots: expected a cache that it is for, got cache=None",
        ),
        ({"cache": None, "x": torch.zeros(2, 3, 64), "exact": True}, "exact: expected a cache that it is for, got cache=None"),
    ],
)
def test_errors_of_decoding(options, words):
    layer = RATLayer(64, 4, 2, 8)
    with pytest.raises(ValueError, match=f"^RATLayer: {words}"):
        layer(**{"x": torch.zeros(2, 64), "cache": layer.new_cache(2, 20)} | options)


def test_decoding_is_a_call(device):
    """step and forward with a cache are one thing, hooks and slots included, and have no gradient."""
    layer = RATLayer(64, 4, 2, 8, device=device)
    x = torch.randn(2, 64, device=device)
    slots = torch.tensor([2, -1], device=device)
    caches = [layer.new_cache(3, 20) for _ in range(2)]
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    y = layer.step(x, caches[0], slots)
    assert seen == [x.shape]
    assert torch.equal(layer(x, cache=caches[1], slots=slots), y) and not y.requires_grad
    for cache in caches:
        assert cache.lengths.tolist() == [0, 0, 1]
    assert not y[1].any()


# ---- initialisation --------------------------------------------------------------------------------------------------


def check_initialised(layer: RATLayer, tolerance: float = 1e-6) -> None:
    for linear in (layer.in_proj, layer.out_proj):
        assert abs(float(linear.weight.detach().double().std()) * 512**0.5 - 1) < 0.02
    want = torch.linspace(math.log(0.25), math.log(4.0), 64, dtype=torch.float64).expand(8, 64)
    torch.testing.assert_close(layer.gate_bias.double().cpu(), want, rtol=tolerance, atol=tolerance)


def test_initialisation(device):
    check_initialised(RATLayer(512, 8, 2, 8, device=device))
    low = RATLayer(512, 8, 2, 8, device=device, dtype=torch.bfloat16)
    check_initialised(low, 2**-8)
    # Rounded once: to the bfloat16 nearest to the float32 value.
    assert torch.equal(low.gate_bias, RATLayer(512, 8, 2, 8, device=device).gate_bias.bfloat16())


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 2000, 2**40])
def test_gate_biases_span_a_chunk(chunk_size):
    bias = RATLayer(64, 4, 2, chunk_size).gate_bias.detach()
    assert torch.allclose(bias[:, 0], torch.tensor(math.log(0.25)))
    assert torch.allclose(bias[:, -1], torch.tensor(math.log(max(min(chunk_size, 1024) / 2, 1))))


def test_meta_then_empty(device):
    with torch.device("meta"):
        layer = RATLayer(512, 8, 2, 8)
    layer.to_empty(device=device)
    layer.reset_parameters()
    check_initialised(layer)
    layer.to_empty(device=device)
    for module in layer.modules():  # as torch's guides have it
        module.reset_parameters()
    check_initialised(layer)


def test_meta_then_assigned(device):
    """A layer made on no device takes the weights of another, and computes the same."""
    layer = RATLayer(64, 4, 2, 8, device=device)
    with torch.device("meta"):
        empty = RATLayer(64, 4, 2, 8)
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(2, 40, 64, device=device)
    assert torch.equal(empty(x), layer(x))


# ---- weights of other kinds ------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """A projection whose weights are int8: a stand-in for what quantisation libraries put in its place."""

    def __init__(self, linear: nn.Linear, bare: bool):
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.register_buffer("packed" if bare else "weight", weight)

    def forward(self, x):
        return x @ (next(self.buffers()).to(x.dtype) * self.scale).T


class Adapted(nn.Module):
    """Low-rank adaptation around a projection."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 4, bias=False, device=linear.weight.device)
        self.up = nn.Linear(4, linear.out_features, bias=False, device=linear.weight.device)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


WRAPS = {
    "int8 weight": lambda linear: Quantised(linear, bare=False),
    "no weight": lambda linear: Quantised(linear, bare=True),
    "low rank": Adapted,
    "sequential": lambda linear: nn.Sequential(linear, nn.Dropout(0.0)),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_other_projections(device, wrap):
    """Caches and tables follow what is computed, not how weights are stored."""
    layer = RATLayer(64, 4, 2, 8, device=device)
    layer.in_proj = WRAPS[wrap](layer.in_proj)
    x = torch.randn(2, 20, 64, device=device)
    whole = layer(x)
    cache = layer.new_cache(2, 20)
    assert cache.chunk_k.dtype == torch.float32
    steps = [layer.step(x[:, t], cache) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole.detach(), rtol=1e-4, atol=1e-4)
    base = layer.in_proj.base.weight.clone() if wrap == "low rank" else None
    layer.reset_parameters()  # draws its own, leaves what took a projection's place
    if base is not None:
        assert torch.equal(layer.in_proj.base.weight, base)


def test_offloaded_weights(device):
    """Weights that are loaded before each call of a module and dropped after it, as accelerate's hooks do."""
    layer = RATLayer(64, 4, 2, 8, device=device)
    x = torch.randn(2, 20, 64, device=device)
    want, kept = layer(x).detach(), {name: value.detach() for name, value in layer.state_dict().items()}

    def place(module, values):
        for key, value in list(module._parameters.items()):
            if value is not None:
                setattr(module, key, nn.Parameter(values(key, value), requires_grad=False))

    def load(name):
        return lambda module, args: place(module, lambda key, value: kept[name + key])

    def drop(module, *_):
        place(module, lambda key, value: value.to("meta"))

    for name, module in layer.named_modules():
        module.register_forward_pre_hook(load(name + "." if name else ""))
        module.register_forward_hook(drop)
        drop(module)
    assert torch.equal(layer(x), want)
    assert layer.gate_bias.is_meta
    cache = layer.new_cache(2, 20, device=device)
    steps = [layer.step(x[:, t], cache) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), want, rtol=1e-4, atol=1e-4)


def test_recomputation(device):
    layer = RATLayer(64, 4, 2, 8, device=device)
    x = torch.randn(2, 20, 64, device=device, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), [x, *layer.parameters()])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def test_new_cache(device):
    layer = RATLayer(64, 4, 2, 8, device=device)
    cache = layer.new_cache(3, 50)
    assert isinstance(cache, RATCache) and cache.chunk_k.shape == (3, 4, 6, 16) and cache.capacity >= 50
    assert (cache.chunk_k.dtype, cache.running_k.dtype) == (torch.float32, torch.float32)
    assert copy.deepcopy(layer).to(torch.bfloat16).new_cache(1, 8).chunk_k.dtype == torch.bfloat16
    assert layer.new_cache(1, 8, torch.float16).chunk_k.dtype == torch.float16
    assert layer.new_cache(1, 8, device="meta").chunk_k.is_meta
    with torch.device("meta"):
        assert RATLayer(64, 4, 2, 8).new_cache(1, 8).chunk_k.is_meta
        assert layer.new_cache(1, 8).chunk_k.device.type == device.type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(device, dtype):
    """A new cache holds what the op computes in, and decoding from it is the forward."""
    layer = RATLayer(64, 4, 2, 8, device=device)
    x = torch.randn(2, 20, 64, device=device)
    with torch.autocast(device.type, dtype):
        whole = layer(x)
        cache = layer.new_cache(2, 20)
        assert cache.chunk_k.dtype == dtype and cache.running_k.dtype == torch.float32
        steps = [layer.step(x[:, t], cache) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole.detach(), rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone():
    layer = RATLayer(64, 4, 2, 8, dtype=torch.float64)
    x = torch.randn(2, 20, 64, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        cache = layer.new_cache(2, 20)
        assert cache.chunk_k.dtype == torch.float64
        steps = [layer.step(x[:, t], cache) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), layer(x).detach())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer, x, cache: layer(x, 3), "initial_state: expected a RATCache or None, got int"),
        (lambda layer, x, cache: layer(x[:, 0], cache=(cache,)), "cache: expected a RATCache or None, got tuple"),
        (lambda layer, x, cache: layer.step(x[:, 0], None), "cache: expected a RATCache, got NoneType"),
        (lambda layer, x, cache: layer(x[0, 0]), r"x: expected a tensor \(B, T, d_model\), got shape \(16,\)"),
        (
            lambda layer, x, cache: layer.step(x[None], cache),
            r"x: expected a tensor \(B, d_model\) or .* beside a cache, got shape",
        ),
        (lambda layer, x, cache: layer(None), "x: expected a tensor .*, got NoneType"),
        (lambda layer, x, cache: layer(x, rotary=()), r"rotary: expected a pair \(cos, sin\) or None, got tuple"),
        (lambda layer, x, cache: layer(x, rotary=x), r"rotary: expected a pair \(cos, sin\) or None, got Tensor"),
    ],
)
def test_a_wrong_argument_of_the_layer(device, call, words):
    layer = RATLayer(16, 2, 1, 4, device=device)
    with pytest.raises(ValueError, match=f"RATLayer: {words}"):
        call(layer, torch.randn(2, 5, 16, device=device), layer.new_cache(2, 8))


# What launches nothing: views, and memory without contents (which tests fill).
NO_WORK = {
    "aten::linear", "aten::t", "aten::transpose", "aten::as_strided", "aten::matmul", "aten::detach", "detach", "aten::flatten",
    "aten::unflatten", "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::split_with_sizes", "aten::empty",
    "aten::new_empty", "aten::empty_strided", "aten::to", "aten::_to_copy", "aten::resolve_conj", "aten::fill_",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 64), (3, 2, 64)])
def test_the_work_of_a_step(device, shape, dtype):
    """Two products and the op; in bfloat16 the gate's bias is cast, before them, so that the op comes right after a product."""
    layer = RATLayer(64, 2, 1, 4, device=device, dtype=dtype)
    cache, x = layer.new_cache(3, 40), torch.randn(shape, device=device, dtype=dtype)
    layer.step(x, cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        layer.step(x, cache)
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    work = [e.name for e in events if e.name.startswith(("aten::", "rat_ext::", "detach")) and e.name not in NO_WORK]
    cast = ["aten::copy_"] if dtype == torch.bfloat16 else []
    assert work == [*cast, "aten::mm", "rat_ext::rat_decode_step", "aten::mm"]


def test_a_continuation_past_every_table_that_is_there(device):
    """Tables of a layer have 128 rows at least; those of a state that is longer are asked for by all of its tokens."""
    torch.manual_seed(0)
    layer = RATLayer(16, 2, 1, 1, max_length=1, rotary_base=777.0, device=device)  # a base of its own: tables of its own
    x = torch.randn(1, 135, 16, device=device)
    with torch.no_grad():
        first, state = layer(x[:, :126], return_state=True)
        pieces = [first]
        for a, b in ((126, 128), (128, 129), (129, 135)):
            y, state = layer(x[:, a:b], state, return_state=True)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_beside_a_cache(device, tokens, packed):
    """A projection in float32 is cast as one without a cache is."""
    torch.manual_seed(0)
    projection, bias = torch.randn(2, tokens, 16 * 16, device=device), torch.randn(4, 16, device=device)
    caches = [RATCache.empty(2, 4, 16, 4, 16, dtype=torch.bfloat16, device=device) for _ in range(2)]
    if packed:
        calls = [(rat_attention_packed, (x, 4, 2, 4)) for x in (projection, projection.bfloat16())]
    else:
        parts = [x.unflatten(-1, (-1, 16)).split((2, 2, 4, 4, 4), dim=2) for x in (projection, projection.bfloat16())]
        calls = [(rat_attention, (*p[:4], 4, p[4])) for p in parts]
        calls = [(lambda *a, **o: rat_attention(*a[:5], out_gate=a[5], **o), a) for _, a in calls]
    with torch.autocast(device.type, torch.bfloat16):
        (call, arguments), (_, cast) = calls
        y = call(*arguments, gate_bias=bias, cache=caches[0])
    want = calls[1][0](*cast, gate_bias=bias, cache=caches[1])
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    assert torch.equal(caches[0].running_k, caches[1].running_k)


@pytest.mark.parametrize("chunk_size", [1, 3, 16])
@pytest.mark.parametrize("past", [-1, 0, 1])
def test_tables_reach_the_last_chunk(device, chunk_size, past):
    """Where a table of 128 rows is full, and where one token opens the chunk after it: by default, and beyond max_length."""
    tokens = 128 * chunk_size + past
    x = torch.randn(1, tokens, 16, device=device)
    for max_length in (0, tokens, 2048):
        layer = RATLayer(16, 2, 1, chunk_size, max_length=max_length).to(device)
        rotary = rotary_tables(-(-tokens // chunk_size), 8, device=device)
        assert torch.equal(layer(x), layer(x, rotary=rotary))
        cache = layer.new_cache(1, tokens)
        assert torch.equal(layer(x, cache=cache), layer(x, rotary=rotary, cache=layer.new_cache(1, tokens)))
        assert cache.length_bound == tokens
