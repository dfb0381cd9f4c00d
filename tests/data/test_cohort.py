"""Many cases: each by itself, again only what changed, whatever fails or is killed."""

import hashlib
import importlib.util
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from filelock import FileLock
from monai.data import MetaTensor
from monai.transforms import Spacing

from homelib import UserError, paths
from homelib.data import cohort
from homelib.data.cohort import case_path, open_all, prepare_all
from homelib.data.layouts import find_cases
from homelib.data.manifest import Case, load_manifest
from homelib.data.prepare import VERSION, Preparation, sha256_of

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)

SETTINGS = Preparation(spacing_mm=(12.0, 12.0, 12.0))
KILLS = int(os.environ.get("HOMELIB_TEST_KILLS", "3"))  # of all processes of a preparation; HOMELIB_TEST_KILLS=10 for more


@pytest.fixture
def cases(phantoms, tmp_path):
    """Four small labelled cases that differ."""
    found = []
    first = phantoms["phantom-a"]
    image, label = nib.load(first.image), nib.load(first.label)
    for number in range(4):
        paths = []
        for role, volume in (("image", image), ("label", label)):
            paths.append(tmp_path / "raw" / f"case-{number}-{role}.nii")
            paths[-1].parent.mkdir(exist_ok=True)
            data = np.asarray(volume.dataobj) + (number if role == "image" else 0)
            nib.save(nib.Nifti1Image(data.astype(np.int16), volume.affine), paths[-1])
        found.append(replace(first, id=f"case-{number}", image=paths[0], label=paths[1]))
    return found


def run(cases, folder, **how):
    return prepare_all(cases, folder, SETTINGS, progress=False, **how)


def states(outcomes):
    return [outcome.state for outcome in outcomes]


def contents(folder):
    """Every finished case's file by name, as bytes; one that is being written is hidden."""
    return {path.name: path.read_bytes() for path in folder.glob("*.zip") if not path.name.startswith(".")}


def test_every_case_has_its_file_and_its_line(cases, tmp_path):
    outcomes = run(cases, tmp_path / "out")
    assert states(outcomes) == ["prepared"] * 4
    told = pd.read_csv(tmp_path / "out" / "cases.csv", keep_default_na=False)
    assert told.to_dict("list") == {"case": [case.id for case in cases], "state": ["prepared"] * 4, "message": [""] * 4}
    for case, prepared in zip(cases, open_all(cases, tmp_path / "out"), strict=True):
        assert prepared.case == case
        assert prepared.spacing_mm == SETTINGS.spacing_mm
        assert np.asarray(prepared.image).shape == np.asarray(prepared.label).shape


def test_the_same_inputs_give_the_same_bytes_in_one_process_and_in_several(cases, tmp_path):
    run(cases, tmp_path / "one")
    assert states(run(cases, tmp_path / "two", workers=2)) == ["prepared"] * 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_process_that_prepares_waits_for_neither_pytorch_nor_monai(cases, tmp_path):
    (tmp_path / "job.py").write_text(ALONE)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((cases[:1], tmp_path / "out", SETTINGS)))
    done = subprocess.run([sys.executable, tmp_path / "job.py", tmp_path / "job.pickle"], capture_output=True, text=True)
    assert done.stdout.strip() == "['prepared'] []", done.stderr


ALONE = """
import pickle, sys
from homelib.data.cohort import prepare_all
cases, folder, settings = pickle.load(open(sys.argv[1], "rb"))
print([outcome.state for outcome in prepare_all(cases, folder, settings, progress=False)], sorted({"torch", "monai", "pandas"} & set(sys.modules)))
"""


def test_a_second_run_does_nothing(cases, tmp_path, monkeypatch):
    run(cases, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.zip")}
    monkeypatch.setattr(cohort, "sha256_of", lambda path: pytest.fail(f"{path} was read again"))
    assert states(run(cases, tmp_path / "out")) == ["unchanged"] * 4
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.zip")}


def test_only_what_changed_is_done_again(cases, tmp_path):
    run(cases, tmp_path / "out")
    before = contents(tmp_path / "out")
    image = nib.load(cases[1].image)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(7), image.affine), cases[1].image)
    os.utime(cases[2].image, ns=(1, 1))  # touched, the same bytes
    case_path(tmp_path / "out", "case-3").write_bytes(b"spoilt")
    assert states(run(cases, tmp_path / "out")) == ["unchanged", "prepared", "unchanged", "prepared"]
    after = contents(tmp_path / "out")
    assert [before[name] == after[name] for name in sorted(before)] == [True, False, True, True]


