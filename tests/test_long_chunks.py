"""Chunks longer than a tile or a segment of any kernel, with gates open enough that a state reaches across them.

With gates as open as those of the other tests half a state is gone after a token, and what one segment hands to the next is
lost in the rounding. Here a state keeps 95 % or 99.8 % of itself from token to token.
"""

import pytest
import torch

from rat_ext.testing import DTYPES, attention_case, check, name, recurrence_case

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)
# The tile of the CPU is 64 tokens; segments on a GPU are 64 tokens, where L is over 128 forward and over 64 backward.
_of_gpus = [pytest.param(size, marks=pytest.mark.gpu) for size in (129, 130)]
sizes = pytest.mark.parametrize("chunk_size", [65, 100, 128, *_of_gpus, 200, 2**40])
gates = pytest.mark.parametrize("mean", [3.0, 6.0])


@dtypes
@sizes
@gates
def test_recurrence(device, dtype, chunk_size, mean):
    check(recurrence_case(device, dtype, tokens=300, chunk_size=chunk_size, gate_mean=mean, gate_bias=False))


@dtypes
@sizes
@gates
def test_attention(device, dtype, chunk_size, mean):
    """Keys are small where gates are open: a large scale lets the scores, and with them the rotation, matter."""
    scale = 8.0 if mean > 5 else 1.0
    sizes = {"tokens": 300, "chunk_size": chunk_size, "gate_mean": mean, "scale": scale}
    check(attention_case(device, dtype, **sizes, gate_bias=False))


@dtypes
def test_one_token_past_the_first_chunk(device, dtype):
    check(attention_case(device, dtype, tokens=131, chunk_size=130, gate_mean=3.0, scale=1.0))


@dtypes
@pytest.mark.parametrize("chunk_size", [100, 130])
def test_carried(device, dtype, chunk_size):
    """States that enter and leave inside a chunk, at its ends, and where a segment ends."""
    lengths = [0, 64, chunk_size - 1, chunk_size, 2 * chunk_size + 65]
    options = {"batch": 5, "tokens": 270, "heads": 2, "groups": 1, "lengths": lengths, "gate_mean": 4.0}
    check(attention_case(device, dtype, chunk_size=chunk_size, scale=2.0, return_state=True, **options))
    check(recurrence_case(device, dtype, chunk_size=chunk_size, return_state=True, **options))


@dtypes
@pytest.mark.parametrize("chunk_size", [100, 130])
@pytest.mark.parametrize("lengths", [None, [70, 0, 129, 3, 200, 0]], ids=["fresh", "carried"])
def test_packed(device, dtype, chunk_size, lengths):
    options = {"sequences": [300, 0, 129, 1, 65, 130], "lengths": lengths, "heads": 2, "groups": 1, "gate_mean": 4.0}
    check(attention_case(device, dtype, chunk_size=chunk_size, scale=2.0, return_state=lengths is not None, **options))
    check(recurrence_case(device, dtype, chunk_size=chunk_size, return_state=True, **options))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
@pytest.mark.parametrize("layout", ["odd", "projection", "expanded_tokens"])
@pytest.mark.parametrize("dim", [40, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (128, 256))])
def test_strides(device, dtype, layout, dim):
    """On a CPU a wider head is more of the same; test_pinned.py has wide ones in long chunks of any layout."""
    options = {"layout": layout, "dim": dim, "tokens": 200, "chunk_size": 150, "gate_mean": 4.0}
    check(attention_case(device, dtype, scale=1.0, **options))
    check(recurrence_case(device, dtype, **options))
