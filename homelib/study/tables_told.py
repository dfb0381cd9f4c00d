"""A table on the command line: rounded numbers, and where it is wider than the terminal its columns in several tables, never a number broken in two."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

NARROWEST = 60  # characters; and what a file or a pipe is given is WIDE
WIDE = 200


def three_digits(value: float) -> str:
    """A number for a table, or a dash where there is none."""
    return "-" if np.isnan(value) else f"{value:.3g}"


def three_places(value: float) -> str:
    """Three places after the point, or a dash where there is none."""
    return "-" if np.isnan(value) else f"{value:.3f}"


def print_lines(lines: Iterable[str], console: Console) -> None:
    """As they are: what looks like markup is text."""
    for line in lines:
        console.print(line, highlight=False, markup=False)


def print_table(table: pd.DataFrame, title: str, console: Console, *, number: Callable[[float], str] = three_digits) -> None:
    """Print a table with its index as the first column; a row named `mean` is bold."""
    room = max(console.width, NARROWEST if console.is_terminal else WIDE)
    wide = console if room == console.width else Console(file=console.file, width=room)
    console.print(title, highlight=False, markup=False)
    columns = list(range(len(table.columns)))
    while columns:
        take = len(columns)
        while take > 1 and wide.measure(_drawn(table, columns[:take], number), options=wide.options.update(max_width=10_000)).maximum > room:
            take -= 1
        wide.print(_drawn(table, columns[:take], number))
        columns = columns[take:]


def _drawn(table: pd.DataFrame, columns: list[int], number: Callable[[float], str]) -> Table:
    heads = [table.index.name or "class", *(table.columns[column] for column in columns)]
    drawn = Table(*(Column(escape(str(name)).replace("_", " "), no_wrap=True) for name in heads))
    for name, row in zip(table.index, table.itertuples(index=False), strict=True):
        cells = (number(row[column]) if isinstance(row[column], float) else str(row[column]) for column in columns)
        drawn.add_row(escape(str(name)).replace("_", " "), *map(escape, cells), style="bold" if name == "mean" else "")
    return drawn
