"""Rotary tables. RAT rotates by chunk index, so a table has one row a chunk, not one a token."""

from __future__ import annotations

import torch
from torch import Tensor


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
        head_dim: D, even. Frequency i is ``base ** (-2 i / D)`` radians a chunk.
        base: the base of the geometric progression of frequencies.
        device: where the tables live.
        dtype: float32, or float64 for ops in float64.

    Returns:
        ``(cos, sin)``, each ``(num_chunks, head_dim // 2)``.
    """
    if head_dim % 2:
        raise ValueError(f"rotary_tables: head_dim: expected an even number, got {head_dim}")
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    angle = torch.arange(num_chunks, device=device, dtype=torch.float64)[:, None] * base**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half: ``(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`` with x1, x2 the halves of the last dimension.

    ``cos`` and ``sin`` broadcast against the halves and are cast to the dtype of ``x``.
    """
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
