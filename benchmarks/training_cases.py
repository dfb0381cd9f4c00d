"""What is measured of the training loop: its steps beside bare ones, and steps whose patches are made beside them; each in a process of its own."""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import Measured
from homelib.config import Settings, override, preset
from homelib.data.cases import demo_data, prepared, with_demo_cases
from homelib.run import train
from homelib.run.checkpoint import build_network
from homelib.run.loss import segmentation_loss
from homelib.run.step import class_weights
from homelib.run.train import fit

TURNS = 4  # of bare steps and of the loop's, by turns, after one that does not count


class Ready:
    """A source of patches that are there already."""

    def __init__(self, image: torch.Tensor, label: torch.Tensor):
        self.image, self.label = image, label

    def patch(self, step: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image[place % len(self.image)], self.label[place % len(self.label)]


def loop(*, profile: str, steps: int, accelerator: str = "auto") -> tuple[dict, Measured]:
    """Steps of `fit` (schedule, guard, gradient norm, history, signals), with patches at hand, beside forward, loss, backward and AdamW alone."""
    settings, cases = _settings(profile, accelerator, steps)
    config = settings.training
    image, label = train.source_of(cases, settings).batch(0, config.batch_size)
    device = torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    weights = class_weights(cases, settings.model.out_channels, config.class_balance)
    weights = None if weights is None else weights.to(device)

    def bare() -> list[float]:
        torch.manual_seed(0)
        network = build_network(settings).to(device)  # anew, as the loop does
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            loss = segmentation_loss(network(image.to(device)), label.to(device), weights, batch_dice=config.batch_dice)
            loss.backward()
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            times.append(time.perf_counter() - began)
        return times[len(times) // 2 :]

    original = train.source_of
    train.source_of = lambda cases, settings: Ready(image, label)
    try:
        found: dict[str, list[float]] = {"bare": [], "loop": []}
        for turn in range(TURNS + 1):
            parts = {"bare": bare(), "loop": _loop_seconds(settings, cases)}
            if turn:
                found = {name: found[name] + parts[name] for name in found}
    finally:
        train.source_of = original
    return {"bare_seconds": median(found["bare"])}, _measured(found["loop"])


def loading(*, profile: str, steps: int, workers: int | None, accelerator: str = "auto") -> tuple[dict, Measured]:
    """Steps of `fit` with patches that some processes make, or it itself (0); `workers` None: with patches at hand, which nothing can hide better."""
    settings, cases = _settings(profile, accelerator, steps)
    original, source = train.source_of, train.source_of(cases, settings)
    began = time.perf_counter()
    image, label = source.batch(0, settings.training.batch_size)
    alone = time.perf_counter() - began
    if workers is None:
        train.source_of = lambda cases, settings: Ready(image, label)
    try:
        found = _loop_seconds(override(settings, {"training.workers": workers or 0}), cases)
    finally:
        train.source_of = original
    return {"a batch alone": alone}, _measured(found)


def _settings(profile: str, accelerator: str, steps: int) -> tuple[Settings, list]:
    demo = demo_data(profile)
    settings = with_demo_cases(preset(profile), demo)
    settings = override(settings, {"training.steps": steps, "training.validate_every": steps, "training.accelerator": accelerator})
    return settings, prepared(settings, demo)


def _loop_seconds(settings: Settings, cases: list) -> list[float]:
    """Of each step of the second half, as the history tells: processes have started by then. Checkpoints come before the first step and after the last."""
    with tempfile.TemporaryDirectory() as folder:
        history = fit(settings, cases, Path(folder) / "run", progress=False).history
    return history["seconds"].diff().iloc[len(history) // 2 :].tolist()


def _measured(times: list[float]) -> Measured:
    return Measured(median(times), min(times), max(times), len(times), 0.0, {})
