"""One small case of every kernel, for compute-sanitizer. Not collected by pytest.

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool synccheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py
    RAT_EXT_KERNELS=sm80 compute-sanitizer ... runs the portable family where another one would be chosen

    python tests/sanitize.py --list                                     # the names of the cases
    compute-sanitizer --kernel-name kns=chunk_attention_fwd_sm90 \
        python tests/sanitize.py --only '^rat_attention bfloat16 .*tokens=4200 .*dim=128'   # one kernel in one case

Every allocation is its own (no caching allocator), so that an access past its end is seen. Results must be finite; that
they are right is the matter of the other tests.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for a build in place, not installed

import torch

import rat_ext
from rat_ext.testing import Random, attention_case, cu_seqlens_of, evaluate, make_state, name, recurrence_case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PADDED_HEAD_SIZES = (24, 64, 96, 128, 192, 256)
# Chunk states of 16 tokens, enough for the kernels that serve many; and heads to fill more than a few blocks.
MANY = {"heads": 16, "groups": 2}

Case = tuple[str, Callable[[torch.device], None]]  # what --only matches, and what runs it


def title(op: str, dtype: torch.dtype, arguments: dict[str, Any]) -> str:
    words = [f"{key}={value}".replace(" ", "") for key, value in arguments.items() if key != "op"]
    return " ".join([op, str(name(dtype)), *words])


def differentiable(make: Callable, op: str, dtype: torch.dtype, arguments: dict[str, Any]) -> Case:
    def run(device: torch.device) -> None:
        values, _ = evaluate(getattr(rat_ext, op), make(device, dtype, **arguments))
        for key, x in values.items():
            # States that no token wrote are passed on: those of an empty sequence at a reset are NaN.
            if not any(word in key for word in ("initial", "running", "final")):
                assert x.isfinite().all(), key

    return title(op, dtype, arguments), run


def attention(dtype: torch.dtype, **arguments: Any) -> Case:
    return differentiable(attention_case, arguments.get("op", "rat_attention"), dtype, arguments)


def not_finite(dtype: torch.dtype, **arguments: Any) -> Case:
    """A value that is not finite, which some tokens of a tile see and others do not."""

    def run(device: torch.device) -> None:
        case = attention_case(device, dtype, **arguments)
        case.tensors["v"].data[:, 50] = float("inf")
        with torch.no_grad():
            y = rat_ext.rat_attention(**case.tensors, chunk_size=case.chunk_size, **case.options)
        assert y[:, :50].isfinite().all() and not y[:, 60:].isfinite().any()

    return title("not_finite", dtype, arguments), run


def narrow(dtype: torch.dtype, **arguments: Any) -> Case:
    """Rows at multiples of 8 bytes, which a forward without a gradient reads where they are. The last one ends its memory."""

    def run(device: torch.device) -> None:
        case = attention_case(device, dtype, **arguments)
        for key, x in case.tensors.items():
            if x.dim() == 4:
                batch, tokens, heads, dim = x.shape
                flat = x.new_zeros(batch * tokens * (heads * dim + 4))
                case.tensors[key] = flat.view(batch, tokens, -1)[:, :, 4:].unflatten(2, (heads, dim))
                case.tensors[key].copy_(x)
        with torch.no_grad():
            y = rat_ext.rat_attention(**case.tensors, chunk_size=case.chunk_size, **case.options)
        assert y.isfinite().all()

    return title("narrow_rows", dtype, arguments), run


def recurrence(dtype: torch.dtype, **arguments: Any) -> Case:
    return differentiable(recurrence_case, "chunk_recurrence", dtype, arguments)


def decode(dtype: torch.dtype, dim: int, lengths: list[int], rows: int, slots: list[int]) -> Case:
    def run(device: torch.device) -> None:
        random = Random(0, device, dtype)
        cache = make_state(random, lengths, 4, dim, 4, rows=rows)
        batch = len(slots)
        q, k = (random.normal(batch, 2, dim) for _ in range(2))
        v, gate, out_gate = (random.normal(batch, 4, dim) for _ in range(3))
        cos, sin = rat_ext.rotary_tables(rows + 1, dim, device=device)
        tables = {"rotary_cos": cos, "rotary_sin": sin}
        slot = torch.tensor(slots, device=device)
        for _ in range(2):
            y = rat_ext.rat_decode_step(q, k, v, gate, cache, out_gate=out_gate, slots=slot, **tables)
        assert y.isfinite().all()

    shown = {"lengths": lengths, "slots": slots} if len(slots) < 10 else {"batch": len(slots)}
    return title("rat_decode_step", dtype, {"dim": dim, **shown}), run


def cached(
    dtype: torch.dtype,
    dim: int,
    counts: list[int],
    slots: list[int],
    lengths: list[int],
    rows: int = 40,
    chunk_size: int = 4,
    page_rows: int = 0,
    fp8: bool = False,
    heads: int = 4,
) -> Case:
    """Rows of a pool: two calls of packed ``counts`` on sequences that hold ``lengths`` tokens. Slot 9 is an error: skipped."""
    arguments = {key: x for key, x in locals().items() if key != "dtype"}

    def run(device: torch.device) -> None:
        random, count = Random(0, device, dtype), len(lengths)
        blocks = (count * rows // page_rows, heads, page_rows, dim) if page_rows else (count, heads, rows, dim)
        states = [random.normal(*blocks, dtype=torch.float32).to(torch.float8_e4m3fn if fp8 else dtype) for _ in "kv"]
        scales = [torch.ones(blocks[:3], device=device) if fp8 else None for _ in "kv"]
        running = [random.normal(count, 2, heads, dim, dtype=torch.float32) for _ in "kv"]
        table = torch.arange(blocks[0], dtype=torch.int32, device=device).flip(0).view(count, -1) if page_rows else None
        error, held = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0] * 4, lengths))
        cu, slot = cu_seqlens_of(counts, device), torch.tensor(slots, device=device)
        if device.type == "cpu":
            slot[slot == 9] = -1
        q, k = (random.normal(1, sum(counts), heads // 2, dim) for _ in "qk")
        v, gate, out_gate = (random.normal(1, sum(counts), heads, dim) for _ in range(3))
        tables = rat_ext.rotary_tables(rows + 1, dim, device=device)
        inputs = (q, k, v, gate, None, out_gate, *tables, cu, slot, table, *states, *scales, *running, held, error)
        for _ in range(2):
            y = torch.ops.rat_ext.rat_attention_cached.default(*inputs, chunk_size, dim**-0.5)
        assert y.isfinite().all()

    return title("rat_attention_cached", dtype, arguments), run


def decode_pool(dtype: torch.dtype, dim: int, lengths: list[int], tokens: int, ring: int, page_rows: int, fp8: bool) -> Case:
    def run(device: torch.device) -> None:
        random = Random(0, device, dtype)
        batch, rows = len(lengths), (max(lengths) + tokens) // 4
        columns = -(-rows // page_rows)
        shape = (batch * columns, 4, page_rows, dim)
        chunk_k, chunk_v = (random.normal(*shape) for _ in range(2))
        scale_k = scale_v = None
        if fp8:
            chunk_k, chunk_v = chunk_k.to(torch.float8_e4m3fn), chunk_v.to(torch.float8_e4m3fn)
            scale_k, scale_v = (torch.ones(shape[:3], device=device) for _ in range(2))
        table = torch.arange(batch * columns, dtype=torch.int32, device=device).flip(0).reshape(batch, columns).contiguous()
        running_k, running_v = (random.normal(batch, ring, 4, dim, dtype=torch.float32) for _ in range(2))
        held = torch.tensor(lengths, dtype=torch.int32, device=device)
        error = torch.zeros(4, dtype=torch.int32, device=device)
        size = torch.ops.rat_ext.decode_workspace.default(batch, 4, columns * page_rows, dim)
        workspace = torch.zeros(size, dtype=torch.uint8, device=device)
        q, k = (random.normal(batch, tokens, 2, dim) for _ in range(2))
        v, gate, out_gate = (random.normal(batch, tokens, 4, dim) for _ in range(3))
        cos, sin = rat_ext.rotary_tables(rows + 1, dim, device=device)
        y = torch.ops.rat_ext.rat_decode_step.default(
            q, k, v, gate, None, out_gate, cos, sin, None, table, chunk_k, chunk_v, scale_k, scale_v, running_k, running_v,
            held, error, workspace, 4, dim**-0.5,
        )  # fmt: skip
        assert y.isfinite().all() and not error.any()

    arguments = {"dim": dim, "lengths": lengths, "tokens": tokens, "ring": ring, "page_rows": page_rows, "fp8": fp8}
    return title("rat_decode_pool", dtype, arguments), run


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        small = {"batch": 1, "heads": 2, "groups": 1}
        for dim in PADDED_HEAD_SIZES:
            yield attention(dtype, tokens=45, dim=dim, chunk_size=4, **small)
            yield recurrence(dtype, tokens=45, dim=dim, chunk_size=4, **small)
        bare = {"gate_bias": False, "out_gate": False, "rotary": False}
        yield attention(dtype, tokens=33, chunk_size=1, dim=40, layout="odd", **bare, **small)
        yield attention(dtype, tokens=150, chunk_size=2, dim=64, batch=2, heads=4, groups=2)
        yield attention(dtype, batch=2, tokens=30, lengths=[5, 37], return_state=True, dim=64)
        yield attention(dtype, sequences=[10, 0, 35, 1], dim=64)
        yield attention(dtype, sequences=[10, 0, 35, 1], lengths=[3, 16, 0, 31], return_state=True, dim=64)
        yield attention(dtype, op="chunk_attention", tokens=45, chunk_size=4, dim=64, **small)
        yield attention(dtype, tokens=600, chunk_size=2**40, dim=64, **small)
        for chunk_size in (33, 100, 150):  # walked alone both ways, in segments backward, in segments both ways
            yield attention(dtype, tokens=330, chunk_size=chunk_size, dim=64, **small)
            yield recurrence(dtype, tokens=330, chunk_size=chunk_size, dim=64, layout="odd", **small)
        if dtype != torch.float32:
            for dim in (64, 128):
                yield attention(dtype, batch=1, tokens=4200, dim=dim, **MANY)
                yield attention(dtype, sequences=[2100, 0, 16, 1, 2083], dim=dim, **MANY)
            for dim in (136, 256):
                yield attention(dtype, batch=1, tokens=421, heads=2, groups=1, chunk_size=2, dim=dim)
                yield attention(dtype, sequences=[301, 0, 5, 130], heads=2, groups=1, chunk_size=2, dim=dim)
            for dim in (40, 64, 128, 192):  # recurrences of many tokens: those of few read aligned rows alone
                yield narrow(dtype, tokens=330, chunk_size=20, dim=dim, **MANY)
                yield narrow(dtype, sequences=[100, 0, 35, 1], chunk_size=20, dim=dim)
        yield recurrence(dtype, tokens=3000, chunk_size=2**40, dim=16, **small)
        yield recurrence(dtype, sequences=[10, 0, 35], lengths=[3, 16, 0], return_state=True, dim=64)
        for dim in PADDED_HEAD_SIZES:
            yield decode(dtype, dim, [0, 3, 7], 4, [2, -1, 0])
            for fp8 in (False, True):
                for tokens in (1, 4):
                    yield decode_pool(dtype, dim, [0, 3, 1022], tokens, 5, 16, fp8)
        if dtype != torch.float32:
            for dim in (64, 128):  # drafts of more pairs than multiprocessors, by a block each and by several
                yield decode_pool(dtype, dim, [0, 3, 1022, 1100] * 10, 4, 5, 16, False)
                yield decode_pool(dtype, dim, [5, 3000] * 10, 4, 5, 16, False)
        yield decode(dtype, 64, [2000, 5], 502, [0, 1])
        yield decode(dtype, 8, [3] * 150, 4, [*range(149, 0, -1), -1])  # more rows than a warp knows
        mixed = {"counts": [1, 30, 0, 7, 3, 2], "slots": [3, 0, 1, -1, 9, 2], "lengths": [3, 16, 0, 31]}
        for dim in PADDED_HEAD_SIZES:
            yield cached(dtype, dim, **mixed)
            yield cached(dtype, dim, **mixed, page_rows=8)
        yield cached(dtype, 64, **mixed, fp8=True)
        yield cached(dtype, 128, **mixed, fp8=True, page_rows=8)
        yield cached(dtype, 64, [170, 40], [1, 0], [20, 131], rows=4, chunk_size=150)
        if dtype != torch.float32:
            for dim in (64, 128):  # blocks for few keys and for many, tiles that warpgroups share and tiles of several
                yield cached(dtype, dim, [70, 300], [1, 0], [4080, 1000], rows=4800, chunk_size=1, page_rows=16)
                yield cached(dtype, dim, [1100, 1000], [1, 0], [4080, 1000], rows=6400, chunk_size=1, heads=16)
                # More tiles than multiprocessors, each of few queries.
                yield cached(dtype, dim, [30] * 9, [1, 0, *[-1] * 7], [4080, 1000], rows=4800, chunk_size=1, heads=16)
        unseen = {"chunk_size": 4, "dim": 64, "tokens": 90, "batch": 1, "heads": 2, "groups": 1}
        yield not_finite(dtype, **unseen)
        yield decode_pool(dtype, 64, [5], 10, 1, 4, False)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("device", nargs="?", default="cuda")
    p.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    p.add_argument("--list", action="store_true", help="print the names of the cases and run none")
    options = p.parse_args(arguments)
    chosen = [case for case in cases() if re.search(options.only, case[0])]
    if not chosen:
        p.error(f"--only: no case matches {options.only!r}; --list names them")
    if options.list:
        print("\n".join(name for name, _ in chosen))
        return
    device = torch.device(options.device)
    for case, run in chosen:
        try:
            run(device)
        except Exception:
            print(f"in {case}", file=sys.stderr)
            raise
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(chosen)} cases ran on {device}")


if __name__ == "__main__":
    main()
