"""Phantoms: the same seed gives the same volume, every class is there, and anatomy lies where a radiologist expects it."""

import nibabel
import numpy as np
import pytest
from scipy.ndimage import label as components

from homelib.data.manifest import load_manifest
from homelib.data.phantom import CT_CLASSES, US_CLASSES, ct_phantom, us_phantom

SMALL = {"shape": (48, 48, 48), "spacing_mm": 7.0}


def centre_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World coordinates (RAS+) of a mask's centre of mass."""
    return nibabel.affines.apply_affine(affine, np.argwhere(mask).mean(0))


@pytest.fixture(scope="module")
def ct():
    return ct_phantom(0, **SMALL)


@pytest.mark.parametrize(("make", "spacing_mm"), [(ct_phantom, 8.0), (us_phantom, 2.0)])
def test_same_seed_same_volume_other_seed_other_patient(make, spacing_mm):
    size = {"shape": (48, 48, 48), "spacing_mm": spacing_mm}
    first, again, other = (make(seed, **size) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[1] != other[1]).sum() > 100  # not only the noise: the shapes differ
    from_generator = make(np.random.default_rng(3), **size)
    np.testing.assert_array_equal(first[0], from_generator[0])


def test_classes_are_those_of_the_manifests():
    assert CT_CLASSES == load_manifest("demo_ct").class_names
    assert US_CLASSES == load_manifest("demo_us_phantom").class_names


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [{"shape": (48, 48, 48), "spacing_mm": 7.0}, {"shape": (32, 32, 40), "spacing_mm": (6.0, 6.0, 5.0)}])
def test_every_ct_class_is_there(seed, size):
    image, label, affine = ct_phantom(seed, **size)
    assert (image.dtype, label.dtype, affine.shape) == (np.int16, np.uint8, (4, 4))
    assert image.shape == label.shape == size["shape"]
    counts = np.bincount(label.ravel(), minlength=9)
    assert len(counts) == 9
    assert counts.min() >= 20, dict(zip(CT_CLASSES, counts.tolist(), strict=True))


def test_ct_anatomy_in_patient_space(ct):
    image, label, affine = ct
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
    centre = {name: centre_mm(label == index, affine) for index, name in enumerate(CT_CLASSES) if index}
    assert centre["liver"][0] > 30  # the patient's right
    assert centre["spleen"][0] < -30
    assert centre["stomach"][0] < -10
    assert centre["inferior_vena_cava"][0] > centre["aorta"][0] + 15
    assert centre["spleen"][1] < centre["stomach"][1]  # behind it
    assert centre["muscle"][1] < centre["aorta"][1] < centre["liver"][1]
    assert centre["muscle"][2] < centre["kidneys"][2] < centre["liver"][2]  # towards the head
    kidneys, count = components(label == CT_CLASSES.index("kidneys"))
    sides = sorted(centre_mm(kidneys == i, affine)[0] for i in range(1, count + 1) if (kidneys == i).sum() > 50)
    assert len(sides) == 2
    assert sides[0] < -30 < 30 < sides[1]


def test_ct_values_are_hounsfield(ct):
    image, label, _ = ct
    assert np.median(image[0]) < -950  # air beside the body
    median = {name: np.median(image[label == index]) for index, name in enumerate(CT_CLASSES)}
    assert median["bone"] > 150
    assert 30 < median["muscle"] < 75
    assert 35 < median["liver"] < 130
    assert 5 < image[label == CT_CLASSES.index("liver")].std() < 60  # noise, no flat paint


def test_contrast_phase_differs_between_patients():
    aorta = [np.median(image[label == CT_CLASSES.index("aorta")]) for image, label, _ in (ct_phantom(seed, **SMALL) for seed in range(8))]
    assert min(aorta) < 130
    assert max(aorta) > 200


def test_affine_gives_the_spacing_and_the_centre():
    _, label, affine = ct_phantom(0, shape=(40, 32, 48), spacing_mm=(8.0, 8.0, 7.0))
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), (8, 8, 7))
    np.testing.assert_allclose(nibabel.affines.apply_affine(affine, (np.array(label.shape) - 1) / 2), 0, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_us_has_a_fan_and_two_thin_leaflets(seed):
    image, label, affine = us_phantom(seed, shape=(64, 64, 64), spacing_mm=1.5)
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    assert 0 <= image.min()
    assert image.max() <= 255
    assert np.bincount(label.ravel(), minlength=3)[1:].min() > 100
    lit = (image > 0).mean(axis=(0, 1))  # share of each slice that the fan covers
    assert lit[-3] < 0.1 < 0.3 < lit[12]  # narrow at the probe (top), wide below
    assert not image[0, 0, -24:].any()  # beside the probe
    assert not image[0, 0, 0]  # deeper than the beam reaches
    posterior, anterior = (centre_mm(label == index, affine) for index in (1, 2))
    assert posterior[1] < anterior[1]
    height = (label > 0).sum(axis=2)
    assert np.median(height[height > 0]) <= 4  # thin along the beam
    assert image[label > 0].mean() > image[image > 0].mean()  # brighter than what is around


def test_us_shadow_is_dark_behind_a_bright_structure():
    """The same scene with and without the nodule's absorption: what darkens lies deeper than what is bright, and darkens much."""
    size = {"shape": (64, 64, 64), "spacing_mm": 1.5}
    with_shadow, _, affine = us_phantom(5, **size)
    without, _, _ = us_phantom(5, **size, shadow=False)
    darker = without - with_shadow > 40
    assert darker.sum() > 200
    assert with_shadow[darker].mean() < 0.4 * without[darker].mean()
    assert (with_shadow - without).max() < 1e-3  # absorption brightens nothing
    nodule = without > 250
    assert centre_mm(darker, affine)[2] < centre_mm(nodule, affine)[2]  # the beam comes from above


def test_us_speckle_is_longer_along_the_beam_and_fades_with_depth():
    image, _, _ = us_phantom(1, shadow=False)
    core = image[40:56, 40:56, 8:30]  # blood far below the probe, around the axis: speckle only, and the beams run along z
    core = core - core.mean()

    def with_the_next(axis: int) -> float:
        length = core.shape[axis]
        ahead, behind = core.take(range(1, length), axis), core.take(range(length - 1), axis)
        return float((ahead * behind).mean() / core.var())

    assert core.std() > 5
    assert with_the_next(2) > with_the_next(0) + 0.1
    assert with_the_next(2) > with_the_next(1) + 0.1
    # Muscle beside the chambers, along the same oblique beams (30 to 33 degrees from the axis, the probe 45 mm above the middle).
    x, y, z = np.meshgrid(*(3 * [np.arange(96) - 47.5]), indexing="ij")
    beams = (np.abs(np.rad2deg(np.arctan2(x, 45 - z)) - 31.5) < 1.5) & (np.abs(y) < 12)
    distance = np.sqrt(x**2 + y**2 + (45 - z) ** 2)
    shallow, deep = (image[beams & (np.abs(distance - mm) < 3)] for mm in (62, 84))
    assert min(len(shallow), len(deep)) > 100
    assert np.median(shallow) > np.median(deep) + 5


@pytest.mark.parametrize("wrong", [{"shape": (48, 48)}, {"shape": (4, 48, 48)}, {"spacing_mm": 0.0}, {"spacing_mm": -1.0}])
def test_wrong_grids_are_refused(wrong):
    with pytest.raises(ValueError, match="voxels"):
        ct_phantom(0, **wrong)
