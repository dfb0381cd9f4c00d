"""`check` on a corpus of malformed cases: each has its finding and no other, none is a traceback, and the good cases beside them have none."""

import csv
import importlib.util
import json
import os
import signal
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from homelib.data import check as module
from homelib.data import fix as fix_module
from homelib.data.check import check, kept_reports
from homelib.data.checks import CHECKS, NAMES_AND_PAIRS
from homelib.data.cohort import prepare_all
from homelib.data.examine import Rules, examine
from homelib.data.fix import fix, save, unmended
from homelib.data.layouts import find_cases
from homelib.data.manifest import Layout, load_manifest
from homelib.data.overview import overview
from homelib.data.parallel import Died, over
from homelib.data.reading import Volume, read
from homelib.errors import UserError

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)

ELSEWHERE = {"nothing found", "folder", "permission", "missing", "memory", "reader died", "number of cases", "not used", "negative values"}
ELSEWHERE |= {"mixed orientation", "class never seen", "no class"}  # tested below: of a whole folder, or not to be had on every machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The corpus, and what its files looked like before anything was done."""
    root = tmp_path_factory.mktemp("corpus")
    corpus.make(root)
    return root


@pytest.fixture(scope="module")
def manifest(folder):
    return load_manifest(folder / "corpus.yaml")


def snapshot(root: Path) -> dict:
    """Every path below a folder: size, time, and what is in it."""
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in sorted(root.rglob("*"))}


@pytest.fixture(scope="module")
def checked(folder, manifest):
    before = snapshot(folder / "data")
    result = check(manifest, folder / "data", workers=1, kept=folder / "kept")
    assert snapshot(folder / "data") == before, "a check changes nothing"
    return result


def of_case(checked, case_id: str) -> list[str]:
    return sorted(f.check for f in checked.findings if f.case == case_id)


# ---------------------------------------------------------------- the corpus


@pytest.mark.parametrize("case_id", corpus.SPOILT, ids=lambda case_id: ascii(case_id)[1:40])
def test_each_spoilt_case_has_its_finding_and_no_other(checked, case_id):
    assert of_case(checked, case_id) == sorted(corpus.SPOILT[case_id])


@pytest.mark.parametrize("case_id", corpus.GOOD)
def test_the_good_cases_beside_them_have_none(checked, case_id):
    assert of_case(checked, case_id) == []
    statistics = checked.reports[case_id].statistics
    assert statistics["shape"] == list(corpus.SHAPE)
    assert statistics["voxels"]["liver"] == 68
    assert statistics["voxels"]["spleen"] > 0


def test_the_corpus_is_large_enough_and_covers_every_check():
    assert len(corpus.SPOILT) >= 40
    covered = {name for checks in corpus.SPOILT.values() for name in checks}
    assert covered | ELSEWHERE == set(CHECKS)


def test_the_good_cases_are_prepared_and_of_the_others_none_stops_them(folder, manifest, tmp_path):
    """A spoilt one is prepared where its voxels can be trusted to lie where they should, else told in one line that a user can act on."""
    outcomes = {outcome.case: outcome for outcome in prepare_all(find_cases(manifest, folder / "data").cases, tmp_path / "out", progress=False)}
    assert {outcomes[name].state for name in corpus.GOOD} == {"prepared"}
    harmless = {*NAMES_AND_PAIRS, "duplicate image", "wrong modality", "not HU", "range", "label values", "masks overlap"}
    harmless |= {name for name, kind in CHECKS.items() if kind.severity != "error"}
    for case_id, checks in corpus.SPOILT.items():
        if case_id in outcomes:
            expected = "prepared" if set(checks) <= harmless - {"constant", "spacing"} else "failed"
            assert outcomes[case_id].state == expected, (case_id, outcomes[case_id])
    for outcome in outcomes.values():
        assert "\n" not in outcome.message
        assert "expected a volume that can be prepared" not in outcome.message  # nothing that nobody thought of
        assert (outcome.state == "failed") == bool(outcome.message) or "labelled voxels outside the body's box" in outcome.message
    assert "330 of 1320 labelled" in outcomes["label-everywhere"].message  # of which the air is a part


def test_every_finding_says_what_to_do(checked):
    for found in checked.findings:
        assert found.severity == CHECKS[found.check].severity
        for text in (found.found, found.expected, found.remedy):
            assert text
            assert "\n" not in text
            assert "{" not in text
        assert len(str(found).replace(found.file, "")) < 500


def test_two_processes_find_the_same_as_one(folder, manifest, checked):
    in_two = check(manifest, folder / "data", workers=2, kept=folder / "kept-2")
    assert in_two.findings == checked.findings


