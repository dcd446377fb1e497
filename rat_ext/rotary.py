"""Rotary tables. RAT rotates by chunk index, so a table has one row per chunk, not one per token."""

from __future__ import annotations

import math
import reprlib

import torch
from torch import Tensor

from .cache import _device


def rotary_tables(
    num_chunks: int,
    head_dim: int,
    *,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of RoPE (Su et al., arXiv 2104.09864) for chunk indices 0 ... num_chunks - 1.

    Args:
        num_chunks: rows of the tables; a sequence of T tokens in chunks of L needs ceil(T / L).
        head_dim: D, even. Frequency i is ``base ** (-2 i / D)`` radians per chunk.
        base: the base of the geometric progression of frequencies.
        device: where the tables live.
        dtype: float32, or float64 for ops in float64.

    Returns:
        ``(cos, sin)``, each ``(num_chunks, head_dim // 2)``.
    """
    for name, value in (("num_chunks", num_chunks), ("head_dim", head_dim)):
        if isinstance(value, bool) or not (isinstance(value, (int, torch.SymInt)) or _counts(value)):
            raise ValueError(f"rotary_tables: {name}: expected an int, got {_shown(value)}")
    if num_chunks < 0:
        raise ValueError(f"rotary_tables: num_chunks: expected at least 0, got {num_chunks}")
    if head_dim % 2 or head_dim < 0:
        raise ValueError(f"rotary_tables: head_dim: expected an even number, got {head_dim}")
    if not isinstance(base, (int, float)) and not isinstance(base, (str, Tensor)) and hasattr(base, "__float__"):
        base = float(base)  # NumPy's
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not 0 < base < math.inf:
        raise ValueError(f"rotary_tables: base: expected a finite number above 0, got {_shown(base)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"rotary_tables: dtype: expected a floating one, got {_shown(dtype).removeprefix('torch.')}")
    if isinstance(device, (str, int, float)):
        device = _device("rotary_tables", device)
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    angle = torch.arange(num_chunks, device=device, dtype=torch.float64)[:, None] * base**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _counts(x: object) -> bool:
    """NumPy's ints. (A tracer knows no attributes of its numbers.)"""
    return not isinstance(x, Tensor) and hasattr(x, "__index__")


def _shown(x: object) -> str:
    return reprlib.repr(x).replace("\n", " ")


_tables: dict[tuple, tuple[Tensor, Tensor]] = {}


def layer_tables(
    num_chunks: int, head_dim: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`rotary_tables` of at least ``num_chunks`` rows, made once for all layers that need the same.

    No module holds them: nothing casts, shards, broadcasts or averages them with its weights. Rows are a power of two, and a
    table is never freed: no other stream and no CUDA graph reads memory that was given to something else, and all tables of
    one kind together have at most twice the rows of the longest. A CUDA graph reads those that were there before its capture.
    """
    if (
        torch.compiler.is_compiling()  # the graph computes them: a global would be a guard, and grow
        or torch._C._len_torch_dispatch_stack()  # fake tensors, or a tracer's
        or torch._C._are_functorch_transforms_active()
        or device.type == "meta"
    ):
        return rotary_tables(num_chunks, head_dim, base=base, device=device, dtype=dtype)
    rows = max(128, 1 << (num_chunks - 1).bit_length())
    key = (rows, head_dim, base, device, dtype)
    tables = _tables.get(key)
    if tables is None and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # In the graph's memory, filled anew by each replay, in a dozen kernels: nothing can be copied from the host now.
        return rotary_tables(num_chunks, head_dim, base=base, device=device, dtype=dtype)
    if tables is None:
        with torch.inference_mode(False):  # made while sampling, they serve training later
            # From the host by a copy that waits: whatever stream uses them first, they are there.
            cos, sin = rotary_tables(rows, head_dim, base=base, device="cpu", dtype=dtype)
            tables = _tables.setdefault(key, (cos.to(device), sin.to(device)))
    return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half: ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`` with x1, x2 the halves of the last dimension.

    ``cos`` and ``sin`` broadcast against the halves and are cast to the dtype of ``x``.
    """
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
