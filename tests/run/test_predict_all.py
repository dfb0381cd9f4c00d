"""Many scans through a run: formats, what is skipped, what fails, ensembles, clean-up, maps, and memory that does not suffice."""

import json
import re
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from homelib.config import DataConfig, override
from homelib.data.demo import phantom_cases
from homelib.data.manifest import Case, as_yaml, load_manifest
from homelib.data.prepare import prepare, read_array
from homelib.errors import UserError
from homelib.run import predict as predict_module
from homelib.run import predict_all as predict_all_module
from homelib.run.checkpoint import build_network, save_weights
from homelib.run.inputs import find_inputs, find_part, manifest_for, suffix_of
from homelib.run.named import class_names_of
from homelib.run.native import NativeLabels
from homelib.run.predict import keep_largest_pieces, predict_label, predict_probabilities, to_native
from homelib.run.predict_all import Ensemble, predict_all

MANIFEST = load_manifest("demo_ct")


def make_run(folder, settings, seed):
    folder.mkdir(parents=True)
    settings.save(folder / "settings.json")
    torch.manual_seed(seed)
    save_weights(build_network(settings), folder / "best.safetensors", settings)
    return folder


def names_in(folder) -> set[str]:
    """Names of what is in a folder; a lock, which some versions of filelock leave behind, is nothing."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def settings(smoke):
    return override(smoke, {"data.manifest": "demo_ct", "data.patch_voxels": (32, 32, 32), "prediction.window_batch": 4})


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / f"fold{seed}", settings, seed) for seed in range(2)]


@pytest.fixture
def scans(own_cache, tmp_path):
    """The phantom as NIfTI, NRRD and MetaImage, one damaged file, and a note."""
    folder = tmp_path / "scans"
    folder.mkdir()
    source = phantom_cases()["phantom-a"].image
    shutil.copy(source, folder / "a_0000.nii.gz")
    data, affine = read_array(source)
    image = sitk.GetImageFromArray(data.T.astype(np.int16))
    image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    image.SetOrigin((np.diag([-1, -1, 1]) @ affine[:3, 3]).tolist())
    image.SetDirection((np.diag([-1, -1, 1]) @ affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).ravel().tolist())
    for name in ("b.nrrd", "c.mha"):
        sitk.WriteImage(image, str(folder / name))
    (folder / "bad.nii.gz").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_scan_is_prepared_as_those_that_were_trained_on(runs, scans, settings, tmp_path, monkeypatch):
    asked = []

    def asked_for(path, case, how, **_):
        asked.append(how)
        raise UserError("enough")

    monkeypatch.setattr(predict_all_module, "prepare_into", asked_for)
    plain = make_run(tmp_path / "plain", override(settings, {"data.low_pass": False, "data.spacing_mm": (11, 11, 11)}), 0)
    for run in (runs[0], plain):
        predict_all(find_inputs([scans / "b.nrrd"], MANIFEST), Ensemble.of([run]), tmp_path / run.name, progress=False)
    assert [(how.low_pass, how.spacing_mm) for how in asked] == [(True, settings.data.spacing_mm), (False, (11, 11, 11))]


def test_every_format_comes_back_in_its_own_at_its_place_and_a_bad_scan_stops_nothing(runs, scans, tmp_path, settings):
    said = []
    cases = find_inputs([scans], MANIFEST)
    assert [case.id for case in cases] == ["a", "b", "bad", "c"]

    def on_done(result):
        said.append(f"{result.case}: {result.state}")

    done = predict_all(cases, Ensemble.of(runs[:1]), tmp_path / "out", progress=False, say=said.append, on_done=on_done)
    assert [result.state for result in done] == ["predicted", "predicted", "failed", "predicted"]
    assert done[2].message.startswith(f"{scans / 'bad.nii.gz'}: cannot be read")
    assert names_in(tmp_path / "out") == {"a.nii.gz", "b.nrrd", "c.mha", "labels.json", ".predicted.json"}
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["3"] == MANIFEST.class_names[3]
    first, place = read_array(tmp_path / "out" / "a.nii.gz")
    assert first.dtype == np.uint8
    assert done[0].voxels == {name: int((first == index).sum()) for index, name in enumerate(MANIFEST.class_names) if index}
    for name in ("b.nrrd", "c.mha"):
        label, affine = read_array(tmp_path / "out" / name)
        np.testing.assert_allclose(affine, read_array(scans / name)[1], atol=1e-3)
        np.testing.assert_allclose(affine, place, atol=1e-3)
        assert label.dtype == np.uint8
        assert (label != first).mean() < 1e-3  # the same scan, its intensities rounded
    parts = (("preparing", ("scan", "resampling")), ("predicting", ("buffer", "windows", "slabs", "labels")))
    stages = [rf"{stage} [0-9.]+ \({', '.join(f'{what} [0-9.]+' for what in listed)}\)" for stage, listed in parts]
    expected = [
        f"a: 48x48x48 voxels, 28x28x28 or fewer as prepared; memory beyond the networks, GiB at most: {', '.join(stages)}\\.",  # before it is read
        f"a: 28x[0-9]+x28 voxels as prepared; memory beyond the networks, GiB: {stages[1]}\\.",
        "a: predicted",  # before the next one
    ]
    for line, pattern in zip(said, expected, strict=False):
        assert re.fullmatch(pattern, line), line
    assert [line for line in said if line.startswith("bad")] == ["bad: failed"] == [said[6]]


def test_the_labels_are_those_of_python_and_a_rerun_does_what_is_missing(runs, scans, tmp_path, settings):
    cases = find_inputs([scans / "a_0000.nii.gz", scans / "c.mha"], MANIFEST)
    ensemble, out = Ensemble.of(runs[:1]), tmp_path / "out"
    predict_all(cases, ensemble, out, progress=False)
    case = prepare(cases[0], spacing_mm=settings.data.spacing_mm, cache=tmp_path / "cache")
    expected = to_native(predict_probabilities(ensemble.networks[0], case, settings), case)
    assert (read_array(out / "a.nii.gz")[0] == expected).all()
    (out / "c.mha").unlink()
    before = (out / "a.nii.gz").stat().st_mtime_ns
    assert [result.state for result in predict_all(cases, ensemble, out, progress=False)] == ["unchanged", "predicted"]
    assert (out / "a.nii.gz").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds predictions of another run or of other settings \(prediction\)"):
        predict_all(cases, ensemble.with_prediction(mirror=True), out)
    with pytest.raises(UserError, match="weights"):
        predict_all(cases, Ensemble.of(runs[1:]), out)


@pytest.mark.parametrize("written", [False, True], ids=["before its file", "after its file"])
def test_a_prediction_that_is_killed_is_finished_by_the_same_command(written, runs, scans, tmp_path, monkeypatch):
    original = predict_all_module.write_label

    def killed(*arguments, **named):
        if written:
            original(*arguments, **named)
        raise KeyboardInterrupt

    cases, ensemble = find_inputs([scans / "a_0000.nii.gz"], MANIFEST), Ensemble.of(runs[:1])
    with monkeypatch.context() as patch:
        patch.setattr(predict_all_module, "write_label", killed)
        with pytest.raises(KeyboardInterrupt):
            predict_all(cases, ensemble, tmp_path / "out", progress=False)
    (done,) = predict_all(cases, ensemble, tmp_path / "out", progress=False)
    assert done.state == ("unchanged" if written else "predicted"), done.message
    assert names_in(tmp_path / "out") == {"a.nii.gz", "labels.json", ".predicted.json"}


@pytest.mark.parametrize("name", ["labels.json", "x.labels.json"])
@pytest.mark.parametrize("content", ['{"1": "mine"}', "no JSON"])
def test_a_users_own_label_map_stays(name, content, runs, scans, tmp_path):
    (tmp_path / name).write_text(content)
    out = tmp_path if name == "labels.json" else tmp_path / "x.nii.gz"
    with pytest.raises(UserError, match=r"labels\.json: exists already, is no label map of bone, muscle, liver, \.\.\., and is left as it is"):
        predict_all(find_inputs([scans / "a_0000.nii.gz"], MANIFEST), Ensemble.of(runs[:1]), out, progress=False)
    assert (tmp_path / name).read_text() == content
    assert not list(tmp_path.glob("*.nii.gz"))


def test_a_users_own_file_in_the_folder_stays(runs, scans, tmp_path):
    (tmp_path / "a.nii.gz").write_text("mine")
    done = predict_all(find_inputs([scans / "a_0000.nii.gz"], MANIFEST), Ensemble.of(runs[:1]), tmp_path, progress=False)
    assert "exists already" in done[0].message
    assert (tmp_path / "a.nii.gz").read_text() == "mine"


def test_an_ensemble_is_the_mean_of_its_logits_and_a_folder_of_folds_is_one(runs, prepared, settings, tmp_path):
    both = Ensemble.of([runs[0].parent])
    assert len(both.networks) == 2
    assert both.fingerprint == Ensemble.of(runs).fingerprint != Ensemble.of(runs[:1]).fingerprint
    found = predict_label(both.networks, prepared, settings)
    mean = predict_probabilities(lambda x: sum(network(x) for network in both.networks) / 2, prepared, settings)
    assert (found != to_native(mean, prepared)).mean() < 1e-4
    other = make_run(tmp_path / "other", override(settings, {"data.spacing_mm": (9.0, 9.0, 9.0)}), 0)
    with pytest.raises(UserError, match="data.spacing_mm: found"):
        Ensemble.of([runs[0], other])
    joint = make_run(tmp_path / "joint", override(settings, {"data.also": ("demo_mr_spine",)}), 0)  # its classes are numbered another way
    with pytest.raises(UserError, match="data.also: found"):
        Ensemble.of([runs[0], joint])
    with pytest.raises(UserError, match="--accelerator: found 'gpu', expected auto, cpu"):
        Ensemble.of(runs, accelerator="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mirror", [False, True])
def test_labels_on_a_gpu_are_those_on_the_cpu(mirror, runs, prepared, settings, monkeypatch):
    """But for voxels where two classes are alike to the last digits; with the sums in the GPU's memory, and in the CPU's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # ten bits of a number are not the CPU's 23
    both = {name: Ensemble.of(runs, accelerator=name).with_prediction(mirror=mirror) for name in ("cpu", "cuda")}
    expected = predict_label(both["cpu"].networks, prepared, both["cpu"].settings)
    assert len(np.unique(expected)) > 2
    assert (predict_label(both["cuda"].networks, prepared, both["cuda"].settings) != expected).mean() < 1e-3
    windows = predict_module.windows_of(prepared, settings)
    how = {"device": torch.device("cuda"), "accumulate_on": torch.device("cpu")}
    label = NativeLabels(prepared, windows.axis)
    with torch.inference_mode():
        for first_row, rows in predict_module.case_rows(both["cuda"].networks, prepared, both["cuda"].settings, windows, **how):
            assert rows.device.type == "cpu"
            label.add(first_row, rows)
    assert (label.label != expected).mean() < 1e-3


