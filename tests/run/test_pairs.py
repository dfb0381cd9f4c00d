"""Files paired by case id and measured; every unpaired or differing one is a line, and the others are done."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from homelib.data.manifest import load_manifest
from homelib.errors import UserError
from homelib.run.named import class_names_of, predicted_names_of
from homelib.run.pairs import Measure, case_id, find_pairs, measure_pairs, read_rows, write_rows

NAMES = ("background", "liver", "spleen")
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def write(path, label, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(label, affine), path)
    return path


@pytest.fixture
def label():
    label = np.zeros((8, 9, 10), np.uint8)
    label[1:5, 2:6, 3:7], label[6:, 6:, 6:] = 1, 2
    return label


@pytest.fixture
def folders(tmp_path, label):
    """a: perfect. b: another shape. c: elsewhere. d: no prediction. e: no reference. f: no label. g: damaged."""
    P, R = tmp_path / "pred", tmp_path / "ref"
    for name in "abcefg":
        write(P / f"{name}.nii.gz", label if name != "b" else label[:, :, 1:])
    for name in "abcdfg":
        write(R / f"{name}_seg.nii.gz", label)
    write(P / "c.nii.gz", label, AFFINE + np.outer([1, 0, 0, 0], [0, 0, 0, 5]))
    write(P / "f.nii.gz", label + 0.5)
    (P / "g.nii.gz").write_bytes(b"no file")
    (P / "labels.json").write_text(json.dumps({"1": "liver", "2": "spleen"}))
    return P, R


def test_one_line_for_every_file_left_out_and_the_others_measured(folders):
    pairs, alone = find_pairs(*folders)
    assert [pair.case for pair in pairs] == list("abcfg")
    assert [line.split(":")[0].rsplit("/")[-1] for line in alone] == ["e.nii.gz", "d_seg.nii.gz"]
    names = class_names_of(folders[0])
    assert names == NAMES
    done = measure_pairs(pairs, Measure(names, metrics=("dice",), tolerances_mm=(2.0,)), workers=2)
    assert done.cases == 1
    assert set(done.rows["case"]) == {"a"}
    assert done.rows[done.rows["class"] != "background"][["metric", "value"]].values.tolist() == [["dice", 1.0], ["nsd_2mm", 1.0]] * 2
    told = ["8x9x9 and 8x9x10 voxels", "mm from its reference", "values from 0.5 to 2.5, expected class indices", "cannot be read"]
    assert len(done.left_out) == 4
    for line, words in zip(done.left_out, told, strict=True):
        assert words in line
        assert "\n" not in line


@pytest.mark.parametrize("axes", ["LPS", "SPL", "AIR"])
def test_the_same_space_in_another_order_of_axes_is_the_same_space(axes, tmp_path, label):
    """And what lies elsewhere, turned or not, is told by how far it is."""
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    turned = nib.Nifti1Image(label, AFFINE).as_reoriented(turn)
    write(tmp_path / "p" / "a.nii.gz", label)
    write(tmp_path / "r" / "a.nii.gz", np.asarray(turned.dataobj), turned.affine)
    away = turned.affine + np.outer([1, 0, 0, 0], [0, 0, 0, 5])
    write(tmp_path / "p" / "b.nii.gz", label)
    write(tmp_path / "r" / "b.nii.gz", np.asarray(turned.dataobj), away)
    done = measure_pairs(find_pairs(tmp_path / "p", tmp_path / "r")[0], Measure(NAMES, metrics=("dice", "hd95"), tolerances_mm=()))
    assert done.rows.query("metric == 'dice'")["value"].tolist() == [1, 1, 1]
    assert done.rows.query("metric == 'hd95'")["value"].tolist() == [0, 0]
    assert len(done.left_out) == 1
    assert "b.nii.gz: lies up to 5 mm from its reference, expected at most 0.1" in done.left_out[0]


def test_any_number_of_processes_gives_the_same_rows(tmp_path, label):
    for name in "abc":
        write(tmp_path / "p" / f"{name}.nii.gz", np.roll(label, ord(name) - 97, 0))
        write(tmp_path / "r" / f"{name}.nii.gz", label)
    pairs, _ = find_pairs(tmp_path / "p", tmp_path / "r")
    one, two = (measure_pairs(pairs, Measure(NAMES), workers=workers).rows for workers in (1, 2))
    assert one.equals(two)
    assert set(one["metric"]) >= {"hd95", "asd", "nsd_1mm", "volume_error"}


def test_two_files_and_another_format_and_raw_labels(tmp_path, label):
    raw = np.zeros_like(label)
    image = sitk.GetImageFromArray(raw.T)
    image.SetSpacing((1.0, 1.0, 2.0))
    image.SetDirection(np.diag([-1.0, -1, 1]).ravel())
    manifest = load_manifest("demo_ct")
    value = next(values[0] for name, values in manifest.classes.items() if name == "liver")
    raw[label == 1] = value
    sitk.WriteImage(_like(image, raw), str(tmp_path / "ref.nrrd"))
    write(tmp_path / "p.nii.gz", (label == 1).astype(np.uint8) * manifest.class_names.index("liver"))
    pairs, alone = find_pairs(tmp_path / "p.nii.gz", tmp_path / "ref.nrrd")
    assert not alone
    done = measure_pairs(pairs, Measure(manifest.class_names, manifest="demo_ct", metrics=("dice",), tolerances_mm=()))
    assert not done.left_out, done.left_out
    assert done.rows.set_index("class").loc["liver", "value"] == 1
    raw_too = write(tmp_path / "raw.nii.gz", raw)
    done = measure_pairs(find_pairs(raw_too, tmp_path / "ref.nrrd")[0], Measure(manifest.class_names, "demo_ct", metrics=("dice",), raw_predictions=True))
    assert done.rows.query("metric == 'dice'").set_index("class").loc["liver", "value"] == 1


def test_predictions_that_number_the_classes_of_a_union_are_measured_by_name(tmp_path, label):
    """Of two data sets: what was predicted is liver where the manifest says so, whatever its number, and a class that only the other has is background."""
    manifest = load_manifest("demo_ct")
    raw = np.array([0, manifest.classes["liver"][0], manifest.classes["spleen"][0]], np.uint8)[label]
    names = ["lung", *reversed(manifest.class_names[1:])]
    own = np.array([0, 1 + names.index("liver"), 1 + names.index("spleen")], np.uint8)[label]
    own[0, 0, 0] = 1  # lung
    P, R = write(tmp_path / "p" / "a.nii.gz", own), write(tmp_path / "r" / "a.nii.gz", raw)
    (P.parent / "labels.json").write_text(json.dumps({str(index): name for index, name in enumerate(names, start=1)}))
    how = Measure(manifest.class_names, "demo_ct", predicted_names=predicted_names_of(P.parent, manifest), metrics=("dice",), tolerances_mm=())
    done = measure_pairs(find_pairs(P, R)[0], how)
    assert done.rows.set_index("class")["value"][["liver", "spleen", "background"]].tolist() == [1, 1, 1]
    (P.parent / "labels.json").write_text(json.dumps({"1": "lever"}))
    with pytest.raises(UserError, match=r"labels\.json: found no bone among lever, expected every class of demo_ct"):
        predicted_names_of(P.parent, manifest)
    (P.parent / "labels.json").unlink()
    assert predicted_names_of(P.parent, manifest) == manifest.class_names


def _like(image, array):
    made = sitk.GetImageFromArray(array.T)
    made.CopyInformation(image)
    return made


def test_a_folder_a_case_holds_its_label_alone_beside_its_scan_or_as_masks(tmp_path, label):
    P, R = tmp_path / "p", tmp_path / "r"
    for name in ("one", "scan", "masks", "other"):
        write(P / f"{name}.nii.gz", label)
    write(R / "one" / "reference.nii.gz", label)
    write(R / "scan" / "ct.nii.gz", label * 100)
    write(R / "scan" / "segmentation.nii.gz", label)
    write(R / "masks" / "ct.nii.gz", label * 100)
    manifest = load_manifest("totalsegmentator_mri")
    for value, name in ((1, "spleen"), (2, "liver")):
        write(R / "masks" / "segmentations" / f"{name}.nii.gz", (label == value).astype(np.uint8))
    (R / "notes").mkdir()
    pairs, alone = find_pairs(P, R)
    found = {pair.case: pair.reference.relative_to(R).as_posix() for pair in pairs}
    assert found == {"one": "one/reference.nii.gz", "scan": "scan/segmentation.nii.gz", "masks": "masks/segmentations"}
    assert [line.split(":")[0] for line in alone] == [str(P / "other.nii.gz")]
    done = measure_pairs(pairs, Measure(NAMES, metrics=("dice",), tolerances_mm=()))
    assert set(done.rows["case"]) == {"one", "scan"}
    assert done.left_out == (
        f"{R / 'masks/segmentations'}: found a folder of masks, expected a data set that names their classes; left out. Give --data NAME.",
    )
    write(P / "masks.nii.gz", np.choose(label, [0, manifest.class_names.index("spleen"), manifest.class_names.index("liver")]).astype(np.uint8))
    named = measure_pairs([pair for pair in pairs if pair.case == "masks"], Measure(manifest.class_names, manifest.name, metrics=("dice",), tolerances_mm=()))
    assert named.rows.set_index("class")["value"][["spleen", "liver"]].tolist() == [1, 1]
    write(R / "scan" / "mask.nii.gz", label)
    with pytest.raises(UserError, match=r"found scan/mask.nii.gz and scan/segmentation.nii.gz for the case scan, expected one label a case"):
        find_pairs(P, R)


def test_rows_name_the_origin_of_their_own_case(tmp_path, label):
    """Of the demo's data set, which says nothing of a case that it does not list."""
    demo = load_manifest("demo_ct")
    for case in ("ct-a", "phantom-c", "mine"):
        write(tmp_path / "pred" / f"{case}.nii.gz", label)
        write(tmp_path / "ref" / f"{case}.nii.gz", label)
    pairs, _ = find_pairs(tmp_path / "pred", tmp_path / "ref")
    rows = measure_pairs(pairs, Measure(demo.class_names, manifest="demo_ct", metrics=("dice",), tolerances_mm=(), raw_predictions=True)).rows
    origins = rows.groupby("case")["label_origin"].unique().explode()
    assert origins.to_dict() == {"ct-a": "MODEL", "phantom-c": "SYNTHETIC", "mine": "UNSTATED"}


