"""What notebook 05 reads of a grid: where its results are, and its arms as tables for the figures of `homelib.view.ablations`."""

from pathlib import Path

import pandas as pd

from .ablation_figures import paired
from .costs import parameter_count
from .grids import Grid
from .scores import scores

COMMITTED = Path(__file__).parent / "results"  # <grid>/results.csv, runs.csv and plan.json, as `home ablate collect` has left them
TOOK = {"training_seconds": "training, seconds", "peak_gib": "memory, GiB"}  # columns of runs.csv


def committed(grid: Grid) -> Path | None:
    """The folder of results that were made before and are part of the workbook; None where a grid has none."""
    folder = COMMITTED / grid.name
    return folder if (folder / "results.csv").exists() else None


def costs_and_scores(rows: pd.DataFrame, grid: Grid, folder: Path) -> pd.DataFrame:
    """Index arm; mean Dice in percent with its interval (mean, low, high), parameters, and what the runs took by `runs.csv`."""
    found = scores(rows, "dice").set_index("arm")
    table = found[["runs"]].join(100 * found[["mean", "low", "high"]])
    table["parameters, million"] = [parameter_count(grid.settings(arm)) / 1e6 for arm in table.index]
    if (file := folder / "runs.csv").exists():
        took = pd.read_csv(file, dtype={"arm": str}).groupby("arm")[list(TOOK)].mean().reindex(table.index).rename(columns=TOOK)
        table = table.join(took.dropna(axis="columns", how="all"))
    return table


def beside_baseline(rows: pd.DataFrame, grid: Grid) -> pd.DataFrame:
    """Each arm's paired difference to the baseline in points of Dice, as `scores.differences` gives it."""
    return paired(rows, against=grid.compared_with)


def experts_and_groups(rows: pd.DataFrame, grid: Grid) -> pd.DataFrame:
    """Mean Dice in percent of the arms that differ from the baseline in numbers of experts and group sizes alone: columns experts, group, value."""
    means = 100 * scores(rows, "dice").set_index("arm")["mean"]
    axes = {"experts_local", "experts_global", "group_size"}
    rest = {arm: _without(grid, arm, axes) for arm in means.index}
    alike = [arm for arm in means.index if rest[arm] == rest.get(grid.compared_with)]
    lines = []
    for arm in alike:
        model = grid.settings(arm).model
        experts = f"{_joined(model.experts_local)} / {_joined(model.experts_global)}"
        lines.append({"experts": experts, "group": _joined(model.group_size), "value": means[arm]})
    return pd.DataFrame(lines, columns=["experts", "group", "value"])


def _without(grid: Grid, arm: str, axes: set[str]) -> dict:
    return grid.settings(arm).model_dump(mode="json", exclude={"model": axes})


def _joined(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
