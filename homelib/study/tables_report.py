"""What `home tables` prints: of runs, of a grid, of the paper, or of a grid beside the paper."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..errors import UserError
from ..run.folder import Run
from ..run.footer import footer
from .ablation_tables import ablation_table
from .arms import costs as costs_of_arms
from .grids import Grid, load_grid
from .printed import Printed
from .scores import read_results
from .tables import dice_table


def is_grid(folder: Path) -> bool:
    """Whether a folder is that of a grid, or a file that of its results."""
    return folder.suffix == ".csv" or (folder / "results.csv").exists() or (folder / "plan.json").exists()


def grid_table(
    folder: Path, *, metrics: Sequence[str] = ("dice", "hd95"), paper: str | None = None, grid: str | Grid | None = None, costs: bool = False
) -> Printed:
    """A grid's table.

    Args:
        folder: with `results.csv`, or that file.
        metrics: columns.
        paper: the paper's table beside it.
        grid: itself, or its name or file, where the folder does not tell, or tells one that is not shipped.
        costs: of every arm, as `arms.costs` gives them.

    Raises:
        UserError: no results, or an arm that the grid does not have.
    """
    rows = read_results(folder)
    about = _grid_of(folder, grid) if paper is not None or costs else None
    beside = about.paper.get(paper, {}) if about is not None and paper is not None else None
    told = costs_of_arms(rows, about, folder.parent if folder.suffix == ".csv" else folder) if costs and about is not None else None
    return ablation_table(rows, metrics, costs=told, paper=paper, paper_rows=beside)


def run_tables(folder: Path) -> list[Printed]:
    """Dice of a run on the demo's patients, by class and method."""
    run = Run.open(folder)
    tables = []
    for role, told in (("test", "a patient it never saw"), ("train", "the patient it was trained on")):
        table = dice_table(run.metrics, role=role)
        cells = table.map(lambda value: "-" if pd.isna(value) else f"{value:.1f}" if isinstance(value, float) else str(value))
        notes = footer(run.metrics[(run.metrics["role"] == role) & (run.metrics["metric"] == "dice")], ["dice"])
        tables.append(Printed.plain(cells, f"{run.name}: Dice in percent on {told}", notes))
    return tables


def _grid_of(folder: Path, grid: str | Grid | None) -> Grid:
    if grid is not None:
        return grid if isinstance(grid, Grid) else load_grid(grid)
    plan = (folder.parent if folder.suffix == ".csv" else folder) / "plan.json"
    if not plan.exists():
        raise UserError(f"--grid: {plan} is not there to tell which grid this is; give its name or its file.")
    try:
        return load_grid(json.loads(plan.read_text())["grid"])
    except (ValueError, KeyError):
        raise UserError(f"{plan}: cannot be read as a plan; give the grid by --grid.") from None
