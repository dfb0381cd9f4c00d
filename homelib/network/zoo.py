"""Every network that the tables compare, by name, with one settings form: classes, channels in, patch, and `model.width` for those of others.

Ours are made of all of `ModelConfig`; a network of others of its channels in and out alone, and of `width`, its narrowest channels, where that is not
as published. Each takes a volume of any size: it is filled with zeros up to what the network divides by, and cut again. Methods of the paper's tables
that are not here (Hermes, Swin SMT, VSmTrans, uC 3DU-Net) have rows of its numbers in `study/paper`; VoCo and SuPreM are weights of Swin UNETR
(`swin_weights`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from monai.networks import nets
from torch import Tensor, nn

from ..axes import three
from ..config import ModelConfig
from ..errors import UserError
from .layers import convert_conv3d
from .plain import plain_unet
from .unet import MambaHoME, SegMamba

Patch = tuple[int, int, int]
NNUNET_CHANNELS = (32, 64, 128, 256, 320)  # then 320 again
FEWEST_VOXELS = 4  # along an axis of the deepest stage, in nnU-Net's plans


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    build: from the model's settings and the training patch. width: its narrowest channels as published, None where there is no such choice.
    divides: of what `width` must be a multiple. source: where it comes from, and in which form. paper_millions: parameters in the paper's Table 1.
    """

    build: Callable[[ModelConfig, Patch], nn.Module]
    source: str
    width: int | None = None
    divides: int = 1
    paper_millions: float | None = None


