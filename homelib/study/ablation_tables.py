"""The table of a grid: what its arms scored and cost, beside what the paper printed of the same arms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UserError
from ..run.footer import footer
from ..run.metrics import metric_of
from .paper_tables import TITLES, as_printed, notes
from .printed import Printed
from .scores import scores

PERCENT = ("1",)  # units of shares, which are told in percent


def ablation_table(
    rows: pd.DataFrame,
    metrics: Sequence[str] = ("dice", "hd95"),
    *,
    costs: pd.DataFrame | None = None,
    paper: str | None = None,
    paper_rows: Mapping[str, str] | None = None,
) -> Printed:
    """One row an arm, in the order of the rows.

    Args:
        rows: of `read_results`.
        metrics: a column each: mean over runs, with its 95 % interval; those that were not measured are left out.
        costs: index arm; its columns stand after the scores as they are.
        paper: a table of the paper, "T5", whose columns stand last.
        paper_rows: arm -> row of that table; arms without one are left out where `paper` is given.

    Raises:
        UserError: none of the metrics was measured, or a row that the paper's table does not have.
    """
    measured = [metric for metric in metrics if metric in set(rows["metric"])]
    if not measured:
        raise UserError(f"metric: found {', '.join(metrics)}, expected some of {', '.join(sorted(set(rows['metric'])))}.")
    paper_rows = paper_rows or {}
    if paper is not None:
        rows = rows[rows["arm"].isin(paper_rows)]
        if rows.empty:
            raise UserError(f"paper {paper}: no arm of these results is one of its rows; the grid's field `paper` says which are.")
    arms = list(dict.fromkeys(rows["arm"]))
    cells, marks = pd.DataFrame(index=pd.Index(arms, name="arm")), pd.DataFrame(index=pd.Index(arms, name="arm"))
    for metric in measured:
        found, name = scores(rows, metric).set_index("arm"), _heading(metric)
        cells[name] = [_interval(metric, *found.loc[arm, ["mean", "low", "high"]]) for arm in arms]
        marks[name] = found["mark"].reindex(arms)
    runs = scores(rows, measured[0]).set_index("arm")["runs"]
    cells["runs"] = runs.reindex(arms).astype(str)
    if costs is not None:
        for column in costs:
            cells[column] = [_number(value) for value in costs[column].reindex(arms)]
    told = footer(rows, measured, by="arm")
    if paper is not None:
        printed = as_printed(paper)
        if unknown := [row for arm, row in paper_rows.items() if arm in arms and row not in printed.index]:
            raise UserError(f"paper {paper}: no row {unknown[0]!r}, expected one of {'; '.join(printed.index)}.")
        for column in printed:
            cells[f"paper: {column}"] = [_number(printed.loc[paper_rows[arm], column]) for arm in arms]
        told = (*told, *(f"Paper, {note}." for note in notes(paper)))
    marks = marks.reindex(columns=cells.columns, fill_value="")
    about = f" and the paper's Table {paper[1:]} ({TITLES[paper]})" if paper is not None else ""
    return Printed(cells, marks, f"Mean over runs, with its 95 % interval{about}", told)


def paper_table(table: str) -> Printed:
    """A table of the paper as it is printed there, with a note where it contradicts itself."""
    cells = as_printed(table).map(_number)
    return Printed.plain(cells, f"The paper's Table {table[1:]}: {TITLES[table]}", tuple(f"{note}." for note in notes(table)))


def _heading(metric: str) -> str:
    unit = metric_of(metric).unit
    return f"{metric} {'%' if unit in PERCENT else unit}"


def _interval(metric: str, mean: float, low: float, high: float) -> str:
    factor = 100 if metric_of(metric).unit in PERCENT else 1
    if np.isnan(mean):
        return "-"
    return f"{factor * mean:.1f}" + ("" if np.isnan(low) else f" ({factor * low:.1f} to {factor * high:.1f})")


def _number(value: Any) -> str:
    if not isinstance(value, (int, float, np.number)):
        return str(value)
    value = float(value)
    return "-" if np.isnan(value) else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
