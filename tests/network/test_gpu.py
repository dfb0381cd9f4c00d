"""HoME and the whole network on a device, in its own precision, against the same in float64 on a CPU; then bfloat16, and steps of a training.

Each runs on the CPU too, so that a machine without a GPU sees whether the test itself is right. Nothing here wants conftest.py: with
`--noconftest`, torch, triton, einops, pydantic and MONAI are enough.
"""

import copy

import pytest
import torch

from homelib import HoME, MambaHoME, ModelConfig
from homelib.run.loss import segmentation_loss

CONFIG = ModelConfig(
    depths=(1, 1, 1, 1), channels=(8, 8, 16, 16), hidden_channels=16, group_size=(512, 64, 8, 4),
    experts_local=(2, 3, 2, 2), experts_global=(4, 4, 2, 2), slots_per_expert=2, state_dim=4,
)  # fmt: skip
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")])


@pytest.fixture(params=["cpu", GPU])
def device(request):
    """On a GPU the last one, for the index must not matter; its convolutions without TF32, whose ten bits would hide a fault (matrix products have none)."""
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield request.param if request.param == "cpu" else f"cuda:{torch.cuda.device_count() - 1}"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return MambaHoME(CONFIG)


@pytest.fixture(scope="module")
def case(network):
    """An input, and what the network makes of it in float64 on the CPU."""
    x = torch.randn(1, 1, 32, 48, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, results(copy.deepcopy(network).double(), x)


def results(module, x, *, half=False):
    """y, and the gradients of the input and of every parameter for one fixed direction, on the CPU in float64."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        y = module(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(direction.to(y.device, y.dtype))
    found = {"y": y, "dx": x.grad} | {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


def apart(ours, exact, names):
    """Largest distance over the largest length, among results by these names. Of a gradient that is zero but for rounding the length says nothing."""
    whole = max(exact[name].norm() for name in names)
    return max((ours[name] - exact[name]).norm() / torch.maximum(exact[name].norm(), 1e-3 * whole) for name in names).item()


@pytest.mark.parametrize("tokens", [24, 21, 1], ids=["full groups", "a group with fill", "one token"])
def test_home_agrees_with_float64_on_a_cpu(tokens, device):
    layer = HoME(16, group_size=8, experts_local=3, slots_per_expert=2, experts_global=7)
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    exact = results(copy.deepcopy(layer).double(), x)
    ours = results(layer.to(device), x.float().to(device))
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert apart(ours, exact, ["y"]) < 1e-5
    assert apart(ours, exact, [name for name in exact if name != "y"]) < 1e-4


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d], ids=["contiguous", "channels last"])
def test_the_network_agrees_with_float64_on_a_cpu(memory, device, network, case):
    """Gradients by a looser bound: in any other order of additions a LeakyReLU's input next to zero may change its sign (test_parity tells of one)."""
    x, exact = case
    ours = results(copy.deepcopy(network).to(device, memory_format=memory), x.float().to(device).contiguous(memory_format=memory))
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert apart(ours, exact, ["y"]) < 1e-4
    assert apart(ours, exact, ["dx"]) < 1e-2
    assert apart(ours, exact, [name for name in exact if name not in ("y", "dx")]) < 1e-2


def test_under_autocast_all_is_finite_and_near(device, network, case):
    x, exact = case
    ours = results(copy.deepcopy(network).to(device), x.float().to(device), half=True)
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())
    assert 0 < apart(ours, exact, ["y"]) < 0.05
    assert apart(ours, exact, ["dx"]) < 0.3


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_steps_of_a_training_lower_the_loss_and_keep_all_weights_finite(half, device, network):
    model = copy.deepcopy(network).to(device, memory_format=torch.channels_last_3d)
    model.set_checkpointing((True, False, True, False))
    x = torch.randn(1, 1, 32, 32, 16, device=device)
    label = (x > 0.5).long() + (x > 1).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            logits = model(x)
        loss = segmentation_loss(logits, label)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
