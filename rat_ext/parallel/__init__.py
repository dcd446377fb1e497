"""More than one GPU: context parallelism, sharding rules, checkpoint policies. docs/scale.md says which for what."""

from . import sharding  # noqa: F401  (registers the rules)
from .checkpoint import save_attention
from .context import ContextParallel, use_context_parallel
from .dense import attention
from .heads import SplitParts, full_state_dict, parallelize_plan, share_copies

__all__ = [
    "ContextParallel",
    "SplitParts",
    "attention",
    "full_state_dict",
    "parallelize_plan",
    "save_attention",
    "share_copies",
    "use_context_parallel",
]
