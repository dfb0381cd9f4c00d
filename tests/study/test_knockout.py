"""Knock-outs change what they say and nothing else, leave no hook, and name the planted specialist and its class; intervals by hand."""

import numpy as np
import pytest
import torch

from homelib import MambaHoME, UserError, trace_routing
from homelib.config import override
from homelib.network.unet import pad
from homelib.study.knockout import Intervention, effect_intervals, effects, interventions, knocked_out
from homelib.study.scan_interval import Counts, Draws


@pytest.fixture
def network(tiny) -> MambaHoME:
    return MambaHoME(tiny).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 1, 33, 20, 17)


def hooks_of(network: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def parts(network, image, *kept):
    """Outputs of some modules in one forward pass."""
    seen = {}
    hooks = [module.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output)) for name, module in kept]
    with torch.inference_mode():
        seen["logits"] = network(image)
    for hook in hooks:
        hook.remove()
    return seen


# ---------------------------------------------------------------- what is taken away


@pytest.mark.parametrize("level", [1, 2])
def test_one_experts_output_is_zero_and_the_others_are_as_they_were(network, image, level):
    home = network.stages[1].blocks[0].home
    experts = home.local_experts if level == 1 else home.global_experts
    before = parts(network, image, ("y", experts))
    with knocked_out(network, Intervention(1, 0, level, "expert", 2)):
        during = parts(network, image, ("y", experts))
    assert (during["y"][2] == 0).all()
    others = [e for e in range(len(during["y"])) if e != 2]
    assert torch.equal(during["y"][others], before["y"][others])
    assert not torch.equal(during["logits"], before["logits"])
    assert hooks_of(network) == 0
    assert torch.equal(parts(network, image)["logits"], before["logits"])


def inside(network, image, home) -> dict:
    """What goes into and comes out of a layer's parts: x and A of level 1, z that level 2 is given, what the layer adds, and the logits."""
    seen = {}
    hooks = [
        home.local_router.register_forward_hook(lambda module, args, A: seen.update(x=args[0], A=A)),
        home.global_norm.register_forward_pre_hook(lambda module, args: seen.update(z=args[0])),
        home.register_forward_hook(lambda module, args, added: seen.update(added=added)),
    ]
    with torch.inference_mode():
        seen["logits"] = network(image)
    for hook in hooks:
        hook.remove()
    return seen


def test_without_the_layer_nothing_is_added(network, image):
    home = network.stages[0].blocks[0].home
    with knocked_out(network, Intervention(0, 0, 0, "layer")):
        assert (inside(network, image, home)["added"] == 0).all()
    assert hooks_of(network) == 0


def test_with_level_1_bypassed_its_slots_go_to_level_2_whatever_its_gates(network, image):
    home = network.stages[0].blocks[0].home
    with torch.no_grad():
        home.expert_gate.copy_(torch.tensor([-0.5, 2.0]))
    gates, before = home.expert_gate.clone(), inside(network, image, home)
    with knocked_out(network, Intervention(0, 0, 1, "bypass")), trace_routing(network, [0]) as trace:
        during = inside(network, image, home)
    assert torch.equal(during["A"], before["A"])
    slots = torch.einsum("bgkes,bgkd->bgesd", before["A"], before["x"]).flatten(1, 3)
    torch.testing.assert_close(during["z"], slots)
    assert not torch.allclose(before["z"], slots, atol=1e-3)
    assert trace[0, 0].combine is not None
    assert torch.equal(home.expert_gate, gates)
    assert hooks_of(network) == 0
    assert torch.equal(inside(network, image, home)["logits"], before["logits"])


