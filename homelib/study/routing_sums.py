"""What the experts of a whole scan do in sum, window by window on the grid of tokens: no map of the scan exists, so that it can be asked for over a training.

    joint[c,e] = mean over labelled voxels of [class = c] weight of e        load[e] = mean over voxels of the weight of e

A token is a cube of voxels: how many of them are of a class, that many times it counts for the class. Windows are those of the prediction, but where
they overlap each tells what was decided in it; a map (`homelib.study.expert_maps`) is their blend. So the numbers are near those of a map and not the same.

C classes, E experts of a layer; (d, h, w) the grid of a stage's tokens in one window.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import IGNORE, Settings
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..network.unet import pad
from ..run.mixture import label_space
from ..run.predict import device_of, seen_at, windows_of
from ..run.sliding import cut
from .expert_maps import Layer, experts_of, layers_of
from .trace import LEVELS, entropy, stages_of, trace_routing


class Sums:
    """Of one layer, over the voxels of all windows that lie within the scan.

    joint: (C, E) sums of weights by class. load: (E,) of weights. won: (E,) voxels. entropy, largest: sums over voxels of each token's. voxels: how many.
    """

    def __init__(self, classes: int, experts: int):
        self.joint, self.load, self.won = np.zeros((classes, experts)), np.zeros(experts), np.zeros(experts)
        self.entropy = self.largest = self.voxels = 0.0

    def add(self, weights: Tensor, inside: Tensor, classes: dict[int, Tensor]) -> None:
        """A window's weights (E, d, h, w), the voxels of each token within the scan (d, h, w), and those of each class that is there."""
        self.load += (weights * inside).sum((1, 2, 3), dtype=torch.float64).cpu().numpy()
        self.won += torch.bincount(weights.argmax(0).ravel(), inside.ravel(), minlength=len(weights)).double().cpu().numpy()
        self.entropy += float((entropy(weights, 0) * inside).sum(dtype=torch.float64))
        self.largest += float((weights.amax(0) * inside).sum(dtype=torch.float64))
        self.voxels += float(inside.sum(dtype=torch.float64))
        for index, voxels in classes.items():
            self.joint[index] += (weights * voxels).sum((1, 2, 3), dtype=torch.float64).cpu().numpy()


@torch.inference_mode()
def sums_over_windows(
    network: nn.Module, case: PreparedCase, settings: Settings, *, stages: Sequence[int] | None = None, levels: Sequence[int] = LEVELS
) -> dict[Layer, Sums]:
    """The sums of the chosen layers over a scan, in one pass over its windows, one at a time and without mirrors.

    Args:
        network: MambaHoME, in eval mode.
        case: prepared; its volumes may lie in a file. Without a label, or where none is known, joint is zero.
        settings: of the run: patch and overlap.
        stages, levels: which layers; None is all.

    Raises:
        UserError: a network without HoME; a stage or level that it does not have.
    """
    layers, space, data_set = layers_of(network, stages, None, levels), label_space(settings.data), load_manifest(case.case.manifest).name
    watched, device = sorted({layer[0] for layer in layers}), device_of(network)
    windows, sums = windows_of(case, settings), {layer: Sums(len(space.class_names), experts_of(network, layer)) for layer in layers}
    everywhere = np.broadcast_to(np.float32(1), windows.shape)
    with trace_routing(network, watched, levels=sorted({1, *levels})) as trace:
        for corner in itertools.product(*windows.starts):
            h = pad(seen_at(case, windows, corner).to(device))
            for stage in stages_of(network)[: watched[-1] + 1]:
                h = stage(h)
            inside = _by_token(cut(everywhere, windows, [corner], prepare=np.asarray, beyond=0).to(device), watched)
            classes = {}
            if case.label is not None:
                label = cut(case.label, windows, [corner], prepare=lambda part: space.to_union(np.asarray(part), data_set), beyond=IGNORE).to(device)
                present = [int(index) for index in label.unique() if index != IGNORE]
                classes = {index: _by_token((label == index).float(), watched) for index in present}
            for layer, its in sums.items():
                weights = trace[layer[:2]].weights(layer[2])[0]
                its.add(weights, inside[layer[0]], {index: voxels[layer[0]] for index, voxels in classes.items()})
    return sums


def _by_token(mask: Tensor, stages: Sequence[int]) -> dict[int, Tensor]:
    """Of a mask (1, 1, *patch): stage -> (d, h, w), the voxels of every token that it has; none in what fills the window up."""
    sides = {stage: 2 ** (stage + 1) for stage in stages}
    return {stage: F.avg_pool3d(pad(mask), side)[0, 0] * side**3 for stage, side in sides.items()}
