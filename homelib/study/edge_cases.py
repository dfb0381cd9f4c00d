"""What every measure says where it is least clear: empty masks, one voxel, a mask at the border, voxels that are no cubes; beside MONAI's HD95.

For readers of a table of results, who must know what a missed structure counts; the rule is `homelib.run.metrics.EMPTY_RULE`.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..run.evaluate import evaluate

SHAPE = (24, 24, 16)
ISOTROPIC_MM, THICK_MM = (1.0, 1.0, 1.0), (0.8, 0.8, 3.0)
METRICS = ("dice", "hd95", "asd", "nsd_2mm", "hd95_voxels")


def masks() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]:
    """Name -> prediction and reference (24, 24, 16) bool, and the spacing in mm."""
    none = np.zeros(SHAPE, bool)
    cube, moved, whole, point, beside = (none.copy() for _ in range(5))
    cube[8:16, 8:16, 4:12] = moved[9:17, 8:16, 4:12] = whole[:8, :8, :8] = True
    point[10, 10, 8] = beside[10, 10, 10] = True
    thick_step = np.roll(cube, 1, axis=2)
    return {
        "the same": (cube, cube, ISOTROPIC_MM),
        "empty prediction": (none, cube, ISOTROPIC_MM),
        "empty reference": (cube, none, ISOTROPIC_MM),
        "both empty": (none, none, ISOTROPIC_MM),
        "one voxel, the same": (point, point, ISOTROPIC_MM),
        "one voxel, two voxels beside": (beside, point, ISOTROPIC_MM),
        "at the border, the same": (whole, whole, ISOTROPIC_MM),
        "moved by one voxel": (moved, cube, ISOTROPIC_MM),
        "moved by one voxel of 0.8 mm (0.8x0.8x3)": (moved, cube, THICK_MM),
        "moved by one voxel of 3 mm (0.8x0.8x3)": (thick_step, cube, THICK_MM),
    }


def edge_cases(metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """One row a case of `masks`: the metrics, and MONAI's HD95 (NaN or infinite where a mask is empty) in the column "MONAI's hd95"."""
    rows = {}
    for name, (P, R, spacing_mm) in masks().items():
        about: dict[str, Any] = {"spacing_mm": spacing_mm, "class_names": ("background", "x"), "case": name, "method": "", "label_origin": "SYNTHETIC"}
        found = evaluate(P.astype(np.uint8), R.astype(np.uint8), metrics=metrics, **about)
        rows[name] = dict(zip(found["metric"], found["value"], strict=True)) | {"MONAI's hd95": _monai(P, R, spacing_mm)}
    return pd.DataFrame(rows).T.rename_axis("case")


def _monai(P: np.ndarray, R: np.ndarray, spacing_mm: Sequence[float]) -> float:
    import torch
    from monai.metrics import compute_hausdorff_distance

    predicted, reference = (torch.from_numpy(mask)[None, None] for mask in (P, R))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty masks
        return compute_hausdorff_distance(predicted, reference, include_background=True, percentile=95, spacing=list(spacing_mm)).item()
