"""The driver of a grid: which of its runs are to be done, and does them, whatever happens to it and to them.

A grid's folder holds `plan.json`, a folder a run, where it names data sets `places.json`, which says where on this machine they are, and what `collect`
makes (`homelib.study.collect`). Every run executes the notebooks 03 and 04 in a process of its own (`homelib.study.work`), somewhere
(`homelib.study.executors`). What is finished is not done again, what was left is gone on with, what failed stops nothing else; several drivers may work
on one folder.
"""

import contextlib
import json
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..paths import runs_dir, shipped, written_whole
from . import states
from .executing import parameters_of
from .executors import JOBS, Executor
from .states import ENDED, Record, Row
from .work import GRACE_SECONDS, Work

if TYPE_CHECKING:
    import pandas as pd

    from .grids import Grid, Planned

PLAN, PLACES = "plan.json", "places.json"
NOTEBOOKS = ("03_training", "04_prediction_and_evaluation")
DIRECTION = "a-to-c"  # of a grid without folds
POLL_SECONDS = 0.5

Watch = Callable[[list[Row]], None]


@dataclass(frozen=True)
class Task:
    """One run of a plan: what it is, its folder, and its notebooks with their parameters."""

    record: Record
    changes: Mapping[str, Any]
    folder: Path
    notebooks: tuple[tuple[Path, Mapping[str, Any]], ...]


@dataclass(frozen=True)
class Sweep:
    """A grid's runs in their folder, as `plan.json` there has them.

    command: that makes them. data: data set -> its folder.
    """

    folder: Path
    command: str
    profile: str
    data: Mapping[str, str]
    tasks: tuple[Task, ...]

    @classmethod
    def begin(
        cls,
        grid: "Grid",
        folder: str | Path = "",
        *,
        parameters: Mapping[str, Any] | None = None,
        notebooks: Sequence[Path] = (),
        roots: Sequence[Path] = (),
    ) -> "Sweep":
        """Check a grid and make its folder, with what is there already.

        Args:
            grid: of `homelib.study.grids.load_grid`.
            folder: of the grid; empty is `runs/ablations/<name>`.
            parameters: of the notebooks, beside those that make the run; each goes to the notebooks that know it.
            notebooks: in their order; empty is training, then prediction and evaluation.
            roots: folders of the data sets that the grid names, in its order.

        Raises:
            UserError: a parameter that no notebook knows; a folder whose run has the name of another; no place for a data set, or for a file that an arm
                leaves to the environment. Nothing was changed then.
        """
        data = placed(grid, roots)
        check_environment((f"arms.{arm}", grid.changes | changes) for arm, changes in grid.arms.items())
        folder = Path(folder or default_folder(grid.name)).expanduser().resolve()
        chosen = [Path(notebook).resolve() for notebook in notebooks] or shipped_notebooks(on_data=bool(data))
        check_parameters(chosen, parameters or {}, data)
        finished = _finished(folder)
        lines = []
        for run in grid.runs():
            there = states.read(folder / run.name)
            if there is not None and there.fingerprint != run.fingerprint:
                raise UserError(f"{folder / run.name}: holds a run with other settings; nothing was changed. Rename the arm, or choose another --folder.")
            place = run.name if there is not None else finished.get(run.fingerprint, run.name)
            lines.append(_line(run, place))
        plan: dict[str, Any] = {"grid": grid.name, "profile": grid.profile, "data": list(data), "parameters": dict(parameters or {})}
        plan |= {"notebooks": [_shelf_name(notebook) for notebook in chosen], "runs": lines}
        for line in lines:
            _queue_up(folder / line["folder"], states.planned_record(line))
        for name, tree in ((PLACES, data), (PLAN, plan)):
            if tree:
                with written_whole(folder / name) as part:
                    part.write_text(json.dumps(tree, indent=1) + "\n")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "Sweep":
        """A grid that was begun. Raises UserError where the folder holds none."""
        folder = Path(folder).expanduser().resolve()
        plan = _read(folder / PLAN)
        data = _read(folder / PLACES) if plan["data"] else {}
        notebooks = [_from_shelf(name) for name in plan["notebooks"]]
        known = {notebook: parameters_of(notebook) for notebook in notebooks} if plan["parameters"] else {}
        more = {notebook: {name: value for name, value in plan["parameters"].items() if name in its} for notebook, its in known.items()}
        shelf = [(notebook, more.get(notebook, {})) for notebook in notebooks]
        tasks = tuple(_task(folder, plan["profile"], data, shelf, line) for line in plan["runs"])
        return cls(folder, _command(plan), plan["profile"], data, tasks)

    def memory_gib(self) -> float:
        """That a run will need at most."""
        from .probe import memory_gib

        return memory_gib(self.profile, {task.record.arm: (task.changes, task.record.fold) for task in self.tasks}, data=self.data)

    def rows(self) -> list[Row]:
        """Every run as it is now, in the plan's order."""
        return [_row(task) for task in self.tasks]

    def run(
        self,
        executor: Executor,
        *,
        limit_seconds: float | None = None,
        grace_seconds: float = GRACE_SECONDS,
        failed: bool = False,
        watch: Watch | None = None,
    ) -> list[Row]:
        """Do all runs that are not done; `failed` ones only where it is said.

        Args:
            executor: where.
            limit_seconds: wall-clock time of a run, after which it has failed.
            grace_seconds: that a run has to write its checkpoint when it is ended.
            watch: called with the table of states, now and then.

        Raises:
            UserError: the environment does not say where a file of an arm is.
            KeyboardInterrupt: Ctrl-C, or SIGTERM; the runs at work were stopped first, with a checkpoint, and no kernel is left.
        """
        check_environment((task.record.name, task.changes) for task in self.tasks)
        if failed:
            for task in self.tasks:
                _queue_again(task.folder)
        begun: dict[str, tuple[Task, Record]] = {}

        def work(task: Task) -> Work:
            worker = uuid.uuid4().hex[:12]
            begun[worker] = task, states.read(task.folder) or task.record
            return Work(task.folder, task.notebooks, worker, limit_seconds=limit_seconds, grace_seconds=grace_seconds)

        rows = {task.folder: _row(task) for task in self.tasks}
        with _ended_by_signals():
            try:
                while True:
                    for worker in executor.ended():
                        _close(worker, *begun.pop(worker))
                    rows |= {task.folder: _row(task) for task in self.tasks if rows[task.folder].record.state not in ENDED}
                    if watch is not None:
                        watch(list(rows.values()))
                    at_work = {task.folder for task, _ in begun.values()}
                    left = [task for task in self.tasks if rows[task.folder].record.state not in ENDED]
                    if not left and not begun:
                        return list(rows.values())
                    rest = {task.folder: rows[task.folder].record for task in left if task.folder not in at_work}
                    others = [record for record in rest.values() if record.state == "running"]  # begun by another driver, which may have been killed
                    free = [task for task in left if task.folder in rest and rest[task.folder].state != "running"]
                    if now := [work(task) for task in free[: executor.room(others)]]:
                        executor.submit(now)
                    time.sleep(POLL_SECONDS)
            except BaseException:
                executor.stop()
                for worker, (task, before) in begun.items():
                    _close(worker, task, before, stopped=True)
                raise

    def collect(self) -> "pd.DataFrame":
        """`homelib.study.collect.collect` of these runs. Raises UserError: none is finished."""
        from .collect import collect

        return collect(self.folder, self.rows(), command=self.command)


