"""The two transforms that MONAI lacks: a turned and scaled patch cut out of a scan in one resampling, and another contrast phase."""

import itertools
from collections.abc import Sequence

import numpy as np
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation

from .cache import Chunked, Places
from .manifest import Range


class RandPatchd(Randomizable, MapTransform):
    """Cut a patch (1, d, h, w) out of image and label, turned and scaled about its middle.

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
        by_voxel: bool = False,
        overhang: float = 0.0,
        rotation_degrees: float = 0.0,
        scaling: float = 0.0,
    ):
        super().__init__(keys)
        self.by_voxel = by_voxel
        self.size, self.beyond, self.classes, self.class_centred = np.array(size), beyond, classes, class_centred
        self.slack = np.array([0, 0, round(overhang * size[2])])
        self.rotation_degrees, self.scaling = rotation_degrees, scaling

    def __call__(self, sample: dict) -> dict:
        image, label = (sample[key] for key in self.keys)
        shape = np.array(label.shape[-3:])
        corner = self._corner(shape, label, sample.get("places"))
        turn = Rotation.from_euler("xyz", self.R.uniform(-1, 1, 3) * self.rotation_degrees, degrees=True).as_matrix()
        matrix = turn * (1 + self.R.uniform(-1, 1, 3) * self.scaling)  # a step of the patch, in voxels of the scan
        middle = (self.size - 1) / 2
        offset = corner + middle - matrix @ middle
        if isinstance(label, Chunked):
            image, label, offset = self._box(image, label, matrix, offset, shape)
        else:
            image, label = np.asarray(image)[0], np.asarray(label)[0]
        how = {"output_shape": tuple(self.size), "mode": "grid-constant", "prefilter": False}
        cut = affine_transform(image - self.beyond, matrix, offset, order=1, **how) + self.beyond, affine_transform(label, matrix, offset, order=0, **how)
        rest = {key: value for key, value in sample.items() if key != "places"}
        return rest | dict(zip(self.keys, [part[None] for part in cut], strict=True))

    def _box(self, image: Chunked, label: Chunked, matrix: np.ndarray, offset: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image and label in the box of the scan that a patch is made of, with a voxel around it, and the patch's offset in the box."""
        ends = np.array(list(itertools.product(*((0, n - 1) for n in self.size)))) @ matrix.T + offset
        low = np.clip(np.floor(ends.min(0)).astype(int) - 1, 0, shape - 1)
        high = np.clip(np.ceil(ends.max(0)).astype(int) + 2, low + 1, shape)
        box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        return image[box], label[box], offset - low

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
