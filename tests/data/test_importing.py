"""`home data import` on every layout that data come in: the manifest it writes finds each image with its own label, and checks clean."""

import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from homelib.data.check import check
from homelib.data.importing import import_folder
from homelib.data.layouts import find_cases
from homelib.data.split import split
from homelib.errors import UserError

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)


def write(root: Path, names: dict[str, tuple[str, str]]) -> None:
    """A case for each (image, label) pair of paths below `root`, each with values of its own; a path ending in / is a folder of masks."""
    for seed, (image, label) in enumerate(names.values()):
        writer = corpus.Writer(root, "x", seed)
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(writer.image, corpus.AFFINE), root / image)
        if label.endswith("/"):
            (root / label).mkdir(parents=True)
            for value, name in {1: "liver", 2: "cyst", 5: "spleen"}.items():
                nib.save(nib.Nifti1Image((writer.label == value).astype(np.uint8), corpus.AFFINE), root / label / f"{name}.nii.gz")
        elif label:
            (root / label).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(writer.label, corpus.AFFINE), root / label)


def pairs(image: str, label: str, ids: list[str]) -> dict[str, tuple[str, str]]:
    return {case_id: (image.replace("{}", case_id), label.replace("{}", case_id)) for case_id in ids}


LAYOUTS = {
    "nnU-Net": pairs("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz", ["liver_001", "liver_002", "liver_017"]),
    "Decathlon": pairs("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz", ["pancreas_1", "pancreas_22", "pancreas_3"]),
    "BIDS": {
        "sub-01": ("sub-01/anat/sub-01_rec-mial_T2w.nii.gz", "sub-01/anat/sub-01_rec-mial_dseg.nii.gz"),
        "sub-02": ("sub-02/anat/sub-02_rec-irtk_T2w.nii.gz", "sub-02/anat/sub-02_rec-irtk_dseg.nii.gz"),
    },
    "BIDS with sessions and derivatives": pairs(
        "{}/ses-1/anat/{}_ses-1_T2w.nii.gz", "derivatives/hand/{}/ses-1/anat/{}_ses-1_dseg.nii.gz", ["sub-A1", "sub-B2"]
    ),
    "BIDS with several sessions of a subject": {
        f"sub-{subject}_ses-{session}": (
            f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_T2w.nii.gz",
            f"sub-{subject}/ses-{session}/anat/sub-{subject}_ses-{session}_dseg.nii.gz",
        )
        for subject, session in (("A1", "1"), ("A1", "10"), ("B2", "1"))
    },
    "a folder a case": pairs("{}/ct.nii.gz", "{}/label.nii.gz", ["Anna", "Bert", "Carl"]),
    "a folder a case, masks": pairs("{}/ct.nii.gz", "{}/segmentations/", ["s0001", "s0002"]),
    "a folder a case, its name in the files": pairs("{}/{}_ct.nii.gz", "{}/{}_seg.nii.gz", ["p1", "p2"]),
    "pairs in one folder": pairs("{}.nii.gz", "{}_seg.nii.gz", ["case1", "case2", "case10"]),
    "pairs with words before and after": pairs("volume-{}.nii", "segmentation-{}.nii", ["0", "1", "12"]),
    "pairs of names without a system": pairs(
        "{}.nii.gz", "{}_mask.nii.gz", ["Anna-k", "Bert.x", "ÇaVa", "dd", "E2e2e2", "fffff", "gG_gG", "hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh", "ii"]
    ),
    "two folders": pairs("images/{}.nii.gz", "masks/{}.nii.gz", ["a", "b", "c"]),
    "split in folders": pairs("train/{}-US.nii", "train/{}-label.nii", ["train_001", "train_002"]) | pairs("val/{}-US.nii", "val/{}-label.nii", ["val_001"]),
    "one folder deeper": pairs("Task07/imagesTr/{}.nii.gz", "Task07/labelsTr/{}.nii.gz", ["p1", "p2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_image_finds_its_label(name, tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS[name])
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    found = find_cases(manifest, root)
    assert [f for f in found.findings if f.check != "name"] == []
    wanted = sorted((str(root / image), str(root / label).rstrip("/")) for image, label in LAYOUTS[name].values())
    assert sorted((str(case.image), str(case.label)) for case in found.cases) == wanted
    assert len({case.id for case in found.cases}) == manifest.expected_cases == len(wanted)
    checked = check(manifest, root, workers=1, kept=tmp_path / "kept")
    assert [f for f in checked.findings if f.check != "name"] == []
    assert manifest.spacing_mm == (2, 2, 2.5)
    assert sorted(manifest.labels) == ([1, 2, 3] if LAYOUTS[name] == LAYOUTS["a folder a case, masks"] else [1, 2, 5])


def test_sessions_of_a_subject_stay_together(tmp_path):
    root = tmp_path / "data"
    name = "sub-{0}/ses-{1}/anat/sub-{0}_ses-{1}_{2}.nii.gz"
    ids = [(subject, session) for subject in ("A1", "B2", "C3", "D4", "E5") for session in ("1", "2", "3")]
    write(root, {f"{i}": (name.format(*i, "T2w"), name.format(*i, "dseg")) for i in ids})
    manifest = import_folder(root, tmp_path / "mine.yaml")
    parts = split(manifest, find_cases(manifest, root).cases)
    assert len(parts) == 15
    folds = {subject: {parts[f"sub-{subject}_ses-{session}"] for session in ("1", "2", "3")} for subject, _ in ids}
    assert all(len(found) == 1 for found in folds.values())
    assert len(set.union(*folds.values())) == 5


def test_a_second_channel_is_refused_and_no_case_of_its_own(tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS["nnU-Net"] | {"second": ("imagesTr/liver_002_0001.nii.gz", "")})
    with pytest.raises(UserError, match=r"liver_002_0001.nii.gz: found a second channel beside imagesTr/liver_002_0000.nii.gz, expected one image a case"):
        import_folder(root, tmp_path / "mine.yaml", modality="CT")


def test_images_of_too_many_kinds_of_names_are_told_of(tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS["two folders"] | {f"{k}": (f"part{k}/own_{k}{'x' * k}q.nii.gz", "") for k in range(9)})
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    assert len(manifest.layouts) == 8
    assert any("fit no layout here are left out" in line and "of 2 kinds" in line for line in manifest.unverified)


def test_dicom_folders_with_labels_beside(tmp_path):
    for seed, case_id in enumerate(("p1", "p2")):
        corpus.Writer(tmp_path / "data", case_id, seed).dicom()
    manifest = import_folder(tmp_path / "data", tmp_path / "mine.yaml")
    assert manifest.modality == "CT"  # DICOM says so
    found = find_cases(manifest, tmp_path / "data")
    assert [(case.image.name, case.label.name) for case in found.cases] == [("p1", "p1.nii.gz"), ("p2", "p2.nii.gz")]
    assert check(manifest, tmp_path / "data", workers=1, kept=tmp_path / "kept").findings == ()


@pytest.mark.parametrize("version", [1, 2])
def test_dataset_json_names_classes_and_modality(tmp_path, version):
    root = tmp_path / "data"
    write(root, LAYOUTS["nnU-Net"] | {"unlabelled": ("imagesTs/liver_100_0000.nii.gz", "")})
    tree = {"name": "Livers", "licence": "CC0", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Liver", "2": "Liver cyst", "5": "Spleen"}}
    if version == 2:
        tree = {"channel_names": {"0": "T2w"}, "labels": {"background": 0, "Liver": [1, 2], "Liver cyst": 2, "Spleen": 5}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(tree))
    manifest = import_folder(root, tmp_path / "mine.yaml")
    assert manifest.modality == "MRI"
    assert manifest.intensity_window == (0, 1000)
    assert set(manifest.labels) == {1, 2, 5}
    assert manifest.classes == {"liver": (1,), "liver_cyst": (2,), "spleen": (5,)}
    assert bool([line for line in manifest.unverified if "(Liver)" in line]) == (version == 2)  # a region of two values, taken apart
    assert {case.id: (case.part, case.label is None) for case in find_cases(manifest, root).cases}["liver_100"] == ("test", True)


def test_a_spoilt_case_is_left_to_the_check(tmp_path):
    """The others give the manifest; what was left out is told."""
    root = tmp_path / "data"
    write(root, LAYOUTS["nnU-Net"])
    shutil.copy(root / "imagesTr" / "liver_001_0000.nii.gz", root / "labelsTr" / "liver_001.nii.gz")
    (root / "imagesTr" / "liver_002_0000.nii.gz").write_bytes(b"cut")
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    assert sorted(manifest.labels) == [1, 2, 5]
    assert [line for line in manifest.unverified if "liver_001.nii.gz: found values from" in line]
    checked = check(manifest, root, workers=1, kept=tmp_path / "kept")
    assert {finding.case for finding in checked.findings if finding.severity == "error"} == {"liver_001", "liver_002"}


def test_nothing_is_overwritten_and_what_cannot_be_told_is_one_line(tmp_path):
    root, out = tmp_path / "data", tmp_path / "mine.yaml"
    write(root, LAYOUTS["nnU-Net"])

    def refusal(match, **changed):
        with pytest.raises(UserError, match=match) as caught:
            import_folder(**({"root": root, "out": out} | changed))
        assert "\n" not in str(caught.value)
        assert not out.exists() or out.read_text() == "mine"

    refusal("Give --modality")
    refusal("found 'XR'", modality="XR")
    refusal("small letters", out=tmp_path / "My Data.yaml")
    refusal("no such folder", root=tmp_path / "gone")
    refusal("no images found", root=tmp_path / "kept", modality="CT") if (tmp_path / "kept").mkdir() is None else None
    (root / "dataset.json").write_text("{")
    refusal("dataset.json")
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": {}}))
    refusal("2 channels")
    (root / "dataset.json").unlink()
    for name in LAYOUTS["nnU-Net"]:
        shutil.copy(root / "imagesTr" / f"{name}_0000.nii.gz", root / "labelsTr" / f"{name}.nii.gz")
    refusal("Is it a label", modality="CT")
    out.write_text("mine")
    refusal("exists already")


def test_regions_in_any_order_lose_no_class(tmp_path):
    """As brain tumours are told: the whole first, which holds the values of all its parts."""
    root = tmp_path / "data"
    write(root, LAYOUTS["nnU-Net"])
    tree = {"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "whole tumor": [1, 2, 5], "tumor core": [2, 5], "enhancing tumor": [5]}}
    (root / "dataset.json").write_text(json.dumps(tree))
    manifest = import_folder(root, tmp_path / "mine.yaml")
    assert manifest.classes == {"whole_tumor": (1,), "tumor_core": (2,), "enhancing_tumor": (5,)}


def test_a_label_to_be_ignored_is_no_class_and_is_told(tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS["nnU-Net"])
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "cyst": 2, "ignore": 5}}))
    manifest = import_folder(root, tmp_path / "mine.yaml")
    assert manifest.classes == {"liver": (1,), "cyst": (2,)}
    assert manifest.labels[5] == "ignore"  # known to the check
    assert [line for line in manifest.unverified if "ignore (5)" in line]


def test_labels_whose_names_differ_are_never_merged(tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS["nnU-Net"])
    long = "vessel of the left upper lobe near the mediastinum and the heart, "
    for one, other in (("node (+)", "node (-)"), (long + "artery", long + "vein")):
        (root / "dataset.json").write_text(json.dumps({"modality": "CT", "labels": {"0": "background", "1": one, "2": other, "5": one}}))
        manifest = import_folder(root, tmp_path / "mine.yaml")
        assert list(manifest.classes.values()) == [(1, 5), (2,)]
        (tmp_path / "mine.yaml").unlink()


def test_labels_that_hold_nothing_are_told_of(tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS["two folders"])
    nib.save(nib.Nifti1Image(np.zeros(corpus.SHAPE, np.uint8), corpus.AFFINE), root / "masks" / "b.nii.gz")
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    assert [line for line in manifest.unverified if line.startswith("1 of 3 labels looked at hold nothing")]
    assert not manifest.may_be_empty


def test_a_table_beside_the_masks_is_no_class(tmp_path):
    root = tmp_path / "data"
    write(root, LAYOUTS["a folder a case, masks"])
    (root / "s0001" / "segmentations" / "statistics.json").write_text("{}")
    assert set(import_folder(root, tmp_path / "mine.yaml", modality="CT").classes) == {"liver", "cyst", "spleen"}


def test_images_below_a_folder_that_is_named_after_labels_are_images(tmp_path):
    root = tmp_path / "data"
    write(root, pairs("segmentation_task/imagesTr/{}.nii.gz", "segmentation_task/labelsTr/{}.nii.gz", ["p1", "p2"]))
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    assert [bool(case.label) for case in find_cases(manifest, root).cases] == [True, True]


@pytest.mark.parametrize("studies", ["same", "own"])
@pytest.mark.parametrize(("patient", "label"), [("PAT_{}", "PAT_{}"), ("PANCREAS_{}", "label{}")], ids=["alike", "in part"])
def test_slices_in_folders_of_patient_study_and_series_find_their_labels(studies, patient, label, tmp_path):
    """As archives hand them out: the patient's folder is the case's, whatever study and series are called."""
    root, cases = tmp_path / "data", ("0001", "0002", "0013")
    for seed, case_id in enumerate(cases):
        writer = corpus.Writer(tmp_path / "made", case_id, seed)
        inner = ("study", "series") if studies == "same" else (f"11-2{seed}-2015-X{case_id}-1895{seed}", f"Pancreas-6350{seed}")
        place = root.joinpath("images", patient.format(case_id), *inner)
        place.parent.mkdir(parents=True)
        shutil.move(writer.dicom(), place)
        (root / "labels").mkdir(exist_ok=True)
        shutil.move(writer.path("label"), root / "labels" / f"{label.format(case_id)}.nii.gz")
    manifest = import_folder(root, tmp_path / "mine.yaml")
    (layout,) = manifest.layouts
    assert layout.image.endswith("}/study/series/" if studies == "same" else "}/*/*/")
    checked = check(manifest, root, workers=1, kept=tmp_path / "kept")
    assert checked.findings == ()
    assert [case.id[-4:] for case in checked.cases] == list(cases)
    assert all(case.id[-4:] in str(case.label) for case in checked.cases)


def test_a_batch_that_is_numbered_as_the_labels_are_is_no_case(tmp_path):
    for batch, case_id in ((1, "1"), (1, "2"), (2, "3")):
        place = tmp_path / "data" / f"batch_{batch}" / f"p_{case_id}" / "series"
        place.parent.mkdir(parents=True, exist_ok=True)
        writer = corpus.Writer(tmp_path / "made", case_id, int(case_id))
        shutil.move(writer.dicom(), place)
        (tmp_path / "data" / "labels").mkdir(exist_ok=True)
        shutil.move(writer.path("label"), tmp_path / "data" / "labels" / f"{case_id}.nii.gz")
    manifest = import_folder(tmp_path / "data", tmp_path / "mine.yaml")
    assert sorted(layout.image for layout in manifest.layouts) == ["batch_1/p_{case}/series/", "batch_2/p_{case}/series/"]
    assert [case.id for case in find_cases(manifest, tmp_path / "data").cases] == ["1", "2", "3"]


@pytest.mark.parametrize("ids", [["0", "1", "12"], ["0"]])
def test_labels_in_a_folder_below_the_images_are_no_masks_of_one_case(ids, tmp_path):
    root = tmp_path / "data"
    write(root, pairs("volume-{}.nii", "labels/segmentation-{}.nii", ids))
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    assert [(layout.image, layout.label) for layout in manifest.layouts] == [("volume-{case}.nii", "labels/segmentation-{case}.nii")]
    assert check(manifest, root, workers=1, kept=tmp_path / "kept").findings == ()


def test_labels_of_a_second_rater_are_told_of(tmp_path):
    root = tmp_path / "data"
    write(root, pairs("images/{}.nii.gz", "labels_rater1/{}.nii.gz", ["c1", "c2"]) | pairs("more/{}.nii.gz", "labels_rater2/{}.nii.gz", ["c1 ", "c2 "]))
    for case_id in ("c1", "c2"):
        (root / "labels_rater2" / f"{case_id} .nii.gz").rename(root / "labels_rater2" / f"{case_id}.nii.gz")
    shutil.rmtree(root / "more")
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    taken = manifest.layouts[0].label
    other = ({"labels_rater1/{case}.nii.gz", "labels_rater2/{case}.nii.gz"} - {taken}).pop()
    assert any("Labels left out" in line and other in line and taken not in line for line in manifest.unverified)


def test_labels_of_other_ids_than_the_images_are_one_line(tmp_path):
    root = tmp_path / "data"
    write(root, {"one": ("images/anna.nii.gz", "labels/x.nii.gz"), "two": ("images/bert.nii.gz", "labels/y.nii.gz")})
    with pytest.raises(UserError, match=r"found images \(images/\{case\}.nii.gz\) and labels \(labels/\{case\}.nii.gz\), but no id in both"):
        import_folder(root, tmp_path / "mine.yaml", modality="CT")


def test_endings_in_capitals_are_images_too(tmp_path):
    root = tmp_path / "data"
    write(root, pairs("images/{}.NII.GZ", "labels/{}.NII.GZ", ["c1", "c2"]))
    manifest = import_folder(root, tmp_path / "mine.yaml", modality="CT")
    assert check(manifest, root, workers=1, kept=tmp_path / "kept").findings == ()
    assert manifest.expected_cases == 2