def test_the_csv_holds_the_findings_and_the_cases(checked):
    with (checked.folder / "findings.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    printable = [[text.encode(errors="backslashreplace").decode() for text in (f.case, f.check, f.file)] for f in checked.findings]
    assert [[row["case"], row["check"], row["file"]] for row in rows] == printable
    with (checked.folder / "cases.csv").open(encoding="utf-8") as stream:
        cases = {row["case"]: row for row in csv.DictReader(stream)}
    assert len(cases) == len(checked.cases)
    assert float(cases["Good-a"]["liver_ml"]) == pytest.approx((4 * 4 * 4 + 2 * 2) * 0.01)  # values 1 and 2, voxels of 10 mm3
    assert cases["Good-a"]["spacing_mm"] == "2x2x2.5"
    assert cases["zero-bytes"]["min"] == ""


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_no_header_however_damaged_raises_anything(tmp_path, manifest, capfd, suffix):
    """Bytes of a good header replaced at random, by a fixed seed: a report each time, and no word on stderr."""
    writer = corpus.Writer(tmp_path, "one", 0)
    writer.nifti("label")
    save(Volume(writer.image, corpus.AFFINE), writer.path("image", suffix))
    good, rng = writer.path("image", suffix).read_bytes(), np.random.default_rng(0)
    (case,), rules = find_cases(manifest, tmp_path).cases, Rules.of(manifest)
    faults = set()
    for _ in range(150):
        raw = bytearray(good)
        for place in rng.integers(0, 340, 2):
            raw[place] = rng.integers(0, 256)
        case.image.write_bytes(raw)
        faults |= {f.check for f in examine(case, rules).findings}
    assert "damaged" in faults
    assert faults <= set(CHECKS)
    assert capfd.readouterr().err == ""


def test_the_overview_has_what_pairs_copies_and_cases_tell(checked, folder, manifest):
    states = {case_id: state for case_id, _, _, state in overview(manifest, folder / "data", kept=folder / "kept").rows}
    assert [states[case_id] for case_id in corpus.GOOD] == ["good"] * len(corpus.GOOD)
    wanted = {"zz-a-copy": "errors", "image-alone": "errors", "zero-bytes": "errors", "label-of-floats": "warnings", "image-in-two-formats": "errors"}
    assert {case_id: states[case_id] for case_id in wanted} == wanted
    assert set(states.values()) == {"good", "warnings", "errors"}
    fresh = overview(manifest, folder / "data", kept=folder / "nowhere")
    assert Counter(row[3] for row in fresh.rows).keys() == {"unchecked", "errors"}  # missing files need no check


# ---------------------------------------------------------------- kept results


def counted(monkeypatch) -> list:
    read = []
    monkeypatch.setattr(module, "examine", lambda case, rules: (read.append(case.id), examine(case, rules))[1])
    return read


def test_unchanged_cases_are_not_read_again_but_unreadable_ones_are(folder, manifest, checked, monkeypatch):
    read = counted(monkeypatch)
    again = check(manifest, folder / "data", workers=1, kept=folder / "kept")
    assert again.findings == checked.findings
    unreadable = {f.case for f in checked.findings if f.check in ("damaged", "empty file", "link", "too large")}
    assert set(read) == unreadable
    read.clear()
    check(manifest, folder / "data", workers=1, kept=folder / "kept", again=True)
    assert len(read) == len(checked.cases)


@pytest.fixture
def small(tmp_path):
    """Three good cases of their own, and their manifest."""
    for seed, case_id in enumerate(("one", "two", "three")):
        corpus.Writer(tmp_path / "data", case_id, seed).both()
    (tmp_path / "corpus.yaml").write_text(corpus.MANIFEST)
    return load_manifest(tmp_path / "corpus.yaml"), tmp_path / "data", tmp_path / "kept"


def test_a_changed_file_or_rule_is_examined_again(small, monkeypatch):
    manifest, root, kept = small
    read = counted(monkeypatch)
    check(manifest, root, workers=1, kept=kept)
    assert sorted(read) == ["one", "three", "two"]
    read.clear()
    writer = corpus.Writer(root, "two", 1)
    writer.nifti("label", np.zeros_like(writer.label))
    assert of_case(check(manifest, root, workers=1, kept=kept), "two") == ["label empty"]
    assert read == ["two"]
    read.clear()
    check(manifest.model_copy(update={"classes": {"spleen": (5,)}}), root, workers=1, kept=kept)
    assert sorted(read) == ["one", "three", "two"]


def test_a_label_that_may_be_empty_is_a_note(small):
    manifest, root, kept = small
    may = manifest.model_copy(update={"may_be_empty": True})
    for case_id, value in (("one", 0), ("two", 9)):
        writer = corpus.Writer(root, case_id, 0)
        writer.nifti("label", np.full_like(writer.label, value))
    assert of_case(check(manifest, root, workers=1, kept=kept), "one") == ["label empty"]
    found = {f.case: (f.check, f.severity) for f in check(may, root, workers=1, kept=kept).findings}
    assert found["one"] == ("no class", "note")
    assert found["two"][1] == "error"  # of values that it does not know


def test_a_header_is_examined_again_when_its_voxels_change_and_copied_with_them(small, tmp_path):
    manifest, root, kept = small
    (root / "images" / "two.nii.gz").unlink()
    image, raw = root / "images" / "two.mhd", root / "images" / "two.raw"
    writer = corpus.Writer(root, "two", 1)
    scan = sitk.ReadImage(str(writer.nifti("image")))
    writer.path("image").unlink()
    sitk.WriteImage(scan, str(image))
    only = manifest.model_copy(update={"layouts": (Layout(name="flat", image="images/{case}.mhd", label="labels/{case}.nii.gz", case="two"),)})
    checked = check(only, root, workers=1, kept=kept)
    assert of_case(checked, "two") == []
    fix(checked, only, root, tmp_path / "fixed")
    assert of_case(check(only, tmp_path / "fixed", workers=1, kept=tmp_path / "kept-fixed"), "two") == []
    assert unmended(checked) == []
    spoilt = sitk.GetArrayFromImage(scan).astype(np.float32)
    spoilt[0, 0, 0] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(spoilt), str(image))
    assert unmended(check(only, root, workers=1, kept=kept)) == [str(image)]  # could be mended in another format
    raw.write_bytes(raw.read_bytes()[:100])
    assert of_case(check(only, root, workers=1, kept=kept), "two") == ["damaged"]


