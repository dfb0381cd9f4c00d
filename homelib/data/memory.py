"""Prepared cases in memory where all of them fit, else read from their files block by block: by an estimate that is printed.

In memory is what MONAI's `CacheDataset` does. The files take the place of its `PersistentDataset`, which reads a whole volume for each patch.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..progress import bar
from .prepare import PreparedCase

VOXEL_BYTES = 5  # float32 intensity and uint8 class
SHARE = 0.5  # of the free memory; the network, its patches and everything else have the other half
GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))  # of a container, of either kind


@dataclass(frozen=True)
class Residence:
    """Where prepared cases are kept while patches are drawn from them, and why. needed_gib: of all copies together, one a process."""

    cases: int
    processes: int
    needed_gib: float
    free_gib: float

    @property
    def in_memory(self) -> bool:
        return self.needed_gib <= SHARE * self.free_gib

    def __str__(self) -> str:
        copies = "" if self.processes == 1 else f" in {self.processes} processes"
        told = f"{self.cases} prepared cases take {self.needed_gib:.2g} GiB{copies}, of {self.free_gib:.2g} GiB of free memory {SHARE:.0%} may be used"
        return f"{told}: {'kept in memory' if self.in_memory else 'patches are read from the files, block by block'}."


def residence(cases: Sequence[PreparedCase], *, workers: int = 0, free_gib: float | None = None) -> Residence:
    """An estimate, from the cases' shapes alone.

    Args:
        cases: in memory, or in their files.
        workers: processes that make patches beside the training, each with a copy of its own (`Patches.loader`).
        free_gib: memory to count with; None is what is free here.
    """
    voxels = sum(int(np.prod(case.image.shape)) for case in cases)
    needed = voxels * VOXEL_BYTES * (1 + workers) / GIB
    return Residence(len(cases), 1 + workers, needed, free_memory_gib() if free_gib is None else free_gib)


def within_reach(cases: Sequence[PreparedCase], chosen: Residence, *, progress: bool = False) -> list[PreparedCase]:
    """The cases with their volumes in memory, or as they are, as was chosen. Patches of both are the same. Raises UserError: a file is damaged."""
    if not chosen.in_memory:
        return list(cases)
    shown = bar(cases, desc="load", unit="case", show=progress)
    return [replace(case, image=np.asarray(case.image), label=None if case.label is None else np.asarray(case.label)) for case in shown]


def total_memory_gib() -> float:
    """What this machine has, and no more than the container it runs in may have."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for most, _ in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such container, or one without a limit ("max")
            limits.append(int((CGROUP / most).read_text()))
    return min(limits) / GIB


def free_memory_gib() -> float:
    """What this machine can still give, and no more than the container it runs in may have."""
    limits = [_meminfo() or 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for most, now in LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((CGROUP / most).read_text()) - int((CGROUP / now).read_text()))
    return max(0.0, min(limits)) / GIB


def _meminfo() -> int | None:
    """Linux's own estimate of what can be had without swapping, in bytes; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
