"""Use and balance of experts by hand, beside a random start; cosines against all pairs; routing written at each validation."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from homelib import MambaHoME, UserError
from homelib.config import override
from homelib.run.checkpoint import build_network
from homelib.run.train import fit
from homelib.study.association import associate, associations, information_table
from homelib.study.balance import at_start, balance, use_of_experts
from homelib.study.expert_maps import RoutingMaps, routing_maps
from homelib.study.routing import experts_by_class
from homelib.study.routing_log import INFORMATION, LIFT, RoutingLog, read_log, together, watch_of
from homelib.study.routing_sums import sums_over_windows
from homelib.study.similarity import pairwise_cosine, similarity
from homelib.study.trace import trace_routing


def made(weights) -> RoutingMaps:
    weights = np.asarray(weights, np.float16)
    return RoutingMaps(np.zeros(weights.shape[1:]), None, (1, 1, 1), np.eye(4), {(1, 0, 2): weights})


# ---------------------------------------------------------------- balance


def test_use_and_balance_by_hand():
    maps = made(np.array([[1.0, 0.5, 0.75, 0.25], [0.0, 0.5, 0.25, 0.5], [0.0, 0.0, 0.0, 0.25]]).reshape(3, 2, 2, 1))
    use = use_of_experts(maps)
    assert use[["stage", "block", "level", "expert"]].values.tolist() == [[1, 0, 2, e] for e in range(3)]
    np.testing.assert_allclose(use["weight"], [0.625, 0.3125, 0.0625])
    np.testing.assert_allclose(use["won"], [0.75, 0.25, 0])
    row = balance(maps).iloc[0]

    def of(*p):
        return -sum(x * np.log(x) for x in p) / np.log(3)

    assert row["entropy"] == pytest.approx((0 + of(0.5, 0.5) + of(0.75, 0.25) + of(0.25, 0.5, 0.25)) / 4, abs=1e-6)
    assert row["largest_share"] == pytest.approx((1 + 0.5 + 0.75 + 0.5) / 4)
    assert row["load_entropy"] == pytest.approx(of(0.625, 0.3125, 0.0625))
    assert row["load_cv"] == pytest.approx(np.std([0.625, 0.3125, 0.0625]) * 3)
    assert row["busiest"] == pytest.approx(0.625 * 3)
    assert row["experts"] == 3


@pytest.mark.parametrize(
    ("weights", "entropy", "load_entropy"),
    [(np.full((4, 2, 2, 2), 0.25), 1, 1), (np.eye(2).reshape(2, 1, 1, 2), 0, 1), (np.eye(2)[:, [0, 0]].reshape(2, 1, 1, 2), 0, 0)],
    ids=["even", "each its own voxel", "one does all"],
)
def test_even_routing_is_balanced_and_so_is_sharp_routing(weights, entropy, load_entropy):
    row = balance(made(weights)).iloc[0]
    assert row["entropy"] == pytest.approx(entropy, abs=1e-6)
    assert row["load_entropy"] == pytest.approx(load_entropy, abs=1e-6)


def test_the_start_stands_beside(smoke, case_of):
    case = case_of(np.random.default_rng(0).uniform(-175, 250, (32, 32, 32)))
    drawn = torch.get_rng_state()
    start = at_start(case, smoke, stages=[0])
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.manual_seed(smoke.training.seed)
    again = routing_maps(build_network(smoke).eval(), case, smoke, stages=[0])
    for layer in again.experts:
        np.testing.assert_array_equal(start[layer], again[layer])
    table = balance(made(np.full((2, 32, 32, 32), 0.5)), balance(made(np.eye(2)[:, [0, 0]].reshape(2, 1, 1, 2))))
    assert table.loc[0, "entropy"] == pytest.approx(1)
    assert table.loc[0, "entropy_start"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------- similarity


def test_pairwise_cosines_are_those_of_all_pairs():
    vectors = torch.randn(2, 3, 7, 4)
    vectors[0, 0, 2] = 0  # fill
    means, sds = [], []
    for group in vectors.flatten(0, 1):
        kept = [v for v in group if v.norm() > 0]
        cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(kept, 2)]
        means.append(np.mean(cosines))
        sds.append(np.std(cosines))
    mean, sd, count = pairwise_cosine(vectors)
    assert mean == pytest.approx(np.mean(means), abs=1e-5)
    assert sd == pytest.approx(np.mean(sds), abs=1e-5)
    assert count == 41


def test_alike_and_opposite_vectors():
    v = torch.tensor([1.0, 2.0, 3.0])
    assert pairwise_cosine(torch.stack([v, 2 * v, 5 * v]))[:2] == pytest.approx((1, 0), abs=1e-3)
    assert pairwise_cosine(torch.stack([v, -v]))[0] == pytest.approx(-1, abs=1e-5)
    assert np.isnan(pairwise_cosine(v[None])[0])


def test_similarity_is_of_what_the_routers_see(tiny):
    network = MambaHoME(tiny).eval()
    seen = {}
    router = network.stages[1].blocks[0].home.local_router
    router.register_forward_hook(lambda module, args, A: seen.update(x=args[0], A=A))
    x = torch.randn(1, 1, 33, 20, 17)
    table = similarity(network, x).set_index(["stage", "level", "of"])
    assert len(table) == 4 * 2 * 3
    slots = torch.einsum("bgkes,bgkd->bgesd", seen["A"], seen["x"]).flatten(2, 3)
    assert table.loc[(1, 1, "tokens"), "mean"] == pytest.approx(pairwise_cosine(seen["x"])[0])
    assert table.loc[(1, 1, "slots"), "mean"] == pytest.approx(pairwise_cosine(slots)[0])
    assert table.loc[(1, 1, "tokens"), "vectors"] == 12 * 8 * 8
    assert set(similarity(network, x, stages=[2])["stage"]) == {2}
    assert set(similarity(network, x, levels=[1])["level"]) == {1}
    with pytest.raises(UserError, match="blocks: found 1, expected 0 to 0"):
        similarity(network, x, blocks=[1])
    left = sum(len(module._forward_hooks) for module in network.modules())
    assert left == 1  # the test's own


# ---------------------------------------------------------------- in sum


@pytest.fixture(scope="module")
def labelled(case_of):
    """One window of the smoke preset exactly, some voxels of no known class."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, 9, (32, 32, 32))
    label[:4] = 255
    return case_of(rng.uniform(-175, 250, (32, 32, 32)), label)


