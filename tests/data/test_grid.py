"""Resampling: what MONAI's `Spacing` places, SciPy's filter smooths, and a plain loop would give; and labels there and back."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import Spacing
from scipy.ndimage import binary_erosion, gaussian_filter

from homelib.data.grid import Resampling, to_ras
from homelib.data.manifest import load_manifest
from homelib.data.prepare import Preparation, PreparedCase, prepare_into
from homelib.run.native import image_to_native
from homelib.run.predict import one_hot, to_native

MANIFEST = load_manifest("demo_ct")
AFFINE = np.array([[0.8, 0, 0, -30], [0, 0.9, 0, 12], [0, 0, 2.5, 5], [0, 0, 0, 1]])
SPACINGS = [(0.8, 0.9, 2.5), (1.5, 1.5, 1.5), (4.0, 3.0, 6.0), (0.5, 2.0, 1.0)]


def oblique(degrees: float) -> np.ndarray:
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))], [np.sin(np.radians(degrees)), np.cos(np.radians(degrees))]]
    return turn @ AFFINE


def sheared() -> np.ndarray:
    lean = np.eye(4)
    lean[1, 2] = 0.2  # a tilted gantry
    return lean @ AFFINE


@pytest.fixture
def volume():
    return np.random.default_rng(0).normal(0, 300, (40, 36, 20)).astype(np.float32)


@pytest.mark.parametrize("affine", [AFFINE, oblique(12), sheared()], ids=["straight", "oblique", "sheared"])
@pytest.mark.parametrize("spacing_mm", SPACINGS, ids=str)
def test_an_image_is_what_monai_and_scipy_make_of_it(spacing_mm, affine, volume):
    step = Resampling.to_spacing(volume.shape, affine, spacing_mm)
    smooth = gaussian_filter(volume, step.sigma_voxels, mode="nearest")
    expected = Spacing(spacing_mm, mode="bilinear", padding_mode="border")(MetaTensor(smooth[None], affine=affine))
    np.testing.assert_allclose(step.new_affine, np.asarray(expected.affine), atol=1e-6)
    assert step.new_shape == tuple(expected.shape[1:])
    np.testing.assert_allclose(step.image(volume), expected[0].numpy(), atol=0.02)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float64])
def test_the_files_type_and_order_do_not_matter(kind, order, volume):
    volume = volume.astype(kind)
    step = Resampling.to_spacing(volume.shape, AFFINE, (1.5, 1.5, 1.5))
    expected = step.image(volume.astype(np.float32))
    np.testing.assert_allclose(step.image(np.asarray(volume, order=order)), expected, atol=1e-3)
    np.testing.assert_allclose(step.image(np.asarray(volume[::-1], order=order)[::-1]), expected, atol=1e-3)


@pytest.mark.parametrize("affine", [AFFINE, sheared()], ids=["straight", "sheared"])
@pytest.mark.parametrize("spacing_mm", SPACINGS, ids=str)
def test_a_box_of_an_image_is_that_part_of_all_of_it(spacing_mm, affine, volume):
    step = Resampling.to_spacing(volume.shape, affine, spacing_mm)
    box = tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in step.new_shape)
    np.testing.assert_allclose(step.image(volume, box), step.image(volume)[box], atol=1e-3)


@pytest.mark.parametrize("axes", ["RAS", "SPL", "AIR"])
@pytest.mark.parametrize("spacing_mm", [*SPACINGS, (8.0, 0.3, 9.0)], ids=str)
def test_how_the_voxels_lie_in_memory_does_not_matter(spacing_mm, axes, volume):
    """Which layers are done first, and which axis last, goes by that and by how the axes grow."""
    lie = ["RAS".index(letter) if letter in "RAS" else "LPI".index(letter) for letter in axes]
    turned = np.ascontiguousarray(volume.transpose(lie)).transpose(np.argsort(lie))
    step = Resampling.to_spacing(volume.shape, AFFINE, spacing_mm)
    np.testing.assert_allclose(step.image(turned), step.image(volume), atol=1e-3)


@pytest.mark.parametrize("spacing_mm", SPACINGS, ids=str)
def test_what_lies_around_a_box_takes_nothing_from_it(spacing_mm):
    inside = np.zeros((40, 36, 20), np.float32)
    inside[11:14, 20:30, 0:5] = 1
    step = Resampling.to_spacing(inside.shape, AFFINE, spacing_mm)
    near = step.around((slice(11, 14), slice(20, 30), slice(0, 5)))
    whole = step.image(inside)
    assert whole.sum() == pytest.approx(whole[near].sum(), rel=1e-6)
    assert whole[near].size < 0.4 * whole.size


@pytest.mark.parametrize("affine", [AFFINE, sheared()], ids=["straight", "sheared"])
def test_a_label_is_that_of_the_nearest_voxel(affine):
    label = np.random.default_rng(0).integers(0, 5, (12, 11, 10)).astype(np.uint8)
    step = Resampling.to_spacing(label.shape, affine, (1.3, 0.7, 1.9))
    box = np.s_[1:5, 2:8, 0:7]
    found = step.label(label, box)
    assert found.dtype == np.uint8
    for place in np.ndindex(found.shape):
        at = (step.steps @ [*(np.array(place) + [1, 2, 0]), 1])[:3]
        near = np.floor(at + 0.5).astype(int)
        if np.abs(at + 0.5 - np.round(at + 0.5)).min() > 1e-3:  # not between two
            inside = ((near >= 0) & (near < label.shape)).all()
            assert found[place] == (label[tuple(near)] if inside else 0)


@pytest.mark.parametrize("affine", [AFFINE, sheared()], ids=["straight", "sheared"])
def test_a_share_is_a_mask_interpolated_linearly(affine):
    label = np.random.default_rng(0).integers(0, 3, (12, 11, 10)).astype(np.uint8)
    step = Resampling.to_spacing(label.shape, affine, (0.5, 0.5, 0.9))
    box = np.s_[2:15, 3:14, 1:20]
    for index in range(3):
        expected = step.image((label == index).astype(np.float32), smooth=False)[box]
        np.testing.assert_allclose(step.share(label, index, box), expected, atol=1e-5)


@pytest.mark.parametrize("spacing_mm", [(1.5, 1.5, 4.0), (2.0, 0.5, 2.5)], ids=str)
def test_a_fitted_share_comes_back_nearer_to_the_mask_than_any_other(spacing_mm):
    """Along the axes that get coarser, no small change of it does better: the error is at right angles to all that the grid can hold."""
    label = (np.random.default_rng(0).random((24, 22, 20)) > 0.6).astype(np.uint8)
    step = Resampling.to_spacing(label.shape, AFFINE, spacing_mm)
    back = Resampling(step.new_shape, step.new_affine, label.shape, AFFINE)
    fitted, plain, smooth = step.share(label, 1, fitted=True), step.share(label, 1), step.image(label)
    errors = [np.square(back.image(share, smooth=False) - label)[1:-3, 1:-3, 1:-3].mean() for share in (fitted, plain, smooth)]
    assert errors[0] < 0.95 * min(errors[1:])
    rng = np.random.default_rng(1)
    for _ in range(5):
        other = fitted + rng.normal(0, 0.05, fitted.shape).astype(np.float32)
        assert np.square(back.image(other, smooth=False) - label)[1:-3, 1:-3, 1:-3].mean() > errors[0]


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "AIR"])
def test_axes_are_turned_to_right_front_up_without_a_copy(axes, volume):
    turned = nib.Nifti1Image(volume, AFFINE).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes))
    )
    data = np.asarray(turned.dataobj)
    found, affine = to_ras(data, turned.affine)
    np.testing.assert_array_equal(found, volume)
    np.testing.assert_allclose(affine, AFFINE)
    assert np.shares_memory(found, data)


# ---------------------------------------------------------------- there and back


@pytest.fixture(scope="module")
def finer(phantoms, tmp_path_factory):
    """phantom-a's label on voxels of 3 mm, as the demo's CT has them, and an image for it."""
    from homelib.data.phantom import ct_phantom

    image, label, affine = ct_phantom(1, shape=(112, 112, 112), spacing_mm=3.0)
    raw = np.array([0, *(values[0] for values in MANIFEST.classes.values())], np.uint16)[label]
    folder = tmp_path_factory.mktemp("fine")
    for name, volume in (("image", image), ("label", raw)):
        nib.save(nib.Nifti1Image(volume, affine), folder / f"{name}.nii")
    return replace(phantoms["phantom-a"], image=folder / "image.nii", label=folder / "label.nii"), label, affine


@pytest.mark.parametrize(
    ("labels", "spacing_mm", "least"),
    [
        *((labels, spacing_mm, 0.98) for labels in ("nearest", "linear", "shares") for spacing_mm in (3.0, 2.5)),
        ("shares", 4.0, 0.98),
        ("shares", 5.0, 0.95),
        ("nearest", 4.0, 0.87),
        ("linear", 4.0, 0.87),
    ],
    ids=str,
)
def test_labels_come_back_on_the_files_grid(labels, spacing_mm, least, finer, tmp_path):
    """At the file's spacing and below, every structure over 500 voxels to a Dice of 0.98; at 4 mm, coarser than the file, with the classes' shares
    too. One class a voxel cannot hold thin walls and vessels there."""
    case, reference, affine = finer
    prepare_into(tmp_path / "case.zip", case, Preparation(spacing_mm=(spacing_mm,) * 3, labels=labels))
    prepared = PreparedCase.open(case, tmp_path / "case.zip")
    classes = len(MANIFEST.class_names)
    kept = np.stack([np.asarray(share) for share in prepared.shares]) if labels == "shares" else one_hot(np.asarray(prepared.label), classes)
    assert len(prepared.shares) == (classes if labels == "shares" else 0)
    back = to_native(kept, prepared)
    assert back.shape == reference.shape
    np.testing.assert_allclose(prepared.native_affine, affine, atol=1e-4)
    scores = {}
    for index, name in enumerate(MANIFEST.class_names):
        if index and (reference == index).sum() > 500:
            both = ((back == index) & (reference == index)).sum()
            scores[name] = 2 * both / ((back == index).sum() + (reference == index).sum())
    assert len(scores) >= 5
    assert min(scores.values()) >= least, scores


def test_an_image_comes_back_on_the_files_grid_at_the_demos_spacing(finer, tmp_path):
    """From 3 mm to the demo's 4 mm and back: in the body, the same but for noise and edges; around it, air as before."""
    case, reference, affine = finer
    prepare_into(tmp_path / "case.zip", case, Preparation(spacing_mm=(4.0,) * 3))
    back = image_to_native(PreparedCase.open(case, tmp_path / "case.zip"))
    file = nib.load(case.image).get_fdata()
    np.testing.assert_allclose(back.affine, affine, atol=1e-4)
    assert back.data.shape == file.shape
    assert np.corrcoef(back.data.ravel(), file.ravel())[0, 1] > 0.99
    for index in np.unique(reference)[1:]:
        inside = binary_erosion(reference == index, iterations=2)
        if inside.sum() > 500:
            assert abs(back.data[inside].mean() - file[inside].mean()) < 6  # HU; the stomach holds gas, and small structures have edges within reach
    low = MANIFEST.intensity_window[0]
    assert (back.data[[0, -1]] <= low).all()  # beyond the box
