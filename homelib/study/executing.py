"""One notebook, executed by papermill in this process. Its kernel ends when this process ends, however that is.

`python -m homelib.study.executing NOTEBOOK OUT PARAMETERS.yaml` does it in a process of its own: that is how the workbook runs its notebooks.
"""

import ast
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of the cells that papermill puts into an executed copy

# What OpenMP is told, unless the caller tells it: a thread that waits for work spins a little, then sleeps (see the Makefile).
ON_A_CPU = {"GOMP_SPINCOUNT": "10000"}
FOR_KERNELS = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}

LONGEST_SOCKET = 90  # bytes of a path; systems allow some 100
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up here: between fork and exec nothing may be


def environment() -> dict[str, str]:
    """Of a process that executes notebooks: the caller's, with what helps where it says nothing."""
    return ON_A_CPU | os.environ | FOR_KERNELS


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and default values of the cell tagged `parameters`. Raises UserError where there is none, or it holds more than literals."""
    import nbformat  # takes a third of a second, which the table of states need not wait for

    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            try:
                return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(cell.source).body}
            except (AttributeError, ValueError, SyntaxError):
                raise UserError(f"{notebook.name}: its parameters cell holds more than `name = literal` lines.") from None
    raise UserError(f"{notebook.name}: no cell tagged 'parameters'.")


def check_call(notebook: Path, out: Path, parameters: Mapping[str, Any]) -> None:
    """Raises UserError: a parameter that the notebook does not have (papermill would only warn), or its own place for its executed copy."""
    known = parameters_of(notebook)
    if unknown := [name for name in parameters if name not in known]:
        raise UserError(f"{notebook.name}: no parameter {', '.join(unknown)}; it has {', '.join(known)}.")
    if out.resolve() == notebook.resolve():
        raise UserError(f"{out}: found the notebook itself, expected another place for its executed copy. Choose another folder.")


class Kernel:
    """The kernel of the notebook that is executed in this process just now, to be ended from a signal's handler."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._asked = False

    def ask(self) -> None:
        """To stop: a training in it writes its checkpoint and ends its cell. One that only just starts is told when it is there."""
        self._asked = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """With all that it has started: its processes are a session of their own."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def manager(self, sockets: Path | None) -> type:
        """A kernel manager for papermill, whose kernel is this one. sockets: a folder for its channels; None takes TCP ports."""
        from jupyter_client.manager import AsyncKernelManager

        ours = self

        class Bound(AsyncKernelManager):
            async def start_kernel(self, **named: Any) -> None:  # type: ignore[override]  # as AsyncKernelManager itself does to KernelManager
                if sockets is not None:
                    self.transport, self.ip = "ipc", str(sockets / "k")
                await super().start_kernel(preexec_fn=_end_with_parent, **named)
                provisioner: Any = self.provisioner
                ours._process = provisioner.process
                if ours._asked:
                    ours.kill()  # nothing was computed yet

        return Bound


def _end_with_parent() -> None:
    """A kernel whose process was killed would go on. Elsewhere than on Linux it looks for its parent itself, once a second."""
    if _prctl is not None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def execute(notebook: Path, out: Path, parameters: Mapping[str, Any], *, kernel: Kernel | None = None) -> None:
    """Execute one notebook in this process; `out` is its executed copy, saved after every cell. What its cells write to stderr is written to ours too.

    Raises what papermill raises: a cell that failed, a kernel that died. `what_failed` says it in one line.
    """
    import papermill

    with _sockets() as sockets:
        manager = (kernel or Kernel()).manager(sockets)
        asked = {"kernel_name": "python3", "progress_bar": False, "stderr_file": sys.stderr, "kernel_manager_class": manager}
        papermill.execute_notebook(str(notebook), str(out), dict(parameters), **asked)


@contextlib.contextmanager
def _sockets() -> Iterator[Path | None]:
    """A folder for a kernel's channels. Several kernels that start at once may be given one TCP port, and then one of them dies."""
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        yield Path(folder) if os.name == "posix" and len(folder) < LONGEST_SOCKET else None


def what_failed(out: Path, log: Path) -> str:
    """Which cell of the notebook failed, counted from 1 without those that papermill adds, and with what; the log's last words where no cell says so."""
    import nbformat

    begun = None  # the cell at which a kernel died, for want of memory say
    if out.exists():
        own = [c for c in nbformat.read(out, as_version=4).cells if not ADDED & set(c.metadata.get("tags", []))]
        for number, cell in enumerate(own, start=1):
            begun = number if cell.metadata.get("papermill", {}).get("start_time") else begun
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    message = re.sub(r"\x1b\[[0-9;]*m", "", output.evalue).split("\n")[0]
                    return f"cell {number}: {output.ename}: {message}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = lines[-1] if lines else "papermill failed without a word"
    return f"cell {begun}: {told}" if begun else told


if __name__ == "__main__":
    _notebook, _out, _values = map(Path, sys.argv[1:])
    execute(_notebook, _out, yaml.safe_load(_values.read_text()))
