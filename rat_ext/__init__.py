"""rat_ext: RAT (arXiv 2507.04416) as a compiled PyTorch extension. See the README."""

from ._build_info import __version__, build_info
from .cache import RATCache
from .ops import chunk_attention, chunk_recurrence, explain, rat_attention, rat_attention_packed, rat_decode_step
from .rotary import rotary_tables

__all__ = [
    "RATCache",
    "__version__",
    "build_info",
    "chunk_attention",
    "chunk_recurrence",
    "explain",
    "rat_attention",
    "rat_attention_packed",
    "rat_decode_step",
    "rotary_tables",
]
