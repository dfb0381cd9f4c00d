"""Figures: where a planted voxel lands on the drawn page, and that every panel, letter, colour, bar and number is the one that was handed in."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

from homelib.view import plots

NAMES = ("background", "liver", "spleen", "inferior_vena_cava")
SPACING_MM = (2.0, 3.0, 5.0)  # three different ones: a mix-up shows
BRIGHT = (253, 231, 37)  # the high end of viridis


@pytest.fixture(autouse=True)
def _closed():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return plt.subplots(figsize=(5, 5))[1]


@pytest.fixture
def image():
    return np.random.default_rng(0).uniform(-175, 250, (30, 24, 20))


@pytest.fixture
def label():
    """Class 1 in a block, 2 and 3 in a voxel each, on the slices x = 7, y = 11, z = 13."""
    label = np.zeros((30, 24, 20), int)
    label[5:10, 8:14, 10:16] = 1
    label[7, 11, 13], label[7, 11, 12], label[7, 12, 13], label[6, 11, 13] = 2, 3, 3, 3
    return label


def drawn(figure) -> np.ndarray:
    """The page as RGB."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)


def panels(figure) -> list:
    """Axes that show a picture; not colour bars."""
    return [ax for ax in figure.axes if ax.images and ax.get_label() != "<colorbar>"]


def shown_texts(ax) -> dict:
    return {text.get_text(): text for text in ax.texts}


# ---------------------------------------------------------------- one slice

ENDS = {"R": (0, -1), "L": (0, 0), "A": (1, -1), "P": (1, 0), "S": (2, -1), "I": (2, 0)}  # RAS+: letter -> axis, and the end of it


@pytest.mark.parametrize(
    ("plane", "voxel", "place"),
    [
        ("axial", (4, 2, 3), (3, 0)), ("axial", (2, 5, 3), (0, 2)), ("axial", (0, 0, 3), (5, 4)),
        ("coronal", (4, 2, 3), (3, 0)), ("coronal", (2, 2, 6), (0, 2)), ("coronal", (0, 2, 0), (6, 4)),
        ("sagittal", (2, 5, 3), (3, 0)), ("sagittal", (2, 2, 6), (0, 3)), ("sagittal", (2, 0, 0), (6, 5)),
    ],
)  # fmt: skip
def test_a_voxel_lands_in_the_row_and_column_worked_out_by_hand(plane, voxel, place):
    volume = np.zeros((5, 6, 7))
    volume[voxel] = 1
    picture = plots.slice_of(volume, plane, voxel[plots.PLANES[plane][0]])
    assert [tuple(where) for where in np.argwhere(picture).tolist()] == [place]
    assert picture.shape == {"axial": (6, 5), "coronal": (7, 5), "sagittal": (7, 6)}[plane]


@pytest.mark.parametrize(("plane", "letter"), [("axial", c) for c in "RLAP"] + [("coronal", c) for c in "RLSI"] + [("sagittal", c) for c in "APSI"])
def test_what_lies_on_a_side_of_the_patient_is_drawn_at_that_sides_letter(ax, plane, letter):
    volume = np.zeros((15, 15, 15))
    side, end = ENDS[letter]
    at = [slice(6, 9)] * 3
    at[side] = slice(12, 15) if end else slice(0, 3)
    volume[tuple(at)] = 1
    plots.show_slice(ax, volume, plane, 7, spacing_mm=(1, 1, 1), cmap="viridis", bar=False)
    page = drawn(ax.figure)
    rows, columns = np.nonzero((np.abs(page - BRIGHT) < 12).all(-1))
    spot = ax.transAxes.inverted().transform((columns.mean(), page.shape[0] - rows.mean()))
    letters = {text: t.get_position() for text, t in shown_texts(ax).items()}
    assert set(letters) == set(plots.PLANES[plane][1])
    nearest = min(letters, key=lambda text: np.hypot(*(np.array(letters[text]) - spot)))
    assert nearest == letter


