"""Chunk attention over more chunk states than a tile of any kernel holds, every gradient against float64.

Counts of chunk states stand around multiples of 64 and 128, the tiles of keys and queries. On a GPU there are heads enough
that the kernels for many of them run; test_gpu.py says which those are.
"""

import pytest
import torch

from rat_ext.testing import attention_case, check, name

low = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name)
# A kernel of a GPU is of one head size. A CPU goes through its columns in a loop, test_many_chunks_options.test_head_size.
dims = pytest.mark.parametrize("dim", [64, pytest.param(128, marks=pytest.mark.gpu)])
COUNTS = [1, 63, 64, 65, 127, 128, 129, 257]


def many(device, dtype, **options):
    """A case of 140 chunk states, more heads on a GPU, and what ``options`` say."""
    heads = {"heads": 8, "groups": 2} if device.type == "cuda" else {"heads": 2, "groups": 1}
    return attention_case(device, dtype, **{"batch": 1, "tokens": 281, "chunk_size": 2, **heads, **options})


@low
@dims
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 16, 64])
def test_chunk_states(device, dtype, dim, count, chunk_size):
    """Closed chunks and a token that sees them all, or half a chunk of such."""
    if device.type == "cpu" and count * chunk_size > 3000:
        pytest.skip("the definition takes seconds on a CPU")
    check(many(device, dtype, tokens=count * chunk_size + max(1, chunk_size // 2), dim=dim, chunk_size=chunk_size))


@low
@dims
@pytest.mark.parametrize("count", COUNTS)
def test_chunk_states_that_all_see(device, dtype, dim, count):
    """Every query sees every state, so that each matters as much, the last of a tile too: its gradient is asked for."""
    check(many(device, dtype, batch=2, tokens=65, dim=dim, chunk_size=4096, lengths=[4096 * count, 4096 * (count - 1)]))


@low
@pytest.mark.parametrize(("dim", "count"), [(64, 1023), (64, 1030), (64, 2100), (128, 1100), (128, 4095), (128, 4100)])
def test_thousands_of_chunk_states(device, dtype, dim, count):
    """More states than the kernels for short sequences of keys serve: 1,024 of 64 elements, 4,096 of 128."""
    check(many(device, dtype, batch=1, tokens=130, dim=dim, chunk_size=48, lengths=[48 * count + 5]))


@low
@dims
@pytest.mark.gpu
def test_as_many_tokens_as_chunk_states(device, dtype, dim):
    """The diagonal of thousands of states, L = 1."""
    check(many(device, dtype, batch=1, tokens=4500, dim=dim, chunk_size=1, heads=2, groups=1))


@low
@dims
@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 128, 129, 257])
def test_tokens_of_two_sequences(device, dtype, dim, tokens):
    """As many tokens as chunks: the last tile of queries of one sequence ends where the other begins."""
    check(many(device, dtype, batch=2, tokens=tokens, dim=dim, chunk_size=1))
