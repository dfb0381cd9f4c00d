"""What to train with: spacing, patch and batch from what the data and the memory are, each with its reason, the paper's values beside.

After nnU-Net's fingerprint (Isensee et al., Nature Methods 18, 2021): the median spacing, a patch that covers as much of the median scan as two of
them leave memory for, then as many patches as fit. What differs is the network, and with it the memory of a voxel.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..axes import three
from ..errors import UserError
from .header import read_header
from .manifest import Case, Manifest
from .memory import GIB, VOXEL_BYTES

STEP_VOXELS = 16  # the network halves a patch four times
LEAST_VOXELS = 32
LOOKED_AT = 200  # cases, spread over the data set
ANISOTROPY = 3.0  # times the finest spacing, from which the coarsest axis takes a finer one than its median
FINER_PERCENTILE = 10
SHARE = 0.05  # of all voxels of a data set that a batch may be


@dataclass(frozen=True)
class Demand:
    """Memory of a training step: `fixed_bytes` for weights, gradients and AdamW's two moments, `voxel_bytes` for each voxel of a patch."""

    fixed_bytes: int
    voxel_bytes: float


# Activations that the backward pass keeps, counted in a forward pass of the paper's network in float32, and a half more for what comes and goes.
PAPER_NETWORK = Demand(fixed_bytes=170_127_611 * 4 * 4, voxel_bytes=6_000 * 1.5)


@dataclass(frozen=True)
class Row:
    """One thing decided: its value, why, and what the manifest has of the paper's (None where the paper says nothing)."""

    what: str
    value: str
    reason: str
    paper: str | None


@dataclass(frozen=True)
class Plan:
    """spacing_mm and patch_voxels along right-left, front-back, up; batch_size in patches; rows: all of it, with reasons."""

    spacing_mm: tuple[float, float, float]
    patch_voxels: tuple[int, int, int]
    batch_size: int
    rows: tuple[Row, ...]