def test_other_settings_are_done_again(cases, tmp_path):
    run(cases[:1], tmp_path / "out")
    for settings in (Preparation(spacing_mm=(11.0,) * 3), Preparation(spacing_mm=(12.0,) * 3, labels="linear"), Preparation(intensity="scaled")):
        assert states(prepare_all(cases[:1], tmp_path / "out", settings, progress=False)) == ["prepared"]
    assert len(contents(tmp_path / "out")) == 1


def test_without_a_low_pass_an_image_is_interpolated_linearly_alone(cases, tmp_path):
    """Which is kept with the case; the default's mark is as it was before there was a choice, so that nothing is prepared anew for it."""
    plain = SETTINGS.model_copy(update={"low_pass": False})
    assert states(run(cases[:1], tmp_path / "out")) == ["prepared"]
    (smooth,) = open_all(cases[:1], tmp_path / "out")
    manifest = load_manifest(cases[0].manifest)
    classes = [[name, list(values)] for name, values in manifest.classes.items()]
    files = [sha256_of(cases[0].image), sha256_of(cases[0].label)]
    told = [VERSION, 2, files, classes, manifest.intensity_window, SETTINGS.spacing_mm, "nearest", "kept"]
    assert smooth.fingerprint == hashlib.sha256(json.dumps(told).encode()).hexdigest()
    smooth = np.asarray(smooth.image)
    assert states(prepare_all(cases[:1], tmp_path / "out", plain, progress=False)) == ["prepared"]
    (case,) = open_all(cases[:1], tmp_path / "out")
    assert not case.low_pass
    expected = Spacing(SETTINGS.spacing_mm, mode="bilinear", padding_mode="border")(MetaTensor(*map(np.asarray, read_image(cases[0].image))))[0].numpy()
    first = np.linalg.solve(case.native_affine, case.affine)[:3, 3] * np.diag(case.native_affine)[:3] / 12
    box = tuple(slice(round(start), round(start) + n) for start, n in zip(first, case.image.shape, strict=True))
    np.testing.assert_allclose(np.asarray(case.image), expected[box], atol=0.05)
    assert np.asarray(case.image).std() > smooth.std() + 1


def read_image(path):
    image = nib.load(path)
    return np.asarray(image.dataobj, np.float32)[None], image.affine


def test_a_header_whose_voxels_lie_in_another_file_changes_with_it(cases, tmp_path):
    image = tmp_path / "raw" / "scan.mhd"
    sitk.WriteImage(sitk.ReadImage(str(cases[0].image)), str(image))
    detached = [replace(cases[0], image=image)]
    assert states(run(detached, tmp_path / "out")) == ["prepared"]
    assert states(run(detached, tmp_path / "out")) == ["unchanged"]
    voxels = np.fromfile(image.with_suffix(".raw"), np.int16)
    (voxels + 7).tofile(image.with_suffix(".raw"))
    assert states(run(detached, tmp_path / "out")) == ["prepared"]


def test_masks_under_other_names_are_prepared_anew(tmp_path):
    """The label map alone says which mask is which value: two names that were mixed up are put right in it."""
    corpus.Writer(tmp_path / "data", "one", 0).masks()
    manifest, found = tmp_path / "corpus.yaml", []
    for names in ("{1: liver, 2: cyst, 5: spleen}", "{1: spleen, 2: cyst, 5: liver}"):
        manifest.write_text(corpus.MANIFEST.replace("{1: liver, 2: cyst, 5: spleen}", names))
        cases = find_cases(load_manifest(manifest), tmp_path / "data").cases
        assert states(prepare_all(cases, tmp_path / "out", progress=False)) == ["prepared"]
        found.append(np.asarray(open_all(cases, tmp_path / "out")[0].label))
    assert not np.array_equal(*found)


def test_a_folder_of_masks_is_prepared_whatever_bytes_are_in_its_names(tmp_path):
    folder = corpus.Writer(tmp_path / "data", "one", 0).masks() / "segmentations"
    (folder / "rib.nii.gz").rename(folder / os.fsdecode(b"rippe-\xfc.nii.gz"))
    (tmp_path / "corpus.yaml").write_text(corpus.MANIFEST)
    cases = find_cases(load_manifest(tmp_path / "corpus.yaml"), tmp_path / "data").cases
    assert states(prepare_all(cases, tmp_path / "out", progress=False)) == ["prepared"]


