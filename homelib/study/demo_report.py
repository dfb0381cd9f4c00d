"""What `home demo` says at the end: the result table, and the paths to open."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ..run.folder import Run
from ..run.footer import footer
from .tables import dice_table
from .tables_told import print_lines
from .workbook import Executed

TITLES = {"test": "the patient that the network never saw", "train": "the patient it was trained on"}


def report(folder: Path, done: Sequence[Executed], console: Console) -> None:
    """Print the Dice tables of the runs below `folder/training`, how each notebook ended, and where to look."""
    for run in [Run(path.parent) for path in sorted((folder / "training").glob("*/metrics.csv"))]:
        print_dice(run, console)
    ended = Table("notebook", "minutes", Column("ended", overflow="fold"))
    for notebook in done:
        ended.add_row(notebook.name, f"{notebook.seconds / 60:.1f}", escape(notebook.error or "ok"))
    console.print(ended, "To open:", sep="\n")
    for notebook in done:  # not in the table, which would cut them off in a narrow terminal
        console.print(f"  {notebook.html or notebook.notebook}", highlight=False, markup=False)


def print_dice(run: Run, console: Console) -> None:
    """The run's Dice tables, test patient first, each with its footer."""
    for role, title in TITLES.items():
        table = dice_table(run.metrics, role=role)
        origins = ", ".join(dict.fromkeys(table.pop("label origin")[:-1]))
        columns = (Column(name, overflow="fold") for name in ("class", *table.columns))
        shown = Table(*columns, title=escape(f"{run.folder}: Dice in percent, {title} (labels {origins})"), title_justify="left")
        for name, row in zip(table.index, table.itertuples(index=False), strict=True):
            cells = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in row)
            shown.add_row(name.replace("_", " "), *cells, style="bold" if name == "mean" else "")
        console.print(shown)
        print_lines(footer(run.metrics[(run.metrics["role"] == role) & (run.metrics["metric"] == "dice")], ["dice"]), console)
