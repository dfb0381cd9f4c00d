"""What the tests of homelib/run share: small data sets on disk, generated, CT and an MRI-like one of other patients."""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from homelib.config import Settings, override
from homelib.data.check import check
from homelib.data.cohort import prepare_all
from homelib.data.layouts import find_cases
from homelib.data.manifest import load_manifest
from homelib.data.phantom import CT_CLASSES, ct_phantom
from homelib.run.cohort import DataSet

SHAPE, SPACING_MM = (24, 24, 24), 15.0
MANIFEST = """
name: {name}
title: generated
modality: {modality}
source: generated
licence: none
citation: none
classes: {{{classes}}}
spacing_mm: [15, 15, 15]
intensity_window: {window}
label_origin: SYNTHETIC
layouts:
  - {{name: all, image: "images/{{case}}.nii.gz", label: "labels/{{case}}.nii.gz"}}
{more}
"""


@dataclass(frozen=True)
class Made:
    """A data set on disk, prepared."""

    set: DataSet

    @property
    def name(self) -> str:
        return load_manifest(self.set.manifest).name


def make(folder: Path, name: str, *, classes=CT_CLASSES[1:], mri: bool = False, cases: int = 4, seed: int = 0, more: str = "split: {folds: 2}") -> Made:
    """Phantoms whose raw labels are those of `CT_CLASSES`, of which the manifest knows some."""
    root = folder / name
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for number in range(cases):
        image, label, affine = ct_phantom(seed + number, shape=SHAPE, spacing_mm=SPACING_MM)
        if mri:  # water bright, bone and air dark
            image = np.clip(500 + 400 * np.exp(-(((image - 60) / 120.0) ** 2)) - 0.4 * np.abs(image), 0, 1000)
        for part, volume in (("images", image.astype(np.int16)), ("labels", label)):
            nib.save(nib.Nifti1Image(volume, affine), root / part / f"{name}-{number}.nii.gz")
    listed = ", ".join(f"{known}: [{CT_CLASSES.index(known)}]" for known in classes)
    path = folder / f"{name}.yaml"
    window, modality = ("[0, 1000]", "MRI") if mri else ("[-175, 250]", "CT")
    path.write_text(MANIFEST.format(name=name, modality=modality, classes=listed, window=window, more=more))
    manifest = load_manifest(path)
    outcomes = prepare_all(find_cases(manifest, root).cases, folder / f"{name}-prepared", progress=False)
    assert [outcome.state for outcome in outcomes] == ["prepared"] * cases, outcomes
    return Made(DataSet(str(path), root, folder / f"{name}-prepared"))


@pytest.fixture(scope="session")
def ct_set(own_cache, tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp("ct"), "own_ct")


@pytest.fixture(scope="session")
def mri_set(own_cache, tmp_path_factory) -> Made:
    """Fewer classes, one of which has another name than in the CT."""
    return make(
        tmp_path_factory.mktemp("mri"),
        "own_mri",
        classes=("spleen", "liver", "kidneys"),
        mri=True,
        cases=3,
        seed=10,
        more="split: {parts: {train: 0.67, validation: 0.33}}",
    )


@pytest.fixture
def faulty_set(own_cache, tmp_path) -> DataSet:
    """Six cases in two folds: one whose label the check calls faulty, though it can be prepared, and one that cannot be."""
    made = make(tmp_path, "own_faulty", cases=6)
    images = {case.id: case for case in find_cases(load_manifest(made.set.manifest), made.set.root).cases}
    copied, spoilt = images["own_faulty-1"], images["own_faulty-4"]
    copied.image.write_bytes(images["own_faulty-0"].image.read_bytes())  # the same patient twice
    spoilt.image.write_bytes(b"no image")
    outcomes = prepare_all(images.values(), made.set.prepared, progress=False)
    assert [outcome.case for outcome in outcomes if outcome.state == "failed"] == ["own_faulty-4"]
    check(load_manifest(made.set.manifest), made.set.root, workers=1)
    return made.set


@pytest.fixture(scope="session")
def brief(smoke) -> Settings:
    """Four small steps, validated every second one."""
    return override(smoke, {"data.patch_voxels": (16, 16, 16), "training.steps": 4, "training.validate_every": 2, "training.augment.contrast_phase": 0})
