"""What guards a training: steps that are not finite, and a memory that does not suffice."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Settings
from ..errors import UserError

LOWER = 0.5  # factor on the learning rate after going back to a checkpoint
ROLLBACKS = 1  # then the training ends
LOADER_ENDED = ("killed by signal: killed", "killed by signal: bus error", "workers are out of shared memory", "unable to allocate shared memory")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


@dataclass
class Guard:
    """Counts steps that were skipped for a loss or gradient that is not finite, and says when that is enough.

    limit: such steps in a row. skipped: of the whole training. rate: factor on the learning rate.
    """

    limit: int
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0
    failed_at: int = 0
    rate: float = 1.0

    def takes(self, loss: float, gradient_norm: float) -> bool:
        """Whether a step is finite and may be taken."""
        finite = abs(loss) < float("inf") and abs(gradient_norm) < float("inf")  # false for NaN
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite
        return finite

    @property
    def gives_in(self) -> bool:
        """Whether it is time to go back to the last checkpoint."""
        return self.in_a_row >= self.limit

    def roll_back(self, step: int) -> bool:
        """Lower the rate for another try; False when there was one already since the training last went well."""
        self.in_a_row, self.rollbacks, self.rate, self.failed_at = 0, self.rollbacks + 1, self.rate * LOWER, step
        return self.rollbacks <= ROLLBACKS

    def kept(self, step: int) -> None:
        """A checkpoint is made: beyond the step where it failed, the training goes well again. The rate stays lower."""
        if step > self.failed_at and not self.in_a_row:
            self.rollbacks = 0

    def state(self) -> dict:
        return {name: getattr(self, name) for name in ("skipped", "in_a_row", "rollbacks", "failed_at", "rate")}

    def load(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def not_finite(network: nn.Module, image: Tensor, found: str) -> UserError:
    """The report of a training that ended so: what was found, and where in the network it began, for images (B, C, D, H, W)."""
    where = first_non_finite(network, image)
    return UserError(
        f"{found}, before and after going back to the last checkpoint with {LOWER:g} of the rate; "
        f"expected a number. First module whose output is not finite: {where}. "
        "Lower training.learning_rate, set training.clip_norm (1.0, say), or look at the data."
    )


@torch.no_grad()
def first_non_finite(network: nn.Module, image: Tensor) -> str:
    """Name and kind of the first module, in the order in which they end, whose output is not finite for a batch (B, C, D, H, W); images come before all
    modules."""
    if not bool(torch.isfinite(image).all()):
        return "none, for the images themselves are not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, tuple, object], None]:
        def hook(module: nn.Module, arguments: tuple, output: object) -> None:
            if not found and any(not bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
                found.append(f"{name or 'the network'} ({type(module).__name__})")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in network.named_modules()]
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "none in the forward pass: the loss or a gradient overflows"


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, (list, tuple)) else []


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in OUT_OF_MEMORY))


def lost_a_loader(error: BaseException) -> bool:
    """Whether the system has ended a process that makes patches, for want of memory or of shared memory: torch tells it by words alone."""
    told = f"{error} {error.__cause__}".lower()
    return isinstance(error, RuntimeError) and any(words in told for words in LOADER_ENDED)


def too_many_loaders(settings: Settings) -> UserError:
    """One line: the processes that there were, and fewer."""
    workers = settings.training.workers
    half = f"training.workers={workers // 2}, or 0 to make patches in the training" if workers > 1 else "training.workers=0 to make patches in the training"
    return UserError(
        f"training.workers: found {workers}, of which the system has ended one for want of memory or shared memory; expected fewer. Set {half}. "
        "A container may want more shared memory (docker run --shm-size)."
    )


def out_of_memory(settings: Settings, needed_gib: float, device_gib: float | None) -> UserError:
    """One line: what is needed about, what there is, and the setting to lower."""
    training, patch = settings.training, " x ".join(map(str, settings.data.patch_voxels))
    found = f"training.batch_size {training.batch_size} with patches of {patch} needs about {needed_gib:.1f} GiB"
    there = "more than is left" if device_gib is None else f"more than is left of {device_gib:.1f} GiB"
    if training.batch_size > 1:
        half = training.batch_size // 2
        remedy = f"Set training.batch_size={half}, and training.accumulate={training.accumulate * 2} to keep the patches a step"
    else:
        remedy = f"Lower data.patch_voxels, to {', '.join(str(max(16, side // 32 * 16)) for side in settings.data.patch_voxels)} say"
    precision = "" if training.precision == "bf16-mixed" else "; training.precision=bf16-mixed takes less on a GPU"
    return UserError(f"memory: {found} (estimated), {there}. {remedy}{precision}.")