@pytest.mark.parametrize(("plane", "across", "up"), [("axial", 2, 3), ("coronal", 2, 5), ("sagittal", 3, 5)])
def test_a_millimetre_is_as_long_across_as_up(ax, image, plane, across, up):
    plots.show_slice(ax, image, plane, 5, spacing_mm=SPACING_MM)
    ax.figure.canvas.draw()
    corner, right, down = ax.transData.transform([(0, 0), (1, 0), (0, 1)])
    assert (right - corner)[0] / abs((down - corner)[1]) == pytest.approx(across / up)


@pytest.mark.parametrize(("plane", "across"), [("axial", 4), ("coronal", 4), ("sagittal", 6)])
def test_the_bar_is_50_mm_long_and_says_so(ax, image, plane, across):
    plots.show_slice(ax, image, plane, 5, spacing_mm=(4.0, 6.0, 10.0))
    (bar,) = ax.lines
    start, end = bar.get_xdata()
    assert end - start == pytest.approx(50 / across)
    assert bar.get_ydata()[0] == bar.get_ydata()[1]
    assert "50 mm" in shown_texts(ax)


def test_the_bar_can_be_left_out(ax, image):
    plots.show_slice(ax, image, "axial", 5, spacing_mm=SPACING_MM, bar=False)
    assert not ax.lines
    assert "50 mm" not in shown_texts(ax)


@pytest.mark.parametrize(("voxels", "length_mm"), [(6, 5), (12, 10), (25, 20), (60, 50)])
def test_the_bar_stays_inside_the_picture_whatever_its_width(ax, voxels, length_mm):
    plots.show_slice(ax, np.zeros((voxels, voxels, voxels)), "axial", 3, spacing_mm=(2.0, 2.0, 2.0))
    ax.figure.canvas.draw()
    assert ax.get_xlim() == (-0.5, voxels - 0.5)
    assert ax.get_ylim() == (voxels - 0.5, -0.5)
    (bar,) = ax.lines
    assert bar.get_xdata().max() < (voxels - 1) / 2, "it would reach the letter in the middle"
    assert np.ptp(bar.get_xdata()) * 2.0 == pytest.approx(length_mm)
    assert f"{length_mm} mm" in shown_texts(ax)


def test_limits_are_those_given_or_the_volumes_own(ax, image):
    plots.show_slice(ax, image, "axial", 5, spacing_mm=SPACING_MM, limits=(-175, 250))
    plots.show_slice(ax, image, "axial", 5, spacing_mm=SPACING_MM)
    given, own = ax.images
    assert given.get_clim() == (-175, 250)
    assert own.get_clim() == (image.min(), image.max())
    assert np.array_equal(given.get_array(), plots.slice_of(image, "axial", 5))


@pytest.mark.parametrize(("wide", "bar"), [(400, 50), (119, 20), (55, 20), (6, 2), (1.5, 1)])
def test_a_bar_is_shorter_than_half_its_picture(wide, bar):
    assert plots.bar_mm(wide) == bar


def test_letters_stand_at_the_edges(ax):
    plots.plane_letters(ax, "sagittal")
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [("A", (0.01, 0.5)), ("P", (0.99, 0.5)), ("S", (0.5, 0.99)), ("I", (0.5, 0.01))]


def test_a_class_has_its_own_colour_and_the_background_none(ax):
    label = np.arange(9).repeat(2).reshape(3, 6, 1)
    plots.show_label(ax, label, "axial", 0, spacing_mm=(1, 1, 1), classes=9, alpha=0.5)
    (picture,) = ax.images
    colours = picture.to_rgba(picture.get_array(), alpha=picture.get_alpha())
    classes = plots.slice_of(label, "axial", 0)
    for index in range(1, 9):
        np.testing.assert_allclose(colours[classes == index], [(*to_rgb(plots.CLASS_COLOURS[index]), 0.5)] * 2)
    assert np.ma.getmaskarray(picture.get_array()).tolist() == (classes == 0).tolist()


