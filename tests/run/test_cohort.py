"""A user's data: from prepared cases to runs, fold by fold, alone or with others of different labels."""

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from homelib import UserError
from homelib.config import override, preset
from homelib.data.check import kept_folder
from homelib.data.cohort import case_path, prepare_all
from homelib.data.layouts import find_cases
from homelib.data.manifest import load_manifest
from homelib.data.prepare import Preparation
from homelib.run import cohort as module
from homelib.run.checkpoint import build_network, save_weights
from homelib.run.cohort import DataSet, cohort, folds_of
from homelib.run.folder import Run
from homelib.run.initialise import start_from
from homelib.run.mixture import Mixture, label_space
from homelib.run.step import train_step
from homelib.run.train import fit
from homelib.study.folds import by_class, collect, train_folds

OWN = {"data.patch_voxels": (16, 16, 16)}


def test_settings_are_completed_by_the_manifest_and_the_fold(ct_set, brief):
    made = cohort(brief, [ct_set.set], fold=1)
    data = made.settings.data
    assert (data.manifest, data.also, data.spacing_mm) == (ct_set.set.manifest, (), (15, 15, 15))
    assert made.settings.model.out_channels == 9
    assert sorted(data.train_cases + data.validation_cases) == [f"own_ct-{number}" for number in range(4)]
    other = cohort(brief, [ct_set.set], fold=0).settings.data
    assert (set(data.train_cases), set(data.validation_cases)) == (set(other.validation_cases), set(other.train_cases))
    assert [case.case.id for case in made.train] == list(data.train_cases)
    assert [case.case.id for case in made.validation] == list(data.validation_cases)


def test_how_the_images_were_resampled_is_in_the_settings_and_the_same_for_all(ct_set, brief, tmp_path):
    """So that what is predicted is prepared as what was trained on."""
    cases = find_cases(load_manifest(ct_set.set.manifest), ct_set.set.root).cases
    other = replace(ct_set.set, prepared=tmp_path / "plain")
    prepare_all(cases, other.prepared, Preparation(low_pass=False), progress=False)
    assert cohort(brief, [ct_set.set], fold=0).settings.data.low_pass
    assert not cohort(brief, [other], fold=0).settings.data.low_pass
    shutil.copy(case_path(ct_set.set.prepared, cases[0].id), other.prepared)
    with pytest.raises(UserError, match="some with a low-pass and some without"):
        cohort(brief, [other], fold=0)


def test_patch_and_epochs_are_the_manifests_unless_the_user_says_otherwise(ct_set, tmp_path):
    text = (ct_set.set.root.parent / "own_ct.yaml").read_text().replace("split: {folds: 2}", "patch_voxels: [32, 32, 16]\nepochs: 7\n")
    path = tmp_path / "own_ct.yaml"
    path.write_text(text)
    own = DataSet(str(path), ct_set.set.root, ct_set.set.prepared)
    made = cohort(preset("paper"), [own])
    assert made.settings.data.patch_voxels == (32, 32, 16)
    assert made.settings.training.steps == 7 * 2  # four cases, batches of two
    assert made.validation == ()
    assert cohort(preset("paper"), [own], changes={"training.batch_size": 3}).settings.training.steps == 7 * 2
    changed = cohort(preset("paper"), [own], changes={"training.steps": 5, "data.patch_voxels": [16, 16, 16]}).settings
    assert (changed.training.steps, changed.data.patch_voxels) == (5, (16, 16, 16))


@pytest.mark.parametrize("name", ["amos_ct", "amos_mri", "amos_joint", "panorama", "mvseg_2023"])
def test_the_papers_data_sets_have_its_patch(name):
    assert load_manifest(name).patch_voxels == ((192, 192, 48) if name == "panorama" else (128, 128, 128))


@pytest.fixture
def amos22(tmp_path, monkeypatch):
    """The official folder's names, without a voxel: 20 CT and 10 MRI to train on, 4 and 2 more. Prepared cases tell their spacing alone."""
    for part, ids in {"Tr": [*range(1, 21), *range(507, 517)], "Va": [*range(21, 25), 517, 518]}.items():
        for folder in (f"images{part}", f"labels{part}"):
            (tmp_path / folder).mkdir()
            for number in ids:
                (tmp_path / folder / f"amos_{number:04}.nii.gz").touch()
    monkeypatch.setattr(module, "open_all", lambda cases, folder: [SimpleNamespace(case=case, spacing_mm=(1.5, 1.5, 1.5), low_pass=True) for case in cases])
    return tmp_path


