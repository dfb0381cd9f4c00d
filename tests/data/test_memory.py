"""Where prepared cases are kept: by an estimate from their shapes, and patches are the same from both."""

import numpy as np
import pytest
import torch

from homelib.config import override
from homelib.data import memory
from homelib.data.cohort import open_all, prepare_all
from homelib.data.loading import Patches
from homelib.data.memory import residence, within_reach
from homelib.data.prepare import Preparation


@pytest.fixture(scope="module")
def cases(phantoms, tmp_path_factory):
    """Both phantoms in their files."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_all(phantoms.values(), folder, Preparation(spacing_mm=(12.0,) * 3), progress=False)
    return open_all(phantoms.values(), folder)


def test_the_estimate_is_five_bytes_a_voxel_and_a_copy_a_process(cases):
    voxels = sum(int(np.prod(case.image.shape)) for case in cases)
    assert residence(cases).needed_gib == pytest.approx(voxels * 5 / 2**30)
    assert residence(cases, workers=3).needed_gib == pytest.approx(4 * residence(cases).needed_gib)


def test_half_of_the_free_memory_may_be_used_and_no_more(cases):
    needed = residence(cases).needed_gib
    enough, short = residence(cases, free_gib=2.001 * needed), residence(cases, free_gib=1.999 * needed)
    assert (enough.in_memory, short.in_memory) == (True, False)
    assert str(enough).endswith("50% may be used: kept in memory.")
    assert str(short).endswith("patches are read from the files, block by block.")
    assert all(isinstance(case.image, np.ndarray) and isinstance(case.label, np.ndarray) for case in within_reach(cases, enough))
    assert within_reach(cases, short) == cases
    assert not residence(cases, free_gib=3 * needed, workers=1).in_memory


@pytest.mark.parametrize("sampling", ["cases", "classes"])
def test_patches_are_the_same_from_memory_and_from_the_files(sampling, cases, smoke):
    data = override(smoke, {"data.sampling": sampling}).data
    kept = within_reach(cases, residence(cases, free_gib=1.0))
    for step in range(3):
        one, other = (Patches(some, data, smoke.training.augment, seed=0).batch(step, 2) for some in (cases, kept))
        torch.testing.assert_close(one[0], other[0], atol=1e-3, rtol=0)
        assert torch.equal(one[1], other[1])


def test_free_memory_is_no_more_than_a_container_may_have(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.free_memory_gib()
    assert free > 0.01
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.free_memory_gib() == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text(f"{2**20 + 1000}\n")
    assert memory.free_memory_gib() == 2**20 / 2**30
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    assert memory.free_memory_gib() == 0


def test_a_system_that_does_not_say_what_is_free_gives_a_quarter_of_what_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_meminfo", lambda: None)
    assert 0.01 < memory.free_memory_gib() < 100_000