def test_a_label_lies_where_its_image_lies(ax):
    volume = np.zeros((5, 6, 7), int)
    volume[1, 4, 3] = 2
    plots.show_slice(ax, volume, "coronal", 4, spacing_mm=SPACING_MM)
    plots.show_label(ax, volume, "coronal", 4, spacing_mm=SPACING_MM, classes=3)
    under, over = ax.images
    assert under.get_extent() == over.get_extent()
    assert np.argwhere(under.get_array()).tolist() == np.argwhere(over.get_array().filled(0)).tolist()
    ax.figure.canvas.draw()
    corner, right, down = ax.transData.transform([(0, 0), (1, 0), (0, 1)])
    assert (right - corner)[0] / abs((down - corner)[1]) == pytest.approx(2 / 5)


def test_colours_of_classes_are_all_different():
    assert len({to_rgb(colour) for colour in plots.CLASS_COLOURS}) == len(plots.CLASS_COLOURS) >= 9


def legend_entries(figure) -> dict[str, tuple]:
    (legend,) = figure.legends
    return {text.get_text(): patch.get_facecolor()[:3] for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)}


def test_the_legend_has_every_class_but_the_background_in_its_colour(ax):
    plots.class_legend(ax.figure, NAMES)
    assert legend_entries(ax.figure) == {name: to_rgb(plots.CLASS_COLOURS[i]) for i, name in ((1, "liver"), (2, "spleen"), (3, "inferior vena cava"))}


def test_a_structure_is_neither_background_nor_a_voxel_of_no_known_class():
    assert plots.of_a_class(np.array([0, 1, 7, 255])).tolist() == [False, True, True, False]


def test_the_best_slices_show_most_classes_and_then_most_of_them(label):
    assert plots.best_slices(label) == {"axial": 13, "coronal": 11, "sagittal": 7}
    larger = np.zeros((4, 4, 4), int)
    larger[:, :, 1], larger[:2, :2, 2] = 1, 1
    assert plots.best_slices(larger)["axial"] == 1
    larger[:, :, 3] = larger[0, 0, 2] = 255  # no class is known there
    assert plots.best_slices(larger)["axial"] == 1


# ---------------------------------------------------------------- whole figures


def test_case_planes_has_a_row_for_the_image_and_each_label(image, label):
    other = np.zeros_like(label)
    other[7, 11, 13] = 1
    figure = plots.case_planes(
        image, {"reference": label, "prediction": other}, spacing_mm=SPACING_MM, class_names=NAMES, limits=(-175, 250), title="Case x, seed 0"
    )
    drawn(figure)
    grid = np.array(figure.axes).reshape(3, 3)
    assert [[len(ax.images) for ax in row] for row in grid] == [[1] * 3, [2] * 3, [2] * 3]
    assert [ax.get_title() for ax in grid[0]] == ["axial, slice 13", "coronal, slice 11", "sagittal, slice 7"]
    assert [row[0].get_ylabel() for row in grid] == ["image", "reference", "prediction"]
    assert figure.get_suptitle() == "Case x, seed 0"
    assert set(legend_entries(figure)) == {"liver", "spleen", "inferior vena cava"}
    for column, (plane, index) in enumerate({"axial": 13, "coronal": 11, "sagittal": 7}.items()):
        for row in grid:
            assert np.array_equal(row[column].images[0].get_array(), plots.slice_of(image, plane, index))
        for row, volume in ((1, label), (2, other)):
            assert np.array_equal(grid[row, column].images[1].get_array().filled(0), plots.slice_of(volume, plane, index))


