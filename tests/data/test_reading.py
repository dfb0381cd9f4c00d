"""One volume in every format comes back with the same values at the same places."""

import importlib.util
import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from monai.transforms import LoadImage

from homelib.data.fix import save
from homelib.data.parallel import over
from homelib.data.reading import ReadFault, Volume, files_of, read, read_label
from homelib.errors import UserError

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)

TURN = np.array([[0.0, -1.5, 0.1, 7], [2.0, 0.0, 0.0, -3], [0.0, 0.05, 3.0, 11], [0, 0, 0, 1]])
LINEAR, _ = np.linalg.qr(TURN[:3, :3])
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3], OBLIQUE[:3, 3] = LINEAR * [2.0, 1.5, 3.0], [7, -3, 11]


@pytest.fixture
def volume():
    return Volume(np.random.default_rng(0).integers(-1000, 1000, corpus.SHAPE).astype(np.int16), OBLIQUE)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_formats_agree_with_each_other(volume, tmp_path, suffix):
    path = tmp_path / f"scan{suffix}"
    save(volume, path)
    back = read(path)
    assert back.data.dtype == np.int16
    assert back.remarks == ()
    np.testing.assert_array_equal(back.data, volume.data)
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-4)


def test_monai_reads_the_same_from_nifti(volume, tmp_path):
    save(volume, tmp_path / "scan.nii.gz")
    by_monai = LoadImage(image_only=True)(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(by_monai, volume.data)
    np.testing.assert_allclose(by_monai.affine, read(tmp_path / "scan.nii.gz").affine, atol=1e-4)


def test_detached_metaimage_and_nrrd(volume, tmp_path):
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.T))
    for name in ("scan.mhd", "scan.nhdr"):
        sitk.WriteImage(image, str(tmp_path / name))
        np.testing.assert_array_equal(read(tmp_path / name).data, volume.data)


def test_a_dicom_series_agrees_with_the_nifti_of_the_same_scan(tmp_path):
    writer = corpus.Writer(tmp_path, "x", 3)
    folder = writer.dicom()
    (folder / "LICENSE").write_text("not a slice")
    scan, label = read(folder), read(tmp_path / "labels" / "x.nii.gz")
    assert scan.modality == "CT"
    np.testing.assert_array_equal(scan.data, writer.image)
    np.testing.assert_allclose(scan.affine, label.affine, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_any_bytes_may_be_in_a_files_name(volume, tmp_path):
    name = os.fsdecode(b"bild-\xfc")
    for suffix in (".nrrd", ".mha", ".nii.gz"):
        save(volume, tmp_path / f"plain{suffix}")
        np.testing.assert_array_equal(read((tmp_path / f"plain{suffix}").rename(tmp_path / f"{name}{suffix}")).data, volume.data)
    writer = corpus.Writer(tmp_path, "x", 3)
    folder = writer.dicom()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"{(number * 7) % 10}-{name}-{number}.dcm")
    np.testing.assert_array_equal(read(folder.rename(tmp_path / name)).data, writer.image)


def test_a_dicom_series_with_names_out_of_order_and_a_rescale(tmp_path):
    writer = corpus.Writer(tmp_path, "x", 3)
    plain = read(writer.dicom()).data
    other = corpus.Writer(tmp_path, "y", 3)
    folder = other.dicom(RescaleSlope=2, RescaleIntercept=-1024)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"{(number * 7) % 10}-{number}.ima")
    np.testing.assert_array_equal(read(folder).data, plain * 2.0 - 1024)


def test_scaled_nifti_comes_back_in_its_unit_and_in_single_precision(tmp_path):
    image = nib.Nifti1Image(np.arange(120).reshape(4, 5, 6) * 0.5 - 10, np.eye(4))
    image.set_data_dtype(np.int16)  # nibabel finds slope and intercept itself
    nib.save(image, tmp_path / "scan.nii")
    assert nib.load(tmp_path / "scan.nii").dataobj.slope != 1
    back = read(tmp_path / "scan.nii").data
    assert back.dtype == np.float32
    np.testing.assert_allclose(back.ravel(), np.arange(120) * 0.5 - 10, atol=1e-3)


def test_masks_become_one_label(tmp_path):
    writer = corpus.Writer(tmp_path, "x", 0)
    folder = writer.masks() / "segmentations"
    label = read_label(folder, {1: "liver", 2: "cyst", 5: "spleen", 7: "absent"})
    assert label.data.dtype == np.uint8
    np.testing.assert_array_equal(label.data, writer.label)  # rib.nii.gz is no label
    with pytest.raises(ReadFault, match=r"none named as a label.*masks such as heart\.nii\.gz"):
        read_label(folder, {1: "heart"})


def test_a_fault_is_a_user_error_in_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "gone.nii.gz")
    assert str(caught.value) == f"{tmp_path / 'gone.nii.gz'}: found no such file, expected a file that can be read. Check the path, or fetch the data again."


def test_slices_of_a_tilted_gantry_lie_where_they_say(tmp_path):
    """Each slice 1 mm further to the back than the one below: axes that lean, which is told, and not slices straight above each other."""
    folder = corpus.Writer(tmp_path, "x", 3).dicom(ImagePositionPatient=lambda k: [-20, -30 + 1.0 * k, -40 + 2.5 * k])
    scan = read(folder)
    np.testing.assert_allclose(scan.affine @ [0, 0, 4, 1], [20, 30 - 4, -40 + 10, 1], atol=1e-4)
    assert [remark.check for remark in scan.remarks] == ["sheared"]


def test_what_is_no_image_among_masks_is_no_mask(tmp_path):
    folder = corpus.Writer(tmp_path, "x", 0).masks() / "segmentations"
    (folder / "spleen.txt").write_text("volume: 12 ml")
    assert read_label(folder, {1: "liver", 5: "spleen"}).data.max() == 5


@pytest.mark.parametrize(
    ("name", "header", "found"),
    [
        ("scan.mhd", "NDims = 3\nElementDataFile = scan.raw\n", ["scan.raw"]),
        ("scan.mhd", "NDims = 3\nElementDataFile = LIST\na.raw\nb.raw\n", ["a.raw", "b.raw"]),
        ("scan.mhd", "NDims = 3\nElementDataFile = s%02d.raw 1 2 1\n", ["s01.raw", "s02.raw"]),
        ("scan.mhd", "NDims = 3\nElementDataFile = LOCAL\n", []),
        ("scan.mhd", "NDims = 3\nElementDataFile = gone.raw\n", []),
        ("scan.mhd", f"NDims = 3\nElementDataFile = {'x' * 400}\n", []),
        ("scan.mhd", "NDims = 3\nElementDataFile = /%d/** 1 2\n", []),
        ("scan.nhdr", "NRRD0004\ndimension: 3\ndata file: scan.raw\n", ["scan.raw"]),
        ("scan.nhdr", "no header", []),
        ("scan.nrrd", "NRRD0004\ndata file: scan.raw\n", []),
    ],
)
def test_the_files_of_a_header(tmp_path, name, header, found):
    for file in ("scan.raw", "a.raw", "b.raw", "s01.raw", "s02.raw"):
        (tmp_path / file).write_bytes(b"x")
    (tmp_path / name).write_text(header)
    assert files_of(tmp_path / name) == [tmp_path / name, *(tmp_path / file for file in found)]


def test_a_fault_comes_back_from_another_process_as_it_was(tmp_path):
    missing = [tmp_path / "a.nii", tmp_path / "b.nii"]
    for index, fault in over(read, missing, workers=2):
        assert isinstance(fault, ReadFault)
        assert (fault.check, fault.path) == ("missing", str(missing[index]))
