"""A plan follows from the data and the memory: spacing, patch and batch, with reasons, and the paper's values beside."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from homelib import UserError
from homelib.data.manifest import load_manifest
from homelib.data.plan import GIB, LEAST_VOXELS, Demand, grid_of, plan

PANORAMA = load_manifest("panorama")
SCANS = [((512, 512, n), (0.75, 0.75, mm)) for n, mm in ((100, 2.0), (200, 1.0), (90, 2.5), (300, 2.0), (110, 2.0))]
SMALL = Demand(fixed_bytes=0, voxel_bytes=1000.0)


def planned(memory_gib, grids=SCANS, demand=SMALL, **more):
    return plan(PANORAMA, grids, memory_gib=memory_gib, demand=demand, **{"cases": 2000} | more)


def test_more_memory_makes_larger_patches_then_larger_batches():
    plans = [planned(gib) for gib in (0.2, 1, 4, 16, 100, 400)]
    volumes = [np.prod(p.patch_voxels) for p in plans]
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[2]
    median = (512, 512, 110)
    assert plans[-1].patch_voxels == tuple(-(-n // 16) * 16 for n in median)
    assert plans[-1].batch_size > 2
    for gib, p in zip((0.2, 1, 4, 16, 100, 400), plans, strict=True):
        assert all(n % 16 == 0 and n >= LEAST_VOXELS for n in p.patch_voxels)
        assert p.batch_size * np.prod(p.patch_voxels) * SMALL.voxel_bytes <= gib * GIB
        assert (p.batch_size + 1) * np.prod(p.patch_voxels) * SMALL.voxel_bytes > gib * GIB or p.batch_size == 2


def test_a_patch_has_the_proportions_of_the_median_scan():
    p = planned(4)
    share = np.array(p.patch_voxels) / (512, 512, 110)
    assert share.max() - share.min() < 0.2
    assert p.patch_voxels[0] > 2 * p.patch_voxels[2]


def test_the_spacing_is_the_median_and_finer_along_a_very_coarse_axis():
    assert planned(4).spacing_mm == (0.75, 0.75, 2.0)
    coarse = [((256, 256, 30), (0.7, 0.7, mm)) for mm in (2.0, 5.0, 5.0, 6.0, 5.0)]
    chosen = planned(4, coarse).spacing_mm
    assert chosen[:2] == (0.7, 0.7)
    assert chosen[2] == pytest.approx(np.percentile([2, 5, 5, 6, 5], 10))
    assert planned(4, spacing_mm=(1.0, 1.0, 3.0)).spacing_mm == (1.0, 1.0, 3.0)


def test_a_batch_of_a_small_data_set_stays_small():
    few, many = (planned(400, cases=cases) for cases in (30, 2000))
    assert 2 <= few.batch_size < many.batch_size
    assert "5% of the data" in next(row.reason for row in few.rows if row.what.startswith("batch"))


def test_the_papers_values_stand_beside():
    paper = {row.what: row.paper for row in planned(4).rows}
    assert paper["spacing, mm"] == "0.8 x 0.8 x 3"
    assert paper["patch, voxels"] == "192 x 192 x 48"
    assert paper["batch, patches"] == "2"
    assert all(row.reason for row in planned(4).rows)


def test_the_papers_network_trains_with_the_papers_patches_on_its_80_gib():
    p = plan(PANORAMA, [((400, 400, 150), (0.8, 0.8, 3.0))] * 3, memory_gib=80, cases=1571)
    assert 192 * 192 * 48 <= np.prod(p.patch_voxels)
    assert p.batch_size >= 2


def test_too_little_memory_is_one_line_with_what_it_takes():
    with pytest.raises(UserError, match=r"^memory: found 2 GiB, expected 3\.\d at least for this network") as caught:
        plan(PANORAMA, SCANS, memory_gib=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gib", [float("nan"), float("inf"), 0, -4])
def test_a_memory_that_is_none_is_one_line(gib):
    with pytest.raises(UserError, match=r"^memory: found .*, expected GiB above 0"):
        plan(PANORAMA, SCANS, memory_gib=gib)


def test_no_case_is_one_line():
    with pytest.raises(UserError, match="panorama: found no case to plan for"):
        planned(4, [])


@pytest.mark.parametrize("spacing_mm", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, float("nan")), (1.0, 1.0, float("inf"))], ids=str)
def test_a_spacing_that_is_none_is_one_line(spacing_mm):
    with pytest.raises(UserError, match=r"^spacing: found .*, expected three lengths in mm above 0") as caught:
        planned(4, spacing_mm=spacing_mm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nrrd", "scan.mha"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "SPL", "AIR"])
def test_a_grid_is_read_from_the_header_in_any_order_of_axes(name, axes, tmp_path):
    ornt = nib.orientations
    straight = nib.Nifti1Image(np.zeros((10, 11, 12), np.int16), np.diag([0.5, 0.7, 3.0, 1]))
    turned = straight.as_reoriented(ornt.ornt_transform(ornt.axcodes2ornt("RAS"), ornt.axcodes2ornt(axes)))
    nib.save(turned, tmp_path / "first.nii.gz")
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "first.nii.gz")), str(tmp_path / name))
    shape, spacing_mm = grid_of(tmp_path / name)
    assert shape == (10, 11, 12)
    assert spacing_mm == pytest.approx((0.5, 0.7, 3.0))


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.mha", "nowhere.nrrd"])
def test_a_header_that_cannot_be_read_is_one_line(name, tmp_path):
    if not name.startswith("nowhere"):
        (tmp_path / name).write_bytes(b"no header")
    with pytest.raises(UserError, match=rf"{name}: its header cannot be read") as caught:
        grid_of(tmp_path / name)
    assert "\n" not in str(caught.value)
