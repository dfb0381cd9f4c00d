"""Tables of the data: what a check finds in spoilt copies, grids along the patient's axes, and a case as its files hold it."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from homelib.data.manifest import Case, SplitRule, load_manifest
from homelib.data.prepare import prepare
from homelib.data.spoil import spoilt_copies
from homelib.data.summary import check_tables, grids_table, in_its_file, parts_table

MANIFEST = load_manifest("demo_ct")


def test_a_sound_case_has_no_finding_and_its_spoilt_copies_have_theirs(phantoms):
    before = phantoms["phantom-a"].image.read_bytes()
    found, read = check_tables(phantoms.values())
    assert len(found) == 0
    assert sorted(read.index) == ["phantom-a", "phantom-c"]
    assert set(read["orientation"]) == {"RAS"}
    faults, _ = check_tables(spoilt_copies(phantoms["phantom-a"]))
    by_case = faults[faults["severity"] == "error"].groupby("case")["check"].agg(set).to_dict()
    assert by_case == {
        "phantom-a-cut": {"damaged"},
        "phantom-a-grey": {"not HU"},
        "phantom-a-moved": {"label place"},
        "phantom-a-blended": {"label fractions", "duplicate image"},
    }
    assert phantoms["phantom-a"].image.read_bytes() == before


@pytest.fixture
def turned(phantoms, tmp_path):
    """phantom-a with its axes stored as up, left, back, of 40 x 44 x 48 voxels of 7.7, 6.3 and 7 mm."""
    paths = {}
    for role in ("image", "label"):
        volume = nib.load(getattr(phantoms["phantom-a"], role))
        part = nib.Nifti1Image(np.asarray(volume.dataobj)[:48, :44, :40], volume.affine @ np.diag([1.0, 0.9, 1.1, 1.0]))
        change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("SLP"))
        nib.save(part.as_reoriented(change), tmp_path / f"{role}.nii")
        paths[role] = tmp_path / f"{role}.nii"
    return replace(phantoms["phantom-a"], **paths)


def test_grids_are_told_along_the_patients_axes(turned, tmp_path):
    table = grids_table([prepare(turned, spacing_mm=(10.0, 11.0, 12.0), cache=tmp_path / "kept")]).set_index("axis")
    assert table["spacing_mm"].round(3).to_dict() == {"right-left": 7.0, "front-back": 6.3, "up-down": 7.7}
    assert table["prepared_mm"].to_dict() == {"right-left": 10.0, "front-back": 11.0, "up-down": 12.0}
    assert table["extent_mm"].round(1).to_dict() == {"right-left": 336.0, "front-back": 277.2, "up-down": 308.0}


def test_a_case_in_its_file_is_turned_and_no_more(turned, phantoms, tmp_path):
    image, label, affine = in_its_file(prepare(turned, spacing_mm=(12.0,) * 3, cache=tmp_path / "kept"))
    np.testing.assert_array_equal(image, np.asarray(nib.load(phantoms["phantom-a"].image).dataobj)[:48, :44, :40])
    np.testing.assert_array_equal(label, MANIFEST.merge(np.asarray(nib.load(phantoms["phantom-a"].label).dataobj)[:48, :44, :40]))
    assert nib.aff2axcodes(affine) == ("R", "A", "S")


def test_parts_go_by_the_rule_and_strata_are_named():
    cases = [Case(f"{modality}-{number}", None, None, modality, "REF", "demo_ct") for modality in ("CT", "MRI") for number in range(4)]
    table = parts_table(cases, MANIFEST, SplitRule(folds=2, stratify_by="modality"))
    assert table["case"].tolist() == sorted(case.id for case in cases)
    assert table.groupby(["stratum", "part"]).size().to_dict() == {(m, f): 2 for m in ("CT", "MRI") for f in ("fold-0", "fold-1")}
    assert set(parts_table(cases, MANIFEST, SplitRule())["part"]) == {"train"}
