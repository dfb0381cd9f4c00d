"""Training: patches in, a run folder out. Dice + cross-entropy, AdamW, cosine schedule (paper section 3.2 and App. B), on Lightning Fabric."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm  # text, not a widget: an executed copy of a notebook keeps its last state

from ..config import IGNORE, Settings, TrainingConfig
from ..data.loading import Patches
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from .checkpoint import build_network, load_checkpoint, save_checkpoint, save_weights
from .folder import Run, written_whole
from .loss import segmentation_loss

HEARTBEAT_SECONDS = 5  # how often status.json tells the steps done


def fit(settings: Settings, cases: Sequence[PreparedCase], folder: str | Path, *, progress: bool = True, on_validation: Callable | None = None) -> Run:
    """Train a network, or go on with the training that the folder holds.

    Args:
        settings: of the run; kept in the folder. A folder with other settings is refused.
        cases: prepared, labelled.
        folder: `runs/<name>`.
        progress: show a bar.
        on_validation: called as f(step, network) every `validate_every` steps and at the end; what it returns (name -> number) joins the history.

    Returns:
        The run: `history.csv`, `last.ckpt`, `best.safetensors` (the last weights: a demonstration has no validation case to choose by).

    Raises:
        UserError: the folder belongs to another run; a number of classes that is not the data's; a loss that is not finite.
    """
    run, config = Run(folder), settings.training
    _check_classes(settings)
    _claim(run, settings)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    fabric.seed_everything(config.seed, verbose=False)
    network = build_network(settings)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    patches = Patches(cases, settings.data, config.augment, seed=config.seed)

    weights = class_weights(cases, settings.model.out_channels, config.class_balance)
    history = _resume(run, network, optimizer, schedule)
    network, optimizer = fabric.setup(network, optimizer)
    weights = fabric.to_device(weights) if weights is not None else None
    run.set_state("running", steps=len(history))
    told = time.monotonic()
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0.0)
    try:
        for step in tqdm(range(len(history), config.steps), initial=len(history), total=config.steps, desc=run.name, disable=not progress, mininterval=10):
            rate = schedule.get_last_lr()[0]
            loss = train_step(fabric, network, optimizer, patches.batch(step, config.batch_size), config, weights)
            with warnings.catch_warnings():  # the first optimizer step is taken inside Fabric's wrapper, which the schedule does not see
                warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                schedule.step()
            history.append({"step": step, "loss": loss, "learning_rate": rate, "seconds": time.perf_counter() - start})
            if time.monotonic() - told > HEARTBEAT_SECONDS:
                run.set_state("running", steps=step + 1)
                told = time.monotonic()
            last = step + 1 == config.steps
            if last or (step + 1) % config.validate_every == 0:
                if on_validation is not None:
                    history[-1] |= {
                        name: float(value) for name, value in on_validation(step + 1, network.module).items()
                    }  # plain floats: a checkpoint holds no numpy
                    network.train()
                _keep(run, network.module, optimizer, schedule, history, settings)
    except BaseException as error:
        run.set_state("failed", error=f"{type(error).__name__}: {error}")
        raise
    run.set_state("done", steps=config.steps, seconds=round(history[-1]["seconds"], 1))
    return run


def train_step(
    fabric: Fabric,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    config: TrainingConfig,
    class_weights: Tensor | None = None,
) -> float:
    """One step on images and labels (B, 1, D, H, W); the loss. Raises UserError when it is not finite."""
    image, label = fabric.to_device(batch)
    loss = segmentation_loss(network(image), label, class_weights, batch_dice=config.batch_dice)
    if not torch.isfinite(loss):
        raise UserError(f"loss: found {loss.item()} in training, expected a number. Lower training.learning_rate, or set training.clip_norm (1.0, say).")
    fabric.backward(loss)
    if config.clip_norm is not None:
        fabric.clip_gradients(network, optimizer, max_norm=config.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def class_weights(cases: Sequence[PreparedCase], classes: int, balance: float) -> Tensor | None:
    """Weights (classes,) of the cross-entropy: frequency^-balance, so scaled that a voxel weighs 1 on average; None for balance 0."""
    if not balance:
        return None
    counts = sum(np.bincount(np.asarray(case.label).ravel(), minlength=IGNORE + 1)[:classes] for case in cases)
    frequency = np.maximum(counts, 1) / counts.sum()
    weights = frequency**-balance
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32)


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Warm-up from zero in a straight line, then half a cosine down to zero: the factor on the learning rate of `step`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _check_classes(settings: Settings) -> None:
    names = load_manifest(settings.data.manifest).class_names
    if settings.model.out_channels != len(names):
        found, told = settings.model.out_channels, f"{len(names)}, the classes of {settings.data.manifest} with its background"
        raise UserError(f"model.out_channels: found {found}, expected {told}. Set model.out_channels={len(names)}.")


def _claim(run: Run, settings: Settings) -> None:
    if run.settings_file.exists():
        if (theirs := run.settings) != settings:
            differ = [k for k in type(settings).model_fields if getattr(theirs, k) != getattr(settings, k)]
            raise UserError(
                f"{run.folder}: holds a run with other settings ({', '.join(differ)}); nothing was changed. Choose another name, or delete the folder."
            )
    else:
        run.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(run.settings_file) as part:
            settings.save(part)


def _keep(run: Run, network, optimizer, schedule, history: list[dict], settings: Settings) -> None:
    """The checkpoint comes last: a run that is killed before it goes on from the one before, and writes the rest again."""
    save_weights(network, run.weights_file, settings)
    with written_whole(run.history_file) as part:
        pd.DataFrame(history).to_csv(part, index=False)
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "history": history}
    save_checkpoint(run.checkpoint_file, state)


def _resume(run: Run, network, optimizer, schedule) -> list[dict]:
    """Load the folder's checkpoint, where there is one; the history so far."""
    if not run.checkpoint_file.exists():
        return []
    state = load_checkpoint(run.checkpoint_file)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["history"]
