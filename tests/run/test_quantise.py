"""Weights in few bits: no value is off by more than half a step of its row, what must not be rounded is not, and what is damaged is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from homelib.errors import UserError
from homelib.run.checkpoint import build_network, load_weights, save_weights
from homelib.run.initialise import start_from
from homelib.run.mixture import label_space
from homelib.run.quantise import dequantise, quantise

FEW = range(2, 9)


@pytest.fixture
def state():
    random = torch.Generator().manual_seed(0)
    some = lambda *shape: torch.randn(*shape, generator=random) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=random)  # noqa: E731
    return {
        "linear.weight": some(5, 13),
        "experts.weight_in": some(3, 7, 11),
        "conv.weight": some(4, 3, 3, 3, 3),
        "conv1d.weight": some(6, 1, 4),
        "mamba.A_log": some(6, 16),
        "experts.bias_in": some(3, 20),
        "norm.weight": some(9),
        "steps": torch.tensor(7),
    }


ROWS = {"linear.weight": (5, 13), "experts.weight_in": (21, 11), "conv.weight": (4, 81)}


@pytest.mark.parametrize("bits", FEW)
def test_no_value_is_off_by_more_than_half_a_step_of_its_row(bits, state):
    back = dequantise(*quantise(state, bits))
    assert list(back) == list(state)
    for name, shape in ROWS.items():
        rows, again = (these[name].double().numpy().reshape(shape) for these in (state, back))
        step = np.abs(rows).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        assert (np.abs(rows - again) <= step * (0.5 + 1e-5)).all()
        assert len(np.unique(again[0])) <= 2**bits - 1
        np.testing.assert_allclose(np.abs(again).max(1), np.abs(rows).max(1), rtol=1e-6)
        assert again.dtype == np.float64
    for name in state.keys() - ROWS.keys():
        assert torch.equal(back[name], state[name])


@pytest.mark.parametrize("bits", FEW)
def test_codes_take_so_many_bits_and_stand_as_they_are_told(bits):
    """Of a row of all multiples there are: 0, 1, 2 ... one after the other, lowest bit first."""
    most = 2 ** (bits - 1) - 1
    row = torch.arange(-most, most + 1).float()[None].repeat(1, 4)  # a row of 8 at least
    tensors, told = quantise({"w.weight": row}, bits)
    assert json.loads(json.dumps(told)) == {"bits": bits, "shapes": {"w.weight": list(row.shape)}}
    assert tensors["w.weight"].dtype == torch.uint8
    stream = sum(code << (bits * place) for place, code in enumerate(list(range(2 * most + 1)) * 4))
    assert tensors["w.weight"].numpy().tobytes() == stream.to_bytes(-(-row.numel() * bits // 8), "little")
    assert tensors["w.weight.scale"].tolist() == [1.0]
    assert torch.equal(dequantise(tensors, told)["w.weight"], row)


def test_a_row_of_zeros_stays_one_and_32_bits_change_nothing(state):
    state["linear.weight"][2] = 0
    assert not dequantise(*quantise(state, 4))["linear.weight"][2].any()
    tensors, told = quantise(state, 32)
    assert told == {}
    assert dequantise(tensors, told) == state


@pytest.mark.parametrize("bits", [0, 1, 9, 16, 33])
def test_other_bits_are_refused(bits, state):
    with pytest.raises(UserError, match=rf"^--bits: found {bits}, expected 2 to 8, or 32 for weights as they are\.$"):
        quantise(state, bits)


def test_what_is_not_finite_is_refused(state):
    state["conv.weight"][1, 1, 1, 1, 1] = torch.nan
    with pytest.raises(UserError, match=r"^conv\.weight: found values that are not finite"):
        quantise(state, 6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, told: told.update(bits=7), r"linear\.weight: its codes and scales are not those of a tensor of shape \(5, 13\) in 7 bits"),
        (lambda tensors, told: told.update(bits=32), "bits: found 32, expected 2 to 8"),
        (lambda tensors, told: told["shapes"].update({"linear.weight": [5, 14]}), r"linear\.weight: .*\(5, 14\)"),
        (lambda tensors, told: told["shapes"].update({"linear.weight": []}), r"linear\.weight: .*\(\)"),
        (lambda tensors, told: told["shapes"].update({"linear.weight": ["x"]}), "expected bits and shapes"),
        (lambda tensors, told: told["shapes"].update({"gone": [8, 8]}), r"gone: .*\(8, 8\)"),
        (lambda tensors, told: told.pop("shapes"), "expected bits and shapes of rounded tensors"),
        (lambda tensors, told: tensors.pop("conv.weight.scale"), r"conv\.weight: its codes"),
        (lambda tensors, told: tensors.update({"conv.weight": tensors["conv.weight"][:-1]}), r"conv\.weight: its codes"),
    ],
)
def test_tensors_that_are_not_what_is_told_of_them_are_refused(change, said, state):
    tensors, told = quantise(state, 6)
    change(tensors, told)
    with pytest.raises(UserError, match=said) as caught:
        dequantise(tensors, told)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- as files


@pytest.fixture(scope="module")
def saved(smoke, tmp_path_factory):
    torch.manual_seed(0)
    network = build_network(smoke)
    path = tmp_path_factory.mktemp("rounded") / "weights.safetensors"
    save_weights(network, path, smoke, bits=6)
    return network, path


def told_of(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_file_of_few_bits_is_read_like_any_other(saved, smoke):
    network, path = saved
    read, started = build_network(smoke), build_network(smoke)
    load_weights(read, path)
    table = start_from(started, path, label_space(smoke.data).class_names)
    assert set(table["what"]) == {"taken"}
    expected = dequantise(*quantise({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, 6))
    for own in (read.state_dict(), started.state_dict()):
        assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(expected[name], tensor) for name, tensor in network.state_dict().items())


def test_a_byte_that_changed_in_a_rounded_file_is_seen(saved, smoke, tmp_path):
    path = tmp_path / "weights.safetensors"
    content = bytearray(saved[1].read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path}: damaged: its bytes are not those that were written.*export the run again\.$"):
        load_weights(build_network(smoke), path)
    with pytest.raises(UserError, match="^training.init_from: .*damaged: its bytes"):
        start_from(build_network(smoke), path, ())


def test_a_truncated_rounded_file_and_another_header_are_one_line(saved, smoke, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(saved[1].read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or no safetensors file"):
        load_weights(build_network(smoke), path)
    about = json.loads(told_of(saved[1])["run"])
    for change, said in (({"bits": 5}, r"its codes and scales .* in 5 bits\. Restore it"), ({"crc32": 1}, "damaged: its bytes")):
        save_file(load_file(saved[1]), path, metadata={"run": json.dumps(about | {"rounded": about["rounded"] | change})})
        with pytest.raises(UserError, match=said) as caught:
            load_weights(build_network(smoke), path)
        assert "\n" not in str(caught.value)
    save_file(load_file(saved[1]), path)  # the header is gone: codes are then weights of another network
    with pytest.raises(UserError, match="weights of another network"):
        load_weights(build_network(smoke), path)
