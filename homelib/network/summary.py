"""The network in numbers: parameters by part, and what each stage's HoME has to do."""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn

from ..config import ModelConfig
from .unet import MambaHoME, SegMamba

PARTS = {  # a parameter belongs to the first part whose mark is in its name
    "HoME": (".home.",),
    "DynamicTanh": ("_norm.alpha", "_norm.weight", "_norm.bias"),
    "Mamba": (".mamba.",),
    "GatedSpatialConv": (".gsc.",),
    "stem and downsampling": (".downsample.",),
    "decoder": ("lift.", "up.", "refine.", "head."),
}
OTHERS = "the whole network"


def parameters_by_part(network: nn.Module) -> pd.Series:
    """Number of parameters of each part of the network; they add up to all of them. Of others' networks they are all `OTHERS`."""
    ours = isinstance(network, (MambaHoME, SegMamba))
    counts = dict.fromkeys(PARTS if ours else (OTHERS,), 0)
    for name, parameter in network.named_parameters():
        counts[next(part for part, marks in PARTS.items() if any(mark in name for mark in marks)) if ours else OTHERS] += parameter.numel()
    return pd.Series(counts, name="parameters")


def on_paper(config: ModelConfig, *, home: bool = True) -> nn.Module:
    """A network without memory (device "meta"), for counting: the paper's 170 million parameters in no time."""
    with torch.device("meta"):
        return (MambaHoME if home else SegMamba)(config)


def stage_table(config: ModelConfig, patch_voxels: Sequence[int]) -> pd.DataFrame:
    """One row a stage for a patch (D, H, W): tokens, groups and fill tokens, slots of a group and of all groups, scores of each level."""
    rows = []
    for stage in range(4):
        grid = [math.ceil(size / 16) * 16 // 2 ** (stage + 1) for size in patch_voxels]
        tokens, K = math.prod(grid), config.group_size[stage]
        groups, slots = math.ceil(tokens / K), config.experts_local[stage] * config.slots_per_expert
        rows.append(
            {
                "stage": stage + 1,
                "channels": config.channels[stage],
                "grid": " x ".join(map(str, grid)),
                "tokens N": tokens,
                "group size K": K,
                "groups G": groups,
                "fill tokens": groups * K - tokens,
                "experts 1": config.experts_local[stage],
                "slots a group M": slots,
                "experts 2": config.experts_global[stage],
                "slots of all groups": groups * slots,
                "level-1 scores": groups * K * slots,
                "level-2 scores": (groups * slots) ** 2,
            }
        )
    return pd.DataFrame(rows).set_index("stage")
