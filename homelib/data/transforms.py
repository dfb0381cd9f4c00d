"""The two transforms that MONAI lacks: a turned and scaled patch cut out of a scan in one resampling, and another contrast phase."""

from collections.abc import Sequence

import numpy as np
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

from .manifest import Range


class RandPatchd(Randomizable, MapTransform):
    """Cut a patch (1, d, h, w) out of image and label (1, D, H, W), turned and scaled about its middle.

    Only the patch's own voxels are resampled, the image linearly, the label by the nearest voxel. A patch lies within the scan, or, on an
    axis where the scan is smaller, around it.

    Args:
        keys: of image and label, in this order.
        size: (d, h, w).
        beyond: value of the image where there is no scan; the label is 0 there.
        classes: with the background.
        class_centred: probability that the middle is a voxel of a class, drawn at random among those the scan has (moved where the patch would reach out).
        overhang: part of the patch that may lie beyond the scan's lower or upper end.
        rotation_degrees, scaling: largest turn about each axis and change of each axis's scale.
    """

    def __init__(
        self,
        keys: Sequence[str],
        size: Sequence[int],
        *,
        beyond: float,
        classes: int,
        class_centred: float = 0.0,
        overhang: float = 0.0,
        rotation_degrees: float = 0.0,
        scaling: float = 0.0,
    ):
        super().__init__(keys)
        self.size, self.beyond, self.classes, self.class_centred = np.array(size), beyond, classes, class_centred
        self.slack = np.array([0, 0, round(overhang * size[2])])
        self.rotation_degrees, self.scaling = rotation_degrees, scaling

    def __call__(self, sample: dict) -> dict:
        image, label = (np.asarray(sample[key])[0] for key in self.keys)
        corner = self._corner(label)
        turn = Rotation.from_euler("xyz", self.R.uniform(-1, 1, 3) * self.rotation_degrees, degrees=True).as_matrix()
        matrix = turn * (1 + self.R.uniform(-1, 1, 3) * self.scaling)  # a step of the patch, in voxels of the scan
        middle = (self.size - 1) / 2
        offset = corner + middle - matrix @ middle
        how = {"output_shape": tuple(self.size), "mode": "grid-constant", "prefilter": False}
        cut = affine_transform(image - self.beyond, matrix, offset, order=1, **how) + self.beyond, affine_transform(label, matrix, offset, order=0, **how)
        return sample | dict(zip(self.keys, [part[None] for part in cut], strict=True))

    def _corner(self, label: np.ndarray) -> np.ndarray:
        """First voxel of the patch before it is turned, on the scan's grid: negative where the patch begins outside."""
        room = np.array(label.shape) - self.size
        lowest, highest = np.where(room < 0, room // 2, -self.slack), np.where(room < 0, room // 2, room + self.slack)
        corner = self.R.randint(lowest, highest + 1)
        present = np.flatnonzero(np.bincount(label.ravel(), minlength=self.classes)[1 : self.classes]) + 1
        if len(present) and self.R.uniform() < self.class_centred:
            voxels = np.flatnonzero(label == self.R.choice(present))
            corner = np.clip(np.unravel_index(self.R.choice(voxels), label.shape) - self.size // 2, lowest, highest)
        return corner


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
