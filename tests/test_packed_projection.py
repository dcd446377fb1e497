"""rat_attention_packed: one projection in, one gradient out, the numbers of rat_attention on its views."""

import pytest
import torch

import rat_ext
from rat_ext.testing import DTYPES, LOW, Random, attention_case, check, name

H, G = 4, 2


def packed(q, k, v, gate, chunk_size, out_gate=None, **options):
    """rat_attention by way of the packed entry: autograd hands the one gradient back to the five tensors."""
    tensors = [x for x in (q, k, v, gate, out_gate) if x is not None]
    projection = torch.cat([x.flatten(2) for x in tensors], dim=2)
    return rat_ext.rat_attention_packed(
        projection, v.shape[2], q.shape[2], chunk_size, has_out_gate=out_gate is not None, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("out_gate", [False, True], ids=["", "out_gate"])
@pytest.mark.parametrize("dim", [8, 64, 72])
def test_against_float64(device, dtype, out_gate, dim):
    check(attention_case(device, dtype, out_gate=out_gate, dim=dim), function=packed)


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(device, dtype, scale):
    check(attention_case(device, dtype, scale=scale), function=packed)


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_no_tokens_have_a_bias_without_gradient(device, dtype):
    projection = torch.zeros(2, 0, (2 * G + 3 * H) * 8, dtype=dtype, device=device, requires_grad=True)
    bias = torch.ones(H, 8, device=device, requires_grad=True)
    y = rat_ext.rat_attention_packed(projection, H, G, 16, gate_bias=bias)
    dprojection, dbias = torch.autograd.grad(y, (projection, bias), torch.ones_like(y))
    assert dprojection.shape == projection.shape and torch.equal(dbias, torch.zeros_like(dbias))


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_sequences_and_states(device, dtype):
    check(attention_case(device, dtype, sequences=[10, 0, 35, 1]), function=packed)
    check(
        attention_case(device, dtype, sequences=[10, 0, 35, 1], lengths=[3, 16, 7, 0], return_state=True),
        function=packed,
    )
    check(attention_case(device, dtype, batch=3, lengths=[3, 16, 37], return_state=True), function=packed)


def split(projection: torch.Tensor, dim: int = 32):
    sizes = [G * dim, G * dim, H * dim, H * dim, H * dim]
    parts = projection.split(sizes, dim=2)
    return [x.unflatten(2, (-1, dim)) for x in parts]


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_equals_views(device, dtype):
    random = Random(0, device, dtype)
    projection = random.normal(2, 50, (2 * G + 3 * H) * 32).requires_grad_()
    dy = random.normal(2, 50, H, 32)
    bias = random.normal(H, 32, dtype=torch.float32).requires_grad_()
    y = rat_ext.rat_attention_packed(projection, H, G, 16, gate_bias=bias)
    grads = torch.autograd.grad(y, (projection, bias), dy)
    q, k, v, gate, out_gate = split(projection)
    same = rat_ext.rat_attention(q, k, v, gate, 16, gate_bias=bias, out_gate=out_gate)
    assert torch.equal(y, same)
    for a, b in zip(grads, torch.autograd.grad(same, (projection, bias), dy), strict=True):
        assert torch.equal(a, b)


def test_a_strided_projection(device):
    """Rows of a wider tensor: the gradient has the shape of the projection, not of its storage."""
    random = Random(0, device, torch.float32)
    width = (2 * G + 3 * H) * 32
    wide = random.normal(50, 2, width + 5)
    projection = wide.transpose(0, 1)[..., 2 : 2 + width].detach().requires_grad_()
    y = rat_ext.rat_attention_packed(projection, H, G, 16)
    (grad,) = torch.autograd.grad(y, projection, torch.ones_like(y))
    dense = projection.detach().contiguous().requires_grad_()
    y2 = rat_ext.rat_attention_packed(dense, H, G, 16)
    (grad2,) = torch.autograd.grad(y2, dense, torch.ones_like(y2))
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(grad, grad2)


def test_the_kernels_write_the_gradient_in_place(device):
    """No op but ours runs between dy and the gradient of the projection: no zero-fill, no copy, no sum."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            return func(*args, **(kwargs or {}))

    random = Random(0, device, torch.float32)
    projection = random.normal(2, 50, (2 * G + 3 * H) * 32).requires_grad_()
    y = rat_ext.rat_attention_packed(projection, H, G, 16)
    dy = torch.ones_like(y)
    with Calls() as calls:
        (grad,) = torch.autograd.grad(y, projection, dy)
    heavy = [call for call in calls.names if not call.startswith(("aten::detach", "aten::view"))]
    assert heavy == ["rat_ext::rat_attention_packed_backward"], heavy
    assert grad.is_contiguous()


@pytest.mark.gpu
def test_peak_memory(device):
    """Forward and backward: output, gradients and little more."""
    random = Random(0, device, torch.bfloat16)
    tokens, heads, groups, dim = 65536, 16, 2, 128
    width = (2 * groups + 3 * heads) * dim
    projection = torch.zeros(1, tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
    dy = random.normal(1, 1, 1, dim).expand(1, tokens, heads, dim)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = rat_ext.rat_attention_packed(projection, heads, groups, 16)
    torch.autograd.grad(y, projection, dy)
    peak = torch.cuda.max_memory_allocated() - before
    y_bytes, gradient = y.numel() * 2, projection.numel() * 2
    # Beside y and the gradient: chunk states, their float32 gradients, dq in float32 and three scalars per head
    # and token.
    chunk_bytes = 2 * (2 + 4) * tokens // 16 * heads * dim
    scratch = 4 * tokens * (groups * dim + 5 * heads)
    assert peak <= 1.03 * (y_bytes + gradient + chunk_bytes + scratch), (peak, y_bytes, gradient, chunk_bytes, scratch)
