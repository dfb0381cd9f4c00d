"""A folder of malformed cases, each spoilt in one way, beside good ones: what real downloads look like, in small.

`SPOILT` maps a case id to the checks it must fail, all of them and no other, and to how it is made. `make` writes the folder.
"""

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SHAPE = (12, 11, 10)
AFFINE = np.array([[-2.0, 0, 0, 20], [0, -2.0, 0, 30], [0, 0, 2.5, -40], [0, 0, 0, 1]])
MANIFEST = """
name: corpus
title: A corpus of faults
modality: CT
source: generated
licence: none
citation: none
labels: {1: liver, 2: cyst, 5: spleen}
classes: {liver: [1, 2], spleen: [5]}
spacing_mm: [2, 2, 2]
intensity_window: [-175, 250]
layouts:
  - {name: flat, image: "images/{case}.*", label: "labels/{case}.*", case: "[^/.]+"}
  - {name: dicom, image: "dicom/{case}/", label: "labels/{case}.*", case: "[^/.]+"}
  - {name: masks, image: "masked/{case}/ct.nii.gz", label: "masked/{case}/segmentations/"}
  - {name: inside, image: "inside/{case}/", label: "inside/{case}/seg/label.nii.gz"}
  - {name: beside, image: "beside/{case}/ct.nii.gz", label: "beside/{case}/"}
"""
GOOD = ("Good-a", "good-b", "good-nrrd", "good-dicom", "good-masks", "good-inside", "good-beside")


