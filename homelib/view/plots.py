"""Slices, labels and the figures of a run. Volumes are (D, H, W) in RAS+ (right-left, front-back, up), shown as a radiologist sees them:
the patient's right on the left.

Sizes are fixed, maps are safe for colour-blind readers, each slice has its orientation letters and a scale bar in mm.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from ..config import IGNORE

# Okabe and Ito's colours, then two that stay apart from them; background first
CLASS_COLOURS = ["#000000", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#009E73", "#E69F00", "#FF3B3B", "#56B4E9", "#B8B8FF", "#8C564B"]
EDGE = [withStroke(linewidth=1.5, foreground="black")]  # around what is white, so that it is read over bone too
PLANES = {  # plane -> (fixed axis, letters at left, right, top, bottom)
    "axial": (2, "RLAP"),
    "coronal": (1, "RLSI"),
    "sagittal": (0, "APSI"),
}


def class_colours(classes: int) -> list:
    """A colour a class, background first; beyond the first eleven, as many as asked around the colour wheel."""
    more = max(0, classes - len(CLASS_COLOURS))
    return [*CLASS_COLOURS, *plt.get_cmap("hsv")(np.linspace(0, 1, more, endpoint=False))][:classes]


def slice_of(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """One slice of (D, H, W), rows from top to bottom as displayed: axial and coronal with the patient's right on the left, sagittal facing left."""
    fixed = PLANES[plane][0]
    picture = np.take(volume, index, axis=fixed).T[::-1]  # last axis up
    return picture[:, ::-1]  # R (or A) to the left


def bar_mm(wide_mm: float) -> int:
    """Length of a scale bar: 50 mm, shorter where that would reach the letter in the middle of the picture."""
    return next((mm for mm in (50, 20, 10, 5, 2) if mm < 0.42 * wide_mm), 1)


def plane_letters(ax: Axes, plane: str) -> None:
    """Which way is right, left, front, back, up and down, at the edges of a slice."""
    told: dict[str, Any] = {"color": "white", "fontsize": 7, "fontweight": "bold"}  # a thin L loses its foot between two pixels, and reads I
    told |= {"transform": ax.transAxes, "path_effects": EDGE}
    for letter, (x, y, ha, va) in zip(
        PLANES[plane][1],
        [(0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center"), (0.5, 0.99, "center", "top"), (0.5, 0.01, "center", "bottom")],
        strict=True,
    ):
        ax.text(x, y, letter, ha=ha, va=va, **told)


def show_slice(
    ax: Axes,
    image: np.ndarray,
    plane: str,
    index: int,
    *,
    spacing_mm: Sequence[float],
    limits: tuple[float, float] | None = None,
    bar: bool = True,
    **style: Any,
) -> None:
    """A grey slice of an image (D, H, W), with orientation letters and a scale bar (`bar_mm`)."""
    low, high = limits or (float(image.min()), float(image.max()))
    across, up = [s for axis, s in enumerate(spacing_mm) if axis != PLANES[plane][0]]
    picture = slice_of(image, plane, index)
    ax.imshow(picture, aspect=up / across, vmin=low, vmax=high, interpolation="nearest", **{"cmap": "gray"} | style)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    plane_letters(ax, plane)
    if bar:
        rows, columns = picture.shape
        length_mm = bar_mm(columns * across)
        left, bottom = columns * 0.04 - 0.5, rows * 0.95 - 0.5  # a picture begins half a voxel before the first one's centre
        around = [withStroke(linewidth=3.5, foreground="black")]
        ax.plot([left, left + length_mm / across], [bottom] * 2, color="white", lw=2, solid_capstyle="butt", path_effects=around)
        ax.text(left, bottom - rows * 0.02, f"{length_mm} mm", color="white", fontsize=6, va="bottom", path_effects=EDGE)


def show_label(ax: Axes, label: np.ndarray, plane: str, index: int, *, spacing_mm: Sequence[float], classes: int, alpha: float = 0.55) -> None:
    """Class colours of a label (D, H, W) over a slice; the background, and what is no class (voxels that the loss does not look at), is left clear."""
    across, up = [s for axis, s in enumerate(spacing_mm) if axis != PLANES[plane][0]]
    picture = slice_of(label, plane, index)
    colours = ListedColormap(class_colours(classes))
    ax.imshow(
        np.ma.masked_where((picture == 0) | (picture >= classes), picture),
        aspect=up / across,
        cmap=colours,
        norm=BoundaryNorm(np.arange(classes + 1) - 0.5, classes),
        alpha=alpha,
        interpolation="nearest",
    )


def class_legend(figure: Figure, class_names: Sequence[str]) -> None:
    """The colours of all classes but the background, below a figure."""
    colours = class_colours(len(class_names))
    patches = [Patch(color=colours[i], label=name.replace("_", " ")) for i, name in enumerate(class_names) if i]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(patches)), fontsize=8, frameon=False)


def of_a_class(label: np.ndarray) -> np.ndarray:
    """Where a label of any shape names a structure: neither background nor a voxel of which nothing is known (255)."""
    return (label > 0) & (label != IGNORE)


def best_slices(label: np.ndarray) -> dict[str, int]:
    """For each plane, the slice of a label (D, H, W) that shows most classes, and most of them."""
    chosen = {}
    for plane, (fixed, _) in PLANES.items():
        slices = [(s, of_a_class(s)) for s in np.moveaxis(label, fixed, 0)]
        chosen[plane] = int(np.argmax([len(np.unique(s[inside])) + inside.mean() for s, inside in slices]))
    return chosen


