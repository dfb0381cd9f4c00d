"""Lift and information by hand and by loops; shifts against rolling the label; bands that a planted specialist leaves and chance does not."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from homelib import UserError
from homelib.study.association import Association, associate, associations, by_group, information_table, lift_table, match_experts, pooled, stability
from homelib.study.expert_maps import RoutingMaps, routing_maps
from homelib.study.routing import experts_by_class

NAMES = ("background", "liver", "spleen")
SHAPE = (12, 10, 14)


def smooth(rng, experts: int, shape=SHAPE) -> np.ndarray:
    """Maps (E, D, H, W) that vary slowly and have nothing to do with any label."""
    fields = np.stack([gaussian_filter(rng.normal(size=shape), 2, mode="wrap") for _ in range(experts)])
    weights = np.exp(12 * fields)
    return weights / weights.sum(0)


def boxes(rng, shape=SHAPE) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    for index in (1, 2):
        corner = [int(rng.integers(0, n - 5)) for n in shape]
        label[tuple(slice(c, c + 5) for c in corner)] = index
    return label


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---------------------------------------------------------------- by hand


def test_lift_and_information_by_hand():
    maps = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8]]).reshape(2, 1, 2, 2)
    label = np.array([1, 1, 0, 0], np.uint8).reshape(1, 2, 2)
    found = associate(maps, label, NAMES, shifts=20)
    np.testing.assert_allclose(found.joint, [[0.075, 0.425], [0.425, 0.075], [0, 0]])
    assert found.voxels.tolist() == [2, 2, 0]
    np.testing.assert_allclose(2**found.log2_lift, [[0.3, 1.7], [1.7, 0.3]])
    bits = sum(j * np.log2(j / 0.25) for j in (0.075, 0.425, 0.425, 0.075))
    assert found.information()["bits"] == pytest.approx(bits)
    assert found.information()["share"] == pytest.approx(bits)  # two classes of one size have one bit


def test_lift_is_that_of_experts_by_class(rng):
    maps, label = smooth(rng, 3), boxes(rng)
    table = associate(maps, label, NAMES, shifts=20).lift()
    plain = experts_by_class(maps, label, NAMES)
    assert table[["class", "expert", "voxels"]].equals(plain[["class", "expert", "voxels"]])
    np.testing.assert_allclose(table[["weight", "lift"]], plain[["weight", "lift"]], rtol=1e-6)


def test_the_null_is_that_of_the_label_rolled_as_a_whole(rng):
    maps, label = smooth(rng, 3), boxes(rng)
    found = associate(maps, label, NAMES, shifts=20, seed=3)
    steps = np.random.default_rng(3).integers(1, np.array(SHAPE), size=(20, 3))
    for null, step in zip(found.null, steps, strict=True):
        rolled = np.roll(label, tuple(step), (0, 1, 2))
        expected = [[(maps[e] * (rolled == index)).sum() / label.size for e in range(3)] for index in range(3)]
        np.testing.assert_allclose(null, expected, atol=1e-6)


def test_voxels_without_a_known_class_are_left_out(rng):
    maps, label = smooth(rng, 2), boxes(rng)
    label[:, :3] = 255
    found = associate(maps, label, NAMES, shifts=20)
    known = label != 255
    np.testing.assert_allclose(found.joint[1], maps[:, label == 1].sum(1) / known.sum())
    np.testing.assert_allclose(found.joint.sum(), 1)
    np.testing.assert_allclose(found.null.sum((1, 2)), 1)


def test_an_expert_that_is_never_used_has_no_association(rng):
    maps = np.concatenate([smooth(rng, 2), np.zeros((1, *SHAPE))])
    table = associate(maps, boxes(rng), NAMES, shifts=20).lift()
    assert (table[table["expert"] == 2]["lift"] == 1).all()
    assert np.isfinite(table.select_dtypes(float)).all(axis=None)


def test_half_precision_is_no_other_association(rng):
    maps, label = smooth(rng, 4), boxes(rng)
    np.testing.assert_allclose(associate(maps.astype(np.float16), label, NAMES, shifts=20).joint, associate(maps, label, NAMES, shifts=20).joint, atol=1e-4)


@pytest.mark.parametrize(("label", "told"), [(np.zeros((2, 2, 2)), "expected the maps'"), (np.full(SHAPE, 9), "found 9"), (np.full(SHAPE, 255), "no class")])
def test_a_label_that_does_not_fit_is_refused(rng, label, told):
    with pytest.raises(UserError, match=told):
        associate(smooth(rng, 2), label.astype(np.uint8), NAMES)


# ---------------------------------------------------------------- what is found, and what is not


def test_a_planted_specialist_is_named_with_its_class(planted):
    network, settings, cases = planted()
    for case in cases:
        found = associations(routing_maps(network, case, settings, stages=[0], levels=[1]), shifts=200)
        lift, bits = lift_table(found), information_table(found).iloc[0]
        best = lift.loc[lift["lift"].idxmax()]
        assert (best["class"], best["expert"]) == ("liver", 2)
        assert best["lift"] == pytest.approx(1 / (best["voxels"] / (40 * 32 * 36)), rel=1e-3)  # all of the liver, and nothing else
        assert best["lift"] > best["high"]
        beyond = lift[(lift["p"] < 0.05) & (lift["lift"] > 1) & (lift["class"] != "background")]  # there the others are a little more than elsewhere
        assert {(row["class"], row["expert"]) for _, row in beyond.iterrows()} == {("liver", 2)}
        assert bits["bits"] > bits["high"]
        assert bits["p"] < 0.01


def test_uniform_routing_has_no_lift_and_no_information_beyond_the_band(planted):
    network, settings, cases = planted(uniform=True)
    found = associations(routing_maps(network, cases[0], settings, stages=[0], levels=[1]), shifts=100)
    lift, bits = lift_table(found), information_table(found).iloc[0]
    np.testing.assert_allclose(lift["lift"], 1, atol=1e-6)
    assert (lift["p"] > 0.5).all()
    assert bits["bits"] == pytest.approx(0, abs=1e-9)
    assert bits["p"] > 0.5


def test_smooth_routing_that_knows_nothing_of_the_label_is_within_the_band(rng):
    """Of 40 such maps about two leave it by chance. Against voxels permuted one by one nearly all would."""
    false = cells = naive = 0
    for _ in range(40):
        maps, label = smooth(rng, 3, (16, 16, 16)), boxes(rng, (16, 16, 16))
        found = associate(maps, label, NAMES, shifts=99)
        false += found.information()["p"] < 0.05
        cells += (found.lift()["p"] < 0.05).any()
        shuffled = [associate(maps, rng.permutation(label.ravel()).reshape(label.shape), NAMES, shifts=20).information()["bits"] for _ in range(20)]
        naive += found.information()["bits"] > max(shuffled)
    assert false <= 6
    assert cells <= 6
    assert naive >= 30


# ---------------------------------------------------------------- several scans, several seeds


def test_pooled_scans_are_all_their_voxels(rng):
    scans = [(smooth(rng, 3), boxes(rng)), (smooth(rng, 3, (9, 9, 9)), boxes(rng, (9, 9, 9)))]
    together = pooled([associate(maps, label, NAMES, shifts=20) for maps, label in scans])
    weights = np.concatenate([maps.reshape(3, -1) for maps, _ in scans], 1)
    classes = np.concatenate([label.ravel() for _, label in scans])
    expected = [weights[:, classes == index].sum(1) / len(classes) for index in range(3)]
    np.testing.assert_allclose(together.joint, expected)
    assert together.voxels.tolist() == [(classes == index).sum() for index in range(3)]
    with pytest.raises(UserError, match="other classes, experts or numbers of shifts"):
        pooled([associate(smooth(rng, 3), boxes(rng), NAMES, shifts=20), associate(smooth(rng, 2), boxes(rng), NAMES, shifts=20)])


def test_modalities_are_told_apart(planted):
    network, settings, cases = planted()
    found = [associations(routing_maps(network, case, settings, stages=[0], levels=[1]), shifts=50) for case in cases]
    lift, bits = by_group(found, ["CT", "CT", "MRI"])
    assert bits[["modality", "cases"]].values.tolist() == [["CT", 2], ["MRI", 1]]
    assert set(lift.columns) >= {"modality", "cases", "stage", "block", "level", "class", "expert", "lift", "low", "high", "p"}
    best = lift.loc[lift.groupby("modality")["lift"].idxmax()]
    assert best[["class", "expert"]].values.tolist() == [["liver", 2], ["liver", 2]]


def specialists(order: list[int], rng) -> Association:
    """Expert order[i] serves class i, in one and the same label."""
    label = boxes(np.random.default_rng(5))
    weights = np.full((3, *SHAPE), 0.05) + 0.02 * smooth(rng, 3)
    for index, expert in enumerate(order):
        weights[expert][label == index] += 0.9
    return associate(weights / weights.sum(0), label, NAMES, shifts=60)


def test_experts_of_two_seeds_are_matched_by_what_they_serve(rng):
    matched = match_experts(specialists([0, 1, 2], rng), specialists([2, 0, 1], rng))
    assert matched[["first", "second"]].values.tolist() == [[0, 2], [1, 0], [2, 1]]
    assert (matched["similarity"] > 0.9).all()


def test_stability_tells_seeds_that_agree_from_matching_alone(rng):
    label = boxes(np.random.default_rng(5))
    by_chance = {f"chance {n}": associate(smooth(rng, 3), label, NAMES, shifts=60) for n in range(4)}
    table = stability({"a": specialists([0, 1, 2], rng), "b": specialists([1, 2, 0], rng)} | by_chance).set_index(["first", "second"])
    assert table.loc[("a", "b"), "similarity"] > 0.9
    assert table.loc[("a", "b"), "p"] < 0.05
    chance = table.drop(("a", "b"))
    assert chance["similarity"].mean() > 0.1  # matching makes any two look alike
    assert (chance["p"] < 0.05).mean() < 0.4


def test_an_unlabelled_scan_has_no_lift():
    maps = RoutingMaps(np.zeros((2, 2, 2)), None, (1, 1, 1), np.eye(4), {(0, 0, 1): np.full((2, 2, 2, 2), 0.5)}, name="x")
    with pytest.raises(UserError, match="x: found no label"):
        associations(maps)
