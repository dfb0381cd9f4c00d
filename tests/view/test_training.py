"""Figures of a training show what they were handed, so far, and once."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from homelib.view import training


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture
def history():
    steps = np.arange(30)
    table = pd.DataFrame({"step": steps, "loss": 3 - steps / 30, "learning_rate": 0.1, "gradient_norm": 1 + steps, "seconds": 0.5 * steps})
    table["validation_dice"] = np.where(steps % 10 == 9, steps / 100, np.nan)
    return table


def test_live_curves_have_a_row_each_and_the_width_of_all_steps(history):
    figure = training.live_curves({"one": history, "other": history.head(5)}, steps=100)
    assert len(figure.axes) == 4
    assert [ax.get_title() for ax in figure.axes[::2]] == ["one: step 30 of 100", "other: step 5 of 100"]
    assert {ax.get_xlim() for ax in figure.axes} == {(0, 100)}
    np.testing.assert_allclose(figure.axes[1].lines[0].get_xydata(), [[10, 0.09], [20, 0.19], [30, 0.29]])


def test_live_shows_one_figure_and_then_updates_it(history, monkeypatch):
    shown, updated = [], []

    class Handle:
        def update(self, figure):
            updated.append(figure)

    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append(figure) or Handle())
    live = training.Live(steps=100)
    live({"one": history.head(1)})
    assert not shown
    for rows in (10, 20, 30):
        live({"one": history.head(rows)})
    assert (len(shown), len(updated)) == (1, 2)
    assert not plt.get_fignums()


def test_effort_is_rate_gradient_and_patches_a_second(history):
    rate, norm, patches = training.effort_curves(history, patches_a_step=4, title="x").axes
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 0.1)
    np.testing.assert_allclose(norm.lines[0].get_ydata(), 1 + np.arange(30))
    np.testing.assert_allclose(patches.lines[0].get_ydata()[1:], 8.0)


@pytest.mark.parametrize(("count", "titles"), [(1, [100]), (3, [100, 200, 300]), (9, [100, 300, 500, 700, 900])])
def test_predictions_stand_in_order_before_the_reference(count, titles):
    reference = np.zeros((6, 5, 4), int)
    reference[2, 3, 1] = 1
    samples = {100 * (n + 1): np.full(reference.shape, n % 2) for n in range(count)}
    figure = training.improving(
        np.random.default_rng(0).normal(size=reference.shape), reference, samples, spacing_mm=(1, 1, 1), class_names=("b", "liver"), limits=(0, 1), title="x"
    )
    assert [ax.get_title() for ax in figure.axes] == [*(f"after {step} steps" for step in titles), "reference"]


@pytest.mark.parametrize(
    "draw", [lambda history: training.live_curves({"one": history}, steps=4), lambda history: training.effort_curves(history, patches_a_step=1, title="x")]
)
def test_few_steps_are_counted_in_whole_numbers(history, draw):
    figure = draw(history.head(4))
    figure.canvas.draw()
    ticks = [tick for ax in figure.axes for tick in ax.get_xticks()]
    assert ticks == [round(tick) for tick in ticks]
