"""What a run of each arm will take, from a few steps measured here: time for the plan, memory for how many fit at once.

It is measured in a process of its own, so that the driver holds neither networks nor a GPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Settings, override, preset
from ..data.parallel import new_processes
from ..progress import bar

if TYPE_CHECKING:
    from ..data.prepare import PreparedCase

Arms = Mapping[str, tuple[Mapping[str, Any], str | int | None]]  # arm -> the changes of a run of it, and its fold

PROCESS_GIB = 1.2  # of a run before its training: kernel, PyTorch, MONAI, and the process that executes the notebooks
NOTEBOOK_SECONDS = 22  # of one core: two kernels, what they import, tables; the mean of the 69 runs of laptop-tables without figures, two at once
FIGURES_SECONDS = 50  # of one core: the pictures of notebooks 03 and 04, and the baselines, on the demo's scans; a run of two steps took 94 s with, 44 without
AWAY = 2  # voxels by which a prediction is taken to be off, to time its distances: surfaces as smooth as those of the reference


@dataclass(frozen=True)
class Probe:
    """Of one run of an arm. seconds: training, validation, evaluation, and what the notebooks do beside. gib: of memory, on the CPU all of it."""

    seconds: float
    gib: float


@dataclass(frozen=True)
class Scans:
    """Whole scans that a run looks at. validation: of each. once: for pictures, and where experts look at the start. measured: those that are predicted on
    their own grids, and measured."""

    validation: int
    once: int
    measured: int


def probe(profile: str, arms: Arms, *, data: Mapping[str, str] | None = None, cores: int | None = None, figures: bool = True) -> dict[str, Probe]:
    """Arm -> what one run of it will take, some seconds an arm.

    Args:
        data: data sets by name, and their folders; empty is the demo.
        cores: a run.
        figures: the notebooks' parameter on the demo: whether its runs draw, and measure baselines.
    """
    return _apart(_probe, profile, arms, data or {}, cores, figures)


def memory_gib(profile: str, arms: Arms, *, data: Mapping[str, str] | None = None) -> float:
    """The most that a run of any arm will need, from what its network keeps of a small patch; no step is made."""
    return max(_apart(_memory, profile, arms, data or {}).values())


def scans_of(settings: Settings, *, data: Mapping[str, str], figures: bool) -> Scans:
    """How many whole scans a run predicts. On data sets all cases that it was not trained on are measured, on the demo both patients; there each
    validation predicts the patient that is trained on, and where the network has experts traces them too, as before the first step."""
    if data:
        most = settings.training.validation_cases_most or len(settings.data.validation_cases)
        return Scans(min(len(settings.data.validation_cases), most), 0, len({*settings.data.validation_cases, *settings.data.test_cases}))
    experts = int(not settings.untraced)
    return Scans(1 + experts, experts + (2 if figures else 0), 2)  # pictures: in notebook 03, and by the untrained network in 04


def _apart(function: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=new_processes(__name__)) as pool:
        return pool.submit(function, *given).result()


def _cohort(
    profile: str, changes: Mapping[str, Any], fold: str | int | None, data: Mapping[str, str]
) -> "tuple[Settings, Sequence[PreparedCase], Sequence[PreparedCase]]":
    """A run's settings, complete, its training cases, and cases like those that it measures: on the demo these, on data sets one that it is trained on."""
    if data:
        from .on_data import cohort_on

        made = cohort_on(profile, data, fold=None if fold is None else int(fold), changes=changes)
        return made.settings, made.train, made.train[:1]
    from ..data.cases import demo_data, prepared, with_demo_cases

    demo = demo_data(preset(profile).profile)
    directed = {"direction": fold} if isinstance(fold, str) else {}
    settings = override(with_demo_cases(preset(profile), demo, **directed), changes)
    train = prepared(settings, demo)
    return settings, train, [*train, *prepared(settings, demo, "test")]


def _memory(profile: str, arms: Arms, data: Mapping[str, str]) -> dict[str, float]:
    from ..run.estimate import needed_gib

    return {arm: PROCESS_GIB + needed_gib(_cohort(profile, *run, data)[0]) for arm, run in arms.items()}


def _probe(profile: str, arms: Arms, data: Mapping[str, str], cores: int | None, figures: bool) -> dict[str, Probe]:
    import torch

    from ..run.begin import on_devices
    from ..run.checkpoint import build_network
    from ..run.estimate import estimate, needed_gib
    from ..run.predict import predict_probabilities

    if cores is not None:
        torch.set_num_threads(cores)
    beside = NOTEBOOK_SECONDS + (FIGURES_SECONDS if figures and not data and profile != "smoke" else 0)
    found, measured = {}, None
    for arm, (changes, fold) in bar(arms.items(), desc="probe", unit="arm", total=len(arms)):
        settings, cases, like_measured = _cohort(profile, changes, fold, data)
        config, step, scans = settings.training, estimate(settings, cases), scans_of(settings, data=data, figures=figures)
        network = build_network(settings).eval().to(on_devices(config).device)
        began = time.perf_counter()
        predict_probabilities(network, cases[0], settings)
        scan = time.perf_counter() - began
        if measured is None:  # the same for every arm, but for what a poor network predicts
            measured = statistics.mean(_measured(case, settings.model.out_channels) for case in like_measured)
        patches = 0.0 if config.workers else step.patch_seconds * config.batch_size * config.accumulate
        training = config.steps * (step.step_seconds + patches)
        predicted = math.ceil(config.steps / config.validate_every) * scans.validation + scans.once + scans.measured
        seconds = training + predicted * scan + scans.measured * measured + beside
        found[arm] = Probe(seconds, PROCESS_GIB + needed_gib(settings))
    return found


def _measured(case: "PreparedCase", classes: int) -> float:
    """Seconds to take a prediction to the file's own grid, which may be many times the network's, and to measure it there. An untrained network's own
    surfaces would be noise, and slow."""
    from ..data.manifest import load_manifest
    from ..data.prepare import read_label
    from ..run.evaluate import evaluate
    from ..run.predict import to_native

    began, manifest = time.perf_counter(), load_manifest(case.case.manifest)
    to_native(np.zeros((classes, *case.image.shape), np.float32), case)
    reference = read_label(case.case.label_file, case.native_shape, case.native_affine, manifest)
    spacing_mm = tuple(((case.native_affine[:3, :3] ** 2).sum(0) ** 0.5).tolist())
    about: dict[str, Any] = {"case": case.case.id, "method": "", "label_origin": case.case.label_origin}
    evaluate(np.roll(reference, AWAY, axis=0), reference, spacing_mm=spacing_mm, class_names=manifest.class_names, **about)
    return time.perf_counter() - began
