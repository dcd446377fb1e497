"""Addresses and strides, one tensor at a time: rows that no 16-byte access may take, and small tensors of any layout."""

import os

import pytest
import torch

import rat_ext
from rat_ext.testing import LOW, attention_case, check, evaluate, name, same_bits

low = pytest.mark.parametrize("dtype", LOW, ids=name)


def call_all(case, gate_bias, tables) -> dict[str, torch.Tensor]:
    """The ops that take a bias or tables, with these; by name."""
    q, k, v, gate = (case.tensors[key] for key in ("q", "k", "v", "gate"))
    projection = torch.cat([x.flatten(2) for x in (q, k, v, gate)], dim=2)
    both = {"gate_bias": gate_bias, "rotary_cos": tables[0], "rotary_sin": tables[1]}
    heads, groups, dim = v.shape[2], q.shape[2], v.shape[3]
    cache = rat_ext.RATCache.empty(v.shape[0], heads, dim, 4, 16, dtype=v.dtype, device=v.device)
    for t in range(6):
        y = rat_ext.rat_decode_step(q[:, t], k[:, t], v[:, t], gate[:, t], cache, **both)
    return {
        "rat_attention": rat_ext.rat_attention(q, k, v, gate, 4, **both),
        "packed": rat_ext.rat_attention_packed(projection, heads, groups, 4, has_out_gate=False, **both),
        "chunk_attention": rat_ext.chunk_attention(q, v, gate, 4, rotary_cos=tables[0], rotary_sin=tables[1]),
        "recurrence": rat_ext.chunk_recurrence(k, gate, 4, gate_bias=gate_bias),
        "decode": y,
    }


@low
@pytest.mark.parametrize("form", ["transposed", "strided", "unaligned"])
@pytest.mark.parametrize("dim", [8, 32, 128])
def test_strides_of_small_tensors(device, dtype, form, dim):
    """gate_bias and rotary tables of any strides, at any address: the bits of dense ones."""
    case = attention_case(device, dtype, tokens=20, chunk_size=4, dim=dim)
    cos, sin = rat_ext.rotary_tables(5, dim, base=100.0, device=device)
    dense = [case.tensors["gate_bias"], cos, sin]

    def other(x):
        if form == "transposed":
            return x.t().contiguous().t()
        if form == "strided":
            wide = x.new_full((x.shape[0], 2 * x.shape[1] + 1), float("nan"))
            wide[:, 1::2] = x
            return wide[:, 1::2]
        flat = x.new_empty(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    bias, cos, sin = (other(x) for x in dense)
    with torch.no_grad():
        expected = call_all(case, dense[0], dense[1:])
        for key, y in call_all(case, bias, (cos, sin)).items():
            assert same_bits(y, expected[key]), key


def test_the_gradient_of_a_transposed_bias(device):
    case = attention_case(device, torch.float32, heads=2, groups=1, dim=8)
    values, grads = evaluate(rat_ext.rat_attention, case)
    case.tensors["gate_bias"] = case.tensors["gate_bias"].t().contiguous().t()
    again, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    assert same_bits(again["y"], values["y"]) and same_bits(again["dgate_bias"], values["dgate_bias"])


@pytest.mark.parametrize("table", [torch.float64, torch.bfloat16], ids=name)
def test_tables_of_another_dtype(device, table):
    """Tables are used in the state dtype, whatever they come in."""
    case = attention_case(device, torch.float32, tokens=20, chunk_size=4)
    bias = case.tensors["gate_bias"].to(table)
    cos, sin = (x.to(table) for x in rat_ext.rotary_tables(5, 32, base=100.0, device=device))
    with torch.no_grad():
        expected = call_all(case, bias.float(), (cos.float(), sin.float()))
        for key, y in call_all(case, bias, (cos, sin)).items():
            assert same_bits(y, expected[key]), key


def shifted(x: torch.Tensor, what: str) -> torch.Tensor:
    """x (B, T, heads, D) whose address, or one of whose strides, is off a multiple of 16 bytes by some elements: by one, if no
    number follows. All else is such a multiple.
    """
    what, _, number = what.partition(" ")
    by = int(number or 1)
    batch, tokens, heads, dim = x.shape
    token, begin = heads * dim, 0
    row, head = tokens * token, dim
    if what == "address":
        begin = by
    elif what == "head":
        head, token, row = dim + by, heads * (dim + 8), tokens * heads * (dim + 8)
    elif what == "token":
        token, row = token + by, tokens * (token + 8)
    else:
        row = row + by
    flat = x.new_full((begin + batch * row + tokens * token + heads * head,), float("nan"))
    view = flat.as_strided(x.shape, (row, token, head, 1), begin)
    view.copy_(x)
    return view


def assert_same(device: torch.device, found: dict, expected: dict) -> None:
    """On a GPU bit for bit. The CPU sums in the order of memory."""
    for key in expected:
        if device.type == "cuda":
            assert same_bits(found[key], expected[key]), key
        else:
            torch.testing.assert_close(found[key], expected[key], msg=lambda m, key=key: f"{key}: {m}")


ROWS = ("q", "k", "v", "gate", "out_gate")
OFF = ("address", "address 2", "address 4", "address 7", "batch", "token", "token 4", "head", "head 2", "head 4")
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=name)
off = pytest.mark.parametrize("what", OFF)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
@pytest.mark.parametrize("which", [*ROWS, "dy"])
@off
@pytest.mark.parametrize(("dim", "chunk_size"), [(64, 16), (128, 2), (32, 100)])
def test_one_tensor_off_the_grid(device, dtype, which, what, dim, chunk_size):
    """One address or stride of one tensor forbids 16-byte accesses: the numbers stay, on a GPU bit for bit."""
    case = attention_case(device, dtype, tokens=72, dim=dim, chunk_size=chunk_size, groups=2)
    values, grads = evaluate(rat_ext.rat_attention, case)
    if which == "dy":
        grads["y"] = shifted(grads["y"], what)
    else:
        case.tensors[which] = shifted(case.tensors[which], what)
    again, _ = evaluate(rat_ext.rat_attention, case, grads=grads)
    unit = 16 * torch.finfo(dtype).eps
    for key in values:
        if device.type == "cuda":
            assert same_bits(again[key], values[key]), key
            continue
        size = float(values[key].abs().max())
        torch.testing.assert_close(again[key], values[key], rtol=unit, atol=unit * size, msg=lambda m, key=key: f"{key}: {m}")


