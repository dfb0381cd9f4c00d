"""Dice and HD95 by hand, against brute force and against MONAI on the whole volume; what an empty mask counts."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import binary_erosion, gaussian_filter

from homelib.run.evaluate import METRICS, evaluate

NAMES = ("background", "liver", "spleen")


def measured(predicted, reference, spacing_mm=(1.0, 1.0, 1.0), names=NAMES):
    table = evaluate(predicted, reference, spacing_mm=spacing_mm, class_names=names, case="c", method="m", label_origin="REF")
    return table.set_index(["class", "metric"])["value"]


def volume(shape=(12, 10, 8), **classes):
    """Class indices, from name -> voxels or slices."""
    label = np.zeros(shape, np.uint8)
    for name, places in classes.items():
        for place in places:
            label[place] = NAMES.index(name)
    return label


def blobs(seed, shape=(20, 24, 16)):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.5)
    return (noise > np.quantile(noise, 0.8)).astype(np.uint8)


def test_dice_and_hd95_by_hand():
    """Liver: 4 and 2 voxels, 2 in common: 2*2/6. Its surfaces: 5 mm is the farthest of {0, 0, 5, 10} (95th percentile: 9.25).

    Spleen: one voxel each, apart by 1, 2 and 0 voxels of 3, 2 and 5 mm: 5 mm.
    """
    reference = volume(liver=[np.s_[2, 3, 0:4]], spleen=[(8, 5, 5)])
    predicted = volume(liver=[np.s_[2, 3, 0:2]], spleen=[(9, 7, 5)])
    found = measured(predicted, reference, (3.0, 2.0, 5.0))
    assert found["liver", "dice"] == pytest.approx(2 / 3)
    assert found["liver", "hd95"] == pytest.approx(np.percentile([0, 0, 5, 10], 95))
    assert found["spleen", "dice"] == 0
    assert found["spleen", "hd95"] == pytest.approx(5)


def test_a_perfect_prediction_has_the_best_values():
    label = volume(liver=[np.s_[2:6, 3:7, 0:4]], spleen=[np.s_[8:, 5:, 5:]])
    found = measured(label, label)
    for (_, metric), value in found.items():
        assert value == METRICS[metric].best


def brute_hd95(P, R, spacing_mm):
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * spacing_mm for mask in (P, R)]
    distances = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.7, 2.0, 5.0)], ids=str)
def test_measures_agree_with_brute_force_and_the_crop_changes_nothing(seed, spacing_mm):
    P, R = blobs(seed), blobs(seed + 10)
    if seed == 0:  # small and far from every border, so that the crop is a real one
        P, R = np.pad(P[8:12, 8:12, 6:10], 8), np.pad(R[7:11, 8:12, 5:9], 8)
        P[12, 12, 10] = R[9, 9, 9] = 1
    found = measured(P, R, spacing_mm, names=NAMES[:2])
    assert found["liver", "dice"] == pytest.approx(2 * (P & R).sum() / (P.sum() + R.sum()))
    assert found["liver", "hd95"] == pytest.approx(brute_hd95(P == 1, R == 1, spacing_mm), rel=1e-5)
    whole = (torch.from_numpy(mask == 1)[None, None] for mask in (P, R))
    uncropped = compute_hausdorff_distance(*whole, include_background=True, percentile=95, spacing=list(spacing_mm)).item()
    assert found["liver", "hd95"] == pytest.approx(uncropped, rel=1e-6)


def test_one_empty_mask_is_the_worst_value_and_two_are_no_value():
    something, nothing = volume(liver=[(1, 1, 1)]), volume()
    for predicted, reference in ((something, nothing), (nothing, something)):
        found = measured(predicted, reference, (3.0, 4.0, 1.0))
        assert found["liver", "dice"] == 0
        assert found["liver", "hd95"] == pytest.approx(math.hypot(12 * 3, 10 * 4, 8 * 1))  # the volume's diagonal in mm
        assert math.isnan(found["spleen", "dice"])
        assert math.isnan(found["spleen", "hd95"])


def test_every_row_says_what_it_is():
    reference, predicted = volume(liver=[np.s_[0, 0, 0:3]]), volume(liver=[np.s_[0, 0, 0:2]], spleen=[(5, 5, 5)])
    table = evaluate(predicted, reference, spacing_mm=(1, 1, 1), class_names=NAMES, case="ct-a", method="ours", label_origin="MODEL")
    assert list(table.columns) == ["case", "method", "label_origin", "class", "metric", "value", "unit", "reference_voxels", "predicted_voxels"]
    assert table[["class", "metric"]].values.tolist() == [["liver", "dice"], ["liver", "hd95"], ["spleen", "dice"], ["spleen", "hd95"]]
    assert table["unit"].tolist() == ["1", "mm"] * 2
    assert table["reference_voxels"].tolist() == [3, 3, 0, 0]
    assert table["predicted_voxels"].tolist() == [2, 2, 1, 1]
    assert set(table["case"]) | set(table["method"]) | set(table["label_origin"]) == {"ct-a", "ours", "MODEL"}


def test_volumes_of_two_grids_are_refused():
    with pytest.raises(ValueError, match=r"\(12, 10, 8\).*\(12, 10, 7\)"):
        measured(volume(), volume((12, 10, 7)))
