"""A case's file: what went in comes out, a patch reads its own blocks alone, places are a fair and bounded sample; the same bytes every time."""

import pickle
import zipfile
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch

from homelib import UserError
from homelib.config import AugmentConfig, DataConfig
from homelib.data.cache import BLOCK, DAMAGED, PLACES, CaseFile, Places, write_case
from homelib.data.loading import Patches
from homelib.data.manifest import load_manifest
from homelib.data.prepare import Preparation, PreparedCase, preparation, prepare_into

MANIFEST = load_manifest("demo_ct")


@pytest.fixture
def volumes():
    rng = np.random.default_rng(0)
    return rng.normal(0, 300, (70, 50, 90)).astype(np.float32), rng.integers(0, 4, (70, 50, 90)).astype(np.uint8)


@pytest.fixture
def kept(volumes, tmp_path):
    write_case(tmp_path / "case.zip", image=volumes[0], label=volumes[1], facts={"id": "x", "shape": [70, 50, 90]})
    return CaseFile.open(tmp_path / "case.zip")


def test_what_went_in_comes_out(kept, volumes):
    for whole in (kept.arrays(), (np.asarray(kept.image), np.asarray(kept.label))):
        for found, expected in zip(whole, volumes, strict=True):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)
    assert kept.facts["id"] == "x"


def test_a_slice_is_that_of_the_array(kept, volumes):
    for box in (np.s_[3:40, :, 17:18], np.s_[0:1, 0:1, 0:1], np.s_[69:70, 10:50, 80:90], np.s_[:, 4:9]):
        np.testing.assert_array_equal(kept.image[box], volumes[0][box])
        np.testing.assert_array_equal(kept.label[box], volumes[1][box])


def test_a_patch_reads_its_own_blocks_alone(volumes, tmp_path):
    """All of the file but what one corner needs is overwritten: the corner is still read."""
    image = np.random.default_rng(1).normal(0, 1, (256, 256, 64)).astype(np.float32)
    write_case(tmp_path / "case.zip", image=image, label=None, facts={"shape": [256, 256, 64]})
    corner = np.s_[:BLOCK, :BLOCK, :BLOCK]
    kept = CaseFile.open(tmp_path / "case.zip")
    size = (tmp_path / "case.zip").stat().st_size
    offset = zipfile.ZipFile(tmp_path / "case.zip").getinfo("image.b2nd").header_offset
    chunk = size // 16  # 16 chunks of 64 voxels a side; their order is that of the array
    content = bytearray((tmp_path / "case.zip").read_bytes())
    content[offset + 2 * chunk : offset + 14 * chunk] = bytes(12 * chunk)
    (tmp_path / "case.zip").write_bytes(content)
    np.testing.assert_array_equal(kept.image[corner], image[corner])
    with pytest.raises(DAMAGED):
        kept.arrays()


