"""Grids whose runs are notebooks of a few lines, and their driver in a process of its own: `python driving.py FOLDER SHELF GRID.json [name=value ...]`.

The first notebook takes steps, each with a mark on the disk, as a training has its checkpoints; the second one writes metrics that follow from arm, seed
and fold alone. Both count in `count.txt` what they do. An arm misbehaves as its setting `data.aliases` says.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
from nbformat.v4 import new_code_cell, new_notebook

from homelib.study.ablate import Sweep
from homelib.study.executors import Local, Slurm
from homelib.study.grids import Grid

PARAMETERS = 'profile = "laptop"\nrun_folder = ""\ndirections = []\nchanges = {}\nmore = 0'
COUNT = """
import os, signal, sys, time
from pathlib import Path
folder = Path(run_folder)
does = changes.get("data.aliases", {}).get("does", "")
def count(what):
    with open(folder.parent / "count.txt", "a") as file:
        file.write(f"{folder.name} {what} {os.getpid()}\\n")
"""
TRAINING = """
count("begin")
if does == "crash":
    print("this arm crashes", file=sys.stderr)
    raise ValueError("a crash on purpose")
if does == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(2, b"this arm hangs\\n")
    time.sleep(1000)
for step in range(3):
    if not (folder / f"step-{step}").exists():
        time.sleep(changes["training.weight_decay"])
        os.close(os.open(folder / f"step-{step}", os.O_CREAT | os.O_EXCL))
        count(f"step-{step}")
        if does == "die" and step == 0:  # once: it goes on from there when it is begun again
            os.kill(os.getpid(), signal.SIGKILL)
"""
EVALUATION = """
metrics = folder / "metrics.csv"
if not metrics.exists():
    dice = changes["training.learning_rate"] / (1 + changes["training.seed"]) + len(directions[0])
    metrics.with_suffix(".part").write_text(f"case,method,class,metric,value\\nx,m,liver,dice,{dice!r}\\n")
    count("evaluated")
    os.rename(metrics.with_suffix(".part"), metrics)
"""
SECONDS_A_STEP = 0.2


def shelf(folder: Path, *, together: bool = False) -> list[Path]:
    """The two notebooks; or both in one, for half of the kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    sources = {"03_training": TRAINING, "04_prediction_and_evaluation": EVALUATION}
    for name, source in {"03_both": TRAINING + EVALUATION}.items() if together else sources.items():
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(COUNT + source)]
        nbformat.write(new_notebook(metadata=metadata, cells=cells), folder / f"{name}.ipynb")
    return sorted(folder.glob("*.ipynb"))


def grid(*, arms: dict[str, str] | None = None, seeds=(0, 1), folds=("a-to-c", "c-to-a"), seconds: float = SECONDS_A_STEP) -> Grid:
    """arms: name -> how it misbehaves; three that are well where none is given. seconds: of a step."""
    arms = arms or {"one": "", "two": "", "three": ""}
    rates = {name: {"training.learning_rate": 0.001 * (1 + number)} for number, name in enumerate(arms)}
    does = {name: {"data.aliases": {"does": arms[name]}} if arms[name] else {} for name in arms}
    changes = {"training.weight_decay": seconds}
    return Grid(name="made", question="?", profile="smoke", changes=changes, arms={n: rates[n] | does[n] for n in arms}, seeds=seeds, folds=folds)


def results(made: Grid) -> pd.DataFrame:
    """The table of a grid that nobody disturbed, as it must be."""
    rows = []
    for run in made.runs():
        dice = run.changes["training.learning_rate"] / (1 + run.seed) + len(run.fold)
        about = {"run": run.name, "arm": run.arm, "seed": run.seed, "fold": run.fold}
        rows.append(about | {"case": "x", "method": "m", "class": "liver", "metric": "dice", "value": dice})
    return pd.DataFrame(rows)


def driver(folder: Path, notebooks: Path, made: Grid, **options) -> subprocess.Popen:
    """A driver in a session of its own, so that it can be ended with all processes that it has started, but for the kernels, which have their own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".json")
    file.write_text(made.model_dump_json())
    command = [sys.executable, __file__, str(folder), str(notebooks), str(file), *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    with open(folder.with_suffix(".log"), "a") as log:  # no pipe, which what it has started would hold when it is killed
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def finished(process: subprocess.Popen, seconds: float = 240) -> None:
    """A driver comes to its end without an error."""
    assert process.wait(seconds) == 0, "its words are in the .log beside its folder"


def counted(folder: Path, what: str = "") -> list[tuple[str, str, int]]:
    """(run, what it did, process of the kernel) in the order in which it was done."""
    try:
        lines = [line.split() for line in (folder / "count.txt").read_text().splitlines()]
    except FileNotFoundError:
        return []
    return [(run, did, int(process)) for run, did, process in lines if did.startswith(what)]


def wait_for(what, seconds: float = 60) -> None:
    """Until it is so."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # one that has ended and is not yet waited for is no process any more
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def kill(process: subprocess.Popen, *, alone: bool) -> None:
    """SIGKILL: the driver alone, or with all that it has started."""
    (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
    process.wait()


def main(folder: str, notebooks: str, file: str, *options: str) -> None:
    given = {name: json.loads(value) for name, _, value in (option.partition("=") for option in options)}
    made = Grid(**json.loads(Path(file).read_text()))
    sweep = Sweep.begin(made, folder, notebooks=sorted(Path(notebooks).glob("*.ipynb")))
    slurm, at_once = given.pop("slurm", False), given.pop("at_once", 2)
    where = Slurm(sweep.folder, name="made", cores=1, grace_seconds=5) if slurm else Local(sweep.folder, at_once=at_once)
    try:
        sweep.run(where, grace_seconds=5, **given)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
