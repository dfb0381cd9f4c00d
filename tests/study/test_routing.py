"""Routing: shares and groups against loops and by hand, a trace that changes nothing, and maps whose lit voxels were planted."""

import itertools

import numpy as np
import pytest
import torch

from homelib import MambaHoME, SegMamba, UserError, trace_routing
from homelib.config import override
from homelib.study.routing import Routing, Trace, expert_maps, experts_by_class, utilisation


def hooks_of(network: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in network.modules() for kind in kinds)


@pytest.fixture
def network(tiny) -> MambaHoME:
    return MambaHoME(tiny).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 1, 33, 20, 17)


# ---------------------------------------------------------------- one routing


@pytest.mark.parametrize("K", [5, 7, 30, 64], ids=["even", "ragged", "one group", "more than all tokens"])
def test_expert_weights_are_the_sums_over_slots_put_back_in_raster_order(K):
    D, H, W = grid = (2, 3, 5)
    B, G, E, S = 2, -(-D * H * W // K), 3, 2
    A = torch.rand(B, G, K, E, S)
    A.view(B, G * K, E, S)[:, D * H * W :] = 1e6  # the fill of the last group: must be nowhere in the result
    weights = Routing(0, 0, A, grid).expert_weights
    assert weights.shape == (B, E, D, H, W)
    for b, e, d, h, w in itertools.product(*map(range, weights.shape)):
        group, token = divmod((d * H + h) * W + w, K)
        expected = sum(A[b, group, token, e, s].item() for s in range(S))
        assert weights[b, e, d, h, w].item() == pytest.approx(expected, rel=1e-6)


def test_expert_weights_by_hand():
    A = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.0], [0.0, 0.5]]], [[[1.0, 0.0], [0.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]]])  # (G 2, K 2, E 2, S 2)
    weights = Routing(0, 0, A[None], (1, 1, 3)).expert_weights
    torch.testing.assert_close(weights, torch.tensor([[[[[0.3, 0.5, 1.0]]], [[[0.7, 0.5, 0.0]]]]]))


def test_groups_are_strips_in_raster_order_by_hand():
    groups = Routing(0, 0, torch.zeros(1, 5, 5, 2, 1), (2, 3, 4)).groups
    assert groups.tolist() == [[[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 2, 2]], [[2, 2, 2, 3], [3, 3, 3, 3], [4, 4, 4, 4]]]


# ---------------------------------------------------------------- the trace


def test_a_trace_leaves_the_forward_pass_bit_identical_and_no_hook_behind(network, image):
    with torch.inference_mode():
        network(image)  # the first pass of a process may start thread pools, and then sum in another order
        before = network(image)
        with trace_routing(network):
            assert hooks_of(network) > 0
            during = network(image)
        assert hooks_of(network) == 0
        assert torch.equal(before, during)
        assert torch.equal(before, network(image))


def test_a_trace_leaves_gradients_bit_identical_and_holds_none(network, image):
    def gradients():
        network.zero_grad()
        network(image).square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    before = gradients()
    with trace_routing(network) as trace:
        during = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert not any(routing.assignment.requires_grad for routing in trace.routings)


def test_no_hook_is_left_when_the_block_raises(network):
    with pytest.raises(ZeroDivisionError), trace_routing(network):
        1 / 0  # noqa: B018  raised inside the block on purpose
    assert hooks_of(network) == 0


def test_a_trace_holds_what_every_router_gave_and_sums_to_one(network, image, tiny):
    given = []
    for stage in network.stages:
        stage.blocks[0].home.local_router.register_forward_hook(lambda module, args, A: given.append(A))
    with torch.inference_mode(), trace_routing(network) as trace:
        network(image)
    assert [(r.stage, r.block) for r in trace.routings] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert [r.grid for r in trace.routings] == [(24, 16, 16), (12, 8, 8), (6, 4, 4), (3, 2, 2)]  # 33 x 20 x 17 is padded to 48 x 32 x 32
    for stage, (routing, A) in enumerate(zip(trace.routings, given, strict=True)):
        assert torch.equal(routing.assignment, A)
        weights = routing.expert_weights
        assert weights.shape == (2, tiny.experts_local[stage], *routing.grid)
        torch.testing.assert_close(weights.sum(1), torch.ones(2, *routing.grid))


def test_a_trace_sees_every_block_of_a_deeper_stage(tiny, image):
    network = MambaHoME(tiny.model_copy(update={"depths": (1, 2, 1, 1)})).eval()
    with torch.inference_mode(), trace_routing(network, stages=[1]) as trace:
        network(image)
    assert [(r.stage, r.block) for r in trace.routings] == [(1, 0), (1, 1)]
    assert not torch.equal(trace[1, 0].assignment, trace[1, 1].assignment)


