"""A SLURM cluster of one node on this machine's loopback, of Debian's slurm-wlm and munge: started and ended here, beside whatever else the machine runs."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
PATIENCE_SECONDS = 60  # for the node to be there; and at the end for its jobs to be gone

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
KillWait=30
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no cluster can be started here; empty where one can."""
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "needs root, as which a cluster's daemons run"


@contextmanager
def cluster(*, cpus: int) -> Iterator[None]:
    """A cluster whose node has so many CPUs, ready for jobs of this process and of those that it starts. Raises RuntimeError where it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge finds others too private
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    host, (port, other_port) = socket.gethostname().split(".")[0], _free_ports(2)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, port=port, other_port=other_port, cpus=cpus))
    munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", host],
    ]
    before, daemons = os.environ.get("SLURM_CONF"), []
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        for command in commands:
            with open(folder / f"{command[0]}.log", "w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1)
        if not _comes_to(lambda: told("sinfo", "--noheader", "--format=%T") == "idle"):
            logs = "\n".join(f"{path.name}: {path.read_text()[-600:]}" for path in sorted(folder.glob("*.log")))
            raise RuntimeError(f"the cluster did not come up\n{logs}")
        yield
    finally:
        told("scancel", "--me")
        _comes_to(lambda: not told("squeue", "--me", "--noheader"))
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
        os.environ.pop("SLURM_CONF")
        os.environ.update({} if before is None else {"SLURM_CONF": before})
        shutil.rmtree(folder, ignore_errors=True)


def told(*command: str) -> str:
    """What a command of SLURM's says, empty where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def job_of(process: int) -> str:
    """The job, an element of an array, in which a process lives."""
    environment = dict(item.split("=", 1) for item in Path(f"/proc/{process}/environ").read_text().split("\0") if "=" in item)
    return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"


def begin_what_waits() -> None:
    """At once: SLURM lets a job that is queued again wait for two minutes."""
    for job in told("squeue", "--me", "--noheader", "--array", "--states=PENDING", "--format=%i").split():
        told("scontrol", "update", f"JobId={job}", "StartTime=now")


def _comes_to(what) -> bool:
    """Whether it is so before patience is at its end."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
