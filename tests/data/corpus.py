"""A folder of malformed cases, each spoilt in one way, beside good ones: what real downloads look like, in small.

`SPOILT` maps a case id to the checks it must fail, all of them and no other. `make` writes the folder.
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
"""
GOOD = ("Good-a", "good-b", "good-nrrd", "good-dicom", "good-masks")
SPOILT: dict[str, tuple[str, ...]] = {}
_MAKERS: dict[str, Callable[["Writer"], object]] = {}


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

    def masks(self) -> Path:
        folder = self.root / "masked" / self.id
        (folder / "segmentations").mkdir(parents=True)
        nib.save(nib.Nifti1Image(self.image, AFFINE), folder / "ct.nii.gz")
        for value, name in {1: "liver", 2: "cyst", 5: "spleen", 0: "rib"}.items():
            nib.save(nib.Nifti1Image((self.label == value).astype(np.uint8), AFFINE), folder / "segmentations" / f"{name}.nii.gz")
        return folder


def spoilt(*checks: str, case_id: str | None = None):
    """Registers a maker of a case that fails these checks; its id is the function's name."""

    def register(maker: Callable[[Writer], object]):
        name = case_id or maker.__name__.replace("_", "-")
        SPOILT[name], _MAKERS[name] = checks, maker
        return maker

    return register


def make(root: Path) -> Path:
    """Write the corpus below `root`; returns the path of its manifest, which lies beside the data."""
    data = root / "data"
    for seed, case_id in enumerate([*GOOD, *_MAKERS]):
        writer = Writer(data, case_id, seed)
        if case_id == "good-nrrd":
            image = sitk.GetImageFromArray(writer.image.T)
            sitk.WriteImage(image, str(writer.path("image", ".nrrd")))
            sitk.WriteImage(sitk.Cast(sitk.GetImageFromArray(writer.label.T), sitk.sitkUInt8), str(writer.path("label", ".mha")))
        elif case_id == "good-dicom":
            writer.dicom()
        elif case_id == "good-masks":
            writer.masks()
        elif case_id in GOOD:
            writer.both()
        else:
            _MAKERS[case_id](writer)
    (root / "corpus.yaml").write_text(MANIFEST)
    return root / "corpus.yaml"


# ---------------------------------------------------------------- files that cannot be opened


@spoilt("damaged")
def truncated_gzip(w):
    w.both()
    w.path("image").write_bytes(w.path("image").read_bytes()[:-400])


@spoilt("damaged")
def truncated_label(w):
    w.both()
    w.path("label").write_bytes(w.path("label").read_bytes()[:60])


@spoilt("damaged")
def text_for_an_image(w):
    w.both()
    w.path("image").write_text("<html>Sign in to download</html>")


@spoilt("damaged")
def not_gzip_after_all(w):
    w.both()
    w.path("image").write_bytes(gzip.decompress(w.path("image").read_bytes()))


@spoilt("damaged")
def damaged_nrrd(w):
    w.nifti("label")
    w.path("image", ".nrrd").write_text("NRRD0004\ntype: short\ndimension: 3\nsizes: 9 9 9\nencoding: gzip\n\nxxxx")


@spoilt("damaged")
def metaimage_without_its_data(w):
    w.nifti("label")
    header = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\nElementDataFile = gone.raw\n"
    w.path("image", ".mhd").write_text(header)


@spoilt("damaged")
def metaimage_without_spacing(w):
    w.nifti("label")
    header = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 0 1 1\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    w.path("image", ".mha").write_bytes(header.encode() + bytes(128))


@spoilt("empty file")
def zero_bytes(w):
    w.both()
    w.path("image").write_bytes(b"")


@spoilt("empty file")
def zero_bytes_label(w):
    w.both()
    w.path("label").write_bytes(b"")


@spoilt("link")
def link_to_nothing(w):
    w.both()
    w.path("image").unlink()
    w.path("image").symlink_to("nowhere.nii.gz")


@spoilt("link")
def link_loop(w):
    w.both()
    w.path("image").unlink()
    w.path("image").symlink_to(w.path("image").name)


@spoilt("too large")
def bomb(w):
    w.both()
    raw = bytearray(gzip.decompress(w.path("image").read_bytes()))
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    w.path("image").write_bytes(gzip.compress(raw))


# ---------------------------------------------------------------- shapes and grids


@spoilt("not 3D")
def flat_image(w):
    w.both(image=w.image[:, :, 4])


@spoilt("not 3D")
def one_slice(w):
    w.both(image=w.image[:, :, 4:5])


@spoilt("not 3D")
def four_axes(w):
    w.both(image=np.stack([w.image, w.image], -1))


@spoilt("extra axis")
def fourth_axis_of_one(w):
    w.both(image=w.image[..., None])


