"""Where the runs of a grid are computed: in processes on this machine, as many at once as fit, or as an array of SLURM jobs. Both by submitit.

An executor takes work and tells which of it has ended, however it ended; what became of a run stands in its record (`homelib.study.states`).
"""

import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ..errors import UserError
from . import states
from .states import Record
from .work import Work

SIGNAL = "USR1"  # that a cluster sends before it takes a machine back; the trainer answers it with a checkpoint. submitit's own choice would kill a kernel
JOBS = ".jobs"  # submitit's files, below the folder of the grid
SLACK_SECONDS = 600  # that a process has beyond its run's limit of time
ASK_SECONDS = 5  # between two questions to the cluster
SLURM_MINUTES = 24 * 60
FOR_EVER_MINUTES = 60 * 24 * 365
MEMORY_SHARE = 0.8  # of what is free


class Executor(Protocol):
    """room: how many pieces of work it would take now, beside `others`: runs at work that another driver has begun, one that was killed, say.
    submit: take them. ended: those that have come to an end since it was last asked, by `worker`."""

    def room(self, others: Sequence[Record]) -> int: ...

    def submit(self, works: Sequence[Work]) -> None: ...

    def ended(self) -> list[str]: ...

    def stop(self) -> None:
        """Ask all work to stop at a whole step, and wait until it has; what does not is killed."""


