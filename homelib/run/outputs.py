"""Predictions as files: labels in the scan's own format and place in space, the map from numbers to names beside, probabilities by class."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from torch import Tensor

from ..errors import UserError
from ..paths import written_whole

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
LABEL_MAP = "labels.json"  # beside labels: class index -> name
MAPS = "probabilities"  # folder of these, beside labels
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_volume(volume: np.ndarray, affine: np.ndarray, path: Path, *, slope: float = 1.0) -> Path:
    """A volume (D, H, W) with its affine (4, 4, voxel to mm, RAS+) as NIfTI, NRRD or MetaImage by the path's ending; compressed but for `.nii`.

    slope: what stored whole numbers are to be multiplied by; NIfTI's header holds it, other formats get float32.
    """
    with written_whole(path) as part:
        if path.name.endswith((".nii", ".nii.gz")):
            image = nib.Nifti1Image(volume, affine)
            image.header.set_xyzt_units("mm")
            if slope != 1:
                image.header.set_slope_inter(slope, 0)
            nib.save(image, part)
        else:
            _write_itk(volume if slope == 1 else volume.astype(np.float32) * slope, affine, part)
    return path


def write_label(label: np.ndarray, affine: np.ndarray, path: Path, *, classes: int) -> Path:
    """Class indices (D, H, W) as uint8, or uint16 where there are more than 256, with their affine (4, 4). As `write_volume`."""
    return write_volume(label.astype(np.uint8 if classes <= 256 else np.uint16, copy=False), affine, path)


def write_label_map(class_names: Sequence[str], path: Path) -> Path:
    """JSON from class index to name, background included."""
    with written_whole(path) as part:
        part.write_text(json.dumps(_label_map(class_names), indent=1) + "\n")
    return path


def _label_map(class_names: Sequence[str]) -> dict[str, str]:
    return {str(index): name for index, name in enumerate(class_names)}


def require_label_map(class_names: Sequence[str], path: Path) -> None:
    """Raises UserError where there is a file of this name already that is another label map, or none: it is a user's, and not written over."""
    if not path.exists():
        return
    try:
        alike = json.loads(path.read_text()) == _label_map(class_names)
    except ValueError:
        alike = False
    if not alike:
        raise UserError(f"{path}: exists already, is no label map of {', '.join(class_names[1:4])}, ..., and is left as it is. Choose another --out.")


def map_files(folder: Path, class_names: Sequence[str], case_id: str, suffix: str) -> list[Path]:
    """Where the probabilities of a case lie, below the folder of its label: a file a class but the background."""
    return [folder / MAPS / f"{case_id}_{name}_probability{suffix}" for name in class_names[1:]]


class ProbabilityMaps:
    """Each class's probability on the file's grid, in steps of 1/255, gathered on disk while a case is predicted: memory stays that of a slab.

    Used as `with ProbabilityMaps(shape, names, folder) as maps: predict_label(..., on_slab=maps.add); maps.write(...)`.
    """

    def __init__(self, shape: tuple[int, int, int], class_names: Sequence[str], folder: Path):
        self.shape, self.names, self.folder = shape, tuple(class_names), folder / MAPS

    def __enter__(self) -> "ProbabilityMaps":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.kept = tempfile.TemporaryDirectory(dir=self.folder, prefix=".maps-")
        self.volumes = [np.memmap(Path(self.kept.name) / str(index), np.uint8, "w+", shape=self.shape) for index in range(len(self.names))]
        return self

    def add(self, index: int, box: tuple[slice, ...], probabilities: Tensor) -> None:
        """A class's probabilities (d, h, w) in a box of the file's grid."""
        self.volumes[index][box] = (probabilities.clamp(0, 1) * 255).round().byte().cpu().numpy()

    def write(self, affine: np.ndarray, case_id: str, suffix: str) -> list[Path]:
        """`<case>_<class>_probability<suffix>` for every class but the background, with the file's affine (4, 4), over what is there."""
        paths = map_files(self.folder.parent, self.names, case_id, suffix)
        return [write_volume(np.asarray(volume), affine, path, slope=1 / 255) for path, volume in zip(paths, self.volumes[1:], strict=True)]

    def __exit__(self, *error: object) -> None:
        self.volumes = []
        self.kept.cleanup()


def _write_itk(volume: np.ndarray, affine: np.ndarray, path: Path) -> None:
    import SimpleITK as sitk

    lps = _TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise UserError(f"{path.suffix}: found a scan whose axes are not at right angles, which this format cannot hold; expected .nii.gz. Set --out so.")
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
