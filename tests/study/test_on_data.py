"""A run of a grid on a data set of the user's: a fold is left out, trained without, and measured."""

import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from homelib.data.cohort import default_folder
from homelib.data.manifest import load_manifest
from homelib.study.ablate import shipped_notebooks
from homelib.study.executing import execute

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


@pytest.mark.slow
@pytest.mark.long
def test_the_notebooks_of_a_grid_on_data_sets_train_on_all_but_a_fold_and_measure_it(own_cache, tmp_path):
    (tmp_path / "set").mkdir()
    own = made_sets.make(tmp_path / "set", "own_ct").set
    default = default_folder(load_manifest(own.manifest), own.root)
    default.parent.mkdir(parents=True, exist_ok=True)
    default.symlink_to(own.prepared)
    given = {"profile": "smoke", "run_folder": str(tmp_path / "run"), "data": {own.manifest: str(own.root)}, "fold": 1, "changes": CHANGES}
    for notebook in shipped_notebooks(on_data=True):
        execute(notebook, tmp_path / notebook.name, given)
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
