"""One small case of every kernel, for compute-sanitizer. Not collected by pytest.

    compute-sanitizer --tool memcheck python tests/sanitize.py
    compute-sanitizer --tool synccheck python tests/sanitize.py
    compute-sanitizer --tool racecheck python tests/sanitize.py
    RAT_EXT_KERNELS=sm80 compute-sanitizer ... runs the portable family where another one would be chosen

Every allocation is its own (no caching allocator), so that an access past its end is seen. Results must be finite; that
they are right is the matter of the other tests.
"""

import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch

import rat_ext
from rat_ext.testing import Random, attention_case, evaluate, make_state, recurrence_case

DEVICE = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PADDED_HEAD_SIZES = (24, 64, 96, 128, 192, 256)
# Chunk states of 16 tokens, enough for the kernels that serve many; and heads to fill more than a few blocks.
MANY = {"heads": 16, "groups": 2}


def cases():
    for dtype in DTYPES:
        small = {"batch": 1, "heads": 2, "groups": 1}
        for dim in PADDED_HEAD_SIZES:
            yield attention_case(DEVICE, dtype, tokens=45, dim=dim, chunk_size=4, **small)
            yield recurrence_case(DEVICE, dtype, tokens=45, dim=dim, chunk_size=4, **small)
        bare = {"gate_bias": False, "out_gate": False, "rotary": False}
        yield attention_case(DEVICE, dtype, tokens=33, chunk_size=1, dim=40, layout="odd", **bare, **small)
        yield attention_case(DEVICE, dtype, tokens=150, chunk_size=2, dim=64, batch=2, heads=4, groups=2)
        yield attention_case(DEVICE, dtype, batch=2, tokens=30, lengths=[5, 37], return_state=True, dim=64)
        yield attention_case(DEVICE, dtype, sequences=[10, 0, 35, 1], dim=64)
        yield attention_case(DEVICE, dtype, sequences=[10, 0, 35, 1], lengths=[3, 16, 0, 31], return_state=True, dim=64)
        yield attention_case(DEVICE, dtype, op="chunk_attention", tokens=45, chunk_size=4, dim=64, **small)
        yield attention_case(DEVICE, dtype, tokens=600, chunk_size=2**40, dim=64, **small)
        for chunk_size in (33, 100, 150):  # walked alone both ways, in segments backward, in segments both ways
            yield attention_case(DEVICE, dtype, tokens=330, chunk_size=chunk_size, dim=64, **small)
            yield recurrence_case(DEVICE, dtype, tokens=330, chunk_size=chunk_size, dim=64, layout="odd", **small)
        if dtype != torch.float32:
            for dim in (64, 128):
                yield attention_case(DEVICE, dtype, batch=1, tokens=4200, dim=dim, **MANY)
                yield attention_case(DEVICE, dtype, sequences=[2100, 0, 16, 1, 2083], dim=dim, **MANY)
        yield recurrence_case(DEVICE, dtype, tokens=3000, chunk_size=2**40, dim=16, **small)
        yield recurrence_case(DEVICE, dtype, sequences=[10, 0, 35], lengths=[3, 16, 0], return_state=True, dim=64)


def decode(dtype, dim, lengths, rows, slots):
    random = Random(0, DEVICE, dtype)
    cache = make_state(random, lengths, 4, dim, 4, rows=rows)
    batch = len(slots)
    q, k = (random.normal(batch, 2, dim) for _ in range(2))
    v, gate, out_gate = (random.normal(batch, 4, dim) for _ in range(3))
    cos, sin = rat_ext.rotary_tables(rows + 1, dim, device=DEVICE)
    tables = {"rotary_cos": cos, "rotary_sin": sin}
    for _ in range(2):
        slot = torch.tensor(slots, device=DEVICE)
        y = rat_ext.rat_decode_step(q, k, v, gate, cache, out_gate=out_gate, slots=slot, **tables)
    return y


def main():
    count = 0
    for case in cases():
        values, _ = evaluate(getattr(rat_ext, case.op), case)
        for key, x in values.items():
            # States that no token wrote are passed on: those of an empty sequence at a reset are NaN.
            if not any(word in key for word in ("initial", "running", "final")):
                assert x.isfinite().all(), (case.op, case.dtype, key)
        count += 1
    for dtype in DTYPES:
        for dim in PADDED_HEAD_SIZES:
            assert decode(dtype, dim, [0, 3, 7], 4, [2, -1, 0]).isfinite().all()
            count += 1
        assert decode(dtype, 64, [2000, 5], 502, [0, 1]).isfinite().all()
        count += 1
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"{count} cases ran on {DEVICE}")


if __name__ == "__main__":
    main()
