"""Evaluation: a prediction against a reference on the file's grid; one row a case, class and metric, the only stored truth.

What each metric means, and the one rule for empty masks, stand in `homelib.run.metrics`; means are made from the rows, each time anew.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.ndimage import find_objects

from . import surface
from .lesions import count_lesions
from .metrics import LESIONS, METRICS, Metric, metric_of, tolerance_of, value_if_empty

__all__ = ["METRICS", "evaluate"]

CROP_MARGIN = 1  # so that a mask's surface in the crop is its surface in the volume
COLUMNS = ["case", "method", "label_origin", "class", "metric", "value", "unit", "reference_voxels", "predicted_voxels"]


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
    lesion_classes: Sequence[str] = (),
    background: bool = False,
) -> pd.DataFrame:
    """Measure every class but the background.

    Args:
        predicted, reference: class indices (D, H, W) on one grid.
        spacing_mm: of that grid.
        class_names: by index, background first.
        case, method, label_origin: stand in every row (label_origin: REF, MODEL, UNSTATED or SYNTHETIC).
        metrics: of `METRICS`, or `nsd_<tolerance>mm`.
        lesion_classes: whose pieces are counted too (the metrics `LESIONS`).
        background: measure the overlap of the background too, as some published means have it.

    Returns:
        Columns case, method, label_origin, class, metric, value, unit, reference_voxels, predicted_voxels.
    """
    if predicted.shape != reference.shape:
        raise ValueError(f"predicted has shape {predicted.shape}, reference {reference.shape}")
    diagonal_mm = float(np.linalg.norm(np.array(reference.shape) * np.array(spacing_mm)))
    boxes = surface.both(lambda volume: find_objects(np.asarray(volume), max_label=len(class_names) - 1), predicted, reference)
    rows = []
    for index, name in enumerate(class_names):
        wanted = [metric_of(metric) for metric in (*metrics, *(LESIONS if name in lesion_classes else ()))]
        if index == 0:
            wanted = [metric for metric in wanted if metric.kind == "overlap" and metric.surface is None] if background else []
        if not wanted:
            continue
        box = _union([its[index - 1] for its in boxes], reference.shape) if index else (slice(None),) * 3
        P, R = predicted[box] == index, reference[box] == index
        counts = {"reference_voxels": int(R.sum()), "predicted_voxels": int(P.sum())}
        found = _measure(wanted, P, R, counts, tuple(float(s) for s in spacing_mm), diagonal_mm)
        about = {"case": case, "method": method, "label_origin": label_origin, "class": name}
        rows += [about | {"metric": metric.name, "value": found[metric.name], "unit": metric.unit} | counts for metric in wanted]
    return pd.DataFrame(rows, columns=COLUMNS)


def _measure(wanted: Sequence[Metric], P: np.ndarray, R: np.ndarray, counts: dict, spacing_mm: tuple[float, ...], diagonal_mm: float) -> dict[str, float]:
    """Each metric's value. Distances are looked up once for all metrics that need them."""
    p, r = counts["predicted_voxels"], counts["reference_voxels"]
    both = int((P & R).sum())
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    plain = {
        "dice": lambda: 2 * both / (p + r),
        "iou": lambda: both / (p + r - both),
        "sensitivity": lambda: both / r,
        "precision": lambda: both / p,
        "reference_volume": lambda: r * voxel_ml,
        "predicted_volume": lambda: p * voxel_ml,
        "volume_error": lambda: (p - r) / r,
    }
    distances, lesions, found = {}, None, {}
    for metric in wanted:
        value = value_if_empty(metric, not p, not r, diagonal_mm=diagonal_mm)
        if value is None and metric.surface:
            if metric.surface not in distances:
                between = surface.surfel_distances if metric.surface == "surfels" else surface.voxel_distances
                distances[metric.surface] = between(P, R, spacing_mm)
            value = _distance(metric.name, distances[metric.surface])
        elif value is None and metric.kind == "lesions":
            lesions = lesions or count_lesions(P, R)
            value = lesions[metric.name]
        elif value is None:
            value = plain[metric.name]()
        found[metric.name] = float(value)
    return found


def _distance(name: str, distances: surface.Distances) -> float:
    named = {"hd95": surface.hausdorff95, "asd": surface.average, "hd95_voxels": surface.hausdorff95_voxels, "hd95_pooled": surface.hausdorff95_pooled}
    return named[name](distances) if name in named else surface.within(distances, tolerance_of(name))


def _union(boxes: Sequence[tuple[slice, ...] | None], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box around both masks' boxes, with a margin, so that only it is searched; nothing where both are empty."""
    there = [box for box in boxes if box is not None]
    if not there:
        return (slice(0, 0),) * len(shape)
    return tuple(
        slice(max(0, min(box[axis].start for box in there) - CROP_MARGIN), min(n, max(box[axis].stop for box in there) + CROP_MARGIN))
        for axis, n in enumerate(shape)
    )
