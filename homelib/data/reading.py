"""Files to arrays, whatever the format: NIfTI (nibabel), NRRD and MetaImage (SimpleITK), a folder of DICOM slices, a folder of masks.

All come back alike: axes x, y, z of the file, an affine from voxel to mm in RAS+ (as nibabel has it; ITK's and DICOM's LPS+ is turned),
values as stored, scaled by the file's own slope. A fault is an exception that says what was found, what is expected and the remedy.
"""

import contextlib
import fnmatch
import functools
import gzip
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .checks import CHECKS

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
LARGEST_BYTES = 16 * 2**30  # a header that promises more is taken for damaged
_FLAT = 0.1  # volume that three axes of length 1 span, at least
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_DETACHED = re.compile(r"^(?:ElementDataFile\s*=|data ?file:)[ \t]*(\S.*?)\s*$", re.MULTILINE | re.IGNORECASE)


class ReadFault(UserError):
    """A file that cannot be used. `check` is a key of `checks.CHECKS`; `filled` goes into its text of what is expected."""

    def __init__(self, path: str | Path, check: str, found: str, **filled: object):
        kind = CHECKS[check]
        super().__init__(f"{path}: found {found}, expected {kind.expected.format(**filled)}. {kind.remedy}")
        self.path, self.check, self.found, self.filled = str(path), check, found, filled

    def __reduce__(self) -> tuple:
        """It may be sent from one process to another, which by its text alone it could not be made again in."""
        return functools.partial(ReadFault, self.path, self.check, self.found, **self.filled), ()


@dataclass(frozen=True)
class Remark:
    """Something odd about a file that can be read all the same."""

    check: str
    found: str


@dataclass(frozen=True)
class Volume:
    """data: (X, Y, Z), in the file's type. affine: (4, 4) float64, voxel to mm, RAS+. modality: what the file itself says, DICOM's `CT` say."""

    data: np.ndarray
    affine: np.ndarray
    remarks: tuple[Remark, ...] = ()
    modality: str | None = None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return tuple(np.linalg.norm(self.affine[:3, :3], axis=0).tolist())


@dataclass
class _Raw:
    """A volume before what all formats share is checked."""

    data: np.ndarray
    affine: np.ndarray
    remarks: list[Remark] = field(default_factory=list)
    modality: str | None = None


def read(path: str | Path) -> Volume:
    """The 3D volume of a file or of a folder of DICOM slices.

    >>> read("scan.nii.gz").data.shape   # doctest: +SKIP
    (512, 512, 133)

    Raises:
        ReadFault (a UserError): missing, a loop of links, no permission, empty, damaged, no 3D volume of numbers, no usable affine.
    """
    path = Path(path)
    _require_readable(path)
    try:
        with quiet():
            raw = _read_dicom(path) if path.is_dir() else _read_nifti(path) if has_suffix(path, (".nii", ".nii.gz")) else _read_itk([str(path)])
    except ReadFault:
        raise
    except Exception as error:  # readers raise anything from OSError to zlib.error on a damaged file
        reason = " ".join(re.sub(r"\S*0x[0-9a-f]+\S*", "", str(error)).split())[-160:]  # ITK's has an address in memory
        raise ReadFault(path, "damaged", f"{type(error).__name__}: {reason}") from None
    return _checked(path, raw)


def read_label(path: str | Path, labels: dict[int, str]) -> Volume:
    """A label volume: a file, or a folder with one mask a label, each named as in `labels` (raw value -> name), say `liver.nii.gz`.

    Masks of no label are left out; where masks overlap the higher value stays. Raises ReadFault as `read`, and for masks on different grids, or of no label.
    """
    path = Path(path)
    if not path.is_dir():
        return read(path)
    _require_readable(path)
    files = masks_in(path)
    present = {value: files[name] for value, name in sorted(labels.items()) if name in files}
    if not present:
        raise ReadFault(path, "no masks", f"{len(files)} masks, none named as a label", example=next(iter(labels.values()), "liver"))
    merged, overlap = None, 0
    for value, file in present.items():
        mask = read(file)
        if merged is None:
            merged = Volume(np.zeros(mask.data.shape, np.uint8 if max(labels) < 256 else np.uint16), mask.affine)
        elif merged.data.shape != mask.data.shape or not np.allclose(merged.affine, mask.affine, atol=1e-3):
            raise ReadFault(file, "label grid", f"{times(mask.data.shape)} voxels, or another place")
        inside = mask.data > 0
        overlap += int(np.count_nonzero(merged.data[inside]))
        merged.data[inside] = value
    assert merged is not None  # of at least one mask
    return replace(merged, remarks=(Remark("masks overlap", f"{overlap} voxels in two masks"),)) if overlap else merged


