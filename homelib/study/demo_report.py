"""What `home demo` says at the end: the result table, and the paths to open."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..run.folder import Run
from .tables import dice_table
from .workbook import Executed

TITLES = {"test": "the patient that the network never saw", "train": "the patient it was trained on"}


def report(folder: Path, done: Sequence[Executed], console: Console) -> None:
    """Print the Dice tables of the runs below `folder/training`, how each notebook ended, and where to look."""
    for run in [Run(path.parent) for path in sorted((folder / "training").glob("*/metrics.csv"))]:
        print_dice(run, console)
    ended = Table("notebook", "minutes", "ended", "open")
    for notebook in done:
        ended.add_row(notebook.name, f"{notebook.seconds / 60:.1f}", notebook.error or "ok", str(notebook.html or notebook.notebook))
    console.print(ended)


def print_dice(run: Run, console: Console) -> None:
    """The run's Dice tables, test patient first."""
    for role, title in TITLES.items():
        table = dice_table(run.metrics, role=role)
        shown = Table("class", *table.columns, title=f"{run.folder}: Dice in percent, {title}", title_justify="left")
        for name, row in zip(table.index, table.itertuples(index=False), strict=True):
            shown.add_row(name, *(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row), style="bold" if name == "mean" else "")
        console.print(shown)
