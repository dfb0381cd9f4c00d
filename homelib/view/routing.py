"""Where the experts look, as pictures that need no browser: over a slice, through three planes, along the scan, and the groups of a window.

Weights are shares that sum to one over the experts of a level (`homelib.view.routed`). A picture shows where an expert is associated with what is
seen there; that the expert matters there is for a knock-out to say.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..axes import three
from ..errors import UserError
from .plots import PLANES, best_slices, class_colours, class_legend, of_a_class, show_label, show_slice, slice_of
from .routed import Place, Routed, Voxel, centre_of, entropy, expert_colours
from .segmentations import contours, solids

HEAT = "magma"  # of a weight
GROUP_COLOURS = "Set2"


def told(place: Place) -> str:
    """In words."""
    stage, block, level = place
    return f"stage {stage}, block {block}, level {level}"


def show_winner(ax: Axes, weights: np.ndarray, plane: str, index: int, *, spacing_mm: Sequence[float], **style: Any) -> None:
    """The expert with the largest weight at every voxel of a slice; weights (E, D, H, W)."""
    experts, fixed = len(weights), PLANES[plane][0]
    best = np.take(weights, [index], axis=fixed + 1).argmax(0)  # of this slice alone: (D, H, W) with one voxel along the fixed axis
    palette = ListedColormap(expert_colours(experts))
    show_slice(ax, best.astype(float), plane, 0, spacing_mm=spacing_mm, limits=(-0.5, experts - 0.5), cmap=palette, bar=False, **style)


def show_heat(
    ax: Axes, image: np.ndarray, heat: np.ndarray, plane: str, index: int, *, spacing_mm: Sequence[float], limits: tuple[float, float], reach: float
) -> None:
    """A weight (D, H, W) from 0 to `reach` over the slice of the image (D, H, W) that it belongs to."""
    show_slice(ax, image, plane, index, spacing_mm=spacing_mm, limits=limits, bar=False)
    show_slice(ax, heat, plane, index, spacing_mm=spacing_mm, limits=(0, reach), cmap=HEAT, alpha=0.75, bar=False)


def show_groups(ax: Axes, groups: np.ndarray, plane: str, index: int, *, spacing_mm: Sequence[float] = (1, 1, 1), **style: Any) -> None:
    """Groups (D, H, W) of one window's tokens in a slice: colours, which repeat, and a line wherever one group ends; nothing where there is none (-1)."""
    shown = np.ma.masked_where(groups < 0, (groups % 8).astype(float))
    show_slice(ax, shown, plane, index, spacing_mm=spacing_mm, limits=(0, 7), cmap=GROUP_COLOURS, bar=False, **style)
    picture = slice_of(groups, plane, index)
    down, right = picture[1:] != picture[:-1], picture[:, 1:] != picture[:, :-1]
    lines = [((c - 0.5, r + 0.5), (c + 0.5, r + 0.5)) for r, c in np.argwhere(down)] + [((c + 0.5, r - 0.5), (c + 0.5, r + 0.5)) for r, c in np.argwhere(right)]
    ax.add_collection(LineCollection(lines, colors="black", linewidths=0.6), autolim=False)


def legend(figure: Figure, *, experts: int, class_names: Sequence[str]) -> None:
    """Experts as patches, classes as the lines of their outlines."""
    handles: list[Patch | Line2D] = [Patch(color=colour, label=f"expert {e}") for e, colour in enumerate(expert_colours(experts))]
    lines = list(zip(class_colours(len(class_names)), class_names, strict=True))[1:]
    handles += [Line2D([], [], color=colour, label=name.replace("_", " ")) for colour, name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), int(figure.get_figwidth() / 1.4)), fontsize=8, frameon=False)


