"""Figures of a data set: a case before and after preparation, grids, volumes of classes, folds. Drawn from tidy tables, as `plots` does."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .plots import PLANES, best_slices, class_legend, show_label, show_slice

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Shown:
    """A volume to be shown: image and label (D, H, W) in RAS+, affine (4, 4) to mm, and a name for its row."""

    name: str
    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, ...]:
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0))


def before_and_after(before: Shown, after: Shown, *, class_names: Sequence[str], limits: tuple[float, float], title: str) -> Figure:
    """The same place in two grids, in three planes: the bare image of each, then each with its label."""
    at = best_slices(after.label)
    middle = [at["sagittal"], at["coronal"], at["axial"]]
    place = np.linalg.solve(before.affine, after.affine @ [*middle, 1])[:3].round().astype(int).clip(0, np.array(before.image.shape) - 1)
    there = {"sagittal": place[0], "coronal": place[1], "axial": place[2]}
    figure, axes = plt.subplots(4, 3, figsize=(9, 12), layout="constrained")
    for line, shown, slices, labelled in zip(axes, (before, after) * 2, (there, at) * 2, (False, False, True, True), strict=True):
        for ax, plane in zip(line, PLANES, strict=True):
            show_slice(ax, shown.image, plane, slices[plane], spacing_mm=shown.spacing_mm, limits=limits)
            if labelled:
                show_label(ax, shown.label, plane, slices[plane], spacing_mm=shown.spacing_mm, classes=len(class_names))
            ax.set_title(f"{plane}, slice {slices[plane]}", fontsize=9)
        line[0].set_ylabel(f"{shown.name}{', labels' if labelled else ''}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure


def grids(table: pd.DataFrame, *, title: str) -> Figure:
    """Spacing of each file along the three axes with that of the prepared grid, and how much of the patient each covers.

    Args:
        table: rows case, axis, spacing_mm (of the file), prepared_mm, extent_mm (of the file).
    """
    axes, cases = (list(dict.fromkeys(table[column])) for column in ("axis", "case"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for number, case in enumerate(cases):
        rows = table[table["case"] == case].set_index("axis").reindex(axes)
        x, colour = np.arange(len(axes)) + (number - (len(cases) - 1) / 2) * 0.8 / len(cases), COLOURS[number % len(COLOURS)]
        left.plot(x, rows["spacing_mm"], "o", color=colour, ms=7, label=case)
        left.plot(x, rows["prepared_mm"], "_", color=colour, ms=14, mew=2)
        right.bar(x, rows["extent_mm"], 0.75 / len(cases), color=colour)
    left.set(ylabel="mm", title="spacing: of the file (dot), prepared (bar)")
    left.set_ylim(0, 1.15 * max(table["spacing_mm"].max(), table["prepared_mm"].max()))
    right.set(ylabel="mm", title="extent of the file")
    for ax in (left, right):
        ax.set_xticks(range(len(axes)), axes, fontsize=8)
        ax.title.set_fontsize(9)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(6, len(cases)), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def class_volumes(table: pd.DataFrame, *, title: str) -> Figure:
    """Volume of each class in each case, on a logarithmic axis; from tidy rows case, class, ml."""
    classes, cases = (list(dict.fromkeys(table[column])) for column in ("class", "case"))
    figure, ax = plt.subplots(figsize=(9, 3.2), layout="constrained")
    width = 0.8 / len(cases)
    for number, case in enumerate(cases):
        rows = table[table["case"] == case].set_index("class").reindex(classes)
        x = np.arange(len(classes)) + (number - (len(cases) - 1) / 2) * width
        ax.bar(x, rows["ml"], width, color=COLOURS[number % len(COLOURS)], label=case)
    ax.set_yscale("log")
    ax.set_ylim(table["ml"].min() / 3, table["ml"].max() * 2)  # a logarithmic axis has no zero to begin at
    ax.set_ylabel("ml")
    ax.set_xticks(range(len(classes)), [name.replace("_", " ") for name in classes], fontsize=8)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, fontsize=10)
    return figure


def folds(table: pd.DataFrame, *, title: str) -> Figure:
    """Which part or fold each case belongs to: a column a case, a row a part, coloured by stratum.

    Args:
        table: rows case, part, stratum.
    """
    parts, strata = sorted(table["part"].unique()), list(dict.fromkeys(table["stratum"]))
    picture = np.ones((len(parts), len(table), 3))
    for column, (part, stratum) in enumerate(zip(table["part"], table["stratum"], strict=True)):
        picture[parts.index(part), column] = to_rgb(COLOURS[strata.index(stratum) % len(COLOURS)])
    figure, ax = plt.subplots(figsize=(9, 1.2 + 0.32 * len(parts)), layout="constrained")
    ax.imshow(picture, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(parts)), [f"{part} ({(table['part'] == part).sum()})" for part in parts], fontsize=8)
    few = len(table) <= 10
    ax.set_xticks(range(len(table)) if few else [], table["case"] if few else [], fontsize=8)
    ax.set_xlabel("" if few else f"{len(table)} cases, by their ids")
    ax.set_yticks(np.arange(len(parts) + 1) - 0.5, minor=True)
    ax.grid(which="minor", axis="y", color="#CCCCCC", lw=0.5)
    ax.tick_params(which="minor", length=0)
    if len(strata) > 1:
        figure.legend(
            handles=[Patch(color=COLOURS[i % len(COLOURS)], label=name) for i, name in enumerate(strata)],
            loc="outside lower center", ncols=6, fontsize=8, frameon=False,
        )  # fmt: skip
    ax.set_title(title, fontsize=10)
    return figure
