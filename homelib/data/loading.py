"""From prepared cases to training patches: cut, window, and the random changes of `AugmentConfig`, on MONAI's transforms.

A patch depends on nothing but the seed, the step and its place in the batch, so a training that stops and goes on sees the same patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandCoarseDropoutd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    ToTensord,
)
from torch import Tensor

from ..config import AugmentConfig, DataConfig
from ..errors import UserError
from .manifest import Manifest, Range, load_manifest
from .prepare import PreparedCase
from .transforms import RandContrastPhased, RandPatchd

HOLES = 3  # at most, in one patch


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
        return done["image"].float(), done["label"].long()


def augmentation(manifest: Manifest, patch_voxels: Sequence[int], augment: AugmentConfig, contrast_ranges: dict[str, Range]) -> Compose:
    """The transforms of a training patch, in order: cut (turned and scaled), contrast phase (both in HU), window, then intensity. All that
    follows the window works in the unit range, where 0 is what lies beyond the scan; the manifest's own range comes last."""
    both, (low, high), (bottom, top) = ["image", "label"], manifest.intensity_window, manifest.intensity_range
    classes = len(manifest.class_names)
    place = {"class_centred": augment.class_centred, "overhang": augment.overhang}
    turn = {"rotation_degrees": augment.rotation_degrees, "scaling": augment.scaling}
    steps: list = [RandPatchd(both, patch_voxels, beyond=low, classes=classes, **place, **turn)]
    if augment.contrast_phase:
        offsets = {manifest.class_names.index(name): span for name, span in contrast_ranges.items()}
        steps.append(RandContrastPhased(both, offsets, prob=augment.contrast_phase))
    steps.append(ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True))
    if augment.holes:
        smallest, largest = ([max(1, n // part) for n in patch_voxels] for part in (8, 2))
        steps.append(RandCoarseDropoutd(both, 1, smallest, fill_value=0, max_holes=HOLES, max_spatial_size=largest, prob=augment.holes))
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
