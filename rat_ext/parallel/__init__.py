"""More than one GPU: context parallelism, sharding rules, checkpoint policies. docs/scale.md says which for what."""

from . import sharding  # noqa: F401  (registers the rules)
from .context import ContextParallel, use_context_parallel

__all__ = ["ContextParallel", "use_context_parallel"]
