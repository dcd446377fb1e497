"""RAT_EXT_LOG=1: one line on stderr for each call of an operator. Read when rat_ext is imported; it costs nothing when off.

    rat_ext: rat_attention q=(2, 100, 2, 32)/(6400, 64, 32, 1) ... float32 cpu attention_fwd=avx2 0.312 ms

Tensors are shown as shape/strides. The time is that of the call from start to end: on a GPU the log waits for it, except while
a CUDA graph is captured. Calls of compiled functions are not shown.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._arguments import Operator

ENABLED = os.environ.get("RAT_EXT_LOG", "").lower() not in ("", "0", "false", "no", "off")


def choices(name: str, args: tuple) -> list[dict[str, Any]]:
    """Which kernel families serve a call of an operator, and why others do not."""
    rows = [line.split("\t") for line in getattr(torch.ops.rat_ext_explain, name).default(*args).splitlines()]
    return [{"phase": phase, "family": family, "chosen": chosen == "1", "why": why} for phase, family, chosen, why in rows]


def _line(spec: Operator, args: tuple, seconds: float | None) -> str:
    lead = args[spec.arguments.index(spec.lead)]
    words = [f"rat_ext: {spec.name}"]
    for name, x in zip(spec.arguments, args, strict=True):
        if isinstance(x, Tensor):
            words.append(f"{name}={tuple(x.shape)}/{x.stride()}")
        elif x is not None:
            words.append(f"{name}={x}")
    words += [str(lead.dtype).removeprefix("torch."), str(lead.device)]
    backward = spec.name.endswith("_backward")
    for row in choices(spec.name, args):
        if row["chosen"] and row["phase"].endswith("_bwd") == backward:
            words.append(f"{row['phase']}={row['family']}")
    words.append("captured" if seconds is None else f"{seconds * 1e3:.3f} ms")
    return " ".join(words)


def logged(spec: Operator) -> Callable:
    """The operator, which also tells of its calls where the log is on."""
    kernel = spec.overload
    if not ENABLED:
        return kernel

    def call(*args: Any) -> Any:
        on_gpu = args[spec.arguments.index(spec.lead)].is_cuda
        timed = not (on_gpu and torch.cuda.is_current_stream_capturing())
        if on_gpu and timed:
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = kernel(*args)
        if on_gpu and timed:
            torch.cuda.synchronize()
        print(_line(spec, args, time.perf_counter() - start if timed else None), file=sys.stderr)
        return result

    return call
