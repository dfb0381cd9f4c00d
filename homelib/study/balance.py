"""How the work is shared out among experts: who is used how much, how evenly, how sharply; beside what it is at a random start.

    load[e]        mean over voxels of the weight of e
    entropy        mean over voxels of the entropy of a voxel's weights, over log E      0: one expert each, 1: all alike (nothing is routed)
    largest_share  mean over voxels of the largest weight
    load_entropy   entropy of the load, over log E                                       1: all experts do as much
    load_cv        standard deviation of the load over its mean                          0: all experts do as much
    busiest        largest load, times E                                                 1: all experts do as much

Neither alone is specialisation: routing that is even everywhere has a balanced load too.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..run.checkpoint import build_network
from .expert_maps import LEVELS, RoutingMaps, routing_maps

MEASURES = ("entropy", "largest_share", "load_entropy", "load_cv", "busiest")
LAYER = ["stage", "block", "level"]


def use_of_experts(maps: RoutingMaps) -> pd.DataFrame:
    """One row an expert of every layer: stage, block, level, expert, weight (its load), won (share of voxels where it has the largest weight)."""
    rows = []
    for layer, weights in maps.experts.items():
        load, won, _, _ = _over_voxels(weights)
        rows += [dict(zip(LAYER, layer, strict=True)) | {"expert": e, "weight": load[e], "won": won[e]} for e in range(len(weights))]
    return pd.DataFrame(rows)


def balance(maps: RoutingMaps, start: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row a layer: stage, block, level, experts and the measures above; with `start`, each beside what it is there (`entropy_start`, ...).

    Args:
        maps: of a trained network.
        start: the same table of the same scan, by a network at its random start (`at_start`), whose maps need not be kept for it.
    """
    rows = []
    for layer, weights in maps.experts.items():
        E = len(weights)
        load, _, entropy, largest = _over_voxels(weights)
        spread = -(load[load > 0] * np.log(load[load > 0])).sum() / np.log(max(E, 2))
        values = (entropy, largest, spread, load.std() / load.mean(), load.max() * E)
        rows.append(dict(zip(LAYER, layer, strict=True)) | {"experts": E} | dict(zip(MEASURES, map(float, values), strict=True)))
    table = pd.DataFrame(rows)
    return table if start is None else table.merge(start.drop(columns="experts"), on=LAYER, how="left", suffixes=("", "_start"))


def start_network(settings: Settings) -> nn.Module:
    """The run's network with random weights, drawn from the run's seed as a training draws them; in eval mode. torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.training.seed)
        return build_network(settings).eval()


def at_start(
    case: PreparedCase,
    settings: Settings,
    *,
    stages: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    levels: Sequence[int] = LEVELS,
    slots: bool = False,
    on_window: Callable[[int], None] = lambda count: None,
) -> RoutingMaps:
    """Maps of the run's network as it was before training (`start_network`). Arguments as `routing_maps`."""
    device = torch.device("cuda" if settings.training.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    network = start_network(settings).to(device)
    return routing_maps(network, case, settings, stages=stages, blocks=blocks, levels=levels, slots=slots, on_window=on_window)


def _over_voxels(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Of (E, D, H, W): load (E,), share of voxels won (E,), mean entropy, mean largest share. Plane by plane, in float32: maps are kept in half."""
    E, voxels = len(weights), weights[0].size
    load, won, entropy, largest = np.zeros(E), np.zeros(E), 0.0, 0.0
    for plane in np.moveaxis(weights, 1, 0):
        plane = plane.astype(np.float32)
        load += plane.sum((1, 2), dtype=float)
        won += np.bincount(plane.argmax(0).ravel(), minlength=E)
        largest += float(plane.max(0).sum(dtype=float))
        entropy -= float((plane * np.log(np.maximum(plane, 1e-12))).sum(dtype=float))
    return load / voxels, won / voxels, entropy / voxels / np.log(max(E, 2)), largest / voxels