def test_case_planes_can_be_told_the_slices(image, label):
    figure = plots.case_planes(
        image, {"reference": label}, spacing_mm=SPACING_MM, class_names=NAMES, limits=(0, 1), title="", at={"axial": 1, "coronal": 2, "sagittal": 3}
    )
    assert [ax.get_title() for ax in figure.axes[:3]] == ["axial, slice 1", "coronal, slice 2", "sagittal, slice 3"]


@pytest.fixture
def history():
    table = pd.DataFrame({"step": range(6), "loss": [3.0, 9.0, 2.0, 1.5, 1.0, 0.5], "learning_rate": [1, 2, 2, 1, 0.5, 0.1], "seconds": range(6)})
    table["training_patient_dice"] = [np.nan, np.nan, 0.2, np.nan, np.nan, 0.6]
    return table


def test_history_curves_show_loss_median_rate_and_dice(history):
    figure = plots.history_curves(history, title="a-to-c", smooth_steps=3)
    drawn(figure)
    left, right, rate = figure.axes
    assert left.lines[0].get_ydata().tolist() == history["loss"].tolist()
    assert left.lines[1].get_ydata().tolist() == [3.0, 6.0, 3.0, 2.0, 1.5, 1.0]  # of the last three at most
    (dice,) = right.lines
    assert (dice.get_xdata().tolist(), dice.get_ydata().tolist()) == ([3, 6], [0.2, 0.6])
    assert right.get_ylim() == (0, 1)
    assert rate.lines[0].get_ydata().tolist() == history["learning_rate"].tolist()
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["training patient Dice"]
    assert figure.get_suptitle() == "a-to-c"


def test_history_curves_do_without_validation(history):
    figure = plots.history_curves(history.drop(columns="training_patient_dice"), title="")
    drawn(figure)
    assert figure.axes[1].get_legend() is None


@pytest.fixture
def metrics():
    rows = [("liver", "MambaHoME", 0.8), ("inferior_vena_cava", "MambaHoME", 0.3), ("liver", "rule", 0.4), ("inferior_vena_cava", "rule", np.nan)]
    table = pd.DataFrame(rows, columns=["class", "method", "value"]).assign(metric="dice")
    return pd.concat([table, table.assign(metric="hd95", value=40.0)])


def test_dice_bars_are_as_high_as_the_numbers(metrics):
    figure = plots.dice_bars(metrics, title="Dice")
    drawn(figure)
    (ax,) = figure.axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}
    np.testing.assert_equal(heights, {"MambaHoME": [0.8, 0.3], "rule": [0.4, np.nan]})
    assert [text.get_text() for text in ax.get_xticklabels()] == ["liver", "inferior vena cava"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["MambaHoME", "rule"]
    assert ax.get_ylim() == (0, 1)


def test_dice_bars_stand_side_by_side_around_their_class(metrics):
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bars in plots.dice_bars(metrics, title="").axes[0].containers for bar in bars)
    assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(edges, edges[1:], strict=False))
    assert np.mean([edges[0][0], edges[1][1]]) == pytest.approx(0)
    assert len({bars[0].get_facecolor() for bars in plots.dice_bars(metrics, title="").axes[0].containers}) == 2


def test_intensity_ranges_reach_from_the_5th_to_the_95th_percentile():
    table = pd.DataFrame(
        [("ct-a", "liver", 46, 20, 70), ("ct-a", "spleen", 35, 10, 50), ("ct-c", "liver", 73, 60, 100)], columns=["case", "class", "median", "p5", "p95"]
    )
    figure = plots.intensity_ranges(table, window=(-175, 250), unit="HU", title="t")
    drawn(figure)
    (ax,) = figure.axes
    first, second = ax.containers
    np.testing.assert_equal(np.array(first[0].get_ydata(), float), [46, 35])
    np.testing.assert_equal(np.array(second[0].get_ydata(), float), [73, np.nan])
    np.testing.assert_allclose([path.vertices[:, 1] for path in first[2][0].get_paths()], [[20, 70], [10, 50]])
    assert ax.get_ylabel() == "HU"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ct-a", "ct-c"]
    grey = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (grey.y0, grey.y1) == pytest.approx((-175, 250))


