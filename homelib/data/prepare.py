"""From a case's files to arrays on one grid: orient to RAS, resample, merge labels, crop to the body; kept in the cache.

Intensities stay as they are (HU for CT): the window is applied at loading, after the changes of contrast phase that need HU. Where nothing
needs them, `intensity="scaled"` clips them to the window and keeps them in half the space.
D, H, W are the volume's axes after orientation: to the patient's right-left, front-back and up (RAS+).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..axes import three
from ..errors import UserError
from ..frozen import describe
from ..paths import cache_dir
from . import reading
from .cache import DAMAGED, CaseFile, Chunked, Places, in_bytes, write_case
from .examine import APART_MM, apart_mm
from .grid import Box, Resampling, to_ras
from .manifest import Case, Manifest, load_manifest

VERSION = 4  # to be raised with every change of what is prepared, so that nothing stale is read from a cache
MARGIN_VOXELS = 2  # left around the body
SLAB_VOXELS = 2**18  # of a label that are merged, or compared class by class, at a time


Millimetres = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False)]


class Preparation(BaseModel):
    """How cases are prepared.

    spacing_mm: of the prepared grid, along right-left, front-back, up; None takes the manifest's.
    labels: "nearest": each voxel the nearest one's. "linear": each class interpolated linearly as a mask of its own, and the largest taken. "shares":
    how much of each class is in a voxel is kept too (`PreparedCase.shares`), so that labels come back to the file's grid as nearly as linear
    interpolation can bring them; the label is the largest. A byte a voxel and class.
    intensity: as they are, or clipped to the manifest's window and kept in half precision.
    low_pass: an image is smoothed before it is taken to a coarser grid, so that fine and coarse scans look alike there; without it, it is interpolated
    linearly alone, as MONAI's `Spacing` and the paper have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spacing_mm: tuple[Millimetres, Millimetres, Millimetres] | None = None
    labels: Literal["nearest", "linear", "shares"] = "nearest"
    intensity: Literal["kept", "scaled"] = "kept"
    low_pass: bool = True


def preparation(**settings: Any) -> Preparation:
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
    places: where the classes are; None where the label is at hand to be looked through. shares: (D, H, W) float32 for each class, background
    first, where they were asked for: `to_native` takes them as it takes probabilities. fingerprint: of what its file was prepared from, wherever
    its volumes are now; None for one without a file. low_pass: as in `Preparation`.
    """

    case: Case
    image: np.ndarray | Chunked
    label: np.ndarray | Chunked | None
    affine: np.ndarray
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray
    places: Places | None = None
    shares: tuple[Chunked, ...] = ()
    fingerprint: str | None = None
    low_pass: bool = True

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).round(4).tolist())

    @classmethod
    def open(cls, case: Case, path: str | Path, manifest: Manifest | None = None) -> "PreparedCase":
        """A case in its file (`prepare_all` writes them), whose volumes are read by slices. `manifest` is the case's; None reads it.

        Raises UserError: no whole file of a prepared case, or one of another (where small and capital letters are one, two cases may have one file),
        or of classes or a window that the manifest has no longer.
        """
        try:
            kept = CaseFile.open(path)
        except DAMAGED as error:
            raise UserError(f"{path}: no prepared case ({type(error).__name__}). Prepare the data again.") from None
        if kept.facts["id"] != case.id:
            raise UserError(f"{path}: holds the case {kept.facts['id']}, expected {case.id}. Rename one of them, and prepare the data again.")
        manifest = manifest or load_manifest(case.manifest)
        if kept.facts.get("classes") != _classes(manifest) or kept.facts["window"] not in (None, list(manifest.window_of(case.modality))):
            raise UserError(f"{path}: was prepared with other classes, or another window, than {manifest.reference} has now. Prepare the data again.")
        grid, low_pass = _grid(kept.facts), kept.facts.get("low_pass", True)
        return cls(case, kept.image, kept.label, *grid, places=kept.places, shares=kept.shares, fingerprint=kept.facts["fingerprint"], low_pass=low_pass)


def read_array(path: str | Path, *, what: str = "image", labels: dict[int, str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A 3D volume (D, H, W) as its file holds it, in the file's own type and order, which is a quarter of the memory and time for a CT; and its
    affine (4, 4) float64, to mm (RAS+). `labels` (raw value -> name): it is a label, which may be a folder of masks.

    Raises UserError: no such file, unreadable, not 3D, not finite.
    """
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
    """A file's volume (D, H, W) turned to RAS+ without resampling, for showing, and its spacing in mm. Errors as `read_array`."""
    volume, affine = to_ras(*read_array(path))
    return volume, tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())