@pytest.mark.parametrize(
    ("data", "start", "seen", "organs"),
    [
        ("amos_ct", None, {"CT": 16}, 15),
        ("amos_mri", None, {"MRI": 8}, 13),
        ("amos_mri", "runs/amos-ct", {"MRI": 8}, 13),
        ("amos_joint", None, {"CT": 16, "MRI": 8}, 15),
    ],
    ids=["CT", "MRI", "CT -> MRI", "CT + MRI"],
)
def test_the_papers_four_settings_of_amos(data, start, seen, organs, amos22):
    changes = {"training.steps": 50_000, "training.init_from": start}
    made = cohort(preset("paper"), [DataSet(data, amos22, amos22)], changes=changes)
    settings, told = made.settings, Counter(case.case.modality for case in made.train)
    assert told == seen
    assert Counter(case.case.modality for case in made.validation) == {modality: count // 4 for modality, count in seen.items()}
    assert {load_manifest(data).window_of(modality) for modality in told} == {{"CT": (-175, 250), "MRI": (0, 1000)}[modality] for modality in seen}
    assert not set(settings.data.test_cases) & {case.case.id for case in (*made.train, *made.validation)}
    assert len(settings.data.test_cases) == sum({"CT": 4, "MRI": 2}[modality] for modality in seen)
    assert settings.model.out_channels == organs + 1 == len(label_space(settings.data).class_names)
    assert (settings.data.patch_voxels, settings.training.steps, settings.training.init_from) == ((128, 128, 128), 50_000, start)
    assert made.told == ()
    (line,) = cohort(preset("paper"), [DataSet(data, amos22, amos22)]).told
    epochs = f"{1000 / (told.total() / 2):.3g} epochs of {told.total()} cases"
    assert line == f"{data}: its manifest states no epochs; training.steps is the preset's, 1000: {epochs}. Set it."


def test_from_amos_ct_to_mri_the_rows_of_all_its_organs_are_taken(brief, tmp_path):
    ct, mri = (override(brief, {"data.manifest": f"amos_{kind}", "model.out_channels": classes}) for kind, classes in (("ct", 16), ("mri", 14)))
    source, network = build_network(ct), build_network(mri)
    save_weights(source, tmp_path / "ct.safetensors", ct)
    names = label_space(mri.data).class_names
    table = start_from(network, tmp_path / "ct.safetensors", names).set_index("tensor")
    assert table.loc["head.weight", "what"] == "resized"
    rows = [label_space(ct.data).class_names.index(name) for name in names]
    assert torch.equal(network.head.weight, source.head.weight[rows])
    assert torch.equal(network.head.bias, source.head.bias[rows])


@pytest.mark.parametrize(("fold", "told"), [(None, r"--fold: found None, expected 0 to 1, or all: own_ct deals"), (2, r"--fold: found 2, expected 0 to 1")])
def test_a_fold_that_is_not_there_is_named(fold, told, ct_set, brief):
    with pytest.raises(UserError, match=told):
        cohort(brief, [ct_set.set], fold=fold)


def test_folds_where_there_are_none_and_cases_not_prepared_are_named(ct_set, mri_set, brief, tmp_path):
    with pytest.raises(UserError, match=r"--fold: found 0, but own_mri has no folds"):
        cohort(brief, [mri_set.set], fold=0)
    with pytest.raises(UserError, match=r"found folds: own_ct 2, own_mri none; expected the same number"):
        folds_of([ct_set.set, mri_set.set])
    with pytest.raises(UserError, match=r"own_ct-.*\.zip: no prepared case"):
        cohort(brief, [DataSet(ct_set.set.manifest, ct_set.set.root, tmp_path)], fold=0)
    with pytest.raises(UserError, match=r"found the case own_ct-\d in another data set too"):
        cohort(brief, [ct_set.set, ct_set.set], fold=0)


def test_faulty_cases_are_refused_left_out_or_kept_and_never_silently(faulty_set, brief):
    with pytest.raises(UserError, match=r"found 2 faulty cases \(own_faulty-1: duplicate image, own_faulty-4: damaged\), expected none"):
        cohort(brief, [faulty_set], fold=0)
    made = cohort(brief, [replace(faulty_set, faulty="leave-out")], fold=0)
    assert sorted(made.settings.data.train_cases + made.settings.data.validation_cases) == [f"own_faulty-{k}" for k in (0, 2, 3, 5)]
    said = []
    made.at_hand(said.append)
    assert "own_faulty: its manifest states no epochs; training.steps is the preset's, 4: 4 epochs of 1 cases. Set it." in said
    assert said[0].endswith("left out 2 faulty cases (own_faulty-1: duplicate image, own_faulty-4: damaged).")
    with pytest.raises(UserError, match=r"found 1 faulty cases \(own_faulty-4: not prepared\)"):  # an old file is of what is no longer there
        cohort(brief, [replace(faulty_set, faulty="keep")], fold=0)


def test_a_case_that_was_not_prepared_is_faulty_without_a_check(faulty_set, brief):
    shutil.rmtree(kept_folder(load_manifest(faulty_set.manifest), faulty_set.root))
    with pytest.raises(UserError, match=r"found 1 faulty cases \(own_faulty-4: not prepared\)"):
        cohort(brief, [faulty_set], fold=0)
    kept = cohort(brief, [replace(faulty_set, faulty="leave-out")], fold=0).settings.data
    assert "own_faulty-1" in kept.train_cases + kept.validation_cases


def test_classes_of_one_piece_are_those_that_the_data_has(ct_set, brief):
    preset = override(brief, {"prediction.one_piece": ("liver", "pancreas")})
    assert cohort(preset, [ct_set.set], fold=0).settings.prediction.one_piece == ("liver",)
    asked = cohort(preset, [ct_set.set], fold=0, changes={"prediction.one_piece": ("spleen",)})
    assert asked.settings.prediction.one_piece == ("spleen",)


def test_all_folds_are_trained_and_collected(ct_set, brief, tmp_path):
    said = []
    found = train_folds(brief, [ct_set.set], tmp_path, changes={"training.steps": 2}, say=said.append)
    assert [line.endswith("done, 2 steps") for line in said] == [False, True] * 2
    assert sorted(found["case"].unique()) == [f"own_ct-{number}" for number in range(4)]
    assert found.groupby("case")["fold"].nunique().tolist() == [1] * 4
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "folds.csv"), found)
    table = by_class(found)
    assert list(table.columns) == ["fold 0", "fold 1", "all"]
    assert table.loc["liver", "all"] == pytest.approx(found[found["class"] == "liver"]["dice"].mean())
    assert table.loc["mean", "all"] == pytest.approx(table["all"].iloc[:-1].mean())
    assert collect(tmp_path / "nothing-there-yet").empty


