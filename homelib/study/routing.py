"""Where every expert looks: what the routers of HoME decide (`trace_routing`), as maps of a scan (`expert_maps`), and what a map says of the classes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..config import IGNORE
from .expert_maps import RoutingMaps, expert_maps, routing_maps
from .trace import Reduced, Routing, Trace, trace_routing

__all__ = ["Reduced", "Routing", "RoutingMaps", "Trace", "expert_maps", "experts_by_class", "routing_maps", "trace_routing", "utilisation"]


def experts_by_class(maps: np.ndarray, label: np.ndarray, class_names: Sequence[str]) -> pd.DataFrame:
    """Mean weight of every expert within every class, and its lift: that mean over the expert's mean in the whole volume.

    Args:
        maps: (E, D, H, W), summing to one over E.
        label: (D, H, W) class indices; voxels of 255 are left out, of the experts' means too.
        class_names: by index.

    Returns:
        Tidy rows: class, expert, weight, lift, voxels. A lift of 1 means no association; it shows association, not cause.
    """
    known = label != IGNORE
    of = label[known]
    voxels = np.bincount(of, minlength=len(class_names))
    sums = np.stack([np.bincount(of, weights=one[known], minlength=len(class_names)) for one in maps])  # (E, classes), summed in float64
    overall, rows = sums.sum(1) / of.size, []
    for index, name in enumerate(class_names):
        if voxels[index]:
            weight = sums[:, index] / voxels[index]
            rows += [
                {"class": name, "expert": e, "weight": float(w), "lift": float(w / overall[e]), "voxels": int(voxels[index])} for e, w in enumerate(weight)
            ]
    return pd.DataFrame(rows)


def utilisation(maps: np.ndarray) -> pd.DataFrame:
    """One row an expert of maps (E, D, H, W): its mean weight, and the share of voxels that it wins; with the normalised entropy (0 hard, 1 even) of the
    volume's routing."""
    maps = maps.astype(np.promote_types(maps.dtype, np.float32), copy=False)
    share = np.bincount(maps.argmax(0).ravel(), minlength=len(maps)) / maps[0].size
    entropy = -(maps * np.log(np.maximum(maps, 1e-12))).sum(0).mean() / np.log(len(maps)) if len(maps) > 1 else 0.0
    return pd.DataFrame({"expert": range(len(maps)), "mean weight": maps.mean((1, 2, 3)), "voxels won": share, "entropy": entropy})