def test_probability_maps_agree_with_the_labels(runs, scans, tmp_path):
    predict_all(find_inputs([scans / "a_0000.nii.gz"], MANIFEST), Ensemble.of(runs[:1]), tmp_path / "out", probabilities=True, progress=False)
    label = read_array(tmp_path / "out" / "a.nii.gz")[0]
    maps = {name: nib.load(tmp_path / "out" / "probabilities" / f"a_{name}_probability.nii.gz") for name in MANIFEST.class_names[1:]}
    assert all(volume.get_data_dtype() == np.uint8 for volume in maps.values())
    values = np.stack([volume.get_fdata() for volume in maps.values()])
    assert values.min() >= 0
    assert values.sum(0).max() <= 1 + 8 / 255
    inside = label > 0
    best = np.take_along_axis(values, (label.astype(int) - 1).clip(0)[None], 0)[0]
    assert inside.any()
    assert (best[inside] >= values.max(0)[inside] - 1 / 255).all()
    assert not list((tmp_path / "out").rglob(".maps*"))


def test_a_probability_map_of_the_users_is_left_as_it_is(runs, scans, tmp_path):
    theirs = tmp_path / "out" / "probabilities" / "a_liver_probability.nii.gz"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    (done,) = predict_all(find_inputs([scans / "a_0000.nii.gz"], MANIFEST), Ensemble.of(runs[:1]), tmp_path / "out", probabilities=True, progress=False)
    assert (done.state, done.message.split(": ")[1].startswith("exists already")) == ("failed", True)
    assert theirs.read_text() == "mine"


