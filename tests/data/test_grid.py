"""Resampling: what MONAI's `Spacing` places, SciPy's filter smooths, and a plain loop would give; and labels there and back."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import Spacing
from scipy.ndimage import gaussian_filter

from homelib.data.grid import Resampling, to_ras
from homelib.data.manifest import load_manifest
from homelib.data.prepare import Preparation, PreparedCase, prepare_into
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


def test_a_volume_in_slabs_is_that_in_one_piece(volume, monkeypatch):
    step = Resampling.to_spacing(volume.shape, AFFINE, (1.5, 0.5, 4.0))
    expected = step.image(volume)
    monkeypatch.setattr("homelib.data.grid.SLAB_VOXELS", 1000)
    np.testing.assert_array_equal(step.image(volume), expected)


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


def test_labels_by_class_are_linear_masks_the_largest_of_which_is_taken():
    label = np.random.default_rng(0).integers(0, 3, (12, 11, 10)).astype(np.uint8)
    step = Resampling.to_spacing(label.shape, AFFINE, (0.5, 0.5, 0.9))
    box = np.s_[2:15, 3:14, 1:20]
    masks = np.stack([step.image((label == index).astype(np.float32), smooth=False)[box] for index in range(3)])
    np.testing.assert_array_equal(step.label_by_class(label, box), masks.argmax(0))


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


@pytest.mark.parametrize("labels", ["nearest", "linear"])
@pytest.mark.parametrize(("spacing_mm", "least"), [(3.0, 0.98), (2.5, 0.98), (4.0, 0.87)], ids=str)
def test_labels_come_back_on_the_files_grid(spacing_mm, least, labels, finer, tmp_path):
    """At the file's spacing and below, every structure over 500 voxels to a Dice of 0.98; at 4 mm, coarser than the file, to what it can hold
    of thin walls and vessels."""
    case, reference, affine = finer
    prepare_into(tmp_path / "case.zip", case, Preparation(spacing_mm=(spacing_mm,) * 3, labels=labels))
    prepared = PreparedCase.open(case, tmp_path / "case.zip")
    back = to_native(one_hot(np.asarray(prepared.label), len(MANIFEST.class_names)), prepared)
    assert back.shape == reference.shape
    np.testing.assert_allclose(prepared.native_affine, affine, atol=1e-4)
    scores = {}
    for index, name in enumerate(MANIFEST.class_names):
        if index and (reference == index).sum() > 500:
            both = ((back == index) & (reference == index)).sum()
            scores[name] = 2 * both / ((back == index).sum() + (reference == index).sum())
    assert len(scores) >= 5
    assert min(scores.values()) >= least, scores
