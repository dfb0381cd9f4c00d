"""The token layers that the settings ask for: Mamba and HoME as released, or what a switch of the ablation puts in their place."""

from typing import Any

import torch

from ..config import ModelConfig
from .equations import EquationHoME
from .home import HoME
from .mamba import MambaMixer
from .mlp import PlainMLP


def mixer_of(config: ModelConfig, stage: int) -> MambaMixer | None:
    """Of a layer of a stage; None where the settings leave Mamba out."""
    if config.mixer == "none":
        return None
    return MambaMixer(
        config.channels[stage],
        state_dim=config.state_dim,
        conv_width=config.conv_width,
        expand=config.expand,
        backend=config.scan_backend,
        direction=config.scan_direction,
    )


def home_of(config: ModelConfig, stage: int) -> HoME | PlainMLP:
    """HoME of a layer of a stage: released, without level 2, by the paper's equations, or a plain MLP of equal parameters."""
    channels, glu = config.channels[stage], config.expert_glu
    if config.home == "mlp":
        return PlainMLP(channels, parameters=_parameters_of_home(config, stage), glu=glu)
    sizes: dict[str, Any] = {
        "group_size": config.group_size[stage],
        "experts_local": config.experts_local[stage],
        "slots_per_expert": config.slots_per_expert,
        "experts_global": None if config.home == "local" else config.experts_global[stage],
        "expert_mult": config.expert_mult,
        "expert_glu": glu,
        "group_order": config.group_order,
    }
    if config.home == "equations":
        return EquationHoME(channels, **sizes)
    return HoME(channels, **sizes, mask_padding=config.mask_padding, dispatch=config.dispatch)


def _parameters_of_home(config: ModelConfig, stage: int) -> int:
    with torch.device("meta"):
        home = home_of(config.model_copy(update={"home": "released"}), stage)
    return sum(parameter.numel() for parameter in home.parameters())