def planes_through(routed: Routed, place: Place, *, expert: int, at: Voxel | None = None, about: int | None = None, title: str = "") -> Figure:
    """Three orthogonal planes through a voxel: the scan with its label's outlines, the winning expert, an expert's weight, the entropy, and the groups.

    Args:
        expert: whose weight is shown, on a scale that ends at the largest weight of any expert at this place.
        at: the voxel; None: the centre of the class `about`, or the middle of the scan.
        title: goes on with what is shown.

    Raises:
        UserError: a place that was not traced, an expert that it does not have, a class that is nowhere.
    """
    weights, heat, reach = routed.weights(place), routed.weight(place, expert), routed.top(place)
    of = f"voxel {at}"
    if at is None and about is not None:
        at, of = centre_of(routed.label, about), f"the centre of {routed.class_names[about].replace('_', ' ')}"
    elif at is None:
        at, of = three(n // 2 for n in routed.image.shape), "its middle"
    groups = routed.groups.get(place[:2])
    columns = 4 + (groups is not None)
    figure, axes = plt.subplots(4, columns, figsize=(2.6 * columns, 8.8), layout="constrained", height_ratios=[1, 1, 1, 0.05])
    for line, (plane, (fixed, _)) in zip(axes[:3], PLANES.items(), strict=True):
        index = at[fixed]
        shown: dict[str, Any] = {"spacing_mm": routed.spacing_mm}
        show_slice(line[0], routed.image, plane, index, limits=routed.limits, **shown)
        if routed.label is not None:
            contours(line[0], routed.label, plane, index, classes=len(routed.class_names))
        show_winner(line[1], weights, plane, index, **shown)
        show_heat(line[2], routed.image, heat, plane, index, limits=routed.limits, reach=reach, **shown)
        one = [slice(None)] * 4
        one[fixed + 1] = slice(index, index + 1)
        show_slice(line[3], entropy(weights[tuple(one)]), plane, 0, limits=(0, 1), cmap="viridis", bar=False, **shown)
        if groups is not None and groups.shape == routed.image.shape:
            show_slice(line[4], routed.image, plane, index, limits=routed.limits, bar=False, **shown)
            show_groups(line[4], groups, plane, index, alpha=0.6, **shown)
        elif groups is not None:
            show_groups(line[4], groups, plane, groups.shape[fixed] // 2)
            line[4].set_xlabel(f"its slice {groups.shape[fixed] // 2}", fontsize=8)
        line[0].set_ylabel(f"{plane}, slice {index}", fontsize=9)
    names = [
        "scan" + (" and label" if routed.label is not None else ""),
        "winning expert",
        f"weight of expert {expert}",
        "entropy (1: even)",
        "groups of one window",
    ]
    for ax, name in zip(axes[0], names, strict=False):
        ax.set_title(name, fontsize=10)
    for column, ax in enumerate(axes[3]):
        if 1 <= column <= 3:
            figure.colorbar(axes[0, column].images[-1], cax=ax, orientation="horizontal")
        else:
            ax.set_axis_off()
    axes[3, 1].set_xticks(range(len(weights)), _every_fourth(len(weights)))
    figure.suptitle(f"{routed.name}, {told(place)}, through {of}{title and '; ' + title}", fontsize=11)
    if routed.label is not None and routed.class_names:
        class_legend(figure, routed.class_names)
    return figure


def _every_fourth(experts: int) -> list[str]:
    """Names of experts beside a scale of colours: all of few, every fourth of many."""
    return [str(e) if experts <= 16 or not e % 4 else "" for e in range(experts)]


def montage(routed: Routed, place: Place, *, expert: int | None = None, plane: str = "axial", slices: int = 12, title: str = "") -> Figure:
    """Slices along the scan, evenly spaced where there is a label: the winning expert, or one expert's weight, with the outlines of the label."""
    weights, reach, fixed = routed.weights(place), routed.top(place), PLANES[plane][0]
    heat = None if expert is None else routed.weight(place, expert)
    inside = np.arange(routed.image.shape[fixed])
    if routed.label is not None and (classes := of_a_class(routed.label)).any():
        inside = np.nonzero(classes.any(axis=tuple(a for a in range(3) if a != fixed)))[0]
    chosen = np.unique(np.linspace(inside[0], inside[-1], min(slices, len(inside))).round().astype(int))
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.1 * rows + 1), layout="constrained", squeeze=False)
    for ax in axes.ravel()[len(chosen) :]:
        ax.set_axis_off()
    shown: dict[str, Any] = {"spacing_mm": routed.spacing_mm}
    for number, (ax, index) in enumerate(zip(axes.ravel(), chosen.tolist(), strict=False)):
        if heat is None:
            show_slice(ax, routed.image, plane, index, limits=routed.limits, bar=not number, **shown)
            show_winner(ax, weights, plane, index, alpha=0.6, **shown)
        else:
            show_heat(ax, routed.image, heat, plane, index, limits=routed.limits, reach=reach, **shown)
        if routed.label is not None:
            contours(ax, routed.label, plane, index, classes=len(routed.class_names), width=0.8)
        ax.set_title(f"slice {index}", fontsize=8)
    what = "winning expert" if expert is None else f"weight of expert {expert}"
    figure.suptitle(f"{routed.name}, {told(place)}, {plane}: {what}{title and '; ' + title}", fontsize=11)
    if expert is not None:
        figure.colorbar(axes[0, 0].images[-1], ax=axes, shrink=0.8, label="weight")
    legend(figure, experts=len(weights) if expert is None else 0, class_names=routed.class_names if routed.label is not None else ())
    return figure


