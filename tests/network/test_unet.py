"""The U-shaped network: any size in and the same out, padding, checkpointing, its parts, its errors. That it computes what the authors' does: test_parity."""

import pytest
import torch

from homelib import DynamicTanh, MambaHoME, ModelConfig, SegMamba, UserError
from homelib.network.unet import Block, pad


@pytest.fixture(scope="module")
def network(tiny):
    """In eval mode, with a fixed random start."""
    torch.manual_seed(1)
    return MambaHoME(tiny).eval()


SIZES = [(40, 33, 48), (17, 50, 19), (16, 16, 16), (1, 1, 1), (5, 7, 3), (16, 1, 33)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_any_size_gives_logits_of_that_size(network, size):
    y = network(torch.randn(1, 1, *size))
    assert y.shape == (1, 3, *size)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_zeros_are_added_at_the_end_up_to_multiples_of_16(size):
    x = torch.randn(1, 1, *size)
    padded = pad(x)
    assert all(side % 16 == 0 and 0 <= side - old < 32 for side, old in zip(padded.shape[2:], size, strict=True))
    assert padded[0, 0].numel() > 16**3  # else the deepest stage has one voxel, which no norm can take
    assert torch.equal(padded[..., : size[0], : size[1], : size[2]], x)
    assert padded.count_nonzero() == x.count_nonzero()


def test_a_size_that_fits_is_not_padded():
    x = torch.randn(1, 1, 16, 32, 48)
    assert pad(x) is x


@torch.no_grad()
def test_the_output_is_that_of_the_padded_input_cut_to_size(network):
    x = torch.randn(1, 1, 20, 33, 17)
    assert torch.equal(network(x), network(pad(x))[..., :20, :33, :17])


@torch.no_grad()
def test_volumes_of_a_batch_do_not_see_each_other(network):
    x = torch.randn(2, 1, 32, 16, 16)
    torch.testing.assert_close(network(x), torch.cat([network(x[:1]), network(x[1:])]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_same_input_gives_the_same_output_in_eval_and_in_training_mode(network):
    x = torch.randn(1, 1, 16, 32, 16)
    first = network(x)
    assert torch.equal(network(x), first)
    assert torch.equal(network.train()(x), first)  # nothing in it is random, or remembers
    network.eval()


@torch.no_grad()
def test_features_halve_from_stage_to_stage_and_are_normalised(network, tiny):
    features = network.forward_features(torch.randn(2, 1, 48, 32, 64))
    assert [tuple(f.shape) for f in features] == [(2, c, 48 >> i, 32 >> i, 64 >> i) for i, c in enumerate(tiny.channels, start=1)]
    for f in features:
        torch.testing.assert_close(f.mean((2, 3, 4)), torch.zeros(f.shape[:2]), rtol=0, atol=1e-4)
        torch.testing.assert_close(f.var((2, 3, 4), correction=0), torch.ones(f.shape[:2]), rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16, 16), (1, 16, 16, 16), (1, 1, 16, 16), (1, 1, 0, 16, 16)], ids=str)
def test_an_input_of_another_shape_is_refused_in_one_line(network, shape):
    with pytest.raises(UserError, match=r"^input: found shape .*expected \(B, 1, D, H, W\)\.$"):
        network(torch.zeros(shape))


@torch.no_grad()
def test_two_input_channels_are_both_read(tiny):
    network = MambaHoME(tiny.model_copy(update={"in_channels": 2})).eval()
    x = torch.randn(1, 2, 16, 16, 32)
    y = network(x)
    assert y.shape == (1, 3, 16, 16, 32)
    for channel in (0, 1):
        other = x.clone()
        other[:, channel] = 0
        assert not torch.allclose(network(other), y, atol=1e-3)


def test_segmamba_is_the_same_network_without_home(tiny):
    ours, theirs = set(SegMamba(tiny).state_dict()), set(MambaHoME(tiny).state_dict())
    assert ours < theirs
    assert all(".home." in name or ".home_norm." in name for name in theirs - ours)
    assert not any("home" in name for name in ours)
    with torch.no_grad():
        assert SegMamba(tiny)(torch.zeros(1, 1, 16, 16, 32)).shape == (1, 3, 16, 16, 32)


def test_the_config_reaches_every_stage(tiny):
    network = MambaHoME(tiny.model_copy(update={"depths": (1, 2, 1, 3), "scan_backend": "reference"}))
    assert [len(stage.blocks) for stage in network.stages] == [1, 2, 1, 3]
    for i, stage in enumerate(network.stages):
        for block in stage.blocks:
            home, mamba = block.home, block.mamba
            assert (home.group_size, home.local_router.slots) == (tiny.group_size[i], tiny.slots_per_expert)
            assert (home.local_router.experts, home.global_router.experts) == (tiny.experts_local[i], tiny.experts_global[i])
            assert mamba.A_log.shape == (tiny.expand * tiny.channels[i], tiny.state_dim)
            assert mamba.conv1d.kernel_size == (tiny.conv_width,)
            assert mamba.backend == "reference"


@torch.no_grad()
def test_the_scans_backend_changes_neither_weights_nor_output(network, tiny):
    other = MambaHoME(tiny.model_copy(update={"scan_backend": "reference"})).eval()
    other.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, 16, 16, 32)
    torch.testing.assert_close(other(x), network(x), rtol=1e-4, atol=1e-4)


