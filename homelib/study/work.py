"""What one process does for one run of a grid: its notebooks in order, each by papermill, under the run's lock, and the record of how it ended.

The process is started by an executor (`homelib.study.executors`). It may be ended at any moment: a run that was begun is gone on with, by the trainer's
checkpoint and without the notebooks that came to their end.
"""

import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.signals import STATUS
from . import states
from .executing import Kernel, environment, execute, what_failed
from .states import ENDED, LOG, Record

if TYPE_CHECKING:
    from ..run.folder import State  # which imports pandas

GRACE_SECONDS = 60  # for a training to write its checkpoint: a step may be long
ASKS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
REQUEUES = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))  # a cluster that takes its machine back


@dataclass(frozen=True)
class Work:
    """A run's notebooks, to be executed in a process of its own.

    Args:
        folder: of the run; its record is there.
        notebooks: each with its parameters.
        worker: a mark of this piece of work, for the record.
        cores: threads that a library may start; None leaves it to the libraries.
        gpu: the one that it may use, as in CUDA_VISIBLE_DEVICES; "" is none; None leaves it to the cluster.
        limit_seconds: wall-clock time of this attempt, after which it has failed.
        grace_seconds: from being asked to stop to being killed.
    """

    folder: Path
    notebooks: tuple[tuple[Path, Mapping[str, Any]], ...]
    worker: str
    cores: int | None = None
    gpu: str | None = None
    limit_seconds: float | None = None
    grace_seconds: float = GRACE_SECONDS

    def __call__(self) -> None:
        before = {number: signal.getsignal(number) for number in ASKS}
        with states.held(self.folder) as ours:
            record = states.read(self.folder)
            if not ours or record is None or record.state in ENDED:  # somebody else is at it, or was
                return
            self._set_environment()
            with Ending(Kernel(), self.limit_seconds, self.grace_seconds) as ending, _output_to(self.folder / LOG):
                self._run(record, ending)
        if ending.asked is None:
            return
        if ending.asked in REQUEUES and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
            signal.signal(ending.asked, before[ending.asked])
            signal.raise_signal(ending.asked)  # submitit queues the job again, now that the run is at rest
        sys.exit(STATUS)

    def checkpoint(self) -> Any:
        """What submitit puts into the queue in place of work that a cluster has interrupted: the same, for all else is in the run's folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _run(self, record: Record, ending: "Ending") -> None:
        began = time.time()
        where: dict[str, Any] = {"process": os.getpid(), "host": platform.node(), "gpu": self.gpu or ""}
        record = replace(record, state="running", worker=self.worker, attempts=record.attempts + 1, began=began, error="", **where)
        out, error = self.folder, ""
        states.write(self.folder, record)
        try:
            for notebook, parameters in self.notebooks:
                if ending.reason:
                    break
                if notebook.stem in record.ended:
                    continue
                out = self.folder / notebook.name
                out.unlink(missing_ok=True)  # else a kernel that dies at its start would show the cells of the attempt before
                record = states.write(self.folder, replace(record, notebook=notebook.stem))
                self._tell("running", notebook=notebook.stem)
                execute(notebook, out, parameters, kernel=ending.kernel)
                record = states.write(self.folder, replace(record, ended=(*record.ended, notebook.stem)))
        except Exception:
            if not ending.reason:
                traceback.print_exc()
                sys.stderr.flush()
                error = what_failed(out, self.folder / LOG)
        whole = len(record.ended) == len(self.notebooks)  # a reason may have come too late
        state: State = "done" if whole else "stopped" if ending.asked is not None else "failed"
        if ending.reason and not whole:
            print(f"{record.notebook}: {ending.reason}", file=sys.stderr, flush=True)
        error = f"{record.notebook}: {ending.reason or error}" if state == "failed" else ""
        self._tell(state, **({"error": error} if error else {}))
        states.write(self.folder, replace(record, state=state, error=error, seconds=record.seconds + time.time() - began))

    def _tell(self, state: "State", **told: object) -> None:
        """`status.json` is the trainer's too: what it has told stays."""
        from ..run.folder import Run

        run = Run(self.folder)
        kept = {name: value for name, value in run.status.items() if name not in ("state", "time", "error", "notebook")}
        run.set_state(state, **kept, **told)

    def _set_environment(self) -> None:
        """Of this process, for the kernels that it will start."""
        os.environ.update(environment())
        if self.cores is not None:
            os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(self.cores)))
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """All that this process, its kernels and the libraries below Python print goes to the run's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    with open(log, "ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, number)
            os.close(kept)


class Ending:
    """The end of a kernel before its time: asked for by a signal, or at a limit of wall-clock time. First it is asked, then it is killed.

    Signals alone and no thread, for a kernel is started by a fork. `reason` says why, `asked` which signal it was, if one.
    """

    def __init__(self, kernel: Kernel, limit_seconds: float | None, grace_seconds: float):
        self.kernel, self.limit, self.grace = kernel, limit_seconds, grace_seconds
        self.reason = ""
        self.asked: int | None = None
        self._before: dict = {}

    def __enter__(self) -> "Ending":
        for number in (*ASKS, signal.SIGALRM):
            self._before[number] = signal.signal(number, self._late if number == signal.SIGALRM else self._ask)
        if self.limit is not None:
            signal.setitimer(signal.ITIMER_REAL, self.limit)
        return self

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _ask(self, number: int, frame: object) -> None:
        if not self.reason:
            self.asked = number
            self._end(f"asked to stop by {signal.Signals(number).name}")

    def _late(self, number: int, frame: object) -> None:
        if self.reason:
            self.kernel.kill()
        else:
            self._end(f"wall-clock limit of {self.limit:g} s; the kernel was ended")

    def _end(self, reason: str) -> None:
        self.reason = reason
        signal.setitimer(signal.ITIMER_REAL, self.grace)
        self.kernel.ask()
