"""Random calls: shapes, strides, chunk sizes, groups, dtypes, gates up to +-30, packing, states and cuts.

HYPOTHESIS_PROFILE=long (or --hypothesis-profile=long) runs many more examples, other ones each time.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_decode import token
from test_state import in_pieces

import rat_ext
from rat_ext import RATCache
from rat_ext.testing import LAYOUTS, attention_case, check, evaluate, recurrence_case

chunk_sizes = st.one_of(st.integers(1, 20), st.sampled_from([32, 50, 64, 200, 2**31, 2**40]))
some_lengths = st.lists(st.integers(0, 70), min_size=1, max_size=5)


@st.composite
def heads_and_groups(draw):
    groups = draw(st.integers(1, 4))
    return {"groups": groups, "heads": groups * draw(st.integers(1, 4))}


@st.composite
def calls(draw, kind):
    """Keyword arguments of attention_case or recurrence_case."""
    options = draw(heads_and_groups())
    options |= {
        "dim": 8 * draw(st.one_of(st.integers(1, 12), st.integers(1, 32))),
        "chunk_size": draw(chunk_sizes),
        "gate_size": draw(st.sampled_from([0.0, 1.0, 4.0, 30.0])),
        "gate_mean": draw(st.sampled_from([-30.0, -4.0, 0.0, 3.0, 30.0])),
        "gate_bias": draw(st.booleans()),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dy_layout": draw(st.sampled_from([name for name in LAYOUTS if name != "projection"])),
        "return_state": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }
    if draw(st.booleans()):
        options["sequences"] = draw(some_lengths)
        count = len(options["sequences"])
    else:
        options |= {
            "batch": draw(st.integers(1, 4)),
            "tokens": draw(st.one_of(st.integers(1, 40), st.integers(1, 300))),
        }
        count = options["batch"]
    if draw(st.booleans()):
        options["lengths"] = draw(st.lists(st.integers(0, 70), min_size=count, max_size=count))
    if kind != "chunk_recurrence":
        options |= {"out_gate": draw(st.booleans()), "rotary": draw(st.booleans())}
    return options


@st.composite
def dtypes(draw):
    return draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))


def usable(device, dtype):
    return torch.float32 if device.type == "cuda" and dtype == torch.float64 else dtype


@given(calls("rat_attention"), dtypes())
def test_rat_attention(device, options, dtype):
    check(attention_case(device, usable(device, dtype), **options))


@given(calls("chunk_attention"), dtypes())
def test_chunk_attention(device, options, dtype):
    check(attention_case(device, usable(device, dtype), op="chunk_attention", **options))


@given(calls("chunk_recurrence"), dtypes())
def test_chunk_recurrence(device, options, dtype):
    check(recurrence_case(device, usable(device, dtype), **options))


@given(heads_and_groups(), dtypes(), chunk_sizes, st.integers(1, 120), st.sets(st.integers(0, 120), max_size=4))
def test_cut_anywhere(device, heads, dtype, chunk_size, tokens, cuts):
    """A forward in pieces is the forward in one, gradients too."""
    case = attention_case(
        device, usable(device, dtype), tokens=tokens, dim=16, chunk_size=chunk_size, return_state=True, **heads
    )
    check(case, function=in_pieces(sorted(cut for cut in cuts if cut <= tokens)))


@given(heads_and_groups(), st.integers(1, 12), st.integers(0, 30), st.integers(1, 20), st.integers(1, 12))
def test_decode_continues_prefill(device, heads, chunk_size, prefill, steps, dims):
    """Prefill and decode give what one forward over all tokens gives."""
    case = attention_case(device, torch.float32, tokens=prefill + steps, dim=8 * dims, chunk_size=chunk_size, **heads)
    whole, _ = evaluate(rat_ext.rat_attention, case, backward=False)
    tensors = {key: x for key, x in case.tensors.items() if key != "gate_bias"}
    fixed = {"gate_bias": case.tensors["gate_bias"]} | {key: case.options[key] for key in ("rotary_cos", "rotary_sin")}
    if prefill:
        first = {key: x[:, :prefill] for key, x in tensors.items()}
        _, cache = rat_ext.rat_attention(**first, chunk_size=chunk_size, return_state=True, **fixed)
        cache = cache.reserve(prefill + steps)
    else:
        cache = RATCache.empty(2, heads["heads"], 8 * dims, chunk_size, steps, device=device)
    for t in range(prefill, prefill + steps):
        y = rat_ext.rat_decode_step(**token(tensors, t), cache=cache, **fixed)
        torch.testing.assert_close(y, whole["y"][:, t], rtol=1e-4, atol=2e-5)