def test_ids_of_digits_stay_as_they_are(tmp_path):
    (tmp_path / "fold-0").mkdir()
    (tmp_path / "fold-0" / "validation.csv").write_text("case,class,dice,step\n007,liver,0.5,2\n")
    assert collect(tmp_path)["case"].tolist() == ["007"]
    assert "0,007,liver" in (tmp_path / "folds.csv").read_text()


def test_validation_chooses_the_best_weights(ct_set, brief, tmp_path, monkeypatch):
    """Dice given: best at the second of four validations."""
    from homelib.run import train

    made = cohort(override(brief, {"training.validate_every": 1}), [ct_set.set], fold=0)
    dices, seen = iter([0.1, 0.7, 0.3, 0.2]), []

    def validate(network, cases, settings, *, stop, progress):
        seen.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return pd.DataFrame([{"case": "x", "class": "liver", "dice": next(dices)}])

    monkeypatch.setattr(train, "validate", validate)
    run = fit(made.settings, made.train, tmp_path / "run", validation=made.validation, progress=False)
    from homelib.run.checkpoint import trained_network

    best = trained_network(run).state_dict()
    assert all(torch.equal(best[name], seen[1][name]) for name in best)
    assert run.history["validation_dice"].tolist() == [0.1, 0.7, 0.3, 0.2]
    assert run.status["best"] == 0.7
    assert pd.read_csv(run.validation_file)["step"].tolist() == [2]


def test_cases_to_validate_on_that_are_not_at_hand_are_named(smoke, prepared, tmp_path):
    settings = override(smoke, {"data.validation_cases": ("phantom-c",)})
    with pytest.raises(UserError, match=r"^data\.validation_cases: found phantom-c, but no case is at hand to validate on"):
        fit(settings, [prepared], tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"^data\.train_cases and data\.validation_cases share phantom-a; weights are not chosen by a case"):
        override(smoke, {"data.train_cases": ("phantom-a",), "data.validation_cases": ("phantom-a",)})
    with pytest.raises(UserError, match=r"^training\.patience: needs data\.validation_cases"):
        override(smoke, {"training.patience": 3})


def test_patience_ends_a_training_and_it_stays_ended(ct_set, brief, tmp_path, monkeypatch):
    from homelib.run import train

    made = cohort(override(brief, {"training.validate_every": 1, "training.steps": 50}), [ct_set.set], fold=0, changes={"training.patience": 2})
    dices = iter([0.5, 0.6, 0.4, 0.6])
    monkeypatch.setattr(train, "validate", lambda *args, **named: pd.DataFrame([{"case": "x", "class": "liver", "dice": next(dices)}]))
    for _ in range(2):
        run = fit(made.settings, made.train, tmp_path / "run", validation=made.validation, progress=False)
        assert (run.state, len(run.history)) == ("done", 4)


