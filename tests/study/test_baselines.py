"""The baselines: an untrained network that is the run's own start, certain background, and a rule checked by hand."""

import numpy as np
import pytest
import torch

from homelib.config import override
from homelib.run.checkpoint import trained_network
from homelib.run.predict import predict_probabilities
from homelib.run.train import fit
from homelib.study.baselines import ThresholdAndPosition, all_background, untrained


def test_untrained_is_the_network_that_training_starts_from(smoke, prepared, tmp_path):
    settings = override(smoke, {"training.steps": 1, "training.learning_rate": 1e-30, "training.weight_decay": 0, "training.seed": 7})
    start = trained_network(fit(settings, [prepared], tmp_path / "run", progress=False))  # a step that moves nothing
    torch.manual_seed(123)
    np.testing.assert_allclose(untrained(prepared, settings), predict_probabilities(start, prepared, settings), atol=1e-6)
    other = override(settings, {"training.seed": 8})
    assert np.abs(untrained(prepared, other) - untrained(prepared, settings)).max() > 0.01


def test_untrained_leaves_the_random_numbers_of_others_alone(smoke, prepared):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    untrained(prepared, smoke)
    assert torch.equal(torch.rand(3), expected)


def test_untrained_is_neither_certain_nor_even(smoke, prepared):
    probabilities = untrained(prepared, smoke)
    assert probabilities.shape == (9, *prepared.image.shape)
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert 0.2 < probabilities.max() < 0.999


def test_all_background_is_certain_of_class_zero(smoke, case_of):
    probabilities = all_background(case_of(np.zeros((5, 4, 3))), smoke)
    assert probabilities.shape == (9, 5, 4, 3)
    assert (probabilities[0] == 1).all()
    assert (probabilities[1:] == 0).all()


# ---------------------------------------------------------------- the rule


@pytest.fixture
def patient(case_of):
    """Air, a block of 100 HU (class 1) in one half of the first axis, one of 300 HU (class 2) in the other; class 3 is not there."""
    image, label = np.full((21, 11, 11), -1000.0), np.zeros((21, 11, 11))
    image[2:9, 2:9, 2:9], label[2:9, 2:9, 2:9] = 100, 1
    image[14:18, 3:8, 3:8], label[14:18, 3:8, 3:8] = 300, 2
    return case_of(image, label)


def test_bounds_are_percentiles_of_intensity_and_place(patient):
    patient.image[4, 4, 4] = 5000  # one voxel in 343 lies beyond the 95th percentile
    rule = ThresholdAndPosition.fit(patient, 4)
    np.testing.assert_allclose(rule.intensity[1:3], [[100, 100], [300, 300]])
    np.testing.assert_allclose(rule.place[1], [[2 / 20, 8 / 20], [2 / 10, 8 / 10], [2 / 10, 8 / 10]])  # seven planes each: 1/7 of the voxels is more than 5 %
    np.testing.assert_allclose(rule.place[2], [[14 / 20, 17 / 20], [3 / 10, 7 / 10], [3 / 10, 7 / 10]])
    assert rule.size.tolist() == [0, 343, 100, 0]
    assert np.isnan(rule.intensity[[0, 3]]).all()


def test_percentiles_leave_out_a_twentieth_at_each_end(case_of):
    image, label = np.zeros((1, 1, 101)), np.ones((1, 1, 101))
    image[0, 0] = np.arange(101) * 3
    rule = ThresholdAndPosition.fit(case_of(image, label), 2)
    np.testing.assert_allclose(rule.intensity[1], [15, 285])
    np.testing.assert_allclose(rule.place[1, 2], [0.05, 0.95])


def test_the_rule_finds_the_blocks_of_its_own_patient_but_for_their_corners(patient):
    probabilities = ThresholdAndPosition.fit(patient, 4)(patient)
    assert probabilities.shape == (4, 21, 11, 11)
    assert set(np.unique(probabilities)) == {0.0, 1.0}
    found = probabilities.argmax(0)
    assert found[3:8, 3:8, 3:8].min() == found[3:8, 3:8, 3:8].max() == 1
    assert found[15:17, 4:7, 4:7].min() == found[15:17, 4:7, 4:7].max() == 2
    assert not found[patient.label == 0].any()
    assert not (found == 3).any()


def test_intensity_and_place_must_both_fit(patient, case_of):
    rule = ThresholdAndPosition.fit(patient, 4)
    swapped = case_of(patient.image[::-1].copy())  # 300 HU where class 1 was, 100 HU where class 2 was
    assert not rule(swapped)[1:].any()


def test_places_scale_with_the_body(patient, case_of):
    larger = case_of(patient.image.repeat(2, 0).repeat(2, 1).repeat(2, 2))  # 42 x 22 x 22
    found = ThresholdAndPosition.fit(patient, 4)(larger).argmax(0)
    assert found[6:16, 6:16, 6:16].min() == 1
    assert found[30:34, 8:14, 8:14].min() == 2


@pytest.mark.parametrize(("sizes", "winner"), [([0, 50, 90], 1), ([0, 90, 50], 2)])
def test_of_two_classes_that_claim_a_voxel_the_smaller_gets_it(case_of, sizes, winner):
    rule = ThresholdAndPosition(intensity=np.array([[np.nan] * 2, [0, 100], [0, 100]]), place=np.array([[[0, 1]] * 3] * 3, float), size=np.array(sizes))
    assert (rule(case_of(np.full((5, 5, 5), 50.0))).argmax(0) == winner).all()


def test_lone_voxels_are_left_out(patient):
    rule = ThresholdAndPosition.fit(patient, 4)
    patient.image[:] = -1000
    patient.image[5, 5, 5] = 100
    assert not rule(patient)[1:].any()


def test_a_class_that_the_training_patient_lacks_claims_nothing(case_of):
    rule = ThresholdAndPosition.fit(case_of(np.zeros((5, 5, 5)), np.zeros((5, 5, 5))), 3)
    assert (rule(case_of(np.zeros((5, 5, 5))))[0] == 1).all()
