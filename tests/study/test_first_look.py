"""What notebook 00 shows is what prediction, evaluation and routing give one by one; the card of `make weights` has the numbers of what it wrote."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from homelib import UserError
from homelib.data.manifest import load_manifest
from homelib.data.prepare import prepare, read_label
from homelib.run.checkpoint import trained_network
from homelib.run.evaluate import evaluate
from homelib.run.export import export
from homelib.run.packed import load
from homelib.run.predict import predict_label
from homelib.study import first_look as module
from homelib.study.expert_maps import routing_maps
from homelib.study.first_look import first_look, shipped_weights

SCRIPT = Path(__file__).parents[2] / "scripts" / "weights.py"
needs_clone = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the clone: scripts/weights.py is not installed")


@pytest.fixture(scope="module")
def folder(smoke_demo, tmp_path_factory):
    return export(smoke_demo.run, "hub", tmp_path_factory.mktemp("first look") / "weights" / "demo", bits=8)


@pytest.fixture(scope="module")
def weights(folder):
    ensemble, told = shipped_weights(folder)
    parameters = sum(p.numel() for p in ensemble.networks[0].parameters())
    assert re.fullmatch(
        rf"MambaHoME, {parameters:,} parameters in 0\.\d MB; trained on 1 patient, phantom-a \(labels SYNTHETIC\), in 4 steps, seed 0\.", told
    )
    return ensemble


def dice_on_own_grid(network, case, settings, class_names) -> pd.Series:
    label = predict_label([network], case, settings)
    reference = read_label(case.case.label, case.native_shape, case.native_affine, load_manifest(case.case.manifest))
    spacing = np.linalg.norm(case.native_affine[:3, :3], axis=0)
    about = {"class_names": class_names, "case": "x", "method": "x", "label_origin": "REF", "metrics": ("dice",)}
    return evaluate(label, reference, spacing_mm=spacing, **about).set_index("class")["value"]


@pytest.mark.parametrize("stage", [0, 2])
def test_it_is_what_prediction_evaluation_and_routing_give(weights, smoke_demo, stage):
    case, (network,) = smoke_demo.test_case, weights.networks
    seen = first_look(weights, case.case, stage=stage)
    assert set(seen.maps.experts) == {(stage, 0, 1)}
    alone = routing_maps(network, case, weights.settings, stages=[stage], blocks=[0], levels=[1])
    assert np.array_equal(seen.maps[stage, 0, 1], alone[stage, 0, 1])
    expected = dice_on_own_grid(network, case, weights.settings, smoke_demo.class_names)
    pd.testing.assert_series_equal(seen.rows.set_index("class")["value"], expected, check_exact=False, rtol=1e-9)
    assert set(seen.rows["label_origin"]) == {"SYNTHETIC"}
    assert seen.predicted.shape == case.image.shape
    assert len(np.unique(seen.predicted)) > 1
    assert seen.seconds > 0


def test_a_scan_that_it_was_trained_on_is_refused(weights, smoke_demo):
    with pytest.raises(UserError, match="^phantom-a: the network was trained on it, expected a scan that it never saw"):
        first_look(weights, smoke_demo.train_case.case)


def test_a_scan_is_prepared_as_the_network_was_trained_whatever_the_profile(weights, smoke_demo):
    """The smoke profile's phantoms under the demo's network: 12 mm there, and 5 mm here."""
    coarser = weights.settings.model_copy(update={"data": weights.settings.data.model_copy(update={"spacing_mm": (16.0, 16.0, 16.0)})})
    seen = first_look(type(weights)(weights.networks, coarser, weights.fingerprint), smoke_demo.test_case.case)
    assert seen.maps.spacing_mm == (16.0, 16.0, 16.0)
    assert seen.maps.image.shape == prepare(smoke_demo.test_case.case, spacing_mm=(16.0, 16.0, 16.0)).image.shape


def test_without_weights_it_says_how_to_make_them_and_half_of_them_is_an_error(folder, tmp_path):
    assert shipped_weights(tmp_path / "weights" / "demo") == (None, "weights/demo: no trained weights here; `make demo && make weights` makes them.")
    shutil.copytree(folder, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        shipped_weights(tmp_path / "half")


def test_what_ships_is_small_and_of_the_demo():
    if not module.WEIGHTS.is_dir():
        pytest.skip("homelib/weights/demo is not there: `make demo && make weights` makes it")
    assert {"README.md", "config.json", "demo_ct.yaml", "model.safetensors"} == {path.name for path in module.WEIGHTS.iterdir()}
    assert sum(path.stat().st_size for path in module.WEIGHTS.iterdir()) < 3_000_000
    ensemble, told = shipped_weights()
    assert ensemble.settings.profile == "laptop"
    assert ensemble.settings.data.train_cases == ("ct-a",)
    assert f"in {ensemble.settings.training.steps} steps" in told
    card = (module.WEIGHTS / "README.md").read_text(encoding="utf-8")
    for words in ("ct-a (labels MODEL)", "ct-c (labels UNSTATED)", "make demo && make weights", "| mean |", "Not for clinical use", "6 bits"):
        assert words in card


# ---------------------------------------------------------------- make weights


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("weights", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@needs_clone
def test_the_cards_numbers_are_those_of_the_trained_and_of_the_written_weights(script, smoke_demo, tmp_path):
    out = tmp_path / "weights" / "demo"
    out.mkdir(parents=True)
    (out / "of before").touch()
    demo = script.trained_demo("smoke", smoke_demo.run.folder.parents[1])
    script.write(demo, out, 4, "a command")
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "demo_ct.yaml", "model.safetensors"}
    assert [path.name for path in out.parent.iterdir()] == ["demo"]
    card = (out / "README.md").read_text()
    for words in ("`a command`: profile smoke, trained on **one patient**, phantom-a (labels SYNTHETIC)", "4 steps, seed 0", "Not for clinical use"):
        assert words in card
    rows = {cells[0]: cells[3:5] for line in card.splitlines() if len(cells := [cell.strip() for cell in line.strip("| ").split("|")]) == 5}
    assert rows.pop("class") == ["as trained", "4 bits"]
    rows.pop("---")
    networks = trained_network(smoke_demo.run), load(out).networks[0]
    assert any(not torch.equal(a, b) for a, b in zip(*(network.state_dict().values() for network in networks), strict=True))
    columns = [100 * dice_on_own_grid(network, smoke_demo.test_case, smoke_demo.run.settings, smoke_demo.class_names) for network in networks]
    expected = {name: [f"{column[name]:.1f}" for column in columns] for name in columns[0].index}
    assert rows == expected | {"mean": [f"{column.mean():.1f}" for column in columns]}


@needs_clone
def test_a_demo_that_was_not_run_and_weights_that_are_too_large_are_one_line(script, smoke_demo, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"training/smoke-a-to-c: found a run that is queued, expected one that is done\. `make demo` trains it\.$"):
        script.trained_demo("smoke", tmp_path)
    monkeypatch.setattr(script, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"--bits: 8 make [\d,]+ bytes, expected fewer than 1,000"):
        script.write(smoke_demo, tmp_path / "demo", 8, "a command")
    assert list(tmp_path.iterdir()) == [], "nothing is left, and nothing that was there is gone"
