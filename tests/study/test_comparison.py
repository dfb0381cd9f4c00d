"""One run measured: every row is there, in the right role, and can be made again from the files that are left."""

import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml

from homelib import UserError
from homelib.config import override
from homelib.data.demo import DemoData
from homelib.paths import shipped
from homelib.run.folder import Run
from homelib.run.predict import to_native
from homelib.run.train import fit
from homelib.study.baselines import ThresholdAndPosition
from homelib.study.comparison import BASELINES, measure
from homelib.study.tables import dice_table

RAW = yaml.safe_load((shipped("data_manifests") / "demo_ct.yaml").read_text())["classes"]  # read apart from homelib
METHODS = ("MambaHoME", *BASELINES)


@pytest.fixture(scope="module")
def metrics(smoke_demo) -> pd.DataFrame:
    return measure(smoke_demo.run, smoke_demo.data)


def saved(demo, case: str, method: str) -> nib.Nifti1Image:
    return nib.load(demo.run.folder / "predictions" / f"{case}_{method.replace(' ', '-')}.nii.gz")


def test_there_is_one_row_a_case_method_class_and_metric(metrics):
    rows = set(metrics[["role", "case", "method", "metric", "class"]].itertuples(index=False, name=None))
    distances = [("MambaHoME", "hd95")]
    wanted = {"test": [(method, "dice") for method in METHODS] + distances, "train": [("MambaHoME", "dice")] + distances}
    cases = {"test": "phantom-c", "train": "phantom-a"}
    assert rows == {(role, cases[role], *told, name) for role, tolds in wanted.items() for told in tolds for name in RAW}
    assert len(metrics) == len(rows)


def test_every_row_says_where_its_labels_come_from_and_in_what_unit(metrics):
    assert set(metrics["label_origin"]) == {"SYNTHETIC"}
    assert metrics.groupby("metric")["unit"].unique().map(list).to_dict() == {"dice": ["1"], "hd95": ["mm"]}


def test_the_file_holds_what_is_returned(metrics, smoke_demo):
    kept = pd.read_csv(smoke_demo.run.metrics_file)
    pd.testing.assert_frame_equal(kept, metrics, check_exact=False, rtol=1e-12)
    pd.testing.assert_frame_equal(smoke_demo.run.metrics, kept)


@pytest.mark.parametrize(("case", "method"), [("phantom-c", method) for method in METHODS] + [("phantom-a", "MambaHoME")])
def test_predictions_lie_on_the_files_own_grid(metrics, smoke_demo, case, method):
    prediction, file = saved(smoke_demo, case, method), nib.load(smoke_demo.data.cases[case].image)
    assert prediction.shape == file.shape
    np.testing.assert_allclose(prediction.affine, file.affine)
    assert prediction.get_data_dtype() == np.uint8
    assert np.asarray(prediction.dataobj).max() <= 8


@pytest.mark.parametrize(("role", "case", "method"), [("test", "phantom-c", method) for method in METHODS] + [("train", "phantom-a", "MambaHoME")])
def test_every_dice_can_be_made_again_from_the_files(metrics, smoke_demo, role, case, method):
    predicted, raw = np.asarray(saved(smoke_demo, case, method).dataobj), np.asarray(nib.load(smoke_demo.data.cases[case].label).dataobj)
    rows = metrics.query("role == @role and method == @method and metric == 'dice'").set_index("class")
    for index, (name, values) in enumerate(RAW.items(), start=1):
        P, R = predicted == index, np.isin(raw, values)
        assert rows.loc[name, "value"] == pytest.approx(2 * (P & R).sum() / (P.sum() + R.sum()), abs=1e-6)
        assert rows.loc[name, ["reference_voxels", "predicted_voxels"]].tolist() == [R.sum(), P.sum()]


def test_all_background_scores_nothing(metrics, smoke_demo):
    rows = metrics[metrics["method"] == "all background"]
    assert (rows["reference_voxels"] > 0).all()
    assert (rows["value"] == 0).all()
    assert not np.asarray(saved(smoke_demo, "phantom-c", "all background").dataobj).any()


def test_the_rule_is_read_off_the_training_patient(metrics, smoke_demo):
    expected = to_native(ThresholdAndPosition.fit(smoke_demo.train_case, 9)(smoke_demo.test_case), smoke_demo.test_case)
    assert (np.asarray(saved(smoke_demo, "phantom-c", "HU threshold and position").dataobj) == expected).all()
    assert metrics[metrics["method"] == "HU threshold and position"]["value"].mean() > 0.2, "phantoms of one kind: the rule must transfer"


def test_the_table_shows_the_network_beside_its_baselines(metrics):
    assert list(dice_table(metrics, role="test").columns)[2:] == list(METHODS)
    assert list(dice_table(metrics, role="train").columns)[2:] == ["MambaHoME"]


def test_measuring_twice_gives_the_same_numbers(metrics, smoke_demo):
    before = smoke_demo.run.metrics_file.read_bytes()
    again = measure(smoke_demo.run, smoke_demo.data)
    pd.testing.assert_frame_equal(again, metrics)
    assert smoke_demo.run.metrics_file.read_bytes() == before


def test_a_run_whose_patients_are_not_in_the_data_is_refused(smoke_demo):
    other = DemoData({"ct-a": smoke_demo.data.cases["phantom-a"]}, real=True, message="")
    with pytest.raises(UserError, match=r"data\.train_cases: found 'phantom-a', expected one of ct-a"):
        measure(smoke_demo.run, other)


def test_a_run_that_was_never_trained_is_refused(smoke_demo, tmp_path):
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    smoke_demo.settings.save(run.settings_file)
    with pytest.raises(UserError, match=r"best\.safetensors: no such file"):
        measure(run, smoke_demo.data)
    assert not run.metrics_file.exists()


def test_a_segmamba_run_is_measured_under_its_own_name_and_alone_where_that_is_asked_for(smoke_demo, tmp_path):
    settings = override(smoke_demo.settings, {"network": "SegMamba", "training.steps": 1})
    run = fit(settings, [smoke_demo.train_case], tmp_path / "run", progress=False)
    rows = measure(run, smoke_demo.data)
    assert set(rows.query("role == 'train'")["method"]) == {"SegMamba"}
    assert (run.folder / "predictions" / "phantom-c_SegMamba.nii.gz").exists()
    shutil.rmtree(run.predictions)
    alone = measure(run, smoke_demo.data, baselines=False)
    pd.testing.assert_frame_equal(alone, rows[rows["method"] == "SegMamba"].reset_index(drop=True))
    assert {path.name for path in run.predictions.iterdir()} == {"phantom-a_SegMamba.nii.gz", "phantom-c_SegMamba.nii.gz"}