def test_a_reference_in_another_numbering_is_left_out(tmp_path, label):
    write(tmp_path / "p" / "a.nii.gz", label)
    write(tmp_path / "r" / "a.nii.gz", label.astype(np.uint16) * 1000)
    manifest = load_manifest("demo_ct")
    done = measure_pairs(find_pairs(tmp_path / "p", tmp_path / "r")[0], Measure(manifest.class_names, manifest.name, metrics=("dice",)))
    assert done.cases == 0
    assert "a.nii.gz: found the values 1000, 2000, none of a class of demo_ct; left out." in done.left_out[0]


def test_the_folder_where_the_user_is_has_a_label_map(folders, monkeypatch):
    monkeypatch.chdir(folders[0])
    assert class_names_of(Path(".")) == NAMES
    assert predicted_names_of(Path("."), load_manifest("demo_ct").model_copy(update={"classes": {"liver": (5,), "spleen": (1,)}})) == NAMES


@pytest.mark.parametrize(
    ("name", "expected"),
    [("case_07_seg.nii.gz", "case_07"), ("amos_0001.nii.gz", "amos_0001"), ("p_0000.nii", "p"), ("x-label.nrrd", "x"), ("a.b.mha", "a.b")],
)
def test_case_ids_of_files(name, expected, tmp_path):
    assert case_id(tmp_path / name) == expected


