"""Back to the file's grid, in slabs as in one go; and the oracle: a network that returns the prepared label is right on the file's own grid."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff

from homelib.config import override
from homelib.data.manifest import Case, load_manifest
from homelib.data.prepare import prepare
from homelib.run import native
from homelib.run.native import NativeLabels, image_to_native, to_native
from homelib.run.predict import one_hot, predict_label

MANIFEST = load_manifest("demo_ct")
FLAT = np.diag([0.8, 0.8, 3.0, 1.0])


def scan(tmp_path, affine, shape=(96, 88, 40)):
    """An image and a label of ellipsoids on a grid, as files; the image shows the label: class k at k / 8 of the window."""
    at = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T
    at -= at.reshape(-1, 3).mean(0)
    label = np.zeros(shape, np.uint8)
    for index, (centre, radii) in enumerate((((0, 0, 0), (24, 20, 40)), ((-12, 0, 5), (8, 12, 20)), ((14, 5, -5), (9, 9, 25))), start=1):
        label[(((at - centre) / radii) ** 2).sum(-1) < 1] = index
    low, high = MANIFEST.intensity_window
    raw = np.array([0, *(values[0] for values in MANIFEST.classes.values())])
    nib.save(nib.Nifti1Image((low + 1 + label / 8 * (high - low)).astype(np.float32), affine), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(raw[label].astype(np.uint8), affine), tmp_path / "label.nii.gz")
    return Case("oracle", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", "CT", "SYNTHETIC", "demo_ct"), label


def rotated():
    a, b = np.deg2rad(25), np.deg2rad(-12)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = FLAT.copy()
    affine[:3, :3] = x @ z @ np.diag([0.8, 0.9, 2.5])
    affine[:3, 3] = [30, -40, 100]
    return affine


def oriented(codes):
    """FLAT with its axes in another order and direction, and the shape that goes with it."""
    turn = axcodes2ornt(codes)
    shape = (96, 88, 40)
    return FLAT @ inv_ornt_aff(turn, shape), apply_orientation(np.zeros(shape), turn).shape


GRIDS = {
    "RAS, anisotropic": (FLAT, (96, 88, 40)),
    "LPS": oriented("LPS"),
    "SAR": oriented("SAR"),
    "rotated": (rotated(), (96, 88, 40)),
    "finer than prepared": (np.diag([0.7, 0.7, 1.0, 1.0]), (110, 100, 110)),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_an_oracle_is_right_on_the_files_own_grid(grid, tmp_path, smoke, own_cache):
    affine, shape = GRIDS[grid]
    case, label = scan(tmp_path, affine, shape)
    prepared = prepare(case, spacing_mm=(0.8, 0.8, 1.0), cache=tmp_path / "cache")

    def oracle(windows):
        """Sure of the class whose intensity it sees."""
        return -30 * (8 * windows - torch.arange(9.0).view(1, 9, 1, 1, 1)) ** 2

    low, high = MANIFEST.intensity_window
    telling = replace(prepared, image=(low + prepared.label / 8 * (high - low)).astype(np.float32))
    settings = override(smoke, {"data.patch_voxels": (48, 48, 48), "prediction.overlap": 0.25})
    predicted = predict_label([oracle], telling, settings)
    assert predicted.shape == label.shape
    for index in (1, 2, 3):
        P, R = predicted == index, label == index
        dice = 2 * (P & R).sum() / (P.sum() + R.sum())
        assert dice >= 0.98, (MANIFEST.class_names[index], dice)


def sheared():
    affine = FLAT.copy()
    affine[1, 2] = 0.6  # a tilted gantry
    return affine


@pytest.mark.parametrize("grid", [*GRIDS, "sheared"])
def test_an_image_comes_back_on_the_files_own_grid(grid, tmp_path, own_cache):
    """At the file's own spacing every voxel does, whatever the order and direction of its axes; sheared, all but what straight axes cannot hold."""
    affine, shape = GRIDS.get(grid, (sheared(), (96, 88, 40)))
    case, _ = scan(tmp_path, affine, shape)
    file = nib.load(case.image)
    own = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(nib.io_orientation(affine)[:, 0])]
    back = image_to_native(prepare(case, spacing_mm=tuple(own), cache=tmp_path / "cache"))
    assert (back.data.shape, back.data.dtype) == (file.shape, np.float32)
    np.testing.assert_allclose(back.affine, file.affine, atol=1e-4)
    if grid != "sheared":
        np.testing.assert_allclose(back.data, file.get_fdata(), atol=0.01)
    else:
        assert np.corrcoef(back.data.ravel(), file.get_fdata().ravel())[0, 1] > 0.95


def turned(case, order, signs, shear=0.0):
    affine = np.zeros((4, 4))
    for index, (axis, sign, step) in enumerate(zip(order, signs, (3, 4, 8), strict=True)):
        affine[axis, index] = sign * step
    affine[:3, 3] = case.affine[:3, 3] + np.where(affine[:3, :3].sum(1) < 0, 12 * np.array(case.image.shape), 0) - 7.3
    affine[1, 2] += shear
    affine[3, 3] = 1
    return replace(case, native_shape=(150, 100, 51), native_affine=affine)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("order", "signs", "shear"), [((0, 1, 2), (1, 1, 1), 0), ((2, 0, 1), (-1, 1, -1), 0), ((0, 1, 2), (1, 1, 1), 0.8)], ids=str)
def test_slabs_give_what_the_whole_gives(axis, order, signs, shear, prepared, monkeypatch):
    monkeypatch.setattr(native, "SLAB_VOXELS", 150 * 100 * 7)
    case = turned(prepared, order, signs, shear)
    probabilities = torch.randn(5, *case.image.shape, generator=torch.Generator().manual_seed(0)).mul(2).softmax(0)
    rows = probabilities.movedim(1 + axis, 1)
    found = NativeLabels(case, axis)
    kept = []
    for start in range(0, rows.shape[1], 3):
        found.add(start, rows[:, start : start + 3].clone())
        kept.append(found.rows.shape[1])
    assert (found.label != to_native(probabilities.numpy(), case)).mean() < 1e-4
    assert not found.waiting
    if not shear:
        assert max(kept) <= 4  # rows of one slab, and the one before


def test_probabilities_of_each_slab_are_handed_on(prepared):
    case = turned(prepared, (0, 1, 2), (1, 1, 1))
    seen = np.full((9, *case.native_shape), np.nan, np.float32)

    def keep(index, box, values):
        assert np.isnan(seen[(index, *box)]).all()
        seen[(index, *box)] = values.numpy()

    found = NativeLabels(case, 0, on_slab=keep)
    found.add(0, torch.from_numpy(one_hot(prepared.label, 9)))
    inside = ~np.isnan(seen).any(0)
    assert inside.any()
    np.testing.assert_array_equal(seen.argmax(0)[inside], found.label[inside])
