"""More than one GPU: context parallelism, sharding rules, checkpoint policies. docs/scale.md says which for what."""

from . import sharding  # noqa: F401  (registers the rules)
from .checkpoint import save_attention
from .context import ContextParallel, use_context_parallel
from .dense import attention

__all__ = ["ContextParallel", "attention", "save_attention", "use_context_parallel"]
