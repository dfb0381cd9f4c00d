"""One case under the glass: can image and label be read, do they lie in the same place, and do their values mean what the manifest says?

Every fault is a finding; nothing is raised, nothing is written. A case is read once, and its statistics are kept beside the findings.
"""

import hashlib
import itertools
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .dicom import DICOM_MODALITIES
from .findings import Finding, finding
from .hounsfield import shifted, windowed
from .manifest import Case, Manifest, Range, strange_values
from .reading import ReadFault, Volume, read, read_label, times

VERSION = 3  # to be raised with every change of what is found, so that no stale result is kept
APART_MM = 0.1  # that an image and its label may lie apart, at any corner
SPACING_MM = (0.05, 20.0)  # beyond it, lengths are hardly in mm
_DICOM_MODALITY = {ours: theirs for theirs, ours in DICOM_MODALITIES.items()}
_SAMPLES = 2_000_000  # voxels at most for percentiles


@dataclass(frozen=True)
class Rules:
    """What of a manifest the check of one case needs; small, for it travels to every worker."""

    labels: dict[int, str]
    classes: dict[str, tuple[int, ...]]
    windows: dict[str, Range]
    may_be_empty: bool = False

    @classmethod
    def of(cls, manifest: Manifest) -> "Rules":
        return cls(dict(manifest.labels), dict(manifest.classes), {m: manifest.window_of(m) for m in manifest.modalities}, manifest.may_be_empty)

    @cached_property
    def told(self) -> str:
        """All of it as text, to tell one set of rules from another."""
        return repr((self.labels, self.classes, self.windows, self.may_be_empty))


@dataclass
class Report:
    """What was found of one case. `statistics` holds plain numbers and texts: shape, spacing_mm, intensities, ml of each class, hashes."""

    case: str
    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


def examine(case: Case, rules: Rules) -> Report:
    """All findings of one case. Takes the memory of the image, its label and one copy of a slice."""
    report = Report(case.id, statistics={"modality": case.modality})
    with np.errstate(all="ignore"):  # a damaged file holds numbers of any size
        _examine(case, rules, report)
    return report


def _examine(case: Case, rules: Rules, report: Report) -> None:
    image = _opened(case, rules, report, "image")
    if image is not None:
        _geometry(case, image, report)
        _intensities(case, image, rules.windows[case.modality], report)
    label = _opened(case, rules, report, "label") if case.label else None
    if label is not None:
        if image is not None:
            _place(case, image, label, report)
        _values(case, label, rules, report)
        if report.statistics.get("image_hash") == report.statistics["label_hash"]:
            _tell(report, "label is the image", case.label, "the same values in both")


def _tell(report: Report, check: str, file: str | Path | None, found: str, **filled: object) -> None:
    report.findings.append(finding(check, report.case, file or "", found, **filled))


def _opened(case: Case, rules: Rules, report: Report, role: str) -> Volume | None:
    path = getattr(case, role)
    try:
        volume = read(path) if role == "image" else read_label(path, rules.labels)
    except ReadFault as fault:
        _tell(report, fault.check, fault.path, fault.found, **fault.filled)
        return None
    except MemoryError:
        _tell(report, "memory", path, "no room for the volume")
        return None
    for remark in volume.remarks:
        _tell(report, remark.check, path, remark.found)
    report.statistics[f"{role}_hash"] = _hash(volume.data)
    return volume


def _hash(data: np.ndarray) -> str:
    """Of shape and values, whatever the type of the numbers: a copy in another format has the same."""
    digest = hashlib.blake2b(repr(data.shape).encode(), digest_size=16)
    for k in range(data.shape[2]):
        digest.update(np.ascontiguousarray(data[:, :, k], np.float32).data)
    return digest.hexdigest()


# ---------------------------------------------------------------- the image


def _geometry(case: Case, image: Volume, report: Report) -> None:
    import nibabel

    spacing = image.spacing_mm
    letters = "".join(nibabel.aff2axcodes(image.affine))
    report.statistics |= {"shape": list(image.data.shape), "spacing_mm": [round(s, 4) for s in spacing], "orientation": letters, "type": str(image.data.dtype)}
    low, high = SPACING_MM
    if min(spacing) < low or max(spacing) > high:
        _tell(report, "spacing", case.image, "x".join(f"{s:.3g}" for s in spacing) + " mm", low=low, high=high)


