"""Surface distances against MONAI on whole volumes, DeepMind's package where it is installed, brute force, and by hand."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from homelib.data.manifest import load_manifest
from homelib.data.prepare import read_array
from homelib.run import surface
from homelib.run.evaluate import evaluate
from homelib.run.nearest import nearest_mm

SPACINGS = [(1.0, 1.0, 1.0), (0.8, 0.8, 3.0), (0.7, 2.0, 5.0)]


def blobs(seed, shape=(20, 24, 16)):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return noise > np.quantile(noise, 0.8)


@pytest.mark.parametrize("seed", range(12))
def test_the_nearest_mark_is_that_of_a_distance_transform(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 15, 3)
    marked = rng.random(shape) > rng.choice([0.5, 0.95, 0.995])
    marked.flat[rng.integers(marked.size)] = True
    spacing_mm = tuple(rng.uniform(0.3, 5, 3))
    found = nearest_mm(marked, np.argwhere(np.ones(shape)), spacing_mm).reshape(shape)
    np.testing.assert_allclose(found, distance_transform_edt(~marked, sampling=spacing_mm), rtol=1e-6)


@pytest.mark.parametrize("spacing_mm", SPACINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_surface_voxels_agree_with_monai_and_with_brute_force(seed, spacing_mm):
    P, R = blobs(seed), blobs(seed + 10)
    distances = surface.voxel_distances(P, R, spacing_mm)
    masks = [torch.from_numpy(mask)[None, None] for mask in (P, R)]
    monai = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=list(spacing_mm)).item()
    assert surface.hausdorff95_voxels(distances) == pytest.approx(monai, abs=1e-3)
    points = [np.argwhere(mask & ~binary_erosion(mask)) * spacing_mm for mask in (P, R)]
    apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    np.testing.assert_allclose(distances.from_predicted, apart.min(1), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(distances.from_reference, apart.min(0), rtol=1e-6, atol=1e-9)
    assert surface.hausdorff95_pooled(distances) == pytest.approx(np.percentile([*apart.min(1), *apart.min(0)], 95))


@pytest.mark.parametrize("spacing_mm", SPACINGS, ids=str)
@pytest.mark.parametrize("tolerance_mm", [1.0, 2.4])
def test_the_share_within_a_tolerance_agrees_with_monais_subvoxel_surface_dice(spacing_mm, tolerance_mm):
    P, R = blobs(1), blobs(11)
    masks = [torch.from_numpy(mask)[None, None] for mask in (P, R)]
    monai = compute_surface_dice(*masks, [tolerance_mm], include_background=True, spacing=list(spacing_mm), use_subvoxels=True).item()
    assert surface.within(surface.surfel_distances(P, R, spacing_mm), tolerance_mm) == pytest.approx(monai, abs=1e-3)


@pytest.mark.parametrize("spacing_mm", SPACINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_surfels_agree_with_deepminds_surface_distance(seed, spacing_mm):
    deepmind = pytest.importorskip("surface_distance", reason="surface-distance is not installed (it is in the extra dev)")
    assert_as_deepmind(deepmind, blobs(seed), blobs(seed + 10), spacing_mm)


def assert_as_deepmind(deepmind, P, R, spacing_mm):
    theirs, ours = deepmind.compute_surface_distances(R, P, spacing_mm), surface.surfel_distances(P, R, spacing_mm)
    assert surface.hausdorff95(ours) == pytest.approx(deepmind.compute_robust_hausdorff(theirs, 95), abs=1e-3)
    assert surface.within(ours, 2.0) == pytest.approx(deepmind.compute_surface_dice_at_tolerance(theirs, 2.0), abs=1e-3)
    from_reference, from_predicted = deepmind.compute_average_surface_distance(theirs)  # theirs are two; ours is their mean by area
    areas = theirs["surfel_areas_gt"].sum(), theirs["surfel_areas_pred"].sum()
    assert surface.average(ours) == pytest.approx(np.average([from_reference, from_predicted], weights=areas), abs=1e-3)


# ---------------------------------------------------------------- real masks

REAL = {  # of ct-a: predicted and reference structure, and by how many voxels the first is moved
    "liver, moved": ("liver", "liver", (2, -3, 1)),
    "bone, moved": ("bone", "bone", (1, 0, -1)),  # many pieces, thin, and cut by the border
    "aorta for the vena cava": ("aorta", "inferior_vena_cava", (0, 0, 0)),
    "kidneys for the spleen": ("kidneys", "spleen", (0, 0, 0)),
}


@pytest.fixture(scope="module")
def real_pair(real_demo):
    """By name of `REAL`: both masks (D, H, W) bool, and the spacing in mm, here of thick slices, so that the axes are not alike."""
    case, manifest = real_demo.cases["ct-a"], load_manifest("demo_ct")
    label, _ = read_array(case.label, what="label")
    label = manifest.merge(label)

    def pair(name):
        predicted, reference, step = REAL[name]
        P, R = (label == manifest.class_names.index(which) for which in (predicted, reference))
        return np.roll(P, step, (0, 1, 2)), R, (0.8, 1.1, 3.0)

    return pair


@pytest.mark.network
@pytest.mark.parametrize("name", REAL)
def test_real_masks_are_measured_as_by_monai(name, real_pair):
    P, R, spacing_mm = real_pair(name)
    masks = [torch.from_numpy(mask)[None, None] for mask in (P, R)]
    about = {"spacing_mm": spacing_mm, "class_names": ("background", "x"), "case": name, "method": "", "label_origin": "MODEL"}
    table = evaluate(P.astype(np.uint8), R.astype(np.uint8), metrics=("dice", "hd95_voxels", "nsd_2mm"), **about)
    found = dict(zip(table["metric"], table["value"], strict=True))
    assert found["dice"] == pytest.approx(compute_dice(*masks).item(), abs=1e-3)
    monai = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=list(spacing_mm)).item()
    assert found["hd95_voxels"] == pytest.approx(monai, abs=1e-3)
    monai = compute_surface_dice(*masks, [2.0], include_background=True, spacing=list(spacing_mm), use_subvoxels=True).item()
    assert found["nsd_2mm"] == pytest.approx(monai, abs=1e-3)
    assert found["hd95_voxels"] > 1  # they are apart


@pytest.mark.network
@pytest.mark.parametrize("name", REAL)
def test_real_masks_are_measured_as_by_deepmind(name, real_pair):
    deepmind = pytest.importorskip("surface_distance", reason="surface-distance is not installed (it is in the extra dev)")
    assert_as_deepmind(deepmind, *real_pair(name))


@pytest.mark.parametrize("far", [4, 6])
def test_the_95th_percentile_of_areas_by_hand(far):
    """100 mm2 in all: 96 at most lie within 2 mm where the farthest is 4, and 94 where it is 6, which is more than a twentieth."""
    one = (np.array([9.0, 1.0, 2.0]), np.array([far, 60.0, 40.0 - far]))
    none = (np.zeros(1), np.ones(1))
    expected = 2 if far < 5 else 9
    assert surface.hausdorff95(surface.Distances(one[0], none[0], one[1], none[1])) == expected
    assert surface.hausdorff95(surface.Distances(none[0], one[0], none[1], one[1])) == expected  # the larger of both directions


def test_every_surfel_has_an_area_and_measured_distances_stay():
    distances = surface.surfel_distances(blobs(1), blobs(2), (1.0, 2.0, 3.0))
    assert (distances.predicted_areas > 0).all()
    assert (distances.reference_areas > 0).all()
    with pytest.raises(FrozenInstanceError):
        distances.from_predicted = distances.from_reference


def test_what_coincides_is_within_no_distance_at_all():
    P, R = np.zeros((2, 8, 8, 8), bool)
    P[2:4, 2:4, 2:4] = R[2:4, 2:4, 2:6] = True
    assert surface.within(surface.surfel_distances(P, P, (1.0, 2.0, 3.0)), 0) == 1
    distances = surface.surfel_distances(P, R, (1.0, 2.0, 3.0))
    assert surface.within(distances, 0) == pytest.approx(surface.within(distances, 0.5))  # the next is a step away
    assert 0.4 < surface.within(distances, 0) < 1


def test_two_plates_by_hand():
    """Plates of one voxel layer, 4 layers of 3 mm apart, as wide as the volume: every surfel of the faces is 12 mm from the other plate, less its thickness."""
    P, R = np.zeros((2, 16, 12, 12), bool)
    P[3], R[7] = True, True
    distances = surface.surfel_distances(P, R, (3.0, 1.0, 1.0))
    assert set(np.round(distances.from_predicted, 6)) == {9.0, 12.0}
    assert surface.within(distances, 8.9) == 0
    assert surface.within(distances, 12.0) == 1  # a surface exactly at the tolerance is within it
    # faces of 144 mm2, half of it at the border's edges cut off by marching cubes: near halves of both are 9 mm away
    assert surface.average(distances) == pytest.approx(10.5, abs=0.1)


def test_a_large_face_weighs_more_than_a_fine_one():
    """A voxel's faces are 9 and 1 mm2 here: area counts, not the number of surfels."""
    mask = np.zeros((9, 9, 9), bool)
    mask[3:6, 3:6, 3:6] = True
    areas = surface.surfel_distances(mask, mask, (1.0, 3.0, 3.0)).predicted_areas
    assert areas.max() == pytest.approx(9, rel=0.01)  # a flat surfel of the face that D is normal to
    assert areas.min() < 4


