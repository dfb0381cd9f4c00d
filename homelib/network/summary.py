"""The network in numbers: parameters by part, what each stage's HoME has to do, and which part's output enters which."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config import ModelConfig
from ..errors import UserError
from .scan import backends
from .unet import STRIDE, MambaHoME, SegMamba, Stage

PARTS = {  # a parameter belongs to the first part whose mark is in its name
    "HoME": (".home.",),
    "DynamicTanh": ("_norm.alpha", "_norm.weight", "_norm.bias"),
    "Mamba": (".mamba.",),
    "GatedSpatialConv": (".gsc.",),
    "stem and downsampling": (".downsample.",),
    "decoder": ("lift.", "up.", "refine.", "head."),
}
OTHERS = "the whole network"
SHAPES_SCAN = "numba"  # the scan's backend that knows the shape of its output without computing it


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
    """One row a stage, from 0 (finest), for a patch (D, H, W): tokens, groups and fill tokens, slots of a group and of all groups, scores of each level."""
    rows = []
    for stage in range(4):
        grid = [math.ceil(size / 16) * 16 // 2 ** (stage + 1) for size in patch_voxels]
        tokens, K = math.prod(grid), config.group_size[stage]
        groups, slots = math.ceil(tokens / K), config.experts_local[stage] * config.slots_per_expert
        rows.append(
            {
                "stage": stage,
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


def flow_table(config: ModelConfig, patch_voxels: Sequence[int]) -> pd.DataFrame:
    """The parts of the network in the order in which they run, and whose outputs enter each, for a patch (D, H, W).

    A forward pass is watched, on tensors that have shapes and no numbers: what stands here is what the code does.

    Returns:
        Index part, its name in the code ("scan" is the input); made_of, the classes in it; after, the parts whose outputs enter it; channels and grid (D, H, W)
        of its output; parameters.

    Raises:
        UserError: a patch that the network would fill up first, no multiple of 16.
    """
    if any(size % STRIDE for size in patch_voxels) or max(patch_voxels) <= STRIDE:
        raise UserError(f"patch: found {tuple(patch_voxels)}, expected multiples of {STRIDE}, one of them larger: the network fills up others first.")
    backends.resolve(SHAPES_SCAN)
    with torch.random.fork_rng(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        network = MambaHoME(config.model_copy(update={"scan_backend": SHAPES_SCAN})).eval()
        x = torch.empty(1, config.in_channels, *patch_voxels)
        flow = _Flow(x)
        for name, part in _parts(network).items():
            part.register_forward_hook(partial(flow.ran, name))
            if isinstance(part, Stage):
                part.skip_norm.register_forward_hook(flow.passed)
        network(x)
    return pd.DataFrame(flow.rows).set_index("part")


class _Flow:
    """What the hooks of `flow_table` see. A tensor is known by its identity: it is kept, so that no other can have it."""

    def __init__(self, x: Tensor):
        self.made: dict[int, tuple[str, Tensor]] = {}
        self.rows: list[dict] = []
        self._add("scan", x, made_of="", after=(), parameters=0)

    def ran(self, name: str, part: nn.Module, given: tuple, output: Tensor) -> None:
        after = tuple(self.made[id(x)][0] for x in given)
        self._add(name, output, made_of=_made_of(part), after=after, parameters=sum(p.numel() for p in part.parameters()))

    def passed(self, part: nn.Module, given: tuple, output: Tensor) -> None:
        """Of a norm between two parts: its output counts as that of the first."""
        self.made[id(output)] = (self.made[id(given[0])][0], output)

    def _add(self, name: str, output: Tensor, **more: Any) -> None:
        self.made[id(output)] = (name, output)
        self.rows.append({"part": name, **more, "channels": output.shape[1], "grid": tuple(output.shape[2:])})


def _parts(network: nn.Module) -> dict[str, nn.Module]:
    """The network's children, those of a list one by one: stages[0], lift[0], up[0], refine, head."""
    found: dict[str, nn.Module] = {}
    for name, child in network.named_children():
        found |= {f"{name}[{i}]": one for i, one in enumerate(child)} if isinstance(child, nn.ModuleList) else {name: child}
    return found


def _made_of(part: nn.Module) -> str:
    if not isinstance(part, Stage):
        return type(part).__name__
    block = part.blocks[0]
    layers = [type(layer).__name__ for layer in (block.mamba, block.home) if layer is not None]
    return f"{type(part.gsc).__name__}, {len(part.blocks)} x ({', '.join(layers)})"
