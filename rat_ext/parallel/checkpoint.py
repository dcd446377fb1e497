"""What activation checkpoints keep of an operator, by its name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Their results are 1 / L of keys and values, y and a number per token and head; to compute them again is most of a forward.
SAVED = tuple(
    getattr(torch.ops.rat_ext, name).default for name in ("rat_attention", "rat_attention_packed", "chunk_recurrence")
)


_local = threading.local()


@contextlib.contextmanager
def passing() -> Iterator[None]:
    """What operators give in here is not kept: it is as large as all tokens, and only states of it go on."""
    before = getattr(_local, "passing", False)
    _local.passing = True
    try:
        yield
    finally:
        _local.passing = before


def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps what the operators give, and computes everything else again: projections, norms, feed-forwards."""
    kept = op in SAVED and not getattr(_local, "passing", False)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def save_attention() -> tuple[Any, Any]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`` with this policy.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> from rat_ext.layers import RATLayer
        >>> layer, x = RATLayer(64, 4, 2, 8), torch.randn(1, 20, 64, requires_grad=True)
        >>> y = checkpoint(layer, x, use_reentrant=False, context_fn=save_attention)
    """
    return create_selective_checkpoint_contexts(policy)
