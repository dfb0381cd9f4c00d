"""Layers for channels_last tensors: exact, in either layout."""

import pytest
import torch

from homelib.network.layers import InstanceNorm, PointwiseConv


@pytest.mark.parametrize("shape", [(1, 16, 40, 32, 24), (2, 3, 5, 4, 7)], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_instance_norm_is_exact_in_either_layout_and_keeps_it(shape, kind):
    """Beside the formula in float64, far from zero, where sums taken carelessly show. A gradient arrives in the layout of the output."""
    norm, x, dy = InstanceNorm(shape[1]), (torch.randn(shape) + 30).to(kind), torch.randn(shape).to(kind)
    wide, space = x.double(), {"dim": (2, 3, 4), "keepdim": True}
    scale = (wide.var(**space, correction=0) + norm.eps).rsqrt()
    y = (wide - wide.mean(**space)) * scale
    dx = scale * (dy.double() - dy.double().mean(**space) - y * (dy.double() * y).mean(**space))
    rounding = 2**-4  # of a number between 16 and 32 in bfloat16, by which x itself is not what it was
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 2e-2, "atol": 1.5 * rounding}
    for layout in (torch.contiguous_format, torch.channels_last_3d)[kind == torch.bfloat16 :]:  # PyTorch's own rounds means to bfloat16
        given = x.contiguous(memory_format=layout).requires_grad_()
        found = norm(given)
        (gradient,) = torch.autograd.grad(found, given, dy.contiguous(memory_format=layout))
        assert found.dtype == gradient.dtype == kind
        torch.testing.assert_close(found.double(), y, **tolerance)
        torch.testing.assert_close(gradient.double(), dx, **tolerance)
        assert found.is_contiguous(memory_format=layout)


def test_a_convolution_of_width_1_is_a_product_in_channels_last():
    ours, given = PointwiseConv(5, 3, 1), torch.randn(2, 5, 4, 6, 7)
    expected = torch.nn.functional.conv3d(given, ours.weight, ours.bias)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        torch.testing.assert_close(ours(given.contiguous(memory_format=layout)), expected)
