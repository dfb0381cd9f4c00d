"""From a case's files to arrays on one grid: orient to RAS, resample, merge labels, crop to the body; kept in the cache.

Intensities stay as they are (HU for CT): the window is applied at loading, after the changes of contrast phase that need HU. Where nothing
needs them, `intensity="scaled"` clips them to the window and keeps them in half the space.
D, H, W are the volume's axes after orientation: to the patient's right-left, front-back and up (RAS+).
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from ..config import describe
from ..errors import UserError
from ..paths import cache_dir
from . import reading
from .cache import DAMAGED, CaseFile, Chunked, Places, write_case
from .grid import Resampling, to_ras
from .manifest import Case, Manifest, load_manifest

VERSION = 2  # to be raised with every change of what is prepared, so that nothing stale is read from a cache
MARGIN_VOXELS = 2  # left around the body
APART_MM = 0.1  # that an image and its label may lie apart, at any corner
SLAB_VOXELS = 2**21  # of a label that are merged at a time


class Preparation(BaseModel):
    """How cases are prepared.

    spacing_mm: of the prepared grid, along right-left, front-back, up; None takes the manifest's.
    labels: each voxel the nearest one's, or each class interpolated linearly as a mask of its own and the largest taken.
    intensity: as they are, or clipped to the manifest's window and kept in half precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spacing_mm: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    labels: Literal["nearest", "linear"] = "nearest"
    intensity: Literal["kept", "scaled"] = "kept"


def preparation(**settings) -> Preparation:
    """`Preparation` of a user's settings. Raises UserError, in one line, for a wrong one."""
    try:
        return Preparation(**settings)
    except ValidationError as error:
        raise UserError(describe(error, Preparation)) from None


@dataclass(frozen=True)
class PreparedCase:
    """A case on the prepared grid, in memory or in its file.

    image: (D, H, W) float32, in the unit of the scan. label: (D, H, W) uint8 class indices, or None. affine: (4, 4), voxel to mm (RAS+).
    native_shape, native_affine: the grid of the scan's file, to which predictions are taken back.
    places: where the classes are; None where the label is at hand to be looked through.
    """

    case: Case
    image: np.ndarray | Chunked
    label: np.ndarray | Chunked | None
    affine: np.ndarray
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    places: Places | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).round(4).tolist())

    @classmethod
    def open(cls, case: Case, path: str | Path) -> "PreparedCase":
        """A case in its file (`prepare_all` writes them), whose volumes are read by slices. Raises UserError: no whole file of a prepared case."""
        try:
            kept = CaseFile.open(path)
        except DAMAGED as error:
            raise UserError(f"{path}: no prepared case ({type(error).__name__}). Prepare the data again.") from None
        return cls(case, kept.image, kept.label, *_grid(kept.facts), places=kept.places)


def read_volume(path: str | Path, *, what: str = "image") -> MetaTensor:
    """A 3D volume from file, (1, D, H, W) float32 with its affine (NIfTI, NRRD, MetaImage or a DICOM folder).

    Raises UserError: no such file, unreadable, not 3D, not finite.
    """
    volume, affine = read_array(path, what=what)
    return MetaTensor(torch.from_numpy(volume.astype(np.float32))[None], affine=affine)


