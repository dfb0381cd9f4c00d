"""A plain U-Net with as many parameters as Mamba-HoME: what the same budget buys without Mamba and without experts."""

import torch
from monai.networks.nets import BasicUNet
from torch import nn

from ..config import ModelConfig
from .summary import on_paper

LEVELS = (1, 1, 2, 4, 8, 1)  # channels of MONAI's five levels and of the last decoder level, as multiples of the narrowest


def plain_unet(config: ModelConfig) -> nn.Module:
    """MONAI's BasicUNet, (B, C, D, H, W) -> logits (B, classes, D, H, W) of any size from 16, as wide as comes nearest to the parameters of MambaHoME."""
    wanted = _parameters(on_paper(config))
    low, high = 1, 2
    while _parameters(_wide(config, high)) < wanted:
        low, high = high, 2 * high
    width = min(range(low, high + 1), key=lambda width: abs(_parameters(_wide(config, width)) - wanted))
    return _unet(config, width)


def _wide(config: ModelConfig, width: int) -> nn.Module:
    with torch.device("meta"):
        return _unet(config, width)


def _unet(config: ModelConfig, width: int) -> nn.Module:
    return BasicUNet(3, config.in_channels, config.out_channels, features=[width * level for level in LEVELS])


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