def masks_in(folder: Path) -> dict[str, Path]:
    """The masks in a folder by name, without their endings. Other files, a table of volumes say, are none."""
    return {entry.name.split(".")[0]: entry for entry in sorted(folder.iterdir()) if has_suffix(entry) and not entry.name.startswith(".")}


def has_suffix(path: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a path ends in one of some suffixes, in small letters or in capitals: `scan.NII.GZ` is a NIfTI. (nibabel takes no `.Nii.gz`.)"""
    return str(path).endswith((*suffixes, *map(str.upper, suffixes)))


def split_suffix(name: str) -> tuple[str, str]:
    """
    >>> split_suffix("scan.1.nii.gz"), split_suffix("notes.txt")
    (('scan.1', '.nii.gz'), ('notes.txt', ''))
    """
    suffix = next((name[-len(suffix) :] for suffix in IMAGE_SUFFIXES if has_suffix(name, (suffix,))), "")
    return name.removesuffix(suffix) if suffix else name, suffix


def files_of(path: str | Path) -> list[Path]:
    """A file, and those beside it that hold its voxels, where it is a header alone (.mhd, .nhdr): as far as they are there. Of a folder, itself."""
    path = Path(path)
    if not has_suffix(path, (".mhd", ".nhdr")):
        return [path]
    try:
        with path.open("rb") as stream:
            header = stream.read(2**16).decode("latin-1")
        beside = sorted(os.listdir(path.parent))
    except OSError:  # reading it will tell
        return [path]
    named = _DETACHED.search(header)
    if named is None:
        return [path]
    if named[1].upper().startswith("LIST"):
        names = [line.strip() for line in header[named.end() :].splitlines()]
    elif "%" in named[1]:  # slice%03d.raw 1 60 1
        names = fnmatch.filter(beside, re.sub(r"%[0-9]*d", "[0-9]*", named[1].split()[0]))
    else:
        names = [named[1]]
    return [path, *(path.parent / name for name in names if name and os.path.isfile(path.parent / name))]


# ---------------------------------------------------------------- before and after a format's own reader


def _require_readable(path: Path) -> None:
    try:
        if path.is_dir():
            os.scandir(path).close()
            return
        with path.open("rb") as stream:
            if not stream.read(1):
                raise ReadFault(path, "empty file", "0 bytes")
    except FileNotFoundError:
        if path.is_symlink():
            raise ReadFault(path, "link", "a link to nothing") from None
        raise ReadFault(path, "missing", "no such file") from None
    except PermissionError:
        raise ReadFault(path, "permission", "no permission to read it") from None
    except OSError as error:
        raise ReadFault(path, "link" if path.is_symlink() else "damaged", str(error.strerror or error).lower()) from None


def _checked(path: Path, raw: _Raw) -> Volume:
    data, remarks = raw.data, raw.remarks
    if data.ndim == 4 and data.shape[3] == 1:
        remarks.append(Remark("extra axis", f"shape {times(data.shape)}"))
        data = data[..., 0]
    if data.ndim != 3 or min(data.shape) < 2:
        raise ReadFault(path, "not 3D", f"shape {times(data.shape)}")
    if data.dtype.kind not in "iufb":
        raise ReadFault(path, "pixel type", f"values of type {data.dtype}")
    if not np.isfinite(raw.affine).all():
        raise ReadFault(path, "affine", "one that is not finite")
    linear = raw.affine[:3, :3]
    lengths = np.linalg.norm(linear, axis=0)
    unit = linear / np.where(lengths > 1e-9, lengths, np.inf)
    if abs(np.linalg.det(unit)) <= _FLAT:
        raise ReadFault(path, "affine", "one that is flat")
    if not np.allclose(unit.T @ unit, np.eye(3), atol=1e-2):
        remarks.append(Remark("sheared", "axes that are not"))
    return Volume(data, raw.affine, tuple(remarks), raw.modality)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on stderr: what nibabel, ITK and pydicom would warn of is told as a finding."""
    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---------------------------------------------------------------- formats


def _read_nifti(path: Path) -> _Raw:
    import nibabel

    image: Any = nibabel.load(path)
    header, remarks = image.header, []
    _require_bearable(path, math.prod(map(int, image.shape)) * header.get_data_dtype().itemsize)
    raw_pixdim = _raw_pixdim(path, header)
    if (raw_pixdim < 0).any():
        remarks.append(Remark("negative spacing", "pixdim " + "x".join(f"{value:g}" for value in raw_pixdim)))
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise ReadFault(path, "unit", f"lengths in {unit}")
    sform, qform = (image.get_sform(coded=True), image.get_qform(coded=True)) if hasattr(image, "get_sform") else ((image.affine, 1), (image.affine, 1))
    if not sform[1] and not qform[1]:
        remarks.append(Remark("no orientation", "neither: left and right are not known"))
    elif sform[1] and qform[1] and not np.allclose(sform[0], qform[0], atol=0.05):
        apart = np.abs(sform[0] - qform[0]).max()
        remarks.append(Remark("two orientations", f"up to {apart:.3g} apart"))
    stored = image.dataobj
    small = header.get_data_dtype().kind in "iu" and header.get_data_dtype().itemsize <= 2 and (stored.slope, stored.inter) != (1, 0)
    data = np.asarray(stored, np.float32) if small else np.asanyarray(stored)  # nibabel scales to float64: twice the memory for no more digits
    return _Raw(data, np.asarray(image.affine, np.float64), remarks)


def _raw_pixdim(path: Path, header: Any) -> np.ndarray:
    """Voxel sizes as they stand in the file: nibabel makes them positive on reading."""
    opener = gzip.open if has_suffix(path, (".gz",)) else open
    with opener(path, "rb") as stream:
        start = stream.read(92)
    if header["sizeof_hdr"] != 348 or len(start) < 92:
        return np.ones(3)
    return np.frombuffer(start, dtype=np.dtype(np.float32).newbyteorder(header.endianness), count=3, offset=80)


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """ITK's own libraries print what is wrong with a file past Python; the exception says it too."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def with_plain_names(files: list[str]) -> Iterator[list[str]]:
    """The same files under names that ITK takes: it wants UTF-8, and a name may hold any bytes."""
    try:
        "".join(files).encode()
        yield files
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            links = [Path(folder) / f"{number:06d}{Path(file).suffix}" for number, file in enumerate(files)]
            for link, file in zip(links, files, strict=True):
                link.symlink_to(Path(file).absolute())
            yield [str(link) for link in links]


def _read_itk(files: list[str]) -> _Raw:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with no_stderr(), with_plain_names(files) as files:
        if len(files) == 1:
            reader = itk_reader(files[0])
            _require_bearable(files[0], math.prod(reader.GetSize()) * reader.GetNumberOfComponents())
        else:
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(files)
        image = reader.Execute()
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise ReadFault(files[0], "not 3D", f"{image.GetNumberOfComponentsPerPixel()} values a voxel")
    data = sitk.GetArrayFromImage(image).T  # ITK's arrays are z, y, x
    affine = np.eye(4)
    if image.GetDimension() == 3:
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
    return _Raw(data, _TO_RAS @ affine)


def itk_reader(file: str) -> Any:
    """SimpleITK's reader of a file, which has read its header."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    if has_suffix(file, (".mha", ".mhd")):  # in capitals it does not know them
        reader.SetImageIO("MetaImageIO")
    reader.ReadImageInformation()
    return reader


def _require_bearable(path: str | Path, size: int) -> None:
    if size > LARGEST_BYTES:
        raise ReadFault(path, "too large", f"a header that promises {size / 2**30:.0f} GiB", most=f"{LARGEST_BYTES / 2**30:.0f} GiB")


def _read_dicom(folder: Path) -> _Raw:
    from .dicom import series_files

    files, modality, step = series_files(folder)
    raw = _read_itk([str(file) for file in files])
    raw.affine[:3, 2] = _TO_RAS[:3, :3] @ step  # ITK puts slices straight above each other, those of a tilted gantry too
    raw.modality = modality
    return raw


def times(shape: Iterable[int]) -> str:
    """`512x512x133`."""
    return "x".join(str(int(n)) for n in shape)