def read_array(path: str | Path, *, what: str = "image", labels: dict[int, str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A 3D volume (D, H, W) as its file holds it, in the file's own type and order, which is a quarter of the memory and time for a CT; and its
    affine (4, 4) float64, to mm (RAS+). `labels` (raw value -> name): it is a label, which may be a folder of masks. Errors as `read_volume`."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the {what} of a case. Check the path, or fetch the data again.")
    try:
        volume = reading.read(path) if labels is None else reading.read_label(path, labels)
    except reading.ReadFault as fault:
        if fault.check not in ("damaged", "empty file"):
            raise
        raise UserError(f"{path}: cannot be read as a 3D {what} ({fault.found}); expected NIfTI, NRRD, MetaImage or DICOM. Is it whole?") from None
    data = volume.data
    if data.dtype.kind == "f" and (bad := data.size - np.count_nonzero(np.isfinite(data))):
        raise UserError(f"{path}: the {what} has {bad} values that are not finite, expected none. Export it again.")
    return data, volume.affine


def read_oriented(path: str | Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A file's volume (D, H, W) turned to RAS+ without resampling, for showing, and its spacing in mm. Errors as `read_volume`."""
    volume = Orientation("RAS", labels=None)(read_volume(path))
    return volume[0].numpy(), tuple(np.linalg.norm(np.asarray(volume.affine)[:3, :3], axis=0).tolist())


def read_label(path: str | Path, like: MetaTensor, manifest: Manifest) -> MetaTensor:
    """Class indices (1, D, H, W) uint8 of a label file on the grid of its image `like`.

    Raises UserError: another shape or place in space than the image's, values that are no labels, none of the manifest's classes.
    """
    affine = np.asarray(like.affine, np.float64)
    return MetaTensor(torch.from_numpy(_read_label(path, tuple(like.shape[1:]), affine, manifest))[None], affine=affine)


def _read_label(path: str | Path, shape: tuple[int, ...], affine: np.ndarray, manifest: Manifest) -> np.ndarray:
    raw, place = read_array(path, what="label", labels=manifest.labels)
    if raw.shape != shape:
        raise UserError(
            f"{path}: found a label of {_times(raw.shape)} voxels, expected the image's {_times(shape)}. "
            "Pair the right files, or resample the label onto the image."
        )
    apart = apart_mm(shape, place, affine)
    if apart > APART_MM:
        raise UserError(f"{path}: its affine places it up to {apart:.3g} mm from the image, expected at most {APART_MM}. Resample the label onto the image.")
    merged = np.empty_like(raw, dtype=np.uint8)
    rows = max(1, SLAB_VOXELS * shape[2] // merged.size)
    try:
        for start in range(0, shape[2], rows):  # merging takes several times the memory of what is merged
            merged[..., start : start + rows] = manifest.merge(raw[..., start : start + rows])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not merged.any():
        raise UserError(f"{path}: no voxel of any class of {manifest.name} ({', '.join(manifest.class_names[1:])}). Check the manifest's raw label values.")
    return merged


def apart_mm(shape: tuple[int, ...], a: np.ndarray, b: np.ndarray) -> float:
    """Largest distance of a corner of a volume under one affine from where the other places it."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))])
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).max())


def prepare(case: Case, *, spacing_mm: tuple[float, float, float] | None = None, cache: Path | None = None) -> PreparedCase:
    """Orient, resample (linear image after a low-pass, nearest label), merge labels and crop to the body; from the cache where nothing changed.

    Args:
        case: files, and the name of its manifest.
        spacing_mm: of the prepared grid, along right-left, front-back, up; None takes the manifest's.
        cache: folder; None is `<cache>/prepared`.

    Returns:
        The case with its volumes in memory.

    Raises:
        UserError: a file that is missing, unreadable, no 3D volume, or that does not fit its image or manifest.
    """
    settings = Preparation(spacing_mm=spacing_mm and tuple(spacing_mm))
    for path in (case.image, case.label):
        if path is not None and not Path(path).exists():
            read_volume(path, what="image" if path == case.image else "label")
    kept = (cache or cache_dir() / "prepared") / f"{case.id}-{fingerprint(case, settings, sha256_of)[:16]}.zip"
    try:
        found = CaseFile.open(kept)
        image, label = found.arrays()
    except DAMAGED:  # none yet, or a spoilt one
        prepare_into(kept, case, settings)
        found = CaseFile.open(kept)
        image, label = found.arrays()
    return PreparedCase(case, image, label, *_grid(found.facts))


def prepare_into(path: Path, case: Case, settings: Preparation, *, told: str | None = None) -> None:
    """Prepare a case and write its file (`cache.write_case`). `told` is its fingerprint where that is known. Raises UserError as `prepare`."""
    manifest = load_manifest(case.manifest)
    arrays, grid = _prepare(case, manifest, settings)
    window = manifest.window_of(case.modality) if settings.intensity == "scaled" else None
    facts = {"id": case.id, "manifest": manifest.name, "fingerprint": told or fingerprint(case, settings, sha256_of)}
    write_case(path, image=arrays["image"], label=arrays.get("label"), facts=facts | grid, window=window)


def _prepare(case: Case, manifest: Manifest, settings: Preparation) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays of a case, and its grid as JSON holds it. At a time, memory holds the file's volume and one that is being made of it."""
    volume, native_affine = read_array(case.image)
    native_shape = volume.shape
    volume, affine = to_ras(volume, native_affine)
    step = Resampling.to_spacing(volume.shape, affine, settings.spacing_mm or manifest.spacing_mm)
    whole = step.image(volume)
    del volume

    low = manifest.window_of(case.modality)[0]
    box = _body(whole, low)
    if box is None:
        raise UserError(f"{case.image}: no voxel above {low:g}, the low end of {manifest.name}'s intensity window. Is it in the manifest's unit?")
    arrays = {"image": np.ascontiguousarray(whole[box])}
    del whole
    if case.label:
        label = to_ras(_read_label(case.label, native_shape, native_affine, manifest), native_affine)[0]
        arrays["label"] = (step.label if settings.labels == "nearest" else step.label_by_class)(label, box)
    cropped = step.new_affine.copy()
    cropped[:3, 3] += cropped[:3, :3] @ [part.start for part in box]
    shape = [int(n) for n in arrays["image"].shape]
    return arrays, {"shape": shape, "affine": cropped.tolist(), "native_shape": [int(n) for n in native_shape], "native_affine": native_affine.tolist()}


def _body(image: np.ndarray, low: float) -> tuple[slice, slice, slice] | None:
    """The box around all voxels above `low`, with a margin where there is room; None where there is no such voxel."""
    inside = image > low
    box = []
    for axis, n in enumerate(image.shape):
        found = np.flatnonzero(inside.any(tuple(other for other in range(3) if other != axis)))
        if not len(found):
            return None
        box.append(slice(max(0, int(found[0]) - MARGIN_VOXELS), min(n, int(found[-1]) + 1 + MARGIN_VOXELS)))
    return tuple(box)


def _grid(facts: dict) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Affine, native shape and native affine of a case's facts."""
    return np.array(facts["affine"]), tuple(facts["native_shape"]), np.array(facts["native_affine"])


def fingerprint(case: Case, settings: Preparation, sha256_of) -> str:
    """Of all that the result depends on: this code's version, the bytes of the files (as `sha256_of` tells them), classes, window and settings."""
    manifest = load_manifest(case.manifest)
    spacing_mm = settings.spacing_mm or manifest.spacing_mm
    files = [sha256_of(path) if path else None for path in (case.image, case.label)]
    classes = [[name, list(values)] for name, values in manifest.classes.items()]
    told = [VERSION, MARGIN_VOXELS, files, classes, manifest.window_of(case.modality), spacing_mm, settings.labels, settings.intensity]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes; for a folder (a DICOM series), of the names and bytes of all its files."""
    path = Path(path)
    if not path.is_dir():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("\n".join(f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in files).encode()).hexdigest()


def _times(shape) -> str:
    return "x".join(str(int(n)) for n in shape)
