"""One step: forward, loss, backward, clip, and the optimiser's step where all is finite."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..config import IGNORE, TrainingConfig
from ..data.labelspace import marginal_logits
from ..data.prepare import PreparedCase
from .deep import over_levels
from .feed import Batch
from .guard import Guard
from .loss import segmentation_loss
from .optimise import drop_gradients


def train_step(
    fabric: Fabric,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: TrainingConfig,
    class_weights: Tensor | None = None,
    *,
    guard: Guard | None = None,
    frozen: Sequence[nn.Parameter] = (),
) -> tuple[float, float, bool]:
    """One step on `accumulate` batches of images and labels (B, 1, D, H, W); parameters that are `frozen` stay.

    Returns:
        The loss, the norm of the gradient before clipping, both over all devices, and whether the step was taken: the guard skips what is not finite.
    """

    def loss_of(logits: Tensor, label: Tensor, labelled: Tensor | None) -> Tensor:
        known = logits if labelled is None else marginal_logits(logits.float(), labelled)
        return segmentation_loss(known, label, class_weights, batch_dice=config.batch_dice, terms=config.loss)

    total: Any = 0.0
    for number, batch in enumerate(batches, start=1):
        image, label, labelled = (*fabric.to_device(batch), None)[:3]
        with fabric.no_backward_sync(network, enabled=number < len(batches)):  # type: ignore[arg-type]  # the class of its modules has no public name
            loss = over_levels(loss_of, network(image), label, labelled) / len(batches)
            fabric.backward(loss)
        total = total + loss.detach()
    drop_gradients(frozen)
    clip = float("inf") if config.clip_norm is None else config.clip_norm  # infinity changes nothing, and tells the norm
    norm: Any = fabric.clip_gradients(network, optimizer, max_norm=clip, error_if_nonfinite=False)
    found: Any = fabric.all_reduce(total) if fabric.world_size > 1 else total
    taken = guard is None or guard.takes(float(found), float(norm))
    if taken:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(found), float(norm), taken


def class_weights(cases: Sequence[PreparedCase], classes: int, balance: float) -> Tensor | None:
    """Weights (classes,) of the cross-entropy: frequency^-balance, so scaled that a voxel weighs 1 on average; None for balance 0."""
    if not balance:
        return None
    counts = np.sum([np.bincount(np.asarray(case.label).ravel(), minlength=IGNORE + 1)[:classes] for case in cases], 0)
    frequency = np.maximum(counts, 1) / counts.sum()
    weights = frequency**-balance
    return torch.tensor(weights / (weights * frequency).sum(), dtype=torch.float32)