class AnySize(nn.Module):
    """Before a network class of others, (B, C, D, H, W) -> logits (B, classes, D, H, W): an input of any size is filled with zeros at the end of each axis, and
    the output cut."""

    multiples: Patch = (16, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        D, H, W = x.shape[2:]
        lacking = [-size % multiple for size, multiple in zip(x.shape[2:], self.multiples, strict=True)]
        if all(size <= multiple for size, multiple in zip(x.shape[2:], self.multiples, strict=True)):
            lacking[-1] += self.multiples[-1]  # a norm needs more than one voxel
        filled = F.pad(x, [n for size in reversed(lacking) for n in (0, size)]) if any(lacking) else x
        return super().forward(filled)[..., :D, :H, :W]


class SwinUNETR(AnySize, nets.SwinUNETR):
    """MONAI's, of any size."""

    multiples = (32, 32, 32)


class SegResNet(AnySize, nets.SegResNet):
    """MONAI's, of any size."""

    multiples = (8, 8, 8)


class VNet(AnySize, nets.VNet):
    """MONAI's, of any size."""


class MedNeXt(AnySize, nets.MedNeXt):
    """MONAI's, of any size."""


class DynUNet(AnySize, nets.DynUNet):
    """MONAI's, of any size."""


class UNETR(nets.UNETR):
    """MONAI's, (B, C, D, H, W) -> logits (B, classes, D, H, W), of any size up to its patch: its positions are learnt, so that every input is filled up to
    that. Raises UserError for a larger one."""

    def __init__(self, *, img_size: Patch, **sizes: Any):
        super().__init__(img_size=img_size, **sizes)
        self.whole = img_size

    def forward(self, x: Tensor) -> Tensor:
        D, H, W = x.shape[2:]
        lacking = [most - size for size, most in zip(x.shape[2:], self.whole, strict=True)]
        if min(lacking) < 0:
            raise UserError(f"input: found {D}x{H}x{W} voxels, expected at most {'x'.join(map(str, self.whole))}, the training patch, for UNETR.")
        return super().forward(F.pad(x, [n for size in reversed(lacking) for n in (0, size)]))[..., :D, :H, :W]


def build(name: str, config: ModelConfig, patch_voxels: Patch) -> nn.Module:
    """A network by its name in `ZOO`, at its random start: (B, C, D, H, W) -> logits (B, classes, D, H, W).

    Args:
        name: as in `Settings.network`.
        config: of networks of others, in_channels, out_channels and width count.
        patch_voxels: of the training; UNETR, DynUNet and ResEncUNet are planned for it.

    Raises:
        UserError: a width that the network cannot have, or a package that is not installed.
    """
    entry = ZOO[name]
    if config.width is not None and (entry.width is None or config.width % entry.divides):
        wanted = "none, for it has one form only" if entry.width is None else f"a multiple of {entry.divides} (published: {entry.width})"
        raise UserError(f"model.width: found {config.width} for network {name}, expected {wanted}.")
    return convert_conv3d(entry.build(config, patch_voxels))


def strides(patch_voxels: Patch) -> list[Patch]:
    """Strides of the stages of nnU-Net's plans for a patch: an axis is halved as long as 4 voxels are left of it. Voxels are taken as cubes.

    >>> strides((128, 128, 32))
    [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1)]
    """
    sizes, found = list(patch_voxels), [(1, 1, 1)]
    while any(size >= 2 * FEWEST_VOXELS for size in sizes):
        found.append(three(2 if size >= 2 * FEWEST_VOXELS else 1 for size in sizes))
        sizes = [-(-size // stride) for size, stride in zip(sizes, found[-1], strict=True)]
    return found


def _swin_unetr(config: ModelConfig, v2: bool) -> nn.Module:
    return SwinUNETR(in_channels=config.in_channels, out_channels=config.out_channels, feature_size=config.width or 48, use_v2=v2)


def _unetr(config: ModelConfig, patch: Patch) -> nn.Module:
    whole = three(-(-size // 16) * 16 for size in patch)
    network = UNETR(img_size=whole, in_channels=config.in_channels, out_channels=config.out_channels, feature_size=config.width or 16)
    return _unused(network, "norm_cross_attn")


def _segresnet(config: ModelConfig, patch: Patch) -> nn.Module:
    width, down, up = config.width or 32, (1, 2, 2, 4), (1, 1, 1)
    return SegResNet(init_filters=width, in_channels=config.in_channels, out_channels=config.out_channels, blocks_down=down, blocks_up=up)


def _mednext(config: ModelConfig, patch: Patch) -> nn.Module:
    ratios, blocks = (3, 4, 8, 8), (3, 4, 8, 8)
    return MedNeXt(
        init_filters=config.width or 32,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        encoder_expansion_ratio=ratios,
        decoder_expansion_ratio=ratios[::-1],
        bottleneck_expansion_ratio=8,
        kernel_size=3,
        use_residual_connection=True,
        blocks_down=blocks,
        blocks_bottleneck=8,
        blocks_up=blocks[::-1],
    )


def _vnet(config: ModelConfig, patch: Patch) -> nn.Module:
    if 16 % config.in_channels:
        raise UserError(f"model.in_channels: found {config.in_channels} for network VNet, expected a divisor of 16.")
    return VNet(in_channels=config.in_channels, out_channels=config.out_channels)


def _dynunet(config: ModelConfig, patch: Patch) -> nn.Module:
    steps = strides(patch)
    network = DynUNet(
        spatial_dims=3,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        kernel_size=[(3, 3, 3)] * len(steps),
        strides=steps,
        upsample_kernel_size=steps[1:],
        filters=_nnunet_channels(config, len(steps)),
    )
    network.multiples = _products(steps)
    return registered_once(network)


def _resenc_unet(config: ModelConfig, patch: Patch) -> nn.Module:
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError as error:
        raise UserError(f"network: ResEncUNet needs dynamic-network-architectures, which cannot be used ({error}): pip install 'homelib[zoo]'.") from None
    steps = strides(patch)
    network = type("ResEncUNet", (AnySize, ResidualEncoderUNet), {})(
        input_channels=config.in_channels,
        n_stages=len(steps),
        features_per_stage=_nnunet_channels(config, len(steps)),
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=steps,
        n_blocks_per_stage=[1, 3, 4, *[6] * len(steps)][: len(steps)],
        num_classes=config.out_channels,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    network.apply(network.initialize)
    network.multiples = _products(steps)
    return _unused(registered_once(network), *(f"decoder.seg_layers.{level}." for level in range(len(steps) - 2)))


def _nnunet_channels(config: ModelConfig, stages: int) -> list[int]:
    narrowest = config.width or NNUNET_CHANNELS[0]
    return [max(1, n * narrowest // NNUNET_CHANNELS[0]) for n in (*NNUNET_CHANNELS, *[NNUNET_CHANNELS[-1]] * stages)][:stages]


def _products(steps: list[Patch]) -> Patch:
    return three(math.prod(axis) for axis in zip(*steps, strict=True))


def _unused(network: nn.Module, *marks: str) -> nn.Module:
    """Parameters that the network holds and its forward pass does not use want no gradient: several processes would wait for it."""
    for name, parameter in network.named_parameters():
        if any(mark in name for mark in marks):
            parameter.requires_grad_(False)
    return network


def registered_once(network: nn.Module) -> nn.Module:
    """The network, each of its modules in one place of its tree alone; elsewhere it is a plain attribute. Weights files want each tensor once, and an
    exchange of weights by name must not meet one twice. Lists and sequences keep theirs, for they run what they hold."""
    lists = (nn.Sequential, nn.ModuleList)
    everything = list(network.modules())
    seen: set[int] = {id(child) for parent in everything if isinstance(parent, lists) for child in parent.children()}
    for parent in everything:
        if not isinstance(parent, lists):
            for name, child in [*parent._modules.items()]:
                if child is not None and id(child) in seen:
                    del parent._modules[name]
                    object.__setattr__(parent, name, child)
                seen.add(id(child))
    return network


ZOO = {
    "MambaHoME": Entry(lambda config, patch: MambaHoME(config), "the paper, as its authors released it", paper_millions=170.1),
    "SegMamba": Entry(
        lambda config, patch: SegMamba(config),
        "the same without HoME, and so without the MLPs on the skips of SegMamba's own code, 0.78 M",
        paper_millions=66.8,
    ),
    "UNet": Entry(lambda config, patch: plain_unet(config), "MONAI's BasicUNet, as many parameters as MambaHoME"),
    "SwinUNETR": Entry(lambda config, patch: _swin_unetr(config, True), "MONAI, version 2", width=48, divides=12, paper_millions=72.8),
    "SwinUNETR-V1": Entry(lambda config, patch: _swin_unetr(config, False), "MONAI, version 1; SuPreM's form", width=48, divides=12, paper_millions=62.2),
    "UNETR": Entry(_unetr, "MONAI, as published: ViT-B", width=16),
    "SegResNet": Entry(_segresnet, "MONAI, blocks 1 2 2 4", width=32, divides=8),
    "DynUNet": Entry(_dynunet, "MONAI: nnU-Net's network, planned by the patch", width=32),
    "ResEncUNet": Entry(_resenc_unet, "dynamic-network-architectures: nnU-Net's ResEnc M, planned by the patch", width=32),
    "MedNeXt": Entry(_mednext, "MONAI: MedNeXt-L, kernel 3", width=32),
    "VNet": Entry(_vnet, "MONAI, as published"),
}
