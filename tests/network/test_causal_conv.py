"""The causal convolution: as `Conv1d` cut off at the end, causal, and by a compiled kernel only where it agrees."""

import re
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from homelib.network import causal_conv as module
from homelib.network.causal_conv import causal_conv, plain, used_on


def given(channels=6, tokens=20, width=4):
    return [torch.randn(shape, requires_grad=True) for shape in ((2, channels, tokens), (channels, 1, width), (channels,))]


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_it_is_conv1d_cut_off_at_the_end(tokens, width):
    x, weight, bias = given(tokens=tokens, width=width)
    naive = F.silu(F.conv1d(x, weight, bias, padding=width - 1, groups=6)[..., :tokens])
    ours = causal_conv(x, weight, bias)
    torch.testing.assert_close(ours, naive)
    with torch.no_grad():
        torch.testing.assert_close(causal_conv(x, weight, bias), naive)
    for a, b in zip(torch.autograd.grad(ours.sum(), (x, weight, bias)), torch.autograd.grad(naive.sum(), (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_token_sees_itself_and_those_before_it():
    x, weight, bias = given()
    seen = torch.autograd.grad(causal_conv(x, weight, bias)[0, :, 10].sum(), x)[0][0].abs().sum(0)
    assert seen.nonzero().flatten().tolist() == [7, 8, 9, 10]


def test_the_type_is_that_of_the_tokens():
    x, weight, bias = given()
    assert causal_conv(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_on_a_cpu_it_says_that_the_kernel_is_for_cuda():
    assert used_on("cpu") == "PyTorch (causal_conv1d needs a cuda device)"


@pytest.fixture
def kernel(monkeypatch):
    """A package `causal_conv1d` of these tests, tried on the CPU as if that were a GPU."""

    def install(function):
        package = ModuleType("causal_conv1d")
        package.causal_conv1d_fn = function
        monkeypatch.setitem(sys.modules, "causal_conv1d", package)
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
        module._tried.cache_clear()

    yield install
    monkeypatch.undo()
    module._tried.cache_clear()


def test_a_kernel_that_agrees_is_used_with_the_weights_it_wants(kernel):
    calls = []

    def agrees(x, weight, bias, activation):
        calls.append((weight.shape, activation))
        return plain(x, weight[:, None], bias)

    kernel(agrees)
    x, weight, bias = given()
    torch.testing.assert_close(causal_conv(x, weight, bias), plain(x, weight, bias))
    assert used_on("cpu") == "causal_conv1d"
    assert calls[-1] == ((6, 4), "silu")
    tried = len(calls)
    causal_conv(*given(width=7))  # the kernel was not written for that width
    assert len(calls) == tried


def test_a_kernel_first_met_under_autocast_is_judged_in_float32(kernel):
    """Else the half precision of PyTorch's own convolution would be held against the kernel."""
    seen = []

    def agrees(x, weight, bias, activation):
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(x, weight[:, None], bias)

    def exact(x, weight, bias, activation):  # float64 within: autocast leaves it alone
        return agrees(x.double(), weight.double(), bias.double(), activation).to(x.dtype)

    kernel(exact)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert used_on("cpu") == "causal_conv1d"
    assert seen == [False]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x, weight, bias, activation: 1.001 * plain(x, weight[:, None], bias), r"differs from it by [\d.]+e-0[34] of the largest number"),
        (lambda x, weight, bias, activation: plain(x, weight[:, None], bias) * torch.nan, "differs from it by nan"),
        (lambda x, weight, bias, activation: 1 / 0, "cannot be used: ZeroDivisionError: division by zero"),
    ],
    ids=["wrong", "nan", "raises"],
)
def test_a_kernel_that_fails_is_not_used_and_the_reason_is_kept(function, told, kernel):
    kernel(function)
    x, weight, bias = given()
    assert torch.equal(causal_conv(x, weight, bias), plain(x, weight, bias))
    assert re.search(rf"^PyTorch \(causal_conv1d {told}", used_on("cpu"))
