"""What a model costs: parameters, floating-point operations per token, memory of a training step; and what a device can do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..models import RATConfig

# Dense bfloat16 with float32 sums, FLOP per second, as the makers state it.
PEAKS = {
    "B200": 2250e12, "GB200": 2500e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 5090": 210e12,
}  # fmt: skip


def parameters(config: RATConfig) -> tuple[int, int]:
    """(all, those of products): the embedding is looked up, the head is a product, also where they are one tensor."""
    from ..models import RATForCausalLM

    with torch.device("meta"):
        model = RATForCausalLM(config)
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return total, products


def flops_per_token(config: RATConfig, length: int) -> float:
    """Of forward and backward at T = ``length``: 6 per weight of a product, and the products of attention with what is seen."""
    seen = 0.0
    for kind, chunk in zip(config.layer_types, config.chunk_sizes, strict=True):
        if kind == "rat":
            seen += (length / chunk - 1) / 2 + 1 if chunk < length else 1
        elif kind == "attention":
            seen += (length + 1) / 2
        elif kind == "sliding_attention":
            window = min(config.sliding_window + 1, length)
            seen += window - window * (window - 1) / (2 * length)
    return 6 * parameters(config)[1] + 12 * config.hidden_size * seen


def step_memory(
    config: RATConfig, tokens: int, *, ranks: int = 1, checkpointing: bool = False, bf16: bool = True
) -> dict[str, float]:
    """Bytes that a rank needs: float32 weights, gradients and AdamW's two moments, shared by ``ranks``; activations of
    ``tokens``. Activations are counted from what each layer saves, the rest of an allocator (fragments, workspaces) is not.
    """
    total, _ = parameters(config)
    d, hidden, size = config.hidden_size, config.intermediate_size or 0, 2 if bf16 else 4
    widths = {"rat": 3 + 2 * config.num_groups / config.num_attention_heads, "rnn": 3, "attention": 3, "sliding_attention": 3}
    saved = 0.0
    for kind in config.layer_types:
        # Norms and residuals in float32; the projection, its rotated or recurrent copies, the result; the feed-forward.
        saved += 4 * 4 * d + size * (2 * widths[kind] + 3) * d + size * 2 * hidden
    if checkpointing:
        saved = len(config.layer_types) * 4 * d + saved / len(config.layer_types)
    loss = min(tokens * config.vocab_size, 1 << 25) * 3 * 4
    state = 16 * total / ranks
    return {"weights, gradients, moments": state, "activations": saved * tokens, "loss": loss}


def peak(device: torch.device) -> tuple[float, str]:
    """FLOP per second that a device can do, and where the number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part in sorted(PEAKS, key=len, reverse=True):
            if part in name:
                return PEAKS[part], f"{name}, bfloat16, as its maker states"
    # Of a size that a core does in milliseconds.
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        b = a @ a
        b[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"a product of {n} x {n} matrices, measured"