def test_the_same_volumes_give_the_same_bytes(volumes, tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_case(tmp_path / name, image=volumes[0], label=volumes[1], facts={"shape": [70, 50, 90]})
        monkeypatch.setattr(blosc2, "nthreads", 7)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_scaled_intensities_take_half_the_room_and_come_back_in_the_scans_unit(volumes, tmp_path):
    image = volumes[0]
    for name, window in (("kept", None), ("scaled", (-175.0, 250.0))):
        write_case(tmp_path / name, image=image, label=None, facts={"shape": [70, 50, 90]}, window=window)
    found = CaseFile.open(tmp_path / "scaled")
    np.testing.assert_allclose(found.arrays()[0], image.clip(-175, 250), atol=0.2)
    np.testing.assert_array_equal(found.arrays()[0][3:5], found.image[3:5])
    assert found.image[:1].dtype == np.float32
    assert (tmp_path / "scaled").stat().st_size < 0.55 * (tmp_path / "kept").stat().st_size


def test_a_case_without_a_label_has_none(volumes, tmp_path):
    write_case(tmp_path / "case.zip", image=volumes[0], label=None, facts={"shape": [70, 50, 90]})
    found = CaseFile.open(tmp_path / "case.zip")
    assert found.label is None
    assert found.places is None
    assert found.arrays()[1] is None


def test_a_volume_goes_to_other_processes_as_a_path(kept, volumes):
    sent = pickle.dumps(kept)
    assert len(sent) < 3_000
    np.testing.assert_array_equal(pickle.loads(sent).image[5:9], volumes[0][5:9])


def test_a_file_that_is_gone_is_one_line(kept):
    kept.path.unlink()
    with pytest.raises(UserError, match=r"case\.zip: cannot be read \(\w+\); it is gone or damaged\. Prepare the data again"):
        kept.image[:1]


# ---------------------------------------------------------------- places


def test_places_are_all_voxels_of_a_small_class_and_a_bounded_sample_of_a_large_one():
    label = np.zeros((40, 41, 42), np.uint8)
    label[3:5, 6, 7], label[10:30, 5:35, 5:37], label[0, 0, 0] = 1, 2, 9
    found = Places.of(label)
    assert found.counts == {1: 2, 2: 20 * 30 * 32, 9: 1}
    assert found.voxels[1].tolist() == [[3, 6, 7], [4, 6, 7]]
    assert found.voxels[9].tolist() == [[0, 0, 0]]
    sample = found.voxels[2]
    assert len(sample) == len(np.unique(sample, axis=0)) == PLACES
    assert (label[tuple(sample.T)] == 2).all()
    np.testing.assert_allclose(sample.mean(0), [19.5, 19.5, 20.5], atol=1.0)  # from all over it
    np.testing.assert_allclose(sample.std(0), [20 / 12**0.5, 30 / 12**0.5, 32 / 12**0.5], rtol=0.1)
    np.testing.assert_array_equal(Places.of(label).voxels[2], sample)


def test_places_come_back_from_the_file(kept, volumes):
    expected = Places.of(volumes[1])
    assert kept.places.counts == expected.counts
    for index, voxels in expected.voxels.items():
        np.testing.assert_array_equal(kept.places.voxels[index], voxels)


# ---------------------------------------------------------------- patches from the file

CHANGES = {
    "plain": AugmentConfig(),
    "turned": AugmentConfig(rotation_degrees=15, scaling=0.2, overhang=0.3, noise=0.02, gamma=0.2),
    "bent": AugmentConfig(rotation_degrees=15, bending_voxels=2.0),
    "phase": AugmentConfig(contrast_phase=1.0),
    "paper": AugmentConfig(recipe="paper"),
    "released": AugmentConfig(recipe="released"),
}


@pytest.fixture(scope="module")
def in_file(phantoms, tmp_path_factory):
    """phantom-a at 7 mm in its file."""
    path = tmp_path_factory.mktemp("prepared") / "case.zip"
    prepare_into(path, phantoms["phantom-a"], Preparation(spacing_mm=(7.0, 7.0, 7.0)))
    return PreparedCase.open(phantoms["phantom-a"], path)


def in_memory(case: PreparedCase) -> PreparedCase:
    return replace(case, image=np.asarray(case.image), label=np.asarray(case.label))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("size", [(16, 16, 16), (20, 33, 20), (64, 64, 64)], ids=str)
def test_patches_from_the_file_are_those_from_memory(change, size, in_file):
    data = DataConfig(patch_voxels=size)
    file, memory = (Patches([case], data, CHANGES[change], seed=1) for case in (in_file, in_memory(in_file)))
    for step in range(4):
        (image, label), (its_image, its_label) = file.batch(step, 2), memory.batch(step, 2)
        torch.testing.assert_close(image, its_image, atol=2e-4, rtol=0)
        assert (label != its_label).float().mean() < 1e-3  # a voxel between two: rounding decides


def test_a_case_in_its_file_is_never_read_whole_for_a_patch(in_file, monkeypatch):
    read = []
    original = type(in_file.image).__getitem__

    def counted(self, box):
        found = original(self, box)
        read.append(found.size)
        return found

    monkeypatch.setattr(type(in_file.image), "__getitem__", counted)
    Patches([in_file], DataConfig(patch_voxels=(8, 8, 8)), AugmentConfig(class_centred=1.0, rotation_degrees=10), seed=0).batch(0, 4)
    assert len(read) == 8
    assert max(read) <= 14**3


@pytest.mark.parametrize("change", ["turned", "paper", "released"])
def test_batches_are_the_same_for_any_number_of_workers(change, in_file):
    patches = Patches([in_file], DataConfig(patch_voxels=(16, 16, 16)), CHANGES[change], seed=5)
    expected = [patches.batch(step, 2) for step in (3, 4, 5)]
    for workers in (0, 1, 2):
        torch.manual_seed(workers)  # of no account
        found = list(patches.loader(steps=range(3, 6), size=2, workers=workers))
        assert len(found) == 3
        for (image, label), (its_image, its_label) in zip(found, expected, strict=True):
            assert torch.equal(image, its_image)
            assert torch.equal(label, its_label)


# ---------------------------------------------------------------- sampling over classes


def lone(label_index: int, prepared: PreparedCase) -> PreparedCase:
    label = np.zeros((30, 30, 30), np.uint8)
    label[15, 15, 15] = label_index
    return replace(prepared, image=np.zeros(label.shape, np.float32), label=label)


def test_a_class_that_few_cases_have_is_drawn_as_often_as_the_others(prepared):
    """Nine cases have class 1, one has class 2: by cases a tenth of the patches meets class 2, by classes half."""
    cases = [lone(1, prepared)] * 9 + [lone(2, prepared)]
    share = {}
    for sampling in ("cases", "classes"):
        patches = Patches(cases, DataConfig(patch_voxels=(5, 5, 5), sampling=sampling), AugmentConfig(class_centred=1.0), seed=0)
        share[sampling] = np.mean([patches.patch(step, 0)[1][0, 2, 2, 2].item() == 2 for step in range(200)])
    assert 0.04 < share["cases"] < 0.18
    assert 0.4 < share["classes"] < 0.6


def test_healthy_cases_are_drawn_as_often_as_a_class(prepared):
    """By classes too, where a case without any would never be met."""
    healthy = replace(lone(1, prepared), label=np.zeros((30, 30, 30), np.uint8), image=np.full((30, 30, 30), 250.0, np.float32))
    data = DataConfig(patch_voxels=(5, 5, 5), sampling="classes")
    patches = Patches([*[lone(1, prepared)] * 9, healthy], data, AugmentConfig(class_centred=1.0), seed=0)
    assert 0.4 < np.mean([patches.patch(step, 0)[0].mean().item() == 1 for step in range(200)]) < 0.6


def test_settings_that_are_none_are_one_line():
    with pytest.raises(UserError, match=r"^labels: found 'cubic'; .*'nearest', 'linear' or 'shares'"):
        preparation(labels="cubic")
    with pytest.raises(UserError, match=r"^spacing_mm\.1: found -1\.0"):
        preparation(spacing_mm=(1.0, -1.0, 1.0))
    for none in (float("inf"), float("nan"), 1e-300, 1e30):
        with pytest.raises(UserError, match=r"^spacing_mm\.0: found"):
            preparation(spacing_mm=(none, 1.0, 1.0))