def test_a_second_forward_pass_replaces_the_first(network, image):
    with torch.inference_mode(), trace_routing(network) as trace:
        network(image)
        first = trace[0, 0]
        network(torch.randn(1, 1, 16, 16, 32))
    assert len(trace.routings) == 4
    assert trace[0, 0].grid == (8, 8, 16) != first.grid


def test_a_trace_can_be_limited_to_some_stages(network, image):
    with torch.inference_mode(), trace_routing(network, stages=[2, 0]) as trace:
        network(image)
    assert [(r.stage, r.block) for r in trace.routings] == [(0, 0), (2, 0)]


@pytest.mark.parametrize("stages", [[4], [-1], [0, 7]], ids=str)
def test_a_stage_that_is_not_there_is_refused_and_no_hook_left(network, stages):
    with pytest.raises(UserError, match=rf"stages: found {stages[-1]}, expected 0 to 3"), trace_routing(network, stages=stages):
        pass
    assert hooks_of(network) == 0


def test_a_network_without_home_is_refused(tiny):
    with pytest.raises(UserError, match="network: found SegMamba, expected a MambaHoME"), trace_routing(SegMamba(tiny)):
        pass


@pytest.mark.parametrize("changes", [{"home": "mlp"}, {"home": "local"}, {"dispatch": "tokens"}, {"group_order": "blocks"}])
def test_another_form_of_home_is_not_traced(changes, tiny):
    ((name, value),) = changes.items()
    network = MambaHoME(tiny.model_copy(update=changes))
    with pytest.raises(UserError, match=rf"^model\.{name}: found '{value}', expected the released form"), trace_routing(network):
        pass


def test_a_place_that_was_not_traced_is_named_with_those_that_were():
    trace = Trace([Routing(0, 0, torch.zeros(1, 1, 1, 1, 1), (1, 1, 1)), Routing(2, 1, torch.zeros(1, 1, 1, 1, 1), (1, 1, 1))])
    assert trace[2, 1].stage == 2
    with pytest.raises(KeyError, match=r"found \(1, 0\), expected one of \[\(0, 0\), \(2, 1\)\]"):
        trace[1, 0]


# ---------------------------------------------------------------- maps in image space


PLANTED = {  # shape of the volume, window, stage, planted voxel, the cube of voxels of its token
    "one window of a multiple of 16": ((32, 32, 32), (32, 32, 32), 0, (4, 30, 17), (slice(4, 6), slice(30, 32), slice(16, 18))),
    "one window that is padded inside": ((20, 24, 18), (20, 24, 18), 1, (18, 2, 7), (slice(16, 20), slice(0, 4), slice(4, 8))),
    "several windows, one axis shorter than a window": ((40, 24, 52), (32, 32, 32), 0, (21, 5, 18), (slice(20, 22), slice(4, 6), slice(18, 20))),
    "several windows, in the last voxel": ((40, 24, 52), (32, 32, 32), 0, (39, 23, 51), (slice(38, 40), slice(22, 24), slice(50, 52))),
    "several windows that are padded inside": ((44, 36, 20), (20, 20, 20), 0, (1, 35, 10), (slice(0, 2), slice(34, 36), slice(10, 12))),
}


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize(("shape", "window", "stage", "planted", "cube"), PLANTED.values(), ids=PLANTED)
def test_a_planted_token_lights_its_own_voxels_and_no_others(smoke, case_of, light_bright_tokens, shape, window, stage, planted, cube, blend):
    settings = override(smoke, {"data.patch_voxels": window, "prediction.blend": blend, "model.group_size": (100, 30, 16, 8)})  # ragged groups
    network = MambaHoME(settings.model).eval()
    light_bright_tokens(network, stage)
    image = np.full(shape, -1000.0)
    image[planted] = 250.0
    maps = expert_maps(network, case_of(image), settings, stage=stage)
    expected = np.zeros(shape)
    expected[cube] = 1.0
    assert maps.shape == (2, *shape)
    np.testing.assert_allclose(maps[1], expected, atol=1e-5)
    np.testing.assert_allclose(maps[0], 1 - expected, atol=1e-5)


def test_maps_sum_to_one_at_every_voxel_of_any_size_and_leave_no_hook(smoke, case_of):
    network = MambaHoME(smoke.model).eval()
    image = np.random.default_rng(0).uniform(-175, 250, (37, 19, 41))
    for stage in range(4):
        maps = expert_maps(network, case_of(image), smoke, stage=stage)
        assert maps.shape == (smoke.model.experts_local[stage], 37, 19, 41)
        assert maps.dtype == np.float32
        assert maps.min() >= 0
        assert maps.std((1, 2, 3)).max() > 0
        np.testing.assert_allclose(maps.sum(0), 1, atol=1e-5)
    assert hooks_of(network) == 0


