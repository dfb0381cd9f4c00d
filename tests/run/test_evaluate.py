"""Every number of a class by hand and against MONAI; what an empty mask counts; lesions. Distances themselves: test_surface.py."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from scipy.ndimage import gaussian_filter

from homelib.run.evaluate import METRICS, _union, evaluate
from homelib.run.lesions import count_lesions
from homelib.run.metrics import FULL, metric_of

NAMES = ("background", "liver", "spleen")


def measured(predicted, reference, spacing_mm=(1.0, 1.0, 1.0), names=NAMES, **asked):
    table = evaluate(predicted, reference, spacing_mm=spacing_mm, class_names=names, case="c", method="m", label_origin="REF", **asked)
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


def test_overlaps_distances_and_volumes_by_hand():
    """Liver: 4 and 2 voxels, 2 in common. Its surface voxels: 5 mm is the farthest of {0, 0, 5, 10} (95th percentile: 9.25).

    Spleen: one voxel each, apart by 1, 2 and 0 voxels of 3, 2 and 5 mm: 5 mm.
    """
    reference = volume(liver=[np.s_[2, 3, 0:4]], spleen=[(8, 5, 5)])
    predicted = volume(liver=[np.s_[2, 3, 0:2]], spleen=[(9, 7, 5)])
    found = measured(predicted, reference, (3.0, 2.0, 5.0), metrics=FULL)
    expected = {"dice": 2 / 3, "iou": 1 / 2, "sensitivity": 1 / 2, "precision": 1, "reference_volume": 0.12, "predicted_volume": 0.06, "volume_error": -0.5}
    expected |= {"hd95_voxels": np.percentile([0, 0, 5, 10], 95), "hd95_pooled": np.percentile([0, 0, 5, 10, 0, 0], 95), "hd95": 10}
    assert {name: found["liver", name] for name in expected} == pytest.approx(expected)
    assert found["spleen", "dice"] == 0
    assert found["spleen", "hd95"] == found["spleen", "hd95_voxels"] == pytest.approx(5)


def test_a_perfect_prediction_has_the_best_values():
    label = volume(liver=[np.s_[2:6, 3:7, 0:4]], spleen=[np.s_[8:, 5:, 5:]])
    found = measured(label, label, metrics=(*FULL, "nsd_1mm"))
    for (_, name), value in found.items():
        if (best := metric_of(name).best) is not None:
            assert value == best, name


def test_a_worse_prediction_is_worse_in_the_direction_that_is_said():
    reference = volume((24, 20, 16), liver=[np.s_[6:14, 6:14, 4:12]])
    near, far = (measured(np.roll(reference, step, (0, 1)), reference, metrics=(*FULL, "nsd_1mm"))["liver"] for step in (1, 3))
    for name in near.index:
        sign = {True: 1, False: -1, None: 0}[metric_of(name).higher_is_better]
        assert (near[name] - far[name]) * sign > 0 if sign else near[name] == far[name], name  # a volume stays what it is


KINDS = {"overlap": ["dice", "iou", "sensitivity", "precision", "nsd_2mm"], "distance": ["hd95", "asd", "hd95_voxels", "hd95_pooled"],
         "volume": ["reference_volume", "predicted_volume", "volume_error"], "lesions": ["lesions_found", "lesions_spurious"]}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_a_kind_and_their_units(kind):
    for name in KINDS[kind]:
        assert metric_of(name).kind == kind
        assert metric_of(name).unit == {"distance": "mm", "lesions": "lesions", "volume": "1" if name == "volume_error" else "ml"}.get(kind, "1")


def test_what_a_metric_means_cannot_be_changed_by_who_uses_it():
    with pytest.raises(FrozenInstanceError):
        METRICS["dice"].best = 100


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.7, 2.0, 5.0)], ids=str)
def test_measures_agree_with_monai_and_the_crop_changes_nothing(seed, spacing_mm):
    P, R = blobs(seed), blobs(seed + 10)
    if seed == 0:  # small and far from every border, so that the crop is a real one
        P, R = np.pad(P[8:12, 8:12, 6:10], 8), np.pad(R[7:11, 8:12, 5:9], 8)
        P[12, 12, 10] = R[9, 9, 9] = 1
    found = measured(P, R, spacing_mm, names=NAMES[:2], metrics=("dice", "hd95_voxels"))
    whole = [torch.from_numpy(mask == 1)[None, None] for mask in (P, R)]
    assert found["liver", "dice"] == pytest.approx(compute_dice(*whole).item(), abs=1e-6)
    uncropped = compute_hausdorff_distance(*whole, include_background=True, percentile=95, spacing=list(spacing_mm)).item()
    assert found["liver", "hd95_voxels"] == pytest.approx(uncropped, rel=1e-6)


def test_what_is_searched_is_the_box_around_both_masks_and_a_voxel_more():
    one, other = (slice(2, 4), slice(0, 3)), (slice(3, 7), slice(1, 9))
    assert _union([one, other], (12, 9)) == (slice(1, 8), slice(0, 9))  # no further than the volume
    assert _union([None, one], (12, 9)) == (slice(1, 5), slice(0, 4))
    assert _union([None, None], (12, 9)) == (slice(0, 0), slice(0, 0))


def test_one_empty_mask_is_the_worst_value_and_two_are_no_value():
    something, nothing = volume(liver=[(1, 1, 1)]), volume()
    for predicted, reference in ((something, nothing), (nothing, something)):
        found = measured(predicted, reference, (3.0, 4.0, 1.0))
        assert found["liver", "dice"] == 0
        assert found["liver", "hd95"] == pytest.approx(math.hypot(12 * 3, 10 * 4, 8 * 1))  # the volume's diagonal in mm
        assert math.isnan(found["spleen", "dice"])
        assert math.isnan(found["spleen", "hd95"])


def test_the_rule_for_empty_masks_is_that_of_every_metrics_worst_value():
    something, nothing = volume(liver=[(1, 1, 1)]), volume()
    for predicted, reference, error in ((nothing, something, -1), (something, nothing, math.nan)):
        found = measured(predicted, reference, metrics=(*FULL, "nsd_1mm"))
        for name in (*FULL, "nsd_1mm"):
            worst = metric_of(name).worst
            value = found["liver", name]
            if worst == "diagonal":
                assert value == pytest.approx(math.hypot(12, 10, 8)), name
            elif worst is not None:
                assert value == worst, name
            else:
                ml = {"reference_volume": (reference == 1).sum() / 1000, "predicted_volume": (predicted == 1).sum() / 1000, "volume_error": error}
                assert value == pytest.approx(ml[name], nan_ok=True), name
    both = measured(nothing, nothing, metrics=FULL)["liver"]
    assert [name for name, value in both.items() if not math.isnan(value)] == ["reference_volume", "predicted_volume"]


def test_lesions_are_counted_where_asked():
    reference = volume(liver=[np.s_[1:3, 1:3, 1:3], np.s_[6:9, 6:9, 4:7]], spleen=[(11, 9, 7)])
    predicted = volume(liver=[np.s_[1:3, 1:3, 1:2], (6, 6, 4), np.s_[10:12, 0, 0:2]])  # a half of one, a 27th of the other, and nothing
    found = measured(predicted, reference, lesion_classes=("liver",))["liver"]
    assert found[["lesions_reference", "lesions_predicted", "lesions_found", "lesions_spurious"]].tolist() == [2, 3, 1, 1]
    assert "lesions_found" not in measured(predicted, reference, lesion_classes=("liver",))["spleen"]
    assert count_lesions(np.zeros((3, 3, 3), bool), np.zeros((3, 3, 3), bool)) == dict.fromkeys(
        ("lesions_reference", "lesions_predicted", "lesions_found", "lesions_spurious"), 0
    )


def test_the_background_is_measured_in_overlap_alone_where_asked():
    label = volume(liver=[(1, 1, 1)])
    found = measured(label, label, background=True, metrics=(*FULL, "nsd_1mm"))
    assert list(found["background"].index) == ["dice", "iou", "sensitivity", "precision"]
    assert (found["background"] == 1).all()


@pytest.mark.parametrize("name", ["hd96", "nsd_mm", "nsd_onemm", "nsd_2", "2mm", "nsd_-1mm", "nsd_infmm", "nsd_nanmm"])
def test_an_unknown_metric_is_an_error(name):
    with pytest.raises(KeyError, match=name):
        metric_of(name)


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