def test_with_level_2_bypassed_tokens_read_what_level_1_made(network, image):
    home = network.stages[0].blocks[0].home
    before = inside(network, image, home)
    with knocked_out(network, Intervention(0, 0, 2, "bypass")), trace_routing(network, [0]) as trace:
        during = parts(network, image, ("home", home))
    B, G, K, E, S = before["A"].shape
    expected = torch.einsum("bgkm,bgmd->bgkd", before["A"].flatten(-2), before["z"].unflatten(1, (G, E * S))).flatten(1, 2)
    torch.testing.assert_close(during["home"], expected[:, : during["home"].shape[1]])
    with pytest.raises(UserError, match="level: found 2, which was not watched or did not run"):
        trace[0, 0].weights(2)
    assert torch.equal(inside(network, image, home)["logits"], before["logits"])


def test_a_level_bypassed_is_another_experiment_than_the_layer_removed(network, image):
    def logits(*what):
        with knocked_out(network, Intervention(0, 0, *what)):
            return parts(network, image)["logits"]

    first, second, layer = logits(1, "bypass"), logits(2, "bypass"), logits(0, "layer")
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in ((first, second), (first, layer), (second, layer)))


@pytest.mark.parametrize("level", [1, 2])
def test_renormalised_weights_are_zero_for_the_expert_and_sum_to_one_for_the_others(network, image, level):
    with torch.inference_mode(), trace_routing(network, [0]) as trace:
        network(image)
    before = trace[0, 0].weights(level)
    with torch.inference_mode(), knocked_out(network, Intervention(0, 0, level, "expert", 1, renormalised=True)), trace_routing(network, [0]) as trace:
        network(image)
    during = trace[0, 0].weights(level)
    assert (during[:, 1] == 0).all()
    torch.testing.assert_close(during.sum(1), torch.ones_like(during[:, 0]))
    if level == 1:  # level 2's are renormalised entry by entry
        torch.testing.assert_close(during[:, 0], before[:, 0] / (1 - before[:, 1]))


def test_a_token_that_was_one_experts_alone_reads_nothing_when_it_is_gone(planted):
    network, _, cases = planted()
    x = torch.from_numpy((np.clip(cases[0].image, -175, 250) + 175) / 425)[None, None].float()
    with torch.inference_mode(), knocked_out(network, Intervention(0, 0, 1, "expert", 2, renormalised=True)), trace_routing(network, [0]) as trace:
        network(x)
    sums = trace[0, 0].weights(1).sum(1)
    liver = torch.nn.functional.max_pool3d(pad(x), 2)[:, 0] > 0.9
    assert (sums[liver] == 0).all()
    torch.testing.assert_close(sums[~liver], torch.ones(int((~liver).sum())))


@pytest.mark.parametrize("level", [1, 2])
def test_a_shuffle_keeps_how_much_each_expert_is_used_and_not_where(network, image, level):
    """33 x 20 x 17 voxels leave fill in the last groups, which must stay fill."""
    stage = 0
    with torch.inference_mode(), trace_routing(network, [stage]) as trace:
        network(image)
    before = trace[stage, 0]
    with torch.inference_mode(), knocked_out(network, Intervention(stage, 0, level, "shuffle")), trace_routing(network, [stage]) as trace:
        network(image)
    during = trace[stage, 0]
    if level == 1:
        torch.testing.assert_close(during.weights(1).mean((2, 3, 4)), before.weights(1).mean((2, 3, 4)))
        assert not torch.allclose(during.weights(1), before.weights(1), atol=1e-3)
        for group in range(during.assignment.shape[1]):  # within a group
            a, b = (routing.assignment[0, group].flatten(1) for routing in (before, during))
            torch.testing.assert_close(a.sort(0).values, b.sort(0).values)
    else:
        torch.testing.assert_close(during.combine.sum(1), before.combine.sum(1))
        torch.testing.assert_close(during.dispatch.sum(1), before.dispatch.sum(1))
        assert not torch.equal(during.combine, before.combine)
        assert torch.equal(during.assignment, before.assignment)