# ---------------------------------------------------------------- the plan


def default_folder(name: str) -> Path:
    """Of a grid's runs, where no other is chosen."""
    return runs_dir() / "ablations" / name


def shipped_notebooks(*, on_data: bool = False) -> list[Path]:
    """Training, then prediction and evaluation: the workbook's own on the demo, two plain ones on data sets."""
    return [shipped("notebooks") / ("on_data" if on_data else "") / f"{name}.ipynb" for name in NOTEBOOKS]


def placed(grid: "Grid", roots: Sequence[Path]) -> dict[str, str]:
    """Data set -> its folder. Raises UserError where a grid names one that has none."""
    if len(grid.data) != len(roots):
        found = f"{len(roots)} for {len(grid.data)} data sets" + (f" ({', '.join(grid.data)})" if grid.data else ", for the grid is of the demo")
        raise UserError(f"--root: found {found}, expected one each, in the grid's order.")
    return {name: str(Path(root).expanduser().resolve()) for name, root in zip(grid.data, roots, strict=True)}


def check_environment(arms: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """A value may leave a place to the environment, `training.init_from: $PRETRAINED`, so that a plan holds no path of a machine.

    Raises UserError where the environment does not have it.
    """
    for about, changes in arms:
        for name, value in changes.items():
            if isinstance(value, str) and (lacking := re.search(r"\$\{?(\w+)", os.path.expandvars(value))):
                raise UserError(f"{about}: {name}: found {value}, which the environment does not have; `export {lacking[1]}=PATH` says where that is.")


def check_parameters(notebooks: Sequence[Path], parameters: Mapping[str, Any], data: Mapping[str, str]) -> None:
    """Before anything starts. What makes a run must be known to every notebook, else an arm would be trained with the settings of another.

    Raises UserError: a notebook that does not know it, a parameter that no notebook knows, or one that the grid sets itself.
    """
    known, making = {notebook: parameters_of(notebook) for notebook in notebooks}, _making("", Path(), None, {}, data)
    for notebook, its in known.items():
        if lacking := [name for name in making if name not in its]:
            raise UserError(f"{notebook.name}: no parameter {', '.join(lacking)}; expected them in a notebook that makes a run of a grid.")
    if unknown := [name for name in parameters if not any(name in its for its in known.values())]:
        raise UserError(f"parameters: no notebook knows {', '.join(unknown)}; they have {', '.join(sorted(set().union(*known.values())))}.")
    if taken := [name for name in parameters if name in making]:
        raise UserError(f"parameters: found {', '.join(taken)}, which the grid sets for each run. Leave them out.")


def _making(profile: str, folder: Path, fold: str | int | None, changes: Mapping[str, Any], data: Mapping[str, str]) -> dict[str, Any]:
    """The notebooks' parameters that make a run."""
    where = {"data": dict(data), "fold": fold} if data else {"directions": [fold or DIRECTION]}
    return {"profile": profile, "run_folder": str(folder), "changes": dict(changes)} | where


def _line(run: "Planned", place: str) -> dict[str, Any]:
    """A run in plan.json; `folder` is its own, or that of a finished run with its fingerprint."""
    about = {"name": run.name, "arm": run.arm, "seed": run.seed, "fold": run.fold, "fingerprint": run.fingerprint}
    return about | {"folder": place, "changes": dict(run.changes)}


def _read(path: Path) -> dict[str, Any]:
    """plan.json, or places.json."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name} there, expected the folder of a grid. `home ablate run GRID` makes one.") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); `home ablate run GRID` writes it anew.") from None


def _command(plan: dict[str, Any]) -> str:
    roots = [f"--root {Path(name).stem.upper()}" for name in plan["data"]]
    return " ".join(["home ablate run", plan["grid"], *roots, *(f"-p {name}={json.dumps(value)}" for name, value in plan["parameters"].items())])


def _task(folder: Path, profile: str, data: Mapping[str, str], notebooks: Sequence[tuple[Path, dict[str, Any]]], line: dict[str, Any]) -> Task:
    place = folder / line["folder"]
    given = _making(profile, place, line["fold"], line["changes"], data)
    return Task(states.planned_record(line), line["changes"], place, tuple((notebook, given | more) for notebook, more in notebooks))


def _shelf_name(notebook: Path) -> str:
    """Notebooks of the workbook by name, so that a plan may move with it."""
    ours = shipped("notebooks")
    return notebook.relative_to(ours).as_posix() if notebook.is_relative_to(ours) else str(notebook)


def _from_shelf(name: str) -> Path:
    return shipped("notebooks") / name  # an absolute path stays as it is


def _finished(folder: Path) -> dict[str, str]:
    """Fingerprint -> folder, of the runs that are done."""
    records = [record for path in sorted(folder.glob(f"*/{states.RECORD}")) if (record := states.read(path.parent))]
    return {record.fingerprint: record.name for record in records if record.state == "done"}


# ---------------------------------------------------------------- one run's record


def _queue_up(folder: Path, planned: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with states.held(folder) as ours:
        if ours and states.read(folder) is None:
            states.write(folder, planned)


def _queue_again(folder: Path) -> None:
    with states.held(folder) as ours:
        record = states.read(folder)
        if ours and record is not None and record.state == "failed":
            states.write(folder, replace(record, state="queued", error=""))


def _close(worker: str, task: Task, before: Record, *, stopped: bool = False) -> None:
    """What is to be said of a run whose process has ended without a word of its own: killed, for want of memory say, or not begun at all."""
    with states.held(task.folder) as ours:
        record = states.read(task.folder)
        if not ours or record is None:  # somebody else works on it
            return
        if record.worker == worker and record.state == "running":
            error = "" if stopped else f"{record.notebook}: its process ended without a word; killed, for want of memory perhaps"
            states.write(task.folder, replace(record, state="stopped" if stopped else "failed", error=error))
        elif record == before and record.state not in ENDED and not stopped:
            error = f"its process ended before it began; its words are in {task.folder.parent / JOBS}"
            states.write(task.folder, replace(record, state="failed", error=error))


def _row(task: Task) -> Row:
    row = states.row(task.folder, task.record)
    if row.record.name == task.record.name:
        return row
    about = {name: getattr(task.record, name) for name in ("name", "arm", "seed", "fold")}  # finished under the name of another arm
    return replace(row, record=replace(row.record, **about))


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a closed terminal end the driver as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
