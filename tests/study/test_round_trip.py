"""Labels there and back: exact at the file's own spacing, and shares lose less than one class a voxel on a coarser grid."""

import pytest

from homelib.study.round_trip import WAYS, round_trip


def test_at_the_files_spacing_every_way_is_exact(phantoms):
    table = round_trip(phantoms["phantom-a"], spacing_mm=(7.0,) * 3, ways=tuple(WAYS))
    assert set(table["method"]) == set(WAYS.values())
    assert table["value"].dropna().min() == pytest.approx(1)


def test_on_a_coarser_grid_shares_lose_least(phantoms):
    table = round_trip(phantoms["phantom-a"], spacing_mm=(12.0,) * 3, ways=tuple(WAYS)).pivot(index="class", columns="method", values="value")
    for way in ("nearest", "linear"):
        assert (table[WAYS["shares"]] > table[WAYS[way]]).all()
    assert table[WAYS["shares"]]["liver"] > 0.93
