"""The training loop: it learns, it can be stopped and go on as if nothing had happened, it refuses what it should, and its folder tells all."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from monai.losses import DiceLoss

from homelib import UserError
from homelib.config import TrainingConfig, override
from homelib.run import train
from homelib.run.checkpoint import build_network, trained_network
from homelib.run.folder import Run
from homelib.run.loss import segmentation_loss
from homelib.run.optimise import learning_rate_factor
from homelib.run.predict import predict_probabilities
from homelib.run.step import class_weights, train_step
from homelib.run.train import fit


@pytest.fixture
def short(smoke):
    """Six small steps with everything random switched on, validated every second one."""
    return override(smoke, {"data.patch_voxels": (16, 16, 32), "training.steps": 6, "training.batch_size": 2, "training.augment.noise": 0.05})


def weights(run: Run) -> dict[str, torch.Tensor]:
    return trained_network(run).state_dict()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


def stop_at(step):
    """An on_validation that kills the run at this step, and leaves network and generator in another state."""

    def on_validation(now, network):
        network.eval()
        torch.rand(3)
        if now == step:
            raise Stopped(f"at {now}")
        return {"score": np.float64(now)}

    return on_validation


# ---------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def overfitted(prepared, smoke, tmp_path_factory):
    """50 steps on one patch: eight blocks of 8 voxels a side, one a class, in a background; about 10 s."""
    label = np.zeros((32, 16, 16), np.uint8)
    for index in range(8):
        x, y = 8 * (index // 2), 8 * (index % 2)
        label[x : x + 8, y : y + 8, 4:12] = index + 1
    grey = np.array([-150, -100, -50, 0, 50, 100, 150, 200, 240])[label]  # HU
    image = grey + np.random.default_rng(0).normal(0, 10, label.shape)
    case = replace(prepared, image=image.astype(np.float32), label=label)
    changes = {"model.channels": (8, 8, 8, 8), "data.patch_voxels": label.shape, "training.steps": 50, "training.learning_rate": 0.05}
    settings = override(smoke, changes | {"training.augment.contrast_phase": 0, "training.augment.rotation_degrees": 0, "training.validate_every": 50})
    return fit(settings, [case], tmp_path_factory.mktemp("overfit") / "run", progress=False), case


def test_one_patch_is_learnt_by_heart(overfitted):
    """Dice + cross-entropy starts at 3.2 and ends at 0.19. Background everywhere scores 1.6 or more, with the right frequencies 2.4."""
    run, case = overfitted
    loss = run.history["loss"]
    assert loss.iloc[0] > 2.5
    assert loss.iloc[-1] < 0.5
    predicted = predict_probabilities(trained_network(run), case, run.settings).argmax(0)
    assert (predicted == case.label).mean() > 0.95
    assert all((predicted[case.label == index] == index).mean() > 0.8 for index in range(9))


def test_every_parameter_learns(overfitted):
    run, _ = overfitted
    torch.manual_seed(run.settings.training.seed)
    start = build_network(run.settings).state_dict()
    same = [name for name, tensor in weights(run).items() if torch.equal(tensor, start[name])]
    assert same == []


def test_bfloat16_training_runs(short, prepared, tmp_path):
    run = fit(override(short, {"training.steps": 2, "training.precision": "bf16-mixed"}), [prepared], tmp_path / "run", progress=False)
    assert np.isfinite(run.history["loss"]).all()
    assert all(tensor.dtype == torch.float32 for tensor in weights(run).values())


def test_memory_of_the_steps_is_told_apart_from_that_of_what_validation_does(short, prepared, tmp_path, monkeypatch):
    most = [1.0]
    monkeypatch.setattr(train, "memory_gib", lambda: most[0])

    def on_validation(step, network):
        most[0] = float(step)
        return {}

    run = fit(short, [prepared], tmp_path / "run", progress=False, on_validation=on_validation)
    assert (run.status["steps_gib"], run.status["peak_gib"]) == (1.0, short.training.steps)


# ---------------------------------------------------------------- stop and go on


@pytest.fixture
def undisturbed(short, prepared, tmp_path) -> Run:
    return fit(short, [prepared], tmp_path / "undisturbed", progress=False, on_validation=stop_at(None))


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(short, prepared, tmp_path, undisturbed):
    with pytest.raises(Stopped):
        fit(short, [prepared], tmp_path / "run", progress=False, on_validation=stop_at(4))
    assert len(Run(tmp_path / "run").history) == 2  # what was kept at step 2
    torch.rand(100)
    run = fit(short, [prepared], tmp_path / "run", progress=False, on_validation=stop_at(None))
    assert equal(weights(run), weights(undisturbed))
    columns = ["step", "loss", "learning_rate", "score"]
    pd.testing.assert_frame_equal(run.history[columns], undisturbed.history[columns])
    assert run.history["seconds"].is_monotonic_increasing


def test_a_run_that_is_stopped_before_its_first_validation_starts_anew(short, prepared, tmp_path, undisturbed):
    with pytest.raises(Stopped):
        fit(short, [prepared], tmp_path / "run", progress=False, on_validation=stop_at(2))
    run = fit(short, [prepared], tmp_path / "run", progress=False, on_validation=stop_at(None))
    assert equal(weights(run), weights(undisturbed))


@pytest.mark.parametrize("victim", ["save_state", "save_checkpoint"])
def test_a_run_that_is_killed_while_it_writes_its_last_files_still_ends_with_all_of_them(victim, short, prepared, tmp_path, undisturbed, monkeypatch):
    original, calls = getattr(train, victim), []

    def killed(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 4:  # the first is before the first step
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(train, victim, killed)
    with pytest.raises(KeyboardInterrupt):
        fit(short, [prepared], tmp_path / "run", progress=False)
    run = fit(short, [prepared], tmp_path / "run", progress=False)
    assert equal(weights(run), weights(undisturbed))
    assert len(run.history) == 6
    assert run.state == "done"
    assert not [path.name for path in run.folder.iterdir() if path.name.startswith(".")]


def test_a_finished_run_stays_as_it_is(prepared, undisturbed):
    before = undisturbed.checkpoint_file.read_bytes(), undisturbed.weights_file.read_bytes(), undisturbed.history_file.read_bytes()
    again = fit(undisturbed.settings, [prepared], undisturbed.folder, progress=False)
    assert (again.checkpoint_file.read_bytes(), again.weights_file.read_bytes(), again.history_file.read_bytes()) == before
    assert again.state == "done"


def test_the_seed_decides_the_run(short, prepared, tmp_path, undisturbed):
    other = fit(override(short, {"training.seed": 1}), [prepared], tmp_path / "other", progress=False)
    assert not equal(weights(other), weights(undisturbed))
    assert other.history["loss"].iloc[0] != undisturbed.history["loss"].iloc[0]


# ---------------------------------------------------------------- the folder


def test_the_folder_tells_the_run(short, prepared, tmp_path):
    seen = []

    def on_validation(step, network):
        seen.append((step, network.training, Run(tmp_path / "run").state))
        network.eval()
        return {"dice": torch.tensor(step / 10)}

    settings = override(short, {"training.steps": 5, "training.warmup_steps": 2})
    assert Run(tmp_path / "run").state == "queued"
    run = fit(settings, [prepared], tmp_path / "run", progress=False, on_validation=on_validation)
    assert seen == [(2, True, "running"), (4, True, "running"), (5, True, "running")]
    assert run.settings == settings
    assert run.state == "done"
    history = pd.read_csv(run.folder / "history.csv")
    assert list(history.columns) == ["step", "loss", "learning_rate", "gradient_norm", "seconds", "dice"]
    assert history["step"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(history["learning_rate"], [2e-3 * learning_rate_factor(step, settings.training) for step in range(5)])
    np.testing.assert_allclose(history["dice"], [np.nan, 0.2, np.nan, 0.4, 0.5])
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "best.safetensors", "history.csv", "last.ckpt", "previous.ckpt", "settings.json", "status.json", "training.lock",
    ]  # fmt: skip


def test_a_failed_run_says_why(short, prepared, tmp_path):
    with pytest.raises(Stopped):
        fit(short, [prepared], tmp_path / "run", progress=False, on_validation=stop_at(2))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", "Stopped: at 2")


def test_the_kept_weights_are_the_last(short, prepared, tmp_path):
    last = {}
    run = fit(override(short, {"training.steps": 3}), [prepared], tmp_path / "run", progress=False,
              on_validation=lambda _, network: last.update({n: t.clone() for n, t in network.state_dict().items()}) or {})  # fmt: skip
    assert equal(weights(run), last)


def test_a_folder_with_other_settings_is_refused_and_left_alone(short, prepared, tmp_path, undisturbed):
    before = {path.name: path.read_bytes() for path in undisturbed.folder.iterdir()}
    with pytest.raises(UserError, match=r"undisturbed: holds a run with other settings \(training\.steps was 6, is 7\); nothing was changed"):
        fit(override(short, {"training.steps": 7}), [prepared], undisturbed.folder, progress=False)
    assert {path.name: path.read_bytes() for path in undisturbed.folder.iterdir()} == before


def test_a_network_of_another_number_of_classes_is_refused_before_a_folder_is_made(short, prepared, tmp_path):
    with pytest.raises(UserError, match=r"^model\.out_channels: found 3, expected 9, the classes of demo_ct"):
        fit(override(short, {"model.out_channels": 3}), [prepared], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_no_run_is_opened_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match=r"no settings\.json there"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.csv: no such file"):
        _ = Run(tmp_path).metrics
    assert Run(tmp_path).history.empty


# ---------------------------------------------------------------- loss, schedule, step


def test_the_loss_by_hand():
    """Two voxels, two classes. p of the right class: 3/4 and 1/2, by logits ln 3 and 0."""
    logits = torch.zeros(1, 2, 1, 1, 2)
    logits[0, 0, 0, 0, 0] = math.log(3)
    label = torch.tensor([0, 1]).view(1, 1, 1, 1, 2)
    dice = ((2 * 3 / 4) / (5 / 4 + 1) + (2 * 1 / 2) / (3 / 4 + 1)) / 2  # sums of p: 3/4 + 1/2 and 1/4 + 1/2; one voxel each
    entropy = (math.log(4 / 3) + math.log(2)) / 2
    assert segmentation_loss(logits, label).item() == pytest.approx(1 - dice + entropy, rel=1e-4)
    weighted = (1 * math.log(4 / 3) + 3 * math.log(2)) / 4
    assert segmentation_loss(logits, label, torch.tensor([1.0, 3.0])).item() == pytest.approx(1 - dice + weighted, rel=1e-4)
    assert segmentation_loss(logits, label, terms="dice").item() == pytest.approx(1 - dice, rel=1e-4)
    assert segmentation_loss(logits, label, torch.tensor([1.0, 3.0]), terms="ce").item() == pytest.approx(weighted, rel=1e-4)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_loss_and_its_gradient_are_those_of_monai_and_torch(batch_dice):
    logits, label = torch.randn(3, 5, 4, 6, 7, dtype=torch.float32).requires_grad_(), torch.randint(0, 4, (3, 1, 4, 6, 7))  # class 4 is nowhere
    ignored, weights = torch.rand(label.shape) < 0.3, torch.rand(5)
    keep, target = ~ignored, F.one_hot(label[:, 0], 5).movedim(-1, 1)
    dice = DiceLoss(batch=batch_dice)(logits.softmax(1) * keep, target * keep)
    label = label.masked_fill(ignored, 255)
    peer = dice + F.cross_entropy(logits, label[:, 0], weights, ignore_index=255)
    ours = segmentation_loss(logits, label, weights, batch_dice=batch_dice)
    torch.testing.assert_close(ours, peer)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(peer, logits), rtol=1e-4, atol=1e-7)


def test_batch_dice_takes_a_class_over_all_patches():
    """Class 1 is in the second patch alone. Over the batch it is half found; patch by patch, it is wholly missed in the first."""
    logits = 20 * F.one_hot(torch.tensor([[0, 1], [1, 1]]), 2).float().mT.reshape(2, 2, 1, 1, 2)  # sure of 0 1 and of 1 1
    label = torch.tensor([[0, 0], [1, 1]]).view(2, 1, 1, 1, 2)
    entropy = F.cross_entropy(logits, label[:, 0])
    apart = ((2 / 3) + 0 + 1 + 1) / 4  # Dice of patch 1 in classes 0 and 1, then of patch 2, where class 0 is nowhere
    together = (2 / 3 + 4 / 5) / 2
    assert segmentation_loss(logits, label).item() == pytest.approx(1 - apart + entropy.item(), abs=1e-3)
    assert segmentation_loss(logits, label, batch_dice=True).item() == pytest.approx(1 - together + entropy.item(), abs=1e-3)


def test_an_ignored_voxel_has_no_gradient_and_no_say():
    logits, label = torch.randn(2, 4, 5, 6, 7, requires_grad=True), torch.randint(0, 4, (2, 1, 5, 6, 7))
    ignored = torch.rand(label.shape) < 0.4
    label[ignored] = 255
    loss = segmentation_loss(logits, label)
    loss.backward()
    per_voxel = logits.grad.abs().sum(1, keepdim=True)
    assert (per_voxel[ignored] == 0).all()
    assert (per_voxel[~ignored] > 0).all()
    other = torch.where(ignored, torch.randn_like(logits) * 10, logits.detach())
    assert torch.equal(segmentation_loss(other, label), loss)
    everything = torch.full_like(label, 255)
    assert segmentation_loss(logits, everything).item() == 0


def test_the_loss_with_half_the_volume_ignored_is_that_of_the_other_half():
    logits, label = torch.randn(1, 4, 6, 6, 6), torch.randint(0, 4, (1, 1, 6, 6, 6))
    half = label.clone()
    half[:, :, 3:] = 255
    torch.testing.assert_close(segmentation_loss(logits, half), segmentation_loss(logits[:, :, :3], label[:, :, :3]))


def test_the_loss_takes_half_precision_and_gives_full():
    logits, label = torch.randn(1, 3, 4, 4, 4), torch.randint(0, 3, (1, 1, 4, 4, 4))
    low = segmentation_loss(logits.bfloat16(), label)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, segmentation_loss(logits, label), rtol=0.01, atol=0.01)


def test_class_weights_are_frequencies_to_a_power_with_mean_one(prepared):
    label = np.array([0] * 90 + [1] * 9 + [2] * 1 + [255] * 50, np.uint8).reshape(1, 1, -1)  # 255 does not count
    case = replace(prepared, label=label)
    assert class_weights([case], 3, 0.0) is None
    found = class_weights([case], 3, 1.0)
    torch.testing.assert_close(found, torch.tensor([1 / 0.9, 1 / 0.09, 1 / 0.01]) / 3)
    half = class_weights([case], 3, 0.5)
    assert (half * torch.tensor([0.9, 0.09, 0.01])).sum().item() == pytest.approx(1)
    assert (half[2] / half[0]).item() == pytest.approx(90**0.5)


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    config = TrainingConfig(steps=12, warmup_steps=4)
    factors = [learning_rate_factor(step, config) for step in range(13)]
    np.testing.assert_allclose(factors[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(factors[4:], [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)], atol=1e-12)
    assert learning_rate_factor(0, TrainingConfig(steps=5)) == 1
    assert learning_rate_factor(20, config) == 0
    assert 0 < learning_rate_factor(0, TrainingConfig(steps=2, warmup_steps=10)) <= 1


@pytest.mark.parametrize(("clip_norm", "terms"), [(None, "dice_ce"), (0.01, "dice_ce"), (None, "ce")])
def test_a_step_follows_the_gradient_and_a_clipped_one_no_farther_than_the_norm(clip_norm, terms):
    """Plain gradient descent of rate 1: the step is the gradient, and the second one does not hold the first one's."""
    fabric, network = Fabric(accelerator="cpu", devices=1), torch.nn.Conv3d(1, 2, 1)
    reference = torch.nn.Conv3d(1, 2, 1)
    reference.load_state_dict(network.state_dict())
    batch = torch.randn(1, 1, 4, 4, 4), torch.randint(0, 2, (1, 1, 4, 4, 4))
    wrapped, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=1.0))
    for _ in range(2):
        loss = segmentation_loss(reference(batch[0]), batch[1], terms=terms)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 0.02
        factor = 1.0 if clip_norm is None else clip_norm / norm
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= factor * gradient
        found, found_norm, taken = train_step(fabric, wrapped, optimizer, [batch], TrainingConfig(clip_norm=clip_norm, loss=terms))
        assert (found, found_norm, taken) == (pytest.approx(loss.item(), rel=1e-5), pytest.approx(norm.item(), rel=1e-4), True)
        for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
