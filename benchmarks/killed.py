"""Killed at random moments, a training ends with the weights of one that nobody disturbed. Not a speed: a proof that takes too long for the tests.

    python -m benchmarks.killed [--kills 20] [--seed 0]

A tiny training on generated phantoms, on a CPU, a checkpoint each second step, in a process of its own that is ended by SIGKILL wherever it is: while it
starts, computes, validates or writes. Exit status 1 where a weight differs or a checkpoint cannot be read.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from homelib import UserError
from homelib.config import override, preset
from homelib.data.cases import demo_data, prepared, with_demo_cases
from homelib.data.parallel import new_processes
from homelib.run.checkpoint import load_checkpoint, load_newest
from homelib.run.folder import Run
from homelib.run.train import fit

SETTINGS = {  # every state that a checkpoint holds is in play
    "training.accelerator": "cpu", "training.steps": 12, "training.batch_size": 1, "training.validate_every": 6, "training.checkpoint_every": 2,
    "training.ema": 0.9, "training.clip_norm": 1.0, "training.augment.noise": 0.05, "training.warmup_steps": 3, "data.patch_voxels": (16, 16, 32),
}  # fmt: skip
SHARE = 0.7  # of an undisturbed training's time, that a killed one is left at most


def train(folder: str) -> None:
    """The training, in a process of its own."""
    torch.set_num_threads(1)
    demo = demo_data("smoke")
    settings = override(with_demo_cases(preset("smoke"), demo), SETTINGS)
    (case,) = prepared(settings, demo)
    (other,) = prepared(settings, demo, "test")
    settings = override(settings, {"data.validation_cases": settings.data.test_cases, "data.test_cases": ()})
    fit(settings, [case], folder, validation=[other], progress=False)


def kill_and_resume(folder: Path, *, kills: int, seed: int) -> dict:
    """Train once undisturbed, then others that are killed and started again until they are done.

    Returns:
        killed: how often. runs: trainings that were ended so often. steps: what the last checkpoint was of, at each kill. unreadable: kills after which
        a checkpoint could not be read. identical: whether all of them have the weights of the undisturbed one, in best and last.
    """
    rng, steps, unreadable, identical, runs = np.random.default_rng(seed), [], 0, True, 0
    _run(folder / "warm")  # the first one compiles, and prepares the cases
    began = time.perf_counter()
    _run(folder / "undisturbed")
    whole = time.perf_counter() - began
    expected = _weights(Run(folder / "undisturbed"))
    run = Run(folder / "0")
    while len(steps) < kills:
        if not _run(run.folder, end_after=rng.uniform(0, SHARE * whole)):
            steps.append(_step(run))
            unreadable += not _readable(run)
            continue
        identical, runs = identical and _same(_weights(run), expected), runs + 1
        run = Run(folder / str(runs))
    _run(run.folder)
    identical = identical and _same(_weights(run), expected)
    return {"killed": len(steps), "runs": runs + 1, "steps": steps, "unreadable": unreadable, "identical": identical}


def _run(folder: Path, *, end_after: float | None = None) -> bool:
    """Whether it came to its end."""
    process = new_processes(__name__).Process(target=train, args=(str(folder),))
    process.start()
    process.join(end_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{folder}: the training ended with exit status {process.exitcode}")
    return process.exitcode == 0


def _readable(run: Run) -> bool:
    """All that is there, each by itself."""
    try:
        for path in (run.checkpoint_file, run.previous_file):
            if path.exists():
                load_checkpoint(path)
        return True
    except UserError:
        return False


def _step(run: Run) -> int:
    state = load_newest(run.checkpoint_file, run.previous_file, say=print)
    return -1 if state is None else state["step"]


def _weights(run: Run) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run.checkpoint_file)
    return {f"best {name}": tensor for name, tensor in load_file(run.weights_file).items()} | {f"last {name}": t for name, t in state["network"].items()}


def _same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), kills=told.kills, seed=told.seed)
    print(f"killed {found['killed']} times in {found['runs']} trainings, at checkpoints of steps {found['steps']}; unreadable: {found['unreadable']}")
    print("all weights are bit for bit those of the undisturbed training" if found["identical"] else "WEIGHTS DIFFER from the undisturbed training")
    sys.exit(0 if found["identical"] and not found["unreadable"] else 1)


if __name__ == "__main__":
    main()