def test_patch_row_shows_each_patch_bare_and_labelled(image, label):
    second = np.roll(label, 3, axis=2)
    figure = plots.patch_row([image, -image], [label, second], spacing_mm=SPACING_MM, class_names=NAMES, title="Two patches")
    drawn(figure)
    (bare, other), (with_label, other_with_label) = np.array(figure.axes).reshape(2, 2)
    assert [len(ax.images) for ax in figure.axes] == [1, 1, 2, 2]
    assert np.array_equal(bare.images[0].get_array(), plots.slice_of(image, "axial", 13))
    assert np.array_equal(other.images[0].get_array(), plots.slice_of(-image, "axial", 16))
    assert np.array_equal(with_label.images[1].get_array().filled(0), plots.slice_of(label, "axial", 13))
    assert np.array_equal(other_with_label.images[1].get_array().filled(0), plots.slice_of(second, "axial", 16))
    assert set(legend_entries(figure)) == {"liver", "spleen", "inferior vena cava"}


def test_every_figure_function_is_tested_here():
    public = {name for name, thing in vars(plots).items() if callable(thing) and getattr(thing, "__module__", "") == plots.__name__}
    with open(__file__, encoding="utf-8") as text:
        tested = text.read()
    assert {name for name in public if f"plots.{name}(" not in tested} == set()


def test_thirty_classes_have_thirty_colours_and_few_keep_theirs():
    many = plots.class_colours(30)
    assert len({to_hex(colour) for colour in many}) == 30
    assert many[:11] == plots.CLASS_COLOURS
    assert plots.class_colours(3) == plots.CLASS_COLOURS[:3]


def test_what_is_no_class_has_no_colour():
    label = np.zeros((4, 4, 4), np.uint8)
    label[0], label[1] = 1, 255
    figure, ax = plt.subplots()
    plots.show_label(ax, label, "axial", 0, spacing_mm=(1, 1, 1), classes=3)
    shown = ax.images[0].get_array()
    assert (~np.ma.getmaskarray(shown)).sum() == 4
    assert set(shown.compressed()) == {1}


def test_a_legend_of_dice_lies_off_the_curves(history):
    figure = plots.history_curves(history, title="x")
    drawn(figure)
    right = figure.axes[1]
    assert right.get_legend().get_window_extent().y0 >= right.get_window_extent().y1


def test_few_steps_are_counted_in_whole_numbers(ax):
    ax.plot(range(4), range(4))
    plots.whole_steps(ax)
    drawn(ax.figure)
    assert [tick for tick in ax.get_xticks() if tick != round(tick)] == []


def test_many_steps_do_not_run_into_each_other_on_a_narrow_axis():
    figure, ax = plt.subplots(figsize=(2.5, 2), layout="constrained")
    ax.plot([0, 850], [0, 1])
    plots.whole_steps(ax)
    drawn(figure)
    places = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
    assert len(places) > 2
    assert all(left.x1 < right.x0 for left, right in zip(places, places[1:], strict=False))


@pytest.mark.parametrize(("values", "between"), [([1.72, 1.90], True), ([0.5, 200], False)])
def test_a_logarithmic_axis_has_plain_numbers(ax, values, between):
    ax.plot([0, 1], values)
    ax.set_yscale("log")
    plots.plain_numbers(ax, "y")
    drawn(ax.figure)
    major, minor = ([label.get_text() for label in ax.yaxis.get_ticklabels(which=which) if label.get_text()] for which in ("major", "minor"))
    assert bool(minor) is between
    assert all(re.fullmatch(r"[0-9.]+", number) for number in major + minor)


def test_a_column_of_a_history_is_told_in_words():
    assert plots.column_name("training_patient_dice") == "training patient Dice"
