"""What a run of each arm will take, from a few steps measured here: time for the plan, memory for how many fit at once.

It is measured in a process of its own, so that the driver holds neither networks nor a GPU.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import Settings, override, preset
from ..data.parallel import new_processes

if TYPE_CHECKING:
    from ..data.prepare import PreparedCase

Arms = Mapping[str, tuple[Mapping[str, Any], str | int | None]]  # arm -> the changes of a run of it, and its fold

PROCESS_GIB = 1.2  # of a run before its training: kernel, PyTorch, MONAI, and the process that executes the notebooks
PREDICTIONS = 4  # of whole scans beside validation: two patients, one of them by the untrained network too; and the figures' (notebooks 03, 04)
NOTEBOOK_SECONDS = 40  # of a run's imports, tables and figures


@dataclass(frozen=True)
class Probe:
    """Of one run of an arm. seconds: training, validation, evaluation, and what the notebooks do beside. gib: of memory, on the CPU all of it."""

    seconds: float
    gib: float


def probe(profile: str, arms: Arms, *, data: Mapping[str, str] | None = None, cores: int | None = None) -> dict[str, Probe]:
    """Arm -> what one run of it will take, some seconds an arm. `data`: data sets by name, and their folders; empty is the demo."""
    return _apart(_probe, profile, arms, data or {}, cores)


def memory_gib(profile: str, arms: Arms, *, data: Mapping[str, str] | None = None) -> float:
    """The most that a run of any arm will need, from what its network keeps of a small patch; no step is made."""
    return max(_apart(_memory, profile, arms, data or {}, None).values())


def _apart(function: Callable, profile: str, arms: Arms, data: Mapping[str, str], cores: int | None) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=new_processes(__name__)) as pool:
        return pool.submit(function, profile, dict(arms), dict(data), cores).result()


def _cohort(profile: str, changes: Mapping[str, Any], fold: str | int | None, data: Mapping[str, str]) -> "tuple[Settings, Sequence[PreparedCase]]":
    """A run's settings, complete, and its training cases."""
    if data:
        from .on_data import cohort_on

        made = cohort_on(profile, data, fold=fold, changes=changes)
        return made.settings, made.train
    from ..data.cases import demo_data, prepared, with_demo_cases

    demo = demo_data(preset(profile).profile)
    directed = {"direction": fold} if isinstance(fold, str) else {}
    settings = override(with_demo_cases(preset(profile), demo, **directed), changes)
    return settings, prepared(settings, demo)


def _memory(profile: str, arms: Arms, data: Mapping[str, str], cores: int | None) -> dict[str, float]:
    from ..run.estimate import needed_gib

    return {arm: PROCESS_GIB + needed_gib(_cohort(profile, *run, data)[0]) for arm, run in arms.items()}


def _probe(profile: str, arms: Arms, data: Mapping[str, str], cores: int | None) -> dict[str, Probe]:
    import torch

    from ..run.checkpoint import build_network
    from ..run.estimate import estimate, needed_gib
    from ..run.predict import predict_probabilities

    if cores is not None:
        torch.set_num_threads(cores)
    found = {}
    for arm, run in arms.items():
        settings, cases = _cohort(profile, *run, data)
        config, step = settings.training, estimate(settings, cases)
        network = build_network(settings).eval()
        began = time.perf_counter()
        predict_probabilities(network, cases[0], settings)
        scan = time.perf_counter() - began
        patches = 0.0 if config.workers else step.patch_seconds * config.batch_size * config.accumulate
        training = config.steps * (step.step_seconds + patches)
        validated = min(len(settings.data.validation_cases), config.validation_cases_most or math.inf)
        scans = math.ceil(config.steps / config.validate_every) * max(1, validated) + PREDICTIONS
        found[arm] = Probe(training + scans * scan + NOTEBOOK_SECONDS, PROCESS_GIB + needed_gib(settings))
    return found
