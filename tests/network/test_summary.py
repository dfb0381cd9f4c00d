"""What the network's summary says of it is what the network is."""

import pytest

from homelib import MambaHoME, ModelConfig, UserError
from homelib.network.summary import flow_table


@pytest.fixture(scope="module")
def flow(tiny):
    return flow_table(tiny, (32, 48, 64))


def test_parts_come_in_the_order_in_which_they_run(flow):
    stages, lifts, ups = ([f"{name}[{i}]" for i in range(n)] for name, n in (("stages", 4), ("lift", 5), ("up", 4)))
    assert list(flow.index) == ["scan", *stages, *lifts, *ups, "refine", "head"]


def test_what_enters_a_part_is_as_the_paper_draws_it(flow):
    after = flow["after"].to_dict()
    assert [after[f"stages[{i}]"] for i in range(4)] == [("scan",), ("stages[0]",), ("stages[1]",), ("stages[2]",)]
    assert [after[f"lift[{i}]"] for i in range(5)] == [("scan",), ("stages[0]",), ("stages[1]",), ("stages[2]",), ("stages[3]",)]
    assert [after[f"up[{i}]"] for i in range(4)] == [("lift[4]", "lift[3]"), ("up[0]", "lift[2]"), ("up[1]", "lift[1]"), ("up[2]", "lift[0]")]
    assert (after["scan"], after["refine"], after["head"]) == ((), ("up[3]",), ("refine",))


def test_each_stage_halves_the_grid_and_the_decoder_comes_back(flow, tiny):
    assert [flow.loc[f"stages[{i}]", "grid"] for i in range(4)] == [(16, 24, 32), (8, 12, 16), (4, 6, 8), (2, 3, 4)]
    assert [flow.loc[f"up[{i}]", "grid"] for i in range(4)] == [(4, 6, 8), (8, 12, 16), (16, 24, 32), (32, 48, 64)]
    assert tuple(flow.loc[[f"stages[{i}]" for i in range(4)], "channels"]) == tiny.channels
    assert (flow.loc["lift[4]", "channels"], flow.loc["head", "channels"]) == (tiny.hidden_channels, tiny.out_channels)


def test_the_parameters_of_all_parts_are_the_networks(flow, tiny):
    assert flow["parameters"].sum() == sum(parameter.numel() for parameter in MambaHoME(tiny).parameters())


def test_a_stage_says_what_it_is_made_of(flow):
    assert flow.loc["stages[0]", "made_of"] == "GatedSpatialConv, 1 x (MambaMixer, HoME)"
    layer = flow_table(ModelConfig(channels=(4, 4, 4, 4), hidden_channels=4, depths=(1, 3, 1, 1), mixer="none", gsc="none"), (32, 32, 32))
    assert layer.loc["stages[1]", "made_of"] == "Identity, 3 x (HoME)"


@pytest.mark.parametrize("patch", [(40, 32, 32), (16, 16, 16)])
def test_a_patch_that_would_be_filled_up_is_refused(tiny, patch):
    with pytest.raises(UserError, match=r"^patch: found .*expected multiples of 16"):
        flow_table(tiny, patch)
