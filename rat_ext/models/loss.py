"""Cross-entropy of a linear head in pieces: the logits of a piece of the tokens are there at a time, never those of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import readable

# Logits of a piece, as a number of elements, where x has fewer than that: 128 MB of float32. Else as many as x has: a longer
# piece adds to the weight's gradient less often, and memory still goes with the tokens and not with the vocabulary.
PIECE = 1 << 25
IGNORED = -100


@torch.library.custom_op("rat_ext::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, x_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, and its gradients, which cost one product each while the logits are there."""
    tokens, vocab = x.shape[0], weight.shape[0]
    loss = torch.zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
    dx = torch.zeros_like(x) if x_gradient else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=loss.dtype) if weight_gradient else loss.new_empty(0)
    piece = max(max(PIECE, x.numel()) // max(vocab, 1), 1)
    for start in range(0, tokens, piece):
        part = x[start : start + piece]
        logits = part @ weight.t()
        label = labels[start : start + piece]
        counts = label != IGNORED
        place = label.clamp(0, vocab - 1)[:, None]
        logp = logits.log_softmax(-1, dtype=loss.dtype)
        picked = logp.gather(1, place)
        # A label that is no token makes the loss NaN: only a host could raise, and would wait for the labels.
        picked = picked.masked_fill((counts & (label != place[:, 0]))[:, None], float("nan"))
        loss -= picked[:, 0].masked_fill(~counts, 0).sum()
        if x_gradient or weight_gradient:
            # Softmax minus one at the label, each rounded once; what is ignored drops out of the products.
            dlogits = torch.exp(logp, out=logits)
            dlogits.scatter_(1, place, picked.expm1().to(logits.dtype))
            if x_gradient:
                torch.mm(dlogits, weight, out=dx[start : start + piece])
                dx[start : start + piece].mul_(counts[:, None])
            if weight_gradient:
                dweight += dlogits.t() @ (part * counts[:, None])
    return loss, dx, dweight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, x_gradient: bool, weight_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    dx = torch.empty_like(x) if x_gradient else x.new_empty(0)
    return loss, dx, torch.empty_like(weight) if weight_gradient else weight.new_empty(0)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dx, dweight = output
    ctx.wanted = inputs[3:]
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx, dweight)


def _backward(ctx, dloss: Tensor, *unused: Tensor | None) -> tuple:
    gradients = [g * dloss.to(g.dtype) if wanted else None for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
    return *gradients, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of ``cross_entropy(x @ weight.T, labels)``, in float32 (float64 for float64).

    Args:
        x: ``(N, d)``.
        weight: ``(V, d)``.
        labels: ``(N,)`` int64 or int32; -100 is left out. Others that are no token: ValueError on the CPU, a loss of NaN on
            a GPU.

    Returns:
        The sum, a scalar. Gradients of x and weight are computed along with it. No second derivatives.
    """
    kind = x.device.type
    if labels.dtype not in (torch.int64, torch.int32) or labels.shape != x.shape[:1]:
        got = f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}"
        raise ValueError(
            f"rat_ext.linear_cross_entropy: labels: expected int64 or int32 of shape {tuple(x.shape[:1])}, got {got}"
        )
    if readable(labels):
        bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= weight.shape[0]))]
        if bad.numel():
            expected = f"from 0 to {weight.shape[0] - 1}, or {IGNORED} for none"
            raise ValueError(f"rat_ext.linear_cross_entropy: labels: expected {expected}, got {int(bad[0])}")
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    grad = torch.is_grad_enabled()
    return _linear_cross_entropy(x, weight, labels.long(), grad and x.requires_grad, grad and weight.requires_grad)[0]