def test_a_killed_check_goes_on_where_it_was(small, monkeypatch):
    manifest, root, kept = small

    def killed(case, rules):
        if case.id == "two":
            raise KeyboardInterrupt
        return examine(case, rules)

    monkeypatch.setattr(module, "examine", killed)
    with pytest.raises(KeyboardInterrupt):
        check(manifest, root, workers=1, kept=kept)
    lines = (kept / "results.jsonl").read_text()
    (kept / "results.jsonl").write_text(lines + '{"state": "half a li')
    read = counted(monkeypatch)
    assert check(manifest, root, workers=1, kept=kept).findings == ()
    assert read == ["two"]
    assert {json.loads(line)["case"] for line in (kept / "results.jsonl").read_text().splitlines()} == {"one", "two", "three"}
    cases = find_cases(manifest, root).cases
    assert set(kept_reports(manifest, root, cases, kept=kept)) == {"one", "two", "three"}


# ---------------------------------------------------------------- faults of whole folders, and of the machine


def test_a_file_without_permission_is_one_finding(small, monkeypatch):
    manifest, root, kept = small
    opened = Path.open

    def refused(path, *args, **kwargs):
        if path.name == "two.nii.gz" and "images" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refused)
    assert of_case(check(manifest, root, workers=1, kept=kept), "two") == ["permission"]
    monkeypatch.undo()
    assert check(manifest, root, workers=1, kept=kept).findings == ()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything, so no file can be closed to it")
def test_a_closed_file_and_folder_are_findings(small):
    manifest, root, kept = small
    (root / "images" / "two.nii.gz").chmod(0)
    (root / "dicom").mkdir(mode=0)
    found = check(manifest, root, workers=1, kept=kept)
    assert of_case(found, "two") == ["permission"]
    assert [f.check for f in found.findings if not f.case] == ["folder"]


