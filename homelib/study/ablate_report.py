"""What `home ablate` prints: the plan, and the table of states; the latter as a table for notebooks too."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from tqdm import tqdm

from .states import ENDED, Row

if TYPE_CHECKING:
    import pandas as pd

    from ..run.folder import State
    from .grids import Planned
    from .probe import Probe

STYLES = {"running": "cyan", "done": "green", "failed": "red", "stale": "yellow", "stopped": "yellow"}
ORDER: tuple["State", ...] = ("failed", "running", "stale", "stopped", "queued", "done")


def print_plan(runs: Sequence["Planned"], states: Mapping[str, Row], probes: Mapping[str, "Probe"], *, at_once: int, console: Console) -> None:
    """Runs with their fingerprints, and minutes from a probe; what is left, by as many at once as fit."""
    named = [Column(name, overflow="fold") for name in ("run", "arm", "seed", "fold", "fingerprint")]
    table = Table(*named, "state", Column("minutes", justify="right"))
    left = 0.0
    for run in runs:
        row, seconds = states.get(run.name), probes[run.arm].seconds if run.arm in probes else None
        state = row.record.state if row else "queued"
        table.add_row(run.name, run.arm, str(run.seed), _fold(run.fold), run.fingerprint, _coloured(state), _minutes(seconds))
        left += 0.0 if state in ("done", "failed") else seconds or 0.0
    console.print(table)
    if probes:
        most = max(probe.gib for probe in probes.values())
        console.print(f"{len(runs)} runs; left: about {left / 60 / at_once:.0f} minutes, {at_once} at once here, each up to {most:.1f} GiB.", highlight=False)
    else:
        console.print(f"{len(runs)} runs; --probe estimates their time.", highlight=False)


def plan_frame(runs: Sequence["Planned"]) -> "pd.DataFrame":
    """The runs of a grid for a notebook, one row a run."""
    import pandas as pd

    return pd.DataFrame([{"run": r.name, "arm": r.arm, "seed": r.seed, "fold": _fold(r.fold), "fingerprint": r.fingerprint} for r in runs])


def states_table(rows: Sequence[Row], *, most: int | None = None) -> Table:
    """The runs' states, those that need a look first where not all are shown; the last lines of what failed."""
    count = Counter(row.record.state for row in rows)
    title = ", ".join(f"{count[state]} {state}" for state in ORDER if count[state])
    table = Table(Column("run", overflow="fold"), "state", "at", Column("minutes", justify="right"), Column("told", overflow="fold"), title=title)
    shown = list(rows) if most is None else sorted(rows, key=lambda row: ORDER.index(row.record.state))[:most]
    for row in shown:
        told = "\n".join(dict.fromkeys([row.record.error, *row.told])) if row.record.state == "failed" else ""
        table.add_row(row.record.name, _coloured(row.record.state), _at(row), _minutes(row.seconds or None), escape(told))
    if len(shown) < len(rows):
        table.caption = f"and {len(rows) - len(shown)} more"
    return table


def states_frame(rows: Sequence[Row]) -> "pd.DataFrame":
    """The same for a notebook: one row a run."""
    import pandas as pd

    lines = [
        {
            "run": row.record.name,
            "arm": row.record.arm,
            "seed": row.record.seed,
            "fold": _fold(row.record.fold),
            "state": row.record.state,
            "at": _at(row),
            "minutes": round(row.seconds / 60, 1),
            "error": row.record.error,
        }
        for row in rows
    ]
    return pd.DataFrame(lines)


class Pace:
    """How far a grid is, at what rate, and how long still, in a line. The rate is of the runs that have ended since it was made."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.before: int | None = None

    def __call__(self, rows: Sequence[Row]) -> str:
        ended = sum(row.record.state in ENDED for row in rows)
        self.before = ended if self.before is None else self.before
        return tqdm.format_meter(ended, len(rows), time.monotonic() - self.began, ncols=80, unit="run", initial=self.before)


class Shown:
    """A watch for a notebook: the table of states, drawn anew in its place."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        self._handle = DisplayHandle()
        self._before: list | None = None

    def __call__(self, rows: Sequence[Row]) -> None:
        states = [(row.record.state, row.record.notebook, row.steps) for row in rows]
        if self._before is None:
            self._handle.display(states_frame(rows))
        elif states != self._before:
            self._handle.update(states_frame(rows))
        self._before = states


def told_by_lines(say: Callable[[str], None]) -> Callable[[Sequence[Row]], None]:
    """A watch for where no table can be drawn anew: a line whenever a run's state changes."""
    before: dict[str, str] = {}

    def watch(rows: Sequence[Row]) -> None:
        for row in rows:
            name, state = row.record.name, row.record.state
            if before.get(name, state if state in ("queued", "done") else "") != state:
                say(f"{name}: {state}" + (f", {row.record.error}" if row.record.error else ""))
            before[name] = state

    return watch


def _at(row: Row) -> str:
    if row.record.state in ("queued", "done"):
        return ""
    return row.record.notebook + (f", step {row.steps}" if row.steps is not None else "")


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def _fold(fold: str | int | None) -> str:
    return "" if fold is None else str(fold)


def _coloured(state: str) -> str:
    return f"[{STYLES[state]}]{state}[/]" if state in STYLES else state
