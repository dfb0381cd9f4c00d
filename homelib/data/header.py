"""What a scan's header says of its grid, before a voxel is read: for plans and for estimates of memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..axes import three
from ..errors import UserError
from .dicom import series_files
from .reading import has_suffix, itk_reader, no_stderr, quiet, with_plain_names

_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Header:
    """shape: voxels along the file's axes. linear: (3, 3), a voxel's steps in mm (RAS+). voxel_bytes: while the scan is read, copies included."""

    shape: tuple[int, int, int]
    linear: np.ndarray
    voxel_bytes: int

    @property
    def order(self) -> np.ndarray:
        """(3,): which of the file's axes lies along right-left, front-back and up."""
        return np.argsort(nib.orientations.io_orientation(np.vstack([np.hstack([self.linear, np.zeros((3, 1))]), [0, 0, 0, 1]]))[:, 0])

    @property
    def ras_shape(self) -> tuple[int, int, int]:
        """Voxels along right-left, front-back, up."""
        return three(int(self.shape[axis]) for axis in self.order)

    @property
    def ras_spacing_mm(self) -> tuple[float, float, float]:
        """As `ras_shape`."""
        lengths = np.linalg.norm(self.linear, axis=0)
        return three(float(lengths[axis]) for axis in self.order)


def read_header(path: str | Path) -> Header:
    """Of a NIfTI, NRRD or MetaImage file, or of the slices of a DICOM folder.

    Raises UserError: a header that cannot be read, or of no 3D volume.
    """
    path = Path(path)
    try:
        with quiet():
            shape, linear, voxel_bytes = _dicom(path) if path.is_dir() else _nifti(path) if has_suffix(path, (".nii", ".nii.gz")) else _itk(path)
        if len(shape) != 3:
            raise ValueError(f"{len(shape)} axes")
        found = Header(three(int(n) for n in shape), np.asarray(linear, float), voxel_bytes)
        found.order.tolist()  # of axes that are none it cannot be told
    except UserError:
        raise
    except Exception as error:  # a damaged header raises anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: its header cannot be read ({type(error).__name__}: {reason}); expected a 3D image. Is it whole?") from None
    return found


def _nifti(path: Path) -> tuple:
    file: Any = nib.load(path)
    stored = file.header.get_data_dtype().itemsize
    plain = (file.dataobj.slope, file.dataobj.inter) == (1, 0)
    return file.shape[:3], file.affine[:3, :3], stored if plain else stored + (4 if stored <= 2 else 8)  # what is scaled lies beside what was stored


def _itk(path: Path) -> tuple:
    with no_stderr(), with_plain_names([str(path)]) as (name,):
        reader = itk_reader(name)
    linear = _TO_RAS @ np.array(reader.GetDirection()).reshape(3, 3) @ np.diag(reader.GetSpacing()[:3])
    return reader.GetSize()[:3], linear, 2 * _itk_bytes(reader.GetPixelID())  # ITK's image, and the array that is copied from it


def _itk_bytes(pixel: int) -> int:
    import SimpleITK as sitk

    return np.dtype(sitk.GetArrayViewFromImage(sitk.Image(1, 1, 1, pixel)).dtype).itemsize


def _dicom(folder: Path) -> tuple:
    import pydicom

    files, _, step = series_files(folder)
    slice_ = pydicom.dcmread(files[0], stop_before_pixels=True, specific_tags=["Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"])
    across, down = np.reshape(np.array(slice_.ImageOrientationPatient, float), (2, 3))
    rows_mm, columns_mm = map(float, slice_.PixelSpacing)
    linear = _TO_RAS @ np.column_stack([across * columns_mm, down * rows_mm, step])
    return (int(slice_.Columns), int(slice_.Rows), len(files)), linear, 2 * 8  # a rescale that is no whole number makes ITK's pixels float64
