"""Weights to start from: everything that fits is taken and told; and what was learnt on one modality helps on another."""

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from homelib import UserError
from homelib.config import override
from homelib.network.published import to_published
from homelib.run.checkpoint import build_network, save_weights, trained_network
from homelib.run.cohort import cohort
from homelib.run.initialise import start_from, summary
from homelib.run.mixture import label_space
from homelib.run.train import fit


@pytest.fixture
def names(smoke):
    return label_space(smoke.data).class_names


@pytest.fixture
def source(smoke, tmp_path):
    torch.manual_seed(1)
    network = build_network(smoke)
    save_weights(network, tmp_path / "source.safetensors", smoke)
    return network, tmp_path / "source.safetensors"


def as_of_old(network, path, settings) -> None:
    """Weights as they were kept before files named their classes."""
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, metadata={"settings": settings.model_dump_json()})


def same(a, b, *, but=()) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return all(torch.equal(own[name], other[name]) for name in own if not name.startswith(tuple(but) or ("?",)))


def test_the_same_network_takes_everything(source, smoke, names):
    network = build_network(smoke)
    table = start_from(network, source[1], names)
    assert set(table["what"]) == {"taken"}
    assert same(network, source[0])
    assert summary(table) == f"{len(table)} tensors taken, 0 tensors resized, 0 tensors new, 0 tensors left"


def test_the_authors_layout_is_read_with_its_experts(source, smoke, names, tmp_path):
    path = tmp_path / "authors.pth"
    torch.save({"model": {f"module.{name}": tensor.clone() for name, tensor in to_published(source[0]).items()}}, path)
    network = build_network(smoke)
    before = network.head.weight.detach().clone()
    table = start_from(network, path, names).set_index("tensor")
    assert table.loc["head.weight", "what"] == table.loc["head.bias", "what"] == "new"  # which classes it tells apart the file does not say
    assert torch.equal(network.head.weight, before)
    assert set(table["what"].drop(["head.weight", "head.bias"])) == {"taken"}
    assert set(start_from(network, path, names, head="as_it_is")["what"]) == {"taken"}
    assert same(network, source[0])


def test_classes_are_known_by_the_file_though_its_manifest_is_gone(source, smoke, names, tmp_path):
    """Of as many rows, others' classes; and one whose data set nobody here knows."""
    for classes, what in ((names, "taken"), (names[:2] + tuple(f"other_{n}" for n in range(7)), "resized")):
        save_weights(source[0], tmp_path / "own.safetensors", override(smoke, {"data.manifest": "/gone/own.yaml"}), class_names=classes)
        network = build_network(smoke)
        assert start_from(network, tmp_path / "own.safetensors", names).set_index("tensor").loc["head.weight", "what"] == what
    as_of_old(source[0], tmp_path / "own.safetensors", override(smoke, {"data.manifest": "/gone/own.yaml"}))
    assert start_from(build_network(smoke), tmp_path / "own.safetensors", names).set_index("tensor").loc["head.weight", "what"] == "new"


def test_weights_of_before_classes_were_named_tell_them_by_their_data_set(source, smoke, names, tmp_path):
    as_of_old(source[0], tmp_path / "old.safetensors", smoke)
    assert set(start_from(build_network(smoke), tmp_path / "old.safetensors", names)["what"]) == {"taken"}


def test_a_new_head_for_new_classes_keeps_the_rows_of_those_that_have_a_namesake(source, smoke, names):
    ours = ("background", "tumour", "liver")
    network = build_network(override(smoke, {"model.out_channels": 3}))
    before = network.head.weight.detach().clone()
    table = start_from(network, source[1], ours).set_index("tensor")
    assert table.loc["head.weight"].tolist() == ["resized", "9x4x1x1x1", "3x4x1x1x1"]
    found = network.head.weight.detach()
    for row, name in enumerate(ours):
        expected = source[0].head.weight[names.index(name)] if name in names else before[row]
        torch.testing.assert_close(found[row], expected)
    assert same(network, source[0], but=("head.",))


