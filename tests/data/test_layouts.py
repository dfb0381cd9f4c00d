"""Templates, pairs and splits: what a hand would find, each folder listed once, the same shares on any machine."""

import itertools
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from homelib.data.examine import Report
from homelib.data.layouts import find_cases
from homelib.data.manifest import Case, Layout, SplitRule, list_manifests, load_manifest
from homelib.data.overview import overview
from homelib.data.split import deal, split
from homelib.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


# ---------------------------------------------------------------- finding cases

RELEASES = {
    "panorama": (
        ["images/100001_00001_0000.nii.gz", "images/100002_00001_0000.nii.gz", "manual_labels/100001_00001.nii.gz", "automatic_labels/100002_00001.nii.gz"],
        2,
    ),
    "msd_pancreas": (["imagesTr/pancreas_001.nii.gz", "imagesTr/._pancreas_001.nii.gz", "labelsTr/pancreas_001.nii.gz", "labelsTr/._pancreas_001.nii.gz"], 1),
    "nih_pancreas_ct": (["Pancreas-CT/PANCREAS_0001/1.2.3/4.5.6/", "TCIA_pancreas_labels-02-05-2017/label0001.nii.gz", "Pancreas-CT/LICENSE"], 1),
    "amos_ct": (["imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz", "imagesVa/amos_0500.nii.gz", "labelsVa/amos_0500.nii.gz"], 2),
    "amos_mri": (["imagesTr/amos_0507.nii.gz", "labelsTr/amos_0507.nii.gz", "imagesVa/amos_0600.nii.gz", "labelsVa/amos_0600.nii.gz"], 2),
    "amos_joint": (["imagesTr/amos_0500.nii.gz", "labelsTr/amos_0500.nii.gz", "imagesTr/amos_0501.nii.gz", "labelsTr/amos_0501.nii.gz"], 2),
    "feta_2022": (["sub-001/anat/sub-001_rec-mial_T2w.nii.gz", "sub-001/anat/sub-001_rec-mial_dseg.nii.gz", "sub-001/anat/sub-001_rec-mial_T2w.json"], 1),
    "mvseg_2023": (["train/train_001-US.nii.gz", "train/train_001-label.nii.gz", "val/val_004-US.nii", "val/val_004-label.nii"], 2),
    "abdomenatlas_1_1": (["BDMAP_00000001/ct.nii.gz", "BDMAP_00000001/combined_labels.nii.gz"], 1),
    "totalsegmentator_mri": (["s0001/mri.nii.gz", "s0001/segmentations/liver.nii.gz", "meta.csv"], 1),
    "demo_ct": (["ct-a/image.nii.gz", "ct-a/label.nii.gz", "ct-c/image.nii.gz", "ct-c/label.nii.gz"], 2),
    "demo_mr_spine": (["mr-spine/image.nii.gz", "mr-spine/label.nii.gz"], 1),
    "demo_us_phantom": (["phantom-us-a/image.nii.gz", "phantom-us-a/label.nii.gz"], 1),
    "in_house": (["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "b/image.nii.gz", "b/label.nii.gz"], 2),
}


def test_every_data_set_with_a_folder_is_here():
    assert set(RELEASES) == {name for name in list_manifests() if load_manifest(name).layouts}


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_as_its_manifest_describes_it(tmp_path, name):
    files, number = RELEASES[name]
    touch(tmp_path, *files)
    found = find_cases(load_manifest(name), tmp_path)
    assert [f.check for f in found.findings] == ([] if name.startswith("demo_") else ["number of cases"])
    assert len(found.cases) == number
    assert all(case.label for case in found.cases)


def test_parts_and_modalities_come_from_the_layout(tmp_path):
    touch(
        tmp_path,
        *itertools.chain.from_iterable((f"images{part}/amos_{n}.nii.gz", f"labels{part}/amos_{n}.nii.gz") for part, n in (("Tr", "0500"), ("Va", "0501"))),
    )
    cases = find_cases(load_manifest("amos_joint"), tmp_path).cases
    assert [(case.id, case.modality, case.part) for case in cases] == [("amos_0500", "CT", None), ("amos_0501", "MRI", "test")]
    assert load_manifest("amos_joint").window_of("MRI") == (0, 1000)
    with pytest.raises(UserError, match="no intensity window for US"):
        load_manifest("amos_joint").window_of("US")


def test_each_case_of_the_demo_keeps_the_origin_of_its_labels(tmp_path):
    touch(tmp_path, *RELEASES["demo_ct"][0])
    assert [case.label_origin for case in find_cases(load_manifest("demo_ct"), tmp_path).cases] == ["MODEL", "UNSTATED"]


def with_layout(**fields):
    return load_manifest("in_house").model_copy(update={"layouts": (Layout(name="one", **fields),), "expected_cases": None})


@pytest.mark.parametrize(
    ("files", "checks"),
    [
        (["i/a.nii.gz", "l/a.nii.gz"], []),
        (["i/a.nii.gz"], ["label missing"]),
        (["l/a.nii.gz"], ["nothing found", "image missing"]),
        (["i/a.nii.gz", "l/a.nii.gz", "l/b.nii.gz"], ["image missing"]),
        (["i/a.nii.gz/", "l/a.nii.gz"], ["nothing found", "image missing"]),  # a folder of that name is no file
        (["i/a.nii.gz", "l/a.nii.gz", "i/a.nrrd", "i/notes.txt"], ["not used"]),
        (["i/a.nii.gz", "l/a.nii.gz", "i/.hidden.nii.gz"], []),
    ],
)
def test_pairs(tmp_path, files, checks):
    touch(tmp_path, *files)
    manifest = with_layout(image="i/{case}.nii.gz", label="l/{case}.nii.gz")
    assert sorted(f.check for f in find_cases(manifest, tmp_path).findings) == sorted(checks)


def test_a_loop_of_folders_ends(tmp_path):
    touch(tmp_path, "a/image.nii.gz", "a/label.nii.gz")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    found = find_cases(with_layout(image="{case}/image.nii.gz", label="{case}/label.nii.gz"), tmp_path)
    assert [case.id for case in found.cases] == ["a"]
    assert found.findings == ()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("image", "images/a.nii.gz", "{case}"),
        ("image", "/etc/{case}", "relative path"),
        ("label", "../{case}.nii.gz", "relative path"),
        ("case", "(a+)+", "without groups"),
        ("case", "(?:a+)+", "repeat of a repeat"),
        ("case", "[", "regular expression"),
        ("case", "(?:a+b?)+", "repeat of a repeat"),
        ("case", "(?:(?:[a-z]+)x)*", "repeat of a repeat"),
        ("case", "(?:a|ab)*c", "of a choice"),
        ("case", "(?i)a[0-9]", "regular expression"),  # where it is used, it stands in the middle
        ("case", "a)(?:b", "regular expression"),
    ],
)
def test_hostile_layouts_are_refused(field, value, told):
    with pytest.raises(ValueError, match=told.replace("{", r"\{")):
        Layout(**({"name": "x", "image": "{case}.nii"} | {field: value}))