@pytest.mark.parametrize("changed", ["classes: {liver: [1], spleen: [5]}", "classes: {spleen: [5], liver: [1, 2]}", "intensity_window: [-100, 240]"])
def test_cases_that_were_prepared_for_another_manifest_are_refused(changed, tmp_path):
    """A class that was merged or moved since would be learnt under another's index, and nothing would show it."""
    corpus.Writer(tmp_path / "data", "one", 0).both()
    manifest = tmp_path / "corpus.yaml"
    manifest.write_text(corpus.MANIFEST)
    cases = find_cases(load_manifest(manifest), tmp_path / "data").cases
    prepare_all(cases, tmp_path / "out", Preparation(intensity="scaled"), progress=False)
    open_all(cases, tmp_path / "out")
    field = changed.split(":")[0]
    manifest.write_text("\n".join(changed if line.startswith(field) else line for line in corpus.MANIFEST.splitlines()))
    with pytest.raises(UserError, match=r"one\.zip: was prepared with other classes, or another window, than .*corpus\.yaml has now\. Prepare the data again"):
        open_all(cases, tmp_path / "out")
    prepare_all(cases, tmp_path / "out", Preparation(intensity="scaled"), progress=False)
    open_all(cases, tmp_path / "out")


def test_healthy_cases_are_prepared_where_a_label_may_be_empty(tmp_path):
    """And are told by name where it may not, before and after they were prepared."""
    healthy, strange = corpus.Writer(tmp_path / "data", "healthy", 0), corpus.Writer(tmp_path / "data", "strange", 1)
    healthy.both(label=np.zeros_like(healthy.label))
    strange.both(label=np.full_like(strange.label, 9))  # whatever it is, it is not nothing
    corpus.Writer(tmp_path / "data", "with", 2).both()
    manifest = tmp_path / "corpus.yaml"
    found = []
    for line in ("", "may_be_empty: true", ""):
        manifest.write_text(f"{corpus.MANIFEST}{line}")
        cases = find_cases(load_manifest(manifest), tmp_path / "data").cases
        outcomes = prepare_all(cases, tmp_path / "out", progress=False)
        found.append(states(outcomes))
        assert "no voxel of any class" in outcomes[1].message
        if line:
            case = open_all(cases[:1], tmp_path / "out")[0]
            assert case.places.counts == {}
            assert not np.asarray(case.label).any()
        else:
            assert "may_be_empty: true" in outcomes[0].message
    assert found == [["failed", "failed", "prepared"], ["prepared", "failed", "unchanged"], ["failed", "failed", "unchanged"]]


def test_what_is_known_of_the_inputs_outlives_a_kill(cases, tmp_path, monkeypatch):
    """It is written now and then, and not at the end alone."""
    one, seen = cohort._one, []

    def watched(job):
        stamps = tmp_path / "out" / cohort._STAMPS
        seen.append(len(json.loads(stamps.read_text())) if stamps.exists() else 0)
        return one(job)

    monkeypatch.setattr(cohort, "_one", watched)
    monkeypatch.setattr(cohort, "SAVED_EVERY_SECONDS", -1)
    run(cases, tmp_path / "out")
    assert seen == [0, 2, 4, 6]  # files, two a case


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_case_is_told_and_the_others_are_done(cases, tmp_path, workers):
    cases[0].image.write_bytes(cases[0].image.read_bytes()[:1000])
    cases[1].label.unlink()
    cases[2] = replace(cases[2], label=cases[1].image)  # an image in place of a label
    outcomes = run(cases, tmp_path / "out", workers=workers)
    assert states(outcomes) == ["failed", "failed", "failed", "prepared"]
    for outcome, name in zip(outcomes, ("case-0-image.nii", "case-1-label.nii", "case-1-image.nii"), strict=False):
        assert name in outcome.message
        assert "\n" not in outcome.message
    assert [path.name for path in (tmp_path / "out").glob("*.zip")] == ["case-3.zip"]


def test_labels_outside_the_body_are_told_of_each_time(cases, tmp_path):
    image, label = nib.load(cases[0].image), nib.load(cases[0].label)
    values, marks = np.asarray(image.dataobj).copy(), np.asarray(label.dataobj).copy()
    values[:5], marks[:5], marks[:5, 3, 3] = -1000, 0, marks.max()  # five labelled voxels in the air
    nib.save(nib.Nifti1Image(values, image.affine), cases[0].image)
    nib.save(nib.Nifti1Image(marks, label.affine), cases[0].label)
    for state in ("prepared", "unchanged"):
        first, *others = run(cases, tmp_path / "out")
        assert first.state == state
        assert f"{cases[0].label}: found 5 of " in first.message
        assert [other.message for other in others] == [""] * 3
    told = pd.read_csv(tmp_path / "out" / cohort.TOLD)
    assert told["message"].notna().tolist() == [True, False, False, False]


