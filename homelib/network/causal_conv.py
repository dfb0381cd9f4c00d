"""The causal convolution before the scan: each channel by itself, each token with those before it, then SiLU.

On a GPU by the kernel of `causal_conv1d`, where that package was built and agrees with PyTorch on a tiny case; else by PyTorch.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan.backends import undisturbed
from .trial import tried

KERNEL, DEVICES = "causal_conv1d", ("cuda",)
WIDTHS = (2, 3, 4)  # that the kernel was written for
log = logging.getLogger(__name__)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv(x)), (B, D, L) -> (B, D, L), with weight (D, 1, W) and bias (D,)."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    compiled = x.device.type in DEVICES and weight.shape[-1] in WIDTHS and used_on(str(x.device)) == KERNEL
    return kernel(x, weight, bias) if compiled else plain(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By PyTorch, arguments as `causal_conv`, (B, D, L) -> (B, D, L). Padded on the left alone where a gradient is wanted: what is cut off is padded again in
    the backward pass. Else on both sides, which copies nothing."""
    padding, groups = weight.shape[-1] - 1, weight.shape[0]
    if torch.is_grad_enabled():
        return F.silu(F.conv1d(F.pad(x, (padding, 0)), weight, bias, groups=groups))
    return F.silu(F.conv1d(x, weight, bias, padding=padding, groups=groups)[..., : x.shape[-1]])


def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By the package's kernel, arguments as `causal_conv`, (B, D, L) -> (B, D, L)."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x, weight[:, 0], bias, activation="silu")


@torch.compiler.assume_constant_result
def used_on(device: str) -> str:
    """What computes the convolution on a device: "causal_conv1d", or "PyTorch", and why."""
    return _tried(device)


@functools.cache
def _tried(device: str) -> str:
    told = tried(KERNEL, device, DEVICES, _difference)
    log.info("causal convolution on %s: %s", device, told)
    return told


def _difference(device: str) -> float:
    """Largest difference to PyTorch in value and gradients, over the largest number of each."""
    generator = torch.Generator().manual_seed(0)
    with undisturbed():
        given = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((2, 16, 50), (16, 1, 4), (16,))]
        results = []
        for f in (kernel, plain):
            y = f(*given)
            results.append([y, *torch.autograd.grad(y, given, torch.sin(torch.arange(y.numel(), device=device)).view_as(y))])
        return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]).max().item()  # NaN where there is one
