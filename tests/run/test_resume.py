"""Killed, preempted, out of room: a training goes on as if nothing had happened, and refuses what is not its own."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.killing import SETTINGS, kill_and_resume
from homelib import UserError
from homelib.config import override
from homelib.data.memory import Residence, within_reach
from homelib.run import checkpoint, resume
from homelib.run.checkpoint import load_checkpoint
from homelib.run.cohort import cohort
from homelib.run.folder import Run
from homelib.run.resume import as_rows, as_table, check_identity, fingerprint, identity, random_states, set_random_states
from homelib.run.signals import SIGNALS, Stopped, StopRequest
from homelib.run.train import fit

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def short(smoke):
    return override(smoke, {"data.patch_voxels": (16, 16, 32), "training.steps": 6, "training.batch_size": 2})


def same_weights(a: Run, b: Run) -> bool:
    one, other = (load_file(run.weights_file) for run in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- killed


def test_a_training_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(phantoms, tmp_path):
    """SIGKILL at random moments, of steps, of writing, of starting; `python -m benchmarks.killed` does 20 (and more)."""
    told = kill_and_resume(tmp_path, kills=3, seed=0)
    assert told["identical"]
    assert told["unreadable"] == 0
    assert told["killed"] == 3


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_training_with_a_checkpoint_and_it_goes_on(number, short, prepared, tmp_path):
    undisturbed = fit(short, [prepared], tmp_path / "undisturbed", progress=False)
    before = signal.getsignal(number)

    def ask(step, network):
        if step == 2:
            os.kill(os.getpid(), number)
        return {}

    with pytest.raises(Stopped, match=r"asked to stop after step 2; .*last\.ckpt is written"):
        fit(short, [prepared], tmp_path / "run", progress=False, on_validation=ask)
    assert signal.getsignal(number) == before
    run = Run(tmp_path / "run")
    assert run.status["state"] == "stopped"
    assert load_checkpoint(run.checkpoint_file)["step"] == 2
    fit(short, [prepared], tmp_path / "run", progress=False)
    assert same_weights(run, undisturbed)


def test_a_signal_between_validations_is_answered_at_the_next_step(short, prepared, tmp_path, monkeypatch):
    settings = override(short, {"training.validate_every": 6})
    from homelib.run import train

    original = train.train_step

    def step(*arguments, **named):
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return original(*arguments, **named)

    calls: list = []
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(Stopped, match="after step 3"):
        fit(settings, [prepared], tmp_path / "run", progress=False)
    assert len(Run(tmp_path / "run").history) == 3


def test_a_signal_that_ends_the_loading_processes_too_leaves_a_checkpoint(short, prepared, tmp_path, monkeypatch):
    """As a cluster or `timeout` sends it: to every process of the job."""
    undisturbed = fit(short, [prepared], tmp_path / "undisturbed", progress=False)
    from homelib.run import train

    original = train.Feed.steps

    def ended(self, first, end):
        for step, batches in original(self, first, end):
            if step == 3:
                if asked:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
            yield step, batches

    for asked, error in ((False, RuntimeError), (True, Stopped)):
        with monkeypatch.context() as patch:
            patch.setattr(train.Feed, "steps", ended)
            with pytest.raises(error, match="after step 3" if asked else "exited unexpectedly"):
                fit(short, [prepared], tmp_path / "run", progress=False)
    assert load_checkpoint(Run(tmp_path / "run").checkpoint_file)["step"] == 3
    assert same_weights(fit(short, [prepared], tmp_path / "run", progress=False), undisturbed)


@pytest.mark.parametrize("at", [2, 4])
def test_a_validation_that_a_signal_cut_short_is_done_when_the_training_goes_on(at, short, prepared, tmp_path, monkeypatch):
    settings = override(short, {"data.validation_cases": ("phantom-a",), "training.steps": 4})
    undisturbed = fit(settings, [prepared], tmp_path / "undisturbed", validation=[prepared], progress=False)
    from homelib.run import train

    original, calls = train.validate, []

    def cut_short(*arguments, stop, progress):
        calls.append(1)
        if len(calls) == at / 2:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop()
        return original(*arguments, stop=stop, progress=progress)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", cut_short)
        with pytest.raises(Stopped, match=f"after step {at}"):
            fit(settings, [prepared], tmp_path / "run", validation=[prepared], progress=False)
    run = fit(settings, [prepared], tmp_path / "run", validation=[prepared], progress=False)
    assert run.history["validation_dice"].tolist()[1::2] == undisturbed.history["validation_dice"].tolist()[1::2]
    assert run.history["validation_dice"].notna().sum() == 2
    assert same_weights(run, undisturbed)


def test_home_train_says_by_its_exit_status_that_it_was_asked_to_stop(tmp_path):
    command = [sys.executable, "-c", "from homelib.cli import main; main()", "train", str(tmp_path / "run"), "--profile", "smoke"]
    command += ["--set", "training.accelerator=cpu", "--set", "training.steps=100000", "--set", "training.validate_every=100000"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        waited = time.monotonic() + 90
        while not Run(tmp_path / "run").checkpoint_file.exists() and time.monotonic() < waited:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, told
    assert "the same command goes on from there" in told
    assert load_checkpoint(Run(tmp_path / "run").checkpoint_file)["step"] == len(Run(tmp_path / "run").history)


# ---------------------------------------------------------------- disk


def test_a_disk_that_fills_up_is_one_line_and_the_training_goes_on_when_there_is_room(short, prepared, tmp_path, monkeypatch):
    undisturbed = fit(short, [prepared], tmp_path / "undisturbed", progress=False)
    original, calls = checkpoint.save_file, []

    def full(tensors, part, metadata):
        calls.append(1)
        if len(calls) >= 6:  # weights and checkpoint of step 0, of step 2, then of step 4
            part.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensors, part, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match=r"last\.ckpt: no room for .* MiB on the disk; last\.ckpt is as it was"):
            fit(short, [prepared], tmp_path / "run", progress=False)
    run = Run(tmp_path / "run")
    assert load_checkpoint(run.checkpoint_file)["step"] == 2
    fit(short, [prepared], run.folder, progress=False)
    assert same_weights(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.6 MB, where one may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(disk)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small file system can be made here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small file system is made by root, on Linux")
def test_a_disk_that_is_really_full_is_one_line_and_the_last_checkpoint_stays(short, prepared, small_disk):
    """A checkpoint takes 0.7 MB, weights 0.2: the first two of them fit."""
    with pytest.raises(UserError, match=r"no room .*on the disk.*Make room; the same command goes on from there"):
        fit(short, [prepared], small_disk / "run", progress=False)
    run = Run(small_disk / "run")
    assert load_checkpoint(run.checkpoint_file)["step"] in (0, 2)
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".")]


def test_a_history_that_finds_no_room_is_one_line_too(short, prepared, tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("homelib.run.log.History.flush", full)
    with pytest.raises(UserError, match=r"run: no room on the disk"):
        fit(short, [prepared], tmp_path / "run", progress=False)


# ---------------------------------------------------------------- what is gone on with


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before_and_says_so(short, prepared, tmp_path, capsys):
    run = fit(short, [prepared], tmp_path / "run", progress=False)
    kept = run.weights_file.read_bytes()
    run.checkpoint_file.write_bytes(run.checkpoint_file.read_bytes()[:1000])
    fit(short, [prepared], run.folder, progress=False)
    told = capsys.readouterr().out
    assert "last.ckpt: damaged or no checkpoint" in told
    assert "previous.ckpt is used, of step 4" in told
    assert run.weights_file.read_bytes() == kept
    assert run.history["step"].tolist() == list(range(6))


def test_without_any_checkpoint_that_can_be_read_it_is_one_line(short, prepared, tmp_path):
    run = fit(short, [prepared], tmp_path / "run", progress=False)
    for path in (run.checkpoint_file, run.previous_file):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"damaged or no checkpoint.*Delete it"):
        fit(short, [prepared], run.folder, progress=False)


def test_other_data_are_refused_and_told(short, prepared, tmp_path):
    run = fit(short, [prepared], tmp_path / "run", progress=False)
    before = run.checkpoint_file.read_bytes()
    other = replace(prepared, image=prepared.image + 1)
    with pytest.raises(UserError, match=r"last\.ckpt: of another training: 1 cases have other contents \(phantom-a\)\. Give what it was made with"):
        fit(short, [other], run.folder, progress=False)
    stranger = replace(prepared, case=replace(prepared.case, id="stranger"))
    with pytest.raises(UserError, match=r"1 cases were trained on and are not given \(phantom-a\); 1 cases are new \(stranger\)"):
        fit(short, [stranger], run.folder, progress=False)
    assert run.checkpoint_file.read_bytes() == before


def test_what_a_manifest_says_of_loading_and_validation_cases_are_part_of_a_run(ct_set, brief, tmp_path):
    """A window that is edited between a stop and the way on; and a validation case with other contents."""
    path = tmp_path / "own_ct.yaml"
    path.write_text(Path(ct_set.set.manifest).read_text())
    made = cohort(brief, [replace(ct_set.set, manifest=str(path))], fold=0)
    run = fit(override(made.settings, {"training.steps": 1}), made.train, tmp_path / "run", validation=made.validation, progress=False)
    (case, *others), name = made.validation, made.validation[0].case.id
    changed = replace(case, fingerprint="0" * 64)
    with pytest.raises(UserError, match=rf"last\.ckpt: of another training: 1 cases have other contents \({name}\)\. Give what"):
        fit(run.settings, made.train, run.folder, validation=[changed, *others], progress=False)
    path.write_text(path.read_text().replace("[-175, 250]", "[-100, 250]"))
    with pytest.raises(UserError, match=r"another training: own_ct\.intensity_window of CT was \[-175\.0, 250\.0\], is \[-100\.0, 250\.0\]\. Give what"):
        fit(run.settings, made.train, run.folder, validation=made.validation, progress=False)
    path.write_text(Path(ct_set.set.manifest).read_text() + "contrast_ranges: {liver: [0, 30]}\n")
    with pytest.raises(UserError, match=r"another training: own_ct\.contrast_ranges was \{\}, is \{'liver': \[0\.0, 30\.0\]\}\. Give what"):
        fit(run.settings, made.train, run.folder, validation=made.validation, progress=False)


def test_a_checkpoint_that_does_not_say_all_is_gone_on_with_and_that_is_told(short, prepared):
    own = identity(short, [prepared])
    old = {name: value for name, value in own.items() if name not in ("loading", "validation")}
    assert check_identity(Path("last.ckpt"), old, own) == (
        "the checkpoint does not say what was in its validation cases and how its manifests had the images seen, which may have changed unseen"
    )


def test_a_training_goes_on_whether_its_cases_are_in_memory_or_in_their_files(ct_set, brief):
    """Another machine, or other work on it, may leave less memory; the cases are the same."""
    made = cohort(brief, [ct_set.set], fold=0)
    here = within_reach(made.train, Residence(len(made.train), 1, needed_gib=0, free_gib=1))
    assert isinstance(here[0].image, np.ndarray)
    assert check_identity(Path("last.ckpt"), identity(made.settings, made.train), identity(made.settings, here)) is None


def test_another_network_or_other_classes_are_told_by_name(short, prepared):
    own = identity(short, [prepared])
    assert check_identity(Path("last.ckpt"), own, own) is None
    with pytest.raises(UserError, match=r"hidden_channels was 8, is 16"):
        check_identity(Path("last.ckpt"), own, identity(override(short, {"model.hidden_channels": 16}), [prepared]))
    with pytest.raises(UserError, match=r"classes were background, bone, .*, are background, bone$"[:-1]):
        check_identity(Path("last.ckpt"), own, own | {"classes": ["background", "bone"]})
    assert "the checkpoint is of homelib 0, this is" in check_identity(Path("last.ckpt"), own | {"code": "0"}, own)


def test_settings_of_means_may_differ_when_a_run_goes_on_and_others_not(short, prepared, tmp_path):
    run = fit(short, [prepared], tmp_path / "run", progress=False)
    fit(override(short, {"training.workers": 1, "training.checkpoint_every": 3}), [prepared], run.folder, progress=False)
    assert run.settings.training.workers == 1
    with pytest.raises(UserError, match=r"holds a run with other settings \(training\.learning_rate was 0\.002, is 1\.0\)"):
        fit(override(short, {"training.learning_rate": 1}), [prepared], run.folder, progress=False)


def test_checkpoints_have_an_interval_of_their_own(short, prepared, tmp_path, monkeypatch):
    steps = []
    from homelib.run import train

    original = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, state, **named: steps.append(state["step"]) or original(path, state, **named))
    fit(override(short, {"training.checkpoint_every": 4, "training.validate_every": 3}), [prepared], tmp_path / "run", progress=False)
    assert steps == [0, 4, 6]


def test_a_checkpoint_holds_all_that_the_training_needs(short, prepared, tmp_path):
    run = fit(override(short, {"training.ema": 0.5}), [prepared], tmp_path / "run", progress=False)
    state = load_checkpoint(run.checkpoint_file)
    assert set(state) == {"identity", "settings", "step", "network", "optimizer", "average", "random", "guard", "validation", "history"}
    assert state["settings"] == json.loads(run.settings_file.read_text())
    assert [set(one) for one in state["random"]] == [{"python", "numpy", "torch"} | ({"cuda"} if torch.cuda.is_initialized() else set())]
    assert state["identity"]["data"] == {"phantom-a": fingerprint(prepared)}
    assert state["identity"]["code"] == resume.code_version()


# ---------------------------------------------------------------- the parts


def test_random_states_are_undone_in_all_three_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002

    state = random_states()
    first = draw()
    after = random_states()
    draw()
    set_random_states(state)  # as older checkpoints hold it
    assert draw() == first
    here = draw()
    for rank, expected in ((0, first), (1, here), (2, first)):  # a third process has none of its own, and takes the first one's
        set_random_states([state, after], rank)
        assert draw() == expected


def test_a_history_survives_as_a_table():
    rows = [
        {"step": 0, "loss": 0.1, "learning_rate": 1.0, "gradient_norm": 3.0, "seconds": 0.2},
        {"step": 1, "loss": float("nan"), "learning_rate": 1.0, "gradient_norm": 3.0, "seconds": 0.4, "dice": 0.5},
    ]
    again = as_rows(as_table(rows))
    assert again[0] == rows[0]
    assert np.isnan(again[1].pop("loss"))
    assert again[1] == {name: value for name, value in rows[1].items() if name != "loss"}
    assert as_rows(as_table([])) == []


def test_outside_of_with_a_stop_request_leaves_signals_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert stop.asked
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_settings_of_the_killed_training_have_every_state_in_them():
    assert SETTINGS["training.ema"]
    assert SETTINGS["training.augment.noise"]