class Local:
    """Processes on this machine, each with its share of the cores, or one GPU each.

    Args:
        folder: of the grid.
        at_once: as many runs at a time.
        cores: a run.
        gpus: names for CUDA_VISIBLE_DEVICES, one run each; empty computes on the CPU.
    """

    def __init__(self, folder: Path, *, at_once: int, cores: int = 1, gpus: Sequence[str] = ()):
        submitit = _submitit()
        self.executor = submitit.LocalExecutor(folder=folder / JOBS)
        self.at_once, self.cores, self.gpus = (min(at_once, len(gpus)) if gpus else at_once), cores, list(gpus)
        self.jobs: dict[str, Any] = {}
        self.work: dict[str, Work] = {}
        self.taken: set[str] = set()

    @classmethod
    def fitting(cls, folder: Path, *, gib_a_run: float, cores: int | None = None, gpus: Sequence[str] = ()) -> "Local":
        """As many at once as fit. cores: a run; None is 1, or beside a GPU its share. The same number gives the same result, bit for bit on a CPU."""
        from ..data.memory import free_memory_gib

        cores = cores or (max(1, usable_cores() // len(gpus)) if gpus else 1)
        at_once = fitting(cores=usable_cores(), cores_a_run=cores, gib_a_run=gib_a_run, free_gib=free_memory_gib(), gpus=len(gpus))
        return cls(folder, at_once=at_once, cores=cores, gpus=gpus)

    def room(self, others: Sequence[Record]) -> int:
        here = [record for record in others if record.host == platform.node()]
        self.taken = {record.gpu for record in here}
        return max(0, self.at_once - len(self.jobs) - len(here))

    def submit(self, works: Sequence[Work]) -> None:
        for work in works:
            work = replace(work, cores=self.cores, gpu=self._free_gpu() if self.gpus else "")
            # the run ends itself at its limit; submitit's own comes after, for a process that cannot
            limit = FOR_EVER_MINUTES if work.limit_seconds is None else (work.limit_seconds + work.grace_seconds + SLACK_SECONDS) / 60
            self.executor.update_parameters(timeout_min=limit, signal_delay_s=SLACK_SECONDS // 2)
            with _deaf_to_interrupts():
                self.jobs[work.worker] = self.executor.submit(work)
            self.work[work.worker] = work

    def ended(self) -> list[str]:
        ended = [worker for worker, job in self.jobs.items() if job.done()]
        for worker in ended:
            del self.jobs[worker]
        return ended

    def _free_gpu(self) -> str:
        """The first that neither a run of its own uses nor one of the others at the last look."""
        used = self.taken | {self.work[worker].gpu for worker in self.jobs}
        return next(gpu for gpu in self.gpus if gpu not in used)

    def stop(self) -> None:
        patience = max((self.work[worker].grace_seconds for worker in self.jobs), default=0.0) + 10
        until = time.monotonic() + patience
        try:
            while self.jobs and time.monotonic() < until:
                self._signal(signal.SIGTERM)
                time.sleep(0.5)
                self.ended()
        finally:  # an impatient second Ctrl-C comes here too
            self._kill()

    def _signal(self, number: int) -> None:
        for job in self.jobs.values():
            if not job.done():  # so that the process is there to be told
                os.kill(int(job.job_id), number)

    def _kill(self) -> None:
        """The run's own process with its kernel, by the record; then submitit's, which would start it again."""
        for worker, job in self.jobs.items():
            if job.done():
                continue
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGKILL)
            folder = self.work[worker].folder
            record = states.read(folder)
            if record is not None and record.worker == worker and states.is_held(folder):
                with suppress(ProcessLookupError):
                    os.kill(record.process, signal.SIGKILL)


class Slurm:
    """Jobs of a SLURM cluster, submitted together as one array.

    Args:
        folder: of the grid; all machines of the cluster see it.
        name: of the jobs.
        cores: a job.
        gpus: a job, 0 or 1.
        gib: of memory, a job.
        limit_seconds: of a run; the cluster gives some more.
        at_once: jobs at a time, at most.
        options: of sbatch, by submitit's names: partition, account, qos, setup, ...

    Raises:
        UserError: no cluster here, or an option that sbatch does not have.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        cores: int,
        gpus: int = 0,
        gib: float | None = None,
        limit_seconds: float | None = None,
        at_once: int = 256,
        grace_seconds: float = 60,
        options: Mapping[str, Any] | None = None,
    ):
        submitit = _submitit()
        try:
            self.executor = submitit.SlurmExecutor(folder=folder / JOBS, max_num_timeout=10_000)
        except RuntimeError:
            raise UserError("executor: found slurm on a machine without srun; run this on a machine of the cluster, or choose local.") from None
        asked: dict[str, Any] = {
            "job_name": name,
            "cpus_per_task": cores,
            "array_parallelism": at_once,
            "signal_delay_s": int(grace_seconds) + 30,
            "additional_parameters": {"requeue": True},
        }
        asked |= {"gpus_per_node": gpus} if gpus else {}
        asked |= {"mem": f"{max(1, round(gib * 1024))}MB"} if gib is not None else {}
        # where runs have no limit, a job that comes to its own is queued again, and goes on
        asked["time"] = SLURM_MINUTES if limit_seconds is None else int(limit_seconds + grace_seconds + SLACK_SECONDS) // 60 + 1
        try:
            self.executor.update_parameters(**asked | dict(options or {}))
        except ValueError as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
        self.cores = cores
        self.jobs: dict[str, str] = {}
        self._asked = time.monotonic()

    def room(self, others: Sequence[Record]) -> int:
        return 1_000_000  # the cluster has a queue of its own

    def submit(self, works: Sequence[Work]) -> None:
        """All as one array of jobs. Raises UserError: sbatch refuses it."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            jobs = self.executor.submit_array([replace(work, cores=self.cores) for work in works])
        except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or str(error)
            raise UserError(f"sbatch: {' '.join(str(told).split())}") from None
        self.jobs |= {work.worker: job.job_id for work, job in zip(works, jobs, strict=True)}

    def ended(self) -> list[str]:
        if not self.jobs or time.monotonic() - self._asked < ASK_SECONDS:
            return []
        self._asked, queue = time.monotonic(), _queue()
        if queue is None:  # the cluster does not answer; its jobs are where they are
            return []
        ended = [worker for worker, job in self.jobs.items() if job not in queue]
        for worker in ended:
            del self.jobs[worker]
        return ended

    def stop(self) -> None:
        if self.jobs:
            subprocess.run(["scancel", *self.jobs.values()], check=False, capture_output=True)
        until = time.monotonic() + 120
        while self.jobs and time.monotonic() < until:
            time.sleep(1)
            self.ended()


def _queue() -> set[str] | None:
    """Jobs of this user that wait or run, an element of an array each; None where squeue fails. Accounting, which sacct needs, is not everywhere."""
    told = subprocess.run(["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True, check=False)
    return set(told.stdout.split()) if told.returncode == 0 else None


def _submitit() -> ModuleType:
    """submitit, told which signal it is that a cluster sends: it reads that when it is imported."""
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL
    import submitit

    return submitit


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started within never hear Ctrl-C, which a terminal sends to all of them: the one that started them answers it, and asks them to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def fitting(*, cores: int, cores_a_run: int, gib_a_run: float, free_gib: float, gpus: int = 0) -> int:
    """How many runs at once: by GPUs or cores, and by memory; one at least.

    >>> fitting(cores=16, cores_a_run=2, gib_a_run=3.0, free_gib=15.0)
    4
    """
    by_memory = int(free_gib * MEMORY_SHARE / gib_a_run)
    return max(1, min(gpus or cores // cores_a_run, by_memory))


def usable_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES: those that it names already, else all that the driver knows; found without PyTorch, which takes seconds to import."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return told.stdout.split()
