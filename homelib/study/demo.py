"""The demo's two runs: trained on one patient, tested on the other. Notebooks and the command line come here for them."""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm  # text, not a widget: an executed copy of a notebook keeps its last state

from ..config import Settings, override, preset
from ..data.cases import demo_data, the_one, with_demo_cases
from ..data.demo import DemoData
from ..data.manifest import Manifest, load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..paths import runs_dir
from ..run.begin import OnValidation
from ..run.evaluate import evaluate
from ..run.folder import Run, written_whole
from ..run.predict import predict_probabilities
from ..run.signals import STATUS, Stopped
from ..run.train import fit
from .routing_log import RoutingLog, together

Watch = Callable[[dict[str, pd.DataFrame]], None]  # called with histories so far, by name
WATCH_SECONDS = 30  # between two calls: a figure takes a processor as long as a step


@dataclass(frozen=True)
class DemoRun:
    """One direction of the demo: its settings, its run folder (which need not exist yet), its two patients."""

    settings: Settings
    run: Run
    data: DemoData
    train_case: PreparedCase
    test_case: PreparedCase

    @property
    def manifest(self) -> Manifest:
        return load_manifest(self.settings.data.manifest)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    @property
    def window(self) -> tuple[float, float]:
        """Intensity limits for showing a slice, in HU."""
        return self.manifest.intensity_window


def demo_run(
    profile: str, direction: str = "a-to-c", *, folder: str | Path = "", run_folder: str | Path = "", changes: Mapping[str, Any] | None = None
) -> DemoRun:
    """Set up one direction of the demo: data found and prepared, settings complete.

    Args:
        profile: "smoke", "laptop" or "paper".
        direction: "a-to-c" or "c-to-a", trained on and tested on.
        folder: of the demo; empty is `runs/demo`. The run lies in `folder/training/<profile>-<direction>`.
        run_folder: of the run, where it is to lie elsewhere.
        changes: settings by dotted name. An unknown one is an error.

    Raises UserError: a run of an ablation that would be of phantoms in place of the real scans, for its table would mix both.
    """
    data = demo_data(preset(profile).profile)
    if run_folder and not data.real and profile != "smoke":
        raise UserError(f"profile: found {profile!r} without the real scans, expected them in a grid. `home data fetch demo` gets them or says why not.")
    settings = override(with_demo_cases(preset(profile), data, direction=direction), changes or {})
    train, test = (the_one(settings, data, role) for role in ("train", "test"))
    run = Run(run_folder or Path(folder or runs_dir() / "demo") / "training" / f"{profile}-{direction}")
    return DemoRun(settings, run, data, train, test)


def trained(demo: DemoRun, *, progress: bool = True, also: OnValidation | None = None) -> Run:
    """Train the run, or go on with it; a finished one is returned as it is. Every so often its Dice on the training patient is measured, and where its
    experts look there (`homelib.study.routing_log`).

    The test patient takes no part: there is no choice of a step or of a setting by it. `also` is called at each validation too.

    Raises UserError: the profile paper without a GPU, unless the CPU is asked for; and as `homelib.run.train.fit`.
    """

    def training_patient_dice(step: int, network: nn.Module) -> dict[str, float]:
        predicted = predict_probabilities(network.eval(), demo.train_case, demo.settings).argmax(0)
        _keep_sample(demo.run, step, predicted)
        table = evaluate(
            predicted,
            np.asarray(demo.train_case.label),
            spacing_mm=demo.train_case.spacing_mm,
            class_names=demo.class_names,
            case=demo.train_case.case.id,
            method=demo.settings.network,
            label_origin=demo.train_case.case.label_origin,
            metrics=("dice",),
        )
        return {"training_patient_dice": table["value"].mean()}

    if demo.run.state != "done" and demo.settings.profile == "paper" and demo.settings.training.accelerator == "auto" and not torch.cuda.is_available():
        raise UserError(
            "profile: found 'paper' on a machine without a CUDA GPU, where a step takes minutes; expected smoke or laptop. "
            "To train it all the same set training.accelerator to cpu."
        )
    watches = [training_patient_dice, *([also] if also else [])]
    if not demo.settings.untraced:
        watches.append(RoutingLog(demo.run.folder, demo.train_case, demo.settings))
    return fit(demo.settings, [demo.train_case], demo.run.folder, progress=progress, on_validation=together(*watches))


