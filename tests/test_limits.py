"""A number at its limit is taken; the next one is refused by an error that names the argument and the number."""

import math
import re

import pytest
import torch

import rat_ext
from rat_ext import RATCache
from rat_ext.layers import RATLayer

LARGEST = 2**31 - 1
LEAST, MOST = 5e-324, float.fromhex("0x1.fffffffffffffp+1023")  # floats above 0


def empty(**changes) -> RATCache:
    return RATCache.empty(**{"batch": 3, "num_heads": 2, "head_dim": 8, "chunk_size": 4, "max_length": 19} | changes)


def pool(tokens=0, **options) -> RATCache:
    """Every entry has so many tokens."""
    made = empty(**options)
    made.allocate(list(range(3)), made.capacity)
    if tokens:
        x = torch.randn(3, tokens, 2, 8)
        rat_ext.rat_decode_step(x, x, x, x, made)
    return made


def attention(chunk_size=4, **options):
    x = torch.randn(1, 9, 2, 8)
    return rat_ext.rat_attention(x, x, x, x, chunk_size, **options)


def packed(**changes):
    sizes = {"num_heads": 4, "num_groups": 2, "chunk_size": 4} | changes
    return rat_ext.rat_attention_packed(torch.randn(1, 3, 16 * 8), **sizes)


def layer(d_model=64, **changes) -> RATLayer:
    return RATLayer(d_model, **{"num_heads": 4, "num_groups": 2, "chunk_size": 8} | changes)


CUTS = torch.tensor([0, 2, 9], dtype=torch.int32)
ROPE = {"head_dim": 8}
# By argument: what is called, a number that it takes, the next one that it does not.
LIMITS = [
    ("batch", lambda n: empty(batch=n), 0, -1),
    ("num_heads", lambda n: empty(num_heads=n), 0, -1),
    ("head_dim", lambda n: empty(head_dim=n), 0, -1),
    ("chunk_size", lambda n: empty(chunk_size=n), 1, 0),
    ("max_length", lambda n: empty(max_length=n), 0, -1),
    ("max_length", lambda n: empty(max_length=n, num_heads=0), LARGEST, LARGEST + 1),
    ("draft_tokens", lambda n: empty(draft_tokens=n), 0, -1),
    ("page_chunks", lambda n: empty(page_chunks=n), 1, 0),
    ("page_chunks", lambda n: empty(page_chunks=n), 2, 3),
    ("page_chunks", lambda n: empty(page_chunks=n), 8, 7),
    ("num_pages", lambda n: empty(num_pages=n), 1, 0),
    ("num_pages", lambda n: empty(num_pages=n, max_length=3), 0, -1),  # no chunk ever closes
    ("chunk_size", lambda n: RATCache(*empty().tensors(), n, 0), 1, 0),
    ("length_bound", lambda n: RATCache(*empty().tensors(), 4, n), 0, -1),
    ("length_bound", lambda n: RATCache(*empty().tensors(), 4, n), LARGEST, LARGEST + 1),
    ("length_bound", lambda n: empty().replace(length_bound=n), LARGEST, LARGEST + 1),
    ("max_length", lambda n: empty().reserve(n), 0, -1),
    ("max_length", lambda n: empty(num_heads=0).reserve(n), LARGEST, LARGEST + 1),
    ("tokens", lambda n: pool(8, draft_tokens=3).rollback([1], n), 3, 4),
    ("tokens", lambda n: pool(8, draft_tokens=3).rollback([1], torch.tensor([n])), 0, -1),
    ("tokens", lambda n: pool(2, draft_tokens=3).rollback([1], n), 2, 3),
    ("max_length", lambda n: pool(page_chunks=2).allocate([1], n), 19, 20),
    ("max_length", lambda n: pool(page_chunks=2).allocate([1], n), 0, -1),
    ("tokens", lambda n: pool(8).fork([0], [1], n), 8, 12),
    ("tokens", lambda n: pool(8).fork([0], [1], n), 0, -4),
    ("tokens", lambda n: pool(8).fork([0], [1], [n]), 4, 5),
    ("from_slots", lambda n: pool(1).copy([n], [1]), 2, 3),
    ("to_slots", lambda n: pool(1).copy([1], [n]), 0, -1),
    ("slots", lambda n: pool(1).reset([n]), 2, 3),
    ("slots", lambda n: pool(1).read([n]), 0, -1),
    ("num_chunks", lambda n: rat_ext.rotary_tables(n, 8), 0, -1),
    ("head_dim", lambda n: rat_ext.rotary_tables(3, n), 0, -2),
    ("head_dim", lambda n: rat_ext.rotary_tables(3, n), 2, 3),
    ("base", lambda n: rat_ext.rotary_tables(3, 8, base=n), LEAST, 0),
    ("base", lambda n: rat_ext.rotary_tables(3, 8, base=n), MOST, math.inf),
    ("chunk_size", lambda n: layer(chunk_size=n), 1, 0),
    ("max_length", lambda n: layer(max_length=n), 0, -1),
    ("num_groups", lambda n: layer(num_groups=n), 1, 0),
    ("num_groups", lambda n: layer(num_groups=n), 4, 5),
    ("rotary_base", lambda n: layer(rotary_base=n), LEAST, 0),
    ("rotary_base", lambda n: layer(rotary_base=n), MOST, math.inf),
    ("chunk_size", lambda n: layer(chunk_size=n), 2**63 - 1, 2**63),
    ("batch", lambda n: layer().new_cache(n, 20), 0, -1),
    ("max_length", lambda n: layer().new_cache(2, n), 0, -1),
    ("chunk_size", lambda n: attention(n), 1, 0),
    ("chunk_size", lambda n: attention(n), 2**63 - 1, 2**63),
    ("max_seqlen", lambda n: attention(cu_seqlens=CUTS, max_seqlen=n), 7, 6),
    ("max_seqlen", lambda n: attention(cu_seqlens=CUTS, max_seqlen=n), 2**63 - 1, 2**63),
    ("max_seqlen", lambda n: attention(cu_seqlens=CUTS[:1] if n == 0 else CUTS, max_seqlen=n), 9, -1),
    ("num_groups", lambda n: packed(num_groups=n), 2, 0),
    ("num_heads", lambda n: packed(num_heads=n, num_groups=1), 2, 0),
]


