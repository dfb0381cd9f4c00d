"""What is exported gives the labels that `home predict` gives; and what cannot be exported says why."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from homelib.config import Settings, override, preset
from homelib.data.manifest import as_yaml, load_manifest
from homelib.data.prepare import read_array
from homelib.errors import UserError
from homelib.run.checkpoint import build_network, load_weights, save_weights
from homelib.run.export import export
from homelib.run.folder import Run
from homelib.run.inputs import find_inputs
from homelib.run.mixture import label_space
from homelib.run.packed import load, segment
from homelib.run.predict_all import Ensemble, predict_all
from homelib.run.to_onnx import write_onnx

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(smoke, tmp_path_factory):
    """A run on a data set of the user's own, whose manifest is a file that others do not have."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "mine.yaml").write_text(as_yaml(load_manifest("demo_ct")).replace("name: demo_ct", "name: mine", 1))
    settings = override(smoke, {"data.manifest": str(folder / "mine.yaml"), "data.train_cases": ("ct-a",), "prediction.one_piece": ("liver",)})
    run = Run(folder / "run")
    run.folder.mkdir()
    settings.save(run.settings_file)
    torch.manual_seed(0)
    save_weights(build_network(settings), run.weights_file, settings)
    row = {"case": "ct-c", "role": "test", "method": "MambaHoME", "label_origin": "REF", "class": "liver", "metric": "dice", "value": 0.875}
    rows = [row | {"reference_voxels": 9, "predicted_voxels": 8}]
    pd.DataFrame(rows).to_csv(run.metrics_file, index=False)
    return run


@pytest.fixture(scope="module")
def expected(run, phantoms, tmp_path_factory):
    cases = find_inputs([phantoms["phantom-a"].image], load_manifest(run.settings.data.manifest))
    (done,) = predict_all(cases, Ensemble.of([run.folder]), tmp_path_factory.mktemp("expected") / "labels.nii.gz", progress=False)
    return read_array(done.path)


@pytest.mark.parametrize("to", ["bundle", "hub"])
def test_what_is_exported_gives_the_same_labels(to, run, expected, phantoms, tmp_path):
    folder = export(run, to, tmp_path / "elsewhere" / to)
    label, affine = read_array(segment(load(folder), phantoms["phantom-a"].image, tmp_path / "labels.nii.gz"))
    assert (label == expected[0]).all()
    assert len(set(label.ravel().tolist())) > 1
    assert (affine == expected[1]).all()
    assert not list(folder.parent.glob(".export*"))


@pytest.mark.long
def test_monais_command_runs_the_bundle(run, expected, phantoms, tmp_path):
    if importlib.util.find_spec("fire") is None:
        pytest.skip("fire is not installed: monai.bundle's command line needs it (it is in the extra dev)")
    folder = export(run, "bundle", tmp_path / "bundle")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", folder / "configs" / "inference.json", "--bundle_root", folder]
    command += ["--meta_file", folder / "configs" / "metadata.json", "--image", phantoms["phantom-a"].image, "--output", tmp_path / "labels.nii.gz"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    label, affine = read_array(tmp_path / "labels.nii.gz")
    assert (label == expected[0]).all()
    assert (affine == expected[1]).all()


def test_the_hub_folder_has_weights_settings_and_a_card_that_says_what_was_measured(run, tmp_path):
    folder = export(run, "hub", tmp_path / "hub")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "mine.yaml", "README.md"}
    settings = Settings.load(folder / "config.json")
    network = load_weights(build_network(settings), folder / "model.safetensors")
    ours = load_weights(build_network(run.settings), run.weights_file)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), ours.state_dict().values(), strict=True))
    card = (folder / "README.md").read_text()
    manifest = load_manifest("demo_ct")
    for words in ("library_name: homelib", "| liver | 0.875 |", "1 test cases (ct-c), labels REF", manifest.licence, "1 cases (ct-a)", "## Limits"):
        assert words in card
    assert str(run.folder.parent) not in card + (folder / "config.json").read_text()


@pytest.mark.parametrize(("to", "weights"), [("bundle", "models/model.safetensors"), ("hub", "model.safetensors")])
def test_in_few_bits_it_is_smaller_and_gives_nearly_the_same_labels(to, weights, run, expected, phantoms, tmp_path):
    folder = export(run, to, tmp_path / to, bits=8)
    assert (folder / weights).stat().st_size < 0.6 * run.weights_file.stat().st_size  # of so small a network much is vectors
    label, _ = read_array(segment(load(folder), phantoms["phantom-a"].image, tmp_path / "labels.nii.gz"))
    assert 0.97 < (label == expected[0]).mean() < 1, "rounded, and not by much"
    (card,) = (path.read_text() for path in folder.rglob("README.md"))
    assert "rounded, which is not in the figures above: 8 bits a value, the nearest of 255 multiples" in card


def test_the_demos_network_in_six_bits_is_small_enough_to_ship(tmp_path):
    settings = override(preset("laptop"), {"data.train_cases": ("ct-a",), "data.test_cases": ("ct-c",)})
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    settings.save(run.settings_file)
    save_weights(build_network(settings), run.weights_file, settings)
    folder = export(run, "hub", tmp_path / "hub", bits=6)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_600_000
    assert run.weights_file.stat().st_size > 12_000_000
    assert "Label origin: MODEL." in (folder / "README.md").read_text(), "that of ct-a, not of both patients"


