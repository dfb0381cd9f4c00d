"""The network beside the authors': their reference cases through our modules, with weights that go by the authors' names.

A case (tests/data/reference) holds a configuration in the authors' words, an input x, the output y of the released network, dx, the gradient of mean(y^2)
with respect to x, and the length of every parameter's gradient. They were computed with the released code in float32.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..config import ModelConfig
from ..errors import UserError
from ..network.home import HoME
from ..network.mamba import MambaMixer
from ..network.published import load_published
from ..network.unet import DynamicTanh, GatedSpatialConv, MambaHoME
from ..paths import shipped

LAYERS = ("dynamic_tanh", "gsc", "mamba_mixer", "home_layer_even", "home_layer_ragged", "home_layer_gelu")
NETWORK = "network_tiny"
TOLERANCE = 1e-4  # of the largest value


@dataclass(frozen=True)
class Case:
    """A reference case. config: in the authors' words. layout: their parameters' names and shapes. x, y, dx: arrays (B, ...), float32. norms: by name."""

    name: str
    config: dict
    layout: dict[str, list[int]]
    parameters: int
    norms: dict[str, float | None]
    x: np.ndarray
    y: np.ndarray
    dx: np.ndarray

    @classmethod
    def read(cls, name: str) -> "Case":
        """Raises UserError: no such case, or none at all."""
        told, arrays = reference_folder() / f"{name}.json", reference_folder() / f"{name}.npz"
        if not told.exists():
            raise UserError(f"reference case: found {name!r}, expected one of {', '.join((*LAYERS, NETWORK))}.")
        kept, numbers = json.loads(told.read_text()), np.load(arrays)
        return cls(name, kept["config"], kept["layout"], kept["parameters"], kept["grad_norm"], numbers["x"], numbers["y"], numbers["dx"])

    def module(self) -> nn.Module:
        """Ours, with the case's weights."""
        module = build(self.name, self.config)
        load_published(module, fill()(self.layout))
        return module


def reference_folder() -> Path:
    """Raises UserError where the cases are not there."""
    try:
        return shipped("tests/data/reference")
    except FileNotFoundError as error:
        raise UserError(str(error)) from None


def fill() -> Callable[[dict], dict[str, np.ndarray]]:
    """The function of the cases' weights: of the authors' names and shapes alone."""
    spec = importlib.util.spec_from_file_location("homelib_reference_fill", reference_folder() / "fill.py")
    assert spec is not None and spec.loader is not None  # it is a file of Python
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


def build(case: str, config: dict) -> nn.Module:
    """Our module for a case's configuration."""
    if case.startswith("dynamic_tanh"):
        return DynamicTanh(config["dim"])
    if case.startswith("gsc"):
        return GatedSpatialConv(config["channels"])
    if case.startswith("mamba_mixer"):
        return MambaMixer(config["d_model"], state_dim=config["d_state"], conv_width=config["d_conv"], expand=config["expand"])
    if case.startswith("home_layer"):
        return HoME(
            config["dim"],
            group_size=config["group_size"],
            experts_local=config["experts_first"],
            slots_per_expert=config["slots"],
            experts_global=config["experts_second"],
            expert_mult=config["expert_mult"],
            expert_glu=config["geglu"],
        )
    return MambaHoME(
        ModelConfig(
            in_channels=config["in_chans"],
            out_channels=config["out_chans"],
            depths=config["depths"],
            channels=config["feat_size"],
            hidden_channels=config["hidden_size"],
            experts_local=config["experts_list"],
            experts_global=config["experts_list_second"],
            group_size=config["group_list"],
            slots_per_expert=config["num_slots_per_expert_first"],
            expert_mult=config["expert_mult"],
            expert_glu=config["use_geglu"],
        )
    )


def largest_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value of theirs, two arrays of any shape, the same. Raises ValueError for two shapes."""
    if ours.shape != theirs.shape:
        raise ValueError(f"found {ours.shape}, expected {theirs.shape}")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def parity_table(dtype: torch.dtype = torch.float64) -> pd.DataFrame:
    """One row a reference case: our class, parameters, and the largest error of the output and of the input's gradient (both over the largest value).

    In float64, ours: in float32 one input of one LeakyReLU of the network's case lies below rounding, and its sign moves the gradient (docs/measured.md).
    """
    rows = []
    for case in map(Case.read, (*LAYERS, NETWORK)):
        module = case.module().to(dtype)
        x = torch.tensor(case.x, dtype=dtype, requires_grad=True)
        y = module(x)
        (dx,) = torch.autograd.grad(y.square().mean(), x)
        ours = sum(parameter.numel() for parameter in module.parameters())
        errors = {"error of y": largest_error(y.detach().numpy(), case.y), "error of dx": largest_error(dx.numpy(), case.dx)}
        rows.append({"case": case.name, "class": type(module).__name__, "parameters": ours, "theirs": case.parameters, **errors})
    return pd.DataFrame(rows).set_index("case")
