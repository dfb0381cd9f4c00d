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
    assert {"entropy", "entropy_start", "busiest_start"} <= set(tables["balance"])
    assert len(tables["use"]) == 2 + 4
    assert set(tables["similarity"]["stage"]) == {3}
    settings = run.settings.model
    wanted = settings.experts_local[3] + settings.experts_global[3] + 4
    assert tables["knockout"].groupby(["level", "what", "expert"]).ngroups == wanted
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4  # a panel and a lift matrix a layer
    assert len(list((out / "panels").glob("*.png"))) == 4
    for name in tables:
        assert f"<b>{name}</b>" in html
    assert "stage 3, block 0, level 1: entropy" in told
    assert "without stage 3, block 0" in told
    assert str(out) in told
    assert not list(out.rglob(".*"))


def test_the_untrained_network_is_its_own_start(home, run, tmp_path):
    home("routing", run.folder, "phantom-a", "--out", tmp_path / "out", "--stage", 2, "--level", 1, "--shifts", 20, "--no-nifti")
    table = pd.read_csv(tmp_path / "out" / "balance.csv")
    np.testing.assert_allclose(table["entropy"], table["entropy_start"])
    assert not (tmp_path / "out" / "nifti").exists()


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
