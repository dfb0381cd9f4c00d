"""Evaluation: Dice and HD95 of a prediction against a reference on the file's grid; one row a case, class and metric.

Each metric says its best and worst value, its unit and its direction. Empty masks are dealt with here and nowhere else: both empty, no
number (the class is not there); one empty, the worst value, so that a missed structure can never raise a mean.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

CROP_MARGIN = 1


@dataclass(frozen=True)
class Metric:
    """What a number means. `worst` is None where it is the image's diagonal in mm."""

    name: str
    unit: str
    best: float
    worst: float | None
    higher_is_better: bool
    definition: str


METRICS = {
    "dice": Metric("dice", "1", 1.0, 0.0, True, "2 |P and R| / (|P| + |R|)"),
    "hd95": Metric("hd95", "mm", 0.0, None, False, "larger of the two directed 95th percentiles of the distances between surface voxels (MONAI)"),
}


def evaluate(
    predicted: np.ndarray,
    reference: np.ndarray,
    *,
    spacing_mm: Sequence[float],
    class_names: Sequence[str],
    case: str,
    method: str,
    label_origin: str,
    metrics: Sequence[str] = ("dice", "hd95"),
) -> pd.DataFrame:
    """Measure every class but the background.

    Args:
        predicted, reference: class indices (D, H, W) on one grid.
        spacing_mm: of that grid.
        class_names: by index, background first.
        case, method, label_origin: stand in every row (label_origin: REF, MODEL, UNSTATED or SYNTHETIC).
        metrics: of `METRICS`.

    Returns:
        Columns case, method, label_origin, class, metric, value, unit, reference_voxels, predicted_voxels.
    """
    if predicted.shape != reference.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, reference {reference.shape}")
    diagonal = float(np.linalg.norm(np.array(reference.shape) * np.array(spacing_mm)))
    rows = []
    for index, name in enumerate(class_names[1:], start=1):
        P, R = predicted == index, reference == index
        counts = {"reference_voxels": int(R.sum()), "predicted_voxels": int(P.sum())}
        box = _box(P | R)
        for metric in metrics:
            told = METRICS[metric]
            worst = diagonal if told.worst is None else told.worst
            value = _measure(metric, P[box], R[box], spacing_mm, worst)
            rows.append(
                {"case": case, "method": method, "label_origin": label_origin, "class": name, "metric": metric, "value": value, "unit": told.unit} | counts
            )
    return pd.DataFrame(rows)


def _measure(metric: str, P: np.ndarray, R: np.ndarray, spacing_mm: Sequence[float], worst: float) -> float:
    if not P.any() and not R.any():
        return float("nan")
    if not P.any() or not R.any():
        return worst
    P, R = (torch.from_numpy(mask)[None, None] for mask in (P, R))
    if metric == "dice":
        return compute_dice(P, R).item()
    with warnings.catch_warnings():  # MONAI warns of an argument that it passes to itself
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy.*", category=FutureWarning)
        return compute_hausdorff_distance(P, R, include_background=True, percentile=95, spacing=[float(s) for s in spacing_mm]).item()


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The box around a mask, with a margin, so that only it is searched; the whole volume for an empty mask."""
    box = []
    for axis in range(mask.ndim):
        line = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(max(0, line[0] - CROP_MARGIN), line[-1] + 1 + CROP_MARGIN) if line.size else slice(None))
    return tuple(box)