def test_a_folder_that_cannot_be_listed_is_one_finding(small, monkeypatch):
    manifest, root, kept = small
    scandir = os.scandir

    def refused(path="."):
        if str(path).endswith("dicom"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [f.check for f in check(manifest, root, workers=1, kept=kept).findings] == ["folder"]


def test_no_memory_and_a_fault_of_our_own_are_findings(small, monkeypatch):
    manifest, root, kept = small
    monkeypatch.setattr("homelib.data.examine.read", lambda path: (_ for _ in ()).throw(MemoryError()))
    assert {f.check for f in check(manifest, root, workers=1, kept=kept / "a").findings} == {"memory"}
    monkeypatch.setattr(module, "examine", lambda case, rules: 1 / 0)
    assert {f.check for f in check(manifest, root, workers=1, kept=kept / "b").findings} == {"reader died"}


def test_a_file_that_goes_while_it_is_checked_is_a_finding(small):
    manifest, root, _ = small
    case = find_cases(manifest, root).cases[0]
    case.image.unlink()
    assert [f.check for f in examine(case, Rules.of(manifest)).findings] == ["missing"]


@pytest.mark.parametrize("deadly", [0, 1, 11])
def test_a_process_that_dies_takes_no_other_item_with_it(deadly):
    items = [signal.SIGCONT] * 12
    items[deadly] = signal.SIGKILL
    results = dict(over(signal.raise_signal, items, workers=2))
    assert isinstance(results.pop(deadly), Died)
    assert results == {index: None for index in range(12) if index != deadly}


def test_two_that_die_are_both_told_of():
    results = dict(over(signal.raise_signal, [signal.SIGKILL, signal.SIGCONT, signal.SIGKILL], workers=2))
    assert [type(results[index]) for index in range(3)] == [Died, type(None), Died]


def test_an_empty_folder_and_none_at_all(tmp_path, manifest):
    assert [f.check for f in check(manifest, tmp_path, workers=1, kept=tmp_path / "kept").findings] == ["nothing found"]
    with pytest.raises(UserError, match="no such folder"):
        check(manifest, tmp_path / "gone")
    with pytest.raises(UserError, match="no layouts"):
        check(load_manifest("demo_ct").model_copy(update={"layouts": ()}), tmp_path)


def test_what_shows_only_beside_other_cases(small):
    manifest, root, kept = small
    turned = corpus.AFFINE @ np.diag([-1.0, 1, 1, 1])
    corpus.Writer(root, "four", 4).both(affine=turned)
    (root / "dicom").mkdir()
    corpus.Writer(root, "stray", 5).nifti("image").rename(root / "dicom" / "stray.nii.gz")
    changed = manifest.model_copy(update={"expected_cases": 9, "classes": {"liver": (1,), "spleen": (5,), "heart": (9,)}, "labels": {}})
    found = {f.check: f for f in check(changed, root, workers=1, kept=kept).findings}
    assert set(found) == {"mixed orientation", "number of cases", "class never seen", "not used"}
    assert "1 of RPS" in found["mixed orientation"].found
    assert found["mixed orientation"].expected == "one orientation, LPS in most"
    assert (found["number of cases"].found, found["number of cases"].expected) == ("4", "9")
    assert "heart" in found["class never seen"].found
    assert "stray.nii.gz" in found["not used"].found


@pytest.mark.parametrize(("modality", "low", "checks"), [("MRI", -1000, ["wrong modality"]), ("US", 0, []), ("MRI", -80, ["negative values"])])
def test_other_modalities(tmp_path, modality, low, checks):
    writer = corpus.Writer(tmp_path / "data", "one", 0)
    image = np.abs(writer.image).clip(0, 200)
    image[:3] = low
    writer.both(image=image)
    text = corpus.MANIFEST.replace("modality: CT", f"modality: {modality}").replace("[-175, 250]", "[0, 255]")
    (tmp_path / "corpus.yaml").write_text(text)
    assert of_case(check(load_manifest(tmp_path / "corpus.yaml"), tmp_path / "data", workers=1, kept=tmp_path / "kept"), "one") == checks


def test_cases_that_are_known_already_are_checked_alike(phantoms, tmp_path):
    """The demo's: their manifest has classes and no label map, so that other raw values are background."""
    checked = module.check_cases(list(phantoms.values()), load_manifest("demo_ct"), kept=tmp_path, workers=1)
    assert checked.findings == ()
    assert checked.reports["phantom-a"].statistics["ml"]["liver"] > 1


# ---------------------------------------------------------------- repaired copies


@pytest.fixture(scope="module")
def repaired(folder, manifest, checked):
    """The corpus after `fix`, checked once more."""
    before = snapshot(folder / "data")
    repairs = fix(checked, manifest, folder / "data", folder / "fixed")
    assert snapshot(folder / "data") == before, "the input is never touched"
    return repairs, check(manifest, folder / "fixed", workers=1, kept=folder / "kept-fixed")


def test_what_is_fixable_is_gone_and_the_rest_is_as_before(checked, repaired):
    repairs, after = repaired
    mended = {f.case for f in checked.findings if f.fixable} - {"nan-alone"}
    assert {repair.case for repair in repairs} == mended
    for case_id in mended:
        assert of_case(after, case_id) == [], case_id
    unmended = {case.id for case in checked.cases} - mended
    for case_id in unmended - {"label-in-two-formats", "image-in-two-formats"}:  # one of the two is left behind
        assert of_case(after, case_id) == of_case(checked, case_id)
    assert of_case(after, "nan-alone") == ["not finite"]


def test_a_turned_label_comes_back_voxel_by_voxel(repaired, folder):
    for case_id in ("flipped-label", "swapped-label-axes"):
        seed = [*corpus.GOOD, *corpus.SPOILT].index(case_id)
        label = read(folder / "fixed" / "labels" / f"{case_id}.nii.gz")
        np.testing.assert_array_equal(label.data, corpus.Writer(folder, case_id, seed).label)
        np.testing.assert_allclose(label.affine, corpus.AFFINE, atol=1e-4)


def test_a_copy_has_no_way_back_into_the_input(repaired, folder):
    """No folder of it is a link, so that what is written below it stays in it."""
    links = [path for path in (folder / "fixed").rglob("*") if path.is_symlink()]
    assert len(links) > 100
    assert not [path for path in links if path.is_dir()]
    assert (folder / "fixed" / "inside" / "label-of-floats-among-slices" / "slice003.dcm").is_symlink()
    assert not (folder / "fixed" / "inside" / "label-of-floats-among-slices" / "seg" / "label.nii.gz").is_symlink()


@pytest.fixture
def of_floats(small):
    """Three cases whose labels are of floats, checked."""
    manifest, root, kept = small
    for case_id in ("one", "two", "three"):
        writer = corpus.Writer(root, case_id, 0)
        writer.nifti("label", np.asarray(nib.load(writer.path("label")).dataobj).astype(np.float32))
    return check(manifest, root, workers=1, kept=kept), manifest, root


def test_a_stopped_fix_is_finished_and_nothing_is_mended_twice(of_floats, tmp_path, monkeypatch):
    checked, manifest, root = of_floats
    mended = []

    def counted(job, stop=None):
        if job.case.id == stop:
            raise KeyboardInterrupt
        mended.append(job.case.id)
        return mend(job)

    mend = fix_module._mend
    monkeypatch.setattr(fix_module, "_mend", lambda job: counted(job, stop="three"))
    with pytest.raises(KeyboardInterrupt):
        fix(checked, manifest, root, tmp_path / "fixed")
    with (tmp_path / "fixed" / "repairs.csv").open("a") as stream:
        stream.write("thr")  # cut short
    monkeypatch.setattr(fix_module, "_mend", counted)
    repairs = fix(checked, manifest, root, tmp_path / "fixed")
    assert [repair.case for repair in repairs] == ["one", "three", "two"]
    assert sorted(mended) == ["one", "three", "two"]
    with (tmp_path / "fixed" / "repairs.csv").open(encoding="utf-8") as stream:
        assert [(row["case"], row["mended"]) for row in csv.DictReader(stream)] == [("one", "label type"), ("three", "label type"), ("two", "label type")]
    assert not (tmp_path / "fixed" / "labels" / "two.nii.gz").is_symlink()

    corpus.Writer(root, "two", 1).both()
    now = check(manifest, root, workers=1, kept=tmp_path / "kept")
    with pytest.raises(UserError, match="before they changed"):
        fix(now, manifest, root, tmp_path / "fixed")


def test_files_that_cannot_be_mended_are_told_when_all_others_are(of_floats, tmp_path):
    checked, manifest, root = of_floats
    (root / "labels" / "one.nii.gz").write_bytes(b"gone meanwhile")

    with pytest.raises(UserError, match=r"1 files could not be mended, .*one\.nii\.gz \(ReadFault: .* all others are"):
        fix(checked, manifest, root, tmp_path / "fixed", workers=2)
    assert read(tmp_path / "fixed" / "labels" / "two.nii.gz").data.dtype == np.uint8
    assert read(root / "labels" / "two.nii.gz").data.dtype == np.float32


def test_fix_writes_nothing_behind_a_link(of_floats, tmp_path, monkeypatch):
    checked, manifest, root = of_floats
    before = snapshot(root)
    monkeypatch.setattr(fix_module, "_claim", lambda out, *_: out.mkdir() or (out / "labels").symlink_to(root / "labels"))
    with pytest.raises(UserError, match="leads out of"):
        fix(checked, manifest, root, tmp_path / "fixed")
    assert snapshot(root) == before


def test_fix_overwrites_nothing(checked, manifest, folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, folder / "data", folder / "data" / "out", folder):
        with pytest.raises(UserError, match="--fix"):
            fix(checked, manifest, folder / "data", out)
    assert (tmp_path / "mine.txt").read_text() == "mine"
