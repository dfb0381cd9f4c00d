"""Estimates: the arithmetic by hand, the paper's figure, and memory that grows as it must."""

from dataclasses import replace

import pytest
import torch

from homelib.config import override, preset
from homelib.run import estimate as module
from homelib.run.estimate import Estimate, demand, estimate, needed_gib, paper_seconds_a_patch
from homelib.run.predict import windows_of


def test_hours_and_rates_by_hand():
    """1,000 steps of 2 patches in 4 s each: 2 s a patch. A patch takes 3 s to make, so two processes keep up and one does not."""
    one = Estimate(step_seconds=4.0, patch_seconds=3.0, patch_mib=10.0, memory_gib=5.0, steps=1000, patches=2000, step_patches=2, workers=1, device="x")
    rows = {row["GPUs"]: row for row in one.rows()}
    assert (rows[1]["hours"], rows[1]["limit"]) == (pytest.approx(6000 / 3600), "data loading")
    assert rows[8]["hours"] == pytest.approx(6000 / 3600 / 8)
    assert (rows[1]["MiB/s read"], rows[64]["MiB/s read"]) == (pytest.approx(5.0), pytest.approx(320.0))
    assert rows[1]["workers a GPU"] == 2
    two = Estimate(4.0, 3.0, 10.0, 5.0, 1000, 2000, step_patches=2, workers=2, device="x").rows()[0]
    assert (two["hours"], two["limit"]) == (pytest.approx(4000 / 3600), "compute")


def test_patches_that_the_training_makes_itself_come_on_top_of_its_steps():
    """1,000 steps of 2 patches: 4,000 s of steps, and 2,000 s in which nothing else is done."""
    alone = Estimate(4.0, 1.0, 10.0, 5.0, 1000, 2000, step_patches=2, workers=0, device="x").rows()[0]
    assert (alone["hours"], alone["limit"]) == (pytest.approx(6000 / 3600), "compute")
    slow = Estimate(4.0, 3.0, 10.0, 5.0, 1000, 2000, step_patches=2, workers=0, device="x").rows()[0]
    assert (slow["hours"], slow["limit"]) == (pytest.approx(10000 / 3600), "data loading")


def test_validation_is_in_the_hours_by_hand():
    """10 times 12 cases of 60 s: 2 hours of one GPU; of 8 GPUs one has two cases; under FSDP all look at one case together."""
    about = {"validation_seconds": 60.0, "validations": 10, "validation_cases": 12}
    found = Estimate(4.0, 1.0, 10.0, 5.0, 1000, 2000, step_patches=2, workers=2, device="x", **about)
    rows = {row["GPUs"]: row for row in found.rows()}
    assert (rows[1]["of it validation"], rows[1]["hours"]) == (pytest.approx(2), pytest.approx(2 + 4000 / 3600))
    assert rows[8]["of it validation"] == pytest.approx(10 * 2 * 60 / 3600)
    assert rows[64]["of it validation"] == pytest.approx(10 * 60 / 3600)
    assert (rows[1]["limit"], rows[64]["limit"]) == ("validation", "validation")
    assert {row["of it validation"] for row in replace(found, together=True).rows()} == {2.0}


def test_a_validation_case_is_measured_as_far_as_it_comes_and_others_by_their_windows(smoke, prepared, monkeypatch):
    """Seconds are counted by a clock that each window of the network moves on by 10."""
    settings = override(smoke, {"data.patch_voxels": (16, 16, 16), "training.validate_every": 3, "training.validation_cases_most": 3})
    corner = replace(prepared, image=prepared.image[:16, :16, :16], label=prepared.label[:16, :16, :16], case=replace(prepared.case, id="corner"))
    count = {name: windows_of(case, settings).count for name, case in (("whole", prepared), ("corner", corner))}
    assert count["whole"] > 5 > count["corner"] == 1
    now = [0.0]

    class Slow(torch.nn.Module):
        def forward(self, x):
            now[0] += 10
            return torch.zeros(1, 9, *x.shape[2:])

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    whole = module._validation_seconds(Slow(), settings, [corner])
    assert (whole, now[0]) == (10.0, 20.0)  # and one before that does not count
    some = module._validation_seconds(Slow(), settings, [corner, prepared])
    assert some == pytest.approx(10 * (count["whole"] + 1) / 2)
    assert now[0] == 60  # 20 s are enough: the third window comes after them
    assert module._validation_seconds(Slow(), settings, []) == 0


def test_settings_for_several_devices_do_not_make_one_device_faster(smoke, prepared):
    """Four devices see four times the patches in as many steps; each patch takes as long as with one."""
    one, four = (estimate(override(smoke, {"training.devices": devices, "training.batch_size": 2}), [prepared]) for devices in (1, 4))
    assert (four.steps, four.patches, four.step_patches) == (one.steps, 4 * one.patches, one.step_patches)
    alike = replace(four, step_seconds=one.step_seconds, patch_seconds=0.0), replace(one, patch_seconds=0.0)
    hours = [{row["GPUs"]: row["hours"] for row in found.rows()} for found in alike]
    assert hours[0][4] == pytest.approx(hours[1][1])


def test_the_papers_pretraining_took_three_quarters_of_a_second_a_patch():
    assert paper_seconds_a_patch() == pytest.approx(7 * 24 * 3600 * 8 / (9404 * 0.85 * 800))
    assert 0.7 < paper_seconds_a_patch() < 0.8


def test_memory_grows_with_patches_and_falls_with_half_precision(smoke):
    small, two = (override(smoke, {"training.batch_size": size, "data.patch_voxels": (64, 64, 64)}) for size in (1, 2))
    fixed = demand(small).fixed_bytes / 2**30
    assert needed_gib(two) - fixed == pytest.approx(2 * (needed_gib(small) - fixed))
    assert demand(override(small, {"training.precision": "bf16-mixed"})).voxel_bytes == pytest.approx(demand(small).voxel_bytes / 2)
    assert demand(override(small, {"training.ema": 0.9})).fixed_bytes == pytest.approx(1.25 * demand(small).fixed_bytes)


def test_what_is_counted_agrees_with_what_a_small_network_is_known_to_keep(smoke):
    """Some kilobytes a voxel: 4 bytes for each of the few hundred values that a voxel of the input has in all layers, times what comes and goes."""
    assert 300 < demand(smoke).voxel_bytes < 5000
    laptop = demand(preset("laptop"))
    assert laptop.voxel_bytes > demand(smoke).voxel_bytes
    assert laptop.fixed_bytes == pytest.approx(16 * 3_000_269, rel=0.01)
