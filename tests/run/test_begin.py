"""Before a training begins: one at a time in a folder, no more processes than devices, and a start that failed is no run."""

import errno
import subprocess
import sys

import pytest
import torch

from homelib import UserError, locks
from homelib.config import override
from homelib.locks import held, is_held
from homelib.run import begin, train
from homelib.run.begin import launched
from homelib.run.checkpoint import step_of
from homelib.run.folder import Run
from homelib.run.train import fit


@pytest.fixture
def brief(smoke):
    return override(smoke, {"data.patch_voxels": (16, 16, 16), "training.steps": 2})


def test_a_second_training_in_a_folder_is_refused_and_the_first_goes_on_undisturbed(brief, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(begin, "PATIENCE_SECONDS", 0)
    told = []

    def another(step, network):
        if step == 2:
            left = run.folder / f".{32 * 'a'}.ckpt"
            left.touch()  # as if the first were writing
            with pytest.raises(UserError, match=r"run: another training is at work there\. Wait for it, or choose another name\.$") as caught:
                fit(brief, [prepared], run.folder, progress=False)
            told.append(str(caught.value))
            assert left.exists()
            left.unlink()
            assert run.state == "running"
        return {}

    run = Run(tmp_path / "run")
    fit(brief, [prepared], run.folder, progress=False, on_validation=another)
    assert len(told) == 1
    assert run.history["step"].tolist() == [0, 1]
    assert run.state == "done"
    fit(brief, [prepared], run.folder, progress=False)  # who is done lets go


def test_the_lock_of_a_process_that_is_killed_is_free(tmp_path):
    path = tmp_path / "training.lock"
    assert not is_held(path)
    script = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('got', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "got\n"
            assert is_held(path)
            with held(path) as ours:
                assert not ours
        finally:
            process.kill()
    with held(path, patience=10) as ours:
        assert ours
    assert not is_held(path)


@pytest.mark.parametrize(("number", "known"), [*((number, True) for number in locks.KNOWS_NONE), (errno.EACCES, False)])
def test_a_file_system_without_locks_is_warned_of_and_other_errors_are_not_hidden(number, known, tmp_path, monkeypatch):
    def acquire(self, timeout):
        raise OSError(number, "as it says")

    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match="the file system knows no locks") if known else pytest.raises(PermissionError), held(tmp_path / "lock") as ours:
        assert ours


def test_a_run_that_is_done_can_be_looked_at_where_nothing_can_be_written(brief, prepared, tmp_path, monkeypatch):
    run = fit(brief, [prepared], tmp_path / "run", progress=False)
    run.lock_file.unlink()
    before = {path.name: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    monkeypatch.setattr(begin.os, "access", lambda path, how: False)
    assert fit(brief, [prepared], run.folder, progress=False).state == "done"
    assert {path.name: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before


@pytest.mark.parametrize(("world", "devices", "nodes", "refused"), [("2", 1, 1, True), ("4", 1, 2, True), ("1", 1, 1, False), ("", 1, 1, False)])
def test_more_processes_than_devices_are_refused(world, devices, nodes, refused, brief, monkeypatch):
    """`torchrun --nproc-per-node 2 --no-python home train ...` without a word of it in the settings."""
    monkeypatch.setenv("WORLD_SIZE", world)
    config = override(brief, {"training.devices": devices, "training.num_nodes": nodes}).training
    if refused:
        told = rf"^training\.devices {devices}, num_nodes {nodes}: found {world} processes of one job \(WORLD_SIZE\), expected {devices * nodes}\."
        with pytest.raises(UserError, match=told):
            launched(config)
    else:
        assert launched(config).world_size == 1


# ---------------------------------------------------------------- a start that failed


def test_after_a_mistyped_start_the_right_one_has_the_name(brief, prepared, tmp_path, capsys):
    for wrong in ({"training.init_from": str(tmp_path / "mistyped")}, {"training.deep_supervision": True, "network": "UNet"}):
        with pytest.raises(UserError, match=r"no such file|deep_supervision"):
            fit(override(brief, wrong), [prepared], tmp_path / "run", progress=False)
    run = fit(brief, [prepared], tmp_path / "run", progress=False)
    assert (run.state, run.settings) == ("done", brief)
    told = capsys.readouterr().out
    assert "run: a start with other settings (network was 'UNet', is 'MambaHoME', training.deep_supervision was True, is False), of which nothing" in told


def test_the_remedy_for_want_of_memory_can_be_followed(brief, prepared, tmp_path, monkeypatch):
    """The checkpoint of the beginning is there by then, of another network even."""

    def no_room(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    wide = override(brief, {"training.batch_size": 2, "model.hidden_channels": 16})
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", no_room)
        with pytest.raises(UserError, match=r"^memory: .*Set training\.batch_size=1"):
            fit(wide, [prepared], tmp_path / "run", progress=False)
    assert step_of(tmp_path / "run" / "last.ckpt") == 0
    run = fit(brief, [prepared], tmp_path / "run", progress=False)
    assert (run.state, step_of(run.checkpoint_file), len(run.history)) == ("done", 2, 2)


@pytest.mark.parametrize("left", ["weights alone", "a damaged checkpoint", "a file of the user's", "a checkpoint before the last"])
def test_what_may_be_worth_something_is_never_given_up(left, brief, prepared, tmp_path):
    run = fit(brief, [prepared], tmp_path / "run", progress=False)
    assert step_of(run.previous_file) == 0
    if left == "weights alone":
        run.checkpoint_file.unlink()
        run.previous_file.unlink()
    elif left == "a damaged checkpoint":
        run.checkpoint_file.write_bytes(b"nothing")
    elif left == "a file of the user's":
        run.checkpoint_file.unlink()
        (run.folder / "notes.txt").touch()
    else:
        run.checkpoint_file.replace(run.previous_file)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError, match=r"holds a run with other settings \(training\.steps was 2, is 3\); nothing was changed"):
        fit(override(brief, {"training.steps": 3}), [prepared], run.folder, progress=False)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
