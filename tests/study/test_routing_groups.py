"""Scans of one network put together by modality and data set from what was kept of each; the summary's lines; the memory that is told beside what is taken."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from homelib import MambaHoME, UserError
from homelib.study.association import associate, associations
from homelib.study.expert_maps import layers_of, routing_maps
from homelib.study.knockout import WHAT, interventions
from homelib.study.map_files import write_nifti
from homelib.study.routing_groups import Kept, alike, counted, grouped, mark_of
from homelib.study.routing_tables import memory, summary, told_memory


@pytest.fixture(scope="module")
def kept(planted) -> list[Kept]:
    """Three scans of a network whose expert 2 serves the liver; the third is an MRI of another data set."""
    network, settings, cases = planted()
    found = [associations(routing_maps(network, case, settings, stages=[0], levels=[1]), shifts=20) for case in cases]
    about = [("CT", "one"), ("CT", "one"), ("MRI", "two")]
    return [Kept(case.case.id, *where, "0123", its) for case, where, its in zip(cases, about, found, strict=True)]


def test_what_is_kept_of_a_scan_comes_back(kept, tmp_path):
    back = Kept.load(kept[2].save(tmp_path / "one" / "associations.npz"))
    assert (back.name, back.modality, back.data_set, back.weights) == ("case-2", "MRI", "two", "0123")
    ((layer, mine),) = kept[2].found.items()
    ((place, its),) = back.found.items()
    assert (place, its.class_names) == (layer, mine.class_names)
    for name in ("joint", "null", "voxels"):
        np.testing.assert_array_equal(getattr(its, name), getattr(mine, name))
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"bad\.npz: no whole file of associations"):
        Kept.load(tmp_path / "bad.npz")


def test_scans_are_put_together_by_modality_and_by_data_set(kept):
    tables = grouped(kept)
    assert set(tables) == {"lift_by_modality", "information_by_modality", "lift_by_data_set", "information_by_data_set"}
    assert tables["information_by_modality"][["modality", "cases"]].values.tolist() == [["CT", 2], ["MRI", 1]]
    assert tables["information_by_data_set"][["data_set", "cases"]].values.tolist() == [["one", 2], ["two", 1]]
    best = tables["lift_by_data_set"].loc[tables["lift_by_data_set"].groupby("data_set")["lift"].idxmax()]
    assert best[["class", "expert"]].values.tolist() == [["liver", 2], ["liver", 2]]
    assert counted(kept) == "modality CT 2, MRI 1; data_set one 2, two 1"


def test_scans_of_other_weights_or_layers_are_left_out(kept, tmp_path):
    ((layer, table),) = kept[0].found.items()
    others = [replace(kept[0], weights="4567", name="other weights"), replace(kept[0], found={(1, 0, 1): table}, name="other layer")]
    same, left = alike([*kept, *others], kept[1])
    assert [one.name for one in same] == ["case-0", "case-1", "case-2"]
    assert left == ["other weights", "other layer"]
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    assert mark_of(tmp_path / "a") != mark_of(tmp_path / "b")


# ---------------------------------------------------------------- the summary


def test_no_effect_is_told_from_no_change_at_all(planted):
    network, _, _ = planted()
    wanted = interventions(network, stages=[0], levels=[1])  # four experts, bypass, shuffle, layer
    rows = []
    for number, intervention in enumerate(wanted):
        change = {0: (0, 0.0), 1: (0, 0.5), 2: (0, 0.25)}.get(number, (7, 3.0))
        about = {name: getattr(intervention, name) for name in WHAT} | {"case": "x", "class": "liver", "scan_low": -0.1, "scan_high": 0.1}
        rows.append(about | {"intact": 0.5, "without": 0.5, "change": 0.0, "flipped": change[0], "logit_change": change[1]})
    balance = pd.DataFrame({"stage": [0], "block": 0, "level": 1, "experts": 4, "entropy": 0.5, "busiest": 1.0})
    lines = summary({"balance": balance, "knockout": pd.DataFrame(rows)})
    assert "2 of 7 interventions change the class of no voxel, though they change logits, by 0.25 to 0.5 at most" in lines
    assert lines[-1] == "1 of 7 interventions change no logit at all: stage 0, block 0, level 1, without expert 0"


# ---------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def large(case_of):
    rng = np.random.default_rng(0)
    return case_of(rng.uniform(-175, 250, (48, 48, 48)), rng.integers(0, 9, (48, 48, 48)))


def peak_of(action) -> int:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def test_memory_of_shifts_and_files_is_what_they_take(smoke, large, tmp_path):
    network = MambaHoME(smoke.model).eval()
    layers = layers_of(network, [0], None, [2])
    maps = routing_maps(network, large, smoke, stages=[0], levels=[2])
    told = memory(network, large, smoke, layers)
    shifts = peak_of(lambda: associate(maps[0, 0, 2], maps.label, maps.class_names, shifts=20))
    assert 0.6 * shifts < told["shifts"] < 1.6 * shifts
    files = peak_of(lambda: write_nifti(maps, tmp_path))
    assert 0.6 * files < told["files"] < 1.6 * files
    assert sum(volume.nbytes for volume in (*maps.experts.values(), *maps.groups.values(), maps.image, maps.label)) == told["maps"]


def test_memory_counts_slots_logits_and_the_files_own_grid(smoke, large):
    network = MambaHoME(smoke.model).eval()
    layers = layers_of(network)
    plain, whole = memory(network, large, smoke, layers), memory(network, large, smoke, layers, slots=True, knock_out=True)
    assert set(whole) - set(plain) == {"knock-out"}
    assert whole["maps"] > plain["maps"]
    assert whole["windows"] > plain["windows"]
    assert whole["knock-out"] > 4 * 9 * 48**3
    native = memory(network, replace(large, native_shape=(480, 480, 480)), smoke, layers, native=True)
    assert native["files"] == 480**3 * (4 + 16)
    assert "shifts" not in memory(network, replace(large, label=None), smoke, layers)
    told = told_memory({"maps": 2**30, "windows": 2**29, "files": 2**31})
    assert told == "memory beyond the network, GiB: maps 1.00, and beside them at most 2.00 (windows 0.50, files 2.00; one after the other)"
