"""Instance norm and convolutions as the network takes them on a CPU: in channels_last tensors, in which they are fastest there, and right in bfloat16.

With contiguous tensors they are PyTorch's own, but for instance norm on a GPU, where PyTorch's gives each channel to one of its many multiprocessors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .home import at_least_float32
from .instance_norm import has_kernel, kernel

HALF = (torch.bfloat16, torch.float16)
SLAB_NUMBERS = 2**18  # of a product that exist at a time: they stay in the cache


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm without parameters, (B, C, D, H, W) -> same. PyTorch's own takes a channels_last tensor out of that layout and does not put it back, so
    that the convolutions around it copy too; on a CPU (2.13), for a batch of one, its gradient is then wrong."""

    def forward(self, x: Tensor) -> Tensor:
        if has_kernel(x):
            return kernel(x, self.eps)
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(x)
        if x.is_cpu and x.dtype in HALF:  # batch norm of one item is its instance norm; it errs by about as much as x was rounded
            items = [F.batch_norm(item, None, None, training=True, eps=self.eps) for item in x.split(1)]
            return items[0] if len(items) == 1 else torch.cat(items)
        return _InstanceNormChannelsLast.apply(x, self.eps)


class _InstanceNormChannelsLast(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) over space, half precision in float32. PyTorch's group and batch norms would keep the layout, but sum
    channels_last tensors one number after the other, an error of 1e-3 at 128^3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = at_least_float32(x)
        mean = over_space(wide)
        y = wide - mean
        scale = (product_over_space(y, y) + eps).rsqrt_()
        ctx.save_for_backward(x, mean, scale)  # not y, which the activation after it may change in place
        return y.mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, mean, scale = ctx.saved_tensors
        dy, kind = at_least_float32(dy), dy.dtype
        centred = at_least_float32(x) - mean
        dx = dy - over_space(dy)
        dx.addcmul_(centred, product_over_space(dy, centred) * scale.square(), value=-1)
        return dx.mul_(scale).to(kind), None


def over_space(x: Tensor) -> Tensor:
    """Mean (B, C, 1, 1, 1)."""
    return x.mean((2, 3, 4), keepdim=True)


def product_over_space(a: Tensor, b: Tensor) -> Tensor:
    """Mean of a b (B, C, 1, 1, 1), slab by slab."""
    rows = max(1, SLAB_NUMBERS * a.shape[2] // a.numel())
    parts = [(p * q).sum((2, 3, 4), keepdim=True) for p, q in zip(a.split(rows, 2), b.split(rows, 2), strict=True)]
    return torch.stack(parts).sum(0) / a[0, 0].numel()


class PointwiseConv(nn.Conv3d):
    """A convolution of width 1, (B, C, D, H, W) -> (B, C_out, D, H, W). On a CPU PyTorch's is several times slower than the matrix product that it is, with
    channels last."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.is_contiguous(memory_format=torch.channels_last_3d):
            return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)
        return super().forward(x)


class Conv3d(nn.Conv3d):
    """A convolution, (B, C, D, H, W) -> (B, C_out, D, H, W), which on a CPU takes a grid narrower than its kernel in float32: in bfloat16 the gradient of its
    weights is wrong there, and memory beyond them overwritten (PyTorch 2.13 on processors with AVX-512; a kernel of 3 on 2x2x2 voxels)."""

    def forward(self, x: Tensor) -> Tensor:
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        narrow = any(size < width for size, width in zip(x.shape[2:], self.kernel_size, strict=True))
        if not (x.is_cpu and narrow and kind in HALF):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), None if self.bias is None else self.bias.float()).to(kind)


def convert_conv3d(network: nn.Module) -> nn.Module:
    """The network, each plain convolution of it a `Conv3d`: the same parameters under the same names."""
    for layer in network.modules():
        if type(layer) is nn.Conv3d:
            layer.__class__ = Conv3d
    return network


def keep_channels_last(block: nn.Module) -> nn.Module:
    """The block, its instance norms and convolutions replaced by those of this module."""
    for module in list(block.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.InstanceNorm3d):
                setattr(module, name, InstanceNorm(layer.num_features, eps=layer.eps))
            elif isinstance(layer, nn.Conv3d) and set(layer.kernel_size) == {1}:
                setattr(module, name, PointwiseConv(layer.in_channels, layer.out_channels, 1, bias=layer.bias is not None))
    return convert_conv3d(block)