def test_the_card_has_every_metric_and_cases_whose_ids_are_numbers(run, tmp_path):
    own = shutil.copytree(run.folder, tmp_path / "run")
    rows = ["case,method,class,metric,value,reference_voxels,predicted_voxels"]
    rows += [f"00{case},labels,liver,{metric},{value},9,9" for case in (1, 2) for metric, value in (("dice", 0.5 * case), ("hd95", 4))]
    (own / "metrics.csv").write_text("\n".join(rows) + "\n")
    card = (export(Run(own), "hub", tmp_path / "hub") / "README.md").read_text()
    told = ["2 test cases (001, 002), labels UNSTATED", "| class | dice | hd95 [mm] |", "| --- | ---: | ---: |", "| liver | 0.750 | 4.000 |"]
    for words in (*told, "- dice [1]: 2 |P and R|", "- Structures: 2 in the references"):
        assert words in card


def test_a_network_that_onnx_has_no_operator_for_is_one_line(smoke, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (it is in the extra dev)")

    class Eigenvalues(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x[..., :2, :2]).real

    with pytest.raises(UserError, match=r"^--to onnx: MambaHoME cannot be written: DispatchError: No ONNX function found for [^\n]*linalg_eig[^\n]*--to hub"):
        write_onnx(Eigenvalues(), smoke, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_onnx_graph_computes_what_the_network_computes(run, tmp_path):
    """Carried out by onnxruntime, which knows nothing of homelib: one Scan node a Mamba layer, and the network's logits."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (it is in the extra dev)")
    import onnx
    import onnxruntime

    folder = export(run, "onnx", tmp_path / "onnx")
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "config.json", "labels.json", "mine.yaml", "README.md"}
    assert json.loads((folder / "labels.json").read_text())["3"] == load_manifest("demo_ct").class_names[3]
    network = load_weights(build_network(run.settings), run.weights_file).eval()
    nodes = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert nodes.count("Scan") == sum(run.settings.model.depths)
    image = torch.rand(1, 1, *run.settings.data.patch_voxels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(image)
    (logits,) = onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], {"image": image.numpy()})
    assert float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()) < 1e-4


def test_the_bundle_tells_its_classes(run, tmp_path):
    told = json.loads((export(run, "bundle", tmp_path / "bundle") / "configs" / "metadata.json").read_text())
    outputs = told["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"]["0"] == "background"
    assert outputs["num_channels"] == len(outputs["channel_def"]) == 9


def test_of_several_data_sets_the_classes_are_those_of_the_union(smoke, phantoms, tmp_path):
    """In what is predicted, in what is exported, and in what the export predicts."""
    (tmp_path / "own.yaml").write_text(as_yaml(load_manifest("demo_mr_spine")).replace("name: demo_mr_spine", "name: own", 1))
    changes = {"data.also": (str(tmp_path / "own.yaml"),), "training.class_balance": 0}
    names = label_space(override(smoke, changes).data).class_names
    assert len(names) > len(load_manifest("demo_ct").class_names)
    settings = override(smoke, changes | {"model.out_channels": len(names), "prediction.one_piece": (names[-1],)})
    both = Run(tmp_path / "run")
    both.folder.mkdir()
    settings.save(both.settings_file)
    save_weights(build_network(settings), both.weights_file, settings)
    cases = find_inputs([phantoms["phantom-a"].image], load_manifest("demo_ct"))
    (done,) = predict_all(cases, Ensemble.of([both.folder]), tmp_path / "labels", progress=False)
    assert set(done.voxels) == set(names[1:])
    assert tuple(json.loads((tmp_path / "labels" / "labels.json").read_text()).values()) == names
    folder = export(both, "hub", tmp_path / "hub")
    card = (folder / "README.md").read_text()
    assert all(name.replace("_", " ") in card for name in names[1:])
    assert str(tmp_path) not in card + (folder / "config.json").read_text()
    label, _ = read_array(segment(load(folder), phantoms["phantom-a"].image, tmp_path / "labels.nii.gz"))
    assert (label == read_array(done.path)[0]).all()


def test_what_cannot_be_is_one_line(run, tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnx", None)
        with pytest.raises(UserError, match="--to onnx: the package onnx is not installed.*pip install 'homelib"):
            export(run, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(UserError, match="--to: found 'zip', expected one of bundle, hub, onnx"):
        export(run, "zip", tmp_path / "zip")
    with pytest.raises(UserError, match="exists already"):
        export(run, "hub", tmp_path)
    with pytest.raises(UserError, match="--bits: found 1, expected 2 to 8, or 32"):
        export(run, "hub", tmp_path / "hub", bits=1)
    with pytest.raises(UserError, match="--bits: found 6 with --to onnx, expected 32"):
        export(run, "onnx", tmp_path / "onnx", bits=6)
    bare = Run(tmp_path / "bare")
    bare.folder.mkdir()
    run.settings.save(bare.settings_file)
    with pytest.raises(UserError, match="best.safetensors: no such file"):
        export(bare, "hub", tmp_path / "hub")
    assert not (tmp_path / "hub").exists()
    with pytest.raises(UserError, match="expected a folder that `home export` has written"):
        load(tmp_path)