@pytest.mark.parametrize("pattern", ["[0-9]+_[0-9]+", "(?:a[0-9]+|b[(+*])", "(?:[0-9]{2}-)+x", "[^/]+(?<!_seg)", r"a\(b+\)+", "(?i:a+)", "(?:sub-[0-9]+)?"])
def test_sound_patterns_of_case_ids_are_taken(pattern):
    assert Layout(name="x", image="{case}.nii", case=pattern).case == pattern


# ---------------------------------------------------------------- splits


def cases_of(number: int, modality: str = "CT") -> list[Case]:
    return [Case(f"{modality}-{n:05}", Path("i"), Path("l"), modality, "REF", "in_house") for n in range(number)]


def manifest_with(rule: SplitRule):
    return load_manifest("in_house").model_copy(update={"split": rule})


def test_the_paper_s_numbers_of_panorama(tmp_path):
    """1,964 cases, 578 with PDAC (676 less the 98 of MSD), 80:20: 1,571 and 393, and in both the same share of PDAC."""
    manifest, cases = load_manifest("panorama"), [replace(case, id=f"1{n:05}_00001") for n, case in enumerate(cases_of(1964))]
    test_cases = [replace(case, id=f"2{n:05}_00001") for n, case in enumerate(cases_of(274))]
    (tmp_path / "test_cases.txt").write_text("\n".join(case.id for case in test_cases) + "\n")
    reports = {case.id: Report(case.id, [], {"voxels": {"pdac": int(n < 578), "pancreas": 9}}) for n, case in enumerate(cases)}
    parts = split(manifest, [*cases, *test_cases], root=tmp_path, reports=reports)
    assert Counter(parts.values()) == {"train": 1571, "validation": 393, "test": 274}
    with_pdac = Counter(parts[case.id] for case in cases[:578])
    assert abs(with_pdac["train"] - 0.8 * 578) <= 1
    with pytest.raises(UserError, match=r"274 cases that may have pdac or not|1964 cases that may have pdac or not"):
        split(manifest, [*cases, *test_cases], root=tmp_path, reports={})


