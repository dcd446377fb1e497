"""Host time of a call, in microseconds: tiny shapes, the device idle. Beside it, an empty autograd function.

On a GPU this is what a call costs before the device has work: dispatch, checks, allocation, autograd, launches. On a CPU the
figure includes the (tiny) computation. Most of it is PyTorch's own and differs by machine, so the figure to look at is the
ratio to a function that has as many inputs, saves them and its output, and does nothing but one small copy: it hands saved
tensors back as gradients, where a function that computes them has to allocate. A forward launches two kernels on a GPU and a
backward of this size six, each of which costs the host what the row "one kernel" says.
"""

from __future__ import annotations

import torch
from common import host_microseconds, parser, record, save, table

import rat_ext


class Empty(torch.autograd.Function):
    """One small copy in the forward, nothing in the backward; saves its inputs and its output."""

    @staticmethod
    def forward(ctx, like: int, *inputs: torch.Tensor) -> torch.Tensor:
        y = inputs[like].clone()
        ctx.save_for_backward(*inputs, y)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.saved_tensors[:-1]


def measure(device: torch.device, quick: bool) -> list[dict]:
    """One row per call: its time and, where there is one, that of the empty function beside it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch, tokens, heads, groups, dim, chunk_size = 1, 32, 2, 1, 64, 16
    counts = (groups, groups, heads, heads, heads)
    calls, rounds = (20, 3) if quick else (200, 7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def host(function) -> float:
        return host_microseconds(function, device, calls, rounds)

    cos, sin = rat_ext.rotary_tables(8, dim, device=device)
    rotary = {"rotary_cos": cos, "rotary_sin": sin}
    bias = torch.zeros(heads, dim, device=device, requires_grad=True)
    leaves = [normal(batch, tokens, h, dim).requires_grad_() for h in counts]
    packed = normal(batch, tokens, sum(counts) * dim).requires_grad_()
    dy = normal(batch, tokens, heads, dim)
    five, one = (*leaves, bias), (packed, bias)

    def forward():
        return rat_ext.rat_attention(*leaves[:4], chunk_size, gate_bias=bias, out_gate=leaves[4], **rotary)

    def forward_packed():
        return rat_ext.rat_attention_packed(packed, heads, groups, chunk_size, gate_bias=bias, **rotary)

    rows: list[dict] = []

    def add(name: str, function, empty=None) -> None:
        rows.append({"name": name, "us": host(function), "empty_us": host(empty) if empty else None})

    def add_training(where: str) -> None:
        dpacked = torch.ones_like(packed)
        add(
            f"forward + backward{where}",
            lambda: torch.autograd.grad(forward(), five, dy),
            lambda: torch.autograd.grad(Empty.apply(2, *five), five, dy),
        )
        add(
            f"packed, forward + backward{where}",
            lambda: torch.autograd.grad(forward_packed(), one, dy),
            lambda: torch.autograd.grad(Empty.apply(0, *one), one, dpacked),
        )

    with torch.no_grad():
        add("one kernel", dy.neg_)
        add("forward", forward, lambda: Empty.apply(2, *five))
    add_training("")
    # On a GPU autograd runs a backward on a thread of its own; the hand-over is host time that no op can save.
    with torch.autograd.set_multithreading_enabled(False):
        add_training(", autograd on the calling thread")
    with torch.no_grad():
        token = [normal(batch, h, dim) for h in counts]
        cache = rat_ext.RATCache.empty(batch, heads, dim, chunk_size, 1 << 16, dtype=dtype, device=device)
        table_pair = rat_ext.rotary_tables((1 << 16) // chunk_size + 1, dim, device=device)
        fixed = dict(gate_bias=bias.detach(), out_gate=token[4], rotary_cos=table_pair[0], rotary_sin=table_pair[1])
        add("decode step", lambda: rat_ext.rat_decode_step(*token[:4], cache, **fixed))
    return rows


def main() -> None:
    options = parser(__doc__).parse_args()
    device = torch.device(options.device)
    result = record("host", device, rows=measure(device, options.quick))
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}; microseconds of the host per call")
    table(["", "us", "empty us", "ratio"], [cells(row) for row in result["rows"]])
    save(result, options)


def cells(row: dict) -> list[str]:
    empty = row["empty_us"]
    return [row["name"], f"{row['us']:.1f}", f"{empty:.1f}" if empty else "-", f"{row['us'] / empty:.2f}x" if empty else "-"]


if __name__ == "__main__":
    main()
