"""Grids of real trainings, disturbed: `python -m benchmarks.grid [--kills 5] [--seed 0]` into benchmarks/results/grid.json. A proof, not a speed.

Twelve runs of the smoke size (three arms, two seeds, two folds), each with the workbook's own notebooks: once undisturbed, once with the driver killed at
random moments, alone or with all that it has started, and begun again. Then twelve arms of which one crashes and one never ends.
Exit status 1 where a table differs, finished work was done again, or an arm that was well did not finish.
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
from pathlib import Path

import pandas as pd
import yaml

from benchmarks.measure import save

HOME = [sys.executable, "-c", "from homelib.cli import main; main()"]
STEPS = 40
CHANGES = {"training.steps": STEPS, "training.checkpoint_every": 5, "training.validate_every": 20, "training.accelerator": "cpu"}
WELL = {"mamba-home": {}, "no-home": {"network": "SegMamba"}, "mlp": {"model.home": "mlp"}}
PATIENCE = 4  # times the longest undisturbed run: the limit of those beside an arm that never ends


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


def finished(folder: Path) -> dict[str, int]:
    """Finished runs, and when their numbers were written."""
    records = [json.loads(path.read_text()) for path in folder.glob("*/ablation.json")]
    return {record["name"]: (folder / record["name"] / "metrics.csv").stat().st_mtime_ns for record in records if record["state"] == "done"}


def killed_and_resumed(folder: Path, *, kills: int, seed: int) -> dict:
    rng, arms = random.Random(seed), {"seeds": [0, 1], "folds": ["a-to-c", "c-to-a"]}
    undisturbed, disturbed = grid(folder, "undisturbed", WELL, **arms), grid(folder, "disturbed", WELL, **arms)
    began = time.monotonic()
    if driver(undisturbed).wait():
        raise RuntimeError(undisturbed.with_suffix(".log").read_text()[-2000:])
    whole, moments, seen, again = time.monotonic() - began, [], {}, 0
    while len(moments) < kills:
        process, alone = driver(disturbed), len(moments) % 2 == 1
        time.sleep(rng.uniform(0.05, 0.9) * whole / kills)
        if process.poll() is not None:
            break
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        moments.append("the driver alone" if alone else "all of it")
        now = finished(disturbed.with_suffix(""))
        again += sum(now.get(name) != at for name, at in seen.items())
        seen = now
    driver(disturbed).wait()
    now = finished(disturbed.with_suffix(""))
    again += sum(now.get(name) != at for name, at in seen.items())
    records = [json.loads(path.read_text()) for path in undisturbed.with_suffix("").glob("*/ablation.json")]
    histories = [pd.read_csv(path)["step"].tolist() for path in disturbed.with_suffix("").glob("*/history.csv")]
    return {
        "runs": len(now),
        "minutes undisturbed": round(whole / 60, 1),
        "longest run, minutes": round(max(record["seconds"] for record in records) / 60, 2),
        "killed": moments,
        "finished runs done again": again,
        "every step once": all(steps == list(range(STEPS)) for steps in histories) and len(histories) == len(now),
        "same table, bit for bit": collected(disturbed).equals(collected(undisturbed)),
    }


def crash_and_hang(folder: Path, *, limit_minutes: float) -> dict:
    arms = {f"well-{n}": {"training.learning_rate": 0.001 * (1 + n)} for n in range(10)}
    arms |= {"crash": {"training.init_from": "/nowhere/at-all.safetensors"}, "hang": {"training.steps": 1_000_000}}
    file = grid(folder, "troubled", arms, seeds=[0], folds=["a-to-c"])
    driver(file, "--limit", str(limit_minutes)).wait()
    status = " ".join(home("ablate", "status", str(file.with_suffix(""))).split())
    told = [line for line in ("crash_seed0_a-to-c", "at-all.safetensors", "hang_seed0_a-to-c", "wall-clock limit") if line in status]
    return {"finished": len(finished(file.with_suffix(""))), "of": len(arms), "status tells": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given, load = parser.parse_args(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = {"killed": killed_and_resumed(Path(folder), kills=given.kills, seed=given.seed)}
        found["crash and hang"] = crash_and_hang(Path(folder), limit_minutes=PATIENCE * found["killed"]["longest run, minutes"])
    save("grid", {"load before": round(load, 2), "steps a run": STEPS} | found)
    print(json.dumps(found, indent=1))
    killed, troubled = found["killed"], found["crash and hang"]
    well = killed["same table, bit for bit"] and killed["every step once"] and not killed["finished runs done again"] and len(killed["killed"]) == given.kills
    sys.exit(0 if well and troubled["finished"] == 10 and len(troubled["status tells"]) == 4 else 1)


if __name__ == "__main__":
    main()
