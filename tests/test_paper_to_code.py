"""docs/paper_to_code.yaml: all of the paper is in it once, every name in it is there, every switch and value is one, and the page is made of it."""

import ast
import importlib
import importlib.util
import re
import typing
from functools import cache
from pathlib import Path

import pytest

from homelib.config import HOME_SWITCHES, SWITCHES, ModelConfig, Settings, field_names, override, preset
from homelib.data.manifest import load_manifest
from homelib.study.grids import load_grid
from homelib.study.paper_tables import TITLES

ROOT = Path(__file__).resolve().parent.parent


def _script():
    spec = importlib.util.spec_from_file_location("paper_to_code", ROOT / "scripts/paper_to_code.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITER = _script()
PARTS = WRITER.rows()
ROWS = {row["of"]: row for rows in PARTS.values() for row in rows}
NOT_RESULTS = {"T9", "T10", "T13"}  # data sets, classes, and what stands with T4


@cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def look_up(tree, dotted: str):
    for part in dotted.split("."):
        tree = getattr(tree, part)
    return tree


def plain(value):
    """Lists for tuples, as YAML has them."""
    return [plain(one) for one in value] if isinstance(value, tuple | list) else value


def switched() -> list[tuple[str, object]]:
    """Every (setting, value) that is named as a switch."""
    pairs = [pair for row in ROWS.values() for pair in row.get("as_paper", {}).items()]
    return pairs + [(name, value) for row in ROWS.values() for name, values in row.get("departs", {}).items() for value in values]


def test_the_page_is_made_of_it():
    assert WRITER.PAGE.read_text() == WRITER.page(PARTS), "run: python scripts/paper_to_code.py"


def test_all_of_the_paper_is_in_it_once_and_in_order():
    names = {part: [row["of"] for row in rows] for part, rows in PARTS.items()}
    assert names["equations"] == [f"Eq. {number}" for number in range(1, 24)]
    assert names["tables"] == [f"T{number}" for number in range(1, 27)]
    figures = []
    for name in names["figures"]:
        first, _, last = re.fullmatch(r"Figures? (\d+)( to (\d+))?", name).groups()
        figures += range(int(first), int(last or first) + 1)
    assert figures == list(range(1, 13))
    assert set(PARTS) == set(WRITER.PARTS)
    assert len(ROWS) == sum(map(len, PARTS.values())), "a name stands twice"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_says_where_it_is_and_what_holds_it_and_that_is_there(row):
    assert set(row) <= WRITER.FIELDS
    assert all(row.get(field) for field in ("of", "says", "code", "tests"))
    for place in row["code"]:
        module, symbol = place.split(":")
        assert look_up(importlib.import_module(f"homelib.{module}"), symbol) is not None, place
    for place in row["tests"]:
        file, name = place.split("::")
        assert name in functions_of(file), f"{place}: no such test"
    if "as_paper" in row:
        assert row.get("here"), "what the default does, where it is not what the paper says"


@pytest.mark.parametrize(("name", "value"), dict.fromkeys((name, repr(value)) for name, value in switched()))
def test_a_switch_is_a_setting_with_such_a_value_and_departs_from_the_papers_preset(name, value):
    start, value = preset("paper"), ast.literal_eval(value)
    assert name in field_names(Settings)
    found = plain(look_up(override(start, {name: value}), name))
    assert found == value
    assert found != plain(look_up(start, name)), "the default"


def test_values_are_those_of_the_papers_preset_and_of_the_manifests():
    start = preset("paper")
    for row in ROWS.values():
        for name, value in row.get("values", {}).items():
            assert plain(look_up(start, name)) == value, (row["of"], name)
        for data_set, fields in row.get("manifest", {}).items():
            for name, value in fields.items():
                assert plain(getattr(load_manifest(data_set), name)) == value, (row["of"], data_set, name)


def test_a_table_is_kept_as_data_and_its_grid_says_which_rows_it_makes():
    for row in PARTS["tables"]:
        assert (row["of"] in TITLES) is (row["of"] not in NOT_RESULTS)
        if "grid" in row:
            assert row["of"] in load_grid(row["grid"]).paper
        if row["of"] in TITLES:
            assert "study.paper_tables:paper_rows" in row["code"]


@pytest.mark.parametrize("name", [*SWITCHES, *HOME_SWITCHES])
def test_every_value_of_every_switch_of_the_network_stands_somewhere(name):
    field = ModelConfig.model_fields[name]
    values = set(typing.get_args(field.annotation)) or {True, False}
    assert {value for switch, value in switched() if switch == f"model.{name}"} == values - {field.default}
