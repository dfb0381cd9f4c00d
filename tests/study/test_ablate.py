"""The driver of grids: killed, interrupted, doubled, or with arms that crash and hang, every run is done once, and the table is the same."""

import importlib.util
import json
import math
import os
import platform
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from homelib import UserError, cli
from homelib.config import override
from homelib.study import states
from homelib.study.ablate import Sweep
from homelib.study.ablate_report import states_frame, states_table, told_by_lines
from homelib.study.costs import costs_of
from homelib.study.executors import Local, Slurm, fitting, visible_gpus
from homelib.study.grids import load_grid
from homelib.study.states import Record
from homelib.study.work import Work

_spec = importlib.util.spec_from_file_location("driving", Path(__file__).with_name("driving.py"))
driving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driving)

KILLS = 5
PATIENCE = 4  # times an undisturbed run: the limit of those beside an arm that never ends


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with notebooks of a few lines in place of training and evaluation."""
    return driving.shelf(tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def grid_folder(tmp_path):
    """A grid's folder. No kernel that was counted there may live on."""
    folder = tmp_path / "made"
    yield folder
    driving.wait_for(lambda: not any(driving.alive(process) for _, _, process in driving.counted(folder)), seconds=20)


def begun(folder, shelf, **options) -> Sweep:
    return Sweep.begin(driving.grid(**options), folder, notebooks=shelf)


def same(folder, made) -> None:
    """The collected table is that of an undisturbed grid."""
    found = Sweep.open(folder).collect()
    pd.testing.assert_frame_equal(found, driving.results(made))
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), found, check_dtype=False)


def drawn(rows) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))
    console.print(states_table(rows))
    return console.export_text()


# ---------------------------------------------------------------- before anything starts


def test_a_parameter_that_no_notebook_knows_is_an_error_before_anything_starts(shelf, grid_folder):
    with pytest.raises(UserError, match=r"^parameters: no notebook knows viewr; they have changes, directions, more, profile, run_folder"):
        Sweep.begin(driving.grid(), grid_folder, notebooks=shelf, parameters={"viewr": True})
    assert not grid_folder.exists()


def test_a_parameter_that_makes_the_run_is_the_grids(shelf, grid_folder):
    with pytest.raises(UserError, match=r"^parameters: found changes, which the grid sets"):
        Sweep.begin(driving.grid(), grid_folder, notebooks=shelf, parameters={"changes": {}})


def test_a_notebook_that_would_not_hear_of_an_arms_changes_is_refused(shelf, grid_folder, tmp_path):
    deaf = tmp_path / "05_deaf.ipynb"
    deaf.write_text(shelf[0].read_text().replace("changes = {}\\n", ""))
    with pytest.raises(UserError, match=r"^05_deaf\.ipynb: no parameter changes; expected them"):
        Sweep.begin(driving.grid(), grid_folder, notebooks=[shelf[0], deaf])
    assert not grid_folder.exists()


def test_the_workbooks_own_notebooks_make_a_run(grid_folder):
    sweep = Sweep.begin(driving.grid(arms={"one": ""}, seeds=(3,), folds=()), grid_folder, parameters={"viewer": False})
    ((training, its), (evaluation, other)) = sweep.tasks[0].notebooks
    assert [training.stem, evaluation.stem] == ["03_training", "04_prediction_and_evaluation"]
    assert its == {
        "profile": "smoke",
        "run_folder": str(grid_folder / "one_seed3"),
        "directions": ["a-to-c"],
        "changes": {"training.weight_decay": 0.2, "training.learning_rate": 0.001, "training.seed": 3},
    }
    assert other == its | {"viewer": False}