EDGE_CASES = {  # predicted, reference: what dice, hd95, asd and nsd_1mm must be; D is the diagonal
    "empty prediction": ([], [(5, 5, 5)], (0, "D", "D", 0)),
    "empty reference": ([(5, 5, 5)], [], (0, "D", "D", 0)),
    "both empty": ([], [], (np.nan, np.nan, np.nan, np.nan)),
    "one voxel, the same": ([(5, 5, 5)], [(5, 5, 5)], (1, 0, 0, 1)),
    "one voxel, 2 steps of 3 mm apart": ([(5, 5, 5)], [(5, 5, 7)], (0, 6, 4.5, 0)),
    "touching the border, the same": ([(0, 0, 0)], [(0, 0, 0)], (1, 0, 0, 1)),
    "touching opposite borders": ([(0, 5, 5)], [(11, 5, 5)], (0, 8.8, 8.4, 0)),
}


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases_at_anisotropic_spacing(name):
    predicted, reference, expected = EDGE_CASES[name]
    spacing_mm, volumes = (0.8, 0.8, 3.0), np.zeros((2, 12, 12, 12), np.uint8)
    for volume, voxels in zip(volumes, (predicted, reference), strict=True):
        for voxel in voxels:
            volume[voxel] = 1
    diagonal = float(np.linalg.norm(np.array(spacing_mm) * 12))
    table = evaluate(*volumes, spacing_mm=spacing_mm, class_names=("background", "x"), case="c", method="m", label_origin="REF",
                     metrics=("dice", "hd95", "asd", "nsd_1mm"))  # fmt: skip
    for found, value in zip(table["value"], expected, strict=True):
        assert found == pytest.approx(diagonal if value == "D" else value, abs=1e-6, nan_ok=True)