def test_sums_of_one_window_are_those_of_its_maps(smoke, labelled):
    network = MambaHoME(smoke.model).eval()
    sums, maps = sums_over_windows(network, labelled, smoke), routing_maps(network, labelled, smoke, dtype=np.float32)
    assert list(sums) == list(maps.experts)
    use, shares = use_of_experts(maps).set_index(["stage", "block", "level"]), balance(maps).set_index(["stage", "block", "level"])
    for layer, its in sums.items():
        assert its.voxels == 32**3
        np.testing.assert_allclose(its.load / its.voxels, use.loc[layer]["weight"], rtol=1e-5)
        np.testing.assert_allclose(its.won / its.voxels, use.loc[layer]["won"], atol=1e-3)
        assert its.entropy / its.voxels == pytest.approx(shares.loc[layer, "entropy"], rel=1e-5)
        assert its.largest / its.voxels == pytest.approx(shares.loc[layer, "largest_share"], rel=1e-5)
        np.testing.assert_allclose(its.joint / its.joint.sum(), associate(maps[layer], maps.label, maps.class_names, shifts=20).joint, atol=1e-6)


def test_sums_count_each_window_and_nothing_beyond_the_scan(smoke, case_of):
    """37 x 19 x 20 voxels in windows of 32 and 20, filled up to 32 in the network: three windows along the first axis, by loops over their voxels."""
    settings = override(smoke, {"data.patch_voxels": (32, 20, 24), "prediction.overlap": 0.9})
    rng = np.random.default_rng(0)
    case = case_of(rng.uniform(-175, 250, (37, 19, 20)), rng.integers(0, 3, (37, 19, 20)))
    network = MambaHoME(settings.model).eval()
    its = sums_over_windows(network, case, settings, stages=[1], levels=[2])[1, 0, 2]
    joint, voxels = np.zeros((9, 4)), 0
    for start in (0, 3, 5):
        seen = np.zeros((32, 32, 32), np.float32)
        seen[:32, :20, :24] = 0  # what lies beyond is air, 0
        seen[:32, :19, 2:22] = (np.clip(case.image[start : start + 32], -175, 250) + 175) / 425
        with torch.inference_mode(), trace_routing(network, [1]) as trace:
            network(torch.from_numpy(seen)[None, None])
        weights = trace[1, 0].weights(2)[0].numpy()
        for z, y, x in itertools.product(range(32), range(19), range(20)):
            joint[case.label[start + z, y, x]] += weights[:, z // 4, y // 4, (x + 2) // 4]
            voxels += 1
    assert its.voxels == voxels
    np.testing.assert_allclose(its.joint, joint, rtol=1e-4)
    np.testing.assert_allclose(its.load, joint.sum(0), rtol=1e-4)


# ---------------------------------------------------------------- over training


def test_routing_is_written_at_each_validation_and_again_when_gone_on_with(smoke, labelled, tmp_path):
    watch = RoutingLog(tmp_path, labelled, smoke, stages=[0])
    networks = [MambaHoME(smoke.model) for _ in range(3)]
    for step, network in zip((2, 4), networks[:2], strict=True):
        assert watch(step, network) == {}
    table = pd.read_csv(tmp_path / "routing.csv")
    assert list(table.columns) == ["step", "stage", "block", "level", "expert", "weight", "won", "entropy", "largest_share"]
    assert table["step"].unique().tolist() == [0, 2, 4]
    assert table["level"].unique().tolist() == [1, 2]
    start = at_start(labelled, smoke, stages=[0])
    np.testing.assert_allclose(table[table["step"] == 0]["weight"], use_of_experts(start)["weight"], atol=1e-3)
    np.testing.assert_allclose(table.groupby(["step", "level"])["weight"].sum(), 1, atol=1e-3)
    lift, bits = read_log(tmp_path, LIFT), read_log(tmp_path, INFORMATION)
    assert list(lift.columns) == ["step", "stage", "block", "level", "class", "expert", "weight", "lift", "voxels"]
    first = lift[(lift["step"] == 0) & (lift["level"] == 2)].drop(columns=["step", "stage", "block", "level"]).reset_index(drop=True)
    by_maps = experts_by_class(start[0, 0, 2], start.label, start.class_names)
    assert first[["class", "expert", "voxels"]].equals(by_maps[["class", "expert", "voxels"]])
    np.testing.assert_allclose(first[["weight", "lift"]], by_maps[["weight", "lift"]], atol=2e-3)
    assert list(bits.columns) == ["step", "stage", "block", "level", "bits"]
    information = information_table(associations(start, shifts=20))
    np.testing.assert_allclose(bits[bits["step"] == 0]["bits"], information["bits"].astype(float), atol=1e-4)
    watch(4, networks[2])
    again = pd.read_csv(tmp_path / "routing.csv")
    assert len(again) == len(table)
    pd.testing.assert_frame_equal(again[again["step"] == 2], table[table["step"] == 2])
    assert not np.allclose(again[again["step"] == 4]["weight"], table[table["step"] == 4]["weight"], atol=1e-6)


def test_a_training_that_begins_elsewhere_has_no_random_start_and_a_scan_without_a_label_no_lift(smoke, case_of, tmp_path):
    case = case_of(np.random.default_rng(0).uniform(-175, 250, (32, 32, 32)))
    settings = override(smoke, {"training.init_from": "another"})
    RoutingLog(tmp_path, case, settings, stages=[0])(2, MambaHoME(smoke.model))
    assert pd.read_csv(tmp_path / "routing.csv")["step"].unique().tolist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["routing.csv"]


def test_a_training_with_the_log_is_the_training_without(smoke, prepared, tmp_path):
    settings = override(smoke, {"data.train_cases": (prepared.case.id,), "data.manifest": prepared.case.manifest})
    plain = fit(settings, [prepared], tmp_path / "plain", progress=False, on_validation=lambda step, network: {"told": step})
    watch = together(RoutingLog(tmp_path / "watched", prepared, settings, stages=[3]), lambda step, network: {"told": step})
    watched = fit(settings, [prepared], tmp_path / "watched", progress=False, on_validation=watch)
    pd.testing.assert_frame_equal(watched.history.drop(columns="seconds"), plain.history.drop(columns="seconds"))
    assert pd.read_csv(watched.folder / "routing.csv")["step"].unique().tolist() == [0, 2, 4]
    assert {"routing.csv", "routing_lift.csv", "routing_information.csv"} <= set(watched.saved()["file"])
    pd.testing.assert_frame_equal(read_log(watched.folder), pd.read_csv(watched.folder / "routing.csv"))
    with pytest.raises(UserError, match=r"plain: no routing\.csv, expected one beside a run that was trained with training\.log_routing=true"):
        read_log(plain.folder)


def test_the_setting_is_refused_where_nothing_would_come_of_it(smoke, prepared, tmp_path):
    with pytest.raises(UserError, match="training.log_routing: found true with network SegMamba"):
        override(smoke, {"training.log_routing": True, "network": "SegMamba"})
    with pytest.raises(UserError, match="training.log_routing: found true with model.group_order 'hilbert'"):
        override(smoke, {"training.log_routing": True, "model.group_order": "hilbert"})
    settings = override(smoke, {"training.log_routing": True, "data.train_cases": (prepared.case.id,), "data.manifest": prepared.case.manifest})
    with pytest.raises(UserError, match="training.log_routing: found true without a function that measures it"):
        fit(settings, [prepared], tmp_path / "run", progress=False)
    assert watch_of(smoke, tmp_path, [prepared]) is None
    other = replace(prepared, case=replace(prepared.case, id="validated on"))
    assert watch_of(settings, tmp_path, [prepared], [other]).case is other
    assert watch_of(settings, tmp_path, [prepared]).case is prepared