def test_averaged_weights_are_what_is_validated_and_kept(ct_set, brief, tmp_path):
    made = cohort(override(brief, {"training.steps": 3}), [ct_set.set], fold=0, changes={"training.ema": 0.5, "training.learning_rate": 0.01})
    weights = []
    from homelib.run.checkpoint import load_checkpoint, trained_network

    settings = override(made.settings, {"data.validation_cases": ()})
    run = fit(settings, made.train, tmp_path / "run", progress=False, on_validation=lambda step, n: weights.append(n.head.weight.clone()) or {})
    state = load_checkpoint(run.checkpoint_file)
    assert not torch.equal(state["network"]["head.weight"], state["average"]["head.weight"])
    assert torch.equal(trained_network(run).head.weight, state["average"]["head.weight"])
    assert torch.equal(weights[-1], state["average"]["head.weight"])


# ---------------------------------------------------------------- several data sets


def test_classes_of_one_name_are_one_and_others_are_added(ct_set, mri_set, brief):
    made = cohort(
        brief, [mri_set.set, ct_set.set][::-1][1:], changes={"data.also": [ct_set.set.manifest], "data.aliases": {"kidneys": "kidney"}, "model.out_channels": 9}
    )
    space = label_space(made.settings.data)
    assert space.class_names == ("background", "spleen", "liver", "kidney", "bone", "muscle", "stomach", "aorta", "inferior_vena_cava")


@pytest.fixture(scope="module")
def both(ct_set, mri_set, brief, tmp_path_factory):
    """The CT without folds, beside the MRI."""
    folder = tmp_path_factory.mktemp("both")
    path = folder / "own_ct.yaml"
    path.write_text((ct_set.set.root.parent / "own_ct.yaml").read_text().replace("split: {folds: 2}", "split: {parts: {train: 0.5, validation: 0.5}}"))
    return cohort(brief, [DataSet(str(path), ct_set.set.root, ct_set.set.prepared), mri_set.set])


def test_patches_of_several_data_sets_come_with_the_labels_of_the_union(both):
    mixture = Mixture(both.train, both.settings.data, both.settings.training.augment, seed=0)
    names = mixture.space.class_names
    patches = [mixture.patch(step, 0) for step in range(30)]
    assert all(torch.equal(a, b) for a, b in zip(patches[7], mixture.patch(7, 0), strict=True))
    of_mri = [patch for patch in patches if int(patch[2].sum()) == 4]
    assert 0 < len(of_mri) < 30
    known = {names.index(name) for name in ("spleen", "liver", "kidneys")} | {0}
    for image, label, labelled in patches:
        assert image.shape == label.shape == (1, 16, 16, 16)
        assert set(np.unique(label)) <= set(torch.nonzero(labelled).flatten().tolist())
    assert set.union(*(set(np.unique(label)) for _, label, _ in of_mri)) == known


def test_what_a_data_set_has_not_labelled_has_no_gradient_of_its_own(both):
    """In the MRI, an aorta that is taken for background is no fault, nor is background taken for aorta."""
    from lightning_fabric import Fabric

    mixture = Mixture(both.train, both.settings.data, both.settings.training.augment, seed=0)
    image, label, labelled = next(patch for patch in (mixture.patch(step, 0) for step in range(30)) if int(patch[2].sum()) == 4)
    fabric, network = Fabric(accelerator="cpu", devices=1), torch.nn.Conv3d(1, 9, 1)
    wrapped, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.0))
    aorta = mixture.space.class_names.index("aorta")
    with torch.no_grad():
        network.bias[0], network.bias[aorta] = 1.0, 3.0
    before, *_ = train_step(fabric, wrapped, optimizer, [(image[None], label[None], labelled[None])], both.settings.training)
    with torch.no_grad():
        network.bias[0], network.bias[aorta] = 3.0, 1.0
        network.weight[[0, aorta]] = network.weight[[aorta, 0]]
    after, *_ = train_step(fabric, wrapped, optimizer, [(image[None], label[None], labelled[None])], both.settings.training)
    assert after == pytest.approx(before, rel=1e-4)


def test_two_data_sets_train_one_network_and_are_validated_by_what_each_has_labelled(both, tmp_path):
    run = fit(both.settings, both.train, tmp_path / "run", validation=both.validation, progress=False)
    table = pd.read_csv(run.validation_file)
    of_mri = table[table["case"].str.startswith("own_mri")]
    assert set(of_mri["class"]) == {"spleen", "liver", "kidneys"}
    assert len(set(table[table["case"].str.startswith("own_ct")]["class"])) == 8
    assert Run(run.folder).state == "done"


def test_class_balance_does_not_go_with_several_data_sets(both):
    with pytest.raises(UserError, match=r"^training\.class_balance: expected 0 with data\.also"):
        override(both.settings, {"training.class_balance": 0.5})
