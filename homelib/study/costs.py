"""What an arm costs: parameters and FLOPs, counted without memory; seconds and memory of a training step, measured by a probe.

FLOPs are those of one forward pass over one training patch, with a multiplication and an addition counted as two; PyTorch's counter knows products,
convolutions and attention, `network.scan.flops` tells it about the scan; sums, norms and activations it leaves out.
"""

import math
import multiprocessing
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..config import OURS, Settings, override
from ..data.plan import GIB
from ..network import zoo
from ..network.scan import backends
from ..progress import bar
from ..run.checkpoint import build_network
from .grids import Grid

COUNTED_SCAN = "numba"
PROBE_STEPS = 3  # of which the first does not count


def parameter_count(settings: Settings) -> int:
    """Of the network, without making its weights where that can be."""
    return sum(parameter.numel() for parameter in weightless(settings).parameters())


def weightless(settings: Settings) -> nn.Module:
    """The network on the device "meta", with no memory; Swin UNETR, which looks at a number while it is built, with its weights."""
    try:
        with torch.device("meta"):
            return _built(settings)
    except (RuntimeError, NotImplementedError):
        with torch.random.fork_rng():
            return _built(settings)


def forward_flops(settings: Settings) -> int:
    """FLOPs of one forward pass over one training patch. No number is computed: tensors have shapes alone.

    Raises UserError where the compiled scan, which the counter is told about, does not work.
    """
    settings = override(settings, {"model.scan_backend": COUNTED_SCAN})
    backends.resolve(COUNTED_SCAN)  # before the counter begins, which knows only of operators that are there then
    with torch.random.fork_rng():
        theirs = None if settings.network in OURS else _built(settings)  # some look at numbers while they are built
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network = (_built(settings) if theirs is None else theirs).eval()
            network(torch.empty(1, settings.model.in_channels, *settings.data.patch_voxels))
        return counter.get_total_flops()


def probe(settings: Settings) -> dict[str, float]:
    """Seconds of a training step, and the most memory (GiB) on the device that the settings choose, in a process of its own; on a CPU that is the whole
    process, PyTorch included."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_probe, settings, torch.get_num_threads()).result()


def arm_costs(grid: Grid, *, probed: bool = False) -> pd.DataFrame:
    """One row an arm: parameters M, GFLOPs, and, `probed`, seconds a step and peak GiB of a step."""
    return costs_of({arm: grid.settings(arm) for arm in grid.arms}, probed=probed)


def costs_of(settings: Mapping[str, Settings], *, probed: bool = False) -> pd.DataFrame:
    """The same of any settings by name."""
    rows = {}
    for name, its in bar(settings.items(), desc="count", unit="arm", total=len(settings)):
        rows[name] = {"parameters M": parameter_count(its) / 1e6, "GFLOPs": forward_flops(its) / 1e9}
        if probed:
            rows[name] |= probe(its)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm")


def _built(settings: Settings) -> nn.Module:
    """Without the memory format of a training, which a tensor without numbers cannot take."""
    return zoo.build(settings.network, settings.model, settings.data.patch_voxels)


def _probe(settings: Settings, threads: int) -> dict[str, float]:
    from lightning_fabric import Fabric

    from ..run.optimise import build_optimizer
    from ..run.step import train_step

    torch.set_num_threads(threads)
    config, model = settings.training, settings.model
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    network = fabric.setup_module(build_network(settings).train())
    optimizer: Any = fabric.setup_optimizers(build_optimizer(network, config))
    image = torch.randn(config.batch_size, model.in_channels, *settings.data.patch_voxels, device=fabric.device)
    label = torch.randint(0, model.out_channels, (config.batch_size, 1, *settings.data.patch_voxels), device=fabric.device)
    seconds = []
    for _ in range(PROBE_STEPS):
        began = time.perf_counter()
        train_step(fabric, network, optimizer, [(image, label)] * config.accumulate, config)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIB if fabric.device.type == "cuda" else _resident_gib()
    return {"seconds a step": sorted(seconds[1:])[len(seconds[1:]) // 2], "peak GiB": peak}


def _resident_gib() -> float:
    """The most memory that this process has had; NaN on Windows, which does not tell it here."""
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
