"""What a training tells: a history that others can read while it grows, lines that are short, TensorBoard for who has it."""

import sys

import pandas as pd
import pytest
import torch

from homelib import UserError
from homelib.config import override
from homelib.run import train
from homelib.run.begin import computed_by
from homelib.run.folder import HISTORY, Run
from homelib.run.log import History, Progress
from homelib.run.train import fit


def row(step: int, **more) -> dict:
    return {"step": step, "loss": 1 / (step + 1), "learning_rate": 0.1, "gradient_norm": 2.0, "seconds": 0.5 * step} | more


def test_the_file_has_the_rows_of_the_last_flush_whatever_columns_come(tmp_path):
    history = History(tmp_path / "history.csv")
    history.flush()
    assert list(pd.read_csv(history.path).columns) == list(HISTORY)
    for step in range(7):
        history.add(row(step) | ({"dice": 0.5} if step == 3 else {}))
        history.flush()
        pd.testing.assert_frame_equal(pd.read_csv(history.path), pd.DataFrame(history.rows), check_dtype=False)
    before = history.path.stat().st_ino
    history.add(row(7))
    history.flush()
    assert history.path.stat().st_ino == before  # added to, not written anew
    history.cut(2)
    history.add(row(2))
    history.flush()
    assert pd.read_csv(history.path)["step"].tolist() == [0, 1, 2]


def test_a_line_has_the_medians_of_its_interval(capsys):
    progress = Progress("mine", done=0, steps=10, show=True)
    progress.line([row(0), row(1), row(2, validation_dice=0.25)], skipped=1, memory_gib=1.5, best=0.5)
    told = capsys.readouterr()
    assert told.out == "mine: step 3/10, loss 0.500, rate 0.1, gradient 2, validation dice 0.250, best 0.500, 0.5 s a step, 1.5 GiB, 1 steps skipped\n"
    assert told.err == ""  # no bar off a terminal


def test_a_line_takes_no_median_over_steps_that_were_skipped(capsys):
    rows = [row(0), row(1, loss=float("nan")), row(2, gradient_norm=float("inf")), row(3)]
    Progress("mine", done=0, steps=10, show=True).line(rows, skipped=2, memory_gib=None, best=None)
    assert "loss 0.625, rate 0.1, gradient 2, " in capsys.readouterr().out
    Progress("mine", done=0, steps=10, show=True).line(rows[1:3], skipped=2, memory_gib=None, best=None)
    assert "loss nan" in capsys.readouterr().out


def test_a_damaged_status_is_one_line(tmp_path):
    for content in ("", "[]", '{"state"'):
        (tmp_path / "status.json").write_text(content)
        with pytest.raises(UserError, match=r"status\.json: no JSON object, expected the state of the run\. Delete it"):
            _ = Run(tmp_path).state


def test_a_training_begins_by_telling_its_device_and_its_scan_and_goes_on_so(smoke, prepared, tmp_path, capsys):
    told = override(smoke, {"model.scan_backend": "blocked"})
    fit(told, [prepared], tmp_path / "mine")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine: on cpu, selective scan by blocked"
    assert sum("selective scan" in line for line in lines) == 1
    fit(told, [prepared], tmp_path / "mine")  # done already: nothing is computed
    assert "selective scan" not in capsys.readouterr().out
    assert computed_by(smoke, torch.device("cpu")) == "on cpu, selective scan by numba"
    for changes in ({"network": "UNet"}, {"model.mixer": "none"}):
        assert computed_by(override(smoke, changes), torch.device("cpu")) == "on cpu"


def test_a_backend_that_does_not_work_here_ends_a_training_before_its_first_step(smoke, prepared, tmp_path):
    with pytest.raises(UserError, match=r"^backend: found 'mamba_ssm' on cpu, where it cannot be used: "):
        fit(override(smoke, {"model.scan_backend": "mamba_ssm"}), [prepared], tmp_path / "mine", progress=False)
    assert not (tmp_path / "mine" / "last.ckpt").exists()


def test_nothing_is_told_where_nothing_is_asked_for(smoke, prepared, tmp_path, capsys):
    fit(smoke, [prepared], tmp_path / "run", progress=False)
    assert capsys.readouterr() == ("", "")


def test_tensorboard_that_is_missing_is_one_line(smoke, prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"^training\.loggers: found tensorboard, which is not installed; pip install") as caught:
        fit(override(smoke, {"training.loggers": ["csv", "tensorboard"]}), [prepared], tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)


@pytest.fixture
def on_board():
    """The steps and values of one scalar, as TensorBoard shows them."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason='needs tensorboard: pip install "homelib[tensorboard]"')

    def read(run: Run, name: str) -> list[tuple[int, float]]:
        board = events.EventAccumulator(str(run.folder / "tensorboard")).Reload()
        return [(event.step, event.value) for event in board.Scalars(name)]

    return read


def test_tensorboard_has_every_row_once_after_a_stop_and_a_way_back(smoke, prepared, tmp_path, monkeypatch, on_board):
    """Stopped after the validation of step 4, whose rows are on the board and in no checkpoint; then two steps that fail, and are done again."""
    settings = override(smoke, {"training.loggers": ["csv", "tensorboard"], "training.steps": 8, "training.checkpoint_every": 3})
    settings = override(settings, {"training.non_finite_steps": 1})
    original, seen = train.Feed.steps, []

    def spoilt(self, first, end):
        for step, batches in original(self, first, end):
            if step == 7 and not seen:
                seen.append(step)
                batches = [(torch.full_like(image, float("nan")), *rest) for image, *rest in batches]
            yield step, batches

    def crash(step, network):
        if step == 6 and not seen:
            seen.clear()
            raise KeyboardInterrupt
        return {"score": step}

    monkeypatch.setattr(train.Feed, "steps", spoilt)
    with pytest.raises(KeyboardInterrupt):
        fit(settings, [prepared], tmp_path / "run", progress=False, on_validation=crash)
    run = fit(settings, [prepared], tmp_path / "run", progress=False, on_validation=lambda step, network: {"score": step})
    assert seen == [7]
    assert on_board(run, "loss") == [(row.step, pytest.approx(row.loss)) for row in run.history.itertuples()]
    assert on_board(run, "score") == [(1, 2), (3, 4), (5, 6), (7, 8)]


def test_a_run_without_its_own_record_is_refused(smoke):
    with pytest.raises(UserError, match=r"^training\.loggers: found .*tensorboard.*; Value error, expected csv among them|csv among them"):
        override(smoke, {"training.loggers": ["tensorboard"]})


def test_what_was_saved_is_a_table(smoke, prepared, tmp_path):
    run = fit(smoke, [prepared], tmp_path / "run", progress=False)
    saved = run.saved().set_index("file")
    assert {"settings.json", "status.json", "history.csv", "best.safetensors", "last.ckpt", "previous.ckpt"} == set(saved.index)
    assert saved.loc["last.ckpt", "MiB"] == pytest.approx(run.checkpoint_file.stat().st_size / 2**20)
    assert Run(tmp_path / "none").saved().empty
