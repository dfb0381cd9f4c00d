"""A training that is killed at random moments and started again, beside one that nobody disturbed (`python -m benchmarks.killed`).

A tiny training on generated phantoms, on a CPU, a checkpoint each second step, in a process of its own that is ended by SIGKILL wherever it is: while it
starts, computes, validates or writes.
"""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
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
EARLY = 4  # each fourth kill comes before the first checkpoint is there; the others after one, two or three that this process has written


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
    starting, between = _timed(Run(folder / "undisturbed"))
    expected = _weights(Run(folder / "undisturbed"))
    run = Run(folder / "0")
    while len(steps) < kills:
        if len(steps) % EARLY == EARLY - 1:
            ended = _run(run.folder, end_after=rng.uniform(0, starting))
        else:
            ended = _run(run.folder, checkpoints=rng.integers(1, 4), end_after=rng.uniform(0, 2 * between))
        if not ended:
            steps.append(_step(run))
            unreadable += not _readable(run)
            continue
        identical, runs = identical and _same(_weights(run), expected), runs + 1
        run = Run(folder / str(runs))
    _run(run.folder)
    identical = identical and _same(_weights(run), expected)
    return {"killed": len(steps), "runs": runs + 1, "steps": steps, "unreadable": unreadable, "identical": identical}


def _timed(run: Run) -> tuple[float, float]:
    """Seconds to the first checkpoint of an undisturbed training, and from one to the next."""
    process, began = _started(run.folder), time.perf_counter()
    written = [time.perf_counter() - began for _ in _checkpoints(process, run)]
    process.join()
    if process.exitcode or len(written) < 2:
        raise RuntimeError(f"{run.folder}: the training ended with exit status {process.exitcode} after {len(written)} checkpoints")
    return written[0], (written[-1] - written[0]) / (len(written) - 1)


def _run(folder: Path, *, checkpoints: int = 0, end_after: float | None = None) -> bool:
    """Whether it came to its end: not where it was killed before, so many seconds after it had written so many checkpoints."""
    process = _started(folder)
    for count, _ in enumerate(_checkpoints(process, Run(folder)) if checkpoints else (), start=1):
        if count == checkpoints:
            break
    process.join(end_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{folder}: the training ended with exit status {process.exitcode}")
    return process.exitcode == 0


def _started(folder: Path) -> BaseProcess:
    process = new_processes(train.__module__).Process(target=train, args=(str(folder),))
    process.start()
    return process


def _checkpoints(process: BaseProcess, run: Run) -> Iterator[int]:
    """When each checkpoint was written, as it comes, until the process ends."""
    when = lambda: run.checkpoint_file.stat().st_mtime_ns if run.checkpoint_file.exists() else 0  # noqa: E731
    last = when()
    while process.is_alive():
        if (now := when()) != last:
            yield (last := now)
        time.sleep(0.002)


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