def test_all_cases_of_a_patient_come_into_one_part(tmp_path):
    """A third of the patients has up to five scans; a scan in a list takes the patient's others with it."""
    ids = [f"{patient:06}_{scan:05}" for patient in range(600) for scan in range(1, 2 + (patient % 5 if patient % 3 == 0 else 0))]
    cases = [replace(cases_of(1)[0], id=case_id) for case_id in ids]
    (tmp_path / "test.txt").write_text("000012_00002\n")
    reports = {case_id: Report(case_id, [], {"voxels": {"pdac": int(case_id.endswith("2")), "pancreas": 9}}) for case_id in ids}
    rule = SplitRule(parts={"train": 0.8, "validation": 0.2}, patient="[0-9]+", stratify_by="pdac", lists={"test": "test.txt"})
    parts = split(manifest_with(rule), cases, root=tmp_path, reports=reports)
    of_patients = {}
    for case_id, part in parts.items():
        of_patients.setdefault(case_id[:6], set()).add(part)
    assert all(len(found) == 1 for found in of_patients.values())
    assert sorted(case_id for case_id in ids if parts[case_id] == "test") == ["000012_00001", "000012_00002", "000012_00003"]
    assert abs(Counter(parts.values())["validation"] - 0.2 * (len(ids) - 3)) <= 5
    (tmp_path / "test.txt").write_text("000012_00002\n")
    both = [replace(case, part="train") if case.id == "000012_00001" else case for case in cases]
    with pytest.raises(UserError, match="cases of the patient '000012' in train and in test"):
        split(manifest_with(rule), both, root=tmp_path, reports=reports)
    with pytest.raises(UserError, match=r"split\.patient: '\[0-9\]\+' finds no patient in the case id 'x_1'"):
        split(manifest_with(rule), [*cases, replace(cases[0], id="x_1")], root=tmp_path, reports=reports)


def test_the_paper_s_numbers_of_the_others():
    amos = Counter(split(load_manifest("amos_ct"), cases_of(200)).values())
    assert amos == {"train": 160, "validation": 40}
    joint = [*cases_of(200), *cases_of(40, "MRI")]
    parts = split(load_manifest("amos_joint"), joint)
    assert Counter((case.modality, parts[case.id]) for case in joint) == {
        ("CT", "train"): 160, ("CT", "validation"): 40, ("MRI", "train"): 32, ("MRI", "validation"): 8,
    }  # fmt: skip
    assert sorted(Counter(split(load_manifest("feta_2022"), cases_of(120)).values()).values()) == [24] * 5
    assert Counter(split(load_manifest("mvseg_2023"), cases_of(175)).values()) == {"train": 105, "validation": 30, "test": 40}
    assert Counter(split(load_manifest("abdomenatlas_1_1"), cases_of(8788)).values()) == {"train": 7470, "validation": 1318}


def test_counts_must_be_those_of_the_cases():
    with pytest.raises(UserError, match="for 174 cases"):
        split(load_manifest("mvseg_2023"), cases_of(174))


