"""The driver on a real SLURM: a cluster of one node (`benchmarks.slurm_node`), started and ended here. Of real trainings: `python -m benchmarks.grid slurm`.

One job is queued again by `scontrol requeue` while it runs, one is told USR1 as before a preemption; the table is the same, and no step is done twice.
"""

import importlib.util
import os
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import slurm_node
from homelib.study.ablate import Sweep

_spec = importlib.util.spec_from_file_location("driving", Path(__file__).with_name("driving.py"))
driving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driving)

ASKED = "HOMELIB_TEST_SLURM"  # a cluster is not started on a user's machine unasked
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get(ASKED), reason=f"starts a SLURM cluster on this machine, on demand alone: {ASKED}=1"),
    pytest.mark.skipif(bool(slurm_node.why_not()), reason=slurm_node.why_not()),
]


@pytest.fixture(scope="module")
def cluster():
    with slurm_node.cluster(cpus=3):
        yield


def job_of(folder: Path, run: str) -> str | None:
    """The job in which a run's kernel lives; None where none does."""
    kernels = [kernel for name, _, kernel in driving.counted(folder) if name == run and driving.alive(kernel)]
    return slurm_node.job_of(kernels[0]) if kernels else None


def test_the_grid_on_slurm_with_one_job_queued_again_and_one_preempted_ends_with_the_same_table(cluster, tmp_path):
    folder, made = tmp_path / "made", driving.grid(seconds=0.7)
    shelf = driving.shelf(tmp_path / "shelf", together=True)
    process = driving.driver(folder, shelf[0].parent, made, slurm=True)
    interrupted = []
    try:
        for command in (["scontrol", "requeue"], ["scancel", "--signal=USR1"]):

            def at_work() -> tuple[str, str] | None:
                for run, _, _ in reversed(driving.counted(folder, "step-0")):
                    if run not in interrupted and (job := job_of(folder, run)):
                        return run, job
                return None

            driving.wait_for(at_work, seconds=120)
            run, job = at_work()
            subprocess.run([*command, job], check=False)  # scancel may say that the job, which stops already, can not be altered
            interrupted.append(run)
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            slurm_node.begin_what_waits()
            time.sleep(2)
        driving.finished(process, seconds=1)
    finally:
        if process.poll() is None:
            driving.kill(process, alone=False)
    table = Sweep.open(folder).collect()
    pd.testing.assert_frame_equal(table, driving.results(made))
    attempts = {row.record.name: row.record.attempts for row in Sweep.open(folder).rows()}
    assert attempts == {run.name: 2 if run.name in interrupted else 1 for run in made.runs()}
    for what, times in (("step", 3), ("evaluated", 1)):
        done = pd.Series([run for run, _, _ in driving.counted(folder, what)]).value_counts()
        assert done.to_dict() == dict.fromkeys((run.name for run in made.runs()), times), "some work was done twice"
    assert not any(driving.alive(kernel) for _, _, kernel in driving.counted(folder))
