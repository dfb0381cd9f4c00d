"""From prepared cases to training patches: cut, window, and the random changes of `AugmentConfig`, on MONAI's transforms.

Cases may lie in memory or in their files, from which a patch reads only its own blocks. A patch depends on nothing but the seed, the step
and its place in the batch, so a training that stops and goes on sees the same patches, and so does every process that makes them.
"""

from collections.abc import Sequence
from typing import Any

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
from torch.utils.data import DataLoader, Dataset

from ..config import AugmentConfig, DataConfig
from ..errors import UserError
from . import recipes
from .cache import Chunked, Places
from .manifest import Manifest, Modality, Range, load_manifest
from .parallel import new_processes
from .prepare import PreparedCase
from .transforms import RandContrastPhased, RandPatchd

HOLES = 3  # at most, in one patch


def window(image: np.ndarray, manifest: Manifest, modality: Modality | None = None) -> np.ndarray:
    """Clip an image of any shape to the window of its modality (None: the manifest's own) and map it onto the manifest's range, float32."""
    (low, high), (bottom, top) = manifest.window_of(modality or manifest.modality), manifest.intensity_range
    return ((np.clip(image, low, high) - low) / (high - low) * (top - bottom) + bottom).astype(np.float32)


class Patches:
    """Random training patches of some cases. Raises UserError: no case, or one without a label.

    >>> patches = Patches(cases, settings.data, settings.training.augment, seed=0)   # doctest: +SKIP
    >>> image, label = patches.batch(step=0, size=2)   # (2, 1, D, H, W) float32 and (2, 1, D, H, W) int64; the same again for the same step
    """

    def __init__(self, cases: Sequence[PreparedCase], data: DataConfig, augment: AugmentConfig, *, seed: int):
        if not cases or any(c.label is None for c in cases):
            raise UserError(f"data.train_cases: found {[c.case.id for c in cases if c.label is None] or 'no case'} without a label, expected labelled cases.")
        manifest = load_manifest(data.manifest)
        self.cases, self.seed = list(cases), seed
        made: dict[str, Compose] = {}  # thousands of cases share a few
        self.transforms = []
        for case in self.cases:
            kind = case.case.modality, manifest.contrast_of(case.case.id)
            if repr(kind) not in made:
                made[repr(kind)] = augmentation(manifest, data.patch_voxels, augment, kind[1], modality=kind[0])
            self.transforms.append(made[repr(kind)])
        self.places: list[Places | None] = [case.places for case in self.cases]
        self.holders: dict[int, list[int]] = {}  # class -> cases that have it, where a class is drawn first; 0 -> those that have none
        if data.sampling == "classes":
            known = [case.places or Places.of(np.asarray(case.label)) for case in self.cases]
            self.places = list(known)
            for index in range(1, len(manifest.class_names)):
                if having := [number for number, places in enumerate(known) if places.counts.get(index)]:
                    self.holders[index] = having
            if healthy := [number for number, places in enumerate(known) if not places.counts]:
                self.holders[0] = healthy  # drawn as often as a class: a network that never sees them finds lesions in all

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Patches of one step: images (size, 1, D, H, W) float32, labels (size, 1, D, H, W) int64 with 255 where the loss must not look."""
        pairs = [self.patch(step, place) for place in range(size)]
        images, labels = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return images, labels

    def patch(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        """One of them: image (1, D, H, W) float32, label (1, D, H, W) int64. Raises UserError: a case's file that is gone or damaged."""
        rng = np.random.default_rng((self.seed, step, place))
        if self.holders:
            wanted = list(self.holders)[int(rng.integers(len(self.holders)))]
            index = self.holders[wanted][int(rng.integers(len(self.holders[wanted])))]
            places = self.places[index]
            if wanted and places:
                places = Places({wanted: places.counts[wanted]}, {wanted: places.voxels[wanted]})
        else:
            index = int(rng.integers(len(self.cases)))
            places = self.places[index]
        transform = self.transforms[index].set_random_state(int(rng.integers(2**32)))
        case = self.cases[index]
        image, label = (volume if volume is None or isinstance(volume, Chunked) else volume[None] for volume in (case.image, case.label))
        try:
            done = transform({"image": image, "label": label, "places": places})
        except RuntimeError as error:  # MONAI's, around whatever a transform has raised: a file that is gone, say
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__
            raise cause or error from None
        return done["image"].float(), done["label"].long()

    def loader(self, *, steps: range, size: int, workers: int = 0) -> DataLoader:
        """`batch` of each step, in order, made by some processes beside the training: the same batches for any number of them."""
        return DataLoader(
            _InOrder(self, steps, size), batch_size=size, num_workers=workers, multiprocessing_context=new_processes(__name__) if workers else None
        )


class _InOrder(Dataset):
    """The patches of some steps, one after the other."""

    def __init__(self, patches: Patches, steps: range, size: int):
        self.patches, self.steps, self.size = patches, steps, size

    def __len__(self) -> int:
        return len(self.steps) * self.size

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.patches.patch(self.steps[number // self.size], number % self.size)


def augmentation(
    manifest: Manifest, patch_voxels: Sequence[int], augment: AugmentConfig, contrast_ranges: dict[str, Range], *, modality: Modality | None = None
) -> Compose:
    """The transforms of a training patch, in order: cut (turned and scaled), contrast phase (both in HU), window, then intensity. All that
    follows the window works in the unit range, where 0 is what lies beyond the scan; the manifest's own range comes last."""
    both, (low, high) = ["image", "label"], manifest.window_of(modality or manifest.modality)
    classes = len(manifest.class_names)
    if augment.recipe != "own":
        cut, changes = recipes.recipe(augment.recipe, manifest.name, patch_voxels)
        patch = RandPatchd(both, patch_voxels, beyond=low, classes=classes, **cut)
        return _finished([patch, ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True), *changes], manifest)
    place: dict[str, Any] = {"class_centred": augment.class_centred, "overhang": augment.overhang, "mirrored": augment.mirrored}
    turn: dict[str, Any] = {"rotation_degrees": augment.rotation_degrees, "scaling": augment.scaling, "bending_voxels": augment.bending_voxels}
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
    return _finished(steps, manifest)


def _finished(steps: list, manifest: Manifest) -> Compose:
    """The transforms, then the manifest's own range in place of the unit range, then tensors."""
    if (limits := manifest.intensity_range) != (0.0, 1.0):
        steps = [*steps, ScaleIntensityRanged("image", 0.0, 1.0, *limits)]
    return Compose([*steps, ToTensord(["image", "label"], track_meta=False)])
