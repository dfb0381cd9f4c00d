"""Back to the file's own grid: each class's probability is interpolated linearly in space, and the most probable class taken. The image likewise.

It takes probabilities in slabs as they are finished, and keeps of them only the rows that the file's next voxels still need. Where both grids
have the same axes but for order and direction, which is so unless the file is sheared (a CT with a tilted gantry), it is done one axis after
another; else by MONAI's resampling, over the rows that a slab of the file touches. Outside the prepared box it is background.

D, H, W are the prepared grid's axes; the *slab axis* is the one of `homelib.run.sliding`, and the file's axis nearest to it is filled plane by plane.
"""

from collections.abc import Callable

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from torch import Tensor

from ..data.grid import Resampling, from_ras, to_ras
from ..data.prepare import PreparedCase
from ..data.reading import Volume

SLAB_VOXELS = 2**23  # of the file's grid that are dealt with at a time
SHEAR_VOXELS = 0.01  # that axes may lean, over the whole scan, and be taken as the grid's


class NativeLabels:
    """Labels on the file's grid, filled from slabs of probabilities in order.

    label: (native D, H, W) uint8, complete after the last slab. on_slab: called with (class index, box of the file's grid, probabilities (rows, .., ..))
    for each class of each slab, where maps of probabilities are wanted.
    """

    def __init__(self, case: PreparedCase, axis: int, *, on_slab: Callable[[int, tuple[slice, ...], Tensor], None] | None = None):
        self.case, self.axis, self.on_slab = case, axis, on_slab
        self.label = np.zeros(case.native_shape, np.uint8)
        self.to_prepared = np.linalg.inv(case.affine) @ case.native_affine
        linear = self.to_prepared[:3, :3]
        self.axes = np.abs(linear).argmax(0)  # prepared axis of each native one
        rest = linear.copy()
        rest[self.axes, range(3)] = 0
        self.straight = np.abs(rest).max() * max(case.native_shape) <= SHEAR_VOXELS and len(set(self.axes)) == 3
        self.along = int(np.abs(linear[axis]).argmax())  # the file's axis that is filled plane by plane
        low, high = self._reach()
        backwards = linear[axis, self.along] < 0
        order = np.arange(case.native_shape[self.along])[:: -1 if backwards else 1]
        self.waiting = [int(i) for i in order if high[i] > -1 and low[i] < case.image.shape[axis]]
        self.low, self.high = low, high
        self.rows: Tensor | None = None  # (C, rows, A, B) that may still be needed, slab axis first
        self.first = 0

    def add(self, first_row: int, rows: Tensor) -> None:
        """The next probabilities (C, rows, A, B), from `first_row` of the slab axis on."""
        self.rows = rows if self.rows is None or not self.rows.shape[1] else torch.cat([self.rows.to(rows.device), rows], dim=1)
        if self.rows is rows:
            self.first = first_row
        end = self.first + self.rows.shape[1]
        last = end == self.case.image.shape[self.axis]
        ready = 0
        while ready < len(self.waiting) and (last or np.floor(self.high[self.waiting[ready]]) + 1 < end):
            ready += 1
        planes, self.waiting = self.waiting[:ready], self.waiting[ready:]
        size = max(1, SLAB_VOXELS * self.case.native_shape[self.along] // int(np.prod(self.case.native_shape)))
        for start in range(0, len(planes), size):
            part = sorted(planes[start : start + size])
            self._fill(self.rows, slice(part[0], part[-1] + 1))
        needed = min((int(np.floor(self.low[i])) for i in self.waiting), default=end)
        keep_from = min(max(needed, self.first), end)
        self.rows = self.rows[:, keep_from - self.first :].clone()  # a view would keep all of it alive
        self.first = keep_from

    def _reach(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest prepared row that each plane of the file touches."""
        row, shape = self.to_prepared[self.axis], self.case.native_shape
        at = row[self.along] * np.arange(shape[self.along]) + row[3]
        other = [row[n] * (shape[n] - 1) for n in range(3) if n != self.along] if not self.straight else []
        return at + sum(min(0.0, o) for o in other), at + sum(max(0.0, o) for o in other)

    def _fill(self, rows: Tensor, planes: slice) -> None:
        """Interpolate every class of the kept rows on some planes of the file, and keep the largest."""
        box = tuple(planes if n == self.along else slice(0, size) for n, size in enumerate(self.case.native_shape))
        for index, volume in enumerate(rows):
            native = (self._straight if self.straight else self._general)(volume.movedim(0, self.axis), box)
            if self.on_slab is not None:
                self.on_slab(index, box, native)
            if index == 0:
                best, chosen = native, torch.zeros(native.shape, dtype=torch.uint8, device=native.device)
            else:
                chosen.masked_fill_(native > best, index)
                best = torch.maximum(best, native)
        self.label[box] = chosen.cpu().numpy()

    def _straight(self, volume: Tensor, box: tuple[slice, ...]) -> Tensor:
        """A class's kept rows (prepared axes) on the planes of the file."""
        volume = volume.permute(*self.axes)
        at = [
            self.to_prepared[p, n] * np.arange(part.start, part.stop) + self.to_prepared[p, 3] for n, (p, part) in enumerate(zip(self.axes, box, strict=True))
        ]
        rows = at[self.along] - self.first
        start = min(max(0, int(np.floor(rows.min()))), volume.shape[self.along] - 1)
        stop = max(start, min(int(np.floor(rows.max())) + 1, volume.shape[self.along] - 1)) + 1
        volume = volume.narrow(self.along, start, stop - start)
        at[self.along] = rows - start
        for n in (2, 1, 0):  # the first axis last: its rows are whole in memory
            volume = _interpolate(volume, n, torch.from_numpy(at[n]).to(volume.device))
        return volume

    def _general(self, volume: Tensor, box: tuple[slice, ...]) -> Tensor:
        source, target = self.case.affine.copy(), self.case.native_affine.copy()
        source[:3, 3] += source[:3, self.axis] * self.first
        target[:3, 3] += target[:3, :3] @ [part.start for part in box]
        resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
        shape = tuple(part.stop - part.start for part in box)
        placed = MetaTensor(volume[None], affine=torch.from_numpy(source))
        return resample(placed, dst_affine=torch.from_numpy(target), spatial_size=shape)[0].as_subclass(Tensor)


def slab_bytes(voxels: int) -> int:
    """What the interpolation of one class after the other takes on so many of a file's voxels (not of a sheared one): at most four float32 volumes of
    a slab, the class and whether it changes."""
    return (4 * 4 + 2) * min(SLAB_VOXELS, voxels)


def to_native(probabilities: np.ndarray, case: PreparedCase) -> np.ndarray:
    """Labels (native D, H, W) uint8 on the file's grid, from probabilities (classes, D, H, W) on the prepared one."""
    native = NativeLabels(case, 0)
    native.add(0, torch.from_numpy(np.ascontiguousarray(probabilities)))
    return native.label


def image_to_native(case: PreparedCase) -> Volume:
    """The prepared image on the file's grid (native D, H, W) float32, in the unit of the scan, by linear interpolation; its affine (4, 4) is the file's.

    Beyond the prepared box, from which air was cut off, its outermost voxels go on. At the file's own spacing the file's voxels come back; on a
    coarser grid what it could not hold is lost. Intensities that were kept scaled come back clipped to the window.

    >>> from homelib.data.fix import save   # doctest: +SKIP
    >>> save(image_to_native(case), Path("back.nii.gz"))   # doctest: +SKIP
    """
    like, affine = to_ras(np.broadcast_to(np.float32(0), case.native_shape), case.native_affine)
    image = np.asarray(case.image)
    back = Resampling(image.shape, case.affine, like.shape, affine).image(image, smooth=False)
    return Volume(from_ras(back, case.native_affine), case.native_affine)


def _interpolate(volume: Tensor, axis: int, at: Tensor) -> Tensor:
    """Linear interpolation along one axis at positions in voxels (float64); zero beyond the ends."""
    size, along = volume.shape[axis], [1, 1, 1]
    along[axis] = -1

    def neighbours(index: Tensor) -> tuple[Tensor, Tensor]:
        weight = (1 - (at - index).abs()) * ((index >= 0) & (index < size))
        return volume.index_select(axis, index.long().clamp(0, size - 1)), weight.to(volume.dtype).view(along)

    rows, weight = neighbours(at.floor())
    total = rows.mul_(weight)
    return total.addcmul_(*neighbours(at.floor() + 1))
