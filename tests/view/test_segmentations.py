"""Figures of segmentations: what they show is what they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from homelib.view import segmentations as view
from homelib.view.plots import PLANES, class_colours, show_slice

NAMES = ("background", "liver", "spleen")
ABOUT = {"spacing_mm": (1.0, 1.0, 2.0), "limits": (0, 1)}


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def label():
    label = np.zeros((12, 14, 10), np.uint8)
    label[2:6, 3:9, 2:6], label[8:11, 9:12, 6:9] = 1, 2
    return label


def test_the_slices_of_a_class_go_through_most_of_it(label):
    label[8:11, 9:12, 7] = 0
    label[8, 9, 7] = 2
    assert view.slices_through(label, 2) == {"axial": 6, "coronal": 9, "sagittal": 8}
    assert view.slices_through(label, 3) == {"axial": 5, "coronal": 7, "sagittal": 6}


def test_every_kind_of_error_has_its_own_value():
    reference, predicted = np.array([[[0, 1, 1, 0, 1]]]), np.array([[[0, 1, 0, 2, 2]]])
    assert view.error_map(reference, predicted).ravel().tolist() == [0, 1, 2, 3, 4]
    assert list(view.ERRORS) == ["right", "missed", "spurious", "another class"]


def test_a_row_a_plane_and_a_column_for_the_scan_and_each_label(label):
    at = view.slices_through(label, 1)
    image = np.random.default_rng(0).random(label.shape)
    figure = view.compared(image, {"reference": label, "ours": label, "rule": label * 0}, class_names=NAMES, title="t", at=at, **ABOUT)
    axes = np.array(figure.axes).reshape(3, 4)
    assert [ax.get_title() for ax in axes[0]] == ["scan", "reference", "ours", "rule"]
    outlined = [[len(ax.collections) for ax in line] for line in axes]
    assert all(line[0] == line[3] == 0 for line in outlined)
    assert outlined[0][1] == outlined[0][2] == 1  # that slice shows one class
    figure = view.error_maps(image, label, {"ours": label, "nothing": label * 0}, title="t", at=at, **ABOUT)
    assert len(figure.axes) == 2 * len(PLANES)
    assert [ax.get_title() for ax in figure.axes] == [*(f"{plane}, slice {at[plane]}" for plane in PLANES), "", "", ""]
    assert set(figure.axes[0].images[1].get_array().compressed().tolist()) == {1}
    assert set(figure.axes[3].images[1].get_array().compressed().tolist()) == {2}


def test_an_outline_is_closed_where_the_picture_ends_and_the_picture_keeps_its_size(label):
    whole = np.ones_like(label)
    ax = plt.figure().add_subplot()
    show_slice(ax, whole, "axial", 5, spacing_mm=(1.0, 1.0, 2.0))
    size = ax.get_xlim(), ax.get_ylim()
    view.contours(ax, whole, "axial", 5, classes=3)
    (path,) = ax.collections[0].get_paths()
    assert (path.vertices[0] == path.vertices[-1]).all()
    assert path.get_extents().bounds == (-0.5, -0.5, 12, 14)
    assert (ax.get_xlim(), ax.get_ylim()) == size


def test_shares_have_one_axis_in_every_figure():
    for most, top in ((0.1, 1.03), (40.0, 41.2)):
        rows = pd.DataFrame({"class": "a", "method": "x", "metric": "m", "value": [0.0, np.nan, most]})
        (ax,) = view.class_distributions(rows, "m", unit="", title="t").axes
        assert ax.get_ylim()[1] == pytest.approx(top)
        assert ax.get_ylim()[0] < 0


def test_every_case_is_a_point(label):
    rows = pd.DataFrame([{"class": c, "method": m, "metric": "dice", "value": v} for c in ("a", "b") for m in ("x", "y") for v in (0.2, np.nan, 0.6)])
    (ax,) = view.class_distributions(rows, "dice", unit="Dice", title="t").axes
    points = [line for line in ax.lines if line.get_marker() == "o"]
    bars = [line for line in ax.lines if line.get_marker() != "o"]
    assert [len(line.get_ydata()) for line in points] == [2] * 4
    assert {float(line.get_ydata()[0]) for line in bars} == {0.4}


def test_a_solid_shows_the_nearest_class_of_each_ray(label):
    colours = [to_rgb(colour) for colour in class_colours(3)]
    front = np.zeros((9, 9, 9), np.uint8)
    front[2:7, 5:8, 2:7] = 1  # in front
    front[2:7, 1:3, 2:7] = 2  # behind it
    seen = view.solid(front, 1, -1, spacing_mm=(1, 1, 1), colours=class_colours(3))
    assert seen[4, 4] == pytest.approx(colours[1])  # flat and facing us: full light
    assert view.solid(front, 1, 1, spacing_mm=(1, 1, 1), colours=class_colours(3))[4, 4] == pytest.approx(colours[2])
    assert (seen[0, 0] == 1).all()
    axes = view.solids({"a": label, "b": label}, spacing_mm=(1, 1, 2), class_names=NAMES, title="t").axes
    assert [ax.get_title() for ax in axes] == ["a", "b", "", ""]
    left = axes[2].images[0].get_array()  # the spleen, at the high end of the first axis (right) and in front, is hidden by nothing: front is on the left
    assert (left[3, 2] < 1).any()
    assert (left[3, 12] == 1).all()
