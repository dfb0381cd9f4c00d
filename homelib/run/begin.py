"""What is seen to before a training begins: its settings and cases fit each other, its devices are there, its folder is its own."""

import logging
import operator
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import Strategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from ..config import OURS, Settings, TrainingConfig
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..frozen import field_names, shortened
from ..locks import held
from ..network.scan.backends import resolve
from ..paths import clear_parts
from .checkpoint import step_of
from .folder import Run, written_whole
from .heap import keep_freed_memory
from .mixture import label_space

MEANS = (
    "accelerator",
    "workers",
    "loggers",
    "checkpoint_every",
    "log_routing",
)  # settings that change how a run is computed, not what: they may differ when it goes on
NAMES_TOLD = 3  # settings that differ
PATIENCE_SECONDS = 5  # for a folder whose finished run somebody looks at through `fit`
AT_START = ("settings.json", "status.json", "history.csv", "best.safetensors", "last.ckpt", "previous.ckpt", "initial.csv", "tensorboard", "training.lock")

OnValidation = Callable[[int, nn.Module], dict[str, float]]


def launched(config: TrainingConfig) -> Fabric:
    """Fabric with the devices of the settings, and its other processes where there are several. Raises UserError for devices that are not there, and
    for a job of more processes than the settings have devices: each would train the whole run.
    """
    if (started := int(os.environ.get("WORLD_SIZE") or 1)) > (asked := config.devices * config.num_nodes):
        found = f"{started} processes of one job (WORLD_SIZE)"
        raise UserError(
            f"training.devices {config.devices}, num_nodes {config.num_nodes}: found {found}, expected {asked}. Set both, and strategy=ddp, or start one."
        )
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: str | Strategy = config.strategy
    if config.strategy == "fsdp":
        if config.accelerator not in ("auto", "cuda") or not torch.cuda.is_available():
            raise UserError(f"training.strategy: found fsdp on {config.accelerator}, expected a CUDA GPU for it. Set training.strategy=ddp.")
        from lightning_fabric.strategies import FSDPStrategy

        from ..network.unet import Block

        strategy = FSDPStrategy(auto_wrap_policy={Block})
    fabric = on_devices(config, devices=config.devices, num_nodes=config.num_nodes, strategy=strategy)
    if config.devices * config.num_nodes > 1 or config.strategy != "auto":
        # of 1x1x1 convolutions, whose two memory formats are one
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


def on_devices(config: TrainingConfig, *, devices: int = 1, num_nodes: int = 1, strategy: str | Strategy = "auto") -> Fabric:
    """Fabric with the accelerator and precision of the settings. Raises UserError where it cannot have the devices."""
    without_srun()
    try:
        return Fabric(accelerator=config.accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, precision=config.precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"training.accelerator {config.accelerator}, devices {devices}, strategy {config.strategy}: {reason}") from None


def computed_by(settings: Settings, device: torch.device) -> str:
    """The device, and the backend of the selective scan where there is one. Raises UserError for a backend that does not work there."""
    scans = settings.network in OURS and settings.model.mixer != "none"
    return f"on {device}" + (f", selective scan by {resolve(settings.model.scan_backend, str(device))}" if scans else "")


def without_srun() -> None:
    """On a machine of a cluster Lightning warns of processes that are not started by srun, which one process alone needs not be."""
    warnings.filterwarnings("ignore", message="The `srun` command is available")


def check(settings: Settings, validation: Sequence[PreparedCase], on_validation: OnValidation | None) -> None:
    """Before anything is written: settings that agree with the data and with what is measured at validations. Raises UserError where they do not."""
    names = label_space(settings.data).class_names
    if settings.model.out_channels != len(names):
        sets = " and ".join((settings.data.manifest, *settings.data.also))
        found, told = settings.model.out_channels, f"{len(names)}, the classes of {sets} with its background"
        raise UserError(f"model.out_channels: found {found}, expected {told}. Set model.out_channels={len(names)}.")
    given = {case.case.id for case in validation}
    if given != set(settings.data.validation_cases):
        wanted = ", ".join(settings.data.validation_cases) or "none"
        raise UserError(f"data.validation_cases: found {wanted}, but {', '.join(sorted(given)) or 'no case'} is at hand to validate on; make them agree.")
    if unlabelled := [case.case.id for case in validation if case.label is None]:
        raise UserError(f"data.validation_cases: found {', '.join(unlabelled)} without a label, expected labelled cases.")
    if settings.training.log_routing and on_validation is None:
        raise UserError("training.log_routing: found true without a function that measures it, expected one as on_validation. Train by home train.")
    if settings.training.strategy == "fsdp" and on_validation is not None:
        raise UserError("training.strategy: found fsdp with a function of its own at validation, which one process alone would call; choose ddp.")


def _differences(theirs: Settings, ours: Settings) -> list[str]:
    """`training.steps was 6, is 7` for each of the first settings that differ."""
    pairs = {name: [operator.attrgetter(name)(settings) for settings in (theirs, ours)] for name in field_names(Settings)}
    told = [f"{name} was {shortened(was)}, is {shortened(now)}" for name, (was, now) in pairs.items() if was != now]
    return told[:NAMES_TOLD] + (["..."] if len(told) > NAMES_TOLD else [])


@contextmanager
def claimed(run: Run, settings: Settings) -> Iterator[None]:
    """The folder, made this run's, and nobody else's within `with`; in the first process alone.

    Raises UserError: another training is at work there; it holds a run with other settings.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    mine = os.access(run.folder, os.W_OK)  # where nothing can be written, a run that is done can be looked at
    with held(run.lock_file, patience=PATIENCE_SECONDS) if mine else nullcontext(True) as ours:
        if not ours:
            raise UserError(f"{run.folder}: another training is at work there. Wait for it, or choose another name.")
        _take(run, settings)
        clear_parts(run.folder)
        yield


def _take(run: Run, settings: Settings) -> None:
    """Make the folder this run's, or see that it is. Settings of `MEANS` may be new; all may where nothing was trained with those that are there."""
    if run.settings_file.exists() and (theirs := run.settings) != settings:
        alike = theirs.model_copy(update={"training": theirs.training.model_copy(update={name: getattr(settings.training, name) for name in MEANS})})
        if alike != settings:
            told = ", ".join(_differences(alike, settings))
            if _begun(run):
                raise UserError(f"{run.folder}: holds a run with other settings ({told}); nothing was changed. Choose another name, or delete the folder.")
            print(f"{run.name}: a start with other settings ({told}), of which nothing was trained, is there; this one takes its place")
            for path in (run.history_file, run.weights_file, run.previous_file, run.checkpoint_file, run.initial_file):
                path.unlink(missing_ok=True)
    if not run.settings_file.exists() or run.settings != settings:
        with written_whole(run.settings_file) as part:
            settings.save(part)


def _begun(run: Run) -> bool:
    """Whether the folder holds more than a start leaves: a checkpoint beyond step 0 or one that cannot be read, weights alone, files of other kinds."""
    checkpoints = [path for path in (run.checkpoint_file, run.previous_file) if path.exists()]
    others = {path.name for path in run.folder.iterdir() if not path.name.startswith(".")} - set(AT_START)
    return bool(others) or any(step_of(path) != 0 for path in checkpoints) or (run.weights_file.exists() and not checkpoints)
