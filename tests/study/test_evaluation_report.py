"""`home evaluate PRED REF`: the CSV, the tables with their counts, and the exit status."""

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from homelib.errors import UserError
from homelib.run.footer import definitions
from homelib.study.evaluation_report import detection, evaluate_files, evaluate_rows, labels_told, summary


@pytest.fixture
def folders(tmp_path):
    """ill: one of two lesions found. well: none, and none called. false: one called where there is none."""
    P, R = tmp_path / "p", tmp_path / "r"
    for folder in (P, R):
        folder.mkdir()
    for name, predicted, reference in (("ill", [1], [1, 6]), ("well", [], []), ("false", [4], [])):
        for folder, places in ((P, predicted), (R, reference)):
            label = np.zeros((9, 9, 9), np.uint8)
            label[:, 7:] = 1
            for z in places:
                label[z : z + 2, 1:3, 1:3] = 2
            nib.save(nib.Nifti1Image(label, np.diag([1.0, 1, 2, 1])), folder / f"{name}.nii.gz")
    (P / "labels.json").write_text(json.dumps({1: "pancreas", 2: "pdac"}))
    return P, R


ASKED = {"data": None, "raw": False, "csv": None, "convention": "own", "lesions": ("pdac",), "tolerances_mm": (1.0,), "workers": 1}


def test_tables_counts_and_rows(folders, capsys):
    console = Console(width=250)
    assert evaluate_files(*folders, console, **ASKED)
    out = capsys.readouterr().out
    rows = pd.read_csv(folders[0] / "metrics.csv")
    table = summary(rows)
    assert table.loc["pdac", ["references", "missed", "spurious"]].tolist() == [1, 0, 1]
    assert table.loc["pdac", "dice"] == pytest.approx((2 * 8 / (8 + 16) + 0) / 2)
    assert table.loc["mean", "dice"] == pytest.approx((table.loc["pdac", "dice"] + 1) / 2)
    found = detection(rows).loc["pdac"]
    assert found[["lesions", "found", "spurious lesions", "lesion sensitivity", "lesion precision"]].tolist() == [2, 1, 1, 0.5, 0.5]
    assert found[["patients (sensitivity)", "patient sensitivity", "patients (specificity)", "patient specificity"]].tolist() == [1, 1, 2, 0.5]
    assert found["specificity low"] < 0.5 < found["specificity high"]
    assert "mean over 3 cases, labels UNSTATED; own convention" in out
    for words in ("references", "missed", "spurious", "Empty masks: Both masks empty: no number", "dice [1]: 2 |P and R|", "worst the image's diagonal"):
        assert words in out
    assert "Structures: 4 in the references, 0 missed, 1 spurious." in out
    assert re.search(r"│ spurious lesions +│ 1 +│\n.*lesion sensitivity +│ 0\.500", out)  # a count is no 1.000
    assert "found: those of which the prediction covers a tenth or more" in out
    assert "a single predicted voxel calls a patient positive" in out
    assert {line.split(" [")[0] for line in out.splitlines() if re.match(r"\w+ \[", line)} == set(table) - {"references", "missed", "spurious"}
    with pytest.raises(UserError, match=r"metrics.csv: exists already"):
        evaluate_files(*folders, console, **ASKED)


def test_a_file_left_out_is_a_line_and_another_exit_status(folders, capsys, tmp_path):
    (folders[1] / "well.nii.gz").unlink()
    assert not evaluate_files(*folders, Console(width=250), **ASKED | {"convention": "monai", "csv": tmp_path / "own.csv"})
    out = capsys.readouterr().out
    assert "well.nii.gz: no reference for well" in out
    assert "own.csv: 2 cases, 1 files left out." in out
    assert "convention monai" in out


@pytest.mark.parametrize(("convention", "distances"), [("monai", ["hd95_voxels"]), ("segmamba", ["hd95_pooled"]), ("nnunet", [])])
def test_rows_are_averaged_again_without_being_measured_again(convention, distances, folders, capsys, tmp_path):
    csv = folders[0] / "metrics.csv"
    evaluate_files(*folders, Console(width=250), **ASKED | {"convention": convention})
    measured, before = capsys.readouterr().out, csv.read_bytes()
    evaluate_rows(csv, Console(width=250), data=None, convention=convention)
    again = capsys.readouterr().out
    assert again in measured
    assert csv.read_bytes() == before
    defined = [line.split(" ")[0] for line in again.splitlines() if " [" in line and line.startswith(("dice", "iou", "hd95", "asd"))]
    assert sorted(defined) == sorted(["dice", "iou", *distances])  # what is shown is defined, and nothing else
    rows = pd.read_csv(csv)
    pd.concat([rows, rows.assign(method="other")]).to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(UserError, match=r"two\.csv: found 2 methods, expected one; home compare"):
        evaluate_rows(tmp_path / "two.csv", Console(), data=None, convention="own")


def test_one_pair_that_cannot_be_measured_is_one_line(folders, capsys):
    predicted, reference = (folder / "ill.nii.gz" for folder in folders)
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 8), np.uint8), np.eye(4)), reference)
    with pytest.raises(UserError, match=r"^[^\n]*ill\.nii\.gz: found 9x9x9 and 9x9x8 voxels[^\n]*$"):
        evaluate_files(predicted, reference, Console(width=250), **ASKED)
    assert len(capsys.readouterr().out.splitlines()) == 1  # as what the references are read


def test_labels_of_several_origins_are_counted():
    rows = pd.DataFrame({"case": ["a", "a", "b", "c"], "label_origin": ["MODEL", "MODEL", "UNSTATED", "MODEL"]})
    assert labels_told(rows) == "labels MODEL (2), UNSTATED (1)"
    assert labels_told(rows[:2]) == "labels MODEL"
    assert labels_told(rows[["case"]]) == "labels of an origin that is not told"


def test_wrong_options_are_refused_before_anything_is_measured(folders):
    for changes, told in (({"convention": "x"}, "convention: found 'x'"), ({"raw": True}, "--raw: found no data set"), ({"data": "nothing"}, "unknown")):
        with pytest.raises(UserError, match=told):
            evaluate_files(*folders, Console(), **ASKED | changes)
    assert not (folders[0] / "metrics.csv").exists()


def test_a_definition_has_unit_direction_best_and_worst():
    assert definitions(["nsd_2mm"]) == [
        "nsd_2mm [1]: share of the area of both surfaces that lies within 2 mm of the other surface (higher is better, best 1, worst 0)"
    ]
    assert definitions(["hd95"])[0].endswith("(lower is better, best 0, worst the image's diagonal)")
    assert definitions(["reference_volume"]) == ["reference_volume [ml]: |R| in ml (a fact)"]