def test_fill_stays_fill_in_a_shuffle(tiny, image):
    network = MambaHoME(tiny.model_copy(update={"group_size": (1000, 60, 9, 5)})).eval()
    with torch.inference_mode(), trace_routing(network, levels=[1]) as trace:
        network(image)
    before = trace.routings
    for stage in range(4):
        with torch.inference_mode(), knocked_out(network, Intervention(stage, 0, 1, "shuffle")), trace_routing(network, [stage], levels=[1]) as trace:
            network(image)
        after, tokens = trace[stage, 0].assignment, int(np.prod(trace[stage, 0].grid))
        spread = 1 / after.shape[3] / after.shape[4]
        assert after.flatten(1, 2)[:, tokens:].numel()
        torch.testing.assert_close(after.flatten(1, 2)[:, tokens:], torch.full_like(after.flatten(1, 2)[:, tokens:], spread))
        torch.testing.assert_close(trace[stage, 0].weights(1).mean((2, 3, 4)), before[stage].weights(1).mean((2, 3, 4)))


def test_shuffles_of_one_seed_are_the_same_and_of_another_not(network, image):
    def logits(seed):
        with knocked_out(network, Intervention(0, 0, 1, "shuffle"), seed=seed):
            return parts(network, image)["logits"]

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


def test_all_interventions_of_some_layers(network, tiny):
    found = interventions(network, stages=[1], levels=[1])
    told = [(one.level, one.what, one.expert) for one in found]
    assert told == [(1, "expert", 0), (1, "expert", 1), (1, "expert", 2), (1, "bypass", -1), (1, "shuffle", -1), (0, "layer", -1)]
    assert len(interventions(network)) == sum(tiny.experts_local) + sum(tiny.experts_global) + 8 * 2 + 4
    assert str(found[1]) == "stage 1, block 0, level 1, without expert 1"
    assert str(found[3]) == "stage 1, block 0, level 1, bypassed"
    assert str(found[5]) == "stage 1, block 0, without the layer"


