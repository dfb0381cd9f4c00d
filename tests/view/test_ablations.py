"""Figures of a grid: points, front, cells, bars and lines are those of the table that was handed in."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from homelib.view import ablations


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def lines(ax, **wanted) -> list:
    return [line for line in ax.lines if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())]


def test_the_front_joins_what_no_arm_beats_for_less():
    table = pd.DataFrame({"mean": [50, 40, 45, 55], "low": [48, 38, 43, 53], "high": [52, 42, 47, 57], "M": [3, 4, 1, 9]}, index=list("abcd"))
    figure = ablations.cost_score_front(table, costs=["M"], score="Dice %", title="grid")
    ax = figure.axes[0]
    points = lines(ax, marker="o")
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(3, 50), (4, 40), (1, 45), (9, 55)]
    assert [to_hex(line.get_color()).upper() == ablations.FRONT for line in points] == [True, False, True, True]
    (front,) = lines(ax, linestyle="--")
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(1, 45), (3, 50), (9, 55)]
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3", "4"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["1 a", "2 b", "3 c", "4 d"]
    assert ax.get_xlabel() == "M"


def test_costs_stand_two_in_a_row_each_with_its_axis():
    table = pd.DataFrame({"mean": [50, 40], "low": [48, 38], "high": [52, 42], "M": [3, 4], "s": [1, 2], "GiB": [1, 3]}, index=list("ab"))
    figure = ablations.cost_score_front(table, costs=["M", "s", "GiB"], score="Dice %", title="grid")
    figure.canvas.draw()
    assert [ax.get_xlabel() for ax in figure.axes if ax.axison] == ["M", "s", "GiB"]
    assert figure.axes[0].get_position().y0 > figure.axes[2].get_position().y1
    assert [bool(ax.get_ylabel()) for ax in figure.axes] == [True, False, True, False]


def test_one_run_has_a_point_without_a_bar():
    table = pd.DataFrame({"mean": [50.0], "low": [np.nan], "high": [np.nan], "M": [3.0]}, index=["a"])
    ablations.cost_score_front(table, costs=["M"], score="Dice %", title="grid").canvas.draw()


def test_the_heat_map_has_a_cell_for_every_run_and_none_for_what_was_not():
    table = pd.DataFrame([[40.0, 41.5], [39.25, np.nan]], index=["4", "8"], columns=["256", "512"])
    ax = ablations.group_expert_heat(table, score="Dice %", title="grid").axes[0]
    values = ax.images[0].get_array()
    assert values.tolist() == [[40.0, 41.5], [39.25, None]]
    assert {text.get_text(): text.get_position() for text in ax.texts} == {"40.0": (0, 0), "41.5": (1, 0), "39.2": (0, 1)}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["256", "512"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["4", "8"]


def test_differences_are_drawn_in_order_and_red_where_they_stand():
    table = pd.DataFrame({"arm": ["a", "b"], "runs": [3, 2], "difference": [2.0, -1.0], "low": [1.0, -3.0], "high": [3.0, 1.0], "p_holm": [0.01, np.nan]})
    ax = ablations.paired_differences(table, against="base", score="Dice %", title="grid").axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b (2)", "a (3)"]
    points = lines(ax, marker="o")
    assert [(line.get_xdata()[0], to_hex(line.get_color()).upper()) for line in points] == [(-1.0, ablations.OPEN), (2.0, ablations.TESTED)]
    assert "to base" in ax.get_xlabel()


def test_complexity_shows_what_was_measured_and_the_formula_through_its_first_point():
    tokens = [64, 128, 256]
    table = pd.DataFrame(
        [
            {"layer": layer, "tokens": n, "seconds": n**p, "kept_mib": n, "formula": 7 * n, "level_1_scores": 2 * n, "level_2_scores": n**2}
            for layer, p in (("Mamba", 1), ("HoME", 2))
            for n in tokens
        ]
    )
    axes = ablations.complexity_lines(table, title="growth").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes[0].lines}
    assert drawn["HoME, measured"] == [n**2 for n in tokens]
    assert drawn["HoME, paper's formula"] == [64**2, 2 * 64**2, 4 * 64**2]
    assert list(axes[2].lines[1].get_ydata()) == [n**2 for n in tokens]
    assert [ax.get_yscale() for ax in axes] == ["log"] * 3
