"""What computes the network's instance norm on a GPU: the kernels of `instance_norm_gpu`, where Triton is installed and they agree with PyTorch on a tiny case
in both layouts; else PyTorch."""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan.backends import undisturbed
from .trial import tried

KERNEL, DEVICES = "triton", ("cuda",)
KINDS = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


def has_kernel(x: Tensor) -> bool:
    """Whether there is a kernel that works for x (B, C, D, H, W)."""
    fits = x.device.type in DEVICES and x.dtype in KINDS and x.dim() == 5
    return fits and x.numel() > x.shape[0] * x.shape[1] and used_on(str(x.device)) == KERNEL  # of one voxel a channel PyTorch raises an error


def kernel(x: Tensor, eps: float) -> Tensor:
    """By the kernels, (B, C, D, H, W) -> same."""
    from .instance_norm_gpu import instance_norm

    return instance_norm(x, eps)


@torch.compiler.assume_constant_result
def used_on(device: str) -> str:
    """What computes instance norm on a device: "triton", or "PyTorch", and why."""
    return _tried(device)


@functools.cache
def _tried(device: str) -> str:
    told = tried(KERNEL, device, DEVICES, _difference)
    tell = log.info if told == KERNEL or torch.device(device).type not in DEVICES else log.warning
    tell("instance norm on %s: %s", device, told)
    return told


def _difference(device: str) -> float:
    """Largest difference to PyTorch in value and gradient, over the largest number of each; several splits and a part of a tile in either layout."""
    generator, errors = torch.Generator().manual_seed(0), []
    with undisturbed():
        x, dy = (torch.randn(2, 5, 17, 16, 9, generator=generator).to(device) for _ in range(2))
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            given, exact = (t.requires_grad_() for t in ((x + 3).contiguous(memory_format=layout), x + 3))
            y, expected = kernel(given, 1e-5), F.instance_norm(exact, eps=1e-5)
            pairs = (y, expected), (torch.autograd.grad(y, given, dy)[0], torch.autograd.grad(expected, exact, dy)[0])
            errors += [(a - b).abs().max() / b.abs().max() for a, b in pairs]
        return torch.stack(errors).max().item()  # NaN where there is one