@pytest.mark.parametrize(
    ("intervention", "told"),
    [
        (Intervention(0, 0, 1, "expert", 2), "expert: found 2, expected 0 to 1 in stage 0, level 1"),
        (Intervention(4, 0, 1, "bypass"), "stages: found 4"),
        (Intervention(0, 1, 1, "bypass"), "blocks: found 1"),
        (Intervention(0, 0, 3, "bypass"), "levels: found 3"),
        (Intervention(0, 0, 0, "bypass"), "level: found 0 for bypass, expected 1 or 2"),
        (Intervention(0, 0, 1, "layer"), "level: found 1 for layer, expected 0, both"),
        (Intervention(0, 0, 1, "shuffle", renormalised=True), "renormalised: found it with a shuffle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_cannot_be_knocked_out(network, intervention, told):
    with pytest.raises(UserError, match=told), knocked_out(network, intervention):
        pass
    assert hooks_of(network) == 0


# ---------------------------------------------------------------- effects


def test_a_planted_specialist_is_named_by_its_knock_out_and_no_other_expert_is(planted):
    network, settings, cases = planted()
    wanted = interventions(network, stages=[0], levels=[1], what=["expert"])
    rows = effects(network, cases, settings, wanted)
    there = rows[rows["class"].isin(["liver", "spleen"])]
    np.testing.assert_allclose(there["intact"], 1)
    assert rows[~rows["class"].isin(["liver", "spleen"])]["change"].isna().all()
    table = effect_intervals(rows)
    lost = table[(table["high"] < 0) & (table["class"] != "mean")]
    assert lost[["expert", "class", "cases"]].values.tolist() == [[2, "liver", 3]]
    assert lost["change"].item() == -1
    others = table[~((table["expert"] == 2) & table["class"].isin(["liver", "mean"]))].dropna(subset="change")
    assert (others["change"] == 0).all()
    assert table[(table["expert"] == 2) & (table["class"] == "mean")]["change"].item() == pytest.approx(-0.5)


def test_uniform_routing_loses_nothing_by_any_knock_out(planted):
    network, settings, cases = planted(uniform=True)
    wanted = interventions(network, stages=[0], levels=[1])
    rows = effects(network, cases[:2], settings, wanted).dropna(subset="change")
    np.testing.assert_allclose(rows["intact"], 1)
    assert (rows[["change", "scan_low", "scan_high", "flipped", "logit_change"]] == 0).all(axis=None)


@pytest.mark.parametrize("what", [(1, "shuffle"), (1, "bypass"), (0, "layer")], ids=lambda what: what[1])
def test_the_shuffle_the_bypass_and_the_layer_take_the_specialists_liver(planted, what):
    network, settings, cases = planted()
    rows = effects(network, cases[:1], settings, [Intervention(0, 0, *what)]).dropna(subset="change")
    change = rows.set_index("class")["change"]
    assert change["liver"] < -0.3 if what[1] == "shuffle" else change["liver"] == -1
    assert change["spleen"] == 0
    liver = (cases[0].label == 3).sum()
    assert rows["flipped"].eq(liver).all() if what[1] != "shuffle" else (rows["flipped"] > 0).all()


def test_an_effect_too_small_for_any_class_is_told_from_none(smoke, case_of):
    """Dice is unchanged to the last bit in both. What flips and the logits, by a second prediction."""
    settings = override(smoke, {"model.out_channels": 9, "data.patch_voxels": (32, 32, 32)})
    network = MambaHoME(settings.model).eval()
    with torch.no_grad():
        network.head.bias.copy_(100 * torch.eye(9)[3])  # all is liver, by far
    rng = np.random.default_rng(0)
    case = case_of(rng.uniform(-175, 250, (32, 32, 32)), rng.integers(0, 9, (32, 32, 32)))
    wanted, kept = (Intervention(3, 0, 1, "expert", 0), Intervention(0, 0, 1, "shuffle")), []
    rows = effects(network, [case], settings, wanted, on_rows=lambda rows: kept.append(len(rows)))
    assert kept == [8, 16]
    assert (rows.dropna(subset="change")[["change", "flipped"]] == 0).all(axis=None)
    x = (torch.from_numpy(np.clip(case.image, -175, 250) + 175) / 425)[None, None].float()
    for intervention, change in zip(wanted, rows["logit_change"].unique(), strict=True):
        with torch.inference_mode():
            before = network(x)
            with knocked_out(network, intervention):
                after = network(x)
        assert 0 < change == pytest.approx((after - before).abs().max().item(), rel=0.05)
    table = effect_intervals(rows)
    assert table["logit_change"].min() == rows["logit_change"].min()
    assert (table["flipped"] == 0).all()


def test_one_case_has_no_interval_over_cases_but_one_within_its_scan(planted):
    network, settings, cases = planted()
    count = []
    rows = effects(network, cases[:1], settings, [Intervention(0, 0, 1, "expert", 2)], on_prediction=count.append)
    assert count == [1, 1]
    row = effect_intervals(rows).set_index("class").loc["liver"]
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
    assert (row["scan_low"], row["scan_high"]) == (-1, -1)


def test_an_unlabelled_case_is_refused(planted, case_of):
    network, settings, _ = planted()
    with pytest.raises(UserError, match="cases: found made without a label"):
        effects(network, [case_of(np.zeros((32, 32, 32)))], settings, [])


# ---------------------------------------------------------------- intervals within a scan


def test_dice_by_cubes_is_that_of_the_whole_volume_by_hand():
    rng = np.random.default_rng(0)
    predicted, label = rng.integers(0, 4, (2, 19, 13, 9))
    label[0] = 255
    label[8:12, 4:8], predicted[8:12, 4:8] = 0, 3  # cubes with nothing that is measured
    counts = Counts.of(predicted, label, [1, 2], side=4)
    assert (counts.total, counts.label.shape) == (5 * 4 * 3, (5 * 4 * 3 - 3, 3))
    for index in (1, 2):
        both = ((predicted == index) & (label == index)).sum()
        assert counts.dice()[index] == pytest.approx(2 * both / ((predicted == index).sum() + (label == index).sum()))
    cube = (slice(4, 8), slice(8, 12), slice(0, 4))
    (row,) = np.flatnonzero(counts.cubes == 1 * 12 + 2 * 3 + 0)
    for table, where in ((counts.predicted, predicted), (counts.label, label), (counts.both, np.where(predicted == label, label, 0))):
        assert table[row].tolist() == [0] + [(where[cube] == index).sum() for index in (1, 2)]


def test_a_change_in_one_place_is_less_sure_than_the_same_change_everywhere():
    label = np.zeros((32, 32, 32), np.uint8)
    label[8:24, 8:24, 8:24] = 1
    everywhere, one_place = label.copy(), label.copy()
    everywhere[8:24:4] = 0
    one_place[8:12, 8:24, 8:24] = 0
    draws = Draws(Counts.of(label, label, [1]))
    wide, narrow = (draws.change(Counts.of(volume, label, [1]))[1] for volume in (one_place, everywhere))
    assert wide["change"] == narrow["change"] == pytest.approx(2 * 0.75 / 1.75 - 1)
    assert wide["scan_low"] < wide["change"] < wide["scan_high"] < 0
    assert wide["scan_high"] - wide["scan_low"] > 3 * (narrow["scan_high"] - narrow["scan_low"])


def test_draws_of_the_cubes_that_matter_are_those_of_all_cubes():
    """Against a loop that draws every cube of the scan; the changed prediction finds the class where neither label nor first prediction has it."""
    rng, shape, side = np.random.default_rng(0), (12, 10, 8), 2
    label, predicted, other = (np.zeros(shape, np.uint8) for _ in range(3))
    label[2:7, 2:7, 2:6], predicted[3:7, 2:8, 2:6], other[2:11, 3:7, 2:6] = 1, 1, 1
    intact, without = (Counts.of(volume, label, [1], side=side) for volume in (predicted, other))
    assert set(without.cubes) - set(intact.cubes)
    found = Draws(intact, resamples=4000).change(without)[1]
    cubes = [tuple(slice(side * i, side * i + side) for i in place) for place in np.ndindex(6, 5, 4)]
    sums = np.array([[(part[cube] == 1).sum() for cube in cubes] for part in (predicted, other, label)])
    shared = np.array([[((part == label) & (label == 1))[cube].sum() for cube in cubes] for part in (predicted, other)])
    changes = []
    for _ in range(4000):
        times = np.bincount(rng.integers(0, len(cubes), len(cubes)), minlength=len(cubes))
        first, second = (2 * (shared[n] * times).sum() / ((sums[n] + sums[2]) * times).sum() for n in (0, 1))
        changes.append(second - first)
    np.testing.assert_allclose((found["scan_low"], found["scan_high"]), np.quantile(changes, [0.025, 0.975]), atol=0.02)


def test_memory_and_draws_follow_what_is_labelled_and_not_the_scan():
    """512 x 512 x 300 voxels: all cubes drawn as numbers of eight bytes would be 2.3 GiB."""
    small = np.zeros((64, 64, 64), np.uint8)
    small[10:40, 10:40, 10:40] = 1
    large = np.zeros((512, 512, 300), np.uint8)
    large[:64, :64, :64] = small
    counts = Counts.of(large, large, [1])
    draws = Draws(counts)
    assert counts.total == 64 * 64 * 38
    assert draws.times.shape == (2000, len(Counts.of(small, small, [1]).cubes))
    assert draws.times.dtype == np.uint8
    assert draws.times.mean() == pytest.approx(1, abs=0.02)


def test_a_class_that_is_nowhere_has_no_number():
    empty = np.zeros((9, 9, 9), np.uint8)
    counts = Counts.of(empty, empty, [1])
    found = Draws(counts).change(counts)[1]
    assert all(np.isnan(value) for value in found.values())
