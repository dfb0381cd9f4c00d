"""What tables say of the experts: by class, over training, and how one voxel's token is shared out. Drawn from tidy tables, as `plots` does."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from scipy.optimize import isotonic_regression

from ..axes import three
from .routed import Routed, Voxel, expert_colours

MOST_NAMED = 12  # curves of a panel: more names would lie over each other


def lift_matrix(table: pd.DataFrame, *, title: str) -> Figure:
    """Expert by class: how much more than its average an expert weighs within a class, the lift, in numbers; its log2 in colours.

    Args:
        table: tidy rows class, expert, lift. With `low` and `high`, the ends of a permutation band, what lies beyond its own band is framed: there the
            expert is associated with the class. With `p`, which allows for all cells together, those below 0.05 have a star.
    """
    matrix = _matrix(table, "lift")
    values = np.log2(np.maximum(matrix.to_numpy(), 1e-3))
    beyond = sure = np.zeros(matrix.shape, bool)
    told = ["numbers: lift"]
    if {"low", "high"} <= set(table.columns):
        low, high = (_matrix(table, end).to_numpy() for end in ("low", "high"))
        beyond = (matrix.to_numpy() < low) | (matrix.to_numpy() > high)
        told.append("framed: beyond its permutation band")
    if "p" in table:
        sure = _matrix(table, "p").to_numpy() < 0.05
        told.append("*: p < 0.05 over all cells")
    reach = max(0.1, float(np.abs(values).max()))
    figure, ax = plt.subplots(figsize=(2.6 + 0.7 * matrix.shape[1], 1.4 + 0.33 * matrix.shape[0]), layout="constrained")
    picture = ax.imshow(values, cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    ax.set_yticks(range(len(matrix)), [c.replace("_", " ") for c in matrix.index], fontsize=8)
    ax.set_xticks(range(matrix.shape[1]), matrix.columns)
    ax.set_xlabel("\n".join(["expert", *told]), fontsize=8)
    for (row, column), value in np.ndenumerate(matrix.to_numpy()):
        dark = abs(values[row, column]) > 0.6 * reach
        number = f"{value:.2f}" + "*" * bool(sure[row, column])
        ax.text(column, row, number, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        if beyond[row, column]:
            ax.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="black", lw=1.6))
    figure.colorbar(picture, ax=ax, label="log2 lift")
    ax.set_title(title, fontsize=10)
    return figure


def _matrix(table: pd.DataFrame, values: str) -> pd.DataFrame:
    return table.pivot_table(index="class", columns="expert", values=values, sort=False)


def utilisation_curves(table: pd.DataFrame, *, title: str, share: str = "share") -> Figure:
    """The share of every expert over training, a panel a layer; dashed: the same share for all.

    Args:
        table: tidy rows step, stage, expert and the share; with `block` and `level`, a panel for each.
        share: the column that has it.
    """
    keys = [key for key in ("stage", "block", "level") if key in table]
    panels = {", ".join(f"{key} {value}" for key, value in zip(keys, place, strict=True)): part for place, part in table.groupby(keys, sort=True)}
    figure, axes = _panels(len(panels), "share of the tokens' weight")
    for ax, (name, part) in zip(axes, panels.items(), strict=True):
        curves = part.pivot_table(index="step", columns="expert", values=share)
        _curves(ax, curves, expert_colours(curves.shape[1]), even=1 / curves.shape[1])
        ax.set_title(name, fontsize=9)
        ax.set_ylim(0, None)
    figure.suptitle(title, fontsize=11)
    return figure


def lift_curves(table: pd.DataFrame, *, title: str) -> Figure:
    """The lift of every expert of one layer in each class over training, a panel a class, log2; dashed: no association.

    Args:
        table: tidy rows step, class, expert, lift; background is left out.
    """
    classes = [name for name in dict.fromkeys(table["class"]) if name != "background"]
    figure, axes = _panels(len(classes), "log2 lift")
    for ax, name in zip(axes, classes, strict=True):
        curves = np.log2(np.maximum(table[table["class"] == name].pivot_table(index="step", columns="expert", values="lift"), 1e-3))
        _curves(ax, curves, expert_colours(curves.shape[1]), even=0)
        ax.set_title(name.replace("_", " "), fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def information_curves(table: pd.DataFrame, *, title: str) -> Figure:
    """Bits that class and expert share over training, a panel a level with a curve a stage and block. Chance leaves some too: see the table with its band.

    Args:
        table: tidy rows step, stage, block, level, bits.
    """
    levels = list(table.groupby("level", sort=True))
    figure, axes = _panels(len(levels), "bits")
    for ax, (level, part) in zip(axes, levels, strict=True):
        curves = part.pivot_table(index="step", columns=["stage", "block"], values="bits")
        several = len(set(curves.columns.get_level_values("block"))) > 1
        curves.columns = [f"stage {stage}" + (f", block {block}" if several else "") for stage, block in curves.columns]
        _curves(ax, curves, expert_colours(curves.shape[1]), even=None)
        ax.set_title(f"level {level}", fontsize=9)
        ax.set_ylim(0, None)
    figure.suptitle(title, fontsize=11)
    return figure


def _panels(count: int, what: str) -> tuple[Figure, list[Axes]]:
    """So many axes over the same steps, four in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(4.5, 3 * columns), 2.6 * rows + 0.5), layout="constrained", squeeze=False, sharex=True)
    for ax in axes.ravel()[count:]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for line in axes:
        line[0].set_ylabel(what)
    return figure, list(axes.ravel()[:count])


