"""Segmentations beside each other: contours over the scan, where they err, how numbers spread, and a view in three dimensions without a viewer.

Volumes are (D, H, W) in RAS+, as in `homelib.view.plots`, whose slices, letters and bars are used here.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .plots import PLANES, class_colours, class_legend, show_slice, slice_of

ERRORS = {"right": "#009E73", "missed": "#0072B2", "spurious": "#D55E00", "another class": "#F0E442"}
VIEWS = {"from the front": (1, -1), "from the patient's left": (0, 1)}  # axis looked along, from its high or its low end


def contours(ax: Axes, label: np.ndarray, plane: str, index: int, *, classes: int, width: float = 1.2) -> None:
    """The outline of every class of a label (D, H, W) over a slice that is shown already, closed where the picture ends; what is no class has none."""
    picture = np.pad(slice_of(label, plane, index), 1)
    colours = class_colours(classes)
    ax.autoscale(False)  # the picture stays as large as it is
    for value in np.unique(picture[(picture > 0) & (picture < classes)]):
        rows, columns = (slice(found.min() - 1, found.max() + 2) for found in np.nonzero(picture == value))  # the outline needs no more
        y, x = (np.arange(n)[part] - 1 for n, part in zip(picture.shape, (rows, columns), strict=True))
        ax.contour(x, y, picture[rows, columns] == value, levels=[0.5], colors=[colours[int(value)]], linewidths=width)


def slices_through(label: np.ndarray, index: int) -> dict[str, int]:
    """For each plane, the slice of a label (D, H, W) with most voxels of a class; the middle where it has none."""
    mask = label == index
    return {
        plane: int(np.argmax(mask.sum(tuple(a for a in range(3) if a != fixed)))) if mask.any() else label.shape[fixed] // 2
        for plane, (fixed, _) in PLANES.items()
    }


def compared(
    image: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    limits: tuple[float, float],
    title: str,
    at: dict[str, int],
) -> Figure:
    """As the paper's Figures 2 to 5, of (D, H, W): a column for the scan and one for each of `labels` (reference, ours, others) as contours; a row a plane."""
    columns = {"scan": None} | dict(labels)
    figure, axes = plt.subplots(3, len(columns), figsize=(2.9 * len(columns), 8.2), layout="constrained", squeeze=False)
    for line, plane in zip(axes, PLANES, strict=True):
        for number, (ax, (name, label)) in enumerate(zip(line, columns.items(), strict=True)):
            show_slice(ax, image, plane, at[plane], spacing_mm=spacing_mm, limits=limits, bar=number == 0)
            if label is not None:
                contours(ax, label, plane, at[plane], classes=len(class_names))
            if plane == "axial":
                ax.set_title(name, fontsize=10)
        line[0].set_ylabel(f"{plane}, slice {at[plane]}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure


def error_map(reference: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(D, H, W) uint8 of two labels (D, H, W): 0 background in both, then 1 to 4 in the order of `ERRORS`."""
    errors = np.zeros(reference.shape, np.uint8)
    for value, where in enumerate(
        (
            (reference == predicted) & (reference > 0),
            (reference > 0) & (predicted == 0),
            (reference == 0) & (predicted > 0),
            (reference > 0) & (predicted > 0) & (reference != predicted),
        ),
        start=1,
    ):
        errors[where] = value
    return errors


def error_maps(
    image: np.ndarray,
    reference: np.ndarray,
    labels: Mapping[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    limits: tuple[float, float],
    title: str,
    at: dict[str, int],
) -> Figure:
    """Where each of `labels` (D, H, W) is right, misses, invents or confuses: a row each, three planes."""
    figure, axes = plt.subplots(len(labels), 3, figsize=(9, 2.9 * len(labels) + 0.7), layout="constrained", squeeze=False)
    colours = ListedColormap(list(ERRORS.values()))
    for line, (name, label) in zip(axes, labels.items(), strict=True):
        errors = error_map(reference, label)
        for ax, plane in zip(line, PLANES, strict=True):
            show_slice(ax, image, plane, at[plane], spacing_mm=spacing_mm, limits=limits)
            across, up = [s for axis, s in enumerate(spacing_mm) if axis != PLANES[plane][0]]
            picture = np.ma.masked_equal(slice_of(errors, plane, at[plane]), 0)
            ax.imshow(picture, cmap=colours, vmin=0.5, vmax=4.5, alpha=0.75, aspect=up / across, interpolation="nearest")
            if name == next(iter(labels)):
                ax.set_title(f"{plane}, slice {at[plane]}", fontsize=9)
        line[0].set_ylabel(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=[Patch(color=colour, label=name) for name, colour in ERRORS.items()], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def class_distributions(rows: pd.DataFrame, metric: str, *, unit: str, title: str) -> Figure:
    """Every case's value by class, a colour a method, with the median as a bar; from tidy rows. Cases of a class that is nowhere have no point.

    The axis goes from 0 to 1 or beyond, so that figures of several runs can be laid beside each other.
    """
    kept = rows[(rows["metric"] == metric) & (rows["class"] != "background")]
    classes, methods = list(dict.fromkeys(kept["class"])), list(dict.fromkeys(kept["method"]))
    figure, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
    for number, method in enumerate(methods):
        colour = ["#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7"][number % 5]
        for place, name in enumerate(classes):
            values = kept[(kept["method"] == method) & (kept["class"] == name)]["value"].dropna().to_numpy()
            x = place + (number - (len(methods) - 1) / 2) * 0.8 / len(methods)
            spread = np.linspace(-0.2, 0.2, len(values)) / len(methods) if len(values) > 1 else np.zeros(len(values))
            ax.plot(x + spread, values, "o", ms=4, color=colour, alpha=0.8, label=method if not place else None)
            if len(values):
                ax.plot([x - 0.3 / len(methods), x + 0.3 / len(methods)], [np.median(values)] * 2, color=colour, lw=2)
    ax.set_xticks(range(len(classes)), [name.replace("_", " ") for name in classes], fontsize=8)
    ax.set_ylabel(unit)
    top = max(1.0, kept["value"].max())
    ax.set_ylim(min(-0.03 * top, kept["value"].min()), 1.03 * top)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    ax.set_title(title, fontsize=10)
    return figure


def solid(label: np.ndarray, axis: int, side: int, *, spacing_mm: Sequence[float], colours: Sequence[str]) -> np.ndarray:
    """(a, b, 3) picture of a label volume (D, H, W) as a solid: the first voxel on each ray, in its class's colour, darker where its surface turns away.

    axis, side: looked along, from its high end (-1) or its low end (1). colours: by index, background first.
    """
    volume = np.moveaxis(label, axis, 0)[:: 1 if side > 0 else -1]
    first = (volume > 0).argmax(0)
    hit = volume.max(0) > 0
    shown = np.take_along_axis(volume, first[None], 0)[0]
    depth = np.where(hit, first * spacing_mm[axis], np.nan)
    steps = [s for a, s in enumerate(spacing_mm) if a != axis]
    slopes = [np.nan_to_num(slope, nan=2.0) for slope in np.gradient(depth, *steps)]
    light = 1 / np.sqrt(1 + slopes[0] ** 2 + slopes[1] ** 2)
    picture = np.array([to_rgb(colour) for colour in colours])[shown.astype(int)] * (0.35 + 0.65 * light)[..., None]
    picture[~hit] = 1
    return picture


def solids(
    labels: Mapping[str, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    title: str,
    colours: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Each of `labels` (D, H, W) as a solid from two sides: what a 3D viewer shows, as a picture. `colours`, by name: of a volume whose values are not the
    classes."""
    figure, axes = plt.subplots(len(VIEWS), len(labels), figsize=(3.6 * len(labels), 6.4), layout="constrained", squeeze=False)
    for line, (view, (axis, side)) in zip(axes, VIEWS.items(), strict=True):
        across, up = [s for a, s in enumerate(spacing_mm) if a != axis]
        for ax, (name, label) in zip(line, labels.items(), strict=True):
            picture = solid(label, axis, side, spacing_mm=spacing_mm, colours=(colours or {}).get(name) or class_colours(len(class_names)))
            ax.imshow(
                picture.swapaxes(0, 1)[::-1, ::-1], aspect=up / across, interpolation="nearest"
            )  # up is up; the patient's right, or front, is on the left of the picture
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.set_title(name if view == next(iter(VIEWS)) else "", fontsize=10)
        line[0].set_ylabel(view, fontsize=9)
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure
