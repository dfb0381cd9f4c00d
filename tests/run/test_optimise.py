"""Batches, rates, accumulation, averages and coarser losses: each against a computation of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

from homelib import UserError
from homelib.config import TrainingConfig, override, preset
from homelib.data.cache import Chunked
from homelib.data.loading import Patches
from homelib.run.checkpoint import build_network, load_checkpoint
from homelib.run.cohort import cohort
from homelib.run.deep import WEIGHTS, DeeplySupervised, coarser
from homelib.run.feed import Feed
from homelib.run.loss import segmentation_loss
from homelib.run.optimise import Averaged, build_optimizer, encoder_parameters, learning_rate_factor, set_learning_rate
from homelib.run.step import train_step
from homelib.run.train import fit


@pytest.fixture
def short(smoke):
    return override(smoke, {"data.patch_voxels": (16, 16, 32), "training.steps": 6, "training.batch_size": 2})


# ---------------------------------------------------------------- the loop against a bare one


def test_the_loop_computes_what_a_bare_loop_computes_bit_for_bit(smoke, prepared, tmp_path):
    """Forward, loss, backward and step, by hand, as the smoke preset says."""
    config = smoke.training
    torch.manual_seed(config.seed)
    network = build_network(smoke)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    patches, losses = Patches([prepared], smoke.data, config.augment, seed=config.seed), []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(step, config)
        image, label = patches.batch(step, config.batch_size)
        loss = segmentation_loss(network(image), label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    run = fit(smoke, [prepared], tmp_path / "run", progress=False)
    assert run.history["loss"].tolist() == losses
    kept = load_checkpoint(run.checkpoint_file)["network"]
    assert all(torch.equal(kept[name], tensor) for name, tensor in network.state_dict().items())


# ---------------------------------------------------------------- feed


def batches(patches, config, first=0, end=4, **where):
    return [[tuple(part.clone() for part in batch) for batch in made] for _, made in Feed(patches, config, **where).steps(first, end)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_batches_do_not_depend_on_workers_or_on_where_it_begins(short, prepared):
    patches, config = Patches([prepared], short.data, short.training.augment, seed=3), short.training
    here = batches(patches, config)
    assert same(here[2], batches(patches, config, first=2)[0])
    assert torch.equal(here[1][0][0], patches.batch(1, 2)[0])
    before = torch.get_rng_state()
    aside = batches(patches, config.model_copy(update={"workers": 1}))
    assert all(same(a, b) for a, b in zip(here, aside, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mistake_that_a_loading_process_finds_is_one_line(ct_set, brief, tmp_path):
    made = cohort(brief, [ct_set.set], fold=0)
    gone = [replace(case, image=Chunked(tmp_path / "gone.zip", 0, case.image.shape)) for case in made.train]
    source, told = Patches(gone, made.settings.data, made.settings.training.augment, seed=0), []
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"gone\.zip: cannot be read \(.*Prepare the data again\.$") as caught:
            next(Feed(source, made.settings.training.model_copy(update={"workers": workers})).steps(0, 2))
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_devices_and_accumulation_share_out_the_patches_of_one_large_batch(short, prepared):
    patches, config = Patches([prepared], short.data, short.training.augment, seed=3), short.training
    whole = patches.batch(1, 8)[0]
    split = config.model_copy(update={"accumulate": 2})
    parts = [batches(patches, split, 1, 2, rank=rank, world=2)[0] for rank in (0, 1)]
    found = torch.cat([parts[rank][number][0] for number in (0, 1) for rank in (0, 1)])
    assert torch.equal(found, whole)


def test_accumulated_batches_make_the_step_of_one_large_one(smoke, prepared):
    patches = Patches([prepared], smoke.data.model_copy(update={"patch_voxels": (16, 16, 32)}), smoke.training.augment, seed=0)
    image, label = patches.batch(0, 4)
    weights = []
    for parts in ([(image, label)], [(image[:2], label[:2]), (image[2:], label[2:])]):
        torch.manual_seed(0)
        fabric, network = Fabric(accelerator="cpu", devices=1), build_network(smoke)
        wrapped, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
        loss, norm, _ = train_step(fabric, wrapped, optimizer, parts, TrainingConfig(clip_norm=1.0))
        weights.append((loss, norm, network.head.weight.detach().clone()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    assert weights[0][1] == pytest.approx(weights[1][1], rel=1e-3)
    torch.testing.assert_close(weights[0][2], weights[1][2], rtol=1e-3, atol=1e-5)


def test_a_training_with_workers_is_the_same(short, prepared, tmp_path):
    alone = fit(short, [prepared], tmp_path / "alone", progress=False)
    aside = fit(override(short, {"training.workers": 1}), [prepared], tmp_path / "aside", progress=False)
    assert alone.history["loss"].tolist() == aside.history["loss"].tolist()


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("name", ["MambaHoME", "SegMamba", "UNet"])
def test_rates_fall_from_the_decoder_to_the_first_stage(name, smoke):
    network = build_network(override(smoke, {"network": name}))
    config = TrainingConfig(steps=10, warmup_steps=2, learning_rate=0.1, layer_rate=0.5)
    optimizer = build_optimizer(network, config)
    assert set_learning_rate(optimizer, 0, config, lowered=0.5) == pytest.approx(0.1 * 0.5 * 0.5)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    named = dict(network.named_parameters())
    first, deepest, head = {
        "UNet": ("conv_0.conv_0.conv.weight", "down_4.convs.conv_0.conv.weight", "final_conv.weight"),
    }.get(name, ("stages.0.gsc.fuse.0.weight", "stages.3.gsc.fuse.0.weight", "head.weight"))
    assert [rates[id(named[n])] / 0.025 for n in (first, deepest, head)] == pytest.approx([0.5**4, 0.5, 1])
    decoder = [n for n in named if n.startswith(("up", "lift", "refine", "head", "final_conv"))]
    assert {round(rates[id(named[n])] / 0.025, 6) for n in decoder} == {1.0}
    encoder = {id(parameter) for parameter in encoder_parameters(network)}
    assert encoder == {id(parameter) for n, parameter in named.items() if n not in decoder}


def test_a_frozen_encoder_stays_and_then_learns(short, prepared, tmp_path):
    torch.manual_seed(0)
    start = build_network(short)
    kept = {}
    settings = override(short, {"training.frozen_steps": 2, "training.validate_every": 2})
    fit(
        settings,
        [prepared],
        tmp_path / "run",
        progress=False,
        on_validation=lambda step, n: kept.update({step: {k: t.clone() for k, t in n.state_dict().items()}}) or {},
    )
    encoder = {id(parameter) for parameter in encoder_parameters(start)}
    for name, parameter in start.named_parameters():
        assert torch.equal(kept[2][name], parameter) == (id(parameter) in encoder), name
    moved = [not torch.equal(kept[6][name], parameter) for name, parameter in start.named_parameters() if id(parameter) in encoder]
    assert sum(moved) > 0.8 * len(moved)  # a bias before a norm has no gradient


def test_the_average_by_hand():
    network = torch.nn.Conv3d(1, 2, 1)
    average = Averaged(network, 0.75)
    start = network.weight.detach().clone()
    with torch.no_grad():
        network.weight += 4
    average.update(network)
    torch.testing.assert_close(average.state_dict()["weight"], start + 1)
    average.swap(network)
    torch.testing.assert_close(network.weight.detach(), start + 1)
    average.swap(network)
    torch.testing.assert_close(network.weight.detach(), start + 4)


# ---------------------------------------------------------------- deep supervision


def test_coarser_levels_are_supervised_where_they_lie(smoke):
    network = DeeplySupervised(build_network(smoke))
    label = torch.randint(0, 9, (2, 1, 20, 16, 33))
    levels = network(torch.randn(2, 1, 20, 16, 33))
    assert [tuple(level.shape) for level in levels] == [(2, 9, 20, 16, 33), (2, 9, 16, 8, 24), (2, 9, 8, 4, 12)]
    half = coarser(label, levels[1])
    assert half.shape == (2, 1, 16, 8, 24)
    assert torch.equal(half[..., :10, :8, :17], label[..., ::2, ::2, ::2])
    assert (half[..., 10:, :, :] == 255).all()
    assert sum(WEIGHTS) == pytest.approx(1)


def test_its_loss_is_the_weighted_sum_and_its_heads_are_not_kept(short, prepared, tmp_path):
    settings = override(short, {"training.deep_supervision": True, "training.steps": 1, "data.patch_voxels": (16, 16, 16)})
    run = fit(settings, [prepared], tmp_path / "run", progress=False)
    torch.manual_seed(settings.training.seed)
    network = DeeplySupervised(build_network(settings))
    image, label = Patches([prepared], settings.data, settings.training.augment, seed=0).batch(0, 2)
    with torch.no_grad():
        levels = network(image)
    D, H, W = levels[2].shape[2:]
    quarter = F.pad(label, [0, 16, 0, 0, 0, 0], value=255)[..., ::4, ::4, ::4]  # the smallest cube is padded along its last axis
    assert quarter.shape[2:] == (D, H, W)
    expected = WEIGHTS[0] * segmentation_loss(levels[0], label) + WEIGHTS[2] * segmentation_loss(levels[2], quarter)
    expected += WEIGHTS[1] * segmentation_loss(levels[1], F.pad(label, [0, 16, 0, 0, 0, 0], value=255)[..., ::2, ::2, ::2])
    assert run.history["loss"].iloc[0] == pytest.approx(expected.item(), rel=1e-4)
    from homelib.run.checkpoint import trained_network

    trained_network(run)  # strictly: no head is there
    assert any(name.startswith("heads.") for name in load_checkpoint(run.checkpoint_file)["network"])


def test_a_network_without_our_decoder_is_refused(smoke):
    with pytest.raises(UserError, match=r"^training\.deep_supervision: BasicUNet has no decoder"):
        DeeplySupervised(build_network(override(smoke, {"network": "UNet"})))


# ---------------------------------------------------------------- presets, and a peer


def test_the_presets_are_those_of_the_paper_and_of_the_released_code():
    paper, released = preset("paper"), preset("released")
    for settings, decay, eps in ((paper, 1e-5, 1e-8), (released, 1e-4, 1e-4)):
        training = settings.training
        assert (training.learning_rate, training.weight_decay, training.adam_eps, training.batch_size) == (1e-4, decay, eps, 2)
        assert (training.precision, training.warmup_steps, training.clip_norm, training.ema) == ("32-true", 0, None, None)
        assert training.augment.recipe == settings.profile
    assert (paper.prediction.overlap, paper.prediction.blend) == (0.5, "gaussian")
    assert (released.prediction.overlap, released.prediction.blend) == (0.25, "constant")


@pytest.mark.parametrize("profile", ["smoke", "laptop"])
def test_the_plain_unet_has_as_many_parameters(profile):
    settings = preset(profile)
    ours, plain = (sum(p.numel() for p in build_network(override(settings, {"network": name})).parameters()) for name in ("MambaHoME", "UNet"))
    assert plain == pytest.approx(ours, rel=0.15 if profile == "smoke" else 0.02)


def test_the_plain_unet_takes_any_size_and_trains(short, prepared, tmp_path):
    network = build_network(override(short, {"network": "UNet"}))
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 20, 33, 17)).shape == (1, 9, 20, 33, 17)
    run = fit(override(short, {"network": "UNet", "training.steps": 2}), [prepared], tmp_path / "run", progress=False)
    assert np.isfinite(run.history["loss"]).all()