@every_dtype
@off
@pytest.mark.parametrize("dim", [8, 40, 64, 256])
def test_every_op_off_the_grid(device, dtype, what, dim):
    """The same of all rows at once, in every op: one projection, a pool, single tokens and drafts."""
    case = attention_case(device, dtype, batch=3, tokens=24, chunk_size=4, dim=dim, groups=2)
    rows = {key: case.tensors[key] for key in ROWS}
    bias, (cos, sin) = case.tensors["gate_bias"], rat_ext.rotary_tables(12, dim, base=100.0, device=device)
    both = {"gate_bias": bias, "rotary_cos": cos, "rotary_sin": sin}
    heads, groups = rows["v"].shape[2], rows["q"].shape[2]

    def results(rows, projection):
        cache = rat_ext.RATCache.empty(3, heads, dim, 4, 64, dtype=dtype, device=device)
        arguments = {**rows, **both}
        yield rat_ext.chunk_recurrence(rows["v"], rows["gate"], 4, gate_bias=bias)
        yield rat_ext.chunk_attention(rows["q"], rows["v"], rows["gate"], 4, out_gate=rows["out_gate"])
        yield rat_ext.rat_attention_packed(projection, heads, groups, 4, **both)
        yield rat_ext.rat_attention(**arguments, chunk_size=4, cache=cache)
        yield rat_ext.rat_decode_step(**{key: x[:, 5] for key, x in rows.items()}, cache=cache, **both)
        yield rat_ext.rat_decode_step(**{key: x[:, 5:9] for key, x in rows.items()}, cache=cache, **both)
        cache.check()
        closed = (24 + 1 + 4) // 4
        yield from (cache.chunk_k[:, :, :closed], cache.chunk_v[:, :, :closed], cache.running_k, cache.running_v)

    projection = torch.cat([x.flatten(2) for x in rows.values()], dim=2)
    other = shifted(projection.unsqueeze(2), what.replace("head", "token")).squeeze(2)
    with torch.no_grad():
        expected = list(results(rows, projection))
        found = list(results({key: shifted(x, what) for key, x in rows.items()}, other))
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if device.type == "cuda":
            assert same_bits(x, y), i
        else:
            torch.testing.assert_close(x, y, msg=lambda m, i=i: f"result {i}: {m}")


