"""Rotary tables: their values, and that layers share them without keeping any state of their own."""

import copy
import math
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import rat_ext
from rat_ext import rotary
from rat_ext.layers import RATLayer

SIZES = (64, 4, 2, 8)


@pytest.fixture(autouse=True)
def _nothing_made_yet(monkeypatch):
    monkeypatch.setattr(rotary, "_tables", {})


def layer_and_input(device, tokens=50, **options):
    torch.manual_seed(0)
    return RATLayer(*SIZES, device=device, **options), torch.randn(2, tokens, 64, device=device)


def test_values(device):
    """Angles are exact products of index and frequency, however large the index."""
    cos, sin = rat_ext.rotary_tables(4004, 8, device=device)
    assert cos.shape == sin.shape == (4004, 4) and cos.dtype == torch.float32
    for row in (0, 1, 4003):
        for i in range(4):
            angle = row * 10000.0 ** (-2 * i / 8)
            assert abs(float(cos[row, i]) - math.cos(angle)) < 1e-6, (row, i)
            assert abs(float(sin[row, i]) - math.sin(angle)) < 1e-6, (row, i)
    assert abs(float(cos[4003, 1]) - math.cos(400.3)) < 1e-6


def test_errors():
    with pytest.raises(ValueError, match="head_dim: expected an even number, got 7"):
        rat_ext.rotary_tables(4, 7)
    with pytest.raises(ValueError, match="num_chunks: expected at least 0, got -1"):
        rat_ext.rotary_tables(-1, 8)


def test_tables_of_layers(device):
    """At least as long as asked, the same objects for all, of the values of rotary_tables, never freed."""
    kind = (16, 10000.0, device, torch.float32)
    short, again, longer = (rotary.layer_tables(rows, *kind) for rows in (3, 128, 129))
    assert short[0] is again[0] and short[1] is again[1]
    assert 129 <= len(longer[0]) <= 256
    for made in (short, longer):
        for got, want in zip(made, rat_ext.rotary_tables(len(made[0]), 16, device=device), strict=True):
            assert got.device.type == device.type
            torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    assert rotary.layer_tables(2, *kind)[0] is short[0]
    assert all(rotary.layer_tables(rows, *kind)[0] is longer[0] for rows in (130, 200, 256))
    assert sum(len(cos) for cos, _ in rotary._tables.values()) <= 2 * len(longer[0])


def test_a_layer_holds_parameters_only(device):
    layer, x = layer_and_input(device)
    layer(x)
    layer.step(x[:, 0], layer.new_cache(2, 500))
    assert not list(layer.buffers())
    assert set(layer.state_dict()) == {"in_proj.weight", "out_proj.weight", "gate_bias"}
    assert not [name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)]
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("tokens", [8 * 128, 8 * 128 + 1, 8 * 256 + 7])
def test_the_open_chunk_has_a_row(device, tokens):
    layer, x = layer_and_input(device, tokens=tokens, max_length=8)
    assert layer(x).isfinite().all()
    cache = layer.new_cache(1, tokens)
    cache.lengths.fill_(cache.capacity - 1)
    cache.chunk_k.zero_(), cache.chunk_v.zero_()
    assert layer.step(x[:1, 0], cache).isfinite().all()


def test_a_cast_layer(device):
    """Weights in bfloat16, tables in float32: and so the angles of far chunks."""
    layer, x = layer_and_input(device, tokens=8 * 300)
    layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    y = layer(x)
    assert {key[-1] for key in rotary._tables} == {torch.float32}
    exact = rat_ext.rotary_tables(300, 16, device=device)
    assert torch.equal(y, layer(x, rotary=exact))


def test_tables_handed_in(device):
    layer, x = layer_and_input(device)
    other = rat_ext.rotary_tables(9, 16, base=100.0, device=device)
    y = layer(x, rotary=other)
    assert not rotary._tables
    assert not torch.allclose(y, layer(x))
    cache = layer.new_cache(2, 50)
    steps = [layer(x[:, t], cache=cache, rotary=other) for t in range(50)]
    torch.testing.assert_close(torch.stack(steps, dim=1), y.detach(), rtol=1e-4, atol=1e-4)


def test_no_rotation(device):
    layer, x = layer_and_input(device, rotary_base=None)
    layer(x)
    assert not rotary._tables


def test_made_while_sampling_used_in_training(device):
    layer, x = layer_and_input(device)
    with torch.inference_mode():
        layer(x)
    (tables,) = rotary._tables.values()
    assert not tables[0].is_inference() and not tables[1].is_inference()
    layer(x).sum().backward()


def test_fake_tensors_are_not_kept(device):
    layer, x = layer_and_input(device)
    want = layer(x)
    rotary._tables.clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(layer)
        y = fake(mode.from_tensor(x))
    assert y.shape == x.shape
    meta = copy.deepcopy(layer).to("meta")
    assert meta(x.to("meta")).shape == x.shape
    assert not rotary._tables
    torch.testing.assert_close(layer(x), want)
    for tables in rotary._tables.values():
        assert {type(table) for table in tables} == {torch.Tensor}


