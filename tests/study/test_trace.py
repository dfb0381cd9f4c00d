"""The trace: level 2 against loops and against what HoME itself reads, gates against what they multiply, reductions, places in space, memory."""

import gc
import itertools

import numpy as np
import pytest
import torch

from homelib import MambaHoME, UserError, trace_routing
from homelib.study.trace import Reduced, Routing, entropy, token_affine


@pytest.fixture
def network(tiny) -> MambaHoME:
    return MambaHoME(tiny).eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 1, 33, 20, 17)


# ---------------------------------------------------------------- level 2, by hand


@pytest.mark.parametrize(("K", "E", "S", "E2", "P"), [(5, 3, 2, 4, 9), (7, 2, 1, 3, 4), (30, 2, 2, 2, 2), (64, 1, 3, 5, 1)], ids=str)
def test_level_2_weights_are_those_of_loops_and_sum_to_one(K, E, S, E2, P):
    D, H, W = grid = (2, 3, 5)
    B, G = 2, -(-D * H * W // K)
    n = E2 * P
    assert n >= G * E * S  # the last entries are fill
    A = torch.randn(B, G, K, E * S).softmax(-1).reshape(B, G, K, E, S)
    combine = torch.randn(B, n, E2 * P).softmax(-1).reshape(B, n, E2, P)
    weights = Routing(0, 0, A, grid, combine=combine).weights(2)
    assert weights.shape == (B, E2, D, H, W)
    for b, e2, d, h, w in itertools.product(*map(range, weights.shape)):
        g, k = divmod((d * H + h) * W + w, K)
        expected = 0.0
        for e, s, p in itertools.product(range(E), range(S), range(P)):
            expected += A[b, g, k, e, s].item() * combine[b, (g * E + e) * S + s, e2, p].item()
        assert weights[b, e2, d, h, w].item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(B, D, H, W), atol=1e-5, rtol=0)


def test_level_2_by_hand():
    A = torch.tensor([[[[[1.0], [0.0]], [[0.25], [0.75]]]]])  # one group of 2 tokens, 2 experts of 1 slot
    combine = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]], [[0.0, 0.0], [0.5, 0.5]]]])  # 2 entries, 2 experts of 2 slots
    routing = Routing(0, 0, A, (1, 1, 2), combine=combine)
    torch.testing.assert_close(routing.weights(2).flatten(), torch.tensor([0.3, 0.25 * 0.3, 0.7, 0.25 * 0.7 + 0.75]))
    assert routing.winner(2).flatten().tolist() == [1, 1]
    assert routing.winner(1).flatten().tolist() == [0, 1]
    torch.testing.assert_close(routing.slots.flatten(), torch.tensor([1.0, 0.25, 0.0, 0.75]))


def test_level_2_weights_are_what_a_token_reads_of_an_experts_output(network, image, tiny):
    """Where every expert's output is its own unit vector, the layer's output holds the weights themselves."""
    read = {}

    def mark(module, args, y):
        return torch.eye(y.shape[-1])[: len(y), None].expand_as(y)

    for stage, layer in enumerate(network.stages):
        layer.blocks[0].home.global_experts.register_forward_hook(mark)
        layer.blocks[0].home.register_forward_hook(lambda module, args, y, stage=stage: read.__setitem__(stage, y))
    with torch.inference_mode(), trace_routing(network) as trace:
        network(image)
    for stage, E2 in enumerate(tiny.experts_global):
        assert E2 <= tiny.channels[stage]
        weights = trace[stage, 0].weights(2)
        torch.testing.assert_close(weights.flatten(2).mT, read[stage][..., :E2], atol=1e-5, rtol=0)
        torch.testing.assert_close(weights.sum(1), torch.ones(2, *trace[stage, 0].grid), atol=1e-5, rtol=0)


def test_gates_are_what_level_1_is_multiplied_by(network, image, tiny):
    entered = {}
    for stage, layer in enumerate(network.stages):
        home = layer.blocks[0].home
        torch.nn.init.normal_(home.group_gate.weight)
        torch.nn.init.normal_(home.expert_gate)
        home.local_experts.register_forward_hook(lambda module, args, y: torch.ones_like(y))
        home.global_norm.register_forward_pre_hook(lambda module, args, stage=stage: entered.__setitem__(stage, args[0]))
    with torch.inference_mode(), trace_routing(network) as trace:
        network(image)
    for stage, z in entered.items():
        routing, S = trace[stage, 0], tiny.slots_per_expert
        assert routing.group_gate.shape == routing.assignment.shape[:2]
        expected = (routing.group_gate[:, :, None] * routing.expert_gate).repeat_interleave(S, 2).flatten(1)
        torch.testing.assert_close(z[..., 0], expected)


