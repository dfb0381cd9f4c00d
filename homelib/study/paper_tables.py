"""The paper's result tables as data: `paper/T1.csv` to `paper/T26.csv`, one row a printed number, and what is wrong with it where something is.

Columns: table, row (the method, or the configuration), column (the quantity), value, unit (% Dice, mm, M parameters, G bytes), note. A note says where
the paper contradicts itself, by another table or by the mean of the very numbers it prints. A star after a method is the paper's: pre-trained weights.
"""

import difflib
from functools import cache
from pathlib import Path

import pandas as pd

from ..errors import UserError

FOLDER = Path(__file__).resolve().parent / "paper"
TITLES = {
    "T1": "PANORAMA and in-house CT: Dice, HD95, and what it costs",
    "T2": "AMOS: CT, CT to MRI, MRI, and both together",
    "T3": "FeTA 2022, mean of five folds",
    "T4": "MVSeg: posterior and anterior leaflet",
    "T5": "experts of both levels",
    "T6": "group sizes",
    "T7": "slots an expert",
    "T8": "LayerNorm or Dynamic Tanh",
    "T11": "PANORAMA by cohort, and detection by patient",
    "T12": "FeTA 2022 by tissue",
    "T14": "experts, PANORAMA by cohort",
    "T15": "experts, AMOS-CT, HD95",
    "T16": "experts, FeTA, HD95",
    "T17": "group sizes, PANORAMA by cohort",
    "T18": "group sizes, AMOS-CT, HD95",
    "T19": "group sizes, FeTA, HD95",
    "T20": "slots, PANORAMA by cohort",
    "T21": "slots, AMOS-CT, HD95",
    "T22": "slots, FeTA, HD95",
    "T23": "AMOS-CT by organ",
    "T24": "AMOS-MRI by organ",
    "T25": "AMOS, CT to MRI, by organ",
    "T26": "AMOS, CT and MRI together, by organ",
}


@cache
def _all() -> pd.DataFrame:
    return pd.concat([pd.read_csv(FOLDER / f"{table}.csv", keep_default_na=False) for table in TITLES], ignore_index=True)


def paper_rows(*tables: str) -> pd.DataFrame:
    """The tidy rows of some tables, or of all. Raises UserError for one that is not there, with the nearest."""
    for table in tables:
        if table not in TITLES:
            near = difflib.get_close_matches(table.upper(), TITLES, n=3, cutoff=0.4) or list(TITLES)
            raise UserError(f"table: found {table!r}, expected one of the paper's result tables; nearest: {', '.join(near)}.")
    rows = _all()
    return rows[rows["table"].isin(tables)].reset_index(drop=True) if tables else rows.copy()


def as_printed(table: str) -> pd.DataFrame:
    """A table as the paper has it: its rows, and its columns with their units, in the paper's order."""
    rows = paper_rows(table)
    rows["column"] += " " + rows["unit"]
    index, columns = (list(dict.fromkeys(rows[axis])) for axis in ("row", "column"))
    return rows.pivot(index="row", columns="column", values="value").reindex(index=index, columns=columns).rename_axis(columns=None)


def notes(table: str) -> list[str]:
    """What is wrong in a table, one line a note: the cells, and why."""
    rows = paper_rows(table)
    lines: dict[str, list[str]] = {}
    for row in rows[rows["note"] != ""].itertuples():
        for note in row.note.split("; "):
            lines.setdefault(note, []).append(f"{row.row}, {row.column}")
    whole = {column: f"{column}, all rows" for column in rows["column"]}
    told = []
    for note, cells in lines.items():
        columns = {cell.rsplit(", ", 1)[1] for cell in cells}
        everywhere = len(columns) == 1 and len(cells) == rows["row"].nunique()
        told.append(f"{whole[columns.pop()] if everywhere else '; '.join(cells)}: {note}")
    return told
