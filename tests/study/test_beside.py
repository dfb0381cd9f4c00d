"""Runs of other models beside ours: which are taken, under which name, and that they are measured and shown as ours is."""

import numpy as np
import pytest
import torch

from homelib import UserError
from homelib.config import override
from homelib.run.checkpoint import build_network, save_weights
from homelib.run.folder import Run
from homelib.study.beside import measure_beside, others_of, shown_beside
from homelib.study.comparison import BASELINES, measure
from homelib.study.tables import dice_table


def untrained_run(folder, settings) -> Run:
    """A run whose network has random weights."""
    folder.mkdir()
    settings.save(folder / "settings.json")
    torch.manual_seed(0)
    save_weights(build_network(settings), folder / "best.safetensors", settings)
    return Run(folder)


@pytest.fixture(scope="module")
def other(smoke_demo, tmp_path_factory) -> Run:
    return untrained_run(tmp_path_factory.mktemp("others") / "plain", override(smoke_demo.settings, {"network": "SegMamba"}))


def test_another_model_is_measured_and_shown_beside_ours(smoke_demo, other):
    beside = others_of(f"{other.folder},", {"a-to-c": smoke_demo})["a-to-c"]
    assert {name: run.folder for name, run in beside.items()} == {"SegMamba": other.folder}
    metrics = measure_beside(smoke_demo, beside)
    assert list(dice_table(metrics, role="test").columns)[2:] == ["MambaHoME", *BASELINES, "SegMamba"]
    own = measure(smoke_demo.run, smoke_demo.data)
    theirs = other.metrics.query("role == 'test' and method == 'SegMamba'")
    assert metrics.head(len(own)).equals(own)
    assert metrics.query("role == 'test' and method == 'SegMamba'")["value"].tolist() == theirs["value"].tolist()
    seen = shown_beside(smoke_demo, beside, baseline=BASELINES[-1])
    assert list(seen.labels) == ["reference", "MambaHoME", "SegMamba", BASELINES[-1]]
    assert {label.shape for label in seen.labels.values()} == {seen.image.shape}
    index = smoke_demo.class_names.index("liver")
    rows = theirs.query("metric == 'dice'").set_index("class")
    assert (seen.predicted["SegMamba"] == index).sum() == rows.loc["liver", "predicted_voxels"]
    assert (seen.reference == index).sum() == rows.loc["liver", "reference_voxels"]
    assert not np.array_equal(seen.predicted["SegMamba"], seen.predicted["MambaHoME"])


def test_none_are_beside_where_none_are_named(smoke_demo):
    for nothing in ([], "", ()):
        assert others_of(nothing, {"a-to-c": smoke_demo}) == {"a-to-c": {}}


def test_names_stay_apart_and_runs_of_other_patients_are_refused(smoke_demo, other, tmp_path):
    again = untrained_run(tmp_path / "again", override(smoke_demo.settings, {"training.seed": 7}))
    found = others_of([str(other.folder), str(again.folder)], {"a-to-c": smoke_demo})["a-to-c"]
    assert list(found) == ["SegMamba", "MambaHoME (again)"]
    data = smoke_demo.settings.data
    turned = override(smoke_demo.settings, {"data.train_cases": data.test_cases, "data.test_cases": data.train_cases})
    elsewhere = untrained_run(tmp_path / "elsewhere", turned)
    with pytest.raises(UserError, match="elsewhere: found a run of demo_ct, phantom-c to phantom-a, expected demo_ct, phantom-a to phantom-c"):
        others_of([str(elsewhere.folder)], {"a-to-c": smoke_demo})
    with pytest.raises(UserError, match="no settings.json there"):
        others_of("nowhere", {"a-to-c": smoke_demo})
