"""Routing over the steps of a training: a function for `fit(..., on_validation=...)` that writes tidy tables into the run folder.

    watch = RoutingLog(run.folder, case, settings)
    fit(settings, cases, run.folder, on_validation=together(watch, another))

A training that is gone on with writes its later rows again, and keeps the earlier ones.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..paths import written_whole
from ..run.begin import OnValidation
from .balance import LAYER, at_start, balance, use_of_experts
from .expert_maps import LEVELS, RoutingMaps, routing_maps
from .routing import experts_by_class

USE, LIFT = "routing.csv", "routing_lift.csv"


class RoutingLog:
    """Measures the routing of one scan at each validation, and before the first step of a training from random weights.

    `routing.csv`: step, stage, block, level, expert, weight, won, and the layer's entropy and largest_share (see `homelib.study.balance`).
    `routing_lift.csv`, of a labelled scan: step, stage, block, level, class, expert, weight, lift, voxels.

    Args:
        folder: of the run.
        case: prepared; of the training, say. A pass over its windows each time.
        settings: of the run.
        stages, levels: which layers; None is all.
    """

    def __init__(self, folder: str | Path, case: PreparedCase, settings: Settings, *, stages: Sequence[int] | None = None, levels: Sequence[int] = LEVELS):
        self.folder, self.case, self.settings, self.stages, self.levels = Path(folder), case, settings, stages, levels

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        if self.settings.training.init_from is None and not (self.folder / USE).exists():
            self._record(0, at_start(self.case, self.settings, stages=self.stages, levels=self.levels))
        self._record(step, routing_maps(network.eval(), self.case, self.settings, stages=self.stages, levels=self.levels))
        return {}

    def _record(self, step: int, maps: RoutingMaps) -> None:
        use = use_of_experts(maps).merge(balance(maps)[[*LAYER, "entropy", "largest_share"]], on=LAYER)
        self._add(USE, step, use)
        if maps.label is not None:
            tables = [
                experts_by_class(weights, maps.label, maps.class_names).assign(**dict(zip(LAYER, layer, strict=True)))
                for layer, weights in maps.experts.items()
            ]
            lift = pd.concat(tables, ignore_index=True)
            self._add(LIFT, step, lift[[*LAYER, *(name for name in lift if name not in LAYER)]])

    def _add(self, name: str, step: int, rows: pd.DataFrame) -> None:
        rows.insert(0, "step", step)
        path = self.folder / name
        if path.exists():
            kept = pd.read_csv(path)
            rows = pd.concat([kept[kept["step"] < step], rows], ignore_index=True)
        with written_whole(path) as part:
            rows.to_csv(part, index=False)


def read_log(folder: str | Path) -> pd.DataFrame:
    """`routing.csv` of a run. Raises UserError where it was trained without the log."""
    try:
        return pd.read_csv(Path(folder) / USE)
    except FileNotFoundError:
        raise UserError(f"{folder}: no {USE}, expected one beside a run that was trained with `RoutingLog`. Train it again in a new folder.") from None


def together(*watches: OnValidation) -> OnValidation:
    """Several functions for `on_validation` as one; what they return is put together."""

    def watch(step: int, network: nn.Module) -> dict[str, float]:
        return {name: value for one in watches for name, value in one(step, network).items()}

    return watch
