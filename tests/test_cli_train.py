"""`home train` on a user's data: prepared by `home data prepare`, trained fold by fold, estimated before; mistakes are one line."""

import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from homelib import Settings
from homelib.data.phantom import ct_phantom

MANIFEST = """
name: mine
title: generated
modality: CT
source: generated
licence: none
citation: none
classes: {liver: [3], spleen: [4]}
spacing_mm: [15, 15, 15]
intensity_window: [-175, 250]
layouts:
  - {name: all, image: "{case}_ct.nii.gz", label: "{case}_seg.nii.gz"}
split: {folds: 3}
"""
TINY = ["--profile", "smoke"]
for change in ("training.accelerator=cpu", "training.steps=2", "data.patch_voxels=[16, 16, 16]"):
    TINY += ["--set", change]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Three phantoms and a manifest; the folder."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.yaml").write_text(MANIFEST)
    (folder / "files").mkdir()
    for number in range(3):
        image, label, affine = ct_phantom(number, shape=(24, 24, 24), spacing_mm=15.0)
        nib.save(nib.Nifti1Image(image, affine), folder / "files" / f"p{number}_ct.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "files" / f"p{number}_seg.nii.gz")
    return folder


def test_from_files_to_folds(mine, home, tmp_path):
    data = ["--data", mine / "mine.yaml", "--root", mine / "files", "--prepared", tmp_path / "prepared"]
    status, _, err = home("train", tmp_path / "run", *data, *TINY, "--fold", 0)
    assert status == 2
    assert re.search(r"^home: .*p\d\.zip: no prepared case \(FileNotFoundError\)\. Prepare the data again\.$", err)
    assert not (tmp_path / "run").exists()

    assert home("data", "prepare", mine / "mine.yaml", mine / "files", "--out", tmp_path / "prepared", "--workers", 1)[0] == 0
    status, out, err = home("train", tmp_path / "run", *data, *TINY, "--fold", 2)
    assert status == 0, err
    assert re.search(r"run: 2 steps, last loss \d\.\d+, best validation Dice 0\.\d+\.", out)
    assert not list((tmp_path / "run").glob("routing*")), "only where it is asked for"
    status, out, err = home("train", tmp_path / "run", *data, *TINY, "--fold", 2, "--set", "training.log_routing=true")
    assert (status, err) == (0, ""), "it says how a run is computed, not what: the run is the same"
    settings = Settings.load(tmp_path / "run" / "settings.json")
    assert (settings.data.manifest, settings.model.out_channels) == (str(mine / "mine.yaml"), 3)

    status, out, err = home("train", tmp_path / "all", *data, *TINY, "--fold", "all", "--set", "training.log_routing=true")
    assert status == 0, err
    for fold in range(3):
        (validated_on,) = Settings.load(tmp_path / "all" / f"fold-{fold}" / "settings.json").data.validation_cases
        logged = pd.read_csv(tmp_path / "all" / f"fold-{fold}" / "routing_information.csv")
        assert logged[["step", "stage", "level"]].values.tolist() == [[step, s, level] for step in (0, 2) for s in range(4) for level in (1, 2)], validated_on
    assert "validation Dice of each fold's best weights" in out
    assert sorted(pd.read_csv(tmp_path / "all" / "folds.csv")["case"].unique()) == ["p0", "p1", "p2"]
    one, other = (Settings.load(tmp_path / folder / "settings.json") for folder in ("run", "all/fold-2"))
    assert one == other
    np.testing.assert_array_equal(*(pd.read_csv(tmp_path / folder / "history.csv")["loss"] for folder in ("run", "all/fold-2")))


def test_an_estimate_tells_hours_memory_and_disk_for_1_to_64_gpus_and_writes_nothing(mine, home, tmp_path):
    assert home("data", "prepare", mine / "mine.yaml", mine / "files", "--out", tmp_path / "prepared", "--workers", 1)[0] == 0
    data = ["--data", mine / "mine.yaml", "--root", mine / "files", "--prepared", tmp_path / "prepared", "--fold", 0]
    status, out, err = home("train", tmp_path / "run", *data, *TINY, "--set", "training.steps=1000", "--estimate")
    assert status == 0, err
    assert not (tmp_path / "run").exists()
    for told in ("1000 steps, 1000 patches", "Measured here (cpu, ", "MiB read for it", "Memory of a device: ", "a lower bound", "0.76 s a patch and GPU"):
        assert told in out, told
    assert "Validation: 500 times 1 cases, " in out
    assert "mine: its manifest states no epochs" not in out  # the user has set the steps
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    of_steps = [float(row[1]) - float(row[2]) for row in rows]
    assert of_steps[0] == pytest.approx(2 * of_steps[1], rel=0.02, abs=3e-3)  # told to a thousandth of an hour
    assert of_steps == sorted(of_steps, reverse=True)
    assert all(float(row[2]) == float(rows[0][2]) > 0 for row in rows)  # one case is no quicker on 64 GPUs


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "amos_ct"], r"^--root, --prepared: found 0 and 0 for 1 --data, expected one each"),
        (["--fold", "all"], r"^--fold: found 'all', expected a number from 0 or all, with --data"),
        (["--data", "amos_ct", "--root", ".", "--fold", "first"], r"^--fold: found 'first'"),
        (["--data", "amos_cd", "--root", "."], r"data set 'amos_cd' is unknown; nearest: amos_ct"),
        (["--faulty", "ignore"], r"^--faulty: found 'ignore', expected one of refuse, leave-out, keep\.$"),
        (["--profile", "papers"], r"^profile: found 'papers', expected one of smoke, laptop, paper, released; did you mean paper\?"),
    ],
)
def test_wrong_words_are_one_line_and_leave_no_folder(arguments, told, home, tmp_path):
    status, _, err = home("train", tmp_path / "run", *arguments)
    assert status == 2
    assert re.fullmatch(r"home: [^\n]+\n", err), err
    assert re.search(told, err.removeprefix("home: "))
    assert not (tmp_path / "run").exists()
