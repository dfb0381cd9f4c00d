"""The two transforms that MONAI lacks: a turned, scaled and bent patch cut out of a scan in one resampling, and another contrast phase."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from scipy.ndimage import affine_transform, gaussian_filter, map_coordinates, zoom
from scipy.spatial.transform import Rotation

from ..config import IGNORE
from .cache import Chunked, Places
from .manifest import Range

BEND_EVERY = 16  # voxels from one random displacement to the next


class RandPatchd(Randomizable, MapTransform):
    """Cut a patch (1, d, h, w) out of image and label, turned and scaled about its middle, and bent.

    Image and label are arrays (1, D, H, W), or `Chunked` (D, H, W): of those only the box around the patch is read, and `"places"` of the sample
    tells where the classes are. Only the patch's own voxels are resampled, the image linearly, the label by the nearest voxel. A patch lies
    within the scan, or, on an axis where the scan is smaller, around it.

    Args:
        keys: of image and label, in this order.
        size: (d, h, w).
        beyond: value of the image where there is no scan; the label is 0 there.
        classes: with the background.
        class_centred: probability that the middle is a voxel of a class, drawn at random among those the scan has (moved where the patch would reach out).
        by_voxel: a class is drawn as often as it has voxels, in place of each as often as the other.
        overhang: part of the patch that may lie beyond the scan's lower or upper end.
        mirrored: probability that outside is the scan mirrored, with the label `IGNORE`, in place of nothing.
        rotation_degrees, scaling: largest turn about each axis and change of each axis's scale.
        bending_voxels: standard deviation of random displacements about every 16 voxels, smooth between (cubic spline): organs of another shape.
    """

    def __init__(
        self,
        keys: Sequence[str],
        size: Sequence[int],
        *,
        beyond: float,
        classes: int,
        class_centred: float = 0.0,
        by_voxel: bool = False,
        overhang: float = 0.0,
        mirrored: float = 0.0,
        rotation_degrees: float = 0.0,
        scaling: float = 0.0,
        bending_voxels: float = 0.0,
    ):
        super().__init__(keys)
        self.by_voxel = by_voxel
        self.size, self.beyond, self.classes, self.class_centred = np.array(size), beyond, classes, class_centred
        self.mirrored, self.slack = mirrored, np.array([0, 0, round(overhang * size[2])])
        self.rotation_degrees, self.scaling, self.bending_voxels = rotation_degrees, scaling, bending_voxels

    def __call__(self, sample: dict) -> dict:
        image, label = (sample[key] for key in self.keys)
        shape = np.array(label.shape[-3:])
        corner = self._corner(shape, label, sample.get("places"))
        turn = Rotation.from_euler("xyz", self.R.uniform(-1, 1, 3) * self.rotation_degrees, degrees=True).as_matrix()
        matrix = turn * (1 + self.R.uniform(-1, 1, 3) * self.scaling)  # a step of the patch, in voxels of the scan
        middle = (self.size - 1) / 2
        offset = corner + middle - matrix @ middle
        bent = self._bent(matrix, offset) if self.bending_voxels else None
        if isinstance(label, Chunked):
            box = self._box(matrix, offset, shape) if bent is None else _around(bent.reshape(3, -1).T, shape)
            image, label, first = image[box], label[box], np.array([part.start for part in box])
        else:
            image, label, first = np.asarray(image)[0], np.asarray(label)[0], np.zeros(3, int)

        mirrored = self.mirrored and self.R.uniform() < self.mirrored
        outside = "mirror" if mirrored else "grid-constant"

        def cut(volume: np.ndarray, **how: Any) -> np.ndarray:
            if bent is not None:
                return map_coordinates(volume, bent - first[:, None, None, None], prefilter=False, **how)
            return affine_transform(volume, matrix, offset - first, output_shape=tuple(self.size), prefilter=False, **how)

        image = cut(image - self.beyond, order=1, mode=outside) + self.beyond
        label = cut(label, order=0, mode="grid-constant", cval=IGNORE if mirrored else 0)
        rest = {key: value for key, value in sample.items() if key != "places"}
        return rest | dict(zip(self.keys, (image[None], label[None]), strict=True))

    def _bent(self, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Where in the scan each voxel of the patch lies, (3, d, h, w)."""
        grid = np.stack(np.meshgrid(*map(np.arange, self.size), indexing="ij")).reshape(3, -1)
        displaced = self.R.normal(0, self.bending_voxels, (3, *(-(-n // BEND_EVERY) + 1 for n in self.size)))
        for axis, n in enumerate(self.size, start=1):  # a spline in space is one along each axis after the other
            points = displaced.shape[axis]
            spline = zoom(np.eye(points), (n / points, 1), order=3, mode="nearest")  # (n, points)
            displaced = np.moveaxis(np.tensordot(spline, displaced, (1, axis)), 0, axis)
        return (matrix @ grid + offset[:, None]).reshape(3, *self.size) + displaced

    def _box(self, matrix: np.ndarray, offset: np.ndarray, shape: np.ndarray) -> tuple[slice, ...]:
        """The box of the scan that an unbent patch is made of."""
        return _around(np.array(list(itertools.product(*((0, n - 1) for n in self.size)))) @ matrix.T + offset, shape)

    def _corner(self, shape: np.ndarray, label: np.ndarray | Chunked, places: Places | None) -> np.ndarray:
        """First voxel of the patch before it is turned, on the scan's grid: negative where the patch begins outside."""
        room = shape - self.size
        lowest, highest = np.where(room < 0, room // 2, -self.slack), np.where(room < 0, room // 2, room + self.slack)
        corner = self.R.randint(lowest, highest + 1)
        label = label if isinstance(label, Chunked) else np.asarray(label)[0]
        counts = np.zeros(self.classes, int)
        if places is not None:
            for index, count in places.counts.items():
                counts[index : index + 1] = count  # one that is no class (ignored voxels) is left out
        else:
            counts = np.bincount(np.asarray(label).ravel(), minlength=self.classes)[: self.classes]
        present = np.flatnonzero(counts[1:]) + 1
        if len(present) and self.R.uniform() < self.class_centred:
            chosen = self.R.choice(present, p=counts[present] / counts[present].sum()) if self.by_voxel else self.R.choice(present)
            if places is None:
                middle = np.unravel_index(self.R.choice(np.flatnonzero(label == chosen)), label.shape)
            else:
                middle = places.voxels[chosen][self.R.randint(len(places.voxels[chosen]))]
            corner = np.clip(middle - self.size // 2, lowest, highest)
        return corner


def _around(points: np.ndarray, shape: np.ndarray) -> tuple[slice, ...]:
    """The box of a scan of that shape which holds points (n, 3), with a voxel around it."""
    low = np.clip(np.floor(points.min(0)).astype(int) - 1, 0, shape - 1)
    high = np.clip(np.ceil(points.max(0)).astype(int) + 2, low + 1, shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


class RandContrastPhased(RandomizableTransform, MapTransform):
    """Give a CT another contrast phase: add to every class that takes up contrast an offset in HU, drawn from the class's range.

    The offset fades at the border over about a voxel, as partial volume does. Ranges come from the manifest (`contrast_ranges`).

    Args:
        keys: of image and label, in this order.
        offsets: class index -> (lowest, highest) offset in HU.
        prob: of changing a patch at all.
    """

    def __init__(self, keys: Sequence[str], offsets: dict[int, Range], *, prob: float):
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.offsets = offsets

    def __call__(self, sample: dict) -> dict:
        self.randomize(None)
        if not self._do_transform:
            return sample
        image_key, label_key = self.keys
        table = np.zeros(256, np.float32)
        for index, (low, high) in self.offsets.items():
            table[index] = self.R.uniform(low, high)
        field = table[np.asarray(sample[label_key])]
        field = gaussian_filter(field, (0, *(0.7,) * (field.ndim - 1)))
        return sample | {image_key: sample[image_key] + field}