def solid_experts(routed: Routed, place: Place, *, title: str = "") -> Figure:
    """The label as a solid from two sides, and beside it the same solid in the colours of the expert that wins at its surface.

    What a 3D viewer shows, as a picture. Raises UserError: a place that was not traced, or a scan without a label.
    """
    if routed.label is None:
        raise UserError(f"{routed.name}: found no label, expected one: its surface is what is coloured.")
    weights, classes = routed.weights(place), len(routed.class_names)
    label = np.where(routed.label < classes, routed.label, 0)
    winner = np.where(label > 0, weights.argmax(0) + 1, 0)
    name, colours = f"winning expert\n{told(place)}", ["#000000", *expert_colours(len(weights))]
    figure = solids(
        {"label": label, name: winner},
        spacing_mm=routed.spacing_mm,
        class_names=routed.class_names,
        title=f"{routed.name}{title and '; ' + title}",
        colours={name: colours},
    )
    figure.legends[0].remove()
    legend(figure, experts=len(weights), class_names=routed.class_names)
    return figure


def expert_panel(
    image: np.ndarray,
    maps: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    spacing_mm: Sequence[float],
    limits: tuple[float, float],
    title: str,
    plane: str = "axial",
    index: int | None = None,
    label: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    most: int | None = None,
) -> Figure:
    """One slice: the image with its classes, the winning expert, the groups, and a heat map of each expert's weight.

    Args:
        maps: (E, D, H, W), on the image's grid. Heat ends at the largest weight there is: an even share of 32 experts would be black on a scale to 1.
        groups: (D, H, W) group of every voxel, or None.
        most: so many experts at most, those with the largest share of the slice; the title tells the largest weight of the others in it.
    """
    index = image.shape[PLANES[plane][0]] // 2 if index is None else index
    experts, reach = len(maps), float(maps.max())
    chosen = list(range(experts))
    if most is not None and experts > most:
        here = np.take(maps, index, axis=PLANES[plane][0] + 1).astype(np.float32)
        order = np.argsort(-here.mean((1, 2)), kind="stable")
        chosen = sorted(order[:most].tolist())
        title += f" ({most} of {experts}; none of the others weighs more than {here[order[most:]].max():.2g} here)"
    panels = 2 + (groups is not None) + len(chosen)
    columns = min(4, panels)
    figure, axes = plt.subplots(-(-panels // columns), columns, figsize=(3.1 * columns, 2.9 * -(-panels // columns) + 0.8), layout="constrained", squeeze=False)
    free = iter(axes.ravel())
    place: dict[str, Any] = {"spacing_mm": spacing_mm}

    ax = next(free)
    show_slice(ax, image, plane, index, limits=limits, **place)
    if label is not None:
        show_label(ax, label, plane, index, classes=len(class_names), **place)
    ax.set_title("image" + (" and reference" if label is not None else ""), fontsize=9)

    ax = next(free)
    show_winner(ax, maps, plane, index, **place)
    bar = figure.colorbar(ax.images[0], ax=ax, ticks=range(experts), shrink=0.8)
    bar.set_ticklabels(_every_fourth(experts))
    ax.set_title("expert with the largest weight", fontsize=9)

    if groups is not None:
        ax = next(free)
        show_groups(ax, groups, plane, index, **place)
        ax.set_title("groups (colours repeat)", fontsize=9)
    for e in chosen:
        ax = next(free)
        show_heat(ax, image, maps[e], plane, index, limits=limits, reach=reach, **place)
        ax.set_title(f"expert {e}", fontsize=9)
    figure.colorbar(ax.images[-1], ax=ax, shrink=0.8, label="weight")
    for ax in free:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=11)
    if label is not None:
        class_legend(figure, class_names)
    return figure


def group_strips(groups: np.ndarray, *, title: str) -> Figure:
    """Groups of a stage's grid (D, H, W) in the middle slice of each plane: strips along the last axis, as raster order makes them."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
    for ax, plane in zip(axes, PLANES, strict=True):
        index = groups.shape[PLANES[plane][0]] // 2
        show_groups(ax, groups, plane, index)
        ax.set_title(f"{plane}, slice {index}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def first_look(routed: Routed, predicted: np.ndarray, place: Place, *, title: str) -> Figure:
    """Three planes, each where the reference shows most: the scan, the reference, the prediction, and the winning expert under the reference's outlines.

    Args:
        routed: with a label.
        predicted: (D, H, W) class indices.

    Raises:
        UserError: a place that was not traced, or a scan without a label.
    """
    if routed.label is None:
        raise UserError(f"{routed.name}: found no label, expected one: the prediction is shown beside it.")
    weights, classes = routed.weights(place), len(routed.class_names)
    shown: dict[str, Any] = {"spacing_mm": routed.spacing_mm}
    figure, axes = plt.subplots(3, 4, figsize=(11, 8.2), layout="constrained")
    for line, (plane, index) in zip(axes, best_slices(routed.label).items(), strict=True):
        for ax, label in zip(line, (None, routed.label, predicted, None), strict=True):
            show_slice(ax, routed.image, plane, index, limits=routed.limits, bar=ax is line[0], **shown)
            if label is not None:
                show_label(ax, label, plane, index, classes=classes, **shown)
        show_winner(line[3], weights, plane, index, alpha=0.6, **shown)
        contours(line[3], routed.label, plane, index, classes=classes, width=0.8)
        line[0].set_ylabel(f"{plane}, slice {index}", fontsize=9)
    for ax, name in zip(axes[0], ("scan", "reference", "prediction", f"winning expert,\n{told(place)}"), strict=True):
        ax.set_title(name, fontsize=10)
    figure.suptitle(f"{routed.name}{title and '; ' + title}", fontsize=11)
    legend(figure, experts=len(weights), class_names=routed.class_names)
    return figure


def story(
    image: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    maps: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    limits: tuple[float, float],
    class_names: Sequence[str],
    title: str,
    plane: str = "coronal",
) -> Figure:
    """One slice in a row: the scan, its reference, the prediction, all (D, H, W), and the weight of the two experts of maps (E, D, H, W) that differ most
    over it."""
    index = best_slices(reference)[plane]
    spread = [slice_of(m, plane, index).std() for m in maps]
    shown, reach = np.argsort(spread)[::-1][:2], float(maps.max())
    figure, axes = plt.subplots(1, 3 + len(shown), figsize=(3 * (3 + len(shown)), 3.6), layout="constrained")
    place: dict[str, Any] = {"spacing_mm": spacing_mm}
    for ax, name, label in zip(axes, ("scan", "reference", "prediction"), (None, reference, prediction), strict=False):
        show_slice(ax, image, plane, index, limits=limits, bar=label is None, **place)
        if label is not None:
            show_label(ax, label, plane, index, classes=len(class_names), **place)
        ax.set_title(name, fontsize=10)
    for ax, expert in zip(axes[3:], shown, strict=True):
        show_heat(ax, image, maps[expert], plane, index, limits=limits, reach=reach, **place)
        ax.set_title(f"weight of expert {expert}", fontsize=10)
    figure.colorbar(axes[-1].images[-1], ax=axes[-1], shrink=0.8, label="weight")
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure
