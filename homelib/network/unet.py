"""The U-shaped network: MambaHoME (paper section 2.4), and SegMamba, the same without HoME.

    stage i:  downsample, GatedSpatialConv once, then `depth` times  t = t + Mamba(DyT(t)),  t = t + HoME(DyT(t))   (Eq. 15)
    decoder:  MONAI's UNETR blocks over the four stages' outputs and the full-resolution input

This is the released form. The switches of `ModelConfig` put other things in the place of its parts (`parts`); their defaults leave it as it is.

B batch, C channels, D H W the volume's axes, N tokens of a stage in raster order (last axis fastest).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from ..errors import UserError
from .layers import Conv3d, InstanceNorm, PointwiseConv, keep_channels_last
from .order import Grid, fill_of
from .parts import home_of, mixer_of

STRIDE = 16  # of the deepest stage, over the input


class DynamicTanh(nn.Module):
    """DyT (paper Eq. 14), in place of a norm: w tanh(alpha x) + b over the last axis of (..., C); alpha is kept in [0.1, 2] as in the released code."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha.clamp(0.1, 2.0) * x) + self.bias


class GatedSpatialConv(nn.Module):
    """GSC, (B, C, D, H, W) -> same (paper Eq. 15; not defined there). The released form adds the two branches; SegMamba's paper multiplies them.

    `form`: "sum", as released; "product", the same branches multiplied; "segmamba", z + C3(C3(z) C1(z)) as SegMamba's paper writes it, of one
    convolution less. Each convolution is followed by its norm and ReLU, as released.
    """

    def __init__(self, channels: int, form: str = "sum"):
        super().__init__()
        self.multiplied = form != "sum"
        self.wide = nn.Sequential(*(conv_norm_relu(channels, 3) for _ in range(1 if form == "segmamba" else 2)))
        self.narrow = conv_norm_relu(channels, 1)
        self.fuse = conv_norm_relu(channels, 3 if form == "segmamba" else 1)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = self.wide(x), self.narrow(x)
        return x + self.fuse(wide * narrow if self.multiplied else wide + narrow)


