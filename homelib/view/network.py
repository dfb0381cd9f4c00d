"""The network as a figure: its parts as boxes, where the output of one enters another as arrows. Drawn from a table of what the code did."""

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

COLUMNS = {"scan": 0, "stages": 0, "lift": 1, "up": 2, "refine": 3, "head": 3}  # of a part, by the beginning of its name
COLOURS = {"scan": "#EEEEEE", "stages": "#FBD9B5", "lift": "#CFE8F7", "up": "#BFE5D6", "refine": "#BFE5D6", "head": "#EEEEEE"}
WIDE, HIGH = 2.05, 1.0  # of a box
STEP = (2.5, 1.35)  # from one box to the next, to the right and down


def u_shape(table: pd.DataFrame, *, title: str) -> Figure:
    """Encoder on the left, decoder on the right, a row a resolution (the head, of the same as what enters it, stands below); in each box the shape of what
    leaves it and its parameters.

    Args:
        table: of `homelib.network.summary.flow_table`.
    """
    places = _places(table)
    columns, rows = (max(place[axis] for place in places.values()) + 1 for axis in (0, 1))
    figure, ax = plt.subplots(figsize=(STEP[0] * columns, STEP[1] * rows + 0.3), layout="constrained")
    for part, row in table.iterrows():
        _box(ax, str(part), row, places[part])
        for before in row["after"]:
            _arrow(ax, places[before], places[part])
    ax.set(xlim=(-WIDE / 2 - 0.1, (columns - 1) * STEP[0] + WIDE / 2 + 0.1), ylim=(-(rows - 1) * STEP[1] - HIGH / 2 - 0.1, HIGH / 2 + 0.1))
    ax.set_axis_off()
    ax.set_title(title, fontsize=11)
    return figure


def _places(table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Column and row of every part: how often its grid was halved, or the next row that is free."""
    full = math.prod(table["grid"].iloc[0])
    places: dict[str, tuple[int, int]] = {}
    for part, row in table.iterrows():
        column, down = COLUMNS[part.split("[")[0]], round(math.log2(full / math.prod(row["grid"])) / 3)
        while (column, down) in places.values():
            down += 1
        places[part] = column, down
    return places


def _middle(place: tuple[int, int]) -> tuple[float, float]:
    return place[0] * STEP[0], -place[1] * STEP[1]


def _box(ax: Axes, part: str, row: pd.Series, place: tuple[int, int]) -> None:
    x, y = _middle(place)
    ax.add_patch(Rectangle((x - WIDE / 2, y - HIGH / 2), WIDE, HIGH, facecolor=COLOURS[part.split("[")[0]], edgecolor="#555555", lw=0.8))
    shape = f"{row['channels']} x {' x '.join(map(str, row['grid']))}"
    told = [row["made_of"].replace(", ", "\n", 1), shape] + [f"{row['parameters']:,} parameters"] * bool(row["parameters"])
    ax.text(x, y + HIGH / 2 - 0.06, part, ha="center", va="top", fontsize=10, fontweight="bold")
    ax.text(x, y - HIGH / 2 + 0.06, "\n".join(line for line in told if line), ha="center", va="bottom", fontsize=8)


def _arrow(ax: Axes, start: tuple[int, int], end: tuple[int, int]) -> None:
    """Along a row from side to side, along a column from top to bottom or back; else out of the side and in from below."""
    (x0, y0), (x1, y1) = _middle(start), _middle(end)
    style = {"arrowstyle": "->", "color": "#333333", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    if start[1] == end[1]:
        tail, tip = (x0 + WIDE / 2, y0), (x1 - WIDE / 2, y1)
    elif start[0] == end[0]:
        down = math.copysign(HIGH / 2, y1 - y0)
        tail, tip = (x0, y0 + down), (x1, y1 - down)
    else:
        tail, tip = (x0 + WIDE / 2, y0), (x1, y1 - HIGH / 2)
        style["connectionstyle"] = "angle,angleA=0,angleB=90"
    ax.annotate("", xy=tip, xytext=tail, arrowprops=style)