def test_dispatch_and_combine_are_the_routers_own(network, image):
    given = []
    network.stages[1].blocks[0].home.global_router.register_forward_hook(lambda module, args, output: given.append(output))
    with torch.inference_mode(), trace_routing(network, [1]) as trace:
        network(image)
    assert torch.equal(trace[1, 0].dispatch, given[0][0])
    assert torch.equal(trace[1, 0].combine, given[0][1])


# ---------------------------------------------------------------- what is kept


def test_a_trace_of_level_1_alone_says_so_when_level_2_is_asked_for(network, image):
    with torch.inference_mode(), trace_routing(network, levels=[1]) as trace:
        network(image)
    assert trace[0, 0].combine is None
    with pytest.raises(UserError, match="level: found 2, which was not watched or did not run"):
        trace[0, 0].weights(2)


@pytest.mark.parametrize(("how", "told"), [({"levels": [3]}, "levels: found 3"), ({"reduce": ["mean"]}, "reduce: found 'mean', expected some of experts")])
def test_an_unknown_level_or_reduction_is_refused(network, how, told):
    with pytest.raises(UserError, match=told), trace_routing(network, **how):
        pass


def test_reductions_are_those_of_the_whole_tensors_in_half_precision(network, image):
    with torch.inference_mode():
        with trace_routing(network) as whole:
            network(image)
        with trace_routing(network, reduce=("experts", "slots", "winner", "entropy")) as reduced:
            network(image)
    for full, small in zip(whole.routings, reduced.routings, strict=True):
        assert isinstance(small, Reduced)
        for level in (1, 2):
            weights = full.weights(level)
            torch.testing.assert_close(small.experts[level], weights.half())
            torch.testing.assert_close(small.entropy[level], entropy(weights, 1).half())
            assert torch.equal(small.winner[level].long(), weights.argmax(1))
        torch.testing.assert_close(small.slots[1], full.slots.half())
        assert torch.equal(small.expert_weights, small.experts[1])
        assert torch.equal(small.groups, full.groups)


def test_what_was_not_asked_for_is_not_kept(network, image):
    with torch.inference_mode(), trace_routing(network, levels=[2], reduce=["winner"]) as trace:
        network(image)
    assert set(trace[0, 0].winner) == {2}
    assert not trace[0, 0].experts
    assert not trace[0, 0].slots


def storage_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}.values())


@pytest.mark.parametrize(("stages", "reduce"), [([3], ()), (None, ("winner",)), ([0], ("experts", "entropy"))], ids=str)
@torch.inference_mode()
def test_memory_is_that_of_the_chosen_stages_and_reductions(network, image, stages, reduce):
    network(image)
    before = storage_bytes()
    with trace_routing(network, stages, reduce=reduce) as trace:
        network(image)
        kept = sum(routing.bytes for routing in trace.routings)
        assert {routing.stage for routing in trace.routings} == set(stages or range(4))
        assert 0 < kept
        assert storage_bytes() - before <= kept + 4096  # gates and indices are small
    with trace_routing(network) as everything:
        network(image)
        assert sum(routing.bytes for routing in everything.routings) > 2 * kept


def test_a_reduced_trace_changes_neither_outputs_nor_gradients(network, image):
    def results():
        network.zero_grad()
        logits = network(image)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    before = results()
    with trace_routing(network, reduce=("experts", "entropy")) as trace:
        during = results()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert not any(tensor.requires_grad for routing in trace.routings for tensor in routing.experts.values())


def test_checkpointed_blocks_are_recorded_once_and_leave_nothing_behind(tiny):
    network = MambaHoME(tiny).train()
    network.set_checkpointing(True)
    x = torch.randn(1, 1, 32, 16, 16)
    with trace_routing(network) as plain, torch.no_grad():
        network(x)
    with trace_routing(network) as trace:
        network(x).sum().backward()
    for a, b in zip(plain.routings, trace.routings, strict=True):
        torch.testing.assert_close(a.weights(2), b.weights(2))


# ---------------------------------------------------------------- places


def test_entropy_runs_from_hard_to_even_and_is_0_of_one_expert():
    weights = torch.tensor([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    torch.testing.assert_close(entropy(weights, 0), torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(entropy(torch.ones(1, 3), 0), torch.zeros(3))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_tokens_place_is_the_mean_of_its_voxels_places(stage):
    rng = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4))
    side, token = 2 ** (stage + 1), np.array([3, 0, 2])
    voxels = [np.array(offset) + side * token for offset in itertools.product(range(side), repeat=3)]
    places = [affine @ [*voxel, 1] for voxel in voxels]
    np.testing.assert_allclose(token_affine(affine, stage) @ [*token, 1], np.mean(places, 0), atol=1e-9)


def test_every_routing_has_its_tokens_affine(network, image):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    with torch.inference_mode():
        with trace_routing(network, affine=affine) as trace:
            network(image)
        with trace_routing(network) as plain:
            network(image)
    np.testing.assert_allclose(trace[1, 0].affine, token_affine(affine, 1))
    np.testing.assert_allclose(plain[1, 0].affine, token_affine(np.eye(4), 1))
