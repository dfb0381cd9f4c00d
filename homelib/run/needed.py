"""The memory that a prediction takes, told before anything is read: by the scan's header, then by the scan as it was prepared.

Two stages follow each other, and the larger one counts. What is not in it: Python and its libraries, the networks' weights, and what their layers
hold of a window while they work, which only the networks know.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..config import Settings
from ..data.grid import Resampling
from ..data.header import Header
from .native import slab_bytes
from .sliding import Windows

GIB = 2**30
Bytes = dict[str, int]


def prepared_shape(header: Header, spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Of a scan at a spacing, before it is cropped to the body: it will not be larger."""
    affine = np.diag([*header.ras_spacing_mm, 1.0])
    return Resampling.to_spacing(header.ras_shape, affine, spacing_mm).new_shape


def preparing(header: Header, shape: tuple[int, int, int]) -> Bytes:
    """To read a scan and resample it to `shape`: the file's volume, and between two axes and after the last one of what is made of it, float32."""
    between = max(n * int(np.prod(shape)) // m for n, m in zip(header.ras_shape, shape, strict=True))
    return {"scan": int(np.prod(header.shape)) * header.voxel_bytes, "resampling": 4 * (between + int(np.prod(shape)))}


def predicting(shape: Sequence[int], native_shape: Sequence[int], settings: Settings, *, networks: int = 1) -> Bytes:
    """To predict a scan of a prepared `shape`: with the number of classes grow `buffer`, `windows` and, up to a bound, `slabs`."""
    windows = Windows.over(shape, settings.data.patch_voxels, overlap=settings.prediction.overlap)
    classes, prediction = settings.model.out_channels, settings.prediction
    alone = networks == 1 and not prediction.mirror
    return {
        "buffer": windows.buffer_bytes(classes),
        "windows": windows.window_bytes(classes, prediction.window_batch, alone=alone),
        "slabs": _slabs(windows, classes, int(np.prod(native_shape))),
        "labels": int(np.prod(native_shape)),
    }


def _slabs(windows: Windows, classes: int, native_voxels: int) -> int:
    """Finished rows on their way to the file's grid: what is handed on lies there twice, beside what was before it, or what is interpolated of it."""
    rows, n = [count for parts in windows.handed_on(classes) for count in parts], windows.padded[windows.axis]
    row_bytes = 4 * classes * windows.row_voxels
    return max(2 * row_bytes * now + max(row_bytes * before, slab_bytes(native_voxels * now // n)) for before, now in zip([0, *rows], rows, strict=False))


def told(stages: Mapping[str, Bytes]) -> str:
    """`preparing 0.41 (scan 0.15, resampling 0.26), predicting 1.20 (...)`, in GiB."""
    parts = []
    for stage, needed in stages.items():
        listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in needed.items())
        parts.append(f"{stage} {sum(needed.values()) / GIB:.2f} ({listed})")
    return ", ".join(parts)
