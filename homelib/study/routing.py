"""Where every expert looks: level-1 routing weights of HoME, read by a trace and put back in their place in space.

A[b,g,k,e,s] is the weight with which token k of group g fills slot s of expert e; a token's weights sum to one. An expert's weight
at a token is the sum over its slots. A group is K consecutive tokens in raster order: a strip along the last axes of the stage's grid.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from einops import rearrange
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from ..config import Settings
from ..data.loading import window
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..network.unet import pad


@dataclass(frozen=True)
class Routing:
    """What one HoME layer decided at level 1.

    stage, block: where, from 0. assignment: A (B, G, K, E, S). grid: (D, H, W) of the stage's tokens; the last group's fill is beyond it.
    """

    stage: int
    block: int
    assignment: Tensor
    grid: tuple[int, int, int]

    @property
    def expert_weights(self) -> Tensor:
        """(B, E, D, H, W): each expert's share of every token; over the experts they sum to one."""
        D, H, W = self.grid
        weights = rearrange(self.assignment.sum(-1), "b g k e -> b e (g k)")[..., : D * H * W]
        return rearrange(weights, "b e (d h w) -> b e d h w", d=D, h=H, w=W)

    @property
    def groups(self) -> Tensor:
        """(D, H, W) int64: the group of every token."""
        D, H, W = self.grid
        return rearrange(torch.arange(D * H * W) // self.assignment.shape[2], "(d h w) -> d h w", d=D, h=H, w=W)


@dataclass
class Trace:
    """The routings of the latest forward pass, in the order of the network."""

    routings: list[Routing] = field(default_factory=list)

    def __getitem__(self, place: tuple[int, int]) -> Routing:
        """`trace[stage, block]`."""
        for routing in self.routings:
            if (routing.stage, routing.block) == place:
                return routing
        raise KeyError(f"stage, block: found {place}, expected one of {[(r.stage, r.block) for r in self.routings]}")


@contextmanager
def trace_routing(network: nn.Module, *, stages: Sequence[int] | None = None) -> Iterator[Trace]:
    """Watch the routers of a network while the block runs. The forward pass is unchanged, and nothing is left behind.

    Args:
        network: MambaHoME.
        stages: to watch, from 0; None is all.

    Raises:
        UserError: a network without HoME, or a stage that it does not have.

    >>> with trace_routing(network, stages=[0]) as trace:   # doctest: +SKIP
    ...     network(image)
    >>> trace[0, 0].expert_weights.shape   # doctest: +SKIP
    torch.Size([1, 4, 32, 24, 24])
    """
    if not getattr(network, "with_home", False):
        raise UserError(f"network: found {type(network).__name__}, expected a MambaHoME; only HoME routes.")
    if other := [name for name in ("home", "dispatch", "group_order") if name in network.config.changed_switches]:
        raise UserError(f"model.{other[0]}: found {getattr(network.config, other[0])!r}, expected the released form; routing is traced in that alone.")
    watched = range(len(network.stages)) if stages is None else stages
    trace, hooks, grids = Trace(), [], {}

    def start(module, args):
        trace.routings.clear()

    def see_grid(stage: int):
        def hook(module, args, output):
            grids[stage] = tuple(output.shape[2:])

        return hook

    def see_assignment(stage: int, block: int):
        def hook(module, args, A):
            if (stage, block) not in {(r.stage, r.block) for r in trace.routings}:  # a checkpointed block computes it again in the backward pass
                trace.routings.append(Routing(stage, block, A.detach(), grids[stage]))

        return hook

    try:
        hooks.append(network.register_forward_pre_hook(start))
        for stage in watched:
            if stage not in range(len(network.stages)):
                raise UserError(f"stages: found {stage}, expected 0 to {len(network.stages) - 1}.")
            hooks.append(network.stages[stage].gsc.register_forward_hook(see_grid(stage)))
            for block, layer in enumerate(network.stages[stage].blocks):
                hooks.append(layer.home.local_router.register_forward_hook(see_assignment(stage, block)))
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def expert_maps(network: nn.Module, case: PreparedCase, settings: Settings, *, stage: int = 0, block: int = 0) -> np.ndarray:
    """Level-1 weight of every expert over the whole volume, (E, D, H, W) float32 on the prepared grid; the experts sum to one at each voxel.

    The same sliding window and the same blending as the prediction, so that a map shows what the prediction saw.
    """

    def routed(x: Tensor) -> Tensor:
        network(x)
        weights = trace[stage, block].expert_weights.float()
        weights = F.interpolate(weights, size=pad(x).shape[2:], mode="nearest")  # a token is a cube of voxels: show it as one
        return weights[..., : x.shape[2], : x.shape[3], : x.shape[4]]

    manifest, prediction = load_manifest(case.case.manifest), settings.prediction
    image = torch.from_numpy(window(case.image, manifest, case.case.modality))[None, None].to(next(network.parameters()).device)
    with trace_routing(network, stages=[stage]) as trace:
        maps = sliding_window_inference(
            image,
            settings.data.patch_voxels,
            prediction.window_batch,
            routed,
            overlap=prediction.overlap,
            mode=prediction.blend,
            cval=manifest.intensity_range[0],
        )
    return maps[0].cpu().numpy()


def experts_by_class(maps: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> pd.DataFrame:
    """Mean weight of every expert within every class, and its lift: that mean over the expert's mean in the whole volume.

    Args:
        maps: (E, D, H, W), summing to one over E.
        label: (D, H, W) class indices.
        class_names: by index.

    Returns:
        Tidy rows: class, expert, weight, lift, voxels. A lift of 1 means no association; it shows association, not cause.
    """
    overall, rows = maps.mean((1, 2, 3)), []
    for index, name in enumerate(class_names):
        mask = label == index
        if mask.any():
            weight = maps[:, mask].mean(1)
            rows += [{"class": name, "expert": e, "weight": float(w), "lift": float(w / overall[e]), "voxels": int(mask.sum())} for e, w in enumerate(weight)]
    return pd.DataFrame(rows)


def utilisation(maps: np.ndarray) -> pd.DataFrame:
    """One row an expert: its mean weight, and the share of voxels that it wins; with the normalised entropy (0 hard, 1 even) of the volume's routing."""
    share = np.bincount(maps.argmax(0).ravel(), minlength=len(maps)) / maps[0].size
    entropy = -(maps * np.log(np.maximum(maps, 1e-12))).sum(0).mean() / np.log(len(maps)) if len(maps) > 1 else 0.0
    return pd.DataFrame({"expert": range(len(maps)), "mean weight": maps.mean((1, 2, 3)), "voxels won": share, "entropy": entropy})
