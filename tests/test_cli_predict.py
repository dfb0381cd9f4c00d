"""`home predict` on a folder of DICOM slices, from the slices to labels on their grid; and `home evaluate` on rows that were measured before."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from homelib.config import Settings, override
from homelib.run.checkpoint import build_network, save_weights

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory) -> Path:
    """A run folder with a network at a random start whose predictions have several classes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    settings: Settings = override(smoke, {"data.manifest": "demo_ct", "data.patch_voxels": (32, 32, 32)})
    settings.save(folder / "settings.json")
    torch.manual_seed(0)
    save_weights(build_network(settings), folder / "best.safetensors", settings)
    return folder


def write_series(folder: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """A CT (X, Y, Z) int16 in HU with its affine (4, 4, to mm in RAS+) as slices along Z, as scanners write them: stored from 0 on, with a
    rescale to HU, and files whose names say nothing of their order."""
    folder.mkdir(parents=True)
    lps = TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    across, down = (lps[:3, axis] / spacing[axis] for axis in (0, 1))
    for k in range(volume.shape[2]):
        it = Dataset()
        it.file_meta = FileMetaDataset()
        it.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        it.file_meta.MediaStorageSOPClassUID = it.SOPClassUID = CTImageStorage
        it.file_meta.MediaStorageSOPInstanceUID = it.SOPInstanceUID = f"1.2.3.{k + 1}"
        it.SeriesInstanceUID, it.StudyInstanceUID, it.Modality, it.InstanceNumber = "1.2.4", "1.2.5", "CT", k + 1
        it.ImageOrientationPatient = [float(value) for value in (*across, *down)]
        it.ImagePositionPatient = [float(value) for value in (lps @ [0, 0, k, 1])[:3]]
        it.PixelSpacing, it.SliceThickness = [float(spacing[1]), float(spacing[0])], float(spacing[2])
        it.Rows, it.Columns = volume.shape[1], volume.shape[0]
        it.SamplesPerPixel, it.PhotometricInterpretation = 1, "MONOCHROME2"
        it.BitsAllocated, it.BitsStored, it.HighBit, it.PixelRepresentation = 16, 16, 15, 0
        it.RescaleIntercept, it.RescaleSlope = -1024, 1
        it.PixelData = np.ascontiguousarray(volume[:, :, k].T + 1024).astype(np.uint16).tobytes()
        pydicom.dcmwrite(folder / f"IM{(k * 7) % volume.shape[2]:03}", it, enforce_file_format=True)


@pytest.fixture
def series(phantoms, tmp_path) -> tuple[Path, Path]:
    """The phantom's scan as a folder of slices from the feet up, left to right and front to back, and the same as NIfTI."""
    scan = nib.load(phantoms["phantom-a"].image)
    volume = np.clip(np.asarray(scan.dataobj), -1024, 3000).round().astype(np.int16)[::-1, ::-1, 2:]
    affine = np.diag([-7.0, -7.0, 7.0, 1.0])
    affine[:3, 3] = [160.5, 171.25, -903.0]
    write_series(tmp_path / "scans" / "patient-1", volume, affine)
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "patient-2.nii.gz")
    return tmp_path / "scans" / "patient-1", tmp_path / "patient-2.nii.gz"


def test_a_folder_of_dicom_slices_is_predicted_as_the_same_scan_in_another_format(run, series, home, tmp_path):
    slices, nifti = series
    status, out, err = home("predict", run, slices.parent, nifti, "--out", tmp_path / "out", "--accelerator", "cpu")
    assert status == 0, err
    assert "patient-1.nii.gz: 48x48x46 voxels; bone " in out
    assert "2 predicted, 0 unchanged, 0 failed" in out
    one, other = (nib.load(tmp_path / "out" / f"patient-{number}.nii.gz") for number in (1, 2))
    np.testing.assert_allclose(one.affine, nib.load(nifti).affine, atol=1e-4)
    labels = np.asarray(one.dataobj)
    assert one.get_data_dtype() == np.uint8
    assert len(np.unique(labels)) > 2
    np.testing.assert_array_equal(labels, np.asarray(other.dataobj))
    status, out, _ = home("predict", run, slices, "--out", tmp_path / "out")
    assert (status, "0 predicted, 1 unchanged, 0 failed" in out) == (0, True)


def test_raw_references_of_the_runs_data_set_are_known_as_such(run, phantoms, home, tmp_path):
    """As with --data, and not as class indices, which some of the raw values would be."""
    case = phantoms["phantom-a"]
    assert home("predict", run, case.image, "--out", tmp_path / "out" / "a.nii.gz", "--accelerator", "cpu")[0] == 0
    tables = {}
    for name, given in (("untold", ()), ("told", ("--data", "demo_ct"))):
        status, out, err = home("evaluate", tmp_path / "out" / "a.nii.gz", case.label, "--csv", tmp_path / f"{name}.csv", "--workers", 1, *given)
        assert (status, "References: raw labels of demo_ct" in out) == (0, name == "untold"), err
        tables[name] = (tmp_path / f"{name}.csv").read_text()
    assert tables["untold"] == tables["told"]
    status, out, _ = home("predict", run, case.image, "--out", tmp_path / "out" / "a.nii.gz")
    assert (status, "0 predicted, 1 unchanged, 0 failed" in out) == (0, True)


