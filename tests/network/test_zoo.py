"""The zoo: parameters beside the paper's, any size in and out, weights kept once, and weights of SuPreM and VoCo."""

import copy
import typing

import pytest
import torch

from homelib import ModelConfig, UserError
from homelib.config import OURS, Network, preset
from homelib.network import zoo
from homelib.network.summary import OTHERS as OTHERS_PART
from homelib.network.summary import PARTS, parameters_by_part
from homelib.network.swin_weights import is_swin, swin_state
from homelib.run.checkpoint import build_network, load_weights, save_weights
from homelib.run.initialise import start_from, summary
from homelib.run.optimise import Averaged

OTHERS = [name for name in zoo.ZOO if name not in (*OURS, "UNet")]
NARROW = {"SwinUNETR": 12, "SwinUNETR-V1": 12, "UNETR": 2, "SegResNet": 8, "DynUNet": 4, "ResEncUNet": 4, "MedNeXt": 2}
PATCH = (32, 32, 64)
MILLIONS = {"MambaHoME": 170.1, "SegMamba": 66.07, "SwinUNETR": 72.8, "SwinUNETR-V1": 62.2}


def parameters(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def built(name: str, config: ModelConfig | None = None, patch=PATCH):
    """On "meta" where that can be; skipped where its package is not installed."""
    if name == "ResEncUNet":
        pytest.importorskip("dynamic_network_architectures", reason="dynamic-network-architectures (the extra `zoo`) is not installed")
    config = config or ModelConfig()
    if name.startswith("SwinUNETR"):  # looks at a number while it is built
        return zoo.build(name, config, patch)
    with torch.device("meta"):
        return zoo.build(name, config, patch)


def narrow(name: str, **sizes):
    if name == "ResEncUNet":
        pytest.importorskip("dynamic_network_architectures", reason="dynamic-network-architectures (the extra `zoo`) is not installed")
    torch.manual_seed(0)
    return zoo.build(name, ModelConfig(width=NARROW.get(name), **sizes), PATCH)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_parameters_by_part_are_all_of_them(name):
    network = narrow(name, channels=(4, 4, 8, 8), hidden_channels=8) if name == "UNet" or name.startswith("Swin") else built(name)
    parts = parameters_by_part(network)
    assert parts.sum() == parameters(network) > 0
    assert list(parts.index) == (list(PARTS) if name in OURS else [OTHERS_PART])
    assert name not in OURS or (parts.drop("HoME") > 0).all()
    assert name != "MambaHoME" or parts["HoME"] > 0


def test_every_name_of_the_settings_is_in_the_zoo():
    assert set(typing.get_args(Network)) == set(zoo.ZOO)


@pytest.mark.parametrize("name", MILLIONS)
def test_parameters_are_the_papers(name):
    """Table 1, with 3 classes. Of SegMamba the paper prints 66.8, that of its own code, which has 0.78 M of MLPs on the skips besides."""
    millions = parameters(built(name)) / 1e6
    assert millions == pytest.approx(MILLIONS[name], abs=0.05)
    assert millions + (0.78 if name == "SegMamba" else 0) == pytest.approx(zoo.ZOO[name].paper_millions, abs=0.06)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("UNETR", 92.8), ("SegResNet", 18.8), ("DynUNet", 31.2), ("ResEncUNet", 102.4), ("MedNeXt", 61.8), ("VNet", 45.6)],
)
def test_parameters_of_the_others_are_as_published(name, millions):
    patch = (96, 96, 96) if name == "UNETR" else (128, 128, 128)
    assert parameters(built(name, patch=patch)) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", OTHERS)
def test_any_size_goes_in_and_comes_out_and_gradients_reach_every_parameter(name):
    network = narrow(name, in_channels=1, out_channels=4).train()
    y = network(torch.randn(2, 1, 30, 17, 61))
    assert y.shape == (2, 4, 30, 17, 61)
    y.square().mean().backward()
    assert not [n for n, p in network.named_parameters() if (p.grad is None) == p.requires_grad]
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 1, 9, 20, 16)).shape == (1, 4, 9, 20, 16)


@pytest.mark.parametrize("name", OTHERS)
def test_weights_are_kept_once_and_come_back(name, tmp_path):
    network = narrow(name)
    storages = [tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values() if tensor.numel()]
    assert len(set(storages)) == len(storages)
    save_weights(network, tmp_path / "w.safetensors", preset("smoke"))
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_weights(other, tmp_path / "w.safetensors")
    x = torch.randn(1, 1, *PATCH)
    with torch.no_grad():
        assert torch.equal(network.eval()(x), other.eval()(x))