def read_label(path: str | Path, shape: tuple[int, ...], affine: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Class indices (D, H, W) uint8 of a label file on the grid of its image, which has this shape and affine.

    Raises UserError: another shape or place in space than the image's, values that are no labels, none of the manifest's classes.
    """
    raw, place = read_array(path, what="label", labels=manifest.labels)
    if raw.shape != shape:
        raise UserError(
            f"{path}: found a label of {reading.times(raw.shape)} voxels, expected the image's {reading.times(shape)}. "
            "Pair the right files, or resample the label onto the image."
        )
    apart = apart_mm(affine, place, shape)
    if apart > APART_MM:
        raise UserError(f"{path}: its affine places it up to {apart:.3g} mm from the image, expected at most {APART_MM}. Resample the label onto the image.")
    merged = np.empty_like(raw, dtype=np.uint8)
    rows = max(1, SLAB_VOXELS * shape[2] // merged.size)
    try:
        for start in range(0, shape[2], rows):  # merging takes several times the memory of what is merged
            merged[..., start : start + rows] = manifest.merge(raw[..., start : start + rows])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not merged.any() and not (manifest.may_be_empty and not manifest.strange(np.unique(raw))):
        classes = ", ".join(manifest.class_names[1:])
        raise UserError(
            f"{path}: no voxel of any class of {manifest.name} ({classes}). Check the manifest's raw label values; where healthy cases have none, "
            "write may_be_empty: true there."
        )
    return merged


def prepare(case: Case, *, spacing_mm: tuple[float, float, float] | None = None, low_pass: bool = True, cache: Path | None = None) -> PreparedCase:
    """Orient, resample (linear image after a low-pass, nearest label), merge labels and crop to the body; from the cache where nothing changed.

    Args:
        case: files, and the name of its manifest.
        spacing_mm: of the prepared grid, along right-left, front-back, up; None takes the manifest's.
        low_pass: as in `Preparation`.
        cache: folder; None is `<cache>/prepared`.

    Returns:
        The case with its volumes in memory.

    Raises:
        UserError: a file that is missing, unreadable, no 3D volume, or that does not fit its image or manifest.
    """
    settings = preparation(spacing_mm=spacing_mm and tuple(spacing_mm), low_pass=low_pass)
    for path in (case.image, case.label):
        if path is not None and not Path(path).exists():
            read_array(path, what="image" if path == case.image else "label")
    kept = (cache or cache_dir() / "prepared") / f"{case.id}-{fingerprint(case, settings, sha256_of)[:16]}.zip"
    try:
        found = CaseFile.open(kept)
        image, label = found.arrays()
    except DAMAGED:  # none yet, or a spoilt one
        prepare_into(kept, case, settings)
        found = CaseFile.open(kept)
        image, label = found.arrays()
    return PreparedCase(case, image, label, *_grid(found.facts), low_pass=low_pass)


def prepare_into(path: Path, case: Case, settings: Preparation, *, told: str | None = None) -> None:
    """Prepare a case and write its file (`cache.write_case`). `told` is its fingerprint where that is known. Raises UserError as `prepare`."""
    manifest = load_manifest(case.manifest)
    image, label, shares, grid = _prepare(case, manifest, settings)
    window = manifest.window_of(case.modality) if settings.intensity == "scaled" else None
    facts: dict[str, Any] = {"id": case.id, "manifest": manifest.name, "classes": _classes(manifest)}
    facts |= {"fingerprint": told or fingerprint(case, settings, sha256_of)} | ({} if settings.low_pass else {"low_pass": False})
    write_case(path, image=image, label=label, facts=facts | grid, window=window, shares=shares)


def _prepare(case: Case, manifest: Manifest, settings: Preparation) -> tuple[np.ndarray, np.ndarray | None, Iterable[np.ndarray], dict]:
    """Image, label and shares of a case, its grid as JSON holds it, with a remark on its label where there is one. At a time, memory
    holds the file's volume and one that is being made of it."""
    volume, native_affine = read_array(case.image)
    native_shape = volume.shape
    volume, affine = to_ras(volume, native_affine)
    step = Resampling.to_spacing(volume.shape, affine, spacing_mm := settings.spacing_mm or manifest.spacing_mm)
    if (size := 4 * math.prod(step.new_shape)) > reading.LARGEST_BYTES:
        told = f"{'x'.join(f'{mm:g}' for mm in spacing_mm)} mm, at which it has {reading.times(step.new_shape)} voxels, {size / 2**30:.3g} GiB"
        raise UserError(f"{case.image}: spacing: found {told}, expected {reading.LARGEST_BYTES / 2**30:.0f} GiB at most. Choose a coarser one.")
    low = manifest.window_of(case.modality)[0]
    inside = near = _box_above(volume, low)
    if near is not None:  # what takes nothing from these voxels cannot be above `low`, and is not resampled
        near = step.around(near, margin=MARGIN_VOXELS)
        whole = step.image(volume, near, smooth=settings.low_pass)
        body = _box_above(whole, low, margin=MARGIN_VOXELS)
    del volume
    if near is None:
        raise UserError(f"{case.image}: no voxel above {low:g}, the low end of {manifest.name}'s intensity window. Is it in the manifest's unit?")
    if body is None:
        told = f"{reading.times(step.new_shape)} voxels at the prepared spacing, none of them above {low:g}, the low end of the intensity window"
        raise UserError(f"{case.image}: found {told}; expected a body in them. Is its spacing in mm?")
    image = np.ascontiguousarray(whole[body])
    del whole
    box = tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(near, body, strict=True))
    label: np.ndarray | None = None
    shares: Iterable[np.ndarray] = ()
    remark = {}
    if case.label:
        read = to_ras(read_label(case.label, native_shape, native_affine, manifest), native_affine)[0]
        labelled = int(np.count_nonzero(read))
        if beyond := labelled - int(np.count_nonzero(read[inside])):
            told = (
                f"found {beyond} of {labelled} labelled voxels outside the body's box (no voxel above {low:g}), expected all in it; "
                f"beyond a margin of {MARGIN_VOXELS} voxels they are cropped. Is the label right, and the window?"
            )
            remark = {"remark": told}
        if settings.labels == "nearest":
            label = step.label(read, box)
        else:
            classes, fitted = len(manifest.class_names), settings.labels == "shares"
            label = _largest(step, read, box, classes, fitted=fitted)
            shares = _shares(step, read, box, classes) if fitted else ()
    cropped = step.new_affine.copy()
    cropped[:3, 3] += cropped[:3, :3] @ [part.start for part in box]
    shapes = {"shape": [int(n) for n in image.shape], "native_shape": [int(n) for n in native_shape]}
    return image, label, shares, shapes | {"affine": cropped.tolist(), "native_affine": native_affine.tolist()} | remark