def test_two_processes_on_one_folder_keep_each_others_record(runs, scans, tmp_path):
    ensemble, out = Ensemble.of(runs[:1]), tmp_path / "out"
    first, second = find_inputs([scans / "a_0000.nii.gz"], MANIFEST) * 2
    ours, theirs = (predict_all_module._record(out, ensemble, False) for _ in range(2))
    ours.add(first)
    theirs.add(replace(second, id="b"))
    again = predict_all_module._record(out, ensemble, False)
    assert again.began(first)
    assert again.began(replace(second, id="b"))
    assert not again.began(replace(second, id="c"))


def test_only_the_largest_piece_of_a_class_is_kept_where_asked(runs, prepared, settings):
    label = np.zeros((9, 9, 9), np.uint8)
    label[1:4, 1:4, 1:4], label[4, 4, 4], label[7, 7, 7], label[0, 8, 0], label[0, 8, 8] = 1, 1, 1, 2, 2
    kept = keep_largest_pieces(label.copy(), [1])
    assert (kept != label).nonzero() == ([7], [7], [7]) or np.argwhere(kept != label).tolist() == [[7, 7, 7]]  # (4, 4, 4) touches by a corner
    misspelled = Ensemble.of(runs[:1]).with_prediction(one_piece=("livr",))
    with pytest.raises(UserError, match="prediction.one_piece: found 'livr'"):
        predict_all([], misspelled, "nowhere", progress=False)  # before the first scan
    with pytest.raises(UserError, match="prediction.one_piece: found 'livr', expected some of bone"):
        predict_label(Ensemble.of(runs[:1]).networks, prepared, override(settings, {"prediction.one_piece": ("livr",)}))


