"""The command line: a user's mistake is one line on stderr and exit status 2, and smoke goes from training to a prediction."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml

from homelib import Settings, cli
from homelib.data.demo import DemoData
from homelib.data.prepare import prepare
from homelib.run.checkpoint import trained_network
from homelib.run.folder import Run
from homelib.run.predict import predict_probabilities, to_native
from homelib.study.workbook import Executed

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------- help


def python(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"}
    )


def test_help_answers_at_once_without_pytorch_or_monai():
    code = (
        "import atexit, sys; from homelib.cli import main; sys.argv = ['home', '--help']\n"
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'monai', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules))))\n"
        "main()"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    for command in ("doctor", "demo", "data", "train", "predict", "evaluate", "routing", "compare", "export", "tables"):
        assert re.search(rf"^\W*{command}\b", done.stdout, re.MULTILINE), command


def test_a_mistake_has_exit_status_2_and_one_line_in_a_process_of_its_own():
    done = python("from homelib.cli import main; main()", "data", "fetch", "brats")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("home: data set 'brats' is unknown; nearest: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["doctor", "demo", "data", "data list", "data show", "data fetch", "data check", "data cases", "data import", "data prepare", "data plan"]
    + ["train", "predict", "evaluate", "routing", "compare", "export", "tables"],
)
def test_every_command_has_help(home, command):
    status, out, _ = home(*command.split(), "--help")
    assert status == 0
    assert f"home {command}" in out


def test_nothing_asked_shows_the_commands(home):
    _, out, err = home()
    assert "doctor" in out + err


def test_an_unknown_command_or_option_is_refused(home):
    for arguments in (["trian"], ["train", "x", "--profil", "smoke"], ["train"]):
        status, out, err = home(*arguments)
        assert status == 2
        assert "Traceback" not in out + err


# ---------------------------------------------------------------- doctor and data


def test_doctor_names_versions_device_and_backend(home):
    status, out, _ = home("doctor")
    assert status == 0
    for told in ("torch", "homelib", "numba", "triton", "mamba_ssm", "causal convolution", "cache", "runs"):
        assert re.search(rf"^  {told} +\S", out, re.MULTILINE), told


def test_data_list_names_every_manifest(home):
    status, out, _ = home("data", "list")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()} == {path.stem for path in (ROOT / "data_manifests").glob("*.yaml")}


def test_data_show_prints_a_manifest(home):
    status, out, _ = home("data", "show", "demo_ct")
    assert status == 0
    for told in ("inferior_vena_cava:", "licence:", "label_origin: MODEL", "label_origin: UNSTATED"):
        assert told in out


def test_data_show_of_an_unknown_manifest_is_one_line(mistake):
    assert "demo_ct" in mistake("data", "show", "demo_cd")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here to write to")
def test_a_full_disk_is_one_line(mistake, monkeypatch):
    def full(name):
        with open("/dev/full", "w") as stream:
            stream.write("no room for it")

    monkeypatch.setattr("homelib.data.manifest.load_manifest", full)
    assert mistake("data", "show", "demo_ct") == "a file: No space left on device. Choose another place, or make room there."


def test_data_fetch_of_an_unknown_name_is_one_line(mistake):
    assert mistake("data", "fetch", "brats").startswith("data set 'brats' is unknown; nearest: ")


@pytest.mark.parametrize(("real", "status"), [(True, 0), (False, 1)], ids=["fetched", "phantoms"])
def test_data_fetch_says_what_is_there_and_fails_where_it_is_not_real(home, monkeypatch, own_cache, real, status):
    monkeypatch.setattr("homelib.data.demo.fetch_demo", lambda: DemoData({}, real=real, message="ct-a: told [so]."))
    more = "".join(f"To look at: home data check {name} {own_cache / 'demo' / name}\n" for name in ("demo_ct", "demo_mr_spine")) if real else ""
    assert home("data", "fetch", "demo") == (status, f"ct-a: told [so].\ncache: {own_cache}\n{more}", "")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "training.step=3"], r"^training\.step: no such field; did you mean training\.steps\?"),
        (["--set", "training.steps=many"], r"^training\.steps: found 'many'"),
        (["--set", "training.steps=-1"], r"^training\.steps: found -1"),
        (["--set", "training.steps"], r"^--set: found 'training\.steps', expected name=value"),
        (["--set", "training.steps=[1"], r"^--set: found 'training\.steps=\[1', whose value cannot be read"),
        (["--set", "training=3"], r"^training: no such field"),
        (["--set", "model.channels=[4, 4]"], r"^model\.channels"),
        (["--set", "data.manifest=demo_us_phantom"], r"^data\.manifest: found 'demo_us_phantom', expected demo_ct"),
        (["--set", "data.manifest=demo_cd"], r"demo_cd.*demo_ct"),
        (["--profile", "smok"], r"^profile: found 'smok'.*did you mean smoke\?"),
        (["--direction", "a-to-b"], r"^direction: found 'a-to-b', expected one of a-to-c, c-to-a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_training_is_refused_in_one_line_and_leaves_no_folder(mistake, tmp_path, arguments, told):
    profile = [] if "--profile" in arguments else ["--profile", "smoke"]
    assert re.search(told, mistake("train", tmp_path / "run", *profile, *arguments))
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_one_line(mistake, run, phantoms, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert mistake("train", file / "run", "--profile", "smoke").startswith(f"{file / 'run'}: Not a directory")
    assert mistake("demo", "--profile", "smoke", "--out", file).startswith(f"{file}: File exists")
    assert mistake("predict", run, phantoms["phantom-a"].image, "--out", file / "labels.nii.gz").startswith(f"{file}")


@pytest.mark.parametrize("command", ["evaluate", "tables"])
def test_a_folder_without_a_run_is_one_line(mistake, tmp_path, command):
    assert mistake(command, tmp_path).startswith(f"{tmp_path}: no settings.json there, expected a run folder")


def test_a_demo_of_an_unknown_profile_is_refused_before_anything_is_fetched_or_run(mistake, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("it went on")

    monkeypatch.setattr("homelib.data.demo.fetch_demo", never)
    monkeypatch.setattr("homelib.study.workbook.run_workbook", never)
    assert mistake("demo", "--profile", "lapptop", "--out", tmp_path / "demo").startswith("profile: found 'lapptop'")
    assert not (tmp_path / "demo").exists()


def test_a_demo_of_an_unknown_notebook_is_one_line(mistake, tmp_path):
    assert mistake("demo", "--profile", "smoke", "--only", "99", "--out", tmp_path / "demo").startswith(
        "notebooks: none begins with 99; there are 00_start_here"
    )


@pytest.mark.parametrize(("error", "status"), [(None, 0), ("cell 3: ValueError: no [/such] thing", 1)], ids=["well", "failed"])
def test_the_demos_exit_status_says_whether_all_notebooks_ended_well(home, monkeypatch, tmp_path, error, status):
    asked = {}

    def run_workbook(folder, parameters, *, only):
        asked.update(parameters, only=only)
        return [Executed("02_model_walkthrough", folder / "02.ipynb", folder / "02.html", 60.0, error)]

    monkeypatch.setattr("homelib.study.workbook.run_workbook", run_workbook)
    ended, out, _ = home("demo", "--profile", "smoke", "--only", "02", "--out", tmp_path / "demo")
    assert ended == status
    assert (error or "ok") in out
    assert str(tmp_path / "demo" / "02.html") in out
    assert asked == {"profile": "smoke", "folder": str(tmp_path / "demo"), "only": ["02"]}


# ---------------------------------------------------------------- the way through


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained by `home train`, c-to-a, three steps."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        command = ["home", "train", folder, "--profile", "smoke", "--direction", "c-to-a", "--set", "training.steps=3", "--set", "training.accelerator=cpu"]
        patch.setattr(sys, "argv", [*map(str, command)])
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code  # noqa: PT017  typer ends every command this way
    return folder


def test_train_leaves_a_complete_run_of_what_was_asked(run):
    settings = Settings.load(run / "settings.json")
    assert (settings.training.steps, settings.training.accelerator) == (3, "cpu")
    assert (settings.data.train_cases, settings.data.test_cases) == (("phantom-c",), ("phantom-a",))
    assert {"settings.json", "status.json", "history.csv", "last.ckpt", "best.safetensors"} <= {path.name for path in run.iterdir()}
    assert len(pd.read_csv(run / "history.csv")) == 3


def test_train_again_goes_on_and_with_other_settings_is_refused(run, home, mistake):
    before = (run / "best.safetensors").read_bytes()
    same = ["--profile", "smoke", "--direction", "c-to-a", "--set", "training.accelerator=cpu", "--set"]
    status, out, _ = home("train", run, *same, "training.steps=3")
    assert status == 0
    assert "3 steps" in out
    assert "SYNTHETIC" in out
    assert f"home evaluate {run}" in out
    assert "holds a run with other settings (training.steps was 3, is 4)" in mistake("train", run, *same, "training.steps=4")
    assert (run / "best.safetensors").read_bytes() == before


def test_evaluate_and_tables_print_the_same_numbers_for_the_right_patients(run, home, mistake):
    if not (run / "metrics.csv").exists():
        assert f"`home evaluate {run}` writes it" in mistake("tables", run)
    status, evaluated, _ = home("evaluate", run)
    assert status == 0
    status, shown, _ = home("tables", run)
    assert status == 0
    assert shown == evaluated
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics.groupby("role")["case"].unique().map(list).to_dict() == {"test": ["phantom-a"], "train": ["phantom-c"]}
    rows = metrics.query("role == 'test' and metric == 'dice' and method == 'MambaHoME'")
    mean = next(line for line in shown.splitlines() if line.startswith("│ mean"))
    assert [cell.strip() for cell in mean.split("│")][2:4] == [str(rows["reference_voxels"].sum()), f"{100 * rows['value'].mean():.1f}"]


def test_predict_writes_labels_on_the_scans_own_grid(run, home, phantoms, tmp_path):
    scan = nib.load(phantoms["phantom-a"].image)
    data, affine = np.asarray(scan.dataobj)[::-1, :, 3:], scan.affine @ np.diag([-1, 1, 1, 1])  # stored left to right, of a shape of its own
    affine[:3, 3] = [5, -7, 11]
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "scan.nii.gz")
    status, out, err = home("predict", run, tmp_path / "scan.nii.gz", "--out", tmp_path / "new" / "labels.nii.gz")
    assert status == 0, err
    labels = nib.load(tmp_path / "new" / "labels.nii.gz")
    assert labels.shape == data.shape == (48, 48, 45)
    np.testing.assert_allclose(labels.affine, affine, atol=1e-4)
    assert labels.get_data_dtype() == np.uint8
    names = ("bone", "muscle", "liver", "spleen", "kidneys", "stomach", "aorta", "inferior_vena_cava")
    counts = np.bincount(np.asarray(labels.dataobj).ravel(), minlength=9)
    assert "48x48x45 voxels; " + ", ".join(f"{name} {counts[i]}" for i, name in enumerate(names, start=1)) in out


def test_predict_gives_the_labels_that_python_gives(run, home, phantoms, tmp_path):
    status, _, err = home("predict", run, phantoms["phantom-a"].image, "--out", tmp_path / "labels.nii.gz")
    assert status == 0, err
    settings = Settings.load(run / "settings.json")
    case = prepare(phantoms["phantom-a"], spacing_mm=settings.data.spacing_mm)
    expected = to_native(predict_probabilities(trained_network(Run(run)), case, settings), case)
    assert (np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj) == expected).all()


def test_a_folder_is_predicted_measured_and_not_done_again(run, home, mistake, phantoms, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a", "c"):
        shutil.copy(phantoms[f"phantom-{name}"].image, scans / f"{name}_0000.nii.gz")
    (scans / "bad.nii.gz").write_text("no scan")
    status, told, err = home("predict", run, scans, "--out", out, "--one-piece", "liver")
    assert status == 1, err
    assert "2 predicted, 0 unchanged, 1 failed" in told
    assert f"{scans / 'bad.nii.gz'}: cannot be read" in told
    status, told, _ = home("predict", run, scans / "a_0000.nii.gz", scans / "c_0000.nii.gz", "--out", out, "--one-piece", "liver")
    assert (status, "0 predicted, 2 unchanged, 0 failed" in told) == (0, True)
    assert "of another run or of other settings (prediction)" in mistake("predict", run, scans, "--out", out, "--mirror")
    references = tmp_path / "references"
    references.mkdir()
    for name in ("a", "c"):
        shutil.copy(phantoms[f"phantom-{name}"].label, references / f"{name}.nii.gz")
    status, told, err = home("evaluate", out, references, "--data", "demo_ct", "--convention", "nnunet")
    assert status == 0, err
    assert "convention nnunet" in told
    rows = pd.read_csv(out / "metrics.csv")
    assert set(rows["case"]) == {"a", "c"}
    assert {"dice", "hd95", "nsd_2mm"} <= set(rows["metric"])
    assert "expected scans, or a data set's folder by --root; found neither" in mistake("predict", run)


def test_a_run_is_exported(run, home, mistake, tmp_path):
    status, told, _ = home("export", run, "--to", "hub", "--out", tmp_path / "hub")
    assert (status, told) == (0, f"{tmp_path / 'hub'}: written.\n")
    assert home("export", run, "--to", "hub", "--out", tmp_path / "small", "--bits", 4)[0] == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "hub")]
    assert sizes[0] < sizes[1]
    assert "--to: found 'zip', expected one of bundle, hub, onnx" in mistake("export", run, "--to", "zip")
    assert "--bits: found 12, expected 2 to 8, or 32" in mistake("export", run, "--to", "hub", "--out", tmp_path / "other", "--bits", 12)


def test_predict_refuses_what_is_no_scan(run, mistake, tmp_path):
    text = tmp_path / "notes.nii.gz"
    text.write_text("no scan")
    out = tmp_path / "labels.nii.gz"
    assert mistake("predict", run, tmp_path / "missing.nii.gz", "--out", out).startswith(f"{tmp_path / 'missing.nii.gz'}: no such file")
    assert mistake("predict", run, text, "--out", out).startswith(f"{text}: cannot be read as a 3D image")
    flat = tmp_path / "flat.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((9, 9), np.int16), np.eye(4)), flat)
    assert "expected one 3D volume" in mistake("predict", run, flat, "--out", out)
    assert not out.exists()


def test_predict_leaves_an_existing_file_as_it_is(run, mistake, phantoms, tmp_path):
    out = tmp_path / "labels.nii.gz"
    out.write_text("mine")
    assert "exists already" in mistake("predict", run, phantoms["phantom-a"].image, "--out", out)
    assert out.read_text() == "mine"
    assert mistake("predict", run, phantoms["phantom-a"].image, "--out", tmp_path / "labels.png").startswith(
        "--out: found 'labels.png', expected a name that ends in .nii.gz"
    )


def test_predict_needs_a_trained_run(mistake, phantoms, tmp_path, smoke):
    image, out = phantoms["phantom-a"].image, tmp_path / "labels.nii.gz"
    assert "no settings.json there" in mistake("predict", tmp_path / "nowhere", image, "--out", out)
    (tmp_path / "bare").mkdir()
    smoke.save(tmp_path / "bare" / "settings.json")
    assert "best.safetensors: no such file" in mistake("predict", tmp_path / "bare", image, "--out", out)


def test_damaged_runs_are_one_line(run, mistake, tmp_path):
    (tmp_path / "settings.json").write_text("{")
    assert f"{tmp_path / 'settings.json'}: not JSON" in mistake("evaluate", tmp_path)
    (tmp_path / "settings.json").write_text((run / "settings.json").read_text())
    (tmp_path / "best.safetensors").write_bytes(b"nothing")
    assert "best.safetensors: damaged or no safetensors file" in mistake("evaluate", tmp_path)


# ---------------------------------------------------------------- data sets of one's own


@pytest.fixture
def own_data(tmp_path):
    """A folder of two cases, one with a turned label, and a copy of the template manifest that fits it."""
    root = tmp_path / "data"
    rng = np.random.default_rng(0)
    for case_id in ("one", "two"):
        for folder in ("imagesTr", "labelsTr"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        image = rng.normal(0, 100, (10, 11, 12)).astype(np.float32)
        label = rng.integers(0, 3, (10, 11, 12)).astype(np.uint8)
        flip = np.diag([-1.0, 1, 1, 1])
        flip[0, 3] = 9
        turned = case_id == "two"
        nib.save(nib.Nifti1Image(image, np.eye(4)), root / "imagesTr" / f"{case_id}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label[::-1] if turned else label, flip if turned else np.eye(4)), root / "labelsTr" / f"{case_id}.nii.gz")
    return root


def test_own_data_from_import_to_a_repaired_copy(home, mistake, own_data, tmp_path):
    manifest, root = tmp_path / "mine.yaml", own_data
    assert "Give --modality" in mistake("data", "import", root, "-o", manifest)
    status, out, _ = home("data", "import", root, "-o", manifest, "--modality", "CT")
    assert status == 0, out
    assert "look at: Source, licence" in out
    assert "2 cases, CT; classes " in out
    assert "exists already" in mistake("data", "import", root, "-o", manifest, "--modality", "CT")

    status, out, _ = home("data", "check", manifest, root, "--workers", 1, "--csv", tmp_path / "found.csv", "--fix", tmp_path / "fixed")
    assert status == 1
    assert re.search(r"error +labelsTr/two\.", out)  # the rest of a cell may stand in the next line
    assert "2 cases, 1 error, 0 warnings, 0 notes" in out
    assert "1 files repaired" in out
    assert pd.read_csv(tmp_path / "found.csv")["check"].tolist() == ["label turned"]
    assert "exists already" in mistake("data", "check", manifest, root, "--csv", tmp_path / "found.csv")

    label = tmp_path / "fixed" / "labelsTr" / "two.nii.gz"
    before = label.stat().st_mtime_ns
    status, out, _ = home("data", "check", manifest, root, "--workers", 1, "--fix", tmp_path / "fixed")
    assert (status, "1 files repaired" in out, label.stat().st_mtime_ns) == (1, True, before)  # it was done already
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    status, out, err = home("data", "check", manifest, root, "--fix", tmp_path / "full")
    assert (status, out) == (2, "")  # at once: nothing is read, no finding is shown
    assert err.startswith("home: --fix: ")

    status, out, _ = home("data", "check", manifest, tmp_path / "fixed", "--workers", 1)
    assert status == 0, out
    status, out, _ = home("data", "cases", manifest, root)
    assert status == 0
    assert re.search(r"^one +CT +fold-\d +good$", out, re.MULTILINE)
    assert re.search(r"^two +CT +fold-\d +errors$", out, re.MULTILINE)


def test_a_split_that_cannot_be_made_yet_is_told(home, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "manual_labels").mkdir()
    (tmp_path / "images" / "1_1_0000.nii.gz").touch()
    (tmp_path / "manual_labels" / "1_1.nii.gz").touch()
    status, out, _ = home("data", "cases", "panorama", tmp_path)
    assert status == 0
    assert re.search(r"^1_1 +CT +- +unchecked$", out, re.MULTILINE)
    assert "test_cases.txt: no such file; expected the ids of the test cases" in out


def test_wrong_folders_and_names_of_data_are_one_line(mistake, tmp_path):
    assert "no such folder" in mistake("data", "check", "amos_ct", tmp_path / "gone")
    assert "How to get it: home data show demo_ct" in mistake("data", "check", "demo_ct", tmp_path / "gone")
    assert "amos_ct" in mistake("data", "check", "amos_cd", tmp_path)
    assert "no such folder" in mistake("data", "cases", "amos_ct", tmp_path / "gone")


# ---------------------------------------------------------------- preparing a data set of the user's


@pytest.fixture
def user_data(phantoms, tmp_path, monkeypatch):
    """A folder with a good and a damaged case, and a manifest for it: (manifest, root)."""
    root = tmp_path / "root"
    manifest = yaml.safe_load((ROOT / "data_manifests" / "demo_ct.yaml").read_text())
    manifest |= {"name": "mine", "cases": [], "packages": {}, "contrast_ranges": {}, "patch_voxels": [96, 96, 96]}
    manifest["layouts"] = [{"name": "pairs", "image": "images/{case}.nii.gz", "label": "labels/{case}.nii.gz"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(manifest))
    for case in ("good", "bad"):
        for folder, source in (("images", phantoms["phantom-a"].image), ("labels", phantoms["phantom-a"].label)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{case}.nii.gz").write_bytes(source.read_bytes()[: 2000 if case == "bad" else None])
    return tmp_path / "mine.yaml", root


def test_a_data_set_is_prepared_once_and_a_bad_case_is_told(home, user_data, tmp_path):
    arguments = ["data", "prepare", *user_data, "--out", tmp_path / "out", "--spacing", "12", "12", "12", "--workers", "1"]
    status, out, err = home(*arguments)
    assert status == 1
    assert f"{tmp_path / 'out'}: 1 prepared, 0 unchanged, 1 failed (cases.csv)." in out
    assert "bad.nii.gz: cannot be read as a 3D image" in err
    assert "For training here: 1 prepared cases take " in out
    assert "2 not checked as they are now: look at them before training" in out
    assert home(*arguments, "--no-low-pass")[1].count("1 prepared, 0 unchanged, 1 failed") == 1
    home(*arguments)
    home("data", "check", *user_data, "--workers", "1")
    assert "1 with errors (bad: damaged): look at them before training" in home(*arguments)[1]
    assert "Traceback" not in out + err
    (user_data[1] / "images" / "bad.nii.gz").unlink()
    (user_data[1] / "labels" / "bad.nii.gz").unlink()
    status, out, err = home(*arguments)
    assert (status, "0 prepared, 1 unchanged, 0 failed" in out) == (0, True)


def test_settings_of_a_preparation_that_are_none_are_one_line(mistake, user_data):
    assert mistake("data", "prepare", *user_data, "--labels", "cubic").startswith("labels: found 'cubic'; ")
    assert mistake("data", "prepare", *user_data, "--spacing", "inf", "1", "1").startswith("spacing_mm.0: found inf; ")
    assert mistake("data", "plan", *user_data, "--memory", "nan").startswith("memory: found nan, expected GiB above 0")
    assert mistake("data", "plan", *user_data, "--memory", "0").startswith("memory: found 0, expected GiB above 0")
    assert "no such folder" in mistake("data", "prepare", user_data[0], "/nowhere")


def test_a_plan_stands_beside_the_papers_values(home, user_data):
    (user_data[1] / "images" / "bad.nii.gz").write_bytes(b"")
    status, out, _ = home("data", "plan", *user_data, "--memory", "24")
    assert status == 0
    for text in (
        "left out: ",
        "bad.nii.gz: its header cannot be read",
        "spacing, mm",
        "7 x 7 x 7",
        "4 x 4 x 4",
        "patch, voxels",
        "48 x 48 x 48",
        "96 x 96 x 96",
        "batch, patches",
    ):
        assert text in out


def test_a_data_set_whose_archives_are_not_known_comes_with_the_steps_to_get_it(home, mistake):
    status, out, _ = home("data", "fetch", "amos_ct")
    assert status == 1
    assert "1. " in out
    assert "home data check amos_ct ROOT" in out
    assert mistake("data", "fetch", "amos_ct", "--url", "https://x/y.zip").startswith("checksum: expected one, --sha256 or --md5")
    assert "--into FOLDER" in out


def test_options_of_a_fetch_that_would_be_of_no_effect_are_one_line(mistake, tmp_path):
    assert mistake("data", "fetch", "demo", "--out", tmp_path).startswith("demo: found --out, expected no option: its files are pinned")
    assert mistake("data", "fetch", "demo_ct", "--url", "https://x/y.zip", "--sha256", "0" * 64).startswith("demo_ct: found --url, --sha256, ")
    assert mistake("data", "fetch", "demo_us_phantom", "--md5", "0" * 32).startswith("demo_us_phantom: found --md5, ")
    assert mistake("data", "fetch", "msd_pancreas", "--sha256", "0" * 64).startswith("--sha256: found without --url, ")
    assert mistake("data", "fetch", "panorama", "--into", "images", "--out", tmp_path).startswith("--into: found without --url, ")
    assert mistake("data", "fetch", "panorama", "--url", "https://x/y.zip", "--sha256", "0" * 64, "--into", "../x").startswith("into: found '../x', ")


def test_generated_data_are_written_where_their_layout_finds_them(home, own_cache):
    status, out, _ = home("data", "fetch", "demo_us_phantom")
    root = own_cache / "demo" / "demo_us_phantom"
    assert (status, out) == (0, f"{root}: 2 cases, generated. Next: home data check demo_us_phantom {root}\n")
    status, out, _ = home("data", "check", "demo_us_phantom", root, "--workers", 1)
    assert (status, "2 cases, 0 errors, 0 warnings" in out) == (0, True), out
    assert re.search("planned +. +manifest", home("data", "plan", "demo_us_phantom", root, "--memory", 24)[1])


def test_a_data_set_with_known_archives_is_fetched(home, monkeypatch, tmp_path):
    def fetched(archives, folder):
        asked.append(([archive.name for archive in archives], folder))
        (folder / "files" / "Task07_Pancreas").mkdir(parents=True)
        return folder / "files"

    asked = []
    monkeypatch.setattr("homelib.data.fetch.fetch_archives", fetched)
    url = ("--url", "https://x/batch_2.zip", "--sha256", "0" * 64, "--into", "images")
    assert f"Next: home data check panorama {tmp_path / 'p' / 'files'}\n" in home("data", "fetch", "panorama", *url, "--out", tmp_path / "p")[1]
    asked.clear()
    status, out, _ = home("data", "fetch", "msd_pancreas", "--out", tmp_path)
    assert (status, asked) == (0, [(["Task07_Pancreas.tar"], tmp_path)])
    assert f"Next: home data check msd_pancreas {tmp_path / 'files' / 'Task07_Pancreas'}" in out


def test_two_data_sets_of_one_name_are_prepared_apart(home, user_data, own_cache):
    """By default into the cache: of each folder its own."""
    manifest, root = user_data
    other = root.with_name("other")
    shutil.copytree(root, other)
    for folder in (root, other):
        home("data", "prepare", manifest, folder, "--spacing", "12", "12", "12", "--workers", "1")
    kept = sorted((own_cache / "prepared").glob("mine-*/good.zip"))
    assert len(kept) == 2
