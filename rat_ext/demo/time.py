"""Part ``time`` of ``python -m rat_ext``: the ops against ``scaled_dot_product_attention`` over growing T."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..cache import RATCache
from ..ops import rat_attention, rat_decode_step
from ..rotary import rotary_tables
from .console import Console, seconds

TIME_LIMIT = 30.0  # seconds: lengths that would not be done by then are left out, the first two excepted
KINDS = ("forward", "forward+backward", "decode step")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What suits a device. ``batch`` sequences of T tokens: as many as make ``tokens``, at least one."""

    dtype: torch.dtype
    lengths: tuple[int, ...]
    tokens: int
    heads: int
    groups: int
    dim: int
    chunk_size: int
    budget: float  # seconds a measurement repeats for
    decode_batch: int


SIZES = {
    "cpu": Sizes(torch.float32, (512, 1024, 2048, 4096, 8192), 1, 8, 2, 64, 16, 0.4, 4),
    "cuda": Sizes(torch.bfloat16, (1024, 4096, 16384, 65536), 65536, 16, 2, 128, 16, 0.3, 16),
}


def _measure(size: Sizes, tokens: int, device: torch.device, advance: Callable[..., None]) -> dict:
    """Seconds of each kind for rat_ext and for sdpa, at one T."""
    batch = max(1, size.tokens // tokens)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=size.dtype)

    def both(function, leaves):
        """(forward, forward+backward) in seconds."""
        with torch.no_grad():
            forward = seconds(function, device, size.budget)
        advance()
        for x in leaves:
            x.requires_grad_()

        def train():
            y = function()
            torch.autograd.grad(y, leaves, y.detach())

        whole = seconds(train, device, size.budget)
        advance()
        return forward, whole

    cos, sin = rotary_tables(-(-tokens // size.chunk_size), size.dim, device=device)
    heads = (size.groups, size.groups, size.heads, size.heads, size.heads)

    def own():
        q, k, v, gate, out_gate = leaves = [normal(batch, tokens, h, size.dim) for h in heads]

        def function():
            return rat_attention(q, k, v, gate, size.chunk_size, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin)

        return both(function, leaves)

    def dense():
        q, k, v = leaves = [normal(batch, size.heads, tokens, size.dim) for _ in range(3)]
        return both(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), leaves)

    rat, sdpa = own(), dense()
    with torch.no_grad():
        batch = size.decode_batch
        q, k, v, gate, out_gate = (normal(batch, h, size.dim) for h in heads)
        room = tokens + 512  # the sequences grow by a token a call
        cache = RATCache.empty(batch, size.heads, size.dim, size.chunk_size, room, dtype=size.dtype, device=device)
        cache.chunk_k.normal_(generator=generator)
        cache.chunk_v.normal_(generator=generator)
        cache.lengths.fill_(tokens)
        cos, sin = rotary_tables(room // size.chunk_size + 1, size.dim, device=device)

        def step():
            rat_decode_step(q, k, v, gate, cache, out_gate=out_gate, rotary_cos=cos, rotary_sin=sin)

        rat += (seconds(step, device, size.budget / 4, 200),)
        advance()
        query = normal(batch, size.heads, 1, size.dim)
        keys, values = (normal(batch, size.heads, tokens, size.dim) for _ in range(2))
        sdpa += (seconds(lambda: F.scaled_dot_product_attention(query, keys, values), device, size.budget / 4, 200),)
        advance()
    return {
        "tokens": tokens,
        "batch": max(1, size.tokens // tokens),
        "decode_batch": batch,
        "rat_ext": dict(zip(KINDS, rat, strict=True)),
        "sdpa": dict(zip(KINDS, sdpa, strict=True)),
    }


def run(console: Console, device: torch.device, out: str | None) -> dict:
    """All lengths; prints the table and writes the plot. Returns ``{"sizes": ..., "rows": [...], "left_out": [...],
    "plot": file or None}``.
    """
    size = SIZES[device.type]
    console.title("time: rat_ext against scaled_dot_product_attention (SDPA)")
    dtype = str(size.dtype).removeprefix("torch.")
    console.print(
        f"{dtype}, H={size.heads}, D={size.dim}; rat_ext with G={size.groups}, L={size.chunk_size}, output gate and "
        f"rotation; SDPA causal, H heads of keys and values. Milliseconds, medians; decode: one step for "
        f"{size.decode_batch} sequences of T tokens."
    )
    rows: list[dict] = []
    left_out: list[int] = []
    begin = time.perf_counter()
    row_seconds = 0.0
    with console.bar(6 * len(size.lengths), "time") as advance:
        for tokens in size.lengths:
            start = time.perf_counter()
            # Dense attention at twice the length takes four times as long.
            if len(rows) > 1 and start - begin + row_seconds * (tokens / rows[-1]["tokens"]) ** 2 > TIME_LIMIT:
                left_out.append(tokens)
                continue
            rows.append(_measure(size, tokens, device, lambda tokens=tokens: advance(1, f"T={tokens}")))
            row_seconds = time.perf_counter() - start
    shown = []
    for row in rows:
        cells = [str(row["tokens"]), str(row["batch"])]
        for kind in KINDS:
            mine, theirs = row["rat_ext"][kind], row["sdpa"][kind]
            cells += [f"{mine * 1e3:.3g}", f"{theirs * 1e3:.3g}", f"{theirs / mine:.1f}x"]
        shown.append(cells)
    short = ("forward", "fwd+bwd", "decode")
    head = ["T", "B", *(part for kind in short for part in (kind, "SDPA", "ratio"))]
    console.table(head, shown)
    if left_out:
        console.print(f"left out, to keep within {TIME_LIMIT:.0f} s: T = {', '.join(map(str, left_out))}")
    plot = _plot(console, rows, out, device) if out else None
    return {"sizes": dataclasses.asdict(size) | {"dtype": dtype}, "rows": rows, "left_out": left_out, "plot": plot}


def _plot(console: Console, rows: list[dict], out: str, device: torch.device) -> str | None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib, or rat_ext[demo])")
        return None
    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(12, 4), layout="constrained")
    lengths = [row["tokens"] for row in rows]
    for axis, kind in zip(axes, KINDS, strict=True):
        for name, label, color in (("sdpa", "SDPA", "#888888"), ("rat_ext", "rat_ext", "#c0392b")):
            axis.plot(lengths, [row[name][kind] * 1e3 for row in rows], "o-", color=color, label=label)
        axis.set(title=kind, xlabel="tokens T", xscale="log", yscale="log")
        axis.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths], minor=False)
        axis.xaxis.set_minor_locator(pyplot.NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    figure.suptitle(f"rat_ext and scaled_dot_product_attention on {name}")
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        console.print(f"no plot: {error}")
        return None
    finally:
        pyplot.close(figure)
    console.print(f"plot: {out}")
    return out
