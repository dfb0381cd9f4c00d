"""The tables behind a grid's figures (`homelib.view.ablations`): scores in percent beside costs, groups beside experts, paired differences."""

import pandas as pd

from ..run.metrics import metric_of
from .grids import Grid
from .scores import by_run, differences, scores


def cost_and_score(rows: pd.DataFrame, costs: pd.DataFrame, *, metric: str = "dice") -> pd.DataFrame:
    """Index arm; mean, low, high of the metric (shares in percent), and the costs, for arms that have both."""
    table = scores(rows, metric).set_index("arm")[["mean", "low", "high"]] * _factor(metric)
    return table.join(costs, how="inner")


def groups_and_experts(rows: pd.DataFrame, grid: Grid, *, metric: str = "dice") -> pd.DataFrame:
    """Columns group, experts (as labels) and value (mean over runs, shares in percent): one row an arm of MambaHoME, in the order of their sizes."""
    means, found = by_run(rows, metric).mean() * _factor(metric), []
    for arm, value in means.items():
        settings = grid.settings(arm)
        model = settings.model
        if settings.network == "MambaHoME" and not model.changed_switches:
            sizes = (model.group_size, (model.experts_local, model.experts_global))
            group, experts = _label(model.group_size), f"{_label(model.experts_local)} / {_label(model.experts_global)}"
            found.append((sizes, {"group": group, "experts": experts, "value": float(value)}))
    by_experts = sorted(found, key=lambda item: item[0][1])
    return pd.DataFrame([line for _, line in sorted(by_experts, key=lambda item: item[0][0])], columns=["group", "experts", "value"])


def paired(rows: pd.DataFrame, *, against: str, metric: str = "dice") -> pd.DataFrame:
    """`scores.differences`, shares in percent."""
    table = differences(rows, metric, against=against)
    columns = ["difference", "low", "high"]
    table[columns] = table[columns] * _factor(metric)
    return table


def _factor(metric: str) -> float:
    return 100.0 if metric_of(metric).unit == "1" else 1.0


def _label(sizes: tuple[int, ...]) -> str:
    return " ".join(map(str, sizes))
