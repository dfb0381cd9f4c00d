"""What a training tells as it runs: a row a step in history.csv, TensorBoard for who asks, a line an interval, and a bar on a terminal."""

import csv
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]  # Windows has none

from ..errors import UserError
from ..progress import bar
from .folder import HISTORY, written_whole


class History:
    """Rows by step, as they are. In the file they are as of the last `flush`, so that others can watch; a file with more rows than a checkpoint is
    written anew when the training goes on."""

    def __init__(self, path: Path | None, rows: Sequence[dict] = ()):
        self.path, self.rows = path, list(rows)
        self._columns, self._written = (), 0

    def add(self, row: dict) -> None:
        self.rows.append(row)

    def flush(self) -> None:
        """Add what is new to the file; write it anew, whole, where it has other columns or was not begun here."""
        if self.path is None:
            return
        columns = tuple(dict.fromkeys(name for row in self.rows[self._written :] for name in (*self._columns, *row)))
        if self._written and columns in ((), self._columns):
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(self.rows[self._written :])
        else:
            self._columns = tuple(dict.fromkeys((*self._columns, *(name for row in self.rows for name in row)))) or HISTORY
            with written_whole(self.path) as part:
                pd.DataFrame(self.rows, columns=self._columns).to_csv(part, index=False)
        self._written = len(self.rows)

    def cut(self, steps: int) -> None:
        """Forget all rows from `steps` on."""
        self.rows, self._written = self.rows[:steps], 0


class TensorBoard:
    """The rows as scalars for TensorBoard, in the run folder's `tensorboard/`; what is there from the step `begin` on is no longer shown.

    Raises UserError: it is not installed.
    """

    def __init__(self, folder: Path, *, begin: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError('training.loggers: found tensorboard, which is not installed; pip install "homelib[tensorboard]", or leave it out.') from None
        self._open = lambda step: SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self.writer = self._open(begin)

    def begin(self, step: int) -> None:
        """Anew from a step, to which the training went back."""
        self.writer.close()
        self.writer = self._open(step)

    def add(self, rows: Sequence[dict]) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()  # a checkpoint comes next: after a crash nobody would add them again

    def close(self) -> None:
        self.writer.close()


class Progress:
    """A bar where stderr is a terminal, and a line an interval wherever progress is asked for."""

    def __init__(self, name: str, *, done: int, steps: int, show: bool):
        self.name, self.steps, self.show = name, steps, show
        self.bar = bar(total=steps, initial=done, unit="step", desc=name, show=show)

    def step(self) -> None:
        self.bar.update()

    def back(self, step: int) -> None:
        self.bar.reset(self.steps)
        self.bar.update(step)

    def line(self, rows: Sequence[dict], *, skipped: int, memory_gib: float | None, best: float | None) -> None:
        """What an interval was: median loss, rate, gradient norm, Dice where there is one, time a step, memory."""
        last, first = rows[-1], rows[0]
        took = (last["seconds"] - first["seconds"]) / max(1, len(rows) - 1)
        told = [f"step {last['step'] + 1}/{self.steps}", f"loss {_median(rows, 'loss'):.3f}"]
        told += [f"rate {last['learning_rate']:.2g}", f"gradient {_median(rows, 'gradient_norm'):.2g}"]
        told += [f"{name.replace('_', ' ')} {last[name]:.3f}" for name in last if name.endswith("dice")]
        told += [f"best {best:.3f}"] if best is not None else []
        told += [f"{took:.3g} s a step"] + ([f"{memory_gib:.1f} GiB"] if memory_gib else []) + ([f"{skipped} steps skipped"] if skipped else [])
        self.say(", ".join(told))

    def say(self, text: str) -> None:
        if self.show:
            self.bar.write(f"{self.name}: {text}", file=sys.stdout)

    def close(self) -> None:
        self.bar.close()


def _median(rows: Sequence[dict], name: str) -> float:
    """Of the steps that were taken; NaN where none was."""
    taken = [row[name] for row in rows if math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"])]
    return statistics.median(taken) if taken else math.nan


def memory_gib() -> float | None:
    """The most memory that this process has held: of its GPU, else of the machine; None where the system does not tell (Windows)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