def _largest(step: Resampling, label: np.ndarray, box: Box, classes: int, *, fitted: bool) -> np.ndarray:
    """(D, H, W) uint8: the class with the largest share in each voxel of a box, the first of equal ones; slab by slab, for memory."""
    chosen = np.zeros([part.stop - part.start for part in box], np.uint8)
    for slab in _slabs(box):
        best, here = step.share(label, 0, slab, fitted=fitted), chosen[slab[0].start - box[0].start : slab[0].stop - box[0].start]
        for index in range(1, classes):
            share = step.share(label, index, slab, fitted=fitted)
            here[share > best] = index
            np.maximum(best, share, out=best)
    return chosen


def _shares(step: Resampling, label: np.ndarray, box: Box, classes: int) -> Iterator[np.ndarray]:
    """Each class's share in each voxel of a box, background first, uint8."""
    for index in range(classes):
        yield np.concatenate([in_bytes(step.share(label, index, slab, fitted=True)) for slab in _slabs(box)])


def _slabs(box: Box) -> Iterator[Box]:
    """Boxes that cut a box along its first axis."""
    first, *rest = box
    layer = int(np.prod([part.stop - part.start for part in rest]))
    for start in range(first.start, first.stop, rows := max(1, SLAB_VOXELS // layer)):
        yield slice(start, min(start + rows, first.stop)), *rest


def _box_above(image: np.ndarray, low: float, *, margin: int = 0) -> Box | None:
    """The box around all voxels above `low`, with a margin where there is room; None where there is no such voxel."""
    order = np.argsort([-abs(stride) for stride in image.strides], kind="stable")  # layer by layer, as they lie in memory
    low = math.floor(low) if image.dtype.kind in "iu" else low  # the same for whole numbers, which are then compared as such
    found = [np.zeros(image.shape[axis], bool) for axis in order]
    for index, layer in enumerate(image.transpose(order)):
        inside = layer > low
        found[0][index] = inside.any()
        found[1] |= inside.any(1)
        found[2] |= inside.any(0)
    if not found[0].any():
        return None
    ends = [(int(line.argmax()), len(line) - int(line[::-1].argmax())) for line in found]
    box = [slice(max(0, start - margin), min(len(line), stop + margin)) for line, (start, stop) in zip(found, ends, strict=True)]
    return tuple(box[place] for place in np.argsort(order))


def _grid(facts: dict) -> tuple[np.ndarray, tuple[int, int, int], np.ndarray]:
    """Affine, native shape and native affine of a case's facts."""
    return np.array(facts["affine"]), three(facts["native_shape"]), np.array(facts["native_affine"])


def fingerprint(case: Case, settings: Preparation, sha256_of: Callable[[str | Path], str]) -> str:
    """Of all that the result depends on: this code's version, the bytes of the files (as `sha256_of` tells them), classes, window and settings."""
    manifest = load_manifest(case.manifest)
    spacing_mm = settings.spacing_mm or manifest.spacing_mm
    files = [sha256_of(path) if path else None for path in (case.image, case.label)]
    classes = _classes(manifest)
    if case.label and Path(case.label).is_dir():  # of masks: which is which is told by the label map
        classes.append(sorted(manifest.labels.items()))
    told = [VERSION, MARGIN_VOXELS, files, classes, manifest.window_of(case.modality), spacing_mm, settings.labels, settings.intensity]
    told += [] if settings.low_pass else ["no low-pass"]  # the default adds nothing: what was prepared before there was a choice stays valid
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _classes(manifest: Manifest) -> list:
    """Of a manifest, in their order, as JSON holds them."""
    return [[name, list(values)] for name, values in manifest.classes.items()]


def sha256_of(path: str | Path) -> str:
    """Of a file's bytes; for a folder (a DICOM series), of the names and bytes of all its files; for a header without voxels, of those that hold them too."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else reading.files_of(path)
    if files == [path]:
        return _digest(path)
    told = "\n".join(f"{os.path.relpath(file, path)} {_digest(file)}" for file in files)
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()  # any bytes may be in a file's name


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
