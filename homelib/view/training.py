"""Figures of a training: while it runs, what it took, and how its predictions became better."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .plots import best_slices, class_legend, column_name, plain_numbers, show_label, show_slice, whole_steps

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
LEAST_STEPS = 2  # of which a curve can be drawn


def live_curves(histories: Mapping[str, pd.DataFrame], *, steps: int, smooth_steps: int = 20) -> Figure:
    """Loss (running median) and Dice of some trainings so far, a row each; the width is that of all `steps`."""
    figure, axes = plt.subplots(len(histories), 2, figsize=(10, 0.6 + 2.2 * len(histories)), layout="constrained", squeeze=False)
    for (left, right), (name, history) in zip(axes, histories.items(), strict=True):
        left.plot(history["step"], history["loss"].rolling(smooth_steps, min_periods=1).median(), color=BLUE)
        left.set(xlim=(0, steps), ylabel="loss", title=f"{name}: step {len(history)} of {steps}")
        for column in [column for column in history if column.endswith("dice")]:
            shown = history.dropna(subset=[column])
            right.plot(shown["step"] + 1, shown[column], "o-", ms=4, color=ORANGE)
            right.set_title(column_name(column))
        right.set(xlim=(0, steps), ylim=(0, 1), ylabel="Dice")
    for ax in axes.flat:
        whole_steps(ax)
    for ax in axes[-1]:
        ax.set_xlabel("step")
    return figure


class Live:
    """Shows `live_curves` in a notebook, again and again in one place: a function of histories by name.

    >>> trained_side_by_side(demos, watch=Live(steps=800))   # doctest: +SKIP
    """

    def __init__(self, *, steps: int):
        self.steps, self._shown = steps, None

    def __call__(self, histories: Mapping[str, pd.DataFrame]) -> None:
        from IPython.display import display

        if not any(len(history) >= LEAST_STEPS for history in histories.values()):
            return
        figure = live_curves(histories, steps=self.steps)
        plt.close(figure)  # shown here, and not once more at the end of the cell
        if self._shown is None:
            self._shown = display(figure, display_id=True)
        else:
            self._shown.update(figure)


def effort_curves(history: pd.DataFrame, *, patches_a_step: int, title: str, smooth_steps: int = 20) -> Figure:
    """What a training does a step: learning rate, norm of the gradient before clipping, patches a second."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    axes[0].plot(history["step"], history["learning_rate"], color=GREEN)
    axes[0].set(ylabel="learning rate")
    axes[1].plot(history["step"], history["gradient_norm"], color=GREY, lw=0.8, label="a step")
    median = history["gradient_norm"].rolling(smooth_steps, min_periods=1).median()
    axes[1].plot(history["step"], median, color=BLUE, label=f"running median, {smooth_steps} steps")
    axes[1].legend(frameon=False, fontsize=7)
    axes[1].set(ylabel="gradient norm", yscale="log")
    plain_numbers(axes[1], "y")
    took = history["seconds"].diff().rolling(smooth_steps, min_periods=1).median()
    axes[2].plot(history["step"], patches_a_step / took, color=ORANGE)
    axes[2].set(ylabel="patches a second", ylim=(0, None))
    for ax in axes:
        ax.set_xlabel("step")
        whole_steps(ax)
    figure.suptitle(title, fontsize=11)
    return figure


def improving(
    image: np.ndarray,
    reference: np.ndarray,
    samples: Mapping[int, np.ndarray],
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    limits: tuple[float, float],
    title: str,
    most: int = 5,
) -> Figure:
    """One coronal slice: predictions after some steps, from the first to the last, and the reference. Volumes are (D, H, W)."""
    chosen = [list(samples)[i] for i in np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).round().astype(int))]
    pictures = {f"after {step} steps": samples[step] for step in chosen} | {"reference": reference}
    index = best_slices(reference)["coronal"]
    figure, axes = plt.subplots(1, len(pictures), figsize=(2.1 * len(pictures), 3.4), layout="constrained", squeeze=False)
    for ax, (name, label) in zip(axes[0], pictures.items(), strict=True):
        show_slice(ax, image, "coronal", index, spacing_mm=spacing_mm, limits=limits, bar=name == "reference")
        show_label(ax, label, "coronal", index, spacing_mm=spacing_mm, classes=len(class_names))
        ax.set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=11)
    class_legend(figure, class_names)
    return figure