@every_dtype
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("begin", [0, 1, 4])
def test_expanded_rows(device, dtype, dimension, begin):
    """Rows that all tokens, heads or rows of the batch share (stride 0), at any address: the bits of dense ones."""
    dense = attention_case(device, dtype, tokens=50, dim=64, groups=2)
    wide = attention_case(device, dtype, tokens=50, dim=64, groups=2)
    for key in ROWS:
        x = dense.tensors[key]
        one = x.narrow(dimension, 0, 1)
        flat = x.new_empty(begin + one.numel())
        flat[begin:] = one.flatten()
        wide.tensors[key] = flat[begin:].view(one.shape).expand(x.shape)
        dense.tensors[key] = one.expand(x.shape).contiguous()
    values, grads = evaluate(rat_ext.rat_attention, dense)
    again, _ = evaluate(rat_ext.rat_attention, wide, grads=grads)
    assert_same(device, again, values)


@low
@pytest.mark.parametrize("what", ["address", "token 4", "head"])
def test_many_rows_off_the_grid(device, dtype, what):
    """More than a block of copies takes, in each tensor; and sizes that no power of two divides."""
    case = attention_case(device, dtype, batch=3, tokens=701, heads=6, groups=3, dim=72, chunk_size=16)
    other = attention_case(device, dtype, batch=3, tokens=701, heads=6, groups=3, dim=72, chunk_size=16)
    other.tensors |= {key: shifted(case.tensors[key], what) for key in ROWS}
    values, grads = evaluate(rat_ext.rat_attention, case)
    again, _ = evaluate(rat_ext.rat_attention, other, grads=grads)
    assert_same(device, again, values)


# Rows of two-byte elements at multiples of 8 bytes are read where they are, if the kernels of the call can.
two_bytes = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name)
BY_FOUR = ("address 4", "token 4", "head 4", "batch 4")


def check_moved(results, tensors, moved, grad):
    """``results`` of tensors that lie elsewhere, and the gradients of the first one, have the bits of ``tensors``."""

    def all_of(given):
        leaves = {key: x.detach().requires_grad_(grad) for key, x in given.items()}
        with torch.set_grad_enabled(grad):
            found = results(leaves)
        return found + list(torch.autograd.grad(found[0], list(leaves.values()), torch.ones_like(found[0])) if grad else [])

    expected = all_of(tensors)
    for what, given in moved.items():
        for i, (x, y) in enumerate(zip(all_of(given), expected, strict=True)):
            assert same_bits(x, y), (what, grad, i)


@pytest.mark.gpu
@two_bytes
@pytest.mark.parametrize("which", [*ROWS, "all"])
@pytest.mark.parametrize("kind", ["dense", "packed", "state", "pool", "pieces"])
@pytest.mark.parametrize(
    ("dim", "chunk_size", "groups"),
    [(128, 32, 2), (64, 17, 1), (72, 100, 8), (40, 1, 2), (192, 20, 4), (256, 16, 2), (128, 150, 2)],
)
def test_narrow_rows(device, dtype, which, kind, dim, chunk_size, groups):
    """Of each input alone and of all, beside rows that nobody reads where they are; with a gradient and without."""
    tokens = {1: 600, 16: 2600}.get(chunk_size, 330)  # few tiles of 1 token, many of 16
    case = attention_case(
        device, dtype, tokens=tokens, heads=8, groups=groups, dim=dim, chunk_size=chunk_size, return_state=kind == "state",
        lengths=[5, 270] if kind == "state" else None, sequences=[3, tokens - 130, 0, 127] if kind == "packed" else None,
    )  # fmt: skip
    rows = {key: case.tensors[key] for key in ROWS}
    options = {"gate_bias": case.tensors["gate_bias"], "chunk_size": chunk_size, **case.options}

    def results(rows):
        if kind not in ("pool", "pieces"):
            y = rat_ext.rat_attention(**rows, **options, initial_state=case.state)
            return [y[0], y[1].running_k, y[1].running_v] if kind == "state" else [y]
        cache = rat_ext.RATCache.empty(2, 8, dim, chunk_size, tokens, dtype=dtype, device=device)
        cuts = [0, tokens] if kind == "pool" else [0, chunk_size, 230 // chunk_size * chunk_size, tokens]
        pieces = [{key: x[:, i:j] for key, x in rows.items()} for i, j in zip(cuts, cuts[1:], strict=False)]
        ys = [rat_ext.rat_attention(**piece, **options, cache=cache) for piece in pieces]
        cache.check()
        closed = tokens // chunk_size
        return [*ys, cache.chunk_k[:, :, :closed], cache.chunk_v[:, :, :closed], cache.running_k, cache.running_v]

    moved = {
        what: {key: shifted(x, what) if which in (key, "all") else x for key, x in rows.items()}
        for what in (*BY_FOUR, "address", "token 2")
    }
    check_moved(results, rows, moved, False)
    if kind not in ("pool", "pieces"):
        check_moved(results, rows, moved, True)


@pytest.mark.gpu
@two_bytes
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("dim", "chunk_size"), [(128, 32), (64, 17), (40, 1), (192, 20), (128, 150)])
def test_narrow_projection(device, dtype, grad, dim, chunk_size):
    """Its parts start where it does, up to multiples of 16 bytes."""
    case = attention_case(device, dtype, tokens=330, heads=8, dim=dim, chunk_size=chunk_size)
    whole = torch.cat([case.tensors[key].flatten(2) for key in ROWS], dim=2)

    def results(given):
        return [rat_ext.rat_attention_packed(given["x"], 8, 2, chunk_size, **case.options)]

    moved = {what: {"x": shifted(whole.unsqueeze(2), what).squeeze(2)} for what in ("address 4", "token 4", "batch 4", "token")}
    check_moved(results, {"x": whole}, moved, grad)


@pytest.mark.gpu
@two_bytes
@pytest.mark.parametrize(("dim", "chunk_size"), [(64, 16), (128, 4), (128, 33)])
def test_narrow_values_that_are_not_finite(device, dtype, dim, chunk_size):
    """Queries that are computed one by one read q and out_gate themselves."""
    case = attention_case(device, dtype, tokens=300, heads=8, dim=dim, chunk_size=chunk_size)
    case.tensors["v"].data[:, 130] = float("inf")
    moved = {key: shifted(x, "token 4") if key in ROWS else x for key, x in case.tensors.items()}
    with torch.no_grad():
        expected, found = (
            rat_ext.rat_attention(**tensors, chunk_size=chunk_size, **case.options) for tensors in (case.tensors, moved)
        )
    assert expected[:, :130].isfinite().all() and not expected[:, 180:].isfinite().any()
    assert same_bits(found, expected)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("tokens", "chunk_size"), [(330, 32), (40, 8), (330, 200)])
def test_explain_of_rows(device, dtype, cached, tokens, chunk_size):
    """Which rows are copied: by the families that read them, and by where they start."""
    case = attention_case(device, dtype, tokens=tokens, dim=128, chunk_size=chunk_size)
    cache = rat_ext.RATCache.empty(2, 4, 128, chunk_size, tokens, dtype=dtype, device=device) if cached else None

    def explained(**moved):
        rows = rat_ext.explain(**case.tensors | moved, chunk_size=chunk_size, cache=cache, **case.options)
        return {row["phase"]: row["family"] for row in rows if row["chosen"]}

    families = explained()
    assert not any(phase.endswith("_rows") for phase in families)
    scan = families["recurrence_fwd"] == "scan" and dtype != torch.float32
    attention = families["attention_fwd"] == "sm90"
    reads = {"q": False, "k": scan, "v": scan, "gate": scan, "out_gate": attention}
    moved = {key: shifted(case.tensors[key], "token 4" if dtype != torch.float32 else "token 2") for key in ROWS}
    expected = {f"{key}_rows": "in_place" if reads[key] else "copied" for key in ROWS}
    assert explained(**moved) == families | expected
    for key in ROWS:
        assert explained(**{key: moved[key]}) == families | {f"{key}_rows": expected[f"{key}_rows"]}
        assert explained(**{key: shifted(case.tensors[key], "head")}) == families | {f"{key}_rows": "copied"}


@pytest.mark.gpu
@two_bytes
def test_narrow_rows_take_no_memory(device, dtype):
    """A call without a gradient that reads rows where they are takes what one of aligned rows does."""
    case = attention_case(device, dtype, tokens=512, heads=8, dim=128, chunk_size=32)
    moved = {key: shifted(x, "token 4") if key in ROWS[1:] else x for key, x in case.tensors.items()}
    rows = rat_ext.explain(**moved, chunk_size=32, **case.options)
    if any(row["family"] == "copied" and row["chosen"] for row in rows):
        pytest.skip("kernels of the call read aligned rows alone")

    def peak(tensors):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.no_grad():
            rat_ext.rat_attention(**tensors, chunk_size=32, **case.options)
        return torch.cuda.max_memory_allocated(device) - before

    assert peak(moved) == peak(case.tensors)


