"""What `home ablate collect` makes of a grid's finished runs: their metrics in one table, what each arm costs and each run took, and how they were made.

The files hold no path of this machine: with `plan.json` they are what is committed of a grid (`homelib.study.arms`).
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..errors import UserError
from ..paths import written_whole
from ..run.folder import Run
from . import states
from .states import Row

RESULTS, TOOK, MADE = "results.csv", "runs.csv", "made.json"


def collect(folder: Path, rows: Sequence[Row], *, command: str) -> pd.DataFrame:
    """One tidy table with the columns run, arm, seed, fold, written to `results.csv`; what arms cost and runs took to `runs.csv`; to `made.json` by which
    command, when and by what they were made.

    Raises UserError: no run is finished.
    """
    tables = []
    for row in rows:
        if row.record.state == "done" and (file := row.folder / "metrics.csv").exists():
            table = pd.read_csv(file)
            tables.append(pd.concat([pd.DataFrame(_about(row), index=table.index), table], axis="columns"))
    if not tables:
        raise UserError(f"{folder}: none of {len(rows)} runs is finished; `home ablate run` does them.")
    results, costs = pd.concat(tables, ignore_index=True), _costs(rows)
    for name, table in ((RESULTS, results), (TOOK, pd.DataFrame([_took(row, costs.get(row.record.arm, {})) for row in rows]))):
        with written_whole(folder / name) as part:
            table.to_csv(part, index=False)
    with written_whole(folder / MADE) as part:
        part.write_text(json.dumps({"command": command} | _made(rows), indent=1) + "\n")
    return results


def _about(row: Row) -> dict[str, Any]:
    return {"run": row.record.name, "arm": row.record.arm, "seed": row.record.seed, "fold": row.record.fold}


def _costs(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Arm -> parameters and FLOPs, by the settings of one of its runs, in which the number of classes is that of its data."""
    from .costs import costs_of

    settings = {row.record.arm: run.settings for row in rows if (run := Run(row.folder)).settings_file.exists()}
    return costs_of(settings).rename(columns={"parameters M": "parameters_m", "GFLOPs": "gflops"}).to_dict("index") if settings else {}


def _took(row: Row, costs: Mapping[str, float]) -> dict[str, Any]:
    """A line of runs.csv: what a run took, by its record, and by what its training told."""
    told = states.status(row.folder)
    line = _about(row) | {"state": row.record.state, "attempts": row.record.attempts, "seconds": round(row.record.seconds, 1)}
    line |= {"training_seconds": told.get("seconds"), "steps_gib": told.get("steps_gib")}
    return line | {name: costs.get(name) for name in ("parameters_m", "gflops")} | {"error": row.record.error}


def _made(rows: Sequence[Row]) -> dict[str, Any]:
    """Of the finished runs: how many, the first one's beginning and the last one's end, and the machine and versions that collect them."""
    from .doctor import environment_line

    done = [row for row in rows if row.record.state == "done"]
    began, ended = min(row.record.began for row in done), max((row.folder / states.RECORD).stat().st_mtime for row in done)
    hours = sum(row.record.seconds for row in done) / 3600
    moments = {name: time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for name, at in (("began", began), ("ended", ended))}
    return {"runs": len(done), **moments, "minutes": round((ended - began) / 60, 1), "hours_of_runs": round(hours, 2), "environment": environment_line()}