def test_a_split_is_that_of_its_seed_and_ids_alone():
    cases = cases_of(100)
    rule = SplitRule(seed=3, folds=5)
    first = split(manifest_with(rule), cases)
    assert split(manifest_with(rule), cases[::-1]) == first
    assert split(manifest_with(SplitRule(seed=4, folds=5)), cases) != first
    assert first["CT-00000"] == "fold-3"  # written down: another machine or version must not change it
    assert deal({"a": "", "b": "", "c": "", "d": ""}, {"train": 0.5, "test": 0.5}, seed=0) == {"a": "test", "b": "test", "c": "train", "d": "train"}


def test_layouts_and_lists_come_before_shares(tmp_path):
    cases = [replace(case, part="test") if n < 3 else case for n, case in enumerate(cases_of(13))]
    (tmp_path / "held_out.txt").write_text("CT-00012\n\n")
    rule = SplitRule(parts={"train": 0.5, "validation": 0.5}, lists={"validation": "held_out.txt"})
    parts = split(manifest_with(rule), cases, root=tmp_path)
    assert {parts[f"CT-{n:05}"] for n in range(3)} == {"test"}
    assert parts["CT-00012"] == "validation"
    (tmp_path / "held_out.txt").write_text("CT-99\n")
    with pytest.raises(UserError, match=r"held_out\.txt: found 'CT-99', no case here"):
        split(manifest_with(rule), cases, root=tmp_path)
    (tmp_path / "held_out.txt").unlink()
    with pytest.raises(UserError, match=r"held_out\.txt: no such file"):
        split(manifest_with(rule), cases, root=tmp_path)


def test_a_case_that_is_put_into_two_parts_is_told_and_not_split(tmp_path):
    """A test case of the layout that a list trains on, or one that stands in two lists, would be trained and tested on."""
    cases = [replace(case, part="test") if n < 3 else case for n, case in enumerate(cases_of(13))]
    rule = SplitRule(parts={"train": 0.5, "validation": 0.5}, lists={"train": "train.txt", "test": "test.txt"})
    (tmp_path / "test.txt").write_text("CT-00001\nCT-00005\n")
    (tmp_path / "train.txt").write_text("CT-00007\n")
    assert split(manifest_with(rule), cases, root=tmp_path)["CT-00005"] == "test"
    for listed in ("CT-00002", "CT-00005"):
        (tmp_path / "train.txt").write_text(f"{listed}\n")
        with pytest.raises(UserError, match=rf"t[a-z]+\.txt: found '{listed}' among the t[a-z]+ cases, but its layout or another list has it in t"):
            split(manifest_with(rule), cases, root=tmp_path)


@pytest.mark.parametrize("fields", [{"parts": {"train": 0.8}, "folds": 5}, {"parts": {"train": 0.8, "test": 0.3}}, {"lists": {"test": "../x"}}, {"folds": 1}])
def test_unsound_rules_are_refused(fields):
    with pytest.raises(ValueError, match=r"parts|file in the data set|greater than"):
        SplitRule(**fields)


# ---------------------------------------------------------------- ten thousand cases


def test_ten_thousand_cases_are_listed_checked_for_state_and_split_without_opening_one(tmp_path, monkeypatch):
    """Each folder is listed once and each file looked up once: what makes it quick, and can be counted."""
    number = 10_000
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    for n in range(number):
        os.close(os.open(tmp_path / "imagesTr" / f"c{n:05}_0000.nii.gz", os.O_CREAT))
        os.close(os.open(tmp_path / "labelsTr" / f"c{n:05}.nii.gz", os.O_CREAT))
    manifest = load_manifest("in_house")
    calls: Counter = Counter()

    def counting(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    counting(os, "scandir")
    counting(os, "stat")
    counting(os.path, "lexists")
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: pytest.fail(f"{path} was opened") if path.suffix == ".gz" else opened(path, *a, **k))
    seen = overview(manifest, tmp_path, kept=tmp_path / "kept")
    assert len(seen.rows) == number
    assert sorted(Counter(part for _, _, part, _ in seen.rows).items()) == [(f"fold-{k}", number // 5) for k in range(5)]
    assert {state for *_, state in seen.rows} == {"unchecked"}
    assert str(seen).startswith("10000 cases: 2000 fold-0, ")
    assert calls["scandir"] <= 5
    assert calls["stat"] + calls["lexists"] <= 2 * number + 50  # isdir is a stat too