def test_what_cannot_be_paired_is_one_line(tmp_path, label, folders):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find_pairs(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match="found a file and a folder"):
        find_pairs(folders[0] / "a.nii.gz", folders[1])
    with pytest.raises(UserError, match="no case id in both"):
        find_pairs(write(tmp_path / "x" / "x.nii.gz", label).parent, folders[1])
    write(folders[1] / "a.nii.gz", label)
    with pytest.raises(UserError, match=r"found a.nii.gz and a_seg.nii.gz for the case a"):
        find_pairs(*folders)
    with pytest.raises(UserError, match=r"labels.json: no such file"):
        class_names_of(folders[1])
    with pytest.raises(UserError, match="metrics: found 'hd96'"):
        measure_pairs([], Measure(NAMES, metrics=("hd96",)))
    with pytest.raises(UserError, match="lesions: found pdac, expected classes: liver, spleen"):
        measure_pairs([], Measure(NAMES, lesion_classes=("pdac",)))


def test_each_metric_is_one_row_and_a_tolerance_is_a_length():
    assert Measure(NAMES, metrics=("dice",), tolerances_mm=(2.0, 1.0, 2.0)).all_metrics == ("dice", "nsd_2mm", "nsd_1mm")
    for tolerance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"metrics: found 'nsd_{tolerance:g}mm'"):
            measure_pairs([], Measure(NAMES, tolerances_mm=(tolerance,)))


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = pd.DataFrame([{"case": "007", "class": "liver", "metric": "dice", "value": 0.1 + 0.2, "reference_voxels": 9, "predicted_voxels": 8}])
    assert read_rows(write_rows(rows, tmp_path / "metrics.csv")).equals(rows)
    head = "case,class,metric,value,reference_voxels,predicted_voxels\n"
    for content, told in (("a,case\n1,2\n", "no column class, metric, predicted_voxels, "), (head, "no rows"), ("", "cannot be read as a CSV")):
        (tmp_path / "other.csv").write_text(content)
        with pytest.raises(UserError, match=rf"other\.csv: {told}"):
            read_rows(tmp_path / "other.csv")


def test_a_csv_that_is_there_stays(tmp_path):
    (tmp_path / "metrics.csv").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_rows(pd.DataFrame(), tmp_path / "metrics.csv")
    assert (tmp_path / "metrics.csv").read_text() == "mine"
