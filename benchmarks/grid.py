"""Grids of real trainings, disturbed: `python -m benchmarks.grid [killed] [arms] [slurm]` into benchmarks/results/grid.json. A proof, not a speed.

Twelve runs of the smoke size (three arms, two seeds, two folds), each with the workbook's own notebooks, which nobody disturbs; and then by name

    killed    the same, their driver killed at random moments, alone or with all that it has started, and begun again
    arms      twelve arms of which one crashes and one never ends
    slurm     the same, on a SLURM cluster of one node that is started for it, one job queued again (`scontrol requeue`) while it trains

Without a name all that can run here. Each is saved when it has ended, beside what was saved before on this machine. `--undisturbed FOLDER` keeps the grid that
nobody disturbs, or finds it there. Exit status 1 where a table differs, finished work was done again, or an arm that was well did not finish.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd
import yaml

from benchmarks import measure, slurm_node
from homelib.run.checkpoint import step_of
from homelib.study import states
from homelib.study.executors import usable_cores
from homelib.study.states import Record

HOME = [sys.executable, "-c", "from homelib.cli import main; main()"]
STEPS, CHECKPOINT_EVERY = 40, 5
CHANGES = {"training.steps": STEPS, "training.checkpoint_every": CHECKPOINT_EVERY, "training.validate_every": 20, "training.accelerator": "cpu"}
WELL = {"mamba-home": {}, "no-home": {"network": "SegMamba"}, "mlp": {"model.home": "mlp"}}
AXES = {"seeds": [0, 1], "folds": ["a-to-c", "c-to-a"]}
PATIENCE = 4  # times the longest undisturbed run: the limit of those beside an arm that never ends
SLURM_PATIENCE = 10  # times the undisturbed grid, after which jobs that do not end are an error


@dataclass(frozen=True)
class Undisturbed:
    """The grid that nobody disturbs: its file, and the seconds that all of it and its longest run took."""

    file: Path
    seconds: float
    longest_seconds: float


def grid(folder: Path, name: str, arms: dict, *, seeds: list[int], folds: list[str]) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "question": "?", "profile": "smoke", "changes": CHANGES, "arms": arms, "seeds": seeds, "folds": folds}))
    return file


def driver(file: Path, *options: str) -> subprocess.Popen:
    """A driver in a session of its own, so that it can be ended with all that it has started."""
    command = [*HOME, "ablate", "run", str(file), "--folder", str(file.with_suffix("")), "-p", "figures=false", *options]
    with open(file.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


def home(*words: str) -> str:
    """Its words, in a window so wide that no name is folded."""
    return subprocess.run([*HOME, *words], env=os.environ | {"COLUMNS": "300"}, capture_output=True, text=True, check=False).stdout


def collected(file: Path) -> pd.DataFrame:
    home("ablate", "collect", str(file.with_suffix("")))
    return pd.read_csv(file.with_suffix("") / "results.csv")


def records(file: Path) -> list[Record]:
    return [states.read(path.parent) for path in sorted(file.with_suffix("").glob(f"*/{states.RECORD}"))]


def finished(file: Path) -> dict[str, int]:
    """Finished runs, and when their numbers were written."""
    done = [record.name for record in records(file) if record.state == "done"]
    return {name: (file.with_suffix("") / name / "metrics.csv").stat().st_mtime_ns for name in done}


def every_step_once(file: Path) -> bool:
    histories = [pd.read_csv(file.with_suffix("") / name / "history.csv") for name in finished(file)]
    return bool(histories) and all(history["step"].tolist() == list(range(STEPS)) for history in histories)


def undisturbed(folder: Path) -> Undisturbed:
    file = grid(folder, "undisturbed", WELL, **AXES)
    if driver(file, "--failed").wait():
        raise RuntimeError(file.with_suffix(".log").read_text()[-2000:])
    took = records(file)
    seconds = max(record.began + record.seconds for record in took) - min(record.began for record in took)
    return Undisturbed(file, seconds, max(record.seconds for record in took))


def killed_and_resumed(folder: Path, still: Undisturbed, *, kills: int, seed: int) -> dict:
    rng, disturbed = random.Random(seed), grid(folder, "disturbed", WELL, **AXES)
    moments, seen, again = [], {}, 0
    while len(moments) < kills:
        process, alone = driver(disturbed), len(moments) % 2 == 1
        time.sleep(rng.uniform(0.05, 0.9) * still.seconds / kills)
        if process.poll() is not None:
            break
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        moments.append("the driver alone" if alone else "all of it")
        now = finished(disturbed)
        again += sum(now.get(name) != at for name, at in seen.items())
        seen = now
    driver(disturbed).wait()
    now = finished(disturbed)
    again += sum(now.get(name) != at for name, at in seen.items())
    found = {
        "runs": len(now),
        "minutes undisturbed": round(still.seconds / 60, 1),
        "longest run, minutes": round(still.longest_seconds / 60, 2),
        "killed": moments,
        "finished runs done again": again,
        "every step once": every_step_once(disturbed),
        "same table, bit for bit": collected(disturbed).equals(collected(still.file)),
    }
    well = len(now) == 12 and len(moments) == kills and not again and found["every step once"] and found["same table, bit for bit"]
    return found | {"well": well}


def crash_and_hang(folder: Path, still: Undisturbed) -> dict:
    arms = {f"well-{n}": {"training.learning_rate": 0.001 * (1 + n)} for n in range(10)}
    arms |= {"crash": {"training.init_from": "/nowhere/at-all.safetensors"}, "hang": {"training.steps": 1_000_000}}
    file = grid(folder, "troubled", arms, seeds=[0], folds=["a-to-c"])
    driver(file, "--limit", str(PATIENCE * still.longest_seconds / 60)).wait()
    status = " ".join(home("ablate", "status", str(file.with_suffix(""))).split())
    told = [line for line in ("crash_seed0_a-to-c", "at-all.safetensors", "hang_seed0_a-to-c", "wall-clock limit") if line in status]
    return {"finished": len(finished(file)), "of": len(arms), "status tells": told, "well": len(finished(file)) == 10 and len(told) == 4}


def queued_again(folder: Path, still: Undisturbed) -> dict:
    file, until = grid(folder, "slurm", WELL, **AXES), time.monotonic() + SLURM_PATIENCE * still.seconds
    with slurm_node.cluster(cpus=usable_cores()):
        process = driver(file, "--executor", "slurm")

        def wait_for(what):
            """Until it is so; what it is."""
            while not (found := what()):
                if time.monotonic() > until or process.poll() is not None:
                    raise RuntimeError(f"it did not come to that\n{file.with_suffix('.log').read_text()[-2000:]}")
                time.sleep(0.1)
            return found

        try:
            record = wait_for(lambda: in_training(file))
            run = file.with_suffix("") / record.name
            slurm_node.told("scontrol", "requeue", slurm_node.job_of(record.process))
            stopped = wait_for(lambda: (now := states.seen(run, states.read(run))).state != "running" and now)
            before, at_step = pd.read_csv(run / "history.csv"), step_of(run / "last.ckpt")
            while process.poll() is None and time.monotonic() < until:
                slurm_node.begin_what_waits()
                time.sleep(2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    after = pd.read_csv(run / "history.csv")
    twice = before["seconds"].ne(after["seconds"].reindex(before.index))  # when a step was done says which time it was
    found = {
        "runs": len(finished(file)),
        "queued again": record.name,
        "after step": at_step,
        "its state then": stopped.state,
        "begun more than once": [one.name for one in records(file) if one.attempts > 1],
        "steps done twice": int(twice.sum()),
        "every step once": every_step_once(file),
        "same table, bit for bit": collected(file).equals(collected(still.file)),
    }
    once = found["begun more than once"] == [record.name] and found["every step once"] and found["steps done twice"] == 0
    return found | {"well": found["runs"] == 12 and 0 < at_step < STEPS and once and found["same table, bit for bit"]}


def in_training(file: Path) -> Record | None:
    """A run that has some steps behind it, and more before it."""
    for record in records(file):
        if record.state == "running" and CHECKPOINT_EVERY <= (step_of(file.with_suffix("") / record.name / "last.ckpt") or 0) <= STEPS // 2:
            return record
    return None


def save(part: str, found: dict) -> None:
    """One part beside those that were saved before, if it was on this machine and with these versions."""
    kept = json.loads(path.read_text()) if (path := measure.RESULTS / "grid.json").exists() else {}
    was, now = kept.pop("machine", {}), measure.machine()
    same = was | {"date": ""} == now | {"date": ""}
    measure.save("grid", (kept if same else {}) | {"steps a run": STEPS, part: found})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="killed, arms, slurm; all that can run here if none is named")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=Path, help="folder in which the grid that nobody disturbs is kept, or found; else it is made anew")
    given = parser.parse_args()
    parts = {
        "killed": ("killed", lambda *where: killed_and_resumed(*where, kills=given.kills, seed=given.seed)),
        "arms": ("crash and hang", crash_and_hang),
        "slurm": ("slurm", queued_again),
    }
    if unknown := [name for name in given.parts if name not in parts]:
        parser.error(f"found {', '.join(unknown)}, expected some of {', '.join(parts)}")
    asked = given.parts or list(parts)
    if "slurm" in asked and (reason := slurm_node.why_not()):
        print(f"slurm: skipped, {reason}", flush=True)
        asked.remove("slurm")
    well = bool(asked)
    with tempfile.TemporaryDirectory() as folder:
        if given.undisturbed:
            given.undisturbed.mkdir(parents=True, exist_ok=True)
        still = undisturbed((given.undisturbed or Path(folder)).resolve()) if asked else None
        for key, part in (parts[name] for name in asked):
            load = round(os.getloadavg()[0], 2)
            found = part(Path(folder), still)
            well &= found.pop("well")
            save(key, {"date": date.today().isoformat(), "load before": load} | found)
            print(json.dumps({key: found}, indent=1), flush=True)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
