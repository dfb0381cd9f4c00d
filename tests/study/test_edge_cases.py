"""The table of edge cases: the values that the rule and the definitions give by hand."""

import importlib.util

import numpy as np
import pytest

from homelib.run.metrics import metric_of
from homelib.study.edge_cases import METRICS, SHAPE, edge_cases, masks


@pytest.fixture(scope="module")
def table():
    return edge_cases()


def test_an_empty_mask_is_the_worst_of_every_metric_and_two_are_no_number(table):
    worst = [np.linalg.norm(SHAPE) if metric_of(name).unit == "mm" else 0 for name in METRICS]
    for case in ("empty prediction", "empty reference"):
        assert table.loc[case, list(METRICS)].tolist() == pytest.approx(worst)
        assert not np.isfinite(table.loc[case, "MONAI's hd95"])
    assert table.loc["both empty"].isna().all()


@pytest.mark.parametrize("case", ["the same", "one voxel, the same", "at the border, the same"])
def test_equal_masks_are_the_best_of_every_metric(table, case):
    assert table.loc[case, list(METRICS)].tolist() == [metric_of(name).best for name in METRICS]


def test_a_mask_that_is_moved_is_as_far_away_as_its_voxels_are_long(table):
    assert table.loc["one voxel, two voxels beside", "hd95"] == 2
    moved = {"moved by one voxel": 1, "moved by one voxel of 0.8 mm (0.8x0.8x3)": 0.8, "moved by one voxel of 3 mm (0.8x0.8x3)": 3}
    for case, mm in moved.items():
        assert table.loc[case, ["hd95", "hd95_voxels", "MONAI's hd95"]].tolist() == pytest.approx([mm] * 3)
        assert table.loc[case, "dice"] == pytest.approx(7 / 8)
    assert table.loc["moved by one voxel of 3 mm (0.8x0.8x3)", "nsd_2mm"] < 1 == table.loc["moved by one voxel", "nsd_2mm"]


@pytest.mark.skipif(importlib.util.find_spec("surface_distance") is None, reason="surface-distance is not installed")
def test_distances_are_deepminds_where_both_masks_hold_something(table):
    import surface_distance

    for case, (P, R, spacing_mm) in masks().items():
        if P.any() and R.any():
            theirs = surface_distance.compute_surface_distances(R, P, spacing_mm)
            assert table.loc[case, "hd95"] == pytest.approx(surface_distance.compute_robust_hausdorff(theirs, 95), abs=1e-3), case
            assert table.loc[case, "nsd_2mm"] == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(theirs, 2.0), abs=1e-3), case
