"""From a case's files to arrays on one grid: orient to RAS, resample, merge labels, crop to the body; kept in the cache.

Intensities stay as they are (HU for CT): the window is applied at loading, after the changes of contrast phase that need HU.
D, H, W are the volume's axes after orientation: to the patient's right-left, front-back and up (RAS+).
"""

import hashlib
import itertools
import logging
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import CropForeground, LoadImage, Orientation, Spacing, SpatialResample
from scipy.ndimage import gaussian_filter

from ..errors import UserError
from ..paths import cache_dir, written_whole
from .manifest import Case, Manifest, load_manifest

VERSION = 1  # to be raised with every change of what is prepared, so that nothing stale is read from a cache
MARGIN_VOXELS = 2  # left around the body
APART_MM = 0.1  # that an image and its label may lie apart, at any corner

logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)  # else a line a file where there is no GPU decoder for DICOM


@dataclass(frozen=True)
class PreparedCase:
    """A case on the prepared grid.

    image: (D, H, W) float32, in the unit of the file. label: (D, H, W) uint8 class indices, or None. affine: (4, 4), voxel to mm (RAS+).
    native_shape, native_affine: the grid of the file, to which predictions are taken back.
    """

    case: Case
    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    native_shape: tuple[int, int, int]
    native_affine: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).round(4).tolist())


def read_volume(path: str | Path, *, what: str = "image") -> MetaTensor:
    """A 3D volume from file, (1, D, H, W) float32 with its affine (NIfTI, NRRD, MetaImage or a DICOM folder, by MONAI's readers).

    Raises UserError: no such file, unreadable, not 3D, not finite.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; expected the {what} of a case. Check the path, or fetch the data again.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
            volume = LoadImage(image_only=True, ensure_channel_first=True, dtype=np.float32)(path)
    except Exception as error:  # readers raise anything from OSError to zlib.error on a damaged file
        reason = " ".join(str(error).split("\n")[0].split())[:160]
        raise UserError(
            f"{path}: cannot be read as a 3D {what} ({type(error).__name__}: {reason}); expected NIfTI, NRRD, MetaImage or DICOM. Is it whole?"
        ) from None
    if volume.dim() != 4 or volume.shape[0] != 1 or min(volume.shape[1:]) < 2:
        raise UserError(f"{path}: the {what} has shape {tuple(volume.shape[1:])} and {volume.shape[0]} channels, expected one 3D volume.")
    if not torch.isfinite(volume).all():
        raise UserError(f"{path}: the {what} has {int((~torch.isfinite(volume)).sum())} values that are not finite, expected none. Export it again.")
    return volume


def read_oriented(path: str | Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """A file's volume (D, H, W) turned to RAS+ without resampling, for showing, and its spacing in mm. Errors as `read_volume`."""
    volume = Orientation("RAS", labels=None)(read_volume(path))
    return volume[0].numpy(), tuple(np.linalg.norm(np.asarray(volume.affine)[:3, :3], axis=0).tolist())


def read_label(path: str | Path, like: MetaTensor, manifest: Manifest) -> MetaTensor:
    """Class indices (1, D, H, W) of a label file on the grid of its image `like`.

    Raises UserError: another shape or place in space than the image's, values that are no labels, none of the manifest's classes.
    """
    label = read_volume(path, what="label")
    if label.shape != like.shape:
        raise UserError(
            f"{path}: found a label of {_times(label.shape[1:])} voxels, expected the image's {_times(like.shape[1:])}. "
            "Pair the right files, or resample the label onto the image."
        )
    apart = _apart_mm(label, like)
    if apart > APART_MM:
        raise UserError(f"{path}: its affine places it up to {apart:.3g} mm from the image, expected at most {APART_MM}. Resample the label onto the image.")
    try:
        merged = manifest.merge(label.numpy())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not merged.any():
        raise UserError(f"{path}: no voxel of any class of {manifest.name} ({', '.join(manifest.class_names[1:])}). Check the manifest's raw label values.")
    return MetaTensor(merged.astype(np.float32), affine=label.affine)


