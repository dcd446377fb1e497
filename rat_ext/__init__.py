"""rat_ext: RAT (arXiv 2507.04416) as a compiled PyTorch extension. See the README."""

import sys

try:
    from . import _flops  # noqa: F401  (registers the formulas)
    from ._build_info import __version__, build_info
    from .cache import RATCache
    from .ops import chunk_attention, chunk_recurrence, explain, rat_attention, rat_attention_packed, rat_decode_step
    from .rotary import rotary_tables
except Exception:
    # `python -m rat_ext` imports this first, and then says in one line what is wrong; its doctor reports it.
    if not (sys.argv[:1] == ["-m"] and "rat_ext" in sys.orig_argv):
        raise

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