class Writer:
    """Writes one case under its id: a CT and a label that fit, unless told otherwise."""

    def __init__(self, root: Path, case_id: str, seed: int):
        self.root, self.id = root, case_id
        rng = np.random.default_rng(seed)
        self.image = rng.normal(40, 30, SHAPE).round().astype(np.int16)
        self.image[:3] = -1000
        self.label = np.zeros(SHAPE, np.uint8)
        self.label[4:8, 3:7, 2:6] = 1
        self.label[9:11][rng.random((2, *SHAPE[1:])) > 0.6] = 5
        self.label[11, 3:5, 3:5] = 2

    def path(self, role: str, suffix: str = ".nii.gz") -> Path:
        path = self.root / f"{role}s" / f"{self.id}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def nifti(self, role: str, data=None, affine=AFFINE, change: Callable | None = None) -> Path:
        image = nib.Nifti1Image(getattr(self, role) if data is None else data, AFFINE)
        image.set_sform(affine, 1)
        singular = abs(np.linalg.det(affine)) < 1e-12
        image.set_qform(None if singular else affine, 0 if singular else 1)
        image.header.set_xyzt_units("mm")
        if change:
            change(image)
        nib.save(image, self.path(role))
        return self.path(role)

    def both(self, *, image=None, label=None, affine=AFFINE, label_affine=None, change=None, label_change=None):
        self.nifti("image", image, affine, change)
        self.nifti("label", label, affine if label_affine is None else label_affine, label_change)

    def cut(self, role: str, end: int | None) -> None:
        """Both files, one of them cut off; `end` None leaves nothing of it."""
        self.both()
        self.path(role).write_bytes(self.path(role).read_bytes()[:end] if end is not None else b"")

    def header(self, offset: int, value: np.ndarray) -> None:
        """Both files, with a number in the image's header replaced."""
        self.both()
        raw = bytearray(gzip.decompress(self.path("image").read_bytes()))
        raw[offset : offset + value.nbytes] = value.tobytes()
        self.path("image").write_bytes(gzip.compress(raw))

    def linked(self, to: str) -> None:
        self.both()
        self.path("image").unlink()
        self.path("image").symlink_to(to)

    def text(self, suffix: str, content: str, more: bytes = b"") -> None:
        """A label, and an image of these words."""
        self.nifti("label")
        self.path("image", suffix).write_bytes(content.encode() + more)

    def with_voxel(self, role: str, value: float, dtype=np.float32) -> np.ndarray:
        data = getattr(self, role).astype(dtype)
        data[0, 0, 0] = value
        return data

    def again(self, role: str) -> None:
        """Both files, and one of them in a second format."""
        self.both()
        nib.save(nib.load(self.path(role)), self.path(role, ".nii"))

    def dicom(self, *, skip=(), **tags) -> Path:
        """A series of the image's slices, and the label on their grid."""
        folder = self.root / "dicom" / self.id
        folder.mkdir(parents=True)
        self.nifti("label")
        for k in range(SHAPE[2]):
            if k in skip:
                continue
            slice_ = Dataset()
            slice_.file_meta = FileMetaDataset()
            slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID = CTImageStorage
            slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID = f"1.2.3.{k + 1}"
            slice_.SeriesInstanceUID, slice_.StudyInstanceUID, slice_.Modality = "1.2.4", "1.2.5", "CT"
            slice_.InstanceNumber = k + 1
            slice_.ImageOrientationPatient, slice_.PixelSpacing, slice_.SliceThickness = [1, 0, 0, 0, 1, 0], [2, 2], 2.5
            slice_.ImagePositionPatient = [-20, -30, -40 + 2.5 * k]
            slice_.Rows, slice_.Columns = SHAPE[1], SHAPE[0]
            slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
            slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
            slice_.RescaleIntercept, slice_.RescaleSlope = 0, 1
            slice_.PixelData = np.ascontiguousarray(self.image[:, :, k].T).tobytes()
            for name, value in tags.items():
                setattr(slice_, name, value(k) if callable(value) else value)
            pydicom.dcmwrite(folder / f"slice{k:03}.dcm", slice_, enforce_file_format=True)
        return folder

    def inside(self, label=None) -> None:
        """A series, and its label in a folder among the slices."""
        folder = self.root / "inside" / self.id
        folder.parent.mkdir(exist_ok=True)
        self.dicom().rename(folder)
        self.path("label").unlink()
        (folder / "seg").mkdir()
        nib.save(nib.Nifti1Image(self.label if label is None else label, AFFINE), folder / "seg" / "label.nii.gz")

    def beside(self, image=None) -> None:
        """An image among its masks."""
        folder = self.root / "beside" / self.id
        folder.mkdir(parents=True)
        for file in (self.masks() / "segmentations").iterdir():
            file.rename(folder / file.name)
        shutil.rmtree(self.root / "masked" / self.id)
        nib.save(nib.Nifti1Image(self.image if image is None else image, AFFINE), folder / "ct.nii.gz")

    def itk(self) -> None:
        """NRRD and MetaImage, at ITK's own origin."""
        sitk.WriteImage(sitk.GetImageFromArray(self.image.T), str(self.path("image", ".nrrd")))
        sitk.WriteImage(sitk.GetImageFromArray(self.label.T), str(self.path("label", ".mha")))

    def masks(self) -> Path:
        folder = self.root / "masked" / self.id
        (folder / "segmentations").mkdir(parents=True)
        nib.save(nib.Nifti1Image(self.image, AFFINE), folder / "ct.nii.gz")
        for value, name in {1: "liver", 2: "cyst", 5: "spleen", 0: "rib"}.items():
            nib.save(nib.Nifti1Image((self.label == value).astype(np.uint8), AFFINE), folder / "segmentations" / f"{name}.nii.gz")
        return folder


# ---------------------------------------------------------------- the faults: checks to be failed, and how the case is made