@pytest.mark.parametrize(("argument", "call", "taken", "refused"), LIMITS)
def test_limits(argument, call, taken, refused):
    call(taken)
    with pytest.raises(ValueError, match=rf"^[\w.]+: {argument}: expected .+, got .*{re.escape(str(refused))}\b"):
        call(refused)


def test_flags_are_the_numbers_0_and_1():
    """As Python has it; no other number is one."""
    for value in (0, 1):
        assert isinstance(attention(return_state=value), tuple) == bool(value)
    for value in (2, -1):
        with pytest.raises(ValueError, match=f"^rat_ext.rat_attention: return_state: expected a bool, got int {value}$"):
            attention(return_state=value)


def test_dtypes_of_a_cache():
    """Those that ops compute in: of two bytes at the least."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        made = empty(dtype=dtype)
        assert made.chunk_k.dtype == made.chunk_v.dtype == dtype
        assert made.running_k.dtype == made.running_v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for dtype in (torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64, "float32"):
        with pytest.raises(ValueError, match=f"^RATCache: dtype: expected a floating dtype of the ops, got {dtype}$"):
            empty(dtype=dtype)


def test_sizes_of_an_empty_cache(device):
    """Every tensor of every option, by shape, dtype and device."""

    def shapes(cache):
        names = ("chunk_k", "chunk_v", "running_k", "running_v", "lengths", "scale_k", "scale_v", "page_table", "error")
        found = {name: getattr(cache, name) for name in names}
        assert all(x is None or x.device.type == device.type for x in found.values())
        return {name: None if x is None else (tuple(x.shape), x.dtype) for name, x in found.items()}

    for fp8 in (False, True):
        for draft in (0, 1, 3):
            for page, pages in ((None, None), (2, None), (2, 5), (None, 5)):
                cache = empty(
                    dtype=torch.bfloat16, fp8=fp8, draft_tokens=draft, page_chunks=page, num_pages=pages, device=device
                )
                columns = 0 if page is pages else -(-4 // (page or 16))
                blocks, rows = (3, 4) if page is pages else (pages or 3 * columns, page or 16)
                states, running = (blocks, 2, rows, 8), (3, *[draft + 1] * (draft > 0), 2, 8)
                assert shapes(cache) == {
                    "chunk_k": (states, torch.float8_e4m3fn if fp8 else torch.bfloat16),
                    "chunk_v": (states, torch.float8_e4m3fn if fp8 else torch.bfloat16),
                    "running_k": (running, torch.float32),
                    "running_v": (running, torch.float32),
                    "lengths": ((3,), torch.int32),
                    "scale_k": (states[:3], torch.float32) if fp8 else None,
                    "scale_v": (states[:3], torch.float32) if fp8 else None,
                    "page_table": ((3, columns), torch.int32) if columns else None,
                    "error": ((4,), torch.int32),
                }
                assert (cache.ring, cache.draft_tokens, cache.fp8) == (draft + 1, draft, fp8)
                assert cache.plain == (not fp8 and not draft and not columns)
                assert cache.rows == (columns * rows if columns else 4) and cache.capacity == 4 * cache.rows + 3
                assert cache.free_pages == (blocks if columns else 0) and cache.length_bound == 0
                present = [x for x in shapes(cache.read([])).items() if x[0] != "page_table"]
                assert [name for name, x in present if x is None] == ([] if fp8 else ["scale_k", "scale_v"])


@pytest.mark.parametrize("fp8", [False, True])
def test_reserve_keeps_what_is_there(device, fp8):
    """More rows and nothing else: the states, their scales, the running ones, lengths and bounds."""
    cache = pool(9, device=device, fp8=fp8) if device.type == "cpu" else empty(device=device, fp8=fp8)
    for max_length, rows in ((0, 4), (23, 5), (20, 5), (24, 6), (40, 10)):
        more = cache.reserve(max_length)
        assert more.rows == max(rows, 4) and (more is cache) == (max_length // 4 <= 4)
        assert more.running_k is cache.running_k and more.running_v is cache.running_v and more.lengths is cache.lengths
        assert more.length_bound == cache.length_bound and more.fp8 == fp8
        for name in ("chunk_k", "chunk_v", *(("scale_k", "scale_v") if fp8 else ())):
            new, old = getattr(more, name), getattr(cache, name)
            assert torch.equal(new[:, :, :4].view(torch.uint8), old.view(torch.uint8)), name
            assert new.shape == (*old.shape[:2], more.rows, *old.shape[3:]) and new.dtype == old.dtype