def _intensities(case: Case, image: Volume, window: Range, report: Report) -> None:
    data = image.data
    if data.dtype.kind == "f" and (bad := int(data.size - np.count_nonzero(np.isfinite(data)))):
        _tell(report, "not finite", case.image, f"{bad} values NaN or infinite")
        data = data[np.isfinite(data)]
        if not data.size:
            return
    flat = data.ravel(order="K")[:: max(1, data.size // _SAMPLES)].astype(np.float32)
    low, high = float(data.min()), float(data.max())
    p1, median, p99 = (float(p) for p in np.percentile(flat, (1, 50, 99)))
    report.statistics |= {"min": low, "p1": p1, "median": median, "p99": p99, "max": high, "mean": float(flat.mean(dtype=np.float64))}
    found = f"values from {low:g} to {high:g}"
    if image.modality and image.modality != _DICOM_MODALITY[case.modality]:
        _tell(report, "wrong modality", case.image, f"DICOM modality {image.modality}", modality=_DICOM_MODALITY[case.modality])
    elif low == high:
        _tell(report, "constant", case.image, f"{low:g} everywhere")
    elif case.modality == "CT" and (told := shifted(flat)):
        _tell(report, "not HU", case.image, f"{found}, {told}")
    elif case.modality != "CT" and low <= -500 and np.count_nonzero(flat <= -500) > flat.size / 100:
        _tell(report, "wrong modality", case.image, f"{found}, as a CT has", modality=case.modality)
    elif min(p99, window[1]) - max(p1, window[0]) < 0.02 * (window[1] - window[0]):
        _tell(report, "range", case.image, f"{found}, 98 % within {p1:.4g} to {p99:.4g}", low=window[0], high=window[1])
    elif case.modality == "CT" and (told := windowed(flat, window)):
        _tell(report, "not HU", case.image, f"{found}, {told}")
    elif case.modality != "CT" and low < 0 and np.count_nonzero(flat < 0) > flat.size / 100:
        _tell(report, "negative values", case.image, found)


# ---------------------------------------------------------------- the label


def _place(case: Case, image: Volume, label: Volume, report: Report) -> None:
    """Does the label lie on the image's voxels?"""
    shape = label.data.shape
    apart = apart_mm(image.affine, label.affine, shape) if shape == image.data.shape else np.inf
    if apart <= APART_MM:
        return
    turned_shape, turned_affine = turned(label, image.affine)
    half = min(image.spacing_mm) / 2
    if turned_shape == image.data.shape and apart_mm(image.affine, turned_affine, turned_shape) <= APART_MM:
        _tell(report, "label turned", case.label, "the same place, with axes flipped or swapped")
    elif apart <= half:
        _tell(report, "label offset", case.label, f"{apart:.3g} mm apart, less than half a voxel", tolerance=APART_MM)
    elif shape == image.data.shape:
        _tell(report, "label place", case.label, f"up to {apart:.4g} mm apart", tolerance=APART_MM)
    else:
        _tell(report, "label shape", case.label, f"{times(shape)} voxels", shape=times(image.data.shape))


def apart_mm(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance between the corners of two grids of the same shape, by their affines (4, 4)."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))])
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


def turned(label: Volume, affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (4, 4) of a label after its axes are flipped and swapped to those of another affine (4, 4); no value is moved."""
    from nibabel.orientations import inv_ornt_aff

    change = orientation_change(label.affine, affine)
    shape = tuple(int(label.data.shape[i]) for i in np.argsort(change[:, 0]))
    return shape, label.affine @ inv_ornt_aff(change, label.data.shape)


def orientation_change(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How axes of one affine (4, 4) are flipped and swapped into those of another, (3, 2) as `nibabel.apply_orientation` takes it."""
    from nibabel.orientations import io_orientation, ornt_transform

    return ornt_transform(io_orientation(start), io_orientation(end))


def _values(case: Case, label: Volume, rules: Rules, report: Report) -> None:
    data = label.data
    if data.dtype.kind == "f":
        bad = int(data.size - np.count_nonzero(np.isfinite(data)))
        if bad:
            _tell(report, "label not finite", case.label, f"{bad} values NaN or infinite")
            return
        off = data != np.rint(data)
        if off.any():
            _tell(report, "label fractions", case.label, f"{int(np.count_nonzero(off))} values such as {data[off].flat[0]:g}")
            return
    voxels = _counts(data)
    ml = abs(float(np.linalg.det(label.affine[:3, :3]))) / 1000
    report.statistics["ml"] = {name: sum(voxels.get(v, 0) for v in raw) * ml for name, raw in rules.classes.items()}
    report.statistics["voxels"] = {name: sum(voxels.get(v, 0) for v in raw) for name, raw in rules.classes.items()}
    strange = strange_values(voxels, rules.labels, rules.classes)
    told = ", ".join(map(str, strange[:5])) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
    if strange and strange[0] < 0:
        _tell(report, "label negative", case.label, f"values {told}")
    elif strange and rules.labels:
        _tell(report, "label values", case.label, f"values {told}", known=", ".join(map(str, sorted(rules.labels)[:30])))
    elif not any(report.statistics["voxels"].values()):
        healthy = rules.may_be_empty and not strange
        _tell(report, "no class" if healthy else "label empty", case.label, "no voxel of any class", classes=" or ".join(rules.classes))
    elif 0 not in voxels:
        _tell(report, "no background", case.label, "none")
    if data.dtype.kind == "f":
        _tell(report, "label type", case.label, f"whole numbers stored as {data.dtype}")


def _counts(data: np.ndarray) -> dict[int, int]:
    """Voxels of each value, for a volume of whole numbers; slice by slice, which spares sorting and copying all of it."""
    low, high = int(data.min()), int(data.max())
    if high - low > 2**20:  # an image in a label's place
        return {int(value): int(n) for value, n in zip(*np.unique(data, return_counts=True), strict=True)}
    counts = np.zeros(high - low + 1, np.int64)
    for k in range(data.shape[2]):
        counts += np.bincount((data[:, :, k].astype(np.int64) - low).ravel(), minlength=len(counts))
    return {int(index) + low: int(counts[index]) for index in np.flatnonzero(counts)}
