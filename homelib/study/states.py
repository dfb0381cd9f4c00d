"""How far a run of a grid is: its record, `ablation.json` in its folder, and its lock, which tells a run that is worked on from one that was left.

Whoever works on a run holds the lock of `run.lock` (`homelib.locks`); so a run whose record says "running" while nobody holds its lock is stale.
Plain JSON and no heavy import: the table of a thousand runs is read at once.
"""

import json
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import locks
from ..errors import UserError
from ..paths import written_whole

if TYPE_CHECKING:
    from ..run.folder import State  # which imports pandas

RECORD, LOCK, LOG = "ablation.json", "run.lock", "log.txt"
ENDED = ("done", "failed")  # all others are to be begun, or gone on with
PATIENCE_SECONDS = 5  # for a lock that a look at the state holds for an instant
TOLD_LINES = 4
TAIL_BYTES = 16_384


@dataclass(frozen=True)
class Record:
    """What a run is, and how far.

    name: of its folder. fingerprint: of all that decides what it finds. worker: a mark of the process that has begun it last, `process` its id, `host` its
    machine, `gpu` its GPU, if one.
    attempts: how often it was begun. notebook: the one that was begun last. ended: those that came to their end without an error.
    began: Unix time. seconds: of all attempts that told their end.
    error: one line, where it failed.
    """

    name: str
    arm: str
    seed: int
    fold: str | int | None
    fingerprint: str
    state: "State" = "queued"
    worker: str = ""
    process: int = 0
    host: str = ""
    gpu: str = ""
    attempts: int = 0
    notebook: str = ""
    ended: tuple[str, ...] = ()
    began: float = 0.0
    seconds: float = 0.0
    error: str = ""


def read(folder: Path) -> Record | None:
    """The record of a run; None where there is none. Raises UserError for one that cannot be read."""
    try:
        told = json.loads((folder / RECORD).read_text())
        return Record(**told | {"ended": tuple(told.get("ended", ()))})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / RECORD}: not a run's record ({error}); delete the folder to run it anew.") from None


def write(folder: Path, record: Record) -> Record:
    """By who holds the lock alone."""
    with written_whole(folder / RECORD) as part:
        part.write_text(json.dumps(asdict(record), indent=1) + "\n")
    return record


def held(folder: Path, *, patience: float = PATIENCE_SECONDS) -> AbstractContextManager[bool]:
    """The lock of a run: whether it was got, which it is not where somebody else works on the run."""
    return locks.held(folder / LOCK, patience=patience)


def is_held(folder: Path) -> bool:
    """Whether somebody works on the run just now."""
    return locks.is_held(folder / LOCK)


def seen(folder: Path, record: Record) -> Record:
    """The record with the state that it really is in: "stale" where it was left while it ran."""
    if record.state != "running" or is_held(folder):
        return record
    again = read(folder) or record  # it may have come to its end between the two looks
    return replace(again, state="stale") if again == record else again


@dataclass(frozen=True)
class Row:
    """A run in the table of states. steps: done, where it is training. told: the last lines of its log, where it failed."""

    record: Record
    folder: Path
    steps: int | None = None
    told: tuple[str, ...] = field(default=())

    @property
    def seconds(self) -> float:
        """Spent on it so far."""
        return self.record.seconds + (time.time() - self.record.began if self.record.state == "running" else 0.0)


def row(folder: Path, planned: Record) -> Row:
    """A run as it is now; one without a folder is queued."""
    record = read(folder)
    if record is None:
        return Row(planned, folder)
    record = seen(folder, record)
    steps = status(folder).get("steps") if record.state in ("running", "stale", "stopped") else None
    return Row(record, folder, steps, tuple(last_lines(folder / LOG)) if record.state == "failed" else ())


def last_lines(log: Path, *, lines: int = TOLD_LINES) -> list[str]:
    """Of a log: its last lines that hold something."""
    try:
        with open(log, "rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def status(folder: Path) -> dict[str, Any]:
    """What status.json says, the trainer's word for the most part."""
    try:
        return json.loads((folder / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def planned_record(told: dict[str, Any]) -> Record:
    """A run that was not begun, from a line of the plan."""
    known = {f.name for f in fields(Record)}
    return Record(**{name: value for name, value in told.items() if name in known})
