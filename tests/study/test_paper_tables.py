"""The paper's tables as data: what is printed, and that every contradiction which arithmetic finds is flagged at its cell."""

import pandas as pd
import pytest

from homelib import UserError
from homelib.study.ablation_tables import paper_table
from homelib.study.paper_tables import FOLDER, TITLES, as_printed, notes, paper_rows


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return paper_rows()


def value(rows: pd.DataFrame, table: str, row: str, column: str) -> float:
    return rows.set_index(["table", "row", "column"]).loc[(table, row, column), "value"]


def note(rows: pd.DataFrame, table: str, row: str, column: str) -> str:
    return rows.set_index(["table", "row", "column"]).loc[(table, row, column), "note"]


def test_every_file_is_a_known_table_of_tidy_numbers(rows):
    assert {path.stem for path in FOLDER.glob("*.csv")} == set(TITLES)
    assert list(rows) == ["table", "row", "column", "value", "unit", "note"]
    assert rows["value"].between(0, 400).all()
    assert set(rows["unit"]) == {"%", "mm", "M", "G", "of 1770 ms"}
    assert not rows.duplicated(["table", "row", "column"]).any()
    for _, table in rows.groupby("table"):
        assert len(table) == table["row"].nunique() * table["column"].nunique()


@pytest.mark.parametrize(
    ("table", "row", "column", "printed"),
    [
        ("T1", "Mamba-HoME*", "PDAC DSC", 56.7),
        ("T1", "SegMamba", "parameters", 66.8),
        ("T2", "Mamba-HoME", "mHD95 MRI", 11.7),
        ("T4", "Mamba-HoME*", "AL DSC", 86.0),
        ("T5", "E1 8 16 24 48; E2 16 32 48 96", "FeTA mDSC", 87.4),
        ("T7", "S 8", "PANORAMA mDSC", 76.5),
        ("T11", "Mamba-HoME*", "specificity", 95.2),
        ("T12", "Mamba-HoME", "WM DSC", 91.4),
        ("T20", "S 2", "mHD95", 5.0),
        ("T23", "Hermes", "prostate or uterus DSC", 79.3),
        ("T26", "Mamba-HoME*", "duodenum DSC", 77.7),
    ],
)
def test_cells_are_as_printed(rows, table, row, column, printed):
    assert value(rows, table, row, column) == printed


def test_a_mean_that_is_not_the_mean_of_its_organs_is_flagged(rows):
    found = 0
    for (table, row), part in rows[rows["table"].isin(["T12", "T23", "T24", "T25", "T26"])].groupby(["table", "row"]):
        organs = part[part["column"].str.endswith(" DSC")]["value"].mean()
        if abs(organs - value(rows, table, row, "mDSC")) > 0.15:
            found += 1
            assert note(rows, table, row, "mDSC"), (table, row)
    assert found > 10


@pytest.mark.parametrize(
    ("first", "second", "columns"),
    [
        ("T3", "T12", {"mDSC": "mDSC", "mHD95": "mHD95"}),
        ("T1", "T11", {"PDAC DSC": "PDAC DSC", "Pancreas DSC": "Pancreas DSC"}),
        *[("T2", t, {f"{m} {d}": m for m in ("mDSC", "mHD95")}) for t, d in (("T23", "CT"), ("T24", "MRI"), ("T25", "CT to MRI"), ("T26", "CT and MRI"))],
    ],
)
def test_a_number_that_another_table_has_otherwise_is_flagged_in_both(rows, first, second, columns):
    for row in set(rows[rows["table"] == first]["row"]) & set(rows[rows["table"] == second]["row"]):
        for one, other in columns.items():
            if value(rows, first, row, one) != value(rows, second, row, other):
                assert note(rows, first, row, one), (first, row, one)
                assert note(rows, second, row, other), (second, row, other)


def test_the_same_configuration_in_two_ablations_is_flagged_where_it_differs(rows):
    equal, dagger = "E1 8 16 24 48; E2 8 16 24 48", "K 2048 1024 512 256 (dagger: E1 = E2 = 8 16 24 48)"
    for first, second in (("T5", "T6"), ("T14", "T17"), ("T15", "T18"), ("T16", "T19")):
        for column in set(rows[rows["table"] == first]["column"]):
            if value(rows, first, equal, column) != value(rows, second, dagger, column):
                assert note(rows, first, equal, column), (first, column)
                assert note(rows, second, dagger, column), (second, column)


def test_notes_name_their_cells_and_a_whole_column_once():
    told = notes("T12")
    assert sum("the mean of the seven tissues" in line for line in told) == 1
    assert any(line.startswith("mDSC, all rows: ") for line in told)
    assert "SegMamba, mHD95: 3.5 in T3" in told


def test_a_table_is_shown_in_the_papers_order():
    table = as_printed("T8")
    assert list(table.index) == ["LayerNorm", "DyT"]
    assert list(table) == ["PANORAMA mDSC %", "AMOS-CT mDSC %", "FeTA mDSC %"]
    text = paper_table("T8").markdown()
    assert "| DyT | 77.5 | 86.3 | 87.4 |" in text
    assert "87.5 for the same configuration in T3, T5, T6 and T7" in text


def test_an_unknown_table_is_one_line():
    with pytest.raises(UserError, match=r"^table: found 't5', expected one of the paper's result tables; nearest: T5"):
        paper_rows("t5")
