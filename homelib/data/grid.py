"""From one voxel grid to another: the grid that a spacing asks for, and image and label on it.

Where both grids have the same axes, which is always so unless a scan is sheared, a resampling is one small sparse matrix an axis: a row holds
the weights of the old voxels in a new one. Smoothing before, and linear interpolation, are both in it, so that neither is ever done for
voxels that nobody asked for, and memory is that of the volume in between.

D, H, W are the axes of a volume, n old and m new voxels along one of them.
"""

from dataclasses import dataclass

import numpy as np
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset, zoom_affine
from monai.transforms import SpatialResample
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array

SHEAR_VOXELS = 0.01  # that axes may lean, over the whole scan, and be taken as the grid's
SLAB_VOXELS = 2**21  # that are dealt with at a time


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume (D, H, W) with its axes in the order and direction nearest to right, front, up (RAS+), as a view; and its affine."""
    turn = io_orientation(affine)
    return apply_orientation(volume, turn), affine @ inv_ornt_aff(turn, volume.shape)


@dataclass(frozen=True)
class Resampling:
    """From a grid of `shape` and `affine` to the one of `new_shape` and `new_affine`.

    >>> step = Resampling.to_spacing((10, 10, 10), np.diag([3.0, 3.0, 3.0, 1.0]), (6.0, 6.0, 6.0))
    >>> step.new_shape
    (6, 6, 6)
    >>> step.image(np.ones((10, 10, 10), np.float32)).shape
    (6, 6, 6)
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    new_shape: tuple[int, int, int]
    new_affine: np.ndarray

    @classmethod
    def to_spacing(cls, shape: tuple[int, ...], affine: np.ndarray, spacing_mm: tuple[float, ...]) -> "Resampling":
        """The grid with the same first voxel and axes (at right angles) and another spacing, as MONAI's `Spacing` places it."""
        new_affine = zoom_affine(affine, spacing_mm, diagonal=False)
        new_shape, offset = compute_shape_offset(shape, affine, new_affine)
        new_affine[:3, 3] = offset
        return cls(tuple(shape), affine, tuple(int(n) for n in new_shape), new_affine)

    @property
    def steps(self) -> np.ndarray:
        """(4, 4), from new voxels to old ones."""
        return np.linalg.inv(self.affine) @ self.new_affine

    @property
    def straight(self) -> bool:
        """Whether both grids have the same axes."""
        rest = self.steps[:3, :3] * (1 - np.eye(3))
        return bool(np.abs(rest).max() * max(self.new_shape) <= SHEAR_VOXELS)

    @property
    def sigma_voxels(self) -> np.ndarray:
        """Of the low-pass that keeps out what a coarser grid cannot hold, so that a fine and a coarse scan look alike after it: half the
        step, in old voxels, less what the old grid has already smoothed."""
        ratios = np.linalg.norm(self.new_affine[:3, :3], axis=0) / np.linalg.norm(self.affine[:3, :3], axis=0)
        return 0.5 * np.sqrt(np.maximum(ratios**2 - 1, 0))

    def image(self, volume: np.ndarray, *, smooth: bool = True) -> np.ndarray:
        """An image (D, H, W) on the new grid, float32: low-pass, then linear interpolation; beyond the scan its outermost voxels go on."""
        sigma = self.sigma_voxels if smooth else np.zeros(3)
        if not self.straight:
            return self._general(gaussian_filter(volume.astype(np.float32), sigma, mode="nearest"), "bilinear", "border")
        weights = [_weights(n, self._at(axis), sigma[axis]) for axis, n in enumerate(self.shape)]
        last, *first = sorted(range(3), key=lambda axis: -self.new_shape[axis] / self.shape[axis])  # what grows, grows last
        between = [self.new_shape[axis] if axis != last else n for axis, n in enumerate(self.shape)]
        result = np.empty(between, np.float32)
        for part in _slabs(last, self.shape):
            slab = volume[part].astype(np.float32)
            for axis in first:
                slab = _along(slab, axis, weights[axis])
            result[part] = slab
        if weights[last] is None:
            return result
        volume, result = result, np.empty(self.new_shape, np.float32)
        other = first[0]
        for part in _slabs(other, volume.shape):
            result[part] = _along(volume[part], last, weights[last])
        return result

    def label(self, volume: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
        """Labels (D, H, W) in a box of the new grid, each the nearest old voxel's; 0 beyond the scan."""
        if not self.straight:
            return self._general(volume.astype(np.float32), "nearest", "zeros")[box].astype(volume.dtype)
        nearest = [np.floor(self._at(axis)[box[axis]] + 0.5).astype(int) for axis in range(3)]
        outside = [(at < 0) | (at >= n) for at, n in zip(nearest, self.shape, strict=True)]
        found = volume[np.ix_(*(at.clip(0, n - 1) for at, n in zip(nearest, self.shape, strict=True)))]
        for axis, out in enumerate(outside):
            found[(slice(None),) * axis + (out,)] = 0
        return found

    def label_by_class(self, volume: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
        """As `label`, but each class is interpolated linearly as a mask of its own, and the largest taken: smoother where the grid gets finer."""
        best = self.image(volume == 0, smooth=False)[box]
        chosen = np.zeros(best.shape, volume.dtype)
        for index in range(1, int(volume.max()) + 1):
            mask = volume == index
            if not mask.any():
                continue
            share = self.image(mask, smooth=False)[box]
            more = share > best
            chosen[more] = index
            np.maximum(best, share, out=best)
        return chosen

    def _at(self, axis: int) -> np.ndarray:
        """Old positions of the new voxels along an axis."""
        steps = self.steps
        return steps[axis, axis] * np.arange(self.new_shape[axis]) + steps[axis, 3]

    def _general(self, volume: np.ndarray, mode: str, beyond: str) -> np.ndarray:
        resample = SpatialResample(mode=mode, padding_mode=beyond, dtype=np.float32)
        return resample(MetaTensor(volume[None], affine=self.affine), dst_affine=self.new_affine, spatial_size=self.new_shape)[0].numpy()


def _weights(n: int, at: np.ndarray, sigma: float) -> csr_array | None:
    """(m, n) weights of the old voxels in the new ones at positions `at`: a Gaussian of `sigma` voxels, then linear interpolation, with the
    outermost voxels going on beyond the ends. None where nothing would change."""
    if sigma == 0 and len(at) == n and np.abs(at - np.arange(n)).max() < 1e-6:
        return None
    at = at.clip(0, n - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, n - 1)
    rows = np.tile(np.arange(len(at)), 2)
    linear = csr_array((np.concatenate([1 - (at - low), at - low]), (rows, np.concatenate([low, high]))), shape=(len(at), n))
    if sigma:
        reach = int(4 * sigma + 0.5)
        offsets = np.arange(-reach, reach + 1)
        bell = np.exp(-0.5 * (offsets / sigma) ** 2)
        columns = (np.arange(n)[:, None] + offsets).clip(0, n - 1)
        smooth = csr_array((np.tile(bell / bell.sum(), n), (np.repeat(np.arange(n), len(offsets)), columns.ravel())), shape=(n, n))
        linear = linear @ smooth
    return linear.astype(np.float32)


def _along(volume: np.ndarray, axis: int, weights: csr_array | None) -> np.ndarray:
    """Weights (m, n) applied along one axis."""
    if weights is None:
        return volume
    first = np.moveaxis(volume, axis, 0)
    return np.moveaxis((weights @ first.reshape(len(first), -1)).reshape(weights.shape[0], *first.shape[1:]), 0, axis)


def _slabs(axis: int, shape: tuple[int, ...]):
    """Boxes that cut a volume into slabs along an axis."""
    rows = max(1, SLAB_VOXELS * shape[axis] // int(np.prod(shape)))
    for start in range(0, shape[axis], rows):
        yield (slice(None),) * axis + (slice(start, start + rows),)
