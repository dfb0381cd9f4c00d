"""The driver on a real SLURM: Debian's slurm-wlm and munge as a cluster of one node on this machine's loopback, started and ended here.

One job is queued again by `scontrol requeue` while it runs, one is told USR1 as before a preemption; the table is the same, and no step is done twice.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest

from homelib.study.ablate import Sweep

_spec = importlib.util.spec_from_file_location("driving", Path(__file__).with_name("driving.py"))
driving = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(driving)

ASKED = "HOMELIB_TEST_SLURM"  # a cluster is not started on a user's machine unasked
LACKING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if shutil.which(name) is None]
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
WHY = f"needs {', '.join(LACKING)}: apt-get install slurm-wlm munge" if LACKING else "needs root, as which a cluster's daemons run"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not os.environ.get(ASKED), reason=f"starts a SLURM cluster on this machine, on demand alone: {ASKED}=1"),
    pytest.mark.skipif(bool(LACKING) or not IS_ROOT, reason=WHY),
]

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
KillWait=10
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=3 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one node, ready for jobs. Its folder is not pytest's, which munge finds too private."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    host, (port, other_port) = socket.gethostname().split(".")[0], free_ports(2)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, port=port, other_port=other_port))
    files = {name: folder / f"munge.{name}" for name in ("key", "socket", "pid", "log", "seed")}
    munge = [f"--{name}-file={path}" for name, path in files.items() if name != "socket"]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={files['socket']}", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host],
    ]
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
        try:
            for command in commands:
                with open(folder / f"{command[0]}.log", "w") as log:
                    daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                time.sleep(1)
            try:
                driving.wait_for(lambda: told("sinfo", "--noheader", "--format=%T") == "idle", seconds=60)
            except AssertionError:
                logs = "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in sorted(folder.glob("*.log")))
                pytest.fail(f"the cluster did not come up\n{logs}")
            yield folder
        finally:
            subprocess.run(["scancel", "--me"], check=False, capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in daemons:
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
            shutil.rmtree(folder, ignore_errors=True)


def job_of(folder: Path, run: str) -> str | None:
    """The job in which a run's kernel lives, by the kernel's environment; None where none does."""
    for kernel in [kernel for name, _, kernel in driving.counted(folder) if name == run and driving.alive(kernel)]:
        environment = dict(item.split("=", 1) for item in Path(f"/proc/{kernel}/environ").read_text().split("\0") if "=" in item)
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return None


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
        # a job that is queued again may not begin for two minutes
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            for waiting in told("squeue", "--me", "--noheader", "--array", "--states=PENDING", "--format=%i").split():
                subprocess.run(["scontrol", "update", f"JobId={waiting}", "StartTime=now"], check=False, capture_output=True)
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