def plan(
    manifest: Manifest,
    grids: Sequence[tuple[tuple[int, ...], tuple[float, ...]]],
    *,
    memory_gib: float,
    cases: int | None = None,
    spacing_mm: tuple[float, float, float] | None = None,
    demand: Demand = PAPER_NETWORK,
) -> Plan:
    """A plan for a data set.

    Args:
        manifest: whose values of the paper stand beside.
        grids: shape (voxels) and spacing (mm) of scans, along right-left, front-back, up (`grid_of` reads them).
        memory_gib: of the device that is trained on.
        cases: of the whole data set; None: as many as `grids`.
        spacing_mm: to plan for; None: the data's own median.
        demand: memory of the network; the paper's by default.

    Raises:
        UserError: no grid, a spacing that is none, or a memory that not even two of the smallest patches fit into.
    """
    if not grids:
        raise UserError(f"{manifest.name}: found no case to plan for, expected one at least. Check the folder.")
    if spacing_mm and not all(0 < mm < np.inf for mm in spacing_mm):
        raise UserError(f"spacing: found {_times(spacing_mm)}, expected three lengths in mm above 0. Give it: --spacing 0.8 0.8 3, say.")
    if not 0 < memory_gib < np.inf:
        raise UserError(f"memory: found {memory_gib:g}, expected GiB above 0. Give that of the device: --memory 24, say.")
    shapes, spacings = (np.array([grid[part] for grid in grids], float) for part in (0, 1))
    usual = np.median(spacings, 0)
    chosen, why = (np.array(spacing_mm, float), "as asked") if spacing_mm else _spacing(spacings)
    extents = shapes * spacings
    median = np.maximum(1, np.round(np.median(extents / chosen, 0))).astype(int)

    budget = memory_gib * GIB - demand.fixed_bytes
    most = budget / demand.voxel_bytes  # voxels of a batch
    patch = np.maximum(LEAST_VOXELS, -(-median // STEP_VOXELS) * STEP_VOXELS)
    shrunk = False
    while 2 * patch.prod() > most:
        if (patch <= LEAST_VOXELS).all():
            least = (demand.fixed_bytes + 2 * LEAST_VOXELS**3 * demand.voxel_bytes) / GIB
            raise UserError(f"memory: found {memory_gib:g} GiB, expected {least:.1f} at least for this network. Choose a smaller one, or a larger device.")
        share = np.where(patch > LEAST_VOXELS, patch / median, 0)
        patch[share.argmax()] -= STEP_VOXELS
        shrunk = True
    count = cases or len(grids)
    by_memory, by_data = int(most // patch.prod()), int(SHARE * count * median.prod() // patch.prod())
    batch = max(2, min(by_memory, by_data))

    held = count * median.prod() * VOXEL_BYTES / GIB
    kept = f"{held:.1f} GiB for {count} cases"
    covers = np.minimum(1, patch / median)
    rows = (
        Row("spacing, mm", _times(chosen), f"{why}; the median is {_times(usual)}", _times(manifest.spacing_mm)),
        Row("median scan, voxels", _times(median), f"of {len(grids)} cases looked at, at this spacing", None),
        Row(
            "patch, voxels",
            _times(patch),
            f"multiples of {STEP_VOXELS}, covering {_times((100 * covers).round(), ' x ')} % of the median scan; "
            + ("as large as two of them have memory for" if shrunk else "no larger than that scan"),
            _times(manifest.patch_voxels) if manifest.patch_voxels else None,
        ),
        Row("batch, patches", str(batch), _batch_reason(by_memory, by_data), "2"),
        Row(
            "memory, GiB",
            f"{(demand.fixed_bytes + batch * patch.prod() * demand.voxel_bytes) / GIB:.1f}",
            f"of {memory_gib:g}: {demand.fixed_bytes / GIB:.1f} for weights and optimiser, {patch.prod() * demand.voxel_bytes / GIB:.1f} a patch (estimated)",
            None,
        ),
        Row("prepared, in memory", kept, "4 bytes a voxel of image and 1 of label; if that is too much, patches are read from the files", None),
    )
    return Plan(three(chosen.tolist()), three(int(n) for n in patch), batch, rows)


def _spacing(spacings: np.ndarray) -> tuple[np.ndarray, str]:
    chosen = np.median(spacings, 0)
    axis = int(chosen.argmax())
    if chosen[axis] > ANISOTROPY * chosen.min():
        finer = max(np.percentile(spacings[:, axis], FINER_PERCENTILE), chosen.min())
        if finer < chosen[axis]:
            chosen[axis] = finer
            return chosen, f"the data's median, and the {FINER_PERCENTILE}th percentile along the coarsest axis"
    return chosen, "the data's median"


def _batch_reason(by_memory: int, by_data: int) -> str:
    if by_data < by_memory:
        return f"memory has room for {by_memory}, but a batch should be no more than {SHARE:.0%} of the data, and two patches at least"
    return "as many as memory has room for"


def grids_of(cases: Sequence[Case]) -> tuple[list[tuple[tuple[int, ...], tuple[float, ...]]], list[str]]:
    """`grid_of` the images of some cases, spread over all of them when they are many; and what is wrong with those that cannot be read."""
    chosen = cases if len(cases) <= LOOKED_AT else [cases[int(i)] for i in np.linspace(0, len(cases) - 1, LOOKED_AT)]
    grids, faults = [], []
    for case in chosen:
        try:
            grids.append(grid_of(case.image))
        except UserError as error:
            faults.append(str(error))
    return grids, faults


def grid_of(path: str | Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape in voxels and spacing in mm of an image, along right-left, front-back, up. Only headers are read. Raises UserError as `read_header`."""
    header = read_header(path)
    return header.ras_shape, header.ras_spacing_mm


def device_memory_gib() -> float:
    """Of the first GPU. Raises UserError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("memory: found no GPU here, expected the memory of the device that is trained on. Give it: --memory 24, say.")
    return torch.cuda.get_device_properties(0).total_memory / GIB


def _times(values: Iterable[float], by: str = " x ") -> str:
    return by.join(f"{float(value):g}" if float(value) == round(float(value), 2) else f"{float(value):.2f}" for value in values)