@low
@pytest.mark.parametrize("op", ["rat_attention", "whole", "packed", "recurrence"])
@pytest.mark.parametrize("what", [None, "address", "token 2", "token 4"])
def test_what_is_saved(device, dtype, op, what):
    """The backward reads the forward's copies of rows, where it made any, and the caller's memory where it did not."""
    case = attention_case(device, dtype, batch=1, tokens=40, dim=64, groups=2)
    rows = {key: case.tensors[key] for key in ROWS}
    heads, groups = rows["v"].shape[2], rows["q"].shape[2]
    calls = {
        "rat_attention": lambda q, k, v, gate, out_gate: rat_ext.rat_attention(q, k, v, gate, 16, out_gate=out_gate),
        "whole": lambda q, k, v, gate, out_gate: rat_ext.rat_attention(
            q, k, v, gate, 16, out_gate=out_gate, cu_seqlens=torch.tensor([0, 13, 40], dtype=torch.int32, device=device)
        ),
        "packed": lambda x: rat_ext.rat_attention_packed(x.squeeze(2), heads, groups, 16),
        "recurrence": lambda x, gate: rat_ext.chunk_recurrence(x, gate, 16),
    }
    if op == "packed":
        rows = {"x": torch.cat([x.flatten(2) for x in rows.values()], dim=2).unsqueeze(2)}
    elif op == "recurrence":
        rows = {"x": rows["v"], "gate": rows["gate"]}
    if what:
        one = next(iter(rows))  # the others lie as kernels read them
        rows[one] = shifted(rows[one], what)
    leaves = {key: x.detach().requires_grad_() for key, x in rows.items()}
    y = calls[op](**leaves)
    saved = {x.data_ptr() for x in y.grad_fn.saved_tensors if x is not None}
    aligned = what is None or (what == "token 4" and dtype == torch.float32)
    copied = not aligned and device.type == "cuda"
    for i, x in enumerate(leaves.values()):
        assert (x.data_ptr() in saved) == (i > 0 or not copied)
    if copied:
        assert not any(at % 16 for at in saved)
    torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))


# Multiples of 8 that are none of 16: the upper half of a row of q begins between two 16-byte pieces. A CPU pads each to the
# next multiple of 16, in one way.
_between = [pytest.param(dim, marks=[pytest.mark.gpu] * (dim not in (8, 40, 120))) for dim in range(8, 128, 16)]
between = pytest.mark.parametrize("dim", _between)


@low
@between
@pytest.mark.parametrize("options", [{}, {"scale": -0.4, "rotary": False}, {"sequences": [3, 290, 0, 130]}], ids=str)
def test_head_size_between_multiples_of_16(device, dtype, dim, options):
    """Several tiles of queries and blocks of keys; the chunk changes in every place of a tile."""
    check(attention_case(device, dtype, **{"tokens": 410, "chunk_size": 3, "dim": dim} | options))


@low
@between
@pytest.mark.parametrize("scale", [0.2, -0.2])
def test_columns_of_zeros(device, dtype, dim, scale):
    """D + 8 with zeros in the last columns of v, and in q or k, computes the same; on a GPU bit for bit."""
    case = attention_case(device, dtype, tokens=1500, chunk_size=4, dim=dim, rotary=False, scale=scale)
    wide = {key: torch.nn.functional.pad(x, (0, 8)) for key, x in case.tensors.items()}
    with torch.no_grad():
        y = rat_ext.rat_attention(**case.tensors, chunk_size=4, scale=scale)
        padded = rat_ext.rat_attention(**wide, chunk_size=4, scale=scale)
    if device.type == "cuda":
        assert same_bits(padded[..., :dim], y)
    unit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(padded[..., :dim], y, rtol=unit, atol=unit * float(y.abs().max()))
    assert not padded[..., dim:].any()


@pytest.mark.gpu
@low
@between
def test_family_of_a_head_size_between(device, dtype, dim):
    """Hopper's kernels serve both directions; float32 has kernels of its own."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("not a Hopper GPU")
    if os.environ.get("RAT_EXT_KERNELS"):
        pytest.skip("a family is forced")
    case = attention_case(device, dtype, tokens=300, dim=dim)
    rows = rat_ext.explain(**case.tensors, chunk_size=16, **case.options)
    chosen = {row["phase"]: row["family"] for row in rows if row["chosen"]}
    family = "f32" if dtype == torch.float32 else "sm90"
    assert chosen["attention_fwd"] == chosen["attention_bwd"] == family, rows


def test_strides_of_nothing(device):
    """A tensor without elements may have any strides, in the last dimension too."""
    q, v = (torch.zeros(2, 0, heads, 32, device=device)[..., ::2] for heads in (2, 4))
    assert v.stride(-1) == 2
    assert rat_ext.rat_attention(q, q, v, v, 4, out_gate=v).shape == (2, 0, 4, 16)
    assert rat_ext.chunk_recurrence(q, v, 4).shape == (2, 0, 4, 16)