MOVED, NEAR, SHEARED, ELSEWHERE = AFFINE.copy(), AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
MOVED[1, 3] += 20
NEAR[1, 3] += 0.5
SHEARED[0, 2] = 1
ELSEWHERE[0, 3] += 15
FLIPPED = AFFINE @ np.array([[-1.0, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
META = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\n"


def padded(image: np.ndarray, value: int) -> np.ndarray:
    image = image.copy()
    image[:2, :, :4] = image[:2, :, -4:] = value
    return image


def noisy_air(image: np.ndarray) -> np.ndarray:
    air = np.random.default_rng(0).normal(-1000, 8, image.shape).round().astype(np.int16)
    return np.where(image < -500, air, image)


def no_orientation(w: Writer) -> None:
    w.both(affine=np.diag([2.0, 2, 2.5, 1]), change=lambda image: (image.set_sform(None, 0), image.set_qform(None, 0)))
    w.nifti("label", affine=nib.load(w.path("image")).affine)


def without_qform(image) -> None:
    image.set_qform(None, 0)


def colours(w: Writer) -> None:
    w.nifti("label")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), str(w.path("image", ".nrrd")))


def a_copy_in_another_format(w: Writer) -> None:
    other = Writer(w.root, "good-b", 1)
    sitk.WriteImage(sitk.Cast(sitk.GetImageFromArray(other.image.T), sitk.sitkFloat32), str(w.path("image", ".mha")))
    sitk.WriteImage(sitk.GetImageFromArray(w.label.T), str(w.path("label", ".nrrd")))


def masks_of_other_names(w: Writer) -> None:
    folder = w.masks() / "segmentations"
    for file in list(folder.iterdir()):
        file.rename(folder / f"x{file.name}")


def mask_of_another_grid(w: Writer) -> None:
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), AFFINE), w.masks() / "segmentations" / "spleen.nii.gz")


def masks_that_overlap(w: Writer) -> None:
    folder = w.masks() / "segmentations"
    shutil.copy(folder / "liver.nii.gz", folder / "spleen.nii.gz")


def cut_slice(w: Writer, keep: Callable[[int], int]) -> None:
    file = w.dicom() / "slice004.dcm"
    os.truncate(file, keep(file.stat().st_size))


def folder_of_texts(w: Writer) -> None:
    w.nifti("label")
    (w.root / "dicom" / w.id).mkdir(parents=True)
    (w.root / "dicom" / w.id / "README.txt").write_text("The images are on request.")