def test_a_series_that_is_not_whole_is_told_and_the_others_are_done(run, series, home, tmp_path):
    slices, nifti = series
    (slices / "IM021").unlink()  # 21 is 7 times 3: the fourth slice
    status, out, err = home("predict", run, slices, nifti, "--out", tmp_path / "out")
    assert status == 1, err
    assert "1 predicted, 0 unchanged, 1 failed" in out
    assert re.search(r"patient-1: found 14 mm between IM014 and IM028, expected 7 mm as between the others\.", out)
    status, _, err = home("predict", run, slices, "--out", tmp_path / "alone.nii.gz")
    assert status == 2
    assert re.fullmatch(r"home: [^\n]*patient-1: found 14 mm between[^\n]+\n", err)
    assert not (tmp_path / "alone.nii.gz").exists()


def test_series_deeper_down_are_found_and_named_by_their_way(run, series, home, tmp_path):
    slices, _ = series
    deep = tmp_path / "export" / "patient-9" / "study" / "series-1"
    deep.parent.mkdir(parents=True)
    slices.rename(deep)
    status, out, err = home("predict", run, tmp_path / "export", "--out", tmp_path / "labels_0.5", "--accelerator", "cpu")
    assert (status, "1 predicted, 0 unchanged, 0 failed" in out) == (0, True), err
    assert (tmp_path / "labels_0.5" / "patient-9_study_series-1.nii.gz").exists()


def test_slices_of_another_modality_are_refused_unless_it_is_said(run, series, home, tmp_path):
    slices, nifti = series
    for file in slices.iterdir():
        header = pydicom.dcmread(file)
        header.Modality = "MR"
        header.save_as(file)
    status, _, err = home("predict", run, slices, nifti, "--out", tmp_path / "out")
    assert status == 2
    expected = f"home: {slices}: found DICOM slices of MR, expected CT as in demo_ct. Leave it out, or say --modality CT.\n"
    assert err == expected
    assert not (tmp_path / "out").exists()
    status, out, err = home("predict", run, slices, "--out", tmp_path / "out", "--modality", "CT", "--accelerator", "cpu")
    assert (status, "1 predicted" in out) == (0, True), err


@pytest.mark.parametrize(
    ("line", "words"),
    [("001,m,REF,liver,dice,much,1,9,9", "line 2: found the value 'much', expected a number"), ("001,m,REF,liver,dicee,0.5,1,9,9", "metric: found 'dicee'")],
)
def test_rows_that_are_none_are_one_line(line, words, mistake, tmp_path):
    csv = tmp_path / "metrics.csv"
    csv.write_text("case,method,label_origin,class,metric,value,unit,reference_voxels,predicted_voxels\n" + line + "\n")
    assert words in mistake("evaluate", csv)
    assert words in mistake("compare", csv)


def test_options_that_rows_have_no_use_for_are_refused(mistake, tmp_path):
    (tmp_path / "m.csv").write_text("case\n")
    assert mistake("evaluate", tmp_path / "m.csv", "--csv", tmp_path / "other.csv").startswith("--csv: found it with rows that were measured before")


def test_rows_of_distances_alone_and_cases_called_na_are_shown(home, tmp_path):
    csv = tmp_path / "metrics.csv"
    rows = ["case,method,label_origin,class,metric,value,unit,reference_voxels,predicted_voxels"]
    rows += [f"{case},m,REF,liver,hd95_voxels,{mm},mm,9,9" for case, mm in (("NA", 2.0), ("null", 4.0))]
    csv.write_text("\n".join(rows) + "\n")
    status, out, err = home("evaluate", csv)
    assert (status, err) == (0, "")
    assert "mean over 2 cases" in out


def test_rows_that_were_measured_are_averaged_under_another_convention(home, tmp_path):
    csv = tmp_path / "metrics.csv"
    rows = ["case,method,label_origin,class,metric,value,unit,reference_voxels,predicted_voxels"]
    rows += [f"{case},m,REF,liver,dice,{dice},1,{reference},9" for case, dice, reference in (("001", 0.8, 9), ("002", 0.0, 0))]
    csv.write_text("\n".join(rows) + "\n")
    status, out, err = home("evaluate", csv, "--convention", "nnunet")
    assert status == 0, err
    assert re.search(r"mean\W+1\W+0\W+1\W+0\.400", out)
    status, _, err = home("evaluate", csv, "--convention", "monai")
    assert (status, "convention monai: no rows of the metric hd95_voxels" in err) == (2, True)
    assert csv.read_text().splitlines() == rows
