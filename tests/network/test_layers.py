"""Layers for channels_last tensors: exact, in either layout. And convolutions in bfloat16 on grids narrower than their kernels, where PyTorch's are wrong."""

import pytest
import torch
from torch import nn

from homelib import MambaHoME
from homelib.config import preset
from homelib.network import zoo
from homelib.network.layers import Conv3d, InstanceNorm, PointwiseConv


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


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights in bfloat16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("grid", "width"), [((2, 2, 2), 3), ((2, 3, 5), 3), ((3, 4, 5), 5), ((3, 3, 3), 3)], ids=str)
def test_a_convolution_in_bfloat16_is_right_on_a_grid_of_any_width(grid, width, layout, autocast, threads):
    """The first three are narrower than their kernels: a plain convolution gives gradients of weights there that have nothing to do with the true ones."""
    torch.manual_seed(0)
    ours, x, dy = Conv3d(8, 8, width, padding=width // 2), torch.randn(1, 8, *grid), torch.randn(1, 8, *grid)
    exact = torch.autograd.grad(ours(x), ours.weight, dy)[0]
    if not autocast:
        ours, x = ours.to(torch.bfloat16), x.to(torch.bfloat16)
    ours = ours.to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours(x.contiguous(memory_format=layout))
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, ours.weight, dy.bfloat16().contiguous(memory_format=layout))[0]
    assert ((found.float() - exact).norm() / exact.norm()).item() < 0.01


@pytest.mark.parametrize("name", ["MambaHoME", "SwinUNETR"])
def test_no_network_has_a_convolution_that_is_wrong_on_narrow_grids(name):
    config = preset("smoke").model
    network = zoo.build(name, config.model_copy(update={"width": 12} if name == "SwinUNETR" else {}), (32, 32, 32))
    found = {type(layer) for layer in network.modules() if isinstance(layer, nn.Conv3d)}
    assert Conv3d in found
    assert found <= {Conv3d, PointwiseConv}
    if name == "MambaHoME":
        assert list(network.state_dict()) == list(MambaHoME(config).state_dict())