@spoilt("not 3D")
def colours(w):
    w.nifti("label")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), str(w.path("image", ".nrrd")))


@spoilt("pixel type")
def complex_numbers(w):
    w.both(image=w.image.astype(np.complex64))


@spoilt("affine")
def singular_affine(w):
    w.both(affine=np.diag([2.0, 0, 2, 1]), label_affine=AFFINE)


@spoilt("affine")
def affine_of_nan(w):
    w.both()
    raw = bytearray(gzip.decompress(w.path("image").read_bytes()))
    raw[280:284] = np.float32(np.nan).tobytes()  # srow_x
    w.path("image").write_bytes(gzip.compress(raw))


@spoilt("unit")
def metres(w):
    w.both(change=lambda image: image.header.set_xyzt_units("meter"))


@spoilt("spacing")
def tiny_voxels(w):
    w.both(affine=np.diag([0.002, 0.002, 0.002, 1]))


@spoilt("sheared", "sheared")  # of the image and of the label
def sheared_axes(w):
    sheared = AFFINE.copy()
    sheared[0, 2] = 1.0
    w.both(affine=sheared, change=lambda i: i.set_qform(None, 0), label_change=lambda i: i.set_qform(None, 0))


@spoilt("negative spacing")
def negative_pixdim(w):
    w.both()
    raw = bytearray(gzip.decompress(w.path("image").read_bytes()))
    raw[80:84] = np.float32(-2).tobytes()
    w.path("image").write_bytes(gzip.compress(raw))


@spoilt("no orientation")
def no_orientation(w):
    place = np.diag([2.0, 2, 2.5, 1])
    w.both(affine=place, change=lambda i: (i.set_sform(None, 0), i.set_qform(None, 0)))
    bare = nib.load(w.path("image")).affine
    w.nifti("label", affine=bare)


@spoilt("two orientations")
def two_orientations(w):
    other = AFFINE.copy()
    other[0, 3] += 15
    w.both(change=lambda image: image.set_qform(other, 1))


@spoilt("mixed spacing")
def other_spacing(w):
    w.both(affine=np.diag([-2.0, -2, 12, 1]))


# ---------------------------------------------------------------- values of the image


@spoilt("not finite")
def some_nan(w):
    image = w.image.astype(np.float32)
    image[2, 2, 2] = np.nan
    w.both(image=image)


@spoilt("not finite")
def nan_alone(w):
    w.both(image=np.full(SHAPE, np.nan, np.float32))


@spoilt("not finite")
def infinite(w):
    image = w.image.astype(np.float64)
    image[1, 1, 1] = -np.inf
    w.both(image=image)


@spoilt("constant")
def constant_image(w):
    w.both(image=np.full(SHAPE, -1000, np.int16))


@spoilt("not HU")
def shifted_by_1024(w):
    w.both(image=w.image + 1024)


@spoilt("not HU")
def grey_values(w):
    w.both(image=np.clip((w.image + 160) * 0.6, 0, 255).astype(np.uint8))


@spoilt("range")
def standardised(w):
    w.both(image=((w.image - w.image.mean()) / w.image.std()).astype(np.float32))


@spoilt("duplicate image")
def zz_a_copy(w):
    other = Writer(w.root, "Good-a", 0)
    w.both(image=other.image)


@spoilt("duplicate label")
def zz_label_of_another(w):
    other = Writer(w.root, "good-b", 1)
    w.both(label=other.label)


@spoilt("duplicate image")
def zz_a_copy_in_another_format(w):
    other = Writer(w.root, "good-b", 1)
    sitk.WriteImage(sitk.Cast(sitk.GetImageFromArray(other.image.T), sitk.sitkFloat32), str(w.path("image", ".mha")))
    sitk.WriteImage(sitk.GetImageFromArray(w.label.T), str(w.path("label", ".nrrd")))


# ---------------------------------------------------------------- the label


@spoilt("label shape")
def label_of_another_shape(w):
    w.both(label=w.label[:-1])


@spoilt("label place")
def shifted_label(w):
    shifted = AFFINE.copy()
    shifted[1, 3] += 20
    w.both(label_affine=shifted)


@spoilt("label offset")
def slightly_shifted_label(w):
    shifted = AFFINE.copy()
    shifted[1, 3] += 0.5
    w.both(label_affine=shifted)


