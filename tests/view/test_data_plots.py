"""Figures of a data set: the same place in both grids, and the numbers that were handed in."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from homelib.view import data_plots
from homelib.view.data_plots import COLOURS, Shown


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def test_before_and_after_show_the_same_place():
    """A voxel that is bright in both grids lies in all six slices of each."""
    fine, coarse = np.diag([1.0, 2.0, 3.0, 1.0]), np.diag([4.0, 4.0, 6.0, 1.0])
    fine[:3, 3], coarse[:3, 3] = (-10, 5, 20), (2, 1, 8)
    volumes = {}
    place = np.array([5, 7, 6])  # on the coarse grid
    for name, affine, shape in (("file", fine, (40, 30, 25)), ("prepared", coarse, (9, 12, 10))):
        at = np.linalg.solve(affine, coarse @ [*place, 1])[:3].round().astype(int)
        image, label = np.zeros(shape), np.zeros(shape, int)
        image[tuple(at)], label[tuple(at)] = 100, 1
        volumes[name] = Shown(name, image, label, affine)
    figure = data_plots.before_and_after(volumes["file"], volumes["prepared"], class_names=("background", "one"), limits=(0, 100), title="t")
    assert len(figure.axes) == 12
    for ax in figure.axes:
        assert ax.images[0].get_array().max() == 100
    assert [len(ax.images) for ax in figure.axes] == [1] * 6 + [2] * 6
    assert figure.axes[3].get_title() == "axial, slice 6"
    assert [line.get_ylabel() for line in figure.axes[::3]] == ["file", "prepared", "file, labels", "prepared, labels"]


def test_grids_draw_each_file_and_its_prepared_spacing():
    rows = [("a", "x", 1.0, 2.0, 100), ("a", "y", 3.0, 2.0, 90), ("b", "x", 0.5, 2.0, 200), ("b", "y", 0.7, 2.0, 10)]
    figure = data_plots.grids(pd.DataFrame(rows, columns=["case", "axis", "spacing_mm", "prepared_mm", "extent_mm"]), title="t")
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[1.0, 3.0], [2.0, 2.0], [0.5, 0.7], [2.0, 2.0]]
    assert [bar.get_height() for bar in right.patches] == [100, 90, 200, 10]
    assert left.get_ylim()[1] > 3


def test_volumes_stand_on_a_logarithmic_axis_below_the_smallest():
    table = pd.DataFrame([("a", "liver", 1500.0), ("a", "vein", 20.0), ("b", "liver", 1200.0)], columns=["case", "class", "ml"])
    (ax,) = data_plots.class_volumes(table, title="t").axes
    assert ax.get_yscale() == "log"
    assert ax.get_ylim()[0] < 20
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:3] == [1500, 20, 1200]
    assert np.isnan(heights[3])


def test_folds_have_a_case_in_one_row_in_the_colour_of_its_stratum():
    table = pd.DataFrame([("a", "fold-1", "CT"), ("b", "fold-0", "MRI"), ("c", "fold-0", "CT")], columns=["case", "part", "stratum"])
    figure = data_plots.folds(table, title="t")
    picture = figure.axes[0].images[0].get_array()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["fold-0 (2)", "fold-1 (1)"]
    ct, mri, white = to_rgb(COLOURS[0]), to_rgb(COLOURS[1]), (1, 1, 1)
    np.testing.assert_allclose(picture, [[white, mri, ct], [ct, white, white]])
