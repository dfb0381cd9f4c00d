"""What the notebooks 05 and 07 and `home tables` read of a grid: where its results are, and its arms as tables for figures (`homelib.view.ablations`)."""

import json
from pathlib import Path

import pandas as pd

from ..errors import UserError
from .collect import MADE, RESULTS, TOOK
from .grids import Grid
from .scores import differences, scores

COMMITTED = Path(__file__).parent / "results"  # <grid>/: results.csv, runs.csv, made.json and plan.json, as `home ablate collect` has left them
COSTS = {"parameters_m": "parameters M", "gflops": "GFLOPs", "training_seconds": "training s", "steps_gib": "peak GiB"}  # of runs.csv, each with its unit
SIZES = {"experts_local", "experts_global", "group_size"}


def committed(grid: Grid) -> Path | None:
    """The folder of results that were made before and are part of the workbook; None where a grid has none."""
    folder = COMMITTED / grid.name
    return folder if (folder / RESULTS).exists() else None


def how_made(grid: Grid, folder: Path | None) -> str:
    """In a line: by which command the results in a folder were made, and how long it took; or by which they would be. Raises UserError: no record of it."""
    if folder is None:
        return f"No results of {grid.name} are committed. The commands that make them: home ablate run {grid.name}; home ablate collect {grid.name}"
    try:
        made = json.loads((folder / MADE).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MADE} there; `home ablate collect` writes it beside {RESULTS}.") from None
    took = f"{made['runs']} runs in {made['minutes']:.0f} minutes, from {made['began']} to {made['ended']}"
    return f"{grid.name}: made by {made['command']}; home ablate collect {grid.name}. {took}. {made['environment']}"


def costs(rows: pd.DataFrame, grid: Grid, folder: Path) -> pd.DataFrame:
    """Index arm, as the rows have them; parameters M and GFLOPs of a forward pass over one patch, and, means over runs, training s and peak GiB (the most
    memory while it trained): by `runs.csv`, as far as it tells. Parameters and FLOPs are counted here where it does not.

    Raises UserError: an arm that the grid does not have.
    """
    arms = pd.Index(dict.fromkeys(rows["arm"]), name="arm")
    if unknown := [arm for arm in arms if arm not in grid.arms]:
        raise UserError(f"--grid: {grid.name} has no arm {unknown[0]!r}, which the results have; give the grid that they are of.")
    told = pd.read_csv(folder / TOOK, dtype={"arm": str}) if (folder / TOOK).exists() else pd.DataFrame({"arm": []})
    table = told.groupby("arm")[[name for name in COSTS if name in told]].mean().reindex(arms).rename(columns=COSTS)
    counted = [name for name in ("parameters M", "GFLOPs") if name not in table or table[name].isna().any()]
    if counted:
        from .costs import costs_of  # which imports PyTorch

        table[counted] = costs_of({arm: grid.settings(arm) for arm in arms})[counted]
    return table[[name for name in COSTS.values() if name in table]]


def costs_and_scores(rows: pd.DataFrame, grid: Grid, folder: Path) -> pd.DataFrame:
    """Index arm; mean Dice in percent with its interval (mean, low, high), and the costs that are known."""
    found = scores(rows, "dice").set_index("arm")
    table = found[["runs"]].join(100 * found[["mean", "low", "high"]])
    return table.join(costs(rows, grid, folder).dropna(axis="columns", how="all"))


def beside_baseline(rows: pd.DataFrame, grid: Grid) -> pd.DataFrame:
    """Each arm's paired difference to the baseline in points of Dice, as `scores.differences` gives it."""
    table, columns = differences(rows, "dice", against=grid.compared_with), ["difference", "low", "high"]
    return table.assign(**{name: 100 * table[name] for name in columns})


def experts_and_groups(rows: pd.DataFrame, grid: Grid) -> pd.DataFrame:
    """Mean Dice in percent of the arms that differ from the baseline in numbers of experts (rows, both levels) and group sizes (columns) alone, both from
    the smallest on; NaN where no arm has both."""
    means = 100 * scores(rows, "dice").set_index("arm")["mean"]
    rest = {arm: grid.settings(arm).model_dump(mode="json", exclude={"model": SIZES}) for arm in means.index}
    models = {arm: grid.settings(arm).model for arm in means.index if rest[arm] == rest.get(grid.compared_with)}
    cells = {((model.experts_local, model.experts_global), model.group_size): means[arm] for arm, model in models.items()}
    experts, groups = sorted({both for both, _ in cells}), sorted({group for _, group in cells})
    values = [[cells.get((both, group), float("nan")) for group in groups] for both in experts]
    index = pd.Index([" / ".join(map(_joined, both)) for both in experts], name="experts")
    return pd.DataFrame(values, index=index, columns=pd.Index(map(_joined, groups), name="group"))


def _joined(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
