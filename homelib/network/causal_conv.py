"""The causal convolution before the scan: each channel by itself, each token with those before it, then SiLU.

On a GPU by the kernel of `causal_conv1d`, where that package was built and agrees with PyTorch on a tiny case; else by PyTorch.
"""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan.backends import undisturbed

DEVICES = ("cuda",)
TOLERANCE = 1e-4
WIDTHS = (2, 3, 4)  # that the kernel was written for
log = logging.getLogger(__name__)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv(x)), (B, D, L) -> (B, D, L), with weight (D, 1, W) and bias (D,)."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    kernel, _ = compiled(str(x.device)) if weight.shape[-1] in WIDTHS else (None, "")
    return kernel(x, weight, bias) if kernel else plain(x, weight, bias)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Padded on the left alone: nothing is computed that is cut off afterwards."""
    return F.silu(F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, bias, groups=weight.shape[0]))


@torch.compiler.assume_constant_result
@functools.cache
def compiled(device: str) -> tuple[Callable | None, str]:
    """The kernel for a device, or None, and why."""
    if torch.device(device).type not in DEVICES:
        return None, f"PyTorch (causal_conv1d needs a {' or '.join(DEVICES)} device)"
    try:
        from causal_conv1d import causal_conv1d_fn

        def kernel(x, weight, bias):
            return causal_conv1d_fn(x, weight[:, 0], bias, activation="silu")

        error = _difference(kernel, device)
    except Exception as error:  # a package built for another CUDA raises anything
        reason = f"PyTorch (causal_conv1d cannot be used: {type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    else:
        if error <= TOLERANCE:
            return kernel, "causal_conv1d"
        reason = f"PyTorch (causal_conv1d differs from it by {error:.1e} of the largest number on a small case)"
    log.info("causal convolution on %s: %s", device, reason)
    return None, reason


def _difference(kernel: Callable, device: str) -> float:
    """Largest difference to PyTorch in value and gradients, over the largest number of each."""
    generator = torch.Generator().manual_seed(0)
    with undisturbed():
        given = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in ((2, 16, 50), (16, 1, 4), (16,))]
        results = []
        for f in (kernel, plain):
            y = f(*given)
            results.append([y, *torch.autograd.grad(y, given, torch.sin(torch.arange(y.numel(), device=device)).view_as(y))])
        return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]).max().item()  # NaN where there is one
