"""From one voxel grid to another: the grid that a spacing asks for, and image and label on it.

Where both grids have the same axes, which is always so unless a scan is sheared, a resampling is one small sparse matrix an axis: a row holds
the weights of the old voxels in a new one. Smoothing before, and linear interpolation, are both in it, so that neither is ever done for
voxels that nobody asked for, and memory is that of the volume in between. There is no PyTorch here: a process that prepares starts in a second.

D, H, W are the axes of a volume, n old and m new voxels along one of them.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import DTypeLike
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.sparse import csr_array

from ..axes import three

SHEAR_VOXELS = 0.01  # that axes may lean, over the whole scan, and be taken as the grid's
REACH_SIGMAS = 4  # of the low-pass, as SciPy cuts it off
Box = tuple[slice, ...]


def to_ras(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume (D, H, W) with its axes in the order and direction nearest to right, front, up (RAS+), as a view; and its affine."""
    return turned_to(volume, affine, np.eye(4))


def turned_to(volume: np.ndarray, affine: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume (D, H, W) with its axes in the order and direction nearest to those of another affine, as a view; and its affine."""
    turn = ornt_transform(io_orientation(affine), io_orientation(like))
    return apply_orientation(volume, turn), affine @ inv_ornt_aff(turn, volume.shape)


def from_ras(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """A volume with the axes of RAS+ (see `to_ras`) with those of an affine (4, 4), as a view."""
    return apply_orientation(volume, ornt_transform(axcodes2ornt("RAS"), io_orientation(affine)))


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
        """From a grid by its shape and affine (4, 4) to the one with the same first voxel and axes (at right angles) and another spacing, as MONAI's
        `Spacing` places it."""
        linear, sizes = affine[:3, :3], np.array(shape, int)
        axes, lengths = np.linalg.qr(linear)
        new_affine = np.eye(4)
        new_affine[:3, :3] = axes * np.sign(np.diag(lengths)) * spacing_mm
        corners = np.array(list(itertools.product(*((0, n - 1) for n in sizes))))
        places = corners @ np.linalg.solve(new_affine[:3, :3], linear).T  # in new voxels, from the first old one
        low = places.min(0)
        new_shape = [round(n) for n in (np.ptp(places, axis=0) + 1).tolist()]
        first = np.abs(places - low).max(1) < SHEAR_VOXELS
        if first.any():
            start = linear @ corners[first.argmax()]
        else:  # a sheared scan has no voxel in the first place: the middles agree
            start = linear @ (sizes / 2) - new_affine[:3, :3] @ (np.array(new_shape) / 2)
        new_affine[:3, 3] = affine[:3, 3] + start
        return cls(three(map(int, shape)), affine, three(new_shape), new_affine)

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
        """(3,), of the low-pass that keeps out what a coarser grid cannot hold, so that a fine and a coarse scan look alike after it: half the
        step, in old voxels, less what the old grid has already smoothed."""
        ratios = np.linalg.norm(self.new_affine[:3, :3], axis=0) / np.linalg.norm(self.affine[:3, :3], axis=0)
        return 0.5 * np.sqrt(np.maximum(ratios**2 - 1, 0))

    def image(self, volume: np.ndarray, box: Box | None = None, *, smooth: bool = True) -> np.ndarray:
        """An image (D, H, W) in a box of the new grid (None: all of it), float32: low-pass, then linear interpolation; beyond the scan its
        outermost voxels go on."""
        sigma = tuple(self.sigma_voxels) if smooth else (0.0, 0.0, 0.0)
        if not self.straight:
            if smooth:
                volume = gaussian_filter(volume.astype(np.float32), sigma, mode="nearest", truncate=REACH_SIGMAS)
            return self._general(volume, 1, "nearest", np.float32, box)
        return self._straight(volume, [_weights(n, *self._line(axis), sigma[axis]) for axis, n in enumerate(self.shape)], box)

    def share(self, label: np.ndarray, index: int, box: Box | None = None, *, fitted: bool = False) -> np.ndarray:
        """How much of class `index` of a label (D, H, W) is in each voxel of a box, float32: its mask, interpolated linearly.

        fitted: so that its linear interpolation back to the old grid comes as near to the mask as any can (least squares), where the new grid is
        the coarser one; then it may be a little below 0 and above 1. For a sheared scan it is the low-pass of the mask instead.
        """
        if not self.straight:
            return self.image((label == index).astype(np.float32), box, smooth=fitted)
        coarser = self.sigma_voxels > 0
        weights = [(_fitted if fitted and coarser[axis] else _weights)(n, *self._line(axis)) for axis, n in enumerate(self.shape)]
        return self._straight(label, weights, box, only=index)

    def _straight(self, volume: np.ndarray, weights: list[csr_array], box: Box | None, *, only: int | None = None) -> np.ndarray:
        """Weights (m, n) applied along each axis, in a box. The layer of voxels that lie together in memory is done first, one layer after the
        other, each as a whole in the processor's cache; along the axis that is left, last. `only`: of the mask of this value."""
        box = box or tuple(slice(0, n) for n in self.new_shape)
        weights = [of_axis[part] for of_axis, part in zip(weights, box, strict=True)]
        used = [slice(int(of_axis.indices.min()), int(of_axis.indices.max()) + 1) for of_axis in weights]
        weights = [_unless_same(csr_array(of_axis[:, part])) for of_axis, part in zip(weights, used, strict=True)]
        volume = volume[tuple(used)]
        shape = [len(range(*part.indices(n))) for part, n in zip(box, self.new_shape, strict=True)]

        far, middle, near = np.argsort([-abs(stride) for stride in volume.strides], kind="stable")
        growth = np.array(shape) / volume.shape
        if growth[far] < 0.5 * growth.max():  # what grows, grows last: memory
            far, middle, near = np.argsort(-growth)
        between = np.empty((volume.shape[far], shape[near], shape[middle]), np.float32)
        for layer, done in zip(volume.transpose(far, middle, near), between, strict=True):
            layer = np.ascontiguousarray(layer if only is None else layer == only, np.float32)
            done[:] = _rows(weights[near], _rows(weights[middle], layer).T)
        result = _rows(weights[far], between.reshape(len(between), -1)).reshape(shape[far], *between.shape[1:])
        return result.transpose(np.argsort([far, near, middle]))

    def around(self, box: Box, *, margin: int = 0) -> Box:
        """Of the new grid, the box of the voxels that take anything from a box of the old one, and a margin where there is room."""
        if not self.straight:
            return tuple(slice(0, n) for n in self.new_shape)
        found = []
        for axis, part in enumerate(box):
            reach = int(REACH_SIGMAS * self.sigma_voxels[axis] + 0.5) + 1
            at = _at(*self._line(axis)).clip(0, self.shape[axis] - 1)
            inside = np.flatnonzero((at > part.start - 1 - reach) & (at < part.stop + reach))
            found.append(slice(max(0, int(inside[0]) - margin), min(len(at), int(inside[-1]) + 1 + margin)))
        return tuple(found)

    def label(self, volume: np.ndarray, box: Box) -> np.ndarray:
        """Labels (D, H, W) in a box of the new grid, each the nearest old voxel's; 0 beyond the scan."""
        if not self.straight:
            return self._general(volume, 0, "grid-constant", volume.dtype, box)
        nearest = [np.floor(_at(*self._line(axis))[box[axis]] + 0.5).astype(int) for axis in range(3)]
        outside = [(at < 0) | (at >= n) for at, n in zip(nearest, self.shape, strict=True)]
        found = volume[np.ix_(*(at.clip(0, n - 1) for at, n in zip(nearest, self.shape, strict=True)))]
        for axis, out in enumerate(outside):
            found[(slice(None),) * axis + (out,)] = 0
        return found

    def _line(self, axis: int) -> tuple[int, float, float]:
        """How many new voxels there are along an axis, and of the first one and of a step, where they are in old voxels."""
        steps = self.steps
        return self.new_shape[axis], round(float(steps[axis, 3]), 9), float(steps[axis, axis])

    def _general(self, volume: np.ndarray, order: int, beyond: str, kind: DTypeLike, box: Box | None) -> np.ndarray:
        linear, offset, shape = self.steps[:3, :3], self.steps[:3, 3], self.new_shape
        if box is not None:
            offset = offset + linear @ [part.start for part in box]
            shape = tuple(part.stop - part.start for part in box)
        return affine_transform(volume, linear, offset, shape, kind, order, beyond, prefilter=False)


def _at(m: int, start: float, step: float) -> np.ndarray:
    return start + step * np.arange(m)


def _weights(n: int, m: int, start: float, step: float, sigma: float = 0.0) -> csr_array:
    """(m, n) weights of the old voxels in the new ones along an axis: a Gaussian of `sigma` voxels, then linear interpolation, with the outermost
    voxels going on beyond the ends."""
    at = _at(m, start, step).clip(0, n - 1)
    linear = _linear(n, at)
    if sigma:
        reach = int(REACH_SIGMAS * sigma + 0.5)
        offsets = np.arange(-reach, reach + 1)
        bell = np.exp(-0.5 * (offsets / sigma) ** 2)
        columns = (np.arange(n)[:, None] + offsets).clip(0, n - 1)
        smooth = csr_array((np.tile(bell / bell.sum(), n), (np.repeat(np.arange(n), len(offsets)), columns.ravel())), shape=(n, n))
        linear = linear @ smooth
    return linear.astype(np.float32)


@lru_cache(maxsize=8)
def _fitted(n: int, m: int, start: float, step: float) -> csr_array:
    """(m, n) weights with which the linear interpolation of the new voxels is nearest to the old ones (least squares). They fade within a few
    voxels; what is below a ten-thousandth is left out."""
    back = _linear(m, (np.arange(n) - start) / step).toarray()  # (n, m)
    best = np.linalg.solve(back.T @ back + 1e-3 * np.eye(m), back.T)
    best[np.abs(best) < 1e-4] = 0
    return csr_array(best.astype(np.float32))


def _linear(n: int, at: np.ndarray) -> csr_array:
    """(len(at), n) weights of linear interpolation between n voxels at positions `at`; none beyond them."""
    low = np.floor(at).astype(int)
    ends = np.concatenate([low, low + 1])
    shares, rows = np.concatenate([1 - (at - low), at - low]), np.tile(np.arange(len(at)), 2)
    some = (shares > 0) & (ends >= 0) & (ends < n)
    return csr_array((shares[some], (rows[some], ends[some])), shape=(len(at), n))


def _unless_same(weights: csr_array) -> csr_array | None:
    """None where nothing would change."""
    m, n = weights.shape
    return None if m == n == weights.nnz and np.abs(weights.diagonal() - 1).max() < 1e-6 else weights


def _rows(weights: csr_array | None, layer: np.ndarray) -> np.ndarray:
    """Weights (m, n) applied to the rows (n, k) of a layer."""
    return layer if weights is None else weights @ np.ascontiguousarray(layer)