def test_out_of_memory_halves_the_windows_then_sums_elsewhere_and_says_so(prepared, settings, monkeypatch):
    seen, said, counted = [], [], []

    def network(x):
        seen.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(x), 9, *x.shape[2:])

    small = override(settings, {"data.patch_voxels": (16, 16, 16)})
    label = predict_label([network], prepared, small, say=said.append, on_window=counted.append)
    assert not label.any()
    assert seen[:3] == [4, 2, 1]
    assert [line.split("once more with ")[1].split(" windows")[0] for line in said] == ["2", "1"]
    assert sum(counted) == predict_module.windows_of(prepared, small).count
    assert predict_module._attempts(2, torch.device("cuda")) == [(2, torch.device("cuda")), (1, torch.device("cuda")), (1, torch.device("cpu"))]

    def never(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"not enough memory on cpu for one window of 16x16x16 voxels, expected more\. Crop the scan"):
        predict_label([never], prepared, small)


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), MemoryError()]
)
def test_a_scan_that_the_machine_has_no_memory_for_stops_no_other(error, scans, settings, tmp_path):
    """Of a CPU PyTorch's error is a plain RuntimeError, and NumPy's a MemoryError."""
    asked = []

    def network(x):
        asked.append(len(x))
        if len(asked) < 4:  # with 4, 2 and 1 windows at a time
            raise error
        return torch.zeros(len(x), 9, *x.shape[2:])

    small = override(settings, {"data.patch_voxels": (16, 16, 16)})
    done = predict_all(find_inputs([scans / "b.nrrd", scans / "c.mha"], MANIFEST), Ensemble((network,), small, ""), tmp_path / "out", progress=False)
    assert [result.state for result in done] == ["failed", "predicted"]
    assert done[0].message.startswith("b: not enough memory on cpu for one window")
    assert asked[:3] == [4, 2, 1]

    def wrong(x):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        predict_all(find_inputs([scans / "b.nrrd"], MANIFEST), Ensemble((wrong,), settings, ""), tmp_path / "other", progress=False)


