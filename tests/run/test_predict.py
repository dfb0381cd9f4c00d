"""Sliding window and the way back, with networks whose right answer is known."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from homelib.config import override
from homelib.data.manifest import load_manifest
from homelib.run import native, predict
from homelib.run.predict import one_hot, predict_probabilities, save_label, to_native, window_at, windows_of

MANIFEST = load_manifest("demo_ct")


def oracle(windows):
    """Logits of 9 classes from an image that shows its own label: class k at k / 8 of the intensity window."""
    return -30 * (8 * windows - torch.arange(9.0).view(1, 9, 1, 1, 1)) ** 2


@pytest.fixture
def telling(prepared):
    """phantom-a, its image replaced by its label in HU."""
    low, high = MANIFEST.intensity_window
    return replace(prepared, image=(low + prepared.label / 8 * (high - low)).astype(np.float32))


@pytest.mark.parametrize("patch", [(16, 16, 16), (32, 16, 48), (32, 32, 32)], ids=str)
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_windows_are_put_together_to_the_whole_volume(patch, blend, telling, smoke):
    settings = override(smoke, {"data.patch_voxels": patch, "prediction.blend": blend, "prediction.window_batch": 3})
    shapes = []
    probabilities = predict_probabilities(lambda x: shapes.append(x.shape) or oracle(x), telling, settings)
    assert {tuple(shape[1:]) for shape in shapes} == {(1, *patch)}
    assert probabilities.shape == (9, *telling.label.shape)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(0), telling.label)


def test_overlapping_windows_are_blended(telling, smoke):
    """A network that is sure of class 1 in the first half of its window and of class 2 in the second: only the blend tells what wins where both look."""

    def halves(windows):
        logits = torch.zeros(windows.shape[0], 9, *windows.shape[2:])
        logits[:, 1, :8], logits[:, 2, 8:] = 5.0, 5.0
        return logits

    def predicted(**prediction):
        settings = override(smoke, {"data.patch_voxels": (16, 32, 32)} | {f"prediction.{name}": value for name, value in prediction.items()})
        case = replace(telling, image=np.zeros((32, 32, 32), np.float32))
        return predict_probabilities(halves, case, settings)[:, :, 16, 16]

    apart = predicted(overlap=0.0)
    assert apart.argmax(0).tolist() == [1] * 8 + [2] * 8 + [1] * 8 + [2] * 8
    constant, gaussian = predicted(overlap=0.5, blend="constant"), predicted(overlap=0.5, blend="gaussian")
    np.testing.assert_allclose(constant[1, 8:24], constant[2, 8:24], atol=1e-5)  # two windows, one for each class
    assert gaussian[2, 8] > 0.9  # the middle of the first window, the rim of the second


def test_a_scan_smaller_than_the_patch_is_surrounded_by_the_low_end_of_the_range(telling, smoke, monkeypatch):
    monkeypatch.setattr(predict, "load_manifest", lambda name: MANIFEST.model_copy(update={"intensity_range": (-1.0, 1.0)}))
    seen = []
    small = replace(telling, image=np.full((8, 8, 8), 250, np.float32))
    predict_probabilities(lambda x: seen.append(x) or oracle(x), small, override(smoke, {"data.patch_voxels": (16, 16, 16)}))
    assert sorted(seen[0].unique().tolist()) == [-1.0, 1.0]


def test_an_oracle_scores_high_on_the_files_own_grid(telling, smoke, phantoms):
    predicted = to_native(predict_probabilities(oracle, telling, override(smoke, {"data.patch_voxels": (16, 16, 16)})), telling)
    reference = MANIFEST.merge(np.asarray(nib.load(phantoms["phantom-a"].label).dataobj))
    for name in ("liver", "spleen", "stomach"):  # 12 mm from 7 mm: measured 0.94, 0.91, 0.91
        P, R = (volume == MANIFEST.class_names.index(name) for volume in (predicted, reference))
        assert 2 * (P & R).sum() / (P.sum() + R.sum()) > 0.88, name


def turned(case, order, signs):
    """The case on a native grid of 1.5 x 2 x 4 mm whose axes are those of the prepared one in another order and direction."""
    affine = np.zeros((4, 4))
    for index, (prepared_axis, sign, step) in enumerate(zip(order, signs, (1.5, 2, 4), strict=True)):
        affine[prepared_axis, index] = sign * step
    affine[:3, 3] = case.affine[:3, 3] + np.where(affine[:3, :3].sum(1) < 0, 12 * np.array(case.image.shape), 0) - 7.3
    affine[3, 3] = 1
    return replace(case, native_shape=(300, 200, 101), native_affine=affine)


@pytest.mark.parametrize(("order", "signs"), [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 0, 2), (-1, -1, 1))], ids=str)
def test_axis_by_axis_and_slab_by_slab_is_what_monai_interpolates(order, signs, telling, monkeypatch):
    case = turned(telling, order, signs)
    probabilities = torch.randn(9, *telling.image.shape, generator=torch.Generator().manual_seed(0)).mul(2).softmax(0).numpy()
    monkeypatch.setattr(native, "SLAB_VOXELS", 200 * 101 * 70)  # four slabs and a bit
    ours = to_native(probabilities, case)
    monkeypatch.setattr(native, "SHEAR_VOXELS", -1)  # now every grid goes the general way, by MONAI
    general = to_native(probabilities, case)
    assert (ours != 0).mean() > 0.02
    assert (ours != general).mean() < 1e-4  # two classes within rounding of each other


def test_a_sheared_grid_goes_the_general_way(telling):
    case = turned(telling, (0, 1, 2), (1, 1, 1))
    sheared = case.native_affine.copy()
    sheared[1, 2] = 0.8  # a tilted gantry: rows move by 0.8 mm a slice
    case = replace(case, native_affine=sheared)
    found = to_native(one_hot(telling.label, 9), case)
    at = np.linalg.solve(case.affine, sheared @ np.array([150, 100, 50, 1]))[:3]  # a voxel by hand: the nearest prepared one's class
    near = telling.label[tuple(slice(int(np.floor(a)), int(np.floor(a)) + 2) for a in at)]
    assert found[150, 100, 50] in near
    assert (found != to_native(one_hot(telling.label, 9), replace(case, native_affine=turned(telling, (0, 1, 2), (1, 1, 1)).native_affine))).mean() > 0.01


def test_outside_the_prepared_box_is_background(telling):
    liver = np.zeros_like(telling.label)
    liver[:] = 3
    native = to_native(one_hot(liver, 9), telling)
    assert set(np.unique(native)) == {0, 3}
    start = np.linalg.solve(telling.native_affine, telling.affine[:, 3])[:3]
    step = np.array(telling.spacing_mm) / 7
    inside = np.all([(i > s - 0.51 * w) & (i < s + (n - 0.49) * w) for i, s, w, n in zip(np.indices(native.shape), start, step, liver.shape, strict=True)], 0)
    assert (native[inside] == 3).mean() > 0.99
    assert (native[~inside] == 0).mean() > 0.99


def test_the_saved_prediction_lies_where_the_file_lies(telling, phantoms, tmp_path):
    native = to_native(one_hot(telling.label, 9), telling)
    path = save_label(native, telling, tmp_path / "predictions" / "phantom-a.nii.gz")
    saved, original = nib.load(path), nib.load(phantoms["phantom-a"].image)
    assert np.array_equal(saved.affine, original.affine)
    assert saved.shape == original.shape
    assert saved.get_data_dtype() == np.uint8
    assert saved.header.get_zooms() == original.header.get_zooms()
    np.testing.assert_array_equal(np.asarray(saved.dataobj), native)
    assert [p.name for p in path.parent.iterdir()] == ["phantom-a.nii.gz"]


def test_one_hot_is_certain_of_every_voxel():
    label = np.array([[[0, 2], [1, 2]]], np.uint8)
    found = one_hot(label, 3)
    assert found.shape == (3, 1, 2, 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.argmax(0), label)
    np.testing.assert_array_equal(found.sum(0), 1)


def test_a_window_is_what_the_network_is_shown_there(prepared, smoke):
    """Around the middle of a scan that is smaller than a window along some axes: the rest is what lies beyond."""
    manifest, shown = load_manifest(prepared.case.manifest), []
    windows = windows_of(prepared, smoke)

    class Watched(torch.nn.Module):
        def forward(self, x):
            shown.append(x)
            return torch.zeros(1, 2, *x.shape[2:])

    predict_probabilities(Watched(), prepared, smoke)
    middle = window_at(prepared, smoke, [n // 2 for n in prepared.image.shape])
    assert middle.shape == (1, 1, *smoke.data.patch_voxels)
    assert any(torch.equal(middle, x) for x in shown)
    assert len(shown) == windows.count
    low, high = manifest.intensity_range
    assert low <= middle.min() < middle.max() <= high
