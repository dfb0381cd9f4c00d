"""Routing over the steps of a training: a function for `fit(..., on_validation=...)` that writes tidy tables into the run folder.

`home train --set training.log_routing=true` asks for it, on the first case that the training is validated on, else the first that it is trained on:
`watch_of` makes it of the settings. By hand, beside another function:

    fit(settings, cases, run.folder, on_validation=together(RoutingLog(run.folder, case, settings), another))

A training that is gone on with writes its later rows again, and keeps the earlier ones. Memory is that of one window (`homelib.study.routing_sums`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..paths import written_whole
from ..run.begin import OnValidation
from ..run.mixture import label_space
from .association import bits_of, lift_of
from .balance import LAYER, start_network
from .routing_sums import Sums, sums_over_windows
from .trace import LEVELS

USE, LIFT, INFORMATION = "routing.csv", "routing_lift.csv", "routing_information.csv"


class RoutingLog:
    """Measures the routing of one scan at each validation, and before the first step of a training from random weights.

    `routing.csv`: step, stage, block, level, expert, weight, won, and the layer's entropy and largest_share (see `homelib.study.balance`). Of a labelled
    scan also `routing_lift.csv`: step, stage, block, level, class, expert, weight, lift, voxels (in all windows), and `routing_information.csv`: step,
    stage, block, level, bits (mutual information of class and expert). What chance leaves of these is not measured here; step 0 is untrained.

    Args:
        folder: of the run.
        case: prepared; of the training, say. A pass over its windows each time, of the encoder alone.
        settings: of the run.
        stages, levels: which layers; None is all.
    """

    def __init__(self, folder: str | Path, case: PreparedCase, settings: Settings, *, stages: Sequence[int] | None = None, levels: Sequence[int] = LEVELS):
        self.folder, self.case, self.settings, self.stages, self.levels = Path(folder), case, settings, stages, levels
        self.class_names = label_space(settings.data).class_names

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        if self.settings.training.init_from is None and not (self.folder / USE).exists():
            self._record(0, start_network(self.settings).to(next(network.parameters()).device))
        self._record(step, network.eval())
        return {}

    def _record(self, step: int, network: nn.Module) -> None:
        use, lift, information = [], [], []
        for layer, its in sums_over_windows(network, self.case, self.settings, stages=self.stages, levels=self.levels).items():
            about = {"step": step} | dict(zip(LAYER, layer, strict=True))
            of_layer = {"entropy": its.entropy / its.voxels, "largest_share": its.largest / its.voxels}
            use += [about | {"expert": e, "weight": its.load[e] / its.voxels, "won": its.won[e] / its.voxels} | of_layer for e in range(len(its.load))]
            if its.joint.any():
                lift += [about | row for row in _by_class(its, self.class_names)]
                information.append(about | {"bits": float(bits_of(its.joint / its.joint.sum()))})
        for name, rows in ((USE, use), (LIFT, lift), (INFORMATION, information)):
            if rows:
                self._add(name, step, pd.DataFrame(rows))

    def _add(self, name: str, step: int, rows: pd.DataFrame) -> None:
        path = self.folder / name
        if path.exists():
            kept = pd.read_csv(path)
            rows = pd.concat([kept[kept["step"] < step], rows], ignore_index=True)
        with written_whole(path) as part:
            rows.to_csv(part, index=False)


def watch_of(settings: Settings, folder: str | Path, train: Sequence[PreparedCase], validation: Sequence[PreparedCase] = ()) -> OnValidation | None:
    """What `training.log_routing` asks for, to be handed to `fit` as `on_validation`; None where it is off."""
    return RoutingLog(folder, [*validation, *train][0], settings) if settings.training.log_routing else None


def read_log(folder: str | Path, name: str = USE) -> pd.DataFrame:
    """`USE`, `LIFT` or `INFORMATION` of a run. Raises UserError where it was trained without the log."""
    try:
        return pd.read_csv(Path(folder) / name)
    except FileNotFoundError:
        told = "expected one beside a run that was trained with training.log_routing=true"
        raise UserError(f"{folder}: no {name}, {told}. Train it again in a new folder.") from None


def together(*watches: OnValidation) -> OnValidation:
    """Several functions for `on_validation` as one; what they return is put together."""

    def watch(step: int, network: nn.Module) -> dict[str, float]:
        return {name: value for one in watches for name, value in one(step, network).items()}

    return watch


def _by_class(its: Sums, class_names: Sequence[str]) -> list[dict]:
    """A row a class that is there and expert: class, expert, weight (mean within the class), lift, voxels."""
    voxels, lift = its.joint.sum(1), lift_of(its.joint)
    return [
        {"class": class_names[c], "expert": e, "weight": its.joint[c, e] / voxels[c], "lift": lift[c, e], "voxels": round(float(voxels[c]))}
        for c in np.flatnonzero(voxels).tolist()
        for e in range(its.joint.shape[1])
    ]
