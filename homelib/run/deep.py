"""Deep supervision: a loss on the decoder's coarser levels too. Its heads are trained beside the network and are no part of what is saved as weights."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import IGNORE
from ..errors import UserError
from ..network.unet import STRIDE, MambaHoME, SegMamba

LEVELS = {1: 4, 2: 2}  # decoder block -> how much coarser than the input its output is
WEIGHTS = (4 / 7, 2 / 7, 1 / 7)  # full, half, quarter resolution: each half of the one before, 1 in all (nnU-Net)


class DeeplySupervised(nn.Module):
    """A network of ours with a 1x1x1 head on two coarser decoder levels: (B, C, D, H, W) -> logits of full, half and quarter resolution.

    Raises UserError for a network without the decoder `up`.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        if not isinstance(network, (MambaHoME, SegMamba)):
            raise UserError(f"training.deep_supervision: {type(network).__name__} has no decoder that it knows, expected MambaHoME or SegMamba. Leave it off.")
        self.network = network
        channels = network.config.channels
        self.heads = nn.ModuleList(nn.Conv3d(channels[level], network.config.out_channels, 1) for level in (1, 2))  # after up.2 and up.1
        self._seen: dict[int, Tensor] = {}
        for level in LEVELS:
            network.up[level].register_forward_hook(self._keep(level))

    def _keep(self, level: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            self._seen[level] = output

        return hook

    def forward(self, x: Tensor) -> list[Tensor]:
        full = self.network(x)
        half, quarter = self.heads[0](self._seen.pop(2)), self.heads[1](self._seen.pop(1))
        return [full, half, quarter]


def coarser(label: Tensor, logits: Tensor) -> Tensor:
    """Labels (B, 1, D, H, W) on the grid of coarser logits: every second or fourth voxel; beyond the volume, where the network pads, 255."""
    D, H, W = label.shape[2:]
    pad = [n for size in (W, H, D) for n in (0, -size % STRIDE)]
    padded = F.pad(label, pad, value=IGNORE)
    factor = round(padded.shape[2] / logits.shape[2])
    padded = padded[..., ::factor, ::factor, ::factor]
    if padded.shape[2:] != logits.shape[2:]:  # the smallest cube is padded further
        padded = F.pad(padded, [n for a, b in zip(reversed(logits.shape[2:]), reversed(padded.shape[2:]), strict=True) for n in (0, a - b)], value=IGNORE)
    return padded


def core(module: nn.Module) -> nn.Module:
    """The network itself, whose weights are saved and which predicts."""
    return module.network if isinstance(module, DeeplySupervised) else module


def over_levels(
    loss: Callable[[Tensor, Tensor, Tensor | None], Tensor], logits: Tensor | list[Tensor], label: Tensor, labelled: Tensor | None
) -> Tensor:
    """`loss(logits, label, labelled)`, or its weighted sum over the levels of deep supervision: of logits (B, C, D, H, W), label (B, 1, D, H, W) at full
    resolution, and labelled (B, C)."""
    if isinstance(logits, Tensor):
        return loss(logits, label, labelled)
    losses = [loss(level, label if index == 0 else coarser(label, level), labelled) for index, level in enumerate(logits)]
    return torch.stack([weight * one for weight, one in zip(WEIGHTS, losses, strict=True)]).sum()
