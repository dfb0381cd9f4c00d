"""Knock-outs change what they say and nothing else, leave no hook, and name the planted specialist and its class; intervals by hand."""

import numpy as np
import pytest
import torch

from homelib import MambaHoME, UserError, trace_routing
from homelib.network.unet import pad
from homelib.study.knockout import Intervention, effect_intervals, effects, interventions, knocked_out
from homelib.study.scan_interval import Counts, change


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


def test_a_whole_level_is_zero_and_without_level_2_the_layer_adds_nothing(network, image):
    home = network.stages[0].blocks[0].home
    with knocked_out(network, Intervention(0, 0, 2, "level")):
        assert (parts(network, image, ("home", home))["home"] == 0).all()
    with knocked_out(network, Intervention(0, 0, 1, "level")):
        seen = parts(network, image, ("y", home.local_experts), ("home", home))
    assert (seen["y"] == 0).all()
    same = seen["home"][:, :512]  # tokens of one group read the same, for their slots hold the same
    torch.testing.assert_close(same, same[:, :1].expand_as(same), atol=1e-5, rtol=1e-4)


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
    assert [(one.what, one.expert) for one in found] == [("expert", 0), ("expert", 1), ("expert", 2), ("level", -1), ("shuffle", -1)]
    assert len(interventions(network)) == sum(tiny.experts_local) + sum(tiny.experts_global) + 8 * 2
    assert str(found[1]) == "stage 1, block 0, level 1: expert 1"


@pytest.mark.parametrize(
    ("intervention", "told"),
    [
        (Intervention(0, 0, 1, "expert", 2), "expert: found 2, expected 0 to 1 in stage 0, level 1"),
        (Intervention(4, 0, 1, "level"), "stages: found 4"),
        (Intervention(0, 1, 1, "level"), "blocks: found 1"),
        (Intervention(0, 0, 3, "level"), "levels: found 3"),
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
    assert (rows[["change", "scan_low", "scan_high"]] == 0).all(axis=None)


def test_the_shuffle_takes_the_specialists_liver_and_the_level_too(planted):
    network, settings, cases = planted()
    rows = effects(network, cases[:1], settings, [Intervention(0, 0, 1, "shuffle"), Intervention(0, 0, 1, "level")]).dropna(subset="change")
    change_of = rows.set_index(["what", "class"])["change"]
    assert change_of["shuffle", "liver"] < -0.3
    assert change_of["level", "liver"] == -1
    assert (change_of[:, "spleen"] == 0).all()


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
    counts = Counts.of(predicted, label, [1, 2], side=4)
    assert counts.label.shape == (5 * 4 * 3, 3)
    for index in (1, 2):
        both = ((predicted == index) & (label == index)).sum()
        assert counts.dice()[0, index] == pytest.approx(2 * both / ((predicted == index).sum() + (label == index).sum()))
    cube = (slice(4, 8), slice(8, 12), slice(0, 4))
    assert counts.predicted[1 * 12 + 2 * 3 + 0].tolist() == [(predicted[cube] == index).sum() for index in range(3)]


def test_a_change_in_one_place_is_less_sure_than_the_same_change_everywhere():
    label = np.zeros((32, 32, 32), np.uint8)
    label[8:24, 8:24, 8:24] = 1
    everywhere, one_place = label.copy(), label.copy()
    everywhere[8:24:4] = 0
    one_place[8:12, 8:24, 8:24] = 0
    intact = Counts.of(label, label, [1])
    wide, narrow = (change(intact, Counts.of(volume, label, [1]))[1] for volume in (one_place, everywhere))
    assert wide["change"] == narrow["change"] == pytest.approx(2 * 0.75 / 1.75 - 1)
    assert wide["scan_low"] < wide["change"] < wide["scan_high"] < 0
    assert wide["scan_high"] - wide["scan_low"] > 3 * (narrow["scan_high"] - narrow["scan_low"])


def test_a_class_that_is_nowhere_has_no_number():
    empty = np.zeros((9, 9, 9), np.uint8)
    found = change(Counts.of(empty, empty, [1]), Counts.of(empty, empty, [1]))[1]
    assert all(np.isnan(value) for value in found.values())
