"""What is measured of one class in one case: each number's definition, unit, direction, best and worst; and the one rule for empty masks.

Glossary: P is the predicted mask, R the reference mask of a class; a *surfel* is a small piece of a mask's surface with its area (`homelib.run.surface`).
"""

from dataclasses import dataclass
from typing import Literal

DIAGONAL: Literal["diagonal"] = "diagonal"  # as a worst value: the image's diagonal in mm, which no distance inside the image can exceed

EMPTY_RULE = (
    "Both masks empty: no number, the class is not there. One of them empty: the worst value (for distances the image's diagonal in mm), "
    "so that a missed or a spurious structure can never raise a mean. Volumes are what they are; the volume error has no number where the reference is empty."
)


@dataclass(frozen=True)
class Metric:
    """What a number means. best: None for a plain fact (a volume). worst: a number, `DIAGONAL`, or None where there is none (a fact, an unbounded error)."""

    name: str
    unit: str
    best: float | None
    worst: float | Literal["diagonal"] | None
    higher_is_better: bool | None
    definition: str
    surface: Literal["surfels", "voxels"] | None = None  # which distances it needs

    @property
    def kind(self) -> str:
        """overlap, distance, volume or lesions."""
        return "distance" if self.unit == "mm" else "volume" if "volume" in self.name else "lesions" if self.name.startswith("lesion") else "overlap"


def _overlap(name: str, definition: str) -> Metric:
    return Metric(name, "1", 1.0, 0.0, True, definition)


def _distance(name: str, definition: str, surface: Literal["surfels", "voxels"]) -> Metric:
    return Metric(name, "mm", 0.0, DIAGONAL, False, definition, surface)


def _fact(name: str, unit: str, definition: str) -> Metric:
    return Metric(name, unit, None, None, None, definition)


_ALL = (
    _overlap("dice", "2 |P and R| / (|P| + |R|)"),
    _overlap("iou", "|P and R| / |P or R|"),
    _overlap("sensitivity", "|P and R| / |R|"),
    _overlap("precision", "|P and R| / |P|"),
    _distance("hd95", "larger of the two directed 95th percentiles of the distances between surfaces, weighted by surfel area", "surfels"),
    _distance("asd", "mean of the distances from every surfel of either surface to the other surface, weighted by area", "surfels"),
    _distance("hd95_voxels", "larger of the two directed 95th percentiles of the distances between surface voxels, each counting alike (MONAI's)", "voxels"),
    _distance("hd95_pooled", "95th percentile of both directed distances between surface voxels taken together (MedPy's, which SegMamba uses)", "voxels"),
    _fact("reference_volume", "ml", "|R| in ml"),
    _fact("predicted_volume", "ml", "|P| in ml"),
    Metric("volume_error", "1", 0.0, None, None, "(|P| - |R|) / |R|; -1 is a missed structure, nearer 0 is better"),
    _fact("lesions_reference", "lesions", "connected pieces of R (26 neighbours)"),
    _fact("lesions_predicted", "lesions", "connected pieces of P (26 neighbours)"),
    _fact("lesions_found", "lesions", "pieces of R of which P covers a tenth or more"),
    _fact("lesions_spurious", "lesions", "pieces of P of which less than a tenth lies in R"),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}
LESIONS = ("lesions_reference", "lesions_predicted", "lesions_found", "lesions_spurious")
FULL = ("dice", "iou", "sensitivity", "precision", "hd95", "asd", "hd95_voxels", "hd95_pooled", "reference_volume", "predicted_volume", "volume_error")
NSD = "nsd_{}mm"


def metric_of(name: str) -> Metric:
    """A metric by its name; `nsd_2mm` is the normalised surface distance at 2 mm, any tolerance may stand there. Raises KeyError for an unknown one."""
    if name.startswith("nsd_") and name.endswith("mm"):
        definition = f"share of the area of both surfaces that lies within {tolerance_of(name):g} mm of the other surface"
        return Metric(name, "1", 1.0, 0.0, True, definition, "surfels")
    return METRICS[name]


def tolerance_of(name: str) -> float:
    """mm of `nsd_2mm`, `nsd_0.5mm`. Raises KeyError where no such length stands there."""
    try:
        tolerance = float(name.removeprefix("nsd_").removesuffix("mm"))
    except ValueError:
        raise KeyError(name) from None
    if not 0 <= tolerance < float("inf"):  # NaN neither
        raise KeyError(name)
    return tolerance


def value_if_empty(metric: Metric, predicted_empty: bool, reference_empty: bool, *, diagonal_mm: float) -> float | None:
    """The one rule for empty masks (`EMPTY_RULE`), NaN for no number; None where the metric must be computed."""
    if metric.kind in ("volume", "lesions"):
        return float("nan") if metric.name == "volume_error" and reference_empty else None
    if not predicted_empty and not reference_empty:
        return None
    if predicted_empty and reference_empty:
        return float("nan")
    return metric.worst if isinstance(metric.worst, float) else diagonal_mm