FAULTS: dict[str, tuple[str, Callable[[Writer], object]]] = {
    # files that cannot be opened
    "truncated gzip": ("damaged", lambda w: w.cut("image", -400)),
    "truncated label": ("damaged", lambda w: w.cut("label", 60)),
    "text for an image": ("damaged", lambda w: w.text(".nii.gz", "<html>Sign in to download</html>")),
    "gzip in name alone": ("damaged", lambda w: w.text(".nii.gz", "", bytes(400))),
    "damaged nrrd": ("damaged", lambda w: w.text(".nrrd", "NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: gzip\n\nxxxx")),
    "metaimage without its data": ("damaged", lambda w: w.text(".mhd", META + "ElementDataFile = gone.raw\n")),
    "metaimage without spacing": ("damaged", lambda w: w.text(".mha", META + "ElementSpacing = 0 1 1\nElementDataFile = LOCAL\n", bytes(128))),
    "zero bytes": ("empty file", lambda w: w.cut("image", None)),
    "zero bytes label": ("empty file", lambda w: w.cut("label", None)),
    "link to nothing": ("link", lambda w: w.linked("nowhere.nii.gz")),
    "link loop": ("link", lambda w: w.linked(f"{w.id}.nii.gz")),
    "bomb": ("too large", lambda w: w.header(42, np.array([30000, 30000, 30000], "<i2"))),
    # shapes and grids
    "flat image": ("not 3D", lambda w: w.both(image=w.image[:, :, 4])),
    "one slice": ("not 3D", lambda w: w.both(image=w.image[:, :, 4:5])),
    "four axes": ("not 3D", lambda w: w.both(image=np.stack([w.image, w.image], -1))),
    "colours": ("not 3D", colours),
    "fourth axis of one": ("extra axis", lambda w: w.both(image=w.image[..., None])),
    "complex numbers": ("pixel type", lambda w: w.both(image=w.image.astype(np.complex64))),
    "singular affine": ("affine", lambda w: w.both(affine=np.diag([2.0, 0, 2, 1]), label_affine=AFFINE)),
    "affine of nan": ("affine", lambda w: w.header(280, np.array(np.nan, np.float32))),  # srow_x
    "metres": ("unit", lambda w: w.both(change=lambda image: image.header.set_xyzt_units("meter"))),
    "tiny voxels": ("spacing", lambda w: w.both(affine=np.diag([0.002, 0.002, 0.002, 1]))),
    "sheared axes": ("sheared, sheared", lambda w: w.both(affine=SHEARED, change=without_qform, label_change=without_qform)),  # image and label
    "negative pixdim": ("negative spacing", lambda w: w.header(80, np.array(-2, np.float32))),
    "no orientation": ("no orientation", no_orientation),
    "two orientations": ("two orientations", lambda w: w.both(change=lambda image: image.set_qform(ELSEWHERE, 1))),
    "other spacing": ("mixed spacing", lambda w: w.both(affine=np.diag([-2.0, -2, 12, 1]))),
    # values of the image
    "some nan": ("not finite", lambda w: w.both(image=w.with_voxel("image", np.nan))),
    "infinite": ("not finite", lambda w: w.both(image=w.with_voxel("image", -np.inf, np.float64))),
    "nan alone": ("not finite", lambda w: w.both(image=np.full(SHAPE, np.nan, np.float32))),
    "constant image": ("constant", lambda w: w.both(image=np.full(SHAPE, -1000, np.int16))),
    "shifted by 1024": ("not HU", lambda w: w.both(image=w.image + 1024)),
    "shifted by 1024 with padding": ("not HU", lambda w: w.both(image=padded(w.image + 1024, -2000))),
    "shifted by 1024 but for a voxel": ("not HU", lambda w: w.both(image=w.with_voxel("image", -1025, np.int16) + 1024)),
    "shifted by 1000 with noise": ("not HU", lambda w: w.both(image=noisy_air(w.image) + 1000)),
    "signed grey values": ("not HU", lambda w: w.both(image=(np.clip((w.image + 160) * 0.6, 0, 255) - 128).astype(np.int16))),
    "grey values": ("not HU", lambda w: w.both(image=np.clip((w.image + 160) * 0.6, 0, 255).astype(np.uint8))),
    "standardised": ("range", lambda w: w.both(image=((w.image - w.image.mean()) / w.image.std()).astype(np.float32))),
    "zz a copy": ("duplicate image", lambda w: w.both(image=Writer(w.root, "Good-a", 0).image)),
    "zz a copy in another format": ("duplicate image", a_copy_in_another_format),
    "zz label of another": ("duplicate label", lambda w: w.both(label=Writer(w.root, "good-b", 1).label)),
    # the label
    "label of another shape": ("label shape", lambda w: w.both(label=w.label[:-1])),
    "shifted label": ("label place", lambda w: w.both(label_affine=MOVED)),
    "flip in the header alone": ("label place", lambda w: w.both(label_affine=AFFINE @ np.diag([-1.0, 1, 1, 1]))),
    "slightly shifted label": ("label offset", lambda w: w.both(label_affine=NEAR)),
    "flipped label": ("label turned", lambda w: w.both(label=w.label[::-1], label_affine=FLIPPED)),
    "swapped label axes": ("label turned", lambda w: w.both(label=w.label.transpose(2, 0, 1), label_affine=AFFINE[:, [2, 0, 1, 3]])),
    "wrong label value": ("label values", lambda w: w.both(label=w.with_voxel("label", 9, np.uint8))),
    "two hundred labels": ("label values", lambda w: w.both(label=(np.arange(w.label.size).reshape(SHAPE) % 200).astype(np.uint8))),
    "negative label": ("label negative", lambda w: w.both(label=w.with_voxel("label", -1, np.int16))),
    "image for a label": ("label is the image, label negative", lambda w: w.both(label=w.image)),
    "label of halves": ("label fractions", lambda w: w.both(label=w.label * np.float32(0.5))),
    "label of nan": ("label not finite", lambda w: w.both(label=w.with_voxel("label", np.nan))),
    "label of floats": ("label type", lambda w: w.both(label=w.label.astype(np.float64))),
    "empty label": ("label empty", lambda w: w.both(label=np.zeros_like(w.label))),
    "label of floats among slices": ("label type", lambda w: w.inside(w.label.astype(np.float64))),
    "some nan among masks": ("not finite", lambda w: w.beside(w.with_voxel("image", np.nan))),
    "label everywhere": ("no background", lambda w: w.both(label=np.maximum(w.label, 1))),
    "masks of other names": ("no masks", masks_of_other_names),
    "mask of another grid": ("label grid", mask_of_another_grid),
    "masks that overlap": ("masks overlap", masks_that_overlap),
    # DICOM
    "half-copied series": ("slices missing", lambda w: w.dicom(skip=(4, 5))),
    "first half of a series": ("slices missing", lambda w: w.dicom(skip=range(5, 10), ImagesInAcquisition=SHAPE[2])),
    "a single slice": ("slices missing", lambda w: w.dicom(skip=range(1, SHAPE[2]))),
    "two phases in one": ("slices twice", lambda w: w.dicom(ImagePositionPatient=lambda k: [-20, -30, -40 + 2.5 * (k // 2)])),
    "two series": ("several series", lambda w: w.dicom(SeriesInstanceUID=lambda k: f"1.2.4.{k % 2}")),
    "scout among slices": ("slices differ", lambda w: w.dicom(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 0, -1] if k == 3 else [1, 0, 0, 0, 1, 0])),
    "slice cut off in its header": ("damaged", lambda w: cut_slice(w, lambda size: 400)),
    "slice cut off in its pixels": ("damaged", lambda w: cut_slice(w, lambda size: size - 50)),
    "no dicom at all": ("damaged", lambda w: (w.dicom() / "slice004.dcm").write_text("nothing of the kind")),
    "empty slice": ("empty file", lambda w: (w.dicom() / "slice004.dcm").write_bytes(b"")),
    "folder of texts": ("no slices", folder_of_texts),
    "mr in a ct set": ("wrong modality", lambda w: w.dicom(Modality="MR")),
    "slices without a place": ("affine", lambda w: w.dicom(ImagePositionPatient=None)),
    "one file of many frames": ("many frames", lambda w: w.dicom(skip=range(1, SHAPE[2]), NumberOfFrames=10)),
    # names and pairs
    "image alone": ("label missing", lambda w: w.nifti("image")),
    "label alone": ("image missing", lambda w: w.nifti("label")),
    "image in two formats": ("image twice", lambda w: w.again("image")),
    "label in two formats": ("label twice", lambda w: w.again("label")),
    "Zażółć-gęślą-jaźń-患者": ("name", Writer.both),
    os.fsdecode(b"latin-\xfc-1"): ("name", Writer.both),
    "long-" + "x" * 200: ("name", Writer.both),
    "good-a": ("name", Writer.both),  # beside Good-a
}
SPOILT = {name.replace(" ", "-"): tuple(checks.split(", ")) for name, (checks, _) in FAULTS.items()}


def make(root: Path) -> Path:
    """Write the corpus below `root`; returns the path of its manifest, which lies beside the data."""
    makers = dict.fromkeys(GOOD, Writer.both) | {"good-nrrd": Writer.itk, "good-dicom": Writer.dicom, "good-masks": Writer.masks,
        "good-inside": Writer.inside, "good-beside": Writer.beside}  # fmt: skip
    makers |= {name.replace(" ", "-"): maker for name, (_, maker) in FAULTS.items()}
    for seed, (case_id, maker) in enumerate(makers.items()):
        maker(Writer(root / "data", case_id, seed))
    (root / "corpus.yaml").write_text(MANIFEST)
    return root / "corpus.yaml"
