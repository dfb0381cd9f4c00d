"""How long, how much memory, how much from the disk: from a few steps, patches and windows measured here, for 1 to 64 GPUs, beside the paper's figure."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import Settings
from ..data.cache import Chunked
from ..data.plan import GIB, Demand
from ..data.prepare import PreparedCase
from ..progress import bar
from .begin import on_devices
from .checkpoint import build_network
from .guard import is_out_of_memory, out_of_memory
from .mixture import source_of
from .optimise import build_optimizer
from .predict import windows_of
from .step import train_step
from .validate import chosen, validate

GPUS = (1, 2, 4, 8, 16, 32, 64)
STEPS, PATCHES = 3, 8  # measured, after one that does not count
ENOUGH_SECONDS = 20  # of a validation case, after which the rest of it is counted by its windows
COMES_AND_GOES = 1.5  # memory of a step, over what the backward pass keeps (as in homelib.data.plan)
LOOKED_AT_VOXELS = 32  # a side, of the patch in which kept activations are counted
PAPER_CASES, PAPER_EPOCHS, PAPER_DAYS, PAPER_GPUS = 9_404, 800, 7, 8  # pre-training, Table 9 and App. B, on H100; 85 % of the cases are trained on
PAPER_SHARE = 0.85


@dataclass(frozen=True)
class Estimate:
    """step_seconds: one step of one device, here. patch_seconds: making one patch in one process. patch_mib: read for it. memory_gib: of a device.

    steps, patches: of the whole training, on all its devices. step_patches: of one step of one device. device: what was measured on.
    validation_seconds: one case by one device. validations: of the whole training, of so many cases; `together`: by all devices at one case (FSDP).
    """

    step_seconds: float
    patch_seconds: float
    patch_mib: float
    memory_gib: float
    steps: int
    patches: int
    step_patches: int
    workers: int
    device: str
    validation_seconds: float = 0.0
    validations: int = 0
    validation_cases: int = 0
    together: bool = False

    def rows(self) -> list[dict]:
        """By number of GPUs: hours, those of them for validation, what takes most of them, MiB a second that patches take from the disk, and processes a
        GPU that keep up. Patches that the training makes itself (no workers) come on top of its steps; those of other processes beside them.
        """
        patch_step = self.step_seconds / self.step_patches  # seconds a patch of one device
        needed = math.ceil(self.patch_seconds / patch_step)
        rows = []
        for gpus in GPUS:
            compute = patch_step * self.patches / gpus
            loading = self.patch_seconds * self.patches / gpus / max(1, self.workers)
            training = max(compute, loading) if self.workers else compute + loading
            share = self.validation_cases if self.together else math.ceil(self.validation_cases / gpus)
            validation = self.validations * share * self.validation_seconds
            takes = {"compute": compute, "data loading": loading, "validation": validation}
            rate = self.patch_mib / patch_step * gpus
            hours = {"hours": (training + validation) / 3600, "of it validation": validation / 3600}
            rows.append({"GPUs": gpus} | hours | {"limit": max(takes, key=takes.__getitem__), "MiB/s read": rate, "workers a GPU": needed})
        return rows


def paper_seconds_a_patch() -> float:
    """What the paper's pre-training took, on one H100, a patch of 96 cubed: 800 epochs of 85 % of its cases in 7 days on 8."""
    return PAPER_DAYS * 86400 * PAPER_GPUS / (PAPER_CASES * PAPER_SHARE * PAPER_EPOCHS)