def _curves(ax: Axes, curves: pd.DataFrame, colours: Sequence[str], *, even: float | None) -> None:
    """A curve a column over the steps, its name at its end, of many those that end farthest from zero; dashed: `even`."""
    ends, reach = curves.iloc[-1], np.ptp(np.append(curves.to_numpy(), 0))
    named = ends[ends.index.isin(ends.abs().nlargest(MOST_NAMED).index)]
    heights = dict(zip(named.index, _apart(named.to_numpy(), least=0.055 * reach), strict=True))
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        ax.plot(curve.index, curve, color=colour, lw=1.4, marker="o", ms=2.5)
        if name in heights:
            ax.annotate(str(name), (curve.index[-1], heights[name]), xytext=(6, 0), textcoords="offset points", fontsize=7, va="center", color=colour)
    if even is not None:
        ax.axhline(even, color="#888888", lw=0.8, ls="--")
    ax.spines[["top", "right"]].set_visible(False)


def _apart(values: np.ndarray, *, least: float) -> np.ndarray:
    """Heights for names at the ends of curves: as near to the values as they can be, in their order and at least so far apart."""
    order, steps = np.argsort(values, kind="stable"), least * np.arange(len(values))
    heights = isotonic_regression(values[order] - steps).x + steps
    return heights[np.argsort(order, kind="stable")]


Span = tuple[float, float]  # low and high end on a column


def token_flow(routed: Routed, stage: int, block: int, *, at: Voxel, title: str = "") -> Figure:
    """How the token at a voxel is shared out: to the slots of its group, each of which belongs to one expert of level 1; beside it level 2's shares.

    A ribbon is as wide as the weight that goes along it. Without maps of slots the ribbons go from the token to the experts.

    Raises:
        UserError: level 1 of that stage and block was not traced.
    """
    at = three(at)
    first = routed.weights((stage, block, 1))[(slice(None), *at)].astype(float)
    slots, second = routed.slots.get((stage, block)), routed.experts.get((stage, block, 2))
    panels = 1 + (second is not None)
    figure, axes = plt.subplots(
        1, panels, figsize=(3.2 + 3.2 * panels, 4.4), layout="constrained", squeeze=False, gridspec_kw={"width_ratios": [2, 1][:panels]}
    )
    _flow(axes[0, 0], first, None if slots is None else slots[(slice(None), *at)].astype(float))
    if second is not None:
        _bars(axes[0, 1], second[(slice(None), *at)].astype(float))
    name = routed.class_at(at)
    of = name and f" ({name})"
    figure.suptitle(f"{routed.name}, stage {stage}, block {block}: voxel {at}{of}{title and '; ' + title}", fontsize=11)
    return figure