def _apart_mm(a: MetaTensor, b: MetaTensor) -> float:
    """Largest distance of a corner of one volume from that of the other, of equal shape."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in a.shape[1:]))])
    return float(np.linalg.norm(corners @ (np.asarray(a.affine) - np.asarray(b.affine)).T, axis=1).max())


def prepare(case: Case, *, spacing_mm: tuple[float, float, float] | None = None, cache: Path | None = None) -> PreparedCase:
    """Orient, resample (linear image after a low-pass, nearest label), merge labels and crop to the body; from the cache where nothing changed.

    Args:
        case: files, and the name of its manifest.
        spacing_mm: of the prepared grid, along right-left, front-back, up; None takes the manifest's.
        cache: folder; None is `<cache>/prepared`.
    """
    manifest = load_manifest(case.manifest)
    spacing_mm = tuple(spacing_mm or manifest.spacing_mm)
    folder = cache or cache_dir() / "prepared"
    kept = folder / f"{case.id}-{_fingerprint(case, manifest, spacing_mm)}.npz"
    arrays = _read(kept)
    if arrays is None:
        arrays = _prepare(case, manifest, spacing_mm)
        with written_whole(kept) as part:
            np.savez_compressed(part, **arrays)
    return PreparedCase(
        case=case,
        image=arrays["image"],
        label=arrays.get("label"),
        affine=arrays["affine"],
        native_shape=tuple(arrays["native_shape"].tolist()),
        native_affine=arrays["native_affine"],
    )


def _read(kept: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cached file; None where there is none, or it is damaged: it is then made again."""
    try:
        with np.load(kept) as arrays:
            return dict(arrays)
    except (OSError, EOFError, ValueError, BadZipFile, zlib.error):
        return None


def _prepare(case: Case, manifest: Manifest, spacing_mm: tuple[float, ...]) -> dict[str, np.ndarray]:
    image = read_volume(case.image)
    label = read_label(case.label, image, manifest) if case.label else None
    native = {"native_shape": np.array(image.shape[1:]), "native_affine": np.asarray(image.affine)}

    orient = Orientation("RAS", labels=None)
    image, label = orient(image), orient(label) if label is not None else None
    image = _low_pass(image, spacing_mm)
    image = Spacing(spacing_mm, mode="bilinear", padding_mode="border")(image)
    if label is not None:
        label = SpatialResample(mode="nearest", padding_mode="zeros")(label, dst_affine=image.affine, spatial_size=image.shape[1:])

    crop = CropForeground(select_fn=lambda x: x > manifest.intensity_window[0], margin=MARGIN_VOXELS, allow_smaller=True)
    start, end = crop.compute_bounding_box(image)
    if not all(e > s for s, e in zip(start, end, strict=True)):
        low = manifest.intensity_window[0]
        raise UserError(f"{case.image}: no voxel above {low:g}, the low end of {manifest.name}'s intensity window. Is it in the manifest's unit?")
    image = crop.crop_pad(image, start, end)
    arrays = native | {"image": image[0].numpy().astype(np.float32), "affine": np.asarray(image.affine)}
    if label is not None:
        arrays["label"] = crop.crop_pad(label, start, end)[0].numpy().astype(np.uint8)
    return arrays


def _low_pass(image: MetaTensor, spacing_mm: tuple[float, ...]) -> MetaTensor:
    """Smooth what the coarser grid cannot hold, so that a fine and a coarse scan look alike after resampling. Sigma is half the step,
    in old voxels, less what the old grid has already smoothed."""
    ratios = np.array(spacing_mm) / np.linalg.norm(np.asarray(image.affine)[:3, :3], axis=0)
    sigma = 0.5 * np.sqrt(np.maximum(ratios**2 - 1, 0))
    return MetaTensor(gaussian_filter(image.numpy(), (0, *sigma), mode="nearest"), affine=image.affine)


def _fingerprint(case: Case, manifest: Manifest, spacing_mm: tuple[float, ...]) -> str:
    """Of all that the result depends on: this code's version, the files (place, size, time), classes, window and spacing."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in (case.image, case.label) if f and f.exists()]
    told = repr((VERSION, files, manifest.classes, manifest.intensity_window, spacing_mm, MARGIN_VOXELS))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _times(shape) -> str:
    return "x".join(str(int(n)) for n in shape)