def output_and_gradients(network, x):
    calls = []
    hooks = [block.register_forward_pre_hook(lambda *_, stage=i: calls.append(stage)) for i, s in enumerate(network.stages) for block in s.blocks]
    network.zero_grad()
    y = network(x)
    y.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return y.detach(), [p.grad.clone() for p in network.parameters()], sorted(calls)


@pytest.mark.parametrize(
    ("on", "calls"),
    [(True, [0, 0, 1, 1, 2, 2, 3, 3]), ((True, False, True, False), [0, 0, 1, 2, 2, 3]), ([False, False, False, True], [0, 1, 2, 3, 3]), (False, [0, 1, 2, 3])],
    ids=str,
)
def test_checkpointing_recomputes_the_asked_stages_and_changes_nothing(tiny, on, calls):
    network, x = MambaHoME(tiny), torch.randn(1, 1, 16, 32, 16)
    y, gradients, once = output_and_gradients(network, x)
    assert once == [0, 1, 2, 3]
    network.set_checkpointing(on)
    y_again, gradients_again, seen = output_and_gradients(network, x)
    assert seen == calls
    assert torch.equal(y_again, y)
    assert all(torch.equal(a, b) for a, b in zip(gradients_again, gradients, strict=True))


def test_checkpointing_recomputes_wherever_a_backward_pass_may_follow_and_nowhere_else(tiny):
    network, x = MambaHoME(tiny).eval(), torch.randn(1, 1, 16, 32, 16)
    network.set_checkpointing(True)
    assert output_and_gradients(network, x)[2] == [0, 0, 1, 1, 2, 2, 3, 3]  # weights are fixed, a gradient is asked for: of a saliency map, say
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert network(x).grad_fn is None
    assert not kept


def test_checkpointing_wants_one_value_or_four(network):
    with pytest.raises(UserError, match="found 2 values"):
        network.set_checkpointing((True, False))
    assert not any(stage.checkpointing for stage in network.stages)


@pytest.mark.parametrize(("alpha", "used"), [(-1.0, 0.1), (0.05, 0.1), (0.5, 0.5), (1.9, 1.9), (7.0, 2.0)])
def test_dynamic_tanh_keeps_alpha_in_its_range(alpha, used):
    layer, x = DynamicTanh(3), torch.randn(4, 3)
    layer.weight.data, layer.bias.data = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 0.5, 1.0])
    layer.alpha.data.fill_(alpha)
    torch.testing.assert_close(layer(x), torch.tanh(used * x) * layer.weight + layer.bias)
    layer(x).sum().backward()
    assert (layer.alpha.grad != 0).item() == (alpha == used)


def test_dynamic_tanh_starts_as_the_paper_says():
    layer = DynamicTanh(3)
    assert (layer.alpha.item(), layer.weight.tolist(), layer.bias.tolist()) == (0.5, [1.0] * 3, [0.0] * 3)


class Times(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, t, grid):
        return self.factor * t


def test_a_block_adds_mamba_then_home_to_what_it_gets():
    block, t = Block(3, Times(2), Times(-5)), torch.randn(1, 5, 3)
    after_mamba = t + 2 * torch.tanh(0.5 * t)
    torch.testing.assert_close(block(t, (1, 1, 5)), after_mamba - 5 * torch.tanh(0.5 * after_mamba))
    torch.testing.assert_close(Block(3, Times(2), None)(t, (1, 1, 5)), after_mamba)


def test_without_a_config_it_is_the_papers():
    with torch.device("meta"):
        assert MambaHoME().config == ModelConfig()


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last_changes_no_value(tiny, batch):
    """Other norms and convolutions run then. Beside the network in float64, rounding tells itself from error: the layout adds little to it."""
    network, x = MambaHoME(tiny), torch.randn(batch, 1, 20, 33, 32)

    def outputs(network, x):
        y = network(x)
        gradients = torch.autograd.grad(y.square().mean(), list(network.parameters()))
        return y, torch.cat([gradient.flatten() for gradient in gradients])

    plain, last = outputs(network, x), outputs(network.to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d))
    for exact, a, b in zip(outputs(network.double(), x.double()), plain, last, strict=True):
        a, b = ((t - exact).norm().item() for t in (a, b))
        assert b < 3 * a + 1e-3 * exact.norm().item()


def test_every_layer_keeps_channels_last(tiny):
    """One that did not would have its neighbours copy."""
    network, seen = MambaHoME(tiny).to(memory_format=torch.channels_last_3d), []

    def look(module, inputs, output):
        if not list(module.children()) and torch.is_tensor(output) and output.dim() == 5:
            seen.append(output.is_contiguous(memory_format=torch.channels_last_3d))

    for module in network.modules():
        module.register_forward_hook(look)
    network(torch.randn(2, 1, 32, 32, 48).to(memory_format=torch.channels_last_3d))
    assert len(seen) > 60 and all(seen)
