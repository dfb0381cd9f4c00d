"""From prepared cases to training patches: window, and the random changes of `AugmentConfig`, with MONAI's transforms.

A patch depends on nothing but the seed, the step and its place in the batch, so a training that stops and goes on sees the same patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from monai.transforms import (
    BorderPadd,
    Compose,
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandomizableTransform,
    RandShiftIntensityd,
    RandSpatialCropd,
    ScaleIntensityRanged,
    SpatialPadd,
    ToTensord,
)
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..config import AugmentConfig, DataConfig
from ..errors import UserError
from .manifest import Manifest, Range, load_manifest
from .prepare import PreparedCase

IGNORE = 255  # a voxel with this label takes no part in the loss


def window(image: np.ndarray, manifest: Manifest) -> np.ndarray:
    """Clip an image to the manifest's intensity window and map it onto its range, float32 of the same shape."""
    (low, high), (bottom, top) = manifest.intensity_window, manifest.intensity_range
    return ((np.clip(image, low, high) - low) / (high - low) * (top - bottom) + bottom).astype(np.float32)


class Patches:
    """Random training patches of some cases.

    >>> patches = Patches(cases, settings.data, settings.training.augment, seed=0)   # doctest: +SKIP
    >>> image, label = patches.batch(step=0, size=2)   # (2, 1, D, H, W) float32 and (2, 1, D, H, W) int64; the same again for the same step
    """

    def __init__(self, cases: Sequence[PreparedCase], data: DataConfig, augment: AugmentConfig, *, seed: int):
        if not cases or any(c.label is None for c in cases):
            raise UserError(f"data.train_cases: found {[c.case.id for c in cases if c.label is None] or 'no case'} without a label, expected labelled cases.")
        manifest = load_manifest(data.manifest)
        self.cases, self.seed = list(cases), seed
        self.transforms = [augmentation(manifest, data.patch_voxels, augment, manifest.contrast_of(c.case.id)) for c in cases]

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Patches of one step: images (size, 1, D, H, W) float32, labels (size, 1, D, H, W) int64 with 255 where the loss must not look."""
        pairs = [self.patch(step, place) for place in range(size)]
        return tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))

    def patch(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, step, place))
        index = int(rng.integers(len(self.cases)))
        transform = self.transforms[index].set_random_state(int(rng.integers(2**32)))
        case = self.cases[index]
        done = transform({"image": case.image[None], "label": case.label[None]})
        done = done[0] if isinstance(done, list) else done  # MONAI's class-centred crop makes a list of one
        return done["image"].float(), done["label"].long()


def augmentation(manifest: Manifest, patch_voxels: Sequence[int], augment: AugmentConfig, contrast_ranges: dict[str, Range]) -> Compose:
    """The transforms of a training patch, in order: contrast phase (in HU), window, affine, crop, then intensity. All that follows the window
    works in the unit range, where 0 is what lies beyond the scan; the manifest's own range comes last."""
    both, (low, high), (bottom, top) = ["image", "label"], manifest.intensity_window, manifest.intensity_range
    steps: list = []
    if augment.contrast_phase:
        offsets = {manifest.class_names.index(name): span for name, span in contrast_ranges.items()}
        steps.append(RandContrastPhased(both, offsets, prob=augment.contrast_phase))
    steps += [
        ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
        SpatialPadd(both, patch_voxels),
    ]
    if augment.overhang:
        steps.append(BorderPadd(both, (0, 0, round(augment.overhang * patch_voxels[2]))))
    if augment.rotation_degrees or augment.scaling:
        turn = np.deg2rad(augment.rotation_degrees)
        span = (-augment.scaling, augment.scaling)
        steps.append(RandAffined(both, prob=1.0, rotate_range=(turn,) * 3, scale_range=(span,) * 3, mode=("bilinear", "nearest"), padding_mode="zeros"))
    steps.append(_crop(patch_voxels, augment.class_centred, len(manifest.class_names)))
    if augment.smoothing_voxels:
        sigma = (0.1, augment.smoothing_voxels)
        steps.append(RandGaussianSmoothd("image", sigma, sigma, sigma, prob=0.3))
    if augment.gamma:
        steps.append(RandAdjustContrastd("image", prob=0.5, gamma=(1 - augment.gamma, 1 + augment.gamma)))
    if augment.intensity_shift:
        steps.append(RandShiftIntensityd("image", augment.intensity_shift, prob=0.5))
    if augment.noise:
        steps.append(RandGaussianNoised("image", prob=0.5, std=augment.noise))
    if (bottom, top) != (0.0, 1.0):
        steps.append(ScaleIntensityRanged("image", 0.0, 1.0, bottom, top))
    return Compose([*steps, ToTensord(both, track_meta=False)])


def _crop(patch_voxels: Sequence[int], class_centred: float, classes: int) -> MapTransform:
    """Anywhere, or, with probability `class_centred`, around a voxel of a class drawn at random (moved inside the volume where it would reach out)."""
    both = ["image", "label"]
    if not class_centred:
        return RandSpatialCropd(both, patch_voxels, random_size=False)
    ratios = [max(1 - class_centred, 1e-6)] + [class_centred / (classes - 1)] * (classes - 1)  # a patch without any class is still cut somewhere
    return RandCropByLabelClassesd(both, "label", patch_voxels, ratios=ratios, num_classes=classes, num_samples=1, warn=False)


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