def _keep_sample(run: Run, step: int, predicted: np.ndarray) -> None:
    with written_whole(run.samples / f"step-{step:07d}.npz") as part:
        np.savez_compressed(part, label=predicted.astype(np.uint8))


def samples(run: Run) -> dict[int, np.ndarray]:
    """What the network said of its training patient at each validation: steps done -> class indices (D, H, W) uint8 on the prepared grid."""
    found = {}
    for path in sorted(run.samples.glob("step-*.npz")):
        with np.load(path) as kept:
            found[int(path.stem.removeprefix("step-"))] = kept["label"]
    return found


def trained_side_by_side(demos: Mapping[str, DemoRun], *, progress: bool = True, watch: Watch | None = None) -> dict[str, Run]:
    """Train several runs, as `trained` does. Without a GPU they go side by side, each in a process of its own with its share of the cores:
    small convolutions gain little from a second core. `watch` is called with their histories, every so often (one after the other: at validations) and
    at the end.

    Raises UserError: what any of them raises, after the others have ended.
    """
    todo = {name: demo for name, demo in demos.items() if demo.run.state != "done"}
    cores = torch.get_num_threads()
    on_cpu = all(demo.settings.training.accelerator == "cpu" or not torch.cuda.is_available() for demo in todo.values())
    if not on_cpu or len(todo) < 2 or cores < len(todo):
        done = {}
        now_and_then = _NowAndThen(demos, watch)
        for name, demo in demos.items():
            done[name] = trained(demo, progress=progress, also=now_and_then)
            _watched(demos, watch)
        return done
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    work = {name: context.Process(target=_train_in_process, args=(demo, cores // len(todo), errors), daemon=True) for name, demo in todo.items()}
    steps = sum(demo.settings.training.steps for demo in todo.values())
    bar = tqdm(
        total=steps, desc=", ".join(demo.run.name for demo in todo.values()), unit="step", disable=not progress, mininterval=10, miniters=1, file=sys.stdout
    )
    try:
        for process in work.values():
            process.start()
        running, told = True, time.monotonic()
        while running:
            time.sleep(0.5)
            if time.monotonic() - told > WATCH_SECONDS:
                bar.clear()  # the first figure ends the output that the bar stands in: it would stay above, at what it said then
                _watched(demos, watch)
                bar.refresh()
                told = time.monotonic()
            running = any(process.is_alive() for process in work.values())
            bar.update(sum(demo.run.status.get("steps", 0) for demo in todo.values()) - bar.n)
    finally:
        bar.close()
        for process in work.values():
            if process.is_alive():  # this process was interrupted; each run goes on from its last checkpoint when asked again
                process.terminate()
    if not errors.empty():
        raise UserError(errors.get())
    if died := {name: process.exitcode for name, process in work.items() if process.exitcode}:
        name = next(iter(died))
        raise RuntimeError(f"{demos[name].run.folder}: training ended with exit status {died[name]}; its own words are in the log above.")
    done = {name: trained(demo, progress=False) for name, demo in demos.items()}
    _watched(demos, watch)
    return done


def _watched(demos: Mapping[str, DemoRun], watch: Watch | None) -> None:
    if watch is not None:
        watch({name: demo.run.history for name, demo in demos.items()})


class _NowAndThen:
    """Calls `watch` at a validation, unless it was called a short while ago."""

    def __init__(self, demos: Mapping[str, DemoRun], watch: Watch | None):
        self.demos, self.watch, self.told = demos, watch, -math.inf

    def __call__(self, step: int, network: nn.Module) -> dict[str, float]:
        if time.monotonic() - self.told > WATCH_SECONDS:
            _watched(self.demos, self.watch)
            self.told = time.monotonic()
        return {}


def _train_in_process(demo: DemoRun, threads: int, errors: "SimpleQueue[str]") -> None:
    torch.set_num_threads(threads)
    try:
        trained(demo, progress=False)
    except UserError as error:
        errors.put(str(error))
    except Stopped:  # the notebook was interrupted; the run goes on from its checkpoint when asked again
        sys.exit(STATUS)