def _flow(ax: Axes, experts: np.ndarray, slots: np.ndarray | None) -> None:
    """Ribbons from the token through its slots (M,) to the experts (E,), first on top."""
    colours, ends = expert_colours(len(experts)), _stacked(experts, gaps=0.12)
    _nodes(ax, 0, [(0.06, 1.06)], ["#555555"], ["token"], "right")
    shares = experts if slots is None else slots
    of = np.arange(len(shares)) // (len(shares) // len(experts))  # the expert of each
    starts = _stacked(shares, gaps=0, top=1.06)
    if slots is not None:
        middle = _stacked(shares, gaps=0.12)
        for e, (_, high) in enumerate(ends):
            for m, span in zip(np.flatnonzero(of == e), _stacked(slots[of == e], gaps=0, top=high), strict=True):
                _ribbon(ax, (1.05, middle[m]), (2, span), colours[e])
        for expert, start, span in zip(of, starts, middle, strict=True):
            _ribbon(ax, (0.05, start), (1, span), colours[expert])
        names = [f"slot {m}" if share > 0.03 else "" for m, share in enumerate(slots)]
        _nodes(ax, 1, middle, [colours[e] for e in of], names, "right")
    else:
        for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
            _ribbon(ax, (0.05, start), (2, end), colours[e])
    _nodes(ax, 2, ends, colours, [f"expert {e}  {share:.2f}" if share > 0.02 else "" for e, share in enumerate(experts)], "left")
    ax.set(xlim=(-0.4, 2.75), ylim=(-0.03, 1.15))
    ax.set_axis_off()
    ax.set_title("level 1: token, experts" if slots is None else "level 1: token, slots, experts", fontsize=10)


def _bars(ax: Axes, shares: np.ndarray) -> None:
    ax.barh(range(len(shares)), shares, color=expert_colours(len(shares)))
    ax.set_yticks(range(len(shares)), [f"expert {e}" for e in range(len(shares))], fontsize=max(5, 9 - len(shares) // 8))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("share")
    ax.set_title("level 2, through all slots", fontsize=10)


def _stacked(shares: np.ndarray, *, gaps: float, top: float = 1.12) -> list[Span]:
    """Spans as long as the shares, one below the other from `top`, with `gaps` between all of them together."""
    gap = gaps / max(1, len(shares) - 1)
    highs = top - np.concatenate([[0], np.cumsum(shares + gap)[:-1]])
    return [(float(high - share), float(high)) for high, share in zip(highs, shares, strict=True)]


def _ribbon(ax: Axes, start: tuple[float, Span], end: tuple[float, Span], colour: str) -> None:
    (x0, (low0, high0)), (x1, (low1, high1)) = start, end
    half = (x0 + x1) / 2
    points = [(x0, high0), (half, high0), (half, high1), (x1, high1), (x1, low1), (half, low1), (half, low0), (x0, low0), (x0, high0)]
    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
    ax.add_patch(PathPatch(Path(points, codes), facecolor=colour, alpha=0.45, edgecolor="none"))


def _nodes(ax: Axes, x: float, spans: Sequence[Span], colours: Sequence[str], names: Sequence[str], side: str) -> None:
    """A bar a span at a column; its name to the left of it (`side` "right") or to its right ("left")."""
    for (low, high), colour, name in zip(spans, colours, names, strict=True):
        ax.add_patch(Rectangle((x, low), 0.05, high - low, facecolor=colour))
        place = (x - 0.03 if side == "right" else x + 0.08, (low + high) / 2)
        ax.text(*place, name, ha=side, va="center", fontsize=7.5)
