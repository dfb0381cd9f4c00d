"""Weights and checkpoints: the same after reading, refused where they do not fit, whole or not there, and never code."""

import contextlib
import errno
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open

from homelib import UserError
from homelib.config import Settings, override
from homelib.run import checkpoint
from homelib.run.checkpoint import build_network, load_checkpoint, load_newest, load_weights, save_checkpoint, save_weights
from homelib.run.mixture import label_space


@pytest.fixture
def saved(smoke, tmp_path):
    network, path = build_network(smoke), tmp_path / "weights.safetensors"
    save_weights(network, path, smoke)
    return network, path


def test_weights_are_the_same_after_reading(saved, smoke):
    network, path = saved
    other = build_network(smoke)
    assert load_weights(other, path) is other
    for name, tensor in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    x = torch.randn(1, 1, 16, 16, 32)
    with torch.no_grad():
        assert torch.equal(network(x), other(x))


def test_weights_in_another_memory_format_are_saved_alike(saved, smoke, tmp_path):
    network, path = saved
    save_weights(network.to(memory_format=torch.channels_last_3d), tmp_path / "other.safetensors", smoke)
    assert (tmp_path / "other.safetensors").read_bytes() == path.read_bytes()


def test_weights_carry_their_settings_and_classes(saved, smoke):
    with safe_open(saved[1], framework="pt") as file:
        told = json.loads(file.metadata()["run"])
    assert Settings(**told["settings"]) == smoke
    assert tuple(told["classes"]) == label_space(smoke.data).class_names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.hidden_channels": 16}, r"\d+ of another shape \(.*found \(8, .*expected \(16, "),
        ({"network": "SegMamba"}, r"\d+ unexpected \(stages\.0\.blocks\.0\.home"),
        ({"model.depths": (1, 2, 1, 1)}, r"\d+ missing \(stages\.1\.blocks\.1\."),
    ],
)
def test_weights_of_another_network_are_refused_and_none_is_loaded(changes, said, saved, smoke):
    other = build_network(override(smoke, changes))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match=rf"weights\.safetensors: weights of another network: .*{said}") as caught:
        load_weights(other, saved[1])
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "text", "truncated"])
def test_damaged_weights_are_one_line(content, saved, smoke):
    network, path = saved
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=r"weights\.safetensors: damaged or no safetensors file") as caught:
        load_weights(network, path)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_one_line(smoke, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.safetensors: no such file"):
        load_weights(build_network(smoke), tmp_path / "nowhere.safetensors")


def test_a_write_that_fails_leaves_the_old_file(saved, smoke, monkeypatch):
    _, path = saved
    before = path.read_bytes()

    def half_written(state, part, metadata):
        part.write_bytes(b"half")
        raise OSError("disk broken")

    monkeypatch.setattr(checkpoint, "save_file", half_written)
    with pytest.raises(OSError, match="disk broken"):
        save_weights(build_network(smoke), path, smoke)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_holds_tensors_and_plain_values(tmp_path):
    plain = {"history": [{"step": 0, "loss": 0.5}], "betas": (0.9, 0.999), "none": None, "by number": {3: "three"}, "random": (3, (1, 2), None)}
    tensors = {"w": torch.randn(3, 2).T, "step": torch.tensor(7.0), "bytes": torch.get_rng_state(), "empty": torch.zeros(0), "shared": torch.zeros(2)}
    tensors["again"] = tensors["shared"]
    save_checkpoint(tmp_path / "last.ckpt", plain | {"network": tensors})
    found = load_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.equal(found["network"][name], tensor) and found["network"][name].dtype == tensor.dtype for name, tensor in tensors.items())
    del found["network"]
    assert found == plain


def test_a_checkpoint_takes_no_other_objects(tmp_path):
    with pytest.raises(TypeError, match=r"/a/1: a checkpoint holds tensors and plain values, not a ndarray"):
        save_checkpoint(tmp_path / "last.ckpt", {"a": [1, np.zeros(2)]})
    assert not any(tmp_path.iterdir())


def test_two_generations_are_kept_and_the_older_one_stands_in_for_a_damaged_one(tmp_path):
    last, previous, told = tmp_path / "last.ckpt", tmp_path / "previous.ckpt", []
    assert load_newest(last, previous, say=told.append) is None
    for step in (1, 2, 3):
        save_checkpoint(last, {"step": step, "w": torch.full((100,), float(step))}, previous=previous)
    assert load_newest(last, previous, say=told.append)["step"] == 3
    last.write_bytes(last.read_bytes()[:-4] + b"oops")
    state = load_newest(last, previous, say=told.append)
    assert (state["step"], state["w"][0]) == (2, 2)
    assert len(told) == 1
    assert "last.ckpt: damaged or no checkpoint (ValueError: its bytes have changed)" in told[0]
    assert "previous.ckpt is used, of step 2" in told[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.ckpt", "previous.ckpt"]
    save_checkpoint(last, {"step": 4}, previous=previous)  # the good one is not given up for the damaged one
    assert load_checkpoint(previous)["step"] == 2
    for path in (last, previous):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged or no checkpoint"):
        load_newest(last, previous, say=told.append)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(error, tmp_path, monkeypatch):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    for step in (1, 2):
        save_checkpoint(last, {"step": step}, previous=previous)

    def full(tensors, part, metadata):
        part.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"last\.ckpt: no room for 1 MiB on the disk; last\.ckpt is as it was\. Make room") as caught:
        save_checkpoint(last, {"step": 3, "w": torch.zeros(2**18)}, previous=previous)
    assert "\n" not in str(caught.value)
    assert (load_checkpoint(last)["step"], load_checkpoint(previous)["step"]) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("write", [lambda o, p: torch.save(o, p), lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))], ids=["torch", "pickle"])
def test_reading_a_checkpoint_runs_no_code(write, tmp_path):
    write({"network": Evil(tmp_path / "created")}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt: damaged or no checkpoint \(SafetensorError"):
        load_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "created").exists()
    with contextlib.suppress(RuntimeError):  # it would have
        torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "truncated"])
def test_a_damaged_checkpoint_is_one_line(content, tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"network": {"w": torch.randn(1000)}})
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=r"last\.ckpt: damaged or no checkpoint.*Delete it") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