def estimate(settings: Settings, cases: Sequence[PreparedCase], validation: Sequence[PreparedCase] = (), *, progress: bool = False) -> Estimate:
    """Measure a few steps and patches of a training, and a case that is validated on, on the device of the settings; nothing is written, and no other
    process started.

    Raises UserError: no such device, or no memory on it for a step.
    """
    config = settings.training
    fabric = on_devices(config)
    with torch.random.fork_rng():
        network = fabric.setup_module(build_network(settings))
    optimizer: Any = fabric.setup_optimizers(build_optimizer(network, config))
    source = source_of(cases, settings)
    source.patch(0, 0)
    began = time.perf_counter()
    items = [source.patch(1, place) for place in range(max(PATCHES, config.batch_size))]
    patch_seconds = (time.perf_counter() - began) / len(items)
    batch = tuple(torch.stack(parts) for parts in zip(*items[: config.batch_size], strict=True))
    times = []
    for _ in bar(range(STEPS + 1), desc="estimate", unit="step", show=progress):
        began = time.perf_counter()
        try:
            train_step(fabric, network, optimizer, [batch] * config.accumulate, config)
        except Exception as error:
            if is_out_of_memory(error):
                raise out_of_memory(settings, needed_gib(settings), None) from None
            raise
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    held = torch.cuda.max_memory_allocated() / GIB if fabric.device.type == "cuda" else needed_gib(settings)
    name = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else f"{fabric.device.type}, {torch.get_num_threads()} threads"
    return Estimate(
        sorted(times[1:])[STEPS // 2],
        patch_seconds,
        _read_mib(settings, cases),
        held,
        config.steps,
        config.steps * config.patches_a_step,
        config.batch_size * config.accumulate,
        config.workers,
        name,
        _validation_seconds(network.module, settings, validated := chosen(validation, config.validation_cases_most), progress),
        math.ceil(config.steps / config.validate_every),
        len(validated),
        config.strategy == "fsdp",
    )


def _validation_seconds(network: nn.Module, settings: Settings, cases: Sequence[PreparedCase], progress: bool = False) -> float:
    """Of one case, on average over all by their windows. One of middle size is validated on, as far as it comes; 0 without cases."""
    if not cases:
        return 0.0
    windows = [windows_of(case, settings).count for case in cases]
    middle = sorted(range(len(cases)), key=windows.__getitem__)[len(cases) // 2]
    validate(network, [cases[middle]], settings, stop=lambda: True)  # a window that does not count
    marks = [time.perf_counter()]

    def enough() -> bool:
        marks.append(time.perf_counter())
        return len(marks) > 2 and marks[-1] - marks[0] > ENOUGH_SECONDS

    whole = validate(network, [cases[middle]], settings, stop=enough, progress=progress) is not None
    counted = windows[middle] if whole else (len(marks) - 1) * settings.prediction.window_batch
    return ((time.perf_counter() if whole else marks[-1]) - marks[0]) / counted * sum(windows) / len(cases)


def _read_mib(settings: Settings, cases: Sequence[PreparedCase]) -> float:
    """Compressed bytes of image and label that one patch takes, by the files' sizes and its part of their voxels; 0 where cases lie in memory."""
    sizes = [(case.image.path.stat().st_size, case.image.size) for case in cases if isinstance(case.image, Chunked)]
    if not sizes:
        return 0.0
    a_voxel = sum(size for size, _ in sizes) / sum(voxels for _, voxels in sizes)
    return a_voxel * math.prod(settings.data.patch_voxels) / 2**20


# ---------------------------------------------------------------- memory


def needed_gib(settings: Settings) -> float:
    """Memory of a training step on one device, from what the network keeps of a small patch for its backward pass."""
    need = demand(settings)
    return (need.fixed_bytes + settings.training.batch_size * math.prod(settings.data.patch_voxels) * need.voxel_bytes) / GIB


def demand(settings: Settings) -> Demand:
    """Weights, gradients and AdamW's moments in float32; and the activations of a voxel, half of them under bf16-mixed."""
    with torch.random.fork_rng():
        network = build_network(settings).train()
    voxel_bytes = _kept_bytes(network, settings) / LOOKED_AT_VOXELS**3 * COMES_AND_GOES
    copies = 5 if settings.training.ema is not None else 4
    weights = sum(parameter.numel() for parameter in network.parameters())
    return Demand(fixed_bytes=weights * 4 * copies, voxel_bytes=voxel_bytes * (0.5 if settings.training.precision == "bf16-mixed" else 1.0))


def _kept_bytes(network: nn.Module, settings: Settings) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.zeros(1, settings.model.in_channels, *[LOOKED_AT_VOXELS] * 3))  # the graph, and with it what it keeps, is alive until all is counted
    return sum(size for place, size in kept.items() if place not in own)
