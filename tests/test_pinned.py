"""Calls that combine many options at once, drawn every time: random search comes upon them by luck alone.

The table is fixed: it does not change with what else is collected. Each row goes through the three ops; what an op does not
take is left out.
"""

import random

import pytest
import torch

from rat_ext.testing import LAYOUTS, attention_case, check, recurrence_case

COUNT = 72


def draw(number: int) -> dict:
    """Row ``number`` of the table: keyword arguments of attention_case."""
    r = random.Random(number)
    groups = r.choice((1, 1, 2, 3))
    options = {
        "groups": groups,
        "heads": groups * r.choice((1, 2, 3, 5)),
        "dim": (8, 16, 24, 32, 40, 56, 64, 72, 88, 96, 104, 128, 136, 160, 192, 200, 248, 256)[number % 18],
        "chunk_size": r.choice((1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200, 2**31, 2**40)),
        "gate_mean": r.choice((0.0, 2.0, 4.0, -4.0)),
        "gate_size": r.choice((0.5, 1.5, 4.0)),
        "gate_bias": r.random() < 0.5,
        "layout": r.choice(LAYOUTS),
        "dy_layout": r.choice([name for name in LAYOUTS if name != "projection"]),
        "return_state": r.random() < 0.5,
        "out_gate": r.random() < 0.6,
        "rotary": r.random() < 0.7,
        "scale": r.choice((None, None, 0.7, -0.4)),
        "seed": number,
    }
    some = (0, 1, 2, 7, 15, 16, 17, 40, 63, 64, 65, 90, 150)
    if r.random() < 0.5:
        options["sequences"] = [r.choice(some) for _ in range(r.randint(1, 6))]
        count = len(options["sequences"])
    else:
        options |= {"batch": r.randint(1, 3), "tokens": r.choice(some[1:] + (230, 290))}
        count = options["batch"]
    if r.random() < 0.5:
        options["lengths"] = [r.choice(some) for _ in range(count)]
    return options


def dtype_of(number: int, device) -> torch.dtype:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return dtypes[number // 18 % (3 if device.type == "cuda" else 4)]


@pytest.mark.parametrize("number", range(COUNT))
def test_rat_attention(device, number):
    check(attention_case(device, dtype_of(number, device), **draw(number)))


@pytest.mark.parametrize("number", range(COUNT))
def test_chunk_attention(device, number):
    check(attention_case(device, dtype_of(number, device), op="chunk_attention", **draw(number)))


@pytest.mark.parametrize("number", range(COUNT))
def test_chunk_recurrence(device, number):
    options = {key: x for key, x in draw(number).items() if key not in ("out_gate", "rotary", "scale")}
    check(recurrence_case(device, dtype_of(number, device), **options))
