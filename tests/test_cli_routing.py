"""`home routing`: maps, tables, page and summary of a demo case, of a data set's case and of a scan; nothing overwritten, mistakes in one line."""

import re
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from homelib.config import override
from homelib.data.cases import demo_data, with_demo_cases
from homelib.run.checkpoint import build_network, save_weights
from homelib.run.folder import Run
from homelib.study.expert_maps import RoutingMaps
from homelib.view.page import page


@pytest.fixture(scope="module")
def run(smoke, own_cache, tmp_path_factory) -> Run:
    """An untrained network as a run: what its experts do is of no matter here."""
    run = Run(tmp_path_factory.mktemp("runs") / "mine")
    settings = with_demo_cases(smoke, demo_data("smoke"))
    run.folder.mkdir()
    settings.save(run.settings_file)
    torch.manual_seed(0)
    save_weights(build_network(settings), run.weights_file, settings)
    return run


def test_a_demo_case_has_maps_tables_a_page_and_a_summary(home, run, tmp_path):
    out = tmp_path / "out"
    status, told, err = home("routing", run.folder, "phantom-c", "--out", out, "--stage", 3, "--shifts", 20, "--slots", "--knock-out")
    assert status == 0, err
    maps = RoutingMaps.load(out / "maps.npz")
    assert (maps.name, list(maps.experts), list(maps.slots)) == ("phantom-c", [(3, 0, 1), (3, 0, 2)], [(3, 0)])
    weights = nib.load(out / "nifti" / "stage3_block0_level2_weights.nii.gz")
    np.testing.assert_array_equal(np.moveaxis(np.asarray(weights.dataobj), -1, 0), maps[3, 0, 2].astype(np.float32))
    np.testing.assert_allclose(weights.affine, maps.affine, atol=1e-4)
    tables = {path.stem: pd.read_csv(path) for path in out.glob("*.csv")}
    assert set(tables) == {"use", "balance", "lift", "information", "similarity", "knockout"}
    groups = nib.load(out / "nifti" / "stage3_groups.nii.gz")
    np.testing.assert_array_equal(np.asarray(groups.dataobj), maps.groups[3] + 1)
    assert {"entropy", "entropy_start", "busiest_start"} <= set(tables["balance"])
    assert len(tables["use"]) == 2 + 4
    assert set(tables["similarity"]["stage"]) == {3}
    settings = run.settings.model
    wanted = settings.experts_local[3] + settings.experts_global[3] + 5
    assert tables["knockout"].groupby(["level", "what", "expert"]).ngroups == wanted
    assert {"flipped", "logit_change"} <= set(tables["knockout"])
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 6  # of each layer three planes, all experts, and a lift matrix
    assert len(list((out / "panels").glob("*.png"))) == 6
    assert "three planes through" in html
    for name in tables:
        assert f"<b>{name}</b>" in html
    assert "stage 3, block 0, level 1: entropy" in told
    assert "stage 3, block 0, without the layer" in told or "interventions change" in told
    assert str(out) in told
    assert "over out/nifti/image.nii.gz and not over the scan's file, whose grid --native takes" in told
    assert "over out/nifti/image.nii.gz" in html
    assert told.rstrip().endswith("Associated with is not caused by: knockout.csv tells what this network loses.")
    assert not list(out.rglob(".*"))


def test_the_untrained_network_is_its_own_start(home, run, tmp_path):
    _, told, _ = home("routing", run.folder, "phantom-a", "--out", tmp_path / "out", "--stage", 2, "--level", 1, "--shifts", 20, "--no-nifti")
    table = pd.read_csv(tmp_path / "out" / "balance.csv")
    np.testing.assert_allclose(table["entropy"], table["entropy_start"])
    assert not (tmp_path / "out" / "nifti").exists()
    assert set(pd.read_csv(tmp_path / "out" / "similarity.csv")["level"]) == {1}
    assert told.rstrip().endswith("No NIfTI. Associated with is not caused by: --knock-out measures what depends on each.")


def test_several_cases_are_put_together_by_modality_and_data_set(home, mistake, run, tmp_path):
    how = ("--stage", 3, "--level", 2, "--shifts", 20, "--no-nifti")
    status, told, err = home("routing", run.folder, "phantom-a", "phantom-c", "--out", tmp_path / "both", *how)
    assert status == 0, err
    assert {path.name for path in (tmp_path / "both").iterdir() if path.is_dir()} == {"phantom-a", "phantom-c"}
    assert "2 cases together in lift_by_*.csv and information_by_*.csv (modality CT 2; data_set demo_ct 2)." in told
    table = pd.read_csv(tmp_path / "both" / "information_by_data_set.csv")
    assert table[["data_set", "cases", "stage", "block", "level"]].values.tolist() == [["demo_ct", 2, 3, 0, 2]]
    lift = pd.read_csv(tmp_path / "both" / "lift_by_modality.csv")
    apart = [pd.read_csv(tmp_path / "both" / case / "lift.csv") for case in ("phantom-a", "phantom-c")]
    liver = [table[table["class"] == "liver"] for table in (lift, *apart)]
    voxels = [table["voxels"].iloc[0] for table in liver]
    assert voxels[0] == voxels[1] + voxels[2]
    mean = sum(n * table["weight"].to_numpy() for n, table in zip(voxels[1:], liver[1:], strict=True)) / voxels[0]
    np.testing.assert_allclose(liver[0]["weight"], mean, rtol=1e-5)
    told = mistake("routing", run.folder, "phantom-a", "phantom-c", "--label", "x.nii.gz", "--out", tmp_path / "new")
    assert told.startswith("--label: found it with 2 cases")