def test_averaged_weights_of_a_network_that_names_its_parts_twice_come_back():
    network = narrow("DynUNet")
    average = Averaged(network, 0.9)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    average.swap(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    average.swap(network)
    assert all(torch.equal(tensor, before[name] + 1) for name, tensor in network.named_parameters())


def test_strides_are_those_of_nnunets_plans():
    assert zoo.strides((128, 128, 128)) == [(1, 1, 1)] + [(2, 2, 2)] * 5
    assert zoo.strides((192, 192, 48)) == [(1, 1, 1)] + [(2, 2, 2)] * 3 + [(2, 2, 1)] * 2


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("SwinUNETR", {"width": 13}, r"model\.width: found 13 for network SwinUNETR, expected a multiple of 12 \(published: 48\)"),
        ("VNet", {"width": 8}, r"model\.width: found 8 for network VNet, expected none, for it has one form only"),
        ("VNet", {"in_channels": 3}, r"model\.in_channels: found 3 for network VNet, expected a divisor of 16"),
    ],
)
def test_what_a_network_cannot_have_is_one_line(name, config, told):
    with pytest.raises(UserError, match=rf"^{told}"):
        zoo.build(name, ModelConfig(**config), PATCH)


def test_unetr_says_what_is_too_large_for_its_positions():
    with pytest.raises(UserError, match=r"^input: found 33x32x64 voxels, expected at most 32x32x64, the training patch, for UNETR\.$"):
        narrow("UNETR")(torch.zeros(1, 1, 33, 32, 64))


def test_a_network_of_a_package_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dynamic_network_architectures.architectures.unet", None)
    with pytest.raises(UserError, match=r"^network: ResEncUNet needs dynamic-network-architectures, .*: pip install 'homelib\[zoo\]'\.$"):
        zoo.build("ResEncUNet", ModelConfig(), PATCH)


def test_networks_of_others_take_gradients_as_in_their_own_memory_format(smoke):
    """PyTorch's instance norm has a wrong gradient for a batch of one with channels last on a CPU; theirs are not put into it."""
    network = build_network(smoke.model_copy(update={"network": "UNet"}))
    x = torch.randn(1, 1, 32, 32, 32)
    found = torch.autograd.grad(network(x).square().mean(), list(network.parameters()))
    double = copy.deepcopy(network).double()
    expected = torch.autograd.grad(double(x.double()).square().mean(), list(double.parameters()))
    for name, a, b in zip(dict(network.named_parameters()), found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-4 * max(float(t.abs().max()) for t in expected), msg=name)


# ---------------------------------------------------------------- weights of others


def suprem(network) -> dict:
    """As SuPreM's checkpoints name them, with what else is in such a file."""
    backbone = {f"module.backbone.{name}": torch.full_like(tensor, 0.5) for name, tensor in network.state_dict().items() if not name.startswith("out.")}
    return {"net": backbone | {"module.organ_embedding": torch.zeros(25, 256)}, "epoch": 800, "optimizer": {}}


def voco(network) -> dict:
    """As VoCo's: the backbone under another name, no decoder."""
    return {f"module.swin_vit.{name[8:]}": torch.full_like(tensor, 0.25) for name, tensor in network.state_dict().items() if name.startswith("swinViT.")}


@pytest.mark.parametrize(("name", "write", "value"), [("SwinUNETR-V1", suprem, 0.5), ("SwinUNETR", voco, 0.25)])
def test_suprem_and_voco_are_started_from_and_it_is_told(name, write, value, tmp_path):
    network = narrow(name)
    assert is_swin(network)
    head = network.out.conv.conv.weight.detach().clone()
    torch.save(write(network), tmp_path / "theirs.pth")
    table = start_from(network, tmp_path / "theirs.pth", ("background", "a", "b"))
    taken = table[table["what"] == "taken"]["tensor"]
    assert len(taken)
    state = network.state_dict()
    assert all((state[n] == value).all() for n in taken if state[n].is_floating_point())
    assert {n for n in state if n.startswith("swinViT.")} <= set(taken)
    assert torch.equal(network.out.conv.conv.weight, head)
    left = 1 if write is suprem else 0
    new = sum(not n.startswith("swinViT.") for n in state) if write is voco else sum(n.startswith("out.") for n in state)
    assert summary(table) == f"{len(state) - new} tensors taken, 0 tensors resized, {new} tensors new, {left} tensors left"


def test_a_backbone_of_another_swin_unetr_is_refused(tmp_path):
    first, second = narrow("SwinUNETR-V1"), narrow("SwinUNETR")
    with pytest.raises(UserError, match=r"the backbone is of another Swin UNETR: \d+ tensors missing \(swinViT\.layers1c.*SuPreM's go into SwinUNETR-V1"):
        swin_state(suprem(first), second)
    with pytest.raises(UserError, match=r"\d+ tensors not in this network \(swinViT\.layers1c"):
        swin_state(voco(second), first)
    wider = zoo.build("SwinUNETR-V1", ModelConfig(width=24), PATCH)
    torch.save(suprem(wider), tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"^training\.init_from: .*wide\.pth: weights: .* tensors of another shape \(swinViT\.") as caught:
        start_from(first, tmp_path / "wide.pth", ("background", "a", "b"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"found 1 tensors, none of a Swin UNETR's backbone"):
        swin_state({"net": {"a": torch.zeros(1)}}, first)
