"""A run of a grid on a data set of the user's: a fold is left out, trained without, and measured; other models' runs beside it."""

import importlib.util
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from homelib import UserError
from homelib.config import override
from homelib.data.cohort import default_folder
from homelib.data.manifest import load_manifest
from homelib.run.cohort import DataSet
from homelib.run.folder import Run
from homelib.study.ablate import shipped_notebooks
from homelib.study.executing import execute
from homelib.study.on_data import cohort_on, metrics_beside, others_on, shown_on

_spec = importlib.util.spec_from_file_location("made_sets", Path(__file__).parent.parent / "run" / "conftest.py")
made_sets = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made_sets)

CHANGES = {
    "data.patch_voxels": [16, 16, 16],
    "training.steps": 2,
    "training.validate_every": 2,
    "training.augment.contrast_phase": 0,
    "training.accelerator": "cpu",
}


@pytest.fixture(scope="module")
def own(own_cache, tmp_path_factory) -> DataSet:
    """Four phantoms in two folds, prepared."""
    made = made_sets.make(tmp_path_factory.mktemp("set"), "own_ct").set
    default = default_folder(load_manifest(made.manifest), made.root)
    default.parent.mkdir(parents=True, exist_ok=True)
    default.symlink_to(made.prepared)
    return made


def run_of(folder: Path, own: DataSet, *, fold: int = 1, network: str = "MambaHoME") -> Run:
    """A run that found nothing in the cases that the fold leaves out."""
    settings = override(cohort_on("smoke", {own.manifest: str(own.root)}, fold=fold, changes=CHANGES).settings, {"network": network})
    run = Run(folder)
    run.predictions.mkdir(parents=True)
    settings.save(run.settings_file)
    for case in settings.data.validation_cases:
        label = nib.load(own.root / "labels" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.uint8), label.affine), run.predictions / f"{case}.nii.gz")
    rows = [{"case": case, "class": "liver", "metric": metric} for case in settings.data.validation_cases for metric in ("dice", "hd95")]
    pd.DataFrame(rows).assign(method=network, role="test", value=0.5).to_csv(run.metrics_file, index=False)
    return run


@pytest.fixture(scope="module")
def other(own, tmp_path_factory) -> Run:
    """Of another model, which has found what the reference holds."""
    run = run_of(tmp_path_factory.mktemp("others") / "plain", own, network="SegMamba")
    for file in run.predictions.iterdir():
        shutil.copy(own.root / "labels" / file.name, file)
    return run


def test_another_models_run_is_shown_and_counted_beside_ours(own, other, tmp_path):
    ours, data = run_of(tmp_path / "ours", own), {own.manifest: str(own.root)}
    beside = others_on(f"{other.folder},", ours)
    assert {name: run.folder for name, run in beside.items()} == {"SegMamba": other.folder}
    case = ours.settings.data.validation_cases[0]
    seen = shown_on(ours, data, case, others=beside)
    assert list(seen.labels) == ["reference", "MambaHoME", "SegMamba"]
    assert np.array_equal(seen.predicted["SegMamba"], seen.reference)
    assert seen.reference.any()
    assert not seen.predicted["MambaHoME"].any()
    assert metrics_beside(ours.metrics, beside)["method"].tolist() == ["MambaHoME"] * 4 + ["SegMamba"] * 4
    assert list(shown_on(ours, data, case).labels) == ["reference", "MambaHoME"]
    again = run_of(tmp_path / "again", own)
    assert list(others_on([str(other.folder), str(again.folder)], ours)) == ["SegMamba", "MambaHoME (again)"]


def test_runs_of_other_folds_and_cases_that_were_not_predicted_are_refused(own, other, tmp_path):
    ours, data = run_of(tmp_path / "ours", own), {own.manifest: str(own.root)}
    elsewhere = run_of(tmp_path / "elsewhere", own, fold=0)
    with pytest.raises(UserError, match="elsewhere: found a run that left out own_ct-., own_ct-., expected own_ct-., own_ct-.. Leave it out"):
        others_on([str(elsewhere.folder)], ours)
    with pytest.raises(UserError, match="no such file, expected a prediction of own_ct-.; measure the run first"):
        shown_on(ours, data, ours.settings.data.validation_cases[0], others={"elsewhere": elsewhere})
    with pytest.raises(UserError, match="nobody: no labelled case of"):
        shown_on(ours, data, "nobody")


@pytest.mark.long
@pytest.mark.slow
def test_the_notebooks_of_a_grid_on_data_sets_train_on_all_but_a_fold_and_measure_it(own, other, tmp_path):
    given = {"profile": "smoke", "run_folder": str(tmp_path / "run"), "data": {own.manifest: str(own.root)}, "fold": 1, "changes": CHANGES}
    training, evaluation = shipped_notebooks(on_data=True)
    execute(training, tmp_path / training.name, given)
    execute(evaluation, tmp_path / evaluation.name, given | {"others": [str(other.folder)]})
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert set(metrics["role"]) == {"test"}
    assert metrics["chose"].all()
    assert metrics["case"].nunique() == 2
    assert set(metrics["method"]) == {"MambaHoME"}
    assert set(metrics["label_origin"]) == {load_manifest(own.manifest).label_origin}
    for file in sorted((tmp_path / "run" / "predictions").glob("*.nii.gz")):  # the voxels of each class are those of the file that was predicted
        counted = np.bincount(np.asarray(nib.load(file).dataobj).ravel(), minlength=9)[1:]
        told = metrics[(metrics["case"] == file.name.removesuffix(".nii.gz")) & (metrics["metric"] == "dice") & (metrics["class"] != "background")]
        told = told["predicted_voxels"]
        assert told.tolist() == counted.tolist()
        assert told.sum() > 0
    assert {"dice", "hd95"} <= set(metrics["metric"])
    assert len(list((tmp_path / "run" / "predictions").glob("*.nii.gz"))) == 2
