"""Training patches: the window, determinism by (seed, step, place), each augmentation alone, contrast phase by class, ignored voxels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion

from homelib import UserError
from homelib.config import IGNORE, AugmentConfig, DataConfig
from homelib.data.loading import Patches, augmentation, window
from homelib.data.manifest import load_manifest
from homelib.data.transforms import RandContrastPhased, RandPatchd

MANIFEST = load_manifest("demo_ct")
NONE = AugmentConfig()
ALL = AugmentConfig(contrast_phase=0.8, rotation_degrees=15, scaling=0.2, intensity_shift=0.1, gamma=0.3, noise=0.05, smoothing_voxels=1.0)


def patches(cases, augment=NONE, *, seed=0, size=(16, 16, 16)) -> Patches:
    return Patches(cases, DataConfig(patch_voxels=size), augment, seed=seed)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_window_maps_its_ends_onto_zero_and_one():
    image = np.array([[-1000.0, -175.0, -68.75], [37.5, 250.0, 3000.0]])
    found = window(image, MANIFEST)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0, 0, 0.25], [0.5, 1, 1]])
    wide = MANIFEST.model_copy(update={"intensity_range": (-1.0, 1.0)})
    np.testing.assert_allclose(window(image, wide), [[-1, -1, -0.5], [0, 1, 1]])


def test_a_batch_has_one_channel_and_class_indices(prepared):
    image, label = patches([prepared], ALL, size=(16, 32, 48)).batch(0, 3)
    assert image.shape == label.shape == (3, 1, 16, 32, 48)
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    assert type(image) is torch.Tensor
    assert set(label.unique().tolist()) <= set(range(9))


def test_without_augmentation_a_patch_is_a_piece_of_the_windowed_image(prepared):
    whole = window(prepared.image, MANIFEST)
    exact = patches([prepared], size=whole.shape).patch(3, 0)
    np.testing.assert_allclose(exact[0][0], whole, atol=1e-6)
    np.testing.assert_array_equal(exact[1][0], prepared.label)
    image, label = patches([prepared], size=(9, 8, 7)).patch(3, 0)
    views = np.lib.stride_tricks.sliding_window_view(whole, (9, 8, 7))
    found = np.argwhere((np.abs(views - image[0].numpy()) < 1e-5).all((3, 4, 5)))
    assert len(found) == 1
    start = found[0]
    np.testing.assert_array_equal(label[0], prepared.label[tuple(slice(a, a + n) for a, n in zip(start, (9, 8, 7), strict=True))])


def test_patches_come_from_all_over_the_image(prepared):
    seen = torch.stack([patches([prepared]).patch(step, 0)[1] for step in range(40)])
    assert set(seen.unique().tolist()) == set(range(9))


def test_an_image_smaller_than_the_patch_is_filled_with_background(prepared):
    image, label = patches([prepared], size=(48, 48, 48)).patch(0, 0)
    assert image.shape == label.shape == (1, 48, 48, 48)
    assert label.count_nonzero() == np.count_nonzero(prepared.label)
    np.testing.assert_allclose(image.sum(), window(prepared.image, MANIFEST).sum(), rtol=1e-4)


def test_what_lies_beyond_a_scan_is_the_low_end_of_the_manifests_range(prepared):
    """The same patches in either range, but for the range: what is filled in, by padding or by turning, is as dark as air."""
    shape, case = (48, 48, 48), prepared
    for augment in (NONE, AugmentConfig(rotation_degrees=20, overhang=0.3, gamma=0.3)):
        unit, wide = (
            augmentation(MANIFEST.model_copy(update={"intensity_range": limits}), shape, augment, {}).set_random_state(3)(
                {"image": case.image[None], "label": case.label[None]}
            )
            for limits in ((0.0, 1.0), (-1.0, 1.0))
        )
        torch.testing.assert_close(wide["image"], 2 * unit["image"] - 1)
        assert wide["image"].min() == -1


def test_a_patch_depends_on_seed_step_and_place_and_not_on_what_was_asked_before(prepared):
    cases = [prepared, replace(prepared, image=prepared.image[::-1].copy(), label=prepared.label[::-1].copy())]
    source = patches(cases, ALL)
    first = source.batch(5, 2)
    for step in (7, 3, 0):
        source.batch(step, 3)
    assert same(source.batch(5, 2), first)
    assert same(patches(cases, ALL).batch(5, 2), first)
    assert same([part[1:2] for part in source.batch(5, 2)], [part[None] for part in source.patch(5, 1)])
    others = [source.patch(6, 0), source.patch(5, 1), source.patch(4, 1), patches(cases, ALL, seed=1).patch(5, 0)]
    assert not any(same(other, source.patch(5, 0)) for other in others)
    assert not same(others[0], others[1])  # (step 6, place 0) and (step 5, place 1)


def test_every_case_has_its_turn(prepared):
    marked = [replace(prepared, label=np.full_like(prepared.label, index)) for index in (1, 2, 3)]
    seen = [patches(marked).patch(step, 0)[1].unique().item() for step in range(30)]
    assert set(seen) == {1, 2, 3}


@pytest.mark.parametrize("field", ["rotation_degrees", "scaling", "intensity_shift", "gamma", "noise", "smoothing_voxels", "contrast_phase"])
def test_each_augmentation_changes_patches_and_only_the_spatial_ones_change_labels(field, prepared):
    value = {"rotation_degrees": 20, "contrast_phase": 1.0}.get(field, 0.3)
    size = tuple(prepared.image.shape)  # the whole image: no place is drawn
    plain, changed = (patches([prepared], augment, size=size) for augment in (NONE, AugmentConfig(**{field: value})))
    differ = [[not torch.equal(a, b) for a, b in zip(plain.patch(step, 0), changed.patch(step, 0), strict=True)] for step in range(12)]
    images, labels = zip(*differ, strict=True)
    assert any(images)
    assert any(labels) is (field in ("rotation_degrees", "scaling"))


def test_image_and_label_turn_together(prepared):
    coded = replace(prepared, image=(prepared.label == 3).astype(np.float32) * 425 - 175)  # the liver white, the rest black
    source = patches([coded], AugmentConfig(rotation_degrees=25, scaling=0.2), size=tuple(prepared.image.shape))
    for step in range(5):
        image, label = source.patch(step, 0)
        white, liver = image > 0.5, label == 3
        assert 2 * (white & liver).sum() / (white.sum() + liver.sum()) > 0.95
        assert liver.sum() > 100


def test_a_class_centred_patch_lies_around_a_voxel_of_a_class_each_as_often(prepared):
    """Eight lone voxels of eight classes in a wide background: a patch anywhere meets few of them, a centred one has its own in the middle."""
    shape, size = (60, 60, 60), (9, 9, 9)
    label = np.zeros(shape, np.uint8)
    for index in range(8):
        label[15 + 30 * (index >> 2), 15 + 30 * (index >> 1 & 1), 15 + 30 * (index & 1)] = index + 1
    wide = replace(prepared, image=np.zeros(shape, np.float32), label=label)
    centred, half = (patches([wide], AugmentConfig(class_centred=p), size=size) for p in (1.0, 0.5))
    middle = [centred.patch(step, 0)[1][0, 4, 4, 4].item() for step in range(160)]
    assert min(np.bincount(middle, minlength=9)[1:]) >= 8  # 20 each
    assert middle.count(0) == 0
    found = [half.patch(step, 0)[1].any().item() for step in range(200)]
    assert 70 <= sum(found) <= 130


def test_a_class_centred_patch_of_a_case_without_any_class_is_cut_somewhere(prepared):
    bare = replace(prepared, label=np.zeros_like(prepared.label))
    _, label = patches([bare], AugmentConfig(class_centred=1.0)).batch(0, 2)
    assert label.unique().tolist() == [0]


def test_ignored_voxels_stay_ignored(prepared):
    hidden = prepared.label.copy()
    hidden[:, :, : hidden.shape[2] // 2] = IGNORE
    _, label = patches([replace(prepared, label=hidden)], ALL, size=tuple(prepared.image.shape)).batch(0, 4)
    assert set(label.unique().tolist()) <= {*range(9), IGNORE}
    assert 0.25 < (label == IGNORE).float().mean() < 0.6


def test_holes_are_boxes_of_air_and_background_no_longer_than_half_a_patch(prepared):
    full = replace(prepared, image=np.full_like(prepared.image, 100.0), label=np.full_like(prepared.label, 3))
    sizes = []
    for step in range(20):
        image, label = patches([full], AugmentConfig(holes=1.0), size=(16, 12, 8)).patch(step, 0)
        hole = label[0] == 0
        assert torch.equal(hole, image[0] == 0)
        assert torch.equal(~hole, label[0] == 3)
        assert 0 < hole.float().mean() <= 3 / 8
        sizes.append(hole.sum().item())
    assert len(set(sizes)) > 10
    sometimes = [patches([full], AugmentConfig(holes=0.5), size=(16, 16, 16)).patch(step, 0)[1].eq(0).any().item() for step in range(100)]
    assert 30 < sum(sometimes) < 70


@pytest.mark.parametrize(("cases", "said"), [([], "no case"), (["phantom-a"], "phantom-a")])
def test_cases_without_labels_are_refused_by_name(cases, said, prepared):
    with pytest.raises(UserError, match=rf"^data\.train_cases: found .*{said}.* without a label, expected labelled cases"):
        patches([replace(prepared, label=None) for _ in cases])


# ---------------------------------------------------------------- place and turn


def patches_of_coordinates(count, **place):
    """Patches of a scan whose voxels hold one of their own coordinates: (count, 3, d, h, w), -1 where there is no scan."""
    shape, cut = (40, 30, 50), RandPatchd(["image", "label"], (12, 10, 16), beyond=-1.0, classes=2, **place)
    for seed in range(count):
        axes = np.indices(shape).astype(np.float32)
        yield np.stack([cut.set_random_state(seed)({"image": axis[None], "label": np.zeros((1, *shape), np.uint8)})["image"][0] for axis in axes])


def test_a_patch_is_turned_about_its_middle_and_scaled_along_its_axes():
    scales, turns = [], []
    for patch in patches_of_coordinates(60, rotation_degrees=10, scaling=0.2):
        middle = patch[:, 4:8, 3:7, 6:10]  # beyond no border
        matrix = np.stack([np.diff(middle, axis=axis).mean((1, 2, 3)) for axis in (1, 2, 3)], axis=1)
        for axis in (1, 2, 3):
            np.testing.assert_allclose(
                np.diff(middle, axis=axis), np.broadcast_to(matrix[:, axis - 1, None, None, None], np.diff(middle, axis=axis).shape), atol=1e-4
            )
        length = np.linalg.norm(matrix, axis=0)
        np.testing.assert_allclose((matrix / length).T @ (matrix / length), np.eye(3), atol=1e-4)  # axes stay at right angles
        centre = patch[:, 5:7, 4:6, 7:9].mean((1, 2, 3)) * 2
        np.testing.assert_allclose(centre, np.round(centre), atol=1e-3)  # where the unturned patch has its own
        scales.append(length)
        turns.append(np.degrees(np.arccos(np.clip(np.diag(matrix / length), -1, 1))))
    assert 0.8 <= np.min(scales) < 0.83
    assert 1.17 < np.max(scales) <= 1.2
    assert 8 < np.max(turns) < 15  # two of three turns move an axis


def test_only_overhang_lets_a_patch_reach_beyond_the_scans_ends():
    for overhang, most in ((0.0, 0), (0.25, 4)):
        beyond = [(patch[0] < 0).any((0, 1)).sum() for patch in patches_of_coordinates(120, overhang=overhang)]
        assert max(beyond) == most
        outside = [(patch[0] < 0) for patch in patches_of_coordinates(120, overhang=overhang)]
        assert all((mask.all((0, 1)) == mask.any((0, 1))).all() for mask in outside)  # whole layers


def test_a_bent_patch_is_displaced_smoothly_and_by_as_much_as_it_is_told():
    pairs = zip(patches_of_coordinates(200), patches_of_coordinates(200, bending_voxels=1.0), strict=True)
    within = np.array([[5], [5], [5]]), np.array([[34], [24], [44]])
    moved = [b - a for a, b in pairs if ((a.reshape(3, -1) >= within[0]) & (a.reshape(3, -1) <= within[1])).all()]
    assert len(moved) > 20
    assert 0.5 < np.std(moved) < 1.2
    for axis in (2, 3, 4):  # from voxel to voxel by less than the voxel: nothing folds
        assert np.abs(np.diff(moved, axis=axis)).max() < 1


def test_beyond_the_end_the_scan_goes_on_mirrored_and_the_loss_looks_away():
    place = {"overhang": 0.5, "mirrored": 1.0}
    shape, cut = (12, 10, 30), RandPatchd(["image", "label"], (12, 10, 16), beyond=-1.0, classes=2, **place)
    image = np.broadcast_to(np.arange(30, dtype=np.float32), shape)
    ends = set()
    for seed in range(60):
        done = cut.set_random_state(seed)({"image": image[None], "label": np.ones((1, *shape), np.uint8)})
        heights, inside = done["image"][0, 0, 0], done["label"][0, 0, 0] == 1
        first = heights[inside].min()
        expected = np.arange(16) + first - np.flatnonzero(inside)[0]
        np.testing.assert_allclose(heights, np.where(expected > 29, 58 - expected, np.abs(expected)))
        np.testing.assert_array_equal(done["label"][0, 0, 0], np.where((expected < 0) | (expected > 29), IGNORE, 1))
        ends |= {expected[0], expected[-1]}
    assert (min(ends), max(ends)) == (-8, 37)


# ---------------------------------------------------------------- contrast phase


def block_sample():
    """Two blocks of 14 voxels, class 1 and class 2, in a background."""
    label = np.zeros((1, 40, 20, 20), np.uint8)
    label[:, 3:17, 3:17, 3:17], label[:, 23:37, 3:17, 3:17] = 1, 2
    return {"image": np.full(label.shape, 40.0, np.float32), "label": label}


def test_contrast_phase_adds_one_offset_to_a_class_and_fades_at_its_border():
    sample = block_sample()
    done = RandContrastPhased(["image", "label"], {1: (70.0, 70.0)}, prob=1.0)(sample)
    change = done["image"] - sample["image"]
    three_voxels = np.ones((1, 7, 7, 7))
    inside, near = binary_erosion(sample["label"] == 1, three_voxels), binary_dilation(sample["label"] == 1, three_voxels)
    np.testing.assert_allclose(change[inside], 70, atol=1e-3)
    assert (change[~near] == 0).all()
    assert ((change >= 0) & (change <= 70.001)).all()
    assert 20 < change[0, 3, 10, 10] < 60  # the border itself: partly
    assert (sample["image"] == 40).all()
    np.testing.assert_array_equal(done["label"], sample["label"])


def test_contrast_offsets_are_drawn_from_the_range_of_their_own_class():
    transform = RandContrastPhased(["image", "label"], {1: (-50.0, 20.0), 2: (100.0, 300.0)}, prob=1.0).set_random_state(0)
    sample, drawn = block_sample(), []
    for _ in range(60):
        change = transform(sample)["image"] - 40
        drawn.append((change[0, 10, 10, 10], change[0, 30, 10, 10]))
    first, second = np.array(drawn).T
    assert -50 <= first.min() < -35
    assert 5 < first.max() <= 20
    assert 100 <= second.min() < 130
    assert 270 < second.max() <= 300
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.5


def test_contrast_phase_comes_as_often_as_asked():
    sample = block_sample()
    for prob, least, most in ((0.0, 0, 0), (0.5, 20, 60), (1.0, 80, 80)):
        transform = RandContrastPhased(["image", "label"], {1: (70.0, 70.0)}, prob=prob).set_random_state(0)
        assert least <= sum(transform(sample) is not sample for _ in range(80)) <= most


@pytest.mark.parametrize("case_id", ["ct-a", "phantom-a"])
def test_a_case_uses_its_own_contrast_ranges_for_the_classes_by_name(case_id, prepared):
    """One patch of the whole image, where each class is a slab of its own and 37.5 HU everywhere (0.5 in the window)."""
    label = np.repeat(np.arange(9, dtype=np.uint8), 10)[:, None, None] * np.ones((90, 12, 12), np.uint8)
    case = replace(prepared, case=replace(prepared.case, id=case_id), label=label, image=np.full(label.shape, 37.5, np.float32))
    source = patches([case], AugmentConfig(contrast_phase=1.0), size=label.shape)
    middle = torch.stack([source.patch(step, 0)[0][0, 5::10, 6, 6] for step in range(30)]) * 425 - 175  # (steps, classes) in HU
    ranges = MANIFEST.contrast_of(case_id)
    for index, name in enumerate(MANIFEST.class_names):
        low, high = ranges.get(name, (0.0, 0.0))
        change = middle[:, index] - 37.5
        assert change.min() >= max(low, -212.5) - 0.01, name
        assert change.max() <= min(high, 212.5) + 0.01, name
        assert (change.std() > 5) == (name in ranges), name
    assert (middle[:, MANIFEST.class_names.index("aorta")].min() < 37) == (case_id == "phantom-a")  # ct-a is unenhanced: its aorta only brightens
