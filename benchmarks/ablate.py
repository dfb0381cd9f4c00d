"""What `home ablate` adds to the notebooks that it runs, and how fast it reads a thousand runs: `python -m benchmarks.ablate [--runs 6]` into
benchmarks/results/ablate.json.

Runs one after the other, of two notebooks whose cells do nothing. What a run takes from one end to the next, less the seconds that papermill writes into
the executed copies (from before the kernel starts to after the last cell), is the driver's own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks.measure import save
from homelib.study import states
from homelib.study.ablate import Sweep
from homelib.study.executors import Local
from homelib.study.grids import Grid
from homelib.study.states import Record

PARAMETERS = 'profile = ""\nrun_folder = ""\ndirections = []\nchanges = {}'
LINES_OF_A_LOG = 2000


def grid(runs: int) -> Grid:
    return Grid(name="empty", question="?", profile="smoke", arms={"one": {}}, seeds=tuple(range(runs)))


def notebooks(folder: Path) -> list[Path]:
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell("done = True")]
    paths = [folder / "03_first.ipynb", folder / "04_second.ipynb"]
    for path in paths:
        nbformat.write(new_notebook(metadata=metadata, cells=cells), path)
    return paths


def overhead(folder: Path, runs: int) -> dict[str, float]:
    """Seconds a run: in all, in the notebooks (their kernels' start included), and what is left."""
    sweep = Sweep.begin(grid(runs), folder / "grid", notebooks=notebooks(folder))
    began = time.perf_counter()
    rows = sweep.run(Local(sweep.folder, at_once=1))
    whole = (time.perf_counter() - began) / runs
    assert all(row.record.state == "done" for row in rows)
    copies = [nbformat.read(path, as_version=4) for task in sweep.tasks for path in task.folder.glob("*.ipynb")]
    inside = sum(copy.metadata.papermill.duration for copy in copies) / runs
    return {"whole": whole, "notebooks": inside, "driver": whole - inside}


def status_seconds(folder: Path, runs: int = 1000) -> float:
    """`home ablate status` of so many made-up runs, a quarter of each state, Python's start and imports included."""
    sweep = Sweep.begin(grid(runs), folder / "many", notebooks=notebooks(folder))
    for number, task in enumerate(sweep.tasks):
        state = ("done", "failed", "running", "queued")[number % 4]
        states.write(task.folder, Record(task.record.name, "one", number, None, task.record.fingerprint, state=state, error="an error"))
        (task.folder / states.LOG).write_text("a line of a log\n" * LINES_OF_A_LOG)
        (task.folder / "status.json").write_text('{"state": "running", "steps": 10}')
    command = [sys.executable, "-c", "from homelib.cli import main; main()", "ablate", "status", str(sweep.folder)]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return sorted(times)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=6)
    runs, load = parser.parse_args().runs, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = {"load before": load, "runs": runs, "seconds a run": overhead(Path(folder), runs), "seconds of status, 1000 runs": status_seconds(Path(folder))}
    print(json.dumps(found, indent=1))
    print(save("ablate", found))


if __name__ == "__main__":
    main()