def test_a_fault_that_nobody_thought_of_stops_no_other_case(cases, tmp_path, monkeypatch):
    original = cohort.prepare_into

    def faulty(path, case, *rest, **how):
        if case.id == "case-1":
            raise ZeroDivisionError("by nought")
        original(path, case, *rest, **how)

    monkeypatch.setattr(cohort, "prepare_into", faulty)
    outcomes = run(cases, tmp_path / "out")
    assert states(outcomes) == ["prepared", "failed", "prepared", "prepared"]
    assert "ZeroDivisionError: by nought" in outcomes[1].message


WORKERS = """
import pickle, sys
from homelib.data.cohort import prepare_all
if __name__ == "__main__":
    cases, folder, settings = pickle.load(open(sys.argv[1], "rb"))
    print([outcome.state for outcome in prepare_all(cases, folder, settings, workers=2, progress=False)])
"""


@pytest.fixture
def stuck(cases, tmp_path):
    """A preparation in two workers, one of which reads a named pipe that nobody writes to, so that it can be killed at its work."""
    pipe = tmp_path / "pipe.nii"
    os.mkfifo(pipe)
    (tmp_path / "job.py").write_text(WORKERS)
    jobs = [replace(cases[0], id="stuck", image=pipe), *cases[:2]]
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((jobs, tmp_path / "out", SETTINGS)))
    process = subprocess.Popen([sys.executable, tmp_path / "job.py", tmp_path / "job.pickle"], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def wait_for(found, seconds=240):  # a machine that is at work on other things starts a process late
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return result


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the worker to kill")
def test_a_case_that_kills_its_process_is_told_and_the_others_are_done(stuck):
    """The worker is killed at the case, and again when the case is tried alone; no other case is lost with it."""

    def ended():
        for child in reading(stuck.pid):
            os.kill(child, signal.SIGKILL)
        return stuck.poll() is not None

    wait_for(ended)
    assert stuck.stdout.read().strip() == "['failed', 'prepared', 'prepared']"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the workers")
def test_workers_end_with_the_process_that_started_them(stuck):
    (worker, *_) = wait_for(lambda: reading(stuck.pid))
    stuck.kill()
    stuck.wait()
    wait_for(lambda: not os.path.exists(f"/proc/{worker}"), 20)


def reading(ancestor: int) -> list[int]:
    """Processes below another one that wait for a named pipe to be opened (Linux)."""
    return [process for process in below(ancestor) if told(process, "wchan") in ("wait_for_partner", "fifo_open")]


def below(ancestor: int) -> list[int]:
    """Processes that another one has started, and those that these have (Linux)."""
    parents = {int(entry): int(stat.rsplit(")", 1)[1].split()[1]) for entry in os.listdir("/proc") if entry.isdigit() and (stat := told(entry, "stat"))}
    found, left = [], [ancestor]
    while left:
        children = [child for child, parent in parents.items() if parent == left[0]]
        found, left = found + children, left[1:] + children
    return found


def told(process: int | str, what: str) -> str:
    try:
        return open(f"/proc/{process}/{what}").read()
    except OSError:  # it has ended
        return ""


# ---------------------------------------------------------------- killed


def test_killed_at_ten_random_moments_nothing_finished_is_lost_and_the_end_is_the_same(cases, tmp_path):
    """A process that does nothing but prepare is killed, again and again, a little later each time after it has begun."""
    many = [replace(case, id=f"{case.id}-{copy}") for copy in range(5) for case in cases]
    run(many, tmp_path / "undisturbed")
    script, told, out = tmp_path / "job.py", tmp_path / "job.pickle", tmp_path / "out"
    script.write_text(FORKED)
    told.write_bytes(pickle.dumps((many, out, SETTINGS)))
    seconds = random.Random(0)
    host = subprocess.Popen([sys.executable, script, told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finished: dict[str, bytes] = {}
    cut_short = 0
    for _ in range(10):
        host.stdin.write("go\n")
        host.stdin.flush()
        victim = int(host.stdout.readline())
        time.sleep(seconds.uniform(0.0, 0.15))
        os.kill(victim, signal.SIGKILL)
        assert host.stdout.readline().strip() in ("-9", "0")
        now = contents(out)
        assert finished.items() <= now.items()  # what was finished is there, as it was
        finished = now
        cut_short += len(now) < len(many)
    host.stdin.close()
    host.wait()
    assert cut_short >= 3
    run(many, out)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not [path.name for path in out.iterdir() if paths._PART.fullmatch(path.name)]


# A process that has imported everything and starts, for each line on its input, a copy of itself that prepares: so a kill falls into the work.
FORKED = """
import os, pickle, sys
from homelib.data.cohort import prepare_all
import torch
torch.set_num_threads(1)
cases, folder, settings = pickle.load(open(sys.argv[1], "rb"))
for _ in sys.stdin:
    child = os.fork()
    if not child:
        prepare_all(cases, folder, settings, progress=False)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc for the workers")
@pytest.mark.long
def test_killed_with_all_its_workers_nothing_finished_is_lost_and_the_end_is_the_same(cases, tmp_path):
    """Each time at a random moment after the work has begun; sometimes a worker alone, which the others make up for."""
    many = [replace(case, id=f"{case.id}-{copy}") for copy in range(6 * KILLS) for case in cases]
    out, rng = tmp_path / "out", random.Random(KILLS)
    run(many, tmp_path / "undisturbed", workers=2)
    (tmp_path / "job.py").write_text(WORKERS)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps((many, out, SETTINGS)))
    finished: dict[str, bytes] = {}
    cut_short = 0
    for number in range(KILLS):
        process = subprocess.Popen([sys.executable, tmp_path / "job.py", tmp_path / "job.pickle"], stdout=subprocess.DEVNULL)
        wait_for(lambda process=process, before=finished: len(contents(out)) > len(before) or process.poll() is not None)
        time.sleep(rng.uniform(0.0, 0.2))
        if number % 2 and (workers := below(process.pid)):
            os.kill(rng.choice(workers), signal.SIGKILL)
            time.sleep(rng.uniform(0.0, 0.2))
        workers = below(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda workers=workers: not any(os.path.exists(f"/proc/{worker}") for worker in workers))
        now = contents(out)
        assert finished.items() <= now.items()  # what was finished is there, as it was
        finished = now
        cut_short += len(now) < len(many)
    assert cut_short >= KILLS - 1
    run(many, out, workers=2)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not [path.name for path in out.iterdir() if paths._PART.fullmatch(path.name)]


# ---------------------------------------------------------------- names, and who is at work


def test_two_cases_of_one_name_are_refused_before_anything_is_done(cases, tmp_path):
    with pytest.raises(UserError, match="cases: found case-0 more than once"):
        run([cases[0], cases[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../evil", "a/b", "Fall Äpfel", "x" * 400, ".hidden", "latin-\udcfc", ""])
def test_a_case_of_any_name_has_a_plain_file_in_the_folder(name, tmp_path):
    path = case_path(tmp_path, name)
    assert path.parent == tmp_path
    assert path.name.isascii()
    assert not path.name.startswith(".")
    assert len(path.name) < 120
    assert len({case_path(tmp_path, other) for other in ("a/b", "a_b", "a b", "a:b")}) == 4


def test_a_second_preparation_of_a_folder_waits_for_nothing(cases, tmp_path):
    run([], tmp_path / "out")
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another preparation is at work there"):
        run(cases, tmp_path / "out")


def test_a_folder_with_other_files_is_left_as_it_is(cases, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "case-0.zip").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"out: holds case-0\.zip, expected an empty folder or one of prepared cases"):
        run(cases, tmp_path / "out")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"mine"]


def test_a_file_of_another_case_is_refused(cases, tmp_path):
    """Where small and capital letters are one to the disk, `Case-0` and `case-0` have one file."""
    run(cases[:1], tmp_path / "out")
    (tmp_path / "out" / "case-0.zip").rename(tmp_path / "out" / "Case-0.zip")
    with pytest.raises(UserError, match=r"Case-0\.zip: holds the case case-0, expected Case-0"):
        open_all([replace(cases[0], id="Case-0")], tmp_path / "out")


def test_a_case_that_was_never_prepared_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nobody\.zip: no prepared case \(FileNotFoundError\)"):
        open_all([Case("nobody", tmp_path, None, "CT", "REF", "demo_ct")], tmp_path)