def case_planes(
    image: np.ndarray,
    labels: dict[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    limits: tuple[float, float],
    title: str,
    at: dict[str, int] | None = None,
) -> Figure:
    """Three planes of (D, H, W); a row for the bare image and one for each of `labels` (reference, prediction ...) over it."""
    at = at or best_slices(next(iter(labels.values())))
    rows = {"image": None} | labels
    figure, axes = plt.subplots(len(rows), 3, figsize=(9, 2.9 * len(rows) + 0.6), layout="constrained", squeeze=False)
    for line, (name, label) in zip(axes, rows.items(), strict=True):
        for ax, plane in zip(line, PLANES, strict=True):
            show_slice(ax, image, plane, at[plane], spacing_mm=spacing_mm, limits=limits)
            if label is not None:
                show_label(ax, label, plane, at[plane], spacing_mm=spacing_mm, classes=len(class_names))
            if label is None:
                ax.set_title(f"{plane}, slice {at[plane]}", fontsize=9)
        line[0].set_ylabel(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure


def whole_steps(ax: Axes) -> None:
    """Ticks of an axis of steps at whole numbers alone, where a training has few; and few enough for a narrow axis, on which they would run into each other."""
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def plain_numbers(ax: Axes, axis: str = "x") -> None:
    """Numbers of a logarithmic axis written out, 1.75 and not 1.75 x 10^0; those between its decades too where it spans less than one."""
    low, high = getattr(ax, f"get_{axis}lim")()
    of = getattr(ax, f"{axis}axis")
    of.set_major_formatter(ScalarFormatter(useOffset=False))
    of.set_minor_formatter(ScalarFormatter(useOffset=False) if high < 10 * low else NullFormatter())


def column_name(column: str) -> str:
    """Of a history, in words: training_patient_dice is training patient Dice."""
    return column.replace("_", " ").replace("dice", "Dice")


def history_curves(history: pd.DataFrame, *, title: str, smooth_steps: int = 20) -> Figure:
    """Loss a step with its running median, learning rate, and what validation added (columns that end in `dice`)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.plot(history["step"], history["loss"], color="#BBBBBB", lw=0.8, label="a step")
    left.plot(history["step"], history["loss"].rolling(smooth_steps, min_periods=1).median(), color="#0072B2", label=f"running median, {smooth_steps} steps")
    left.set(xlabel="step", ylabel="Dice + cross-entropy loss")
    left.legend(frameon=False, fontsize=8)
    for name in [c for c in history if c.endswith("dice")]:
        shown = history.dropna(subset=[name])
        right.plot(shown["step"] + 1, shown[name], "o-", ms=4, color="#D55E00", label=column_name(name))
    right.set(xlabel="step", ylabel="Dice", ylim=(0, 1))
    rate = right.twinx()
    rate.plot(history["step"], history["learning_rate"], color="#009E73", lw=1, ls="--")
    rate.set_ylabel("learning rate (dashed)", color="#009E73")
    if right.has_data():
        right.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)  # above: a curve may run anywhere
    for ax in (left, right):
        whole_steps(ax)
    figure.suptitle(title, fontsize=11)
    return figure


def dice_bars(metrics: pd.DataFrame, *, title: str) -> Figure:
    """Dice by class, one bar a method; from tidy rows (class, method, metric, value)."""
    rows = metrics[metrics["metric"] == "dice"]
    classes, methods = list(dict.fromkeys(rows["class"])), list(dict.fromkeys(rows["method"]))
    figure, ax = plt.subplots(figsize=(10, 3.4), layout="constrained")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        values = rows[rows["method"] == method].set_index("class")["value"].reindex(classes)
        ax.bar(
            np.arange(len(classes)) + (number - (len(methods) - 1) / 2) * width,
            values,
            width,
            label=method,
            color=["#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7"][number % 5],
        )
    ax.set_xticks(range(len(classes)), [c.replace("_", " ") for c in classes], fontsize=8)
    ax.set(ylabel="Dice", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=8, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def intensity_ranges(table: pd.DataFrame, *, window: tuple[float, float], unit: str, title: str) -> Figure:
    """Median and 5th to 95th percentile of each class, a colour a case; from tidy rows case, class, median, p5, p95."""
    classes, cases = list(dict.fromkeys(table["class"])), list(dict.fromkeys(table["case"]))
    figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
    ax.axhspan(*window, color="#EEEEEE", zorder=0)
    for number, case in enumerate(cases):
        rows = table[table["case"] == case].set_index("class").reindex(classes)
        x = np.arange(len(classes)) + (number - (len(cases) - 1) / 2) * 0.25
        ax.errorbar(
            x,
            rows["median"],
            yerr=[rows["median"] - rows["p5"], rows["p95"] - rows["median"]],
            fmt="o",
            ms=5,
            capsize=3,
            color=["#0072B2", "#D55E00"][number % 2],
            label=case,
        )
    ax.set_xticks(range(len(classes)), [c.replace("_", " ") for c in classes], fontsize=8)
    ax.set_ylabel(unit)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10)
    return figure


def patch_row(images: Sequence[np.ndarray], labels: Sequence[np.ndarray], *, spacing_mm: Sequence[float], class_names: Sequence[str], title: str) -> Figure:
    """Patches (D, H, W) side by side, the axial slice with most classes of each: as the network sees it, and with its labels."""
    figure, axes = plt.subplots(2, len(images), figsize=(2.6 * len(images), 5.2), layout="constrained", squeeze=False)
    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        index = best_slices(label)["axial"]
        for ax in axes[:, column]:
            show_slice(ax, image, "axial", index, spacing_mm=spacing_mm, limits=(0, 1), bar=column == 0)
        show_label(axes[1, column], label, "axial", index, spacing_mm=spacing_mm, classes=len(class_names))
        axes[0, column].set_title(f"draw {column}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure
