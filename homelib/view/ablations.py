"""Figures of a grid: what arms score for what they cost, group sizes beside numbers of experts, paired differences, and how cost grows.

Tables come from `homelib.study.scores`, `costs` and `complexity`; nothing is computed here that a table could need.
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from .plots import plain_numbers

FRONT, REST, TESTED, OPEN = "#0072B2", "#7F7F7F", "#D55E00", "#0072B2"  # Okabe and Ito's
LAYERS = {"Mamba": "#0072B2", "HoME": "#D55E00"}


def cost_score_front(table: pd.DataFrame, *, costs: Sequence[str], score: str, title: str) -> Figure:
    """One panel a cost: every arm's mean score, with its interval, over what it costs. The front joins those that no arm beats at less cost.

    Args:
        table: index arm; columns mean, low, high (NaN where there is one run), and the costs.
        costs: columns, each with its unit in its name.
        score: what is on the vertical axis, higher is better.
    """
    across = min(2, len(costs))  # more side by side would be made too small to read, to fit a page
    down = math.ceil(len(costs) / across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across + 2, 3.9 * down + 0.5), layout="constrained", sharey=True, squeeze=False)
    for ax in axes.flat[len(costs) :]:
        ax.set_axis_off()
    for ax, cost in zip(axes.flat, costs, strict=False):
        shown = table.dropna(subset=[cost, "mean"])
        front = _front(shown, cost)
        for arm, row in shown.iterrows():
            colour, place = FRONT if arm in front else REST, (row[cost], row["mean"])
            ax.plot([row[cost]] * 2, [row["low"], row["high"]], color=colour, lw=1, alpha=0.6)
            ax.plot(*place, "o", color=colour, ms=11, zorder=3)
            ax.annotate(str(table.index.get_loc(arm) + 1), place, color="white", fontsize=7, ha="center", va="center", zorder=4)
        ax.step(shown.loc[front, cost], shown.loc[front, "mean"], where="post", color=FRONT, lw=1.2, ls="--", zorder=2)
        ax.set_xscale("log")
        plain_numbers(ax)
        ax.tick_params(axis="x", which="both", labelsize=8)
        ax.set_xlabel(cost)
        ax.grid(alpha=0.25)
    for ax in axes[:, 0]:
        ax.set_ylabel(score)
    figure.legend(
        [plt.Line2D([], [], linestyle="")] * len(table),
        [f"{number + 1} {arm}" for number, arm in enumerate(table.index)],
        loc="outside right center",
        handlelength=0,
        fontsize=8,
        frameon=False,
    )
    figure.suptitle(f"{title}\nblue: no arm scores more for less; bars: 95 % intervals over runs", fontsize=10)
    return figure


def group_expert_heat(table: pd.DataFrame, *, score: str, title: str) -> Figure:
    """Score by group size (columns) and number of experts (rows), each cell with its number; a cell that was not run is empty.

    Args:
        table: of `homelib.study.arms.experts_and_groups`: a row a number of experts, a column a group size, NaN where there is none.
    """
    rows, columns = list(table.index), list(table.columns)
    figure, ax = plt.subplots(figsize=(2.6 + 1.3 * len(columns), 1.9 + 0.6 * len(rows)), layout="constrained")
    values = table.to_numpy(float)
    image = ax.imshow(np.ma.masked_invalid(values), cmap="cividis", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            ax.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black", fontsize=9)
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_xlabel("group sizes of the four stages")
    ax.set_ylabel("experts of level 1 / level 2")
    figure.colorbar(image, ax=ax, label=score)
    ax.set_title(title, fontsize=10)
    return figure


def paired_differences(table: pd.DataFrame, *, against: str, score: str, title: str) -> Figure:
    """Each arm less `against`, run by run: the mean with its interval; red where it stays different from zero after Holm's correction.

    Args:
        table: of `homelib.study.scores.differences`, in the unit of `score`.
    """
    order = table.sort_values("difference").reset_index(drop=True)
    figure, ax = plt.subplots(figsize=(7, 1.2 + 0.32 * len(order)), layout="constrained")
    for place, arm in order.iterrows():
        colour = TESTED if arm["p_holm"] < 0.05 else OPEN
        ax.plot([arm["low"], arm["high"]], [place, place], color=colour, lw=1.5)
        ax.plot(arm["difference"], place, "o", color=colour, ms=5)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(order)), [f"{arm['arm']} ({arm['runs']})" for _, arm in order.iterrows()], fontsize=8)
    ax.set_xlabel(f"{score}: difference to {against}, 95 % interval over runs")
    ax.grid(axis="x", alpha=0.25)
    ax.set_title(f"{title}\nin brackets: runs that both have; red: p below 0.05 after Holm's correction", fontsize=10)
    return figure


def complexity_lines(table: pd.DataFrame, *, title: str) -> Figure:
    """Seconds and memory of Mamba and HoME over tokens, both axes logarithmic; dashed, the paper's formula through each layer's first point.

    Args:
        table: of `homelib.study.complexity.complexity`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, (column, name) in zip(axes, (("seconds", "forward and backward, seconds"), ("kept_mib", "kept for the backward pass, MiB")), strict=False):
        for layer, part in table.groupby("layer", sort=False):
            ax.plot(part["tokens"], part[column], "o-", color=LAYERS[layer], label=f"{layer}, measured")
            formula = part["formula"] / part["formula"].iloc[0] * part[column].iloc[0]
            ax.plot(part["tokens"], formula, "--", color=LAYERS[layer], lw=1, label=f"{layer}, paper's formula")
        ax.set_ylabel(name)
    home = table[table["layer"] == "HoME"]
    axes[2].plot(home["tokens"], home["level_1_scores"], "o-", color=LAYERS["HoME"], label="level 1")
    axes[2].plot(home["tokens"], home["level_2_scores"], "s-", color="#CC79A7", label="level 2, not in the formula")
    axes[2].set_ylabel("scores that HoME's routers compute")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("tokens")
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.tick_params(axis="x", labelsize=8, rotation=45)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    return figure


def _front(table: pd.DataFrame, cost: str) -> list:
    """Arms that no other beats for less, by rising cost."""
    front, best = [], -np.inf
    for arm, row in table.sort_values([cost, "mean"], ascending=[True, False]).iterrows():
        if row["mean"] > best:
            front.append(arm)
            best = row["mean"]
    return front