def test_traced_tensors_are_not_kept(device):
    layer, x = layer_and_input(device)
    with torch.no_grad():
        traced = make_fx(layer)(x)
        torch.func.functionalize(lambda x: x * rotary.layer_tables(3, 16, 10.0, x.device, x.dtype)[0].sum())(x)
    assert not rotary._tables
    torch.testing.assert_close(traced(x), layer(x))


def test_default_device_and_dtype(device):
    layer, x = layer_and_input(device)
    want = layer(x)
    rotary._tables.clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            torch.testing.assert_close(layer(x), want)
            made = RATLayer(*SIZES, device=device, dtype=torch.float32)
            bias = copy.deepcopy(layer.gate_bias)
            layer.reset_parameters()
        torch.testing.assert_close(layer.gate_bias, bias, rtol=1e-6, atol=0)
        torch.testing.assert_close(made.gate_bias, bias, rtol=1e-6, atol=0)
    finally:
        torch.set_default_dtype(before)


def test_threads(device):
    """Eight threads, each with lengths of its own, on one layer."""
    layer, _ = layer_and_input(device)
    inputs = [torch.randn(1, 30 * n, 64, device=device) for n in range(1, 90, 11)]
    rounds, wrong = 5, []
    with torch.no_grad():
        want = [layer(x) for x in inputs]

    def work(first):
        for i in range(rounds * len(inputs)):
            at = (first + i) % len(inputs)
            if at == first:
                rotary._tables.clear()  # always some thread makes them anew
            with torch.no_grad():
                try:
                    torch.testing.assert_close(layer(inputs[at]), want[at])
                except Exception as error:  # a thread's exception would be printed and lost
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_compiled_lengths_that_double(device):
    """fullgraph, one layer, ever longer sequences: two graphs, and none of the eager tables."""
    layer, _ = layer_and_input(device, max_length=8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (16, 33, 70, 150, 310, 650, 1400, 3):
        x = torch.randn(1, tokens, 64, device=device)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("other", [{"rotary_base": 50.0}, {"num_heads": 4}, {"dtype": torch.float64}], ids=str)
def test_layers_that_differ_share_no_table(other):
    """In whichever order they come: each rotates as by tables of its own."""
    sizes = {"d_model": 64, "num_heads": 2, "num_groups": 1, "chunk_size": 4}
    rotary._tables.clear()
    for options in (sizes, sizes | other, sizes):
        layer = RATLayer(**options)
        x = torch.randn(1, 40, 64, dtype=options.get("dtype", torch.float32))
        base = options.get("rotary_base", 10000.0)
        own = rat_ext.rotary_tables(10, layer.head_dim, base=base, dtype=x.dtype)
        assert torch.equal(layer(x), layer(x, rotary=own))


def test_a_capture_takes_the_tables_that_are_there(monkeypatch):
    """A replay computes none; only where there are none, the graph makes its own."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device, made, own = torch.device("cuda", 0), ("cos", "sin"), ("own cos", "own sin")
    monkeypatch.setattr(rotary, "rotary_tables", lambda *args, **options: own)
    monkeypatch.setattr(rotary, "_tables", {(128, 64, 10000.0, device, torch.float32): made})
    assert rotary.layer_tables(100, 64, 10000.0, device, torch.float32) is made
    for rows, dim, base in ((129, 64, 10000.0), (100, 32, 10000.0), (100, 64, 500.0)):
        assert rotary.layer_tables(rows, dim, base, device, torch.float32) is own
    assert list(rotary._tables.values()) == [made]


@pytest.mark.gpu
def test_cuda_graph():
    """Tables first made inside a capture belong to the graph, and those of before serve it."""
    device = torch.device("cuda", torch.cuda.current_device())
    layer, x = layer_and_input(device)
    with torch.no_grad():
        want = layer(x)
        for made_before in (False, True):
            rotary._tables.clear()
            if made_before:
                layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            assert bool(rotary._tables) == made_before
            kept = dict(rotary._tables)  # noqa: F841  as they are outside of this test, for good
            rotary._tables.clear()  # whether the graph needs what it does not hold
            torch.testing.assert_close(layer(x), want)
            graph.replay()
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [0.0, -3.0, float("nan"), float("inf"), "x", True])
def test_a_base_that_is_none(base):
    """No table of NaN comes of it."""
    with pytest.raises(ValueError, match="rotary_tables: base: expected a finite number above 0"):
        rat_ext.rotary_tables(4, 8, base=base)
    if isinstance(base, float):
        with pytest.raises(ValueError, match="RATLayer: rotary_base: expected a finite number above 0 or None"):
            RATLayer(16, 2, 1, 4, rotary_base=base)


@pytest.mark.parametrize("dynamic", [False, True])
def test_tables_are_traced(device, dynamic):
    """In one graph, of any number of rows."""
    make = torch.compile(
        lambda x: rat_ext.rotary_tables(x.shape[0], 8, device=x.device), backend="eager", fullgraph=True, dynamic=dynamic
    )
    for rows in (3, 5, 9):
        for got, want in zip(
            make(torch.zeros(rows, device=device)), rat_ext.rotary_tables(rows, 8, device=device), strict=True
        ):
            assert torch.equal(got, want)
