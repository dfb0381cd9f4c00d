"""The sets of augmentations by name do what they say: each change happens, image and label stay together, and the paper's extra ones are where it has them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.transforms import RandAffined, RandFlipd, RandRotate90d, RandZoomd

from homelib import UserError
from homelib.config import AugmentConfig, DataConfig
from homelib.data.loading import Patches, augmentation
from homelib.data.manifest import load_manifest
from homelib.data.recipes import recipe

MANIFEST = load_manifest("demo_ct")


@pytest.mark.parametrize("name", ["paper", "released"])
def test_image_and_label_change_together_and_stay_in_range(name, prepared):
    coded = replace(prepared, image=(prepared.label == 3).astype(np.float32) * 425 - 175)  # the liver white, the rest black
    side = max(prepared.image.shape)
    patches = Patches([coded], DataConfig(patch_voxels=(side, side, side)), AugmentConfig(recipe=name), seed=0)
    for step in range(12):
        image, label = patches.patch(step, 0)
        assert image.shape == label.shape
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        middle = (image.min() + image.max()) / 2
        white, liver = image > middle, label == 3
        assert 2 * (white & liver).sum() / (white.sum() + liver.sum()) > 0.8, step
        assert -0.5 < image.min() < image.max() < 1.6


@pytest.mark.parametrize("name", ["paper", "released"])
def test_no_change_is_always_there_and_each_comes(name):
    _, changes = recipe(name, "feta_2022", (32, 32, 32))
    rng = np.random.default_rng(0)
    sample = {"image": rng.random((1, 32, 32, 32)).astype(np.float32), "label": rng.integers(0, 3, (1, 32, 32, 32)).astype(np.uint8)}
    for change in changes:
        change.set_random_state(0)
        changed = [not np.array_equal(np.asarray(change(dict(sample))["image"]), sample["image"]) for _ in range(60)]
        assert 0 < sum(changed) < 60, change


def test_the_paper_flips_and_gives_feta_and_mvseg_an_affine_change_too():
    kinds = {name: [type(change) for change in recipe("paper", name, (32, 32, 32))[1]] for name in ("feta_2022", "mvseg_2023", "panorama", "amos_ct")}
    assert {name: RandAffined in found for name, found in kinds.items()} == {"feta_2022": True, "mvseg_2023": True, "panorama": False, "amos_ct": False}
    assert all(found.count(RandFlipd) == 3 for found in kinds.values())


def test_the_released_code_zooms_in_and_turns_and_flips_nothing():
    cut, changes = recipe("released", "panorama", (192, 192, 48))
    kinds = [type(change) for change in changes]
    assert RandFlipd not in kinds
    zoom, turn = changes[kinds.index(RandZoomd)], changes[kinds.index(RandRotate90d)]
    assert (zoom.rand_zoom.min_zoom, zoom.rand_zoom.max_zoom) == ((1.3,), (1.5,))
    assert turn.spatial_axes == (0, 1)
    assert cut["class_centred"] == 0.75


def test_patches_without_two_equal_sides_cannot_be_turned():
    with pytest.raises(UserError, match="data.patch_voxels: found 64 x 48 x 32, expected two equal sides"):
        recipe("released", "panorama", (64, 48, 32))
    with pytest.raises(UserError, match="recipe: found 'ours'"):
        recipe("ours", "panorama", (64, 48, 32))


def test_each_modality_has_its_own_window(prepared):
    joint = load_manifest("amos_joint")
    sample = {"image": np.full((1, 16, 16, 16), 125.0, np.float32), "label": np.zeros((1, 16, 16, 16), np.uint8)}
    found = {modality: augmentation(joint, (8, 8, 8), AugmentConfig(), {}, modality=modality)(dict(sample))["image"] for modality in joint.modalities}
    for modality, image in found.items():
        low, high = joint.window_of(modality)
        np.testing.assert_allclose(image, (125 - low) / (high - low), rtol=1e-5)
    assert len(found) == 2