def test_maps_are_kept_when_the_knock_out_is_interrupted(home, run, tmp_path, monkeypatch):
    from homelib.study import knockout

    predicted, calls = knockout._predicted, []

    def interrupted(*arguments, **how):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return predicted(*arguments, **how)

    monkeypatch.setattr(knockout, "_predicted", interrupted)
    status, *_ = home("routing", run.folder, "phantom-a", "--out", tmp_path / "out", "--stage", 3, "--shifts", 20, "--no-nifti", "--knock-out")
    assert status == 130
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"maps.npz", "use.csv", "balance.csv", "lift.csv", "information.csv", "similarity.csv", "knockout.csv"} <= there
    assert pd.read_csv(tmp_path / "out" / "knockout.csv").groupby(["level", "what", "expert"]).ngroups == 2
    assert "report.html" not in there


def test_maps_lie_on_the_scans_own_grid_where_asked(home, mistake, run, phantoms, tmp_path):
    how = ("--stage", 3, "--level", 1, "--shifts", 20)
    status, told, err = home("routing", run.folder, "phantom-a", "--out", tmp_path / "out", *how, "--native")
    assert status == 0, err
    scan, winner = nib.load(phantoms["phantom-a"].image), nib.load(tmp_path / "out" / "nifti" / "stage3_block0_level1_winner.nii.gz")
    assert winner.shape == scan.shape
    np.testing.assert_allclose(winner.affine, scan.affine, atol=1e-4)
    assert "NIfTI lie on the scan's own grid" in told
    assert mistake("routing", run.folder, "phantom-a", *how, "--native", "--no-nifti").startswith("--native: found it with --no-nifti")


def test_a_scan_by_its_path_with_and_without_a_label(home, mistake, run, phantoms, tmp_path):
    scan = tmp_path / "my scan.nii.gz"
    shutil.copy(phantoms["phantom-a"].image, scan)
    how = ("--stage", 3, "--level", 1, "--shifts", 20, "--no-nifti")
    status, told, err = home("routing", run.folder, scan, *how)
    assert status == 0, err
    out = run.folder / "routing" / "my scan"
    assert RoutingMaps.load(out / "maps.npz").label is None
    assert not (out / "lift.csv").exists()
    assert "by chance" not in told
    status, told, err = home("routing", run.folder, scan, "--label", phantoms["phantom-a"].label, "--out", tmp_path / "labelled", *how)
    assert status == 0, err
    lift = pd.read_csv(tmp_path / "labelled" / "lift.csv")
    assert "liver" in set(lift["class"])
    assert mistake("routing", run.folder, scan, "--knock-out", "--out", tmp_path / "new").startswith("--knock-out: found my scan without a label")
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(mistake, run, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    told = mistake("routing", run.folder, "phantom-a", "--out", tmp_path)
    assert told.startswith(f"{tmp_path}: exists already and is left as it is")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["phantom-b"], r"^phantom-b: no such case of demo_ct, nor a file; there are 2, phantom-"),
        (["phantom-a", "--stage", "4"], r"^stages: found 4, expected 0 to 3"),
        (["phantom-a", "--block", "1"], r"^blocks: found 1, expected 0 to 0"),
        (["phantom-a", "--level", "3"], r"^levels: found 3"),
        (["phantom-a", "--label", "x.nii.gz"], r"^--label: found it with the case phantom-a"),
        (["x", "--root", "nowhere"], r"^nowhere: no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, run, tmp_path, arguments, told):
    assert re.search(told, mistake("routing", run.folder, *arguments, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_network_without_home_is_refused(mistake, smoke, tmp_path):
    run = Run(tmp_path / "plain")
    settings = override(with_demo_cases(smoke, demo_data("smoke")), {"network": "SegMamba"})
    run.folder.mkdir()
    settings.save(run.settings_file)
    save_weights(build_network(settings), run.weights_file, settings)
    assert mistake("routing", run.folder, "phantom-a").startswith("network: found SegMamba, expected a MambaHoME")


def test_a_page_needs_nothing_beside_it_and_escapes_what_it_is_told():
    text = page("a <b> & c", ["x < y"], {"figure <1>": b"\x89PNG"}, {"t": ("about > it", pd.DataFrame({"class": ["<i>"], "value": [0.123456]}))})
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text
    assert "x &lt; y" in text
    assert "&lt;i&gt;" in text
    assert "0.1235" in text
    assert "base64,iVBORw==" in text or "base64,iVBORw" in text
    assert "http" not in text
