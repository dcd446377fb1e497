"""Host time of one forward + backward call and of one decode step, in microseconds: tiny shapes, the device idle.

On a GPU this is what a call costs before the device has work: dispatch, checks, allocation, autograd, launches. On a
CPU the figure includes the (tiny) computation. Targets: 120 for forward + backward, 30 for a decode step.
"""

from __future__ import annotations

import torch
from common import host_microseconds, parser, record, save, table

import rat_ext

TARGETS = {"forward + backward": 120, "packed forward + backward": 120, "decode step": 30}


class Nothing(torch.autograd.Function):
    """One small copy in the forward, nothing in the backward: what any differentiable Python op costs on this machine."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> torch.Tensor:
        return dy


class NothingOfSix(torch.autograd.Function):
    """The same with as many inputs as rat_attention has gradients, which it saves, as it does its output."""

    @staticmethod
    def forward(ctx, *inputs: torch.Tensor) -> torch.Tensor:
        y = inputs[2].clone()
        ctx.save_for_backward(*inputs, y)
        return y

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors[:6]


def measure(device: torch.device, quick: bool) -> dict[str, float]:
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

    def forward():
        return rat_ext.rat_attention(*leaves[:4], chunk_size, gate_bias=bias, out_gate=leaves[4], **rotary)

    def forward_packed():
        return rat_ext.rat_attention_packed(packed, heads, groups, chunk_size, gate_bias=bias, **rotary)

    found = {}
    with torch.no_grad():
        found["forward"] = host(forward)
    found["forward + backward"] = host(lambda: torch.autograd.grad(forward(), (*leaves, bias), dy))
    found["packed forward + backward"] = host(lambda: torch.autograd.grad(forward_packed(), (packed, bias), dy))
    found["a function that does nothing"] = host(lambda: torch.autograd.grad(Nothing.apply(leaves[2]), leaves[2], dy))
    six = (*leaves, bias)
    found["a function of six inputs that does nothing"] = host(lambda: torch.autograd.grad(NothingOfSix.apply(*six), six, dy))
    # On a GPU autograd runs a backward on a thread of its own; the hand-over is host time that no op can save.
    with torch.autograd.set_multithreading_enabled(False):
        call = "forward + backward, autograd on the calling thread"
        found[call] = host(lambda: torch.autograd.grad(forward(), (*leaves, bias), dy))
        call = "packed forward + backward, autograd on the calling thread"
        found[call] = host(lambda: torch.autograd.grad(forward_packed(), (packed, bias), dy))
        call = "a function that does nothing, autograd on the calling thread"
        found[call] = host(lambda: torch.autograd.grad(Nothing.apply(leaves[2]), leaves[2], dy))
        call = "a function of six inputs that does nothing, autograd on the calling thread"
        found[call] = host(lambda: torch.autograd.grad(NothingOfSix.apply(*six), six, dy))
    with torch.no_grad():
        token = [normal(batch, h, dim) for h in counts]
        cache = rat_ext.RATCache.empty(batch, heads, dim, chunk_size, 1 << 16, dtype=dtype, device=device)
        table_pair = rat_ext.rotary_tables((1 << 16) // chunk_size + 1, dim, device=device)
        fixed = dict(gate_bias=bias.detach(), out_gate=token[4], rotary_cos=table_pair[0], rotary_sin=table_pair[1])
        found["decode step"] = host(lambda: rat_ext.rat_decode_step(*token[:4], cache, **fixed))
    return found


def main() -> None:
    options = parser(__doc__).parse_args()
    device = torch.device(options.device)
    found = measure(device, options.quick)
    result = record("host", device, microseconds=found, targets=TARGETS)
    print(f"{result['device']}, torch {result['torch']}, commit {result['commit']}; microseconds of the host a call")
    shown = []
    for name, us in found.items():
        target = TARGETS.get(name)
        verdict = "" if target is None else f"{'within' if us <= target else 'OVER'} {target}"
        shown.append([name, f"{us:.1f}", verdict])
    table(["", "us", "target"], shown)
    save(result, options)


if __name__ == "__main__":
    main()
