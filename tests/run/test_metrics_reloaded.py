"""Against MetricsReloaded's numbers (reference/metrics_reloaded.json): alike where the definitions are, else the difference shown by taking theirs.

Theirs count every surface voxel alike, ours weigh a piece of surface by its area, as surface-distance does; docs/metrics.md has the table.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from homelib.run import surface
from homelib.run.evaluate import evaluate
from homelib.run.metrics import FULL
from homelib.study import edge_cases

_spec = importlib.util.spec_from_file_location("metrics_reloaded", Path(__file__).parent / "reference" / "metrics_reloaded.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

TOLD = json.loads(reference.FILE.read_text(encoding="utf-8"))
NSD_MM = TOLD["nsd_mm"]
ALIKE = {"dice": "dsc", "iou": "iou", "sensitivity": "sensitivity", "precision": "ppv", "hd95_voxels": "hd_perc"}  # ours, theirs
EMPTY = ("empty prediction", "empty reference", "both empty")


@pytest.fixture(scope="module")
def real_pairs(real_demo):
    return reference.ct_a(real_demo.cases["ct-a"])


def ours(masks) -> dict[str, float]:
    P, R, spacing_mm = masks
    about = {"spacing_mm": spacing_mm, "class_names": ("background", "x"), "case": "", "method": "", "label_origin": "SYNTHETIC"}
    table = evaluate(P.astype(np.uint8), R.astype(np.uint8), metrics=(*FULL, f"nsd_{NSD_MM:g}mm"), **about)
    return dict(zip(table["metric"], table["value"], strict=True))


def assert_as_theirs(masks, theirs) -> None:
    """All to 1e-3: what is defined alike as we measure it, the surface measures from surface voxels that count alike."""
    P, R, spacing_mm = masks
    assert reference.checksum(masks) == theirs["masks_crc32"], "other masks than were measured"
    assert spacing_mm == tuple(theirs["spacing_mm"])
    found = ours(masks)
    assert {name: found[name] for name in ALIKE} == pytest.approx({name: theirs[their] for name, their in ALIKE.items()}, abs=1e-3)
    assert 100 * found["volume_error"] == pytest.approx(theirs["rel_vol_error"], abs=0.1)  # percent
    voxels = surface.voxel_distances(P, R, spacing_mm)
    assert surface.average(voxels) == pytest.approx(theirs["assd"], abs=1e-3)
    assert (voxels.from_predicted.mean() + voxels.from_reference.mean()) / 2 == pytest.approx(theirs["masd"], abs=1e-3)
    assert surface.within(voxels, NSD_MM) == pytest.approx(theirs["nsd"], abs=1e-3)


@pytest.mark.parametrize("name", TOLD["made"])
def test_made_masks_are_measured_as_by_them(name):
    assert_as_theirs(reference.made()[name], TOLD["made"][name])


@pytest.mark.network
@pytest.mark.parametrize("name", TOLD["real"])
def test_real_masks_are_measured_as_by_them(name, real_pairs):
    assert_as_theirs(real_pairs[name], TOLD["real"][name])


@pytest.mark.parametrize("name", [name for name in TOLD["edge"] if name not in EMPTY])
def test_edge_cases_with_two_masks_are_measured_as_by_them(name):
    assert_as_theirs(edge_cases.masks()[name], TOLD["edge"][name])


@pytest.mark.parametrize("name", TOLD["made"])
def test_what_is_defined_by_area_is_that_of_surface_distance_on_the_same_masks(name):
    package = pytest.importorskip("surface_distance", reason="surface-distance is not installed (it is in the extra dev)")
    masks = reference.made()[name]
    P, R, spacing_mm = masks
    found, theirs = ours(masks), package.compute_surface_distances(R, P, spacing_mm)
    assert found["hd95"] == pytest.approx(package.compute_robust_hausdorff(theirs, 95), abs=1e-3)
    assert found[f"nsd_{NSD_MM:g}mm"] == pytest.approx(package.compute_surface_dice_at_tolerance(theirs, NSD_MM), abs=1e-3)
    assert found["asd"] != pytest.approx(TOLD["made"][name]["assd"], abs=1e-3)  # so that the two definitions are told apart by these masks