def test_a_head_of_other_classes_alone_is_new(source, smoke):
    network = build_network(override(smoke, {"model.out_channels": 2}))
    before = network.head.weight.detach().clone()
    table = start_from(network, source[1], ("background", "tumour")).set_index("tensor")
    assert (table.loc["head.weight", "what"], table.loc["head.bias", "what"]) == ("new", "new")
    assert torch.equal(network.head.weight, before)


def test_as_many_classes_of_other_names_are_not_taken_for_the_same(source, smoke, names):
    network = build_network(smoke)
    table = start_from(network, source[1], ("background", *(f"other_{n}" for n in range(8)))).set_index("tensor")
    assert table.loc["head.weight", "what"] == "new"


def test_more_slots_take_what_there_is(source, smoke, names):
    wider = build_network(override(smoke, {"model.slots_per_expert": 3}))
    own = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    table = start_from(wider, source[1], names)
    resized = table[table["what"] == "resized"]["tensor"]
    assert len(resized)
    for name in resized:
        theirs, ours = source[0].state_dict()[name], wider.state_dict()[name]
        cut = tuple(slice(0, n) for n in theirs.shape)
        assert torch.equal(ours[cut], theirs)
        rest = torch.ones(ours.shape, dtype=torch.bool)
        rest[cut] = False
        assert torch.equal(ours[rest], own[name][rest])


def test_another_kind_of_network_takes_what_it_shares_and_tells_what_is_left(source, smoke, names):
    network = build_network(override(smoke, {"network": "SegMamba"}))
    table = start_from(network, source[1], names)
    left = table[table["what"] == "left"]["tensor"]
    assert left.str.contains(".home").all()
    assert set(table["what"]) == {"taken", "left"}


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (None, r"no such file; expected a run folder"),
        (lambda path: path.write_bytes(b"nothing"), r"cannot be read as tensors alone \("),
        (lambda path: torch.save([1], path), r"found a list, expected names and tensors"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), r"found 1 tensors, none of which fits MambaHoME"),
    ],
)
def test_what_cannot_be_started_from_is_one_line(write, told, smoke, names, tmp_path):
    path = tmp_path / "weights.pt"
    if write:
        write(path)
    with pytest.raises(UserError, match=rf"^training\.init_from: .*{told}") as caught:
        start_from(build_network(smoke), path, names)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_what_was_learnt_on_ct_helps_on_an_mri_like_set_of_other_patients(ct_set, mri_set, brief, tmp_path):
    """The paper's CT -> MRI in small: 30 steps on CT, then the same few steps on MRI from there and from a random start. Classes are fewer, order another."""
    learn = {"training.steps": 30, "training.validate_every": 30, "training.learning_rate": 0.02, "model.channels": (8, 8, 8, 8), "training.batch_size": 2}
    pretrained = cohort(override(brief, learn), [ct_set.set], fold=0)
    run = fit(override(pretrained.settings, {"data.validation_cases": ()}), pretrained.train, tmp_path / "ct", progress=False)
    few = learn | {"training.steps": 6, "training.validate_every": 6, "training.learning_rate": 0.005}
    losses = {}
    for name, more in (("random", {}), ("from ct", {"training.init_from": str(run.folder), "training.frozen_steps": 2, "training.layer_rate": 0.8})):
        made = cohort(override(brief, few | more), [mri_set.set])
        assert made.settings.model.out_channels == 4
        tuned = fit(made.settings, made.train, tmp_path / name, validation=made.validation, progress=False)
        losses[name] = tuned.history["loss"].mean()
    assert losses["from ct"] < losses["random"] - 0.1
    table = pd.read_csv(tuned.initial_file).set_index("tensor")
    assert table.loc["head.weight", "what"] == "resized"
    assert (table["what"] == "taken").sum() > 100
    again = fit(made.settings, made.train, tuned.folder, validation=made.validation, progress=False)  # finished: nothing is loaded over it
    assert same(trained_network(again), trained_network(tuned))
