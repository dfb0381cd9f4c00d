"""The tables behind a grid's figures: percent, the right arms, in order."""

import pandas as pd
import pytest

from homelib.study.ablation_figures import cost_and_score, groups_and_experts, paired
from homelib.study.grids import Grid, load_grid


def rows(values: dict[str, float]) -> pd.DataFrame:
    about = {"fold": "", "case": "a", "class": "liver", "metric": "dice"}
    return pd.DataFrame([{"arm": arm, "seed": seed, **about, "value": value + seed / 100} for arm, value in values.items() for seed in (0, 1)])


def test_scores_in_percent_stand_beside_costs():
    table = cost_and_score(rows({"a": 0.5, "b": 0.4}), pd.DataFrame({"GFLOPs": [3.0]}, index=["a"]))
    assert table.loc["a", ["mean", "GFLOPs"]].tolist() == pytest.approx([50.5, 3.0])
    assert list(table.index) == ["a"]


def test_differences_are_in_percent():
    table = paired(rows({"a": 0.5, "b": 0.4}), against="a")
    assert table["difference"].tolist() == pytest.approx([-10])
    assert table["low"].tolist() == pytest.approx([-10])


def test_arms_are_placed_by_their_sizes_and_others_left_out():
    arms = {
        "large": {"model.group_size": [128, 64, 32, 16]},
        "small": {"model.experts_local": [1, 1, 1, 1]},
        "base": {},
        "no-home": {"network": "SegMamba"},
        "blocks": {"model.group_order": "blocks"},
    }
    grid = Grid(name="g", question="q", profile="smoke", arms=arms)
    table = groups_and_experts(rows(dict.fromkeys(arms, 0.5) | {"large": 0.6}), grid)
    assert table["group"].tolist() == ["64 32 16 8", "64 32 16 8", "128 64 32 16"]
    assert table["experts"].tolist() == ["1 1 1 1 / 4 4 4 4", "2 2 2 2 / 4 4 4 4", "2 2 2 2 / 4 4 4 4"]
    assert table["value"].tolist() == pytest.approx([50.5, 50.5, 60.5])


def test_the_crossed_grid_fills_its_heat_map():
    grid = load_grid("laptop-groups-by-experts")
    table = groups_and_experts(rows(dict.fromkeys(grid.arms, 0.5)), grid)
    assert len(table) == table["group"].nunique() * table["experts"].nunique() == 9
