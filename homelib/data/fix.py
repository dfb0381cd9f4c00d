"""Repaired copies of a data set: what can be mended without a judgement is written anew, everything else is linked to.

The folder that comes out is whole: the same manifest and a new check apply to it. The input is only read.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..paths import written_whole
from .check import Checked
from .examine import apart_mm, orientation_change, turned
from .findings import write_rows
from .manifest import Manifest
from .reading import ReadFault, Volume, files_of, read

_WRITABLE = (".nii", ".nii.gz", ".nrrd", ".mha")


@dataclass(frozen=True)
class Repair:
    """One file that was written anew, and the checks that it failed before."""

    case: str
    file: str
    mended: str


def fix(checked: Checked, manifest: Manifest, root: str | Path, out: str | Path) -> list[Repair]:
    """Write the repaired copy of a checked data set to `out`, a new or empty folder; `repairs.csv` in it lists what was mended.

    Raises:
        UserError: `out` is not empty, or lies in the data set's folder, or around it.
    """
    given, root, out = Path(root).expanduser(), Path(root).expanduser().resolve(), fit_for_copies(root, out)
    repairs = []
    for case in checked.cases:
        wrong = {}
        for f in checked.reports[case.id].findings:
            if f.fixable:
                wrong.setdefault(f.file, []).append(f.check)
        for role in ("image", "label"):
            file = getattr(case, role)
            if file is None:
                continue
            target = out / os.path.relpath(file, given)
            mended = None
            if str(file) in wrong and file.name.endswith(_WRITABLE):
                mended = _mended_image(read(file)) if role == "image" else _mended_label(read(file), _image_of(case.image))
            if mended is None:
                for part in files_of(file):
                    if not (place := os.path.relpath(part, given)).startswith(".."):
                        _link(part, out / place)
                continue
            save(mended, target)
            repairs.append(Repair(case.id, str(target), ", ".join(wrong[str(file)])))
    for name in (manifest.split.lists if manifest.split else {}).values():
        if (root / name).is_file():
            _link(root / name, out / name)
    out.mkdir(parents=True, exist_ok=True)
    write_rows((asdict(repair) for repair in repairs), ["case", "file", "mended"], out / "repairs.csv")
    return repairs


def unmended(checked: Checked) -> list[str]:
    """Files with faults that could be mended, were they in a format that is written here: no header apart from its voxels, and no folder of masks."""
    return sorted({str(f.file) for f in checked.findings if f.fixable and not str(f.file).endswith(_WRITABLE)})


def fit_for_copies(root: str | Path, out: str | Path) -> Path:
    """The folder for repaired copies, resolved. Raises UserError as `fix`."""
    root, out = Path(root).expanduser().resolve(), Path(out).expanduser().resolve()
    if out == root or root in out.parents or out in root.parents:
        raise UserError(f"--fix: found {out}, expected a folder beside {root}, not in or around it. Choose another one.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--fix: {out} exists already and is left as it is; expected a new or empty folder. Choose another one.")
    return out


def _image_of(path: Path) -> Volume | None:
    try:
        return read(path)
    except ReadFault:
        return None


def _mended_image(image: Volume) -> Volume | None:
    """The image with numbers throughout, and a plain header; None where there is no number at all."""
    data = image.data
    if data.dtype.kind == "f" and not (finite := np.isfinite(data)).all():
        if not finite.any():
            return None
        data = np.where(finite, data, data[finite].min()).astype(data.dtype)
    return Volume(data, image.affine)


def _mended_label(label: Volume, image: Volume | None) -> Volume:
    """The label on its image's axes where it is less than half a voxel off, and stored as integers where it holds nothing else."""
    from nibabel.orientations import apply_orientation

    data, affine = label.data, label.affine
    if image is not None:
        shape, turned_affine = turned(label, image.affine)
        if shape == image.data.shape and apart_mm(image.affine, turned_affine, shape) <= min(image.spacing_mm) / 2:
            data, affine = apply_orientation(data, orientation_change(label.affine, image.affine)), image.affine
    if data.dtype.kind == "f" and np.isfinite(data).all() and (data == np.rint(data)).all() and 0 <= data.min() and data.max() < 2**16:
        data = data.astype(np.uint8 if data.max() < 2**8 else np.uint16)
    return Volume(data, affine)


def save(volume: Volume, path: Path) -> None:
    """Write a volume as NIfTI, NRRD or MetaImage by the path's suffix; whole or not at all."""
    with written_whole(path) as part:
        if path.name.endswith((".nii", ".nii.gz")):
            import nibabel

            data = volume.data.astype(np.int32) if volume.data.dtype.name in ("int64", "uint64") else volume.data
            image = nibabel.Nifti1Image(data.astype(np.uint8) if data.dtype == bool else data, volume.affine)
            image.set_sform(volume.affine, code=1)
            image.set_qform(volume.affine, code=1)
            if not np.allclose(image.get_qform(), volume.affine, atol=1e-3):  # a shear, which a qform cannot hold
                image.set_qform(None, code=0)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, part)
        else:
            import SimpleITK as sitk

            image = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.T))
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
            image.SetOrigin(affine[:3, 3].tolist())
            image.SetSpacing(volume.spacing_mm)
            image.SetDirection((affine[:3, :3] / volume.spacing_mm).ravel().tolist())
            sitk.WriteImage(image, str(part), useCompression=True)


def _link(file: Path, target: Path) -> None:
    """A link to an unchanged file or folder; a copy where links cannot be made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.exists():
        return  # an image that two layouts share
    try:
        target.symlink_to(file.absolute())
    except OSError:
        shutil.copytree(file, target) if file.is_dir() else shutil.copy2(file, target)