def test_scans_are_prepared_by_the_data_set_of_the_run_that_has_their_modality():
    joint = DataConfig(manifest="demo_ct", also=("demo_mr_spine",))
    assert [manifest_for(joint, modality).name for modality in (None, "CT", "MRI", "US")] == ["demo_ct", "demo_ct", "demo_mr_spine", "demo_ct"]
    assert manifest_for(DataConfig(manifest="demo_mr_spine"), None).name == "demo_mr_spine"


def test_folders_of_slices_and_what_is_no_scan(tmp_path, scans, monkeypatch):
    slices = tmp_path / "series" / "patient-1"
    slices.mkdir(parents=True)
    (slices / "1.dcm").write_bytes(b"\0" * 128 + b"DICM")
    assert [case.id for case in find_inputs([tmp_path / "series"], MANIFEST)] == ["patient-1"]
    assert [case.image for case in find_inputs([slices], MANIFEST)] == [slices]
    with monkeypatch.context() as patch:
        patch.chdir(slices)
        assert [case.id for path in (".", "../patient-1/.") for case in find_inputs([path], MANIFEST)] == ["patient-1"] * 2
    assert suffix_of(slices) == ".nii.gz"
    (tmp_path / "x.mhd").write_text("")
    assert suffix_of(tmp_path / "x.mhd") == ".mha"
    (tmp_path / "bare").mkdir()
    for path, told in ((tmp_path / "none", "no such file"), (tmp_path / "bare", "no scan there")):
        with pytest.raises(UserError, match=told):
            find_inputs([path], MANIFEST)
    with pytest.raises(UserError, match="found the same name as"):
        find_inputs([scans / "a_0000.nii.gz", shutil.copy(scans / "a_0000.nii.gz", tmp_path / "a.nii.gz")], MANIFEST)
    with pytest.raises(UserError, match="no intensity window for MRI"):
        find_inputs([scans], MANIFEST, modality="MRI")


def test_scans_in_subfolders_are_found_named_by_their_way_and_what_is_none_is_told(tmp_path):
    """A folder a case with its label beside, a folder of several, slices; not what was predicted before, nor what is hidden."""
    names = ["top.nii.gz", "case_1/ct.nii.gz", "case_1/segmentation.nii.gz", "case_2/ct.nii.gz", "more/deep/a_0000.nii.gz", "more/deep/b.mha"]
    names += ["more/labels/case_1.nii.gz", ".hidden/x.nii.gz"]
    names += ["predictions/top.nii.gz", "predictions/.predicted.json", "others/y.nii.gz", "others/labels.json"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "case_3" / "series").mkdir(parents=True)
    (tmp_path / "in" / "case_3" / "series" / "1.dcm").touch()
    said = []
    found = {case.id: case.image.relative_to(tmp_path / "in").as_posix() for case in find_inputs([tmp_path / "in"], MANIFEST, modality="CT", say=said.append)}
    assert found == {
        "top": "top.nii.gz",
        "case_1": "case_1/ct.nii.gz",
        "case_2": "case_2/ct.nii.gz",
        "case_3_series": "case_3/series",
        "more_deep_a": "more/deep/a_0000.nii.gz",
        "more_deep_b": "more/deep/b.mha",
    }
    expected = [
        "2 labels, by their names (case_1/segmentation.nii.gz, ...)",
        "others, predictions, which hold predictions: a record of them, or a labels.json",
    ]
    assert said == [f"{tmp_path / 'in'}: left out {told}." for told in expected]
    (tmp_path / "links").mkdir()
    for name in ("case_2", "back"):
        (tmp_path / "links" / name).symlink_to(tmp_path / ("in/case_2" if name == "case_2" else "links"))
    assert [case.id for case in find_inputs([tmp_path / "links"], MANIFEST)] == ["case_2"]


