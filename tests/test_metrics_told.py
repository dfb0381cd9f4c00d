"""docs/metrics.md: its table of edge cases is what homelib, MONAI and surface-distance say now, and what MetricsReloaded said."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance, compute_surface_dice

from homelib.study.edge_cases import METRICS, edge_cases, masks

HERE = Path(__file__).parent
TEXT = (HERE.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
KEPT = json.loads((HERE / "run" / "reference" / "metrics_reloaded.json").read_text(encoding="utf-8"))["edge"]
HEAD = "| masks | Dice: h / M / R | HD95, by area: h / S | HD95, of voxels: h / M / R | ASD: h / S / M / R | NSD at 2 mm: h / S / M / R |"


def by_homelib() -> dict[str, dict[str, float]]:
    names = dict(zip(METRICS, ("dice", "hd95", "asd", "nsd", "hd95 of voxels"), strict=True))
    return edge_cases().rename(columns=names).T.to_dict()


def by_monai(P, R, spacing_mm) -> dict[str, float]:
    one, other = (torch.from_numpy(mask)[None, None] for mask in (P, R))
    how = {"include_background": True, "spacing": list(spacing_mm)}
    return {
        "dice": compute_dice(one, other).item(),
        "hd95 of voxels": compute_hausdorff_distance(one, other, percentile=95, **how).item(),
        "asd": compute_average_surface_distance(one, other, symmetric=True, **how).item(),
        "nsd": compute_surface_dice(one, other, [2.0], use_subvoxels=True, **how).item(),
    }


def by_surface_distance(package, P, R, spacing_mm) -> dict[str, float | str]:
    """The two mean distances weighted by area. Its version 0.1 looks for numpy's Inf, which NumPy 2 has not, where a mask is empty."""

    def average(distances) -> float:
        areas = [distances[f"surfel_areas_{which}"].sum() for which in ("gt", "pred")]
        return float(np.dot(package.compute_average_surface_distance(distances), areas) / sum(areas))

    def said(measure) -> float | str:
        try:
            return measure(package.compute_surface_distances(R, P, spacing_mm))
        except AttributeError as error:
            return type(error).__name__

    return {
        "hd95": said(lambda distances: package.compute_robust_hausdorff(distances, 95)),
        "asd": said(average),
        "nsd": said(lambda distances: package.compute_surface_dice_at_tolerance(distances, 2.0)),
    }


def by_metrics_reloaded(name: str) -> dict[str, float | str]:
    return {ours: KEPT[name][theirs] for ours, theirs in {"dice": "dsc", "hd95 of voxels": "hd_perc", "asd": "assd", "nsd": "nsd"}.items()}


def cell(*values: float | str) -> str:
    def told(value: float | str) -> str:
        if value not in ("nan", "inf") and isinstance(value, str):
            return "error"
        value = float(value)
        return "none" if math.isnan(value) else "infinite" if math.isinf(value) else f"{value + 1e-9:.3f}".rstrip("0").rstrip(".")

    return " / ".join(map(told, values))


@pytest.mark.filterwarnings("ignore")  # what others say of empty masks
def test_the_table_of_edge_cases_is_what_each_package_says():
    package = pytest.importorskip("surface_distance", reason="surface-distance is not installed (it is in the extra dev)")
    lines, ours = [HEAD, "| --- | --- | --- | --- | --- | --- |"], by_homelib()
    for name, pair in masks().items():
        h, M, S, R = ours[name], by_monai(*pair), by_surface_distance(package, *pair), by_metrics_reloaded(name)
        cells = [cell(h["dice"], M["dice"], R["dice"]), cell(h["hd95"], S["hd95"])]
        cells += [cell(*(one["hd95 of voxels"] for one in (h, M, R)))]
        cells += [cell(*(one[what] for one in (h, S, M, R))) for what in ("asd", "nsd")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = [line for line in TEXT.splitlines() if line.startswith("|")]
    begin = table.index(HEAD)
    assert table[begin : begin + len(lines)] == lines