@spoilt("label turned")
def flipped_label(w):
    flipped = AFFINE @ np.array([[-1.0, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    w.both(label=w.label[::-1], label_affine=flipped)


@spoilt("label turned")
def swapped_label_axes(w):
    w.both(label=w.label.transpose(2, 0, 1), label_affine=AFFINE[:, [2, 0, 1, 3]])


@spoilt("label place")
def flip_in_the_header_alone(w):
    w.both(label_affine=AFFINE @ np.diag([-1.0, 1, 1, 1]))


@spoilt("label values")
def wrong_label_value(w):
    label = w.label.copy()
    label[0, 0, 0] = 9
    w.both(label=label)


@spoilt("label negative")
def negative_label(w):
    label = w.label.astype(np.int16)
    label[0, 0, 0] = -1
    w.both(label=label)


@spoilt("label fractions")
def label_of_halves(w):
    w.both(label=w.label * np.float32(0.5))


@spoilt("label not finite")
def label_of_nan(w):
    label = w.label.astype(np.float32)
    label[0, 0, 0] = np.nan
    w.both(label=label)


@spoilt("label type")
def label_of_floats(w):
    w.both(label=w.label.astype(np.float64))


@spoilt("label empty")
def empty_label(w):
    w.both(label=np.zeros_like(w.label))


@spoilt("no background")
def label_everywhere(w):
    w.both(label=np.maximum(w.label, 1))


@spoilt("label negative", "label is the image")
def image_for_a_label(w):
    w.both(label=w.image)


@spoilt("label values")
def two_hundred_labels(w):
    w.both(label=(np.arange(w.label.size).reshape(SHAPE) % 200).astype(np.uint8))


@spoilt("no masks")
def masks_of_other_names(w):
    folder = w.masks() / "segmentations"
    for file in list(folder.iterdir()):
        file.rename(folder / f"x{file.name}")


@spoilt("label grid")
def mask_of_another_grid(w):
    folder = w.masks() / "segmentations"
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), AFFINE), folder / "spleen.nii.gz")


@spoilt("masks overlap")
def masks_that_overlap(w):
    folder = w.masks() / "segmentations"
    shutil.copy(folder / "liver.nii.gz", folder / "spleen.nii.gz")


# ---------------------------------------------------------------- DICOM


@spoilt("slices missing")
def half_copied_series(w):
    w.dicom(skip=(4, 5))


@spoilt("slices missing")
def every_fourth_slice(w):
    w.dicom(skip=(5, 6, 7, 8, 9), ImagesInAcquisition=SHAPE[2])


@spoilt("slices missing")
def a_single_slice(w):
    w.dicom(skip=range(1, SHAPE[2]))


@spoilt("slices twice")
def two_phases_in_one(w):
    w.dicom(ImagePositionPatient=lambda k: [-20, -30, -40 + 2.5 * (k // 2)])


@spoilt("several series")
def two_series(w):
    w.dicom(SeriesInstanceUID=lambda k: f"1.2.4.{k % 2}")


@spoilt("slices differ")
def scout_among_slices(w):
    w.dicom(ImageOrientationPatient=lambda k: [1, 0, 0, 0, 0, -1] if k == 3 else [1, 0, 0, 0, 1, 0])


@spoilt("damaged")
def slice_cut_off_in_its_header(w):
    os.truncate(w.dicom() / "slice004.dcm", 400)


@spoilt("damaged")
def slice_cut_off_in_its_pixels(w):
    file = w.dicom() / "slice004.dcm"
    os.truncate(file, file.stat().st_size - 50)


@spoilt("damaged")
def no_dicom_at_all(w):
    (w.dicom() / "slice004.dcm").write_text("nothing of the kind")


@spoilt("empty file")
def empty_slice(w):
    (w.dicom() / "slice004.dcm").write_bytes(b"")


@spoilt("no slices")
def folder_of_texts(w):
    w.nifti("label")
    (w.root / "dicom" / w.id).mkdir(parents=True)
    (w.root / "dicom" / w.id / "README.txt").write_text("The images are on request.")


@spoilt("wrong modality")
def mr_in_a_ct_set(w):
    w.dicom(Modality="MR")


@spoilt("affine")
def slices_without_a_place(w):
    w.dicom(ImagePositionPatient=None)


@spoilt("many frames")
def one_file_of_many_frames(w):
    w.dicom(skip=range(1, SHAPE[2]), NumberOfFrames=10)


# ---------------------------------------------------------------- names and pairs


@spoilt("label missing")
def image_alone(w):
    w.nifti("image")


@spoilt("image missing")
def label_alone(w):
    w.nifti("label")


@spoilt("image twice")
def image_in_two_formats(w):
    w.both()
    nib.save(nib.load(w.path("image")), w.path("image", ".nii"))


@spoilt("label twice")
def label_in_two_formats(w):
    w.both()
    nib.save(nib.load(w.path("label")), w.path("label", ".nii"))


@spoilt("name", case_id="Zażółć-gęślą-jaźń-患者")
def not_ascii(w):
    w.both()


@spoilt("name", case_id=os.fsdecode(b"latin-\xfc-1"))
def not_utf8(w):
    w.both()


@spoilt("name", case_id="long-" + "x" * 200)
def very_long(w):
    w.both()


@spoilt("name", case_id="good-a")
def capitals(w):
    w.both()