def test_a_part_of_a_data_set_is_that_of_its_split(tmp_path):
    text = as_yaml(load_manifest("demo_ct").model_copy(update={"name": "mine", "cases": (), "packages": {}, "layouts": ()}))
    layouts = 'layouts: [{name: a, image: "tr/{case}.nii.gz", part: train}, {name: b, image: "ts/{case}.nii.gz", part: test}]'
    (tmp_path / "mine.yaml").write_text(f"{text}{layouts}\n")
    for name in ("tr/1.nii.gz", "ts/2.nii.gz", "ts/3.nii.gz"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    manifest = load_manifest(tmp_path / "mine.yaml")
    assert [case.id for case in find_part(manifest, tmp_path / "data", "test")] == ["2", "3"]
    assert len(find_part(manifest, tmp_path / "data", "all")) == 3
    with pytest.raises(UserError, match="--part: found 'tset', expected one of test, train or all"):
        find_part(manifest, tmp_path / "data", "tset")


def test_a_single_file_has_its_label_map_beside_and_is_measured_by_it(runs, scans, tmp_path):
    (done,) = predict_all(find_inputs([scans / "c.mha"], MANIFEST), Ensemble.of(runs[:1]), tmp_path / "x_seg.nii.gz", progress=False)
    assert json.loads((tmp_path / "x_seg.labels.json").read_text())["0"] == "background"
    assert class_names_of(done.path) == MANIFEST.class_names


def test_a_file_that_was_predicted_is_not_predicted_again_and_no_other_is_written_over(runs, scans, tmp_path):
    out, ensemble = tmp_path / "x.nii.gz", Ensemble.of(runs[:1])
    a, c = find_inputs([scans / "a_0000.nii.gz", scans / "c.mha"], MANIFEST)

    def again(case, ensemble=ensemble):
        return predict_all([case], ensemble, out, progress=False)[0]

    assert again(a).state == "predicted"
    before = out.stat().st_mtime_ns
    assert again(a).state == "unchanged"
    assert (other := again(c)).state == "failed"
    assert "x.nii.gz: exists already, of another scan or run" in other.message
    with pytest.raises(UserError, match=r"x\.nii\.gz: is a prediction of another run or of other settings \(weights\)"):
        again(a, Ensemble.of(runs[1:]))
    assert out.stat().st_mtime_ns == before
    out.unlink()
    assert again(a, Ensemble.of(runs[1:])).state == "predicted"  # of a file that is gone nothing is kept
    (tmp_path / "mine.nii.gz").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.nii\.gz: exists already and is left as it is"):
        predict_all([a], ensemble, tmp_path / "mine.nii.gz", progress=False)


def test_a_place_that_cannot_be_is_one_line(runs, tmp_path):
    cases = [Case(name, tmp_path / name, None, "CT", "UNSTATED", "demo_ct") for name in "ab"]
    with pytest.raises(UserError, match=r"found the file 'x.nii.gz' for 2 scans, expected a folder"):
        predict_all(cases, Ensemble.of(runs[:1]), tmp_path / "x.nii.gz")
    with pytest.raises(UserError, match="no settings.json there"):
        Ensemble.of([tmp_path / "nowhere"])