def test_maps_of_a_stage_or_block_that_is_not_there_are_refused(smoke, case_of):
    network, case = MambaHoME(smoke.model).eval(), case_of(np.zeros((32, 32, 32)))
    with pytest.raises(UserError, match="stages: found 4"):
        expert_maps(network, case, smoke, stage=4)
    with pytest.raises(UserError, match="blocks: found 3, expected 0 to 0"):
        expert_maps(network, case, smoke, block=3)
    with pytest.raises(UserError, match="SegMamba"):
        expert_maps(SegMamba(smoke.model), case, smoke)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_maps_of_a_network_on_the_gpu_are_those_on_the_cpu(smoke, case_of, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # ten bits of a number are not the CPU's 23
    network, case = MambaHoME(smoke.model).eval(), case_of(np.random.default_rng(0).uniform(-175, 250, (40, 33, 32)))
    on_cpu = expert_maps(network, case, smoke)
    np.testing.assert_allclose(expert_maps(network.cuda(), case, smoke), on_cpu, atol=1e-3)


# ---------------------------------------------------------------- tables of maps

MAPS = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.9, 0.8]]).reshape(2, 1, 2, 2)


def test_experts_by_class_by_hand():
    table = experts_by_class(MAPS, np.array([1, 1, 3, 0]).reshape(1, 2, 2), ("background", "liver", "spleen", "bone"))
    assert list(table.columns) == ["class", "expert", "weight", "lift", "voxels"]
    expected = [  # each expert weighs 0.5 in all; the spleen is not there
        ("background", 0, 0.2, 0.4, 1), ("background", 1, 0.8, 1.6, 1),
        ("liver", 0, 0.85, 1.7, 2), ("liver", 1, 0.15, 0.3, 2),
        ("bone", 0, 0.1, 0.2, 1), ("bone", 1, 0.9, 1.8, 1),
    ]  # fmt: skip
    assert [tuple(row) for row in table.round(6).itertuples(index=False)] == expected


def test_the_lift_is_over_the_experts_own_mean():
    maps = np.array([[1.0, 0.4], [0.0, 0.6]]).reshape(2, 1, 1, 2)  # means 0.7 and 0.3
    lift = experts_by_class(maps, np.array([[[0, 1]]]), ("background", "liver")).set_index(["class", "expert"])["lift"]
    assert lift["liver", 0] == pytest.approx(0.4 / 0.7)
    assert lift["liver", 1] == pytest.approx(0.6 / 0.3)


def test_voxels_of_no_known_class_count_in_no_mean():
    maps = np.array([[1.0, 0.4, 0.0], [0.0, 0.6, 1.0]]).reshape(2, 1, 1, 3)
    names = ("background", "liver")
    table = experts_by_class(maps, np.array([[[0, 1, 255]]]), names)
    expected = experts_by_class(maps[..., :2], np.array([[[0, 1]]]), names)
    assert table.equals(expected)


def test_utilisation_by_hand():
    maps = np.array([[0.9, 0.8, 0.1, 0.6], [0.1, 0.2, 0.9, 0.4], [0.0, 0.0, 0.0, 0.0]]).reshape(3, 2, 2, 1)
    table = utilisation(maps).set_index("expert")
    np.testing.assert_allclose(table["mean weight"], [0.6, 0.4, 0.0])
    np.testing.assert_allclose(table["voxels won"], [0.75, 0.25, 0.0])
    of = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (0.9, 0.8, 0.1, 0.6)]
    np.testing.assert_allclose(table["entropy"], np.mean(of) / np.log(3), rtol=1e-6)


def test_two_experts_are_a_choice_already():
    maps = np.array([[0.9, 0.5], [0.1, 0.5]]).reshape(2, 1, 1, 2)
    of = [-(p * np.log2(p) + (1 - p) * np.log2(1 - p)) for p in (0.9, 0.5)]
    np.testing.assert_allclose(utilisation(maps)["entropy"], np.mean(of), rtol=1e-6)


@pytest.mark.parametrize(
    ("maps", "entropy"),
    [(np.full((4, 2, 2, 2), 0.25), 1.0), (np.eye(2).reshape(2, 1, 1, 2), 0.0), (np.ones((1, 2, 2, 2)), 0.0)],
    ids=["even", "hard", "one expert"],
)
def test_entropy_runs_from_hard_to_even(maps, entropy):
    np.testing.assert_allclose(utilisation(maps)["entropy"], entropy, atol=1e-6)


def test_a_checkpointed_block_is_recorded_once(tiny):
    network = MambaHoME(tiny).train()
    network.set_checkpointing(True)
    with trace_routing(network) as trace:
        network(torch.randn(1, 1, 32, 16, 16)).sum().backward()
        places = [(r.stage, r.block) for r in trace.routings]
    assert places == [(stage, block) for stage, depth in enumerate(tiny.depths) for block in range(depth)]
