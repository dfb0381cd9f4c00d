"""Instance norm on a GPU, in Triton, forward and backward, of tensors that lie channel by channel or, channels_last, voxel by voxel.

    y  = (x - mean) scale,   scale = 1 / sqrt(var + eps)                       over the V voxels of a channel
    dx = scale (dy - mean(dy) - x_hat mean(dy x_hat)),   x_hat = y

A volume gives few channels and very many voxels (48 channels and 884,736 voxels at 96^3), so a program takes a block of channels and one of S splits of the
voxels, and fills the GPU so with programs:

    moments      of each split, its mean and its sum of squares about it       (B, C, S)
    merge        of the splits of a channel, its mean and scale                (B, C)
    normalise    y
    products     of each split, the sums of dy and of dy x_hat; then their sums over splits
    gradient     dx

Each number of a tile keeps moments of its own (Welford), and they are merged at the end about their common mean (Chan, Golub and LeVeque): no squares of
large numbers are subtracted from each other, and no thread waits for another until then. All sums are float32, in a fixed order: the same call gives the
same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers that a program takes at a time
CHANNELS = 64  # of a tile, at most, where they lie side by side
PROGRAMS, PROGRAMS_BACKWARD = 8, 6  # that a multiprocessor holds at a time, of 64 and of 80 registers a thread
SPLITS = 1024  # of a channel, at most: one program merges them
WARPS = 4  # of a program


def instance_norm(x: Tensor, eps: float) -> Tensor:
    """(B, C, D, H, W) -> same, in the layout of x, for CUDA tensors of float32, bfloat16 or float16."""
    return _instance_norm(x, eps)[0]


# ---------------------------------------------------------------- kernels


@triton.jit
def _place(channels, voxels, split, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, LAST: tl.constexpr):
    """Of a program: (BLOCK_C,) channels and which exist, their rows in (B, C), the voxels of its split, the place of its first number, (BLOCK_C, BLOCK_V)
    places from there, and how far it is to the next tile."""
    c, v = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_V)
    b, channel, start = tl.program_id(2).to(tl.int64), tl.program_id(1) * BLOCK_C, tl.program_id(0) * split
    count = tl.minimum(voxels - start, split)
    if LAST:
        first, places, step = (b * voxels + start) * channels + channel, c[:, None] + v[None, :] * channels, BLOCK_V * channels
    else:
        first, places, step = (b * channels + channel) * voxels + start, c[:, None] * voxels + v[None, :], BLOCK_V
    return channel + c < channels, b * channels + channel + c, count, first, places, step


@triton.jit
def _inside(exists, tile, count, BLOCK_V: tl.constexpr):
    """Which (BLOCK_C, BLOCK_V) numbers of a tile there are."""
    return exists[:, None] & (tile * BLOCK_V + tl.arange(0, BLOCK_V) < count)[None, :]


@triton.jit
def _merged(n, mean, M2, total):
    """Mean and sum of squares about it (rows,) of all, from those of groups of n numbers (rows, groups), total in all. The mean is corrected by the mean
    distance to it, for it may be large beside the distances."""
    whole = tl.sum(n * mean, 1) / total
    whole += tl.sum(n * (mean - whole[:, None]), 1) / total
    apart = mean - whole[:, None]
    return whole, tl.sum(M2 + n * apart * apart, 1)


@triton.jit
def _moments(
    x, means, M2s, channels, voxels, split,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Of each split its mean and its sum of squares about it, (B, C, S)."""
    exists, row, count, first, places, step = _place(channels, voxels, split, BLOCK_C, BLOCK_V, LAST)
    mean, M2 = tl.zeros((BLOCK_C, BLOCK_V), tl.float32), tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    x += first
    for tile in range(0, tl.cdiv(count, BLOCK_V)):
        inside = _inside(exists, tile, count, BLOCK_V)
        given = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        apart = tl.where(inside, given - mean, 0.0)
        mean += apart * (1.0 / (tile + 1))
        M2 += apart * (given - mean)
        x += step
    n = tl.maximum(tl.cdiv(count - tl.arange(0, BLOCK_V), BLOCK_V), 0).to(tl.float32)
    whole, squares = _merged(n[None, :], mean, M2, count.to(tl.float32))
    at = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + at, whole, mask=exists)
    tl.store(M2s + at, squares, mask=exists)


@triton.jit
def _merge(means, M2s, mean, scale, voxels, split, splits, eps, SPLITS: tl.constexpr):
    """Of a channel the mean and 1 / sqrt(var + eps), (B, C), from those of its splits."""
    row, s = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS)
    n = tl.maximum(tl.minimum(voxels - s * split, split), 0).to(tl.float32)
    at = row * splits + s
    parts, squares = (tl.load(means + at, mask=s < splits, other=0.0), tl.load(M2s + at, mask=s < splits, other=0.0))
    whole, M2 = _merged(n[None, :], parts[None, :], squares[None, :], voxels * 1.0)
    one = row + tl.arange(0, 1)
    tl.store(mean + one, whole)
    tl.store(scale + one, tl.rsqrt(M2 / voxels + eps))


@triton.jit
def _normalise(
    x, mean, scale, y, channels, voxels, split,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    exists, row, count, first, places, step = _place(channels, voxels, split, BLOCK_C, BLOCK_V, LAST)
    mean, scale = tl.load(mean + row, mask=exists)[:, None], tl.load(scale + row, mask=exists)[:, None]
    x += first
    y += first
    for tile in range(0, tl.cdiv(count, BLOCK_V)):
        inside = _inside(exists, tile, count, BLOCK_V)
        given = tl.load(x + places, mask=inside).to(tl.float32)
        tl.store(y + places, ((given - mean) * scale).to(y.dtype.element_ty), mask=inside)
        x += step
        y += step


@triton.jit
def _products(
    dy, x, mean, scale, sums, channels, voxels, split,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Of each split the sums of dy and of dy x_hat, (2, B, C, S)."""
    exists, row, count, first, places, step = _place(channels, voxels, split, BLOCK_C, BLOCK_V, LAST)
    mean, scale = tl.load(mean + row, mask=exists, other=0.0)[:, None], tl.load(scale + row, mask=exists, other=0.0)
    plain, product = tl.zeros((BLOCK_C, BLOCK_V), tl.float32), tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    x += first
    dy += first
    for tile in range(0, tl.cdiv(count, BLOCK_V)):
        inside = _inside(exists, tile, count, BLOCK_V)
        given, gradient = tl.load(x + places, mask=inside, other=0.0).to(tl.float32), tl.load(dy + places, mask=inside, other=0.0).to(tl.float32)
        plain += gradient
        product += gradient * (given - mean)
        x += step
        dy += step
    at = row * tl.num_programs(0) + tl.program_id(0)
    rows = tl.num_programs(2).to(tl.int64) * channels * tl.num_programs(0)
    tl.store(sums + at, tl.sum(plain, 1), mask=exists)
    tl.store(sums + rows + at, tl.sum(product, 1) * scale, mask=exists)


@triton.jit
def _gradient(
    dy, x, mean, scale, sums, dx, channels, voxels, split,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    exists, row, count, first, places, step = _place(channels, voxels, split, BLOCK_C, BLOCK_V, LAST)
    mean, scale = tl.load(mean + row, mask=exists)[:, None], tl.load(scale + row, mask=exists)[:, None]
    plain = tl.load(sums + row, mask=exists)[:, None] / voxels
    product = tl.load(sums + tl.num_programs(2).to(tl.int64) * channels + row, mask=exists)[:, None] / voxels * scale
    x += first
    dy += first
    dx += first
    for tile in range(0, tl.cdiv(count, BLOCK_V)):
        inside = _inside(exists, tile, count, BLOCK_V)
        given, gradient = tl.load(x + places, mask=inside).to(tl.float32), tl.load(dy + places, mask=inside).to(tl.float32)
        tl.store(dx + places, ((gradient - plain - (given - mean) * product) * scale).to(dx.dtype.element_ty), mask=inside)
        x += step
        dy += step
        dx += step


# ---------------------------------------------------------------- how programs share a tensor


@dataclass(frozen=True)
class _Shares:
    """Of a dense tensor (B, C, D, H, W): programs for each split, block of channels, and element of the batch."""

    grid: tuple[int, int, int]
    sizes: dict[str, int]  # that every kernel is told
    shapes: dict[str, int | bool]  # for which it is compiled

    def run(self, kernel, *arguments: Tensor) -> None:
        kernel[self.grid](*arguments, **self.sizes, **self.shapes, num_warps=WARPS)


def _shares(x: Tensor, programs: int) -> _Shares:
    batch, channels, voxels, last = *x.shape[:2], x[0, 0].numel(), not x.is_contiguous()
    block_c = min(CHANNELS, triton.next_power_of_2(channels)) if last else 1
    block_v = min(TILE // block_c, triton.next_power_of_2(voxels))
    blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(voxels, block_v)
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    splits = min(SPLITS, tiles, max(1, programs * multiprocessors // (batch * blocks)))
    split = triton.cdiv(tiles, splits) * block_v
    sizes = {"channels": channels, "voxels": voxels, "split": split}
    return _Shares((triton.cdiv(voxels, split), blocks, batch), sizes, {"BLOCK_C": block_c, "BLOCK_V": block_v, "LAST": last})


def _layout(x: Tensor) -> torch.memory_format:
    """Of x, or the one that it is brought into: contiguous or channels_last_3d."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_layout(x))


def _device(x: Tensor):
    """Kernels start on the current device: make it the tensor's own."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


# ---------------------------------------------------------------- the operator


def _forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, D, H, W), and for the backward pass mean and scale (B, C)."""
    x = _dense(x)
    y, mean, scale = _outputs(x, eps)
    with _device(x):
        shares, rows = _shares(x, PROGRAMS), mean.numel()
        splits = shares.grid[0]
        means, M2s = mean.new_empty(2, rows, splits)
        shares.run(_moments, x, means, M2s)
        of_all = shares.sizes["voxels"], shares.sizes["split"], splits, eps
        _merge[(rows,)](means, M2s, mean, scale, *of_all, SPLITS=triton.next_power_of_2(splits), num_warps=1)
        shares.run(_normalise, x, mean, scale, y)
    return y, mean, scale


def _outputs(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(_dense(x)), mean, scale


def _backward(dy: Tensor, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    x = _dense(x)
    dy, dx = dy.contiguous(memory_format=_layout(x)), torch.empty_like(x)
    with _device(x):
        shares = _shares(x, PROGRAMS_BACKWARD)
        sums = mean.new_empty(2, *mean.shape, shares.grid[0])
        shares.run(_products, dy, x, mean, scale, sums)
        shares.run(_gradient, dy, x, mean, scale, sums.sum(-1), dx)
    return dx


_instance_norm = torch.library.custom_op("homelib::instance_norm", _forward, mutates_args=(), schema="(Tensor x, float eps) -> (Tensor, Tensor, Tensor)")
_instance_norm.register_fake(_outputs)
_instance_norm_backward = torch.library.custom_op(
    "homelib::instance_norm_backward", _backward, mutates_args=(), schema="(Tensor dy, Tensor x, Tensor mean, Tensor scale) -> Tensor"
)
_instance_norm_backward.register_fake(lambda dy, x, mean, scale: torch.empty_like(_dense(x)))


def _setup(ctx, inputs, output) -> None:
    x, (_, mean, scale) = inputs[0], output
    ctx.save_for_backward(x, mean, scale)  # not y, which the activation after it may change in place
    ctx.mark_non_differentiable(mean, scale)


def _autograd(ctx, dy: Tensor, *_):
    return _instance_norm_backward(dy, *ctx.saved_tensors), None


_instance_norm.register_autograd(_autograd, setup_context=_setup)

# TRITON_INTERPRET=1 makes Python functions of the kernels, on any device: for tests.
DEVICES = ("cuda",) if isinstance(_moments, triton.JITFunction) else ("cuda", "cpu")
