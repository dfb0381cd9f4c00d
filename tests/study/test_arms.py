"""A grid's arms as tables for figures, by hand."""

import pandas as pd
import pytest

from homelib.study import arms
from homelib.study.arms import beside_baseline, committed, costs_and_scores, experts_and_groups
from homelib.study.grids import Grid

GRID = Grid(
    name="made",
    question="?",
    profile="smoke",
    seeds=(0, 1),
    arms={"one": {}, "more": {"model.experts_local": [4, 4, 4, 4]}, "wide": {"model.group_size": [128, 64, 32, 16]}, "rate": {"training.learning_rate": 0.1}},
)


@pytest.fixture
def rows() -> pd.DataFrame:
    """Two seeds of each arm on one patient: 0.5, 0.6, 0.7, 0.8, and half a point more with the second seed."""
    lines = []
    for number, arm in enumerate(GRID.arms):
        for seed in (0, 1):
            value = 0.5 + 0.1 * number + 0.005 * seed
            about = {"arm": arm, "seed": seed, "fold": "", "case": "x"}
            lines += [about | {"class": "liver", "metric": metric, "value": value * factor} for metric, factor in (("dice", 1), ("hd95", 50))]
    return pd.DataFrame(lines)


def test_costs_and_scores_of_the_arms(rows, tmp_path):
    table = costs_and_scores(rows, GRID, tmp_path)
    assert table["mean"].tolist() == pytest.approx([50.25, 60.25, 70.25, 80.25])
    assert (table["low"] < table["mean"]).all()
    assert table.loc["more", "parameters, million"] > table.loc["one", "parameters, million"] == table.loc["rate", "parameters, million"]
    pd.DataFrame({"arm": ["one", "one"], "training_seconds": [1.0, 3.0], "steps_gib": [None, None]}).to_csv(tmp_path / "runs.csv", index=False)
    with_costs = costs_and_scores(rows, GRID, tmp_path)
    assert with_costs.loc["one", "training, seconds"] == 2
    assert "memory, GiB" not in with_costs


def test_differences_are_in_points(rows):
    assert beside_baseline(rows, GRID)["difference"].tolist() == pytest.approx([10, 20, 30])


def test_experts_and_groups_hold_no_arm_that_differs_in_another_way(rows):
    table = experts_and_groups(rows, GRID)
    assert table.values.tolist() == [
        ["2 2 2 2 / 4 4 4 4", "64 32 16 8", pytest.approx(50.25)],
        ["4 4 4 4 / 4 4 4 4", "64 32 16 8", pytest.approx(60.25)],
        ["2 2 2 2 / 4 4 4 4", "128 64 32 16", pytest.approx(70.25)],
    ]


def test_committed_results_are_a_folder_of_the_grids_name(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "COMMITTED", tmp_path)
    assert committed(GRID) is None
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "results.csv").write_text("")
    assert committed(GRID) == tmp_path / "made"