def conv_norm_relu(channels: int, width: int) -> nn.Sequential:
    """(B, C, D, H, W) -> same; width: of the convolution's cube, in voxels."""
    convolution = PointwiseConv(channels, channels, 1) if width == 1 else Conv3d(channels, channels, width, padding=width // 2)
    return nn.Sequential(convolution, InstanceNorm(channels), nn.ReLU())


NORMS = {"dyt": DynamicTanh, "layernorm": nn.LayerNorm}


class Block(nn.Module):
    """One layer of a stage over its tokens, (B, N, C) -> (B, N, C) (paper Eq. 15). Without `home` it is SegMamba's."""

    mamba_norm: Any  # None where what follows it is
    home_norm: Any

    def __init__(self, channels: int, mamba: nn.Module | None, home: nn.Module | None, norm: str = "dyt"):
        super().__init__()
        self.mamba_norm, self.mamba = (None if mamba is None else NORMS[norm](channels)), mamba
        self.home_norm, self.home = (None if home is None else NORMS[norm](channels)), home

    def forward(self, t: Tensor, grid: Grid) -> Tensor:
        """t (B, N, C), the tokens of a volume of shape `grid` in raster order."""
        if self.mamba is not None:
            t = t + self.mamba(self.mamba_norm(t), grid)
        if self.home is not None:
            t = t + self.home(self.home_norm(t), grid)
        return t


class Stage(nn.Module):
    """Downsample, gate, then blocks over the tokens: (B, C_before, 2D, 2H, 2W) -> (B, C, D, H, W)."""

    blocks: Any  # a list of `Block`

    def __init__(self, downsample: nn.Module, channels: int, blocks: list[Block], gsc: str = "sum"):
        super().__init__()
        self.downsample = downsample
        self.gsc = nn.Identity() if gsc == "none" else GatedSpatialConv(channels, gsc)
        self.blocks = nn.ModuleList(blocks)
        self.skip_norm = InstanceNorm(channels)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.gsc(self.downsample(x))
        D, H, W = grid = tuple(x.shape[2:])
        t = rearrange(x, "b c d h w -> b (d h w) c")
        for block in self.blocks:
            t = checkpoint(block, t, grid, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(t, grid)
        return rearrange(t, "b (d h w) c -> b c d h w", d=D, h=H, w=W)


class _UShapedNetwork(nn.Module):
    with_home: bool
    stages: Any  # a list of four `Stage`

    def __init__(self, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        self.stages = nn.ModuleList(Stage(downsample(config, i), config.channels[i], self._blocks(i), config.gsc) for i in range(4))
        c, h = config.channels, config.hidden_channels
        self.lift = nn.ModuleList(_basic(a, b) for a, b in zip((config.in_channels, *c), (*c, h), strict=True))
        self.up = nn.ModuleList(_up(a, b) for a, b in ((h, c[3]), (c[3], c[2]), (c[2], c[1]), (c[1], c[0])))
        self.refine = _basic(c[0], c[0])
        self.head = PointwiseConv(c[0], config.out_channels, 1)

    def _blocks(self, i: int) -> list[Block]:
        config, blocks = self.config, []
        for _ in range(config.depths[i]):
            mixer = mixer_of(config, i)
            home = home_of(config, i) if self.with_home else None
            blocks.append(Block(config.channels[i], mixer, home, config.norm))
        return blocks

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> logits (B, classes, D, H, W). Any size: zeros are added at the end of each axis up to a multiple of 16, and cut off."""
        D, H, W = self._check(x)
        x = pad(x)
        full, *skips = (lift(level) for lift, level in zip(self.lift, [x, *self.forward_features(x)], strict=True))
        deep = skips.pop()
        for up, skip in zip(self.up, [*reversed(skips), full], strict=True):
            deep = up(deep, skip)
        return self.head(self.refine(deep))[..., :D, :H, :W]

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The four stages' normalised outputs, (B, channels[i], D / 2^(i+1), ...), of an input padded by `pad`."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(stage.skip_norm(x))
        return features

    def set_checkpointing(self, on: bool | Sequence[bool]) -> None:
        """Recompute the blocks of a stage in the backward pass instead of keeping their activations: for all stages, or one by one."""
        on_stages = (on,) * 4 if isinstance(on, bool) else tuple(on)
        if len(on_stages) != 4:
            raise UserError(f"checkpointing: found {len(on_stages)} values, expected one for all stages or one for each of the four.")
        for stage, on_stage in zip(self.stages, on_stages, strict=True):
            stage.checkpointing = on_stage

    def _check(self, x: Tensor) -> torch.Size:
        if x.dim() != 5 or x.shape[1] != self.config.in_channels or not x.numel():
            raise UserError(f"input: found shape {tuple(x.shape)}, expected (B, {self.config.in_channels}, D, H, W).")
        return x.shape[2:]


class MambaHoME(_UShapedNetwork):
    """Mamba-HoME (NeurIPS 2025), the released network exactly: (B, C, D, H, W) -> logits (B, classes, D, H, W).

    >>> network = MambaHoME(ModelConfig(channels=(8, 16, 32, 64), hidden_channels=96))
    >>> network(torch.zeros(1, 1, 40, 33, 48)).shape
    torch.Size([1, 3, 40, 33, 48])
    """

    with_home = True


class SegMamba(_UShapedNetwork):
    """The same network without HoME: the paper's baseline, with Mamba in one direction (see the README on SegMamba's three)."""

    with_home = False


def pad(x: Tensor) -> Tensor:
    """x (B, C, D, H, W) with zeros at the end of each axis up to a multiple of 16; the smallest cube gets one longer axis, for a norm needs more than one
    voxel."""
    lacking = [fill_of(size, STRIDE) for size in x.shape[2:]]
    if all(size <= STRIDE for size in x.shape[2:]):
        lacking[-1] += STRIDE
    return F.pad(x, [n for size in reversed(lacking) for n in (0, size)]) if any(lacking) else x


def downsample(config: ModelConfig, i: int) -> nn.Module:
    """To half the resolution: a 7x7x7 stem, then 2x2x2 convolutions of the normalised stage before (paper Eq. 16)."""
    if i == 0:
        return Conv3d(config.in_channels, config.channels[0], 7, stride=2, padding=3)
    return nn.Sequential(InstanceNorm(config.channels[i - 1]), Conv3d(config.channels[i - 1], config.channels[i], 2, stride=2))


def _basic(a: int, b: int) -> nn.Module:
    return keep_channels_last(UnetrBasicBlock(3, a, b, kernel_size=3, stride=1, norm_name="instance", res_block=True))


def _up(a: int, b: int) -> nn.Module:
    return keep_channels_last(UnetrUpBlock(3, a, b, kernel_size=3, upsample_kernel_size=2, norm_name="instance", res_block=True))
