"""The same rows, averaged as others average theirs: a published mean can only be compared with one made the same way.

Each convention says which HD95 it takes, what a missed, a spurious and an absent structure count, and in which order means are taken. The rows
themselves (`homelib.run.evaluate`) stay as they are.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from ..errors import UserError

NONE = float("nan")
OVERLAPS = ("dice", "iou")


@dataclass(frozen=True)
class Empty:
    """What counts where masks are empty; `None` keeps the row's own value (the worst one, or no number)."""

    missed: float | None = None
    spurious: float | None = None
    absent: float | None = None


@dataclass(frozen=True)
class Convention:
    """overlap, distance: what empty masks count. distance_metric: the row that is its HD95, None where it has none.

    order: "classes" means over the cases of each class, then over classes; "cases" over the classes of each case, then over cases;
    "pairs" over all pairs of case and class alike. nothing: what a mean of no number is.
    """

    name: str
    definition: str
    overlap: Empty = Empty()
    distance: Empty = Empty()
    distance_metric: str | None = "hd95"
    order: Literal["classes", "cases", "pairs"] = "classes"
    background: bool = False
    nothing: float = NONE


_ALL = (
    Convention("own", "missed and spurious count as the worst value; a class that is nowhere has no number; mean over cases, then over classes"),
    Convention(
        "monai",
        "DiceMetric and HausdorffDistanceMetric without background: a spurious structure is left out of Dice, missed and spurious ones are left out of "
        "HD95, whose mean of nothing is 0; mean over classes, then over cases",
        Empty(missed=0.0, spurious=NONE, absent=NONE),
        Empty(missed=NONE, spurious=NONE, absent=NONE),
        "hd95_voxels",
        "cases",
        nothing=0.0,
    ),
    Convention(
        "segmamba",
        "missed, spurious and absent structures all count as Dice 0 and HD95 50; HD95 pools both directions; mean over cases, then over classes. "
        "SegMamba's script takes every spacing as 1 mm; here it is the file's",
        Empty(0.0, 0.0, 0.0),
        Empty(50.0, 50.0, 50.0),
        "hd95_pooled",
    ),
    Convention(
        "nnunet",
        "summary.json of nnU-Net 2: missed and spurious structures count as 0, absent ones are left out; mean over cases, then over classes; no distances",
        Empty(0.0, 0.0, NONE),
        distance_metric=None,
    ),
    Convention(
        "brats",
        "BraTS: Dice 1 and HD95 0 where both are empty, Dice 0 and HD95 374 where one is; mean over cases, then over classes",
        Empty(0.0, 0.0, 1.0),
        Empty(374.0, 374.0, 0.0),
        "hd95_voxels",
    ),
)
CONVENTIONS: dict[str, Convention] = {convention.name: convention for convention in _ALL}
_HD95 = "HD95 of surface voxels (Eq. 22), over the cases that have the class (Eq. 23); how a missed structure counts it does not say, here as ours"
_PAPER = Convention("paper", f"the paper's mean over cases, then over classes; {_HD95}", distance=Empty(spurious=NONE), distance_metric="hd95_voxels")
_FETA = replace(_PAPER, definition=f"the paper's FeTA mean, as its tables suggest: the background counts as an eighth class; {_HD95}", background=True)
_PANORAMA = replace(_PAPER, definition=f"the paper's PANORAMA mean, as its tables suggest: over all pairs of case and structure; {_HD95}", order="pairs")
_OF_DATA = {"feta_2022": _FETA, "panorama": _PANORAMA}


def convention_of(name: str, *, data_set: str | None = None) -> Convention:
    """By name; `paper` has another form for the data sets whose printed means fit only it. Raises UserError for an unknown name."""
    if name == "paper":
        return _OF_DATA.get(data_set or "", _PAPER)
    if name not in CONVENTIONS:
        raise UserError(f"convention: found {name!r}, expected one of {', '.join([*CONVENTIONS, 'paper'])}.")
    return CONVENTIONS[name]


def averaged(rows: pd.DataFrame, convention: Convention) -> pd.DataFrame:
    """Means of the rows, one line a method, metric and class, the mean of all under the class `mean`.

    Args:
        rows: as `homelib.run.evaluate` gives them; of one data set.
        convention: `convention_of(name)`.

    Returns:
        Columns method, metric ("dice", "iou", "hd95"), class, value, references, missed, spurious.

    Raises:
        UserError: it needs rows that are not there (a background, another HD95).
    """
    if convention.background and "background" not in set(rows["class"]):
        raise UserError("convention paper: no rows of the class background; measure the files again by `home evaluate`.")
    wanted = {name: name for name in OVERLAPS if name in set(rows["metric"])}
    if convention.distance_metric:
        if convention.distance_metric not in set(rows["metric"]):
            raise UserError(f"convention {convention.name}: no rows of the metric {convention.distance_metric}; measure the files by `home evaluate PRED REF`.")
        wanted[convention.distance_metric] = "hd95"
    kept = rows if convention.background else rows[rows["class"] != "background"]
    tables = []
    for (method, metric), part in kept[kept["metric"].isin(wanted)].groupby(["method", "metric"], sort=False):
        part = part.assign(value=_with_empty(part, convention.overlap if metric in OVERLAPS else convention.distance))
        tables.append(_means(part, convention).assign(method=method, metric=wanted[metric]))
    columns = ["method", "metric", "class", "value", "references", "missed", "spurious"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def counts(rows: pd.DataFrame) -> dict[str, int]:
    """References, missed and spurious structures among rows of one metric."""
    reference, predicted = rows["reference_voxels"] > 0, rows["predicted_voxels"] > 0
    return {"references": int(reference.sum()), "missed": int((reference & ~predicted).sum()), "spurious": int((~reference & predicted).sum())}


def _with_empty(rows: pd.DataFrame, empty: Empty) -> np.ndarray:
    reference, predicted = (rows[column].to_numpy() > 0 for column in ("reference_voxels", "predicted_voxels"))
    values = rows["value"].to_numpy(float, copy=True)
    for where, counted in ((reference & ~predicted, empty.missed), (~reference & predicted, empty.spurious), (~reference & ~predicted, empty.absent)):
        if counted is not None:
            values[where] = counted
    return values


def _means(rows: pd.DataFrame, convention: Convention) -> pd.DataFrame:
    """Of one method and metric: a line a class, and the mean of all in the convention's order; NaN takes no part."""
    by_class = rows.groupby("class", sort=False)["value"].mean()
    if convention.order == "classes":
        total = by_class.mean()
    elif convention.order == "cases":
        total = rows.groupby("case", sort=False)["value"].mean().mean()
    else:
        total = rows["value"].mean()
    lines = [{"class": name, "value": value} | counts(rows[rows["class"] == name]) for name, value in by_class.items()]
    table = pd.DataFrame([*lines, {"class": "mean", "value": total} | counts(rows)])
    return table.assign(value=table["value"].fillna(convention.nothing))
