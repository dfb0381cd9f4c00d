"""Maps of several layers in one pass, level 2 in space, files that come back as they were, and NIfTI whose lit voxels are where they were planted."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from homelib import MambaHoME, UserError
from homelib.config import override
from homelib.data.manifest import Case
from homelib.data.prepare import prepare
from homelib.run.predict import windows_of
from homelib.study.expert_maps import RoutingMaps, expert_maps, layers_of, maps_bytes, routing_maps, token_groups, window_groups
from homelib.study.map_files import write_nifti
from homelib.study.trace import trace_routing


@pytest.fixture(scope="module")
def network(smoke) -> MambaHoME:
    torch.manual_seed(0)
    return MambaHoME(smoke.model).eval()


@pytest.fixture(scope="module")
def case(case_of):
    rng = np.random.default_rng(0)
    return case_of(rng.uniform(-175, 250, (37, 19, 41)), rng.integers(0, 9, (37, 19, 41)))


@pytest.fixture(scope="module")
def maps(network, case, smoke) -> RoutingMaps:
    return routing_maps(network, case, smoke, slots=True)


def test_every_layer_in_one_pass_is_what_it_is_alone(network, case, smoke, maps):
    assert list(maps.experts) == layers_of(network) == [(stage, 0, level) for stage in range(4) for level in (1, 2)]
    for stage, block, level in ((0, 0, 1), (1, 0, 2), (3, 0, 2)):
        alone = expert_maps(network, case, smoke, stage=stage, block=block, level=level)
        assert alone.dtype == np.float32
        np.testing.assert_allclose(alone.sum(0), 1, atol=1e-5)
        np.testing.assert_allclose(maps[stage, block, level], alone, atol=1e-3)
    np.testing.assert_allclose(maps[0, 0, 1], expert_maps(network, case, smoke), atol=1e-3)  # where nothing is said


def test_both_levels_sum_to_one_and_level_2_has_its_own_experts(smoke, maps):
    for (stage, _, level), weights in maps.experts.items():
        experts = (smoke.model.experts_local if level == 1 else smoke.model.experts_global)[stage]
        assert weights.shape == (experts, 37, 19, 41)
        assert weights.dtype == np.float16
        np.testing.assert_allclose(weights.astype(float).sum(0), 1, atol=2e-3)


def test_slots_of_an_expert_sum_to_its_weight(smoke, maps):
    for stage in range(4):
        E, S = smoke.model.experts_local[stage], smoke.model.slots_per_expert
        slots = maps.slots[stage, 0].astype(np.float32)
        np.testing.assert_allclose(slots.reshape(E, S, *slots.shape[1:]).sum(1), maps[stage, 0, 1], atol=2e-3)


def test_one_window_holds_each_tokens_weights_at_its_voxels(network, smoke, case_of):
    case = case_of(np.random.default_rng(1).uniform(-175, 250, (32, 32, 32)))
    found = routing_maps(network, case, smoke, stages=[1], levels=[2], dtype=np.float32)[1, 0, 2]
    seen = torch.from_numpy((np.clip(case.image, -175, 250) + 175) / 425)[None, None].float()
    with torch.inference_mode(), trace_routing(network) as trace:
        network(seen)
    expected = trace[1, 0].weights(2)[0].numpy()
    for axis in (1, 2, 3):
        expected = expected.repeat(4, axis)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_winner_and_entropy_follow_from_the_weights(maps):
    weights = maps[0, 0, 2].astype(np.float32)
    assert (maps.winner((0, 0, 2)) == weights.argmax(0)).all()
    expected = -(weights * np.log(np.maximum(weights, 1e-12))).sum(0) / np.log(len(weights))
    np.testing.assert_allclose(maps.entropy((0, 0, 2)), expected, atol=1e-5)


@pytest.mark.parametrize(("experts", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_the_number_of_any_winner_fits(maps, experts, dtype):
    weights = np.zeros((experts, 1, 1, 2), np.float16)
    weights[-1] = 1
    winner = replace(maps, experts={(0, 0, 1): weights}).winner((0, 0, 1))
    assert winner.dtype == dtype
    assert (winner == experts - 1).all()


def test_maps_cannot_be_changed_and_say_nothing_that_they_were_not_told(maps):
    with pytest.raises(FrozenInstanceError):
        maps.label = None
    bare = RoutingMaps(maps.image, None, maps.spacing_mm, maps.affine, maps.experts)
    assert (bare.slots, bare.groups, bare.name, bare.class_names, bare.limits) == ({}, {}, "", (), (0, 1))


def test_every_window_is_told_of(network, case, smoke):
    told = []
    routing_maps(network, case, smoke, stages=[3], on_window=told.append)
    assert sum(told) == windows_of(case, smoke).count > 1


def test_mirrored_prediction_mirrors_the_maps(network, smoke, case_of):
    image = np.random.default_rng(1).uniform(-175, 250, (32, 32, 32))
    settings = override(smoke, {"prediction.mirror": True})
    found = expert_maps(network, case_of(image), settings)
    np.testing.assert_allclose(expert_maps(network, case_of(image[::-1].copy()), settings)[:, ::-1], found, atol=1e-5)


def test_the_decoder_does_not_run_and_the_stages_below_neither(network, case, smoke):
    ran = []
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in (("head", network.head), ("3", network.stages[3]))]
    routing_maps(network, case, smoke, stages=[0, 2])
    for hook in hooks:
        hook.remove()
    assert not ran


def test_what_is_not_there_is_refused(network, case, smoke, maps):
    for how, told in (({"stages": [4]}, "stages: found 4"), ({"blocks": [1]}, "blocks: found 1, expected 0 to 0"), ({"levels": [0]}, "levels: found 0")):
        with pytest.raises(UserError, match=told):
            routing_maps(network, case, smoke, **how)
    with pytest.raises(UserError, match="levels: found none"):
        layers_of(network, levels=[])
    with pytest.raises(UserError, match="levels: found 3, expected 1, 2 or both"):
        layers_of(network, levels=[1, 3])
    with pytest.raises(UserError, match=r"found \(7, 0, 1\), expected one of \(0, 0, 1\)"):
        maps[7, 0, 1]


def test_a_stage_with_fewer_blocks_has_fewer_layers(tiny):
    network = MambaHoME(tiny.model_copy(update={"depths": (1, 2, 1, 1)}))
    assert layers_of(network, [0, 1], levels=[2]) == [(0, 0, 2), (1, 0, 2), (1, 1, 2)]
    assert layers_of(network, [0, 1], [1]) == [(1, 1, 1), (1, 1, 2)]


def test_memory_is_told_and_grows_with_the_layers(network, case, smoke):
    few, all_of = (maps_bytes(network, case, smoke, layers) for layers in ([(0, 0, 1)], layers_of(network)))
    maps = routing_maps(network, case, smoke, stages=[0], levels=[1])
    kept = (maps[0, 0, 1], maps.groups[0], maps.image, maps.label)
    assert few["maps"] == sum(volume.nbytes for volume in kept)
    assert all(all_of[what] > few[what] for what in few)
    assert maps_bytes(network, case, smoke, iter([(0, 0, 1)])) == few


def test_the_memory_of_a_window_is_that_of_each_layer_and_of_all_together(network, case, smoke, monkeypatch):
    seen, cat = [], torch.cat

    def watched(parts, axis):
        whole = cat(parts, axis)
        seen.append(sum(part.nbytes for part in parts) + whole.nbytes)
        return whole

    monkeypatch.setattr(torch, "cat", watched)
    settings = override(smoke, {"prediction.window_batch": 2})
    routing_maps(network, case, settings, stages=[0, 1])
    monkeypatch.undo()
    assert maps_bytes(network, case, settings, layers_of(network, [0, 1]))["window"] == max(seen)


def test_slots_are_counted_in_the_memory_that_is_told(network, case, smoke, maps):
    without, told = (maps_bytes(network, case, smoke, layers_of(network), slots=slots) for slots in (False, True))
    assert told["maps"] - without["maps"] == sum(volume.nbytes for volume in maps.slots.values())
    assert all(told[what] > without[what] for what in told)


# ---------------------------------------------------------------- groups


def test_groups_of_a_window_are_strips_of_its_tokens(case, smoke):
    settings = override(smoke, {"data.patch_voxels": (16, 16, 32)})
    groups = window_groups(case, settings, 1, (0, 0, 0))
    assert groups.shape == case.image.shape
    tokens = token_groups(settings, 1)
    assert tokens.shape == (4, 4, 8)
    K = settings.model.group_size[1]
    assert tokens.ravel().tolist() == [token // K for token in range(128)]
    assert (groups[16:] == -1).all()
    assert groups[5, 9, 13] == tokens[1, 2, 3]
    last = window_groups(case, settings, 1, (36, 18, 40))
    assert (last[:21] == -1).all()
    assert last[-1, -1, -1] == tokens.max()


def test_maps_hold_the_groups_of_the_window_in_the_scans_middle(network, case, smoke, maps):
    assert list(maps.groups) == [0, 1, 2, 3]
    for stage, groups in maps.groups.items():
        np.testing.assert_array_equal(groups, window_groups(case, smoke, stage, (18, 9, 20)))
    small = override(smoke, {"data.patch_voxels": (16, 16, 32), "prediction.overlap": 0.0})
    shown = np.argwhere(routing_maps(network, case, small, stages=[0], levels=[1]).groups[0] >= 0)
    assert (shown.min(0).tolist(), shown.max(0).tolist()) == ([16, 0, 0], [31, 15, 31])  # of windows from 0, 16, 21; 0, 3; and 0, 9


# ---------------------------------------------------------------- files


def test_maps_come_back_from_their_file_as_they_were(maps, tmp_path):
    back = RoutingMaps.load(maps.save(tmp_path / "maps.npz"))
    for name in ("name", "class_names", "spacing_mm", "modality", "data_set", "limits"):
        assert getattr(back, name) == getattr(maps, name)
    assert (maps.modality, maps.data_set, maps.limits) == ("CT", "demo_ct", (-175, 250))
    for name in ("image", "label", "affine"):
        np.testing.assert_array_equal(getattr(back, name), getattr(maps, name))
    assert list(back.groups) == list(maps.groups)
    for stage, groups in back.groups.items():
        np.testing.assert_array_equal(groups, maps.groups[stage])
    for kind in ("experts", "slots"):
        assert list(getattr(back, kind)) == list(getattr(maps, kind))
        for place, volume in getattr(back, kind).items():
            assert volume.dtype == np.float16
            np.testing.assert_array_equal(volume, getattr(maps, kind)[place])
    assert [path.name for path in tmp_path.iterdir()] == ["maps.npz"]


def test_an_unlabelled_case_comes_back_without_a_label(network, smoke, case_of, tmp_path):
    maps = routing_maps(network, case_of(np.zeros((20, 20, 20))), smoke, stages=[3])
    assert not maps.slots
    assert RoutingMaps.load(maps.save(tmp_path / "maps.npz")).label is None


@pytest.mark.parametrize("content", [None, b"", b"no zip", "half", "other"])
def test_a_file_that_is_no_whole_one_is_refused_in_one_line(maps, tmp_path, content):
    path = tmp_path / "maps.npz"
    if content == "half":
        whole = maps.save(tmp_path / "whole.npz").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "other":
        np.savez(path, a=np.zeros(3))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="no such file" if content is None else "no whole file of routing maps") as error:
        RoutingMaps.load(path)
    assert "\n" not in str(error.value)


TURNED = Rotation.from_euler("zyx", [25, -15, 10], degrees=True).as_matrix()
AFFINES = {  # voxel axes of the file, its spacing in mm
    "upright, anisotropic": (np.eye(3), (2.0, 3.0, 5.0)),
    "rotated, anisotropic": (TURNED, (3.0, 2.0, 4.0)),
    "axes in another order and direction, rotated": (TURNED @ np.array([[0, 0, -1.0], [1, 0, 0], [0, -1, 0]]), (2.0, 4.0, 3.0)),
}


@pytest.mark.parametrize(("axes", "spacing_mm"), AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("stage", [0, 1])
def test_niftis_light_the_planted_place_in_mm(smoke, light_bright_tokens, tmp_path, axes, spacing_mm, stage):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * spacing_mm, (-40.0, 25.0, 110.0)
    image = np.full((40, 44, 36), -60, np.int16)
    image[24:32, 10:20, 8:16] = 1000
    centre = affine @ [27.5, 14.5, 11.5, 1]
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    case = prepare(Case("planted", tmp_path / "scan.nii.gz", None, "CT", "SYNTHETIC", "demo_ct"), spacing_mm=(3.0, 3.0, 3.0))
    network = MambaHoME(smoke.model).eval()
    light_bright_tokens(network, stage)
    maps = routing_maps(network, case, smoke, stages=[stage], levels=[1])
    files = {path.name: path for path in write_nifti(maps, tmp_path / "nifti")}
    weights = nib.load(files[f"stage{stage}_block0_level1_weights.nii.gz"])
    winner = nib.load(files[f"stage{stage}_block0_level1_winner.nii.gz"])
    scan = nib.load(files["image.nii.gz"])
    for volume in (weights, winner, scan):
        np.testing.assert_allclose(volume.affine, case.affine, atol=1e-4)
        assert volume.shape[:3] == case.image.shape
    lit = np.argwhere(np.asarray(weights.dataobj)[..., 1] > 0.5)
    assert len(lit)
    side_mm = 3.0 * 2 ** (stage + 1)
    assert np.linalg.norm((weights.affine @ [*lit.mean(0), 1] - centre)[:3]) < 0.87 * side_mm  # half a token along each axis
    for place in np.argwhere(np.asarray(scan.dataobj) > 500):  # the bright voxels themselves, in the file's own place, are lit
        assert np.asarray(weights.dataobj)[(*place, 1)] == 1
    inside = np.linalg.inv(affine) @ weights.affine @ np.c_[lit, np.ones(len(lit))].T
    low, high = np.array([24, 10, 8]) * spacing_mm, np.array([31, 19, 15]) * spacing_mm
    beyond_mm = np.maximum(low - inside[:3].T * spacing_mm, inside[:3].T * spacing_mm - high).max()
    assert beyond_mm < side_mm + 6  # nothing else is, but for tokens at the border and what resampling smears

    files = {path.name: path for path in write_nifti(maps, tmp_path / "native", native=case)}
    weights, winner = (nib.load(files[f"stage{stage}_block0_level1_{kind}.nii.gz"]) for kind in ("weights", "winner"))
    assert weights.shape[:3] == winner.shape == image.shape
    np.testing.assert_allclose(weights.affine, affine, atol=1e-4)
    shares, number = weights.get_fdata(), np.asarray(winner.dataobj)
    assert (shares[image == 1000, 1] > 0.99).mean() > 0.95  # resampling to 3 mm smears a voxel of the block's border
    by_voxel = np.full((*image.shape, 2), 0.0)
    to_prepared = np.linalg.inv(case.affine) @ affine
    for place in np.argwhere(image > -2000)[::7]:
        index = np.floor((to_prepared @ [*place, 1])[:3] + 0.5).astype(int)
        if ((index >= 0) & (index < case.image.shape)).all():
            by_voxel[tuple(place)] = maps[stage, 0, 1][(slice(None), *index)]
    looked_at = np.zeros(image.size, bool)
    looked_at[::7] = True
    looked_at = looked_at.reshape(image.shape)
    np.testing.assert_allclose(shares[looked_at], by_voxel[looked_at], atol=0.003)
    there = by_voxel[looked_at].sum(1) > 0.5
    assert (number[looked_at] == np.where(there, by_voxel[looked_at].argmax(1) + 1, 0)).all()
    assert there.mean() > 0.9


def test_the_winner_is_a_label_with_names_and_no_zero(maps, tmp_path):
    files = {path.name: path for path in write_nifti(maps, tmp_path)}
    winner = np.asarray(nib.load(files["stage0_block0_level2_winner.nii.gz"]).dataobj)
    assert (winner == maps.winner((0, 0, 2)).astype(int) + 1).all()
    assert winner.min() >= 1
    names = json.loads(files["stage0_block0_level2_winner.json"].read_text())
    assert names["0"] == "none"
    assert names["3"] == "expert 2"
    entropy = np.asarray(nib.load(files["stage1_block0_level1_entropy.nii.gz"]).dataobj)
    np.testing.assert_allclose(entropy, maps.entropy((1, 0, 1)), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(nib.load(files["label.nii.gz"]).dataobj), maps.label)
    assert np.asarray(nib.load(files["stage2_block0_slots.nii.gz"]).dataobj).shape[-1] == len(maps.slots[2, 0])
    assert json.loads((Path(tmp_path) / "label.json").read_text())["3"] == "liver"
    groups = np.asarray(nib.load(files["stage1_groups.nii.gz"]).dataobj)
    np.testing.assert_array_equal(groups, maps.groups[1] + 1)
    assert groups.min() == 0 < groups.max()