def test_a_run_of_other_settings_is_never_overwritten(shelf, grid_folder):
    begun(grid_folder, shelf)
    before = {path: path.read_bytes() for path in grid_folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"one_seed0_a-to-c: holds a run with other settings; nothing was changed"):
        begun(grid_folder, shelf, seconds=0.3)
    assert {path: path.read_bytes() for path in grid_folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_serves_an_arm_that_has_got_another_name(shelf, grid_folder):
    sweep = begun(grid_folder, shelf, arms={"old": ""}, seeds=(0,), folds=("a-to-c",))
    folder = sweep.tasks[0].folder
    states.write(folder, replace(states.read(folder), state="done"))
    (folder / "metrics.csv").write_text("case,metric,value\nx,dice,0.5\n")
    renamed = begun(grid_folder, shelf, arms={"new": ""}, seeds=(0,), folds=("a-to-c",))
    assert not (grid_folder / "new_seed0_a-to-c").exists()
    table = renamed.collect()
    assert table[["run", "arm", "value"]].values.tolist() == [["new_seed0_a-to-c", "new", 0.5]]


def test_what_is_collected_says_what_arms_cost_runs_took_and_how_it_was_made(shelf, grid_folder, smoke):
    sweep = Sweep.begin(driving.grid(arms={"one": "", "two": ""}, folds=("a-to-c",)), grid_folder, notebooks=shelf, parameters={"more": 3})
    for number, task in enumerate(sweep.tasks):
        override(smoke, {} if task.record.arm == "one" else {"network": "SegMamba"}).save(task.folder / "settings.json")
        if task.record.seed == 0:
            states.write(task.folder, replace(states.read(task.folder), state="done", began=1000.0 + 60 * number, seconds=1800.0))
            (task.folder / "metrics.csv").write_text("case,metric,value\nx,dice,0.5\n")
            (task.folder / "status.json").write_text('{"seconds": 12.5, "peak_gib": 4.0, "steps_gib": 3.0}')
    last = sweep.tasks[1].folder / states.RECORD
    os.utime(sweep.tasks[0].folder / states.RECORD, (1900, 1900))
    os.utime(last, (4000, 4000))
    sweep.collect()
    took = pd.read_csv(grid_folder / "runs.csv").set_index("run")
    assert took.loc["one_seed0_a-to-c", ["training_seconds", "steps_gib"]].tolist() == [12.5, 3.0]
    assert took.loc["two_seed1_a-to-c", "state"] == "queued"
    counted = costs_of({"one": smoke, "two": override(smoke, {"network": "SegMamba"})})
    for name, column in (("parameters M", "parameters_m"), ("GFLOPs", "gflops")):
        assert took.groupby("arm")[column].unique().map(list).to_dict() == {arm: [pytest.approx(counted.loc[arm, name])] for arm in ("one", "two")}
    made = json.loads((grid_folder / "made.json").read_text())
    assert made["command"] == "home ablate run made -p more=3"
    assert (made["runs"], made["minutes"], made["hours_of_runs"]) == (2, 50, 1)
    assert "homelib" in made["environment"]


def test_a_grid_of_data_sets_needs_their_places():
    with pytest.raises(UserError, match=r"^--root: found 0 for 1 data sets \(amos_ct\), expected one each"):
        Sweep.begin(load_grid("experts"))


def test_a_grid_of_data_sets_has_notebooks_of_its_own(grid_folder, tmp_path):
    sweep = Sweep.begin(load_grid("experts"), grid_folder, roots=[tmp_path])
    assert str(tmp_path) not in (grid_folder / "plan.json").read_text()  # which may be committed
    assert sweep.command == "home ablate run experts --root AMOS_CT"
    for notebook, given in sweep.tasks[0].notebooks:
        assert notebook.parent.name == "on_data"
        assert given["data"] == {"amos_ct": str(tmp_path)}
        assert given["fold"] == sweep.tasks[0].record.fold
    (grid_folder / "places.json").unlink()
    with pytest.raises(UserError, match=r"no places\.json there, expected the folder of a grid"):
        Sweep.open(grid_folder)


def test_weights_that_the_environment_must_name_are_asked_for_before_anything_starts(grid_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("PRETRAINED", raising=False)
    with pytest.raises(UserError, match=r"^arms\.pretrained: training\.init_from: found \$PRETRAINED, .*`export PRETRAINED=PATH` says where that is\.$"):
        Sweep.begin(load_grid("pretraining"), grid_folder, roots=[tmp_path])
    assert not grid_folder.exists()
    monkeypatch.setenv("PRETRAINED", str(tmp_path))
    sweep = Sweep.begin(load_grid("pretraining"), grid_folder, roots=[tmp_path])
    assert {task.record.arm: task.changes.get("training.init_from") for task in sweep.tasks} == {"scratch": None, "pretrained": "$PRETRAINED"}
    monkeypatch.delenv("PRETRAINED")
    with pytest.raises(UserError, match=r"^pretrained_seed0: training\.init_from: found \$PRETRAINED"):
        sweep.run(Local(grid_folder, at_once=1))


def test_a_folder_without_a_plan_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no plan\.json there, expected the folder of a grid"):
        Sweep.open(tmp_path)


def test_nothing_finished_is_nothing_to_collect(shelf, grid_folder):
    with pytest.raises(UserError, match=r"none of 12 runs is finished"):
        begun(grid_folder, shelf).collect()


# ---------------------------------------------------------------- states


def test_a_run_that_was_left_is_stale_and_one_whose_lock_is_held_is_running(tmp_path):
    record = states.write(tmp_path, Record("r", "a", 0, None, "f", state="running"))
    assert states.seen(tmp_path, record).state == "stale"
    with states.held(tmp_path) as ours:
        assert ours
        assert states.seen(tmp_path, record).state == "running"
        with states.held(tmp_path, patience=0) as again:
            assert not again
    assert states.seen(tmp_path, record).state == "stale"


def test_a_record_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / states.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"ablation\.json: not a run's record"):
        states.read(tmp_path)


def test_the_last_lines_of_a_log_are_those_that_hold_something(tmp_path):
    log = tmp_path / "log.txt"
    assert states.last_lines(log) == []
    log.write_bytes(b"x" * 40_000 + b"\none\n\n  \ntwo\nthree \xff\n\n")
    assert states.last_lines(log, lines=2) == ["two", "three \N{REPLACEMENT CHARACTER}"]


def test_a_line_is_told_whenever_a_runs_state_changes(tmp_path):
    said: list[str] = []
    watch = told_by_lines(said.append)
    queued = states.Row(Record("r", "a", 0, None, "f"), tmp_path)
    failed = replace(queued, record=replace(queued.record, state="failed", error="why"))
    for row in (queued, queued, failed, failed):
        watch([row])
    assert said == ["r: failed, why"]


def test_the_table_of_a_thousand_runs(tmp_path, monkeypatch):
    made = driving.grid(seeds=tuple(range(334)), folds=("a-to-c",))
    sweep = Sweep.begin(made, tmp_path / "made")
    for number, task in enumerate(sweep.tasks):
        state = ("done", "failed", "running", "queued")[number % 4]
        states.write(task.folder, replace(task.record, state=state, error="no such thing" if state == "failed" else ""))
    told = CliRunner().invoke(cli.app, ["ablate", "status", str(sweep.folder)])
    assert told.exit_code == 0
    text = " ".join(told.output.split())
    assert "251 failed, 250 stale, 250 queued, 251 done" in text
    assert told.output.count("no such thing") == 251
    assert len(states_frame(sweep.rows())) == 1002


# ---------------------------------------------------------------- as it runs


@pytest.mark.slow
@pytest.mark.long
def test_a_grid_whose_driver_is_killed_again_and_again_ends_with_the_table_of_one_that_was_not(grid_folder, tmp_path):
    """SIGKILL at random moments, to the driver alone and to all that it has started; kernels end with the processes that have started them."""
    rng, made, at_once = random.Random(0), driving.grid(), 3
    shelf = driving.shelf(tmp_path / "shelf", together=True)
    for number in range(KILLS):
        least = len(driving.counted(grid_folder)) + rng.randint(1, 5)
        process = driving.driver(grid_folder, shelf[0].parent, made, at_once=at_once)
        driving.wait_for(lambda least=least: len(driving.counted(grid_folder)) >= least)
        time.sleep(rng.uniform(0, 0.7))
        assert process.poll() is None, "it has ended before it was killed"
        driving.kill(process, alone=number % 2 == 1)
    driving.finished(driving.driver(grid_folder, shelf[0].parent, made, at_once=at_once))
    same(grid_folder, made)
    for what, times in (("step", 3), ("evaluated", 1)):
        done = pd.Series([run for run, _, _ in driving.counted(grid_folder, what)]).value_counts()
        assert done.to_dict() == dict.fromkeys((run.name for run in made.runs()), times), "some work was done twice"
    assert 12 <= len(driving.counted(grid_folder, "begin")) <= 12 + KILLS * at_once
    assert {row.record.state for row in Sweep.open(grid_folder).rows()} == {"done"}


@pytest.mark.slow
@pytest.mark.long
def test_arms_that_crash_die_or_hang_stop_nothing_else_and_are_named_with_their_last_words(shelf, grid_folder):
    """Two that are well beside three that are not; ten, of real trainings, are in `python -m benchmarks.grid`: here they would take a minute."""
    still = grid_folder.with_name("still")  # three that are well, as many at once: how long a run takes on this machine now
    driving.finished(driving.driver(still, shelf[0].parent, driving.grid(seeds=(0,), folds=("a-to-c",)), at_once=3))
    limit = math.ceil(PATIENCE * max(row.record.seconds for row in Sweep.open(still).rows()))
    made = driving.grid(arms={"crash": "crash", "die": "die", "hang": "hang", "one": "", "two": ""}, seeds=(0,), folds=("a-to-c",))
    driving.finished(driving.driver(grid_folder, shelf[0].parent, made, at_once=3, limit_seconds=limit))
    sweep = Sweep.open(grid_folder)
    rows = {row.record.arm: row for row in sweep.rows()}
    assert {arm: row.record.state for arm, row in rows.items()} == {"crash": "failed", "die": "failed", "hang": "failed", "one": "done", "two": "done"}
    assert rows["crash"].record.error == "03_training: cell 2: ValueError: a crash on purpose"
    assert rows["die"].record.error.endswith("DeadKernelError: Kernel died")
    assert rows["hang"].record.error == f"03_training: wall-clock limit of {limit} s; the kernel was ended"
    assert {row.record.host for row in rows.values()} == {platform.node()}
    text = drawn(list(rows.values()))
    assert "3 failed, 2 done" in text
    for words in ("crash_seed0_a-to-c", "a crash on purpose", "hang_seed0_a-to-c", "this arm hangs"):
        assert words in text
    assert "this arm hangs" in (rows["hang"].folder / "log.txt").read_text()
    assert set(sweep.collect()["arm"]) == {"one", "two"}
    took = pd.read_csv(grid_folder / "runs.csv").set_index("arm")
    assert took.loc["hang", "state"] == "failed"
    assert took.loc["one", "attempts"] == 1
    begins = len(driving.counted(grid_folder, "begin"))
    driving.finished(driving.driver(grid_folder, shelf[0].parent, made))  # nothing is left to do
    assert len(driving.counted(grid_folder, "begin")) == begins


@pytest.mark.slow
@pytest.mark.long
def test_a_run_whose_kernel_died_is_done_again_where_that_is_asked_for_from_the_step_that_it_had_done(shelf, grid_folder):
    made = driving.grid(arms={"die": "die", "one": ""}, seeds=(0,), folds=("a-to-c",))
    for _ in range(2):  # the second driver finds nothing to do
        driving.finished(driving.driver(grid_folder, shelf[0].parent, made))
        die, one = Sweep.open(grid_folder).rows()
        assert (die.record.state, die.record.attempts, one.record.state, one.record.attempts) == ("failed", 1, "done", 1)
        assert die.record.error == "03_training: cell 2: nbclient.exceptions.DeadKernelError: Kernel died"
    driving.finished(driving.driver(grid_folder, shelf[0].parent, made, failed=True))
    die, one = Sweep.open(grid_folder).rows()
    assert (die.record.state, die.record.attempts, die.record.error, one.record.attempts) == ("done", 2, "", 1)
    assert [did for run, did, _ in driving.counted(grid_folder, "step") if run == die.record.name] == ["step-0", "step-1", "step-2"]
    same(grid_folder, made)


@pytest.mark.slow
@pytest.mark.long
def test_two_drivers_on_one_folder_do_every_run_once(grid_folder, tmp_path):
    made, shelf = driving.grid(folds=("a-to-c",)), driving.shelf(tmp_path / "shelf", together=True)
    drivers = [driving.driver(grid_folder, shelf[0].parent, made) for _ in range(2)]
    for process in drivers:
        driving.finished(process)
    same(grid_folder, made)
    assert sorted(run for run, _, _ in driving.counted(grid_folder, "begin")) == sorted(run.name for run in made.runs())


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_stops_the_runs_ends_their_kernels_and_leaves_what_can_be_gone_on_with(shelf, grid_folder):
    made = driving.grid(arms={"one": "", "two": ""}, seeds=(0,), folds=("a-to-c",), seconds=2.5)
    process = driving.driver(grid_folder, shelf[0].parent, made)
    driving.wait_for(lambda: len(driving.counted(grid_folder, "step")) >= 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    assert process.wait(timeout=60) == 130
    assert not any(driving.alive(kernel) for _, _, kernel in driving.counted(grid_folder))
    rows = Sweep.open(grid_folder).rows()
    assert {row.record.state for row in rows} == {"stopped"}
    driving.finished(driving.driver(grid_folder, shelf[0].parent, made))
    same(grid_folder, made)
    assert len(driving.counted(grid_folder, "step")) == 6, "a step was done twice"
    assert {row.record.ended for row in Sweep.open(grid_folder).rows()} == {("03_training", "04_prediction_and_evaluation")}


# ---------------------------------------------------------------- where


def test_as_many_runs_at_once_as_fit_by_cores_gpus_and_memory():
    assert fitting(cores=8, cores_a_run=2, gib_a_run=1, free_gib=100) == 4
    assert fitting(cores=8, cores_a_run=2, gib_a_run=1, free_gib=100, gpus=2) == 2
    assert fitting(cores=8, cores_a_run=1, gib_a_run=10, free_gib=40) == 3
    assert fitting(cores=1, cores_a_run=2, gib_a_run=10, free_gib=1) == 1


def test_gpus_are_those_that_the_caller_allows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, 3")
    assert visible_gpus() == ["GPU-a", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_every_gpu_has_one_run(tmp_path):
    where = Local(tmp_path, at_once=8, gpus=["0", "1"])
    assert where.room([]) == 2


def at_work(**told) -> Record:
    return Record("r", "a", 0, None, "f", **{"state": "running", "host": platform.node()} | told)


def test_runs_that_another_driver_has_begun_on_this_machine_take_room(tmp_path):
    where = Local(tmp_path, at_once=2)
    assert [where.room([at_work()] * count) for count in range(4)] == [2, 1, 0, 0]
    assert where.room([at_work(host="another")]) == 2
    assert where.room([at_work(host="")]) == 2


def test_the_gpu_of_a_run_that_another_driver_has_begun_is_not_given_away(tmp_path):
    where, given = Local(tmp_path, at_once=8, gpus=["0", "1", "2"]), []
    where.executor = SimpleNamespace(update_parameters=lambda **told: None, submit=lambda work: given.append(work.gpu))
    assert where.room([at_work(gpu="0")]) == 2
    where.submit([Work(tmp_path, (), "one"), Work(tmp_path, (), "two")])
    assert given == ["1", "2"]
    assert where.room([at_work(gpu="0")]) == 0


def test_a_driver_tells_its_executor_of_the_runs_that_it_finds_at_work(shelf, grid_folder):
    """After a SIGKILL of the driver its runs go on; the next one must not begin as many beside them."""

    class Seen(Exception):
        pass

    class Executor:
        def room(self, others):
            raise Seen([(record.name, record.host) for record in others])

        def ended(self):
            return []

        def stop(self):
            pass

    sweep = begun(grid_folder, shelf)
    for task, state in zip(sweep.tasks, ("running", "running", "done"), strict=False):
        states.write(task.folder, replace(task.record, state=state, host="here"))
    with states.held(sweep.tasks[1].folder), pytest.raises(Seen) as told:
        sweep.run(Executor())
    assert told.value.args[0] == [(sweep.tasks[1].record.name, "here")]  # nobody holds the lock of the first


def test_slurm_where_there_is_none_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^executor: found slurm on a machine without srun"):
        Slurm(tmp_path, name="x", cores=1)


@pytest.mark.parametrize(("arguments", "words"), [(["--executor", "cloud"], "--executor: found 'cloud'"), (["--slurm", "qos=a"], "--slurm: found options")])
def test_bad_options_are_one_line(arguments, words, shelf, tmp_path, monkeypatch, capsys):
    begun(tmp_path / "made", shelf)
    monkeypatch.setattr(sys, "argv", ["home", "ablate", "resume", str(tmp_path / "made"), "--at-once", "1", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert words in capsys.readouterr().err
