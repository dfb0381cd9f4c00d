"""The guard: an injected NaN is skipped, counted and shown; then the training goes back; then it ends and says where it began."""

import math

import pandas as pd
import pytest
import torch

from homelib import UserError
from homelib.config import override
from homelib.run import train
from homelib.run.checkpoint import build_network, load_checkpoint, save_weights, trained_network
from homelib.run.cohort import cohort
from homelib.run.folder import Run
from homelib.run.guard import Guard, first_non_finite, is_out_of_memory, lost_a_loader, out_of_memory
from homelib.run.signals import Stopped
from homelib.run.train import fit


@pytest.fixture
def short(smoke):
    return override(smoke, {"data.patch_voxels": (16, 16, 32), "training.steps": 8, "training.non_finite_steps": 2})


@pytest.fixture
def inject(monkeypatch):
    """Make the images of some steps, each time they come or the first time alone, NaN."""

    def do(steps, *, once: bool):
        original, seen = train.Feed.steps, []

        def spoilt(self, first, end):
            for step, batches in original(self, first, end):
                if step in steps and not (once and step in seen):
                    seen.append(step)
                    batches = [(torch.full_like(image, math.nan), *rest) for image, *rest in batches]
                yield step, batches

        monkeypatch.setattr(train.Feed, "steps", spoilt)

    return do


def test_a_step_that_is_not_finite_is_skipped_counted_and_shown(short, prepared, tmp_path, inject, capsys):
    inject([3], once=False)
    run = fit(short, [prepared], tmp_path / "run")
    history, told = run.history, capsys.readouterr().out
    assert history["loss"].isna().tolist() == [False] * 3 + [True] + [False] * 4
    assert run.status["skipped"] == 1
    assert "run: step 4: loss nan, gradient norm nan; the step is skipped, 1 in a row" in told
    assert "1 steps skipped" in told
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_checkpoint(run.checkpoint_file)["network"].values())


def test_after_some_in_a_row_it_goes_back_with_a_lower_rate_and_ends_well(short, prepared, tmp_path, inject, capsys):
    inject([4, 5], once=True)
    run = fit(short, [prepared], tmp_path / "run")
    assert "loss: found nan in 2 steps in a row up to step 6: back to step 4, with 0.5 of the learning rate" in capsys.readouterr().out
    history = run.history
    assert history["step"].tolist() == list(range(8))
    assert history["loss"].notna().all()
    factor = history["learning_rate"] / [short.training.learning_rate * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert factor.tolist() == pytest.approx([1.0] * 4 + [0.5] * 4)
    assert run.status["skipped"] == 2


def test_the_second_time_it_ends_and_names_what_is_not_finite(short, prepared, tmp_path, inject):
    inject([4, 5], once=False)
    with pytest.raises(UserError, match=r"^loss: found nan in 2 steps in a row up to step 6, before and after going back.*: none, for the images") as caught:
        fit(short, [prepared], tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    run = Run(tmp_path / "run")
    assert run.state == "failed"
    assert load_checkpoint(run.checkpoint_file)["step"] == 4


@pytest.fixture
def leap(monkeypatch):
    """Leave infinite weights after some steps, counted as they are taken; their loss and gradient are finite."""

    def do(*numbers):
        original, taken = train.train_step, []

        def leaping(fabric, network, *arguments, **named):
            done = original(fabric, network, *arguments, **named)
            taken.append(done)
            if len(taken) in numbers:
                with torch.no_grad():
                    next(network.parameters()).flatten()[0] = math.inf
            return done

        monkeypatch.setattr(train, "train_step", leaping)

    return do


def test_infinite_weights_are_never_kept_and_the_training_goes_back(short, prepared, tmp_path, leap, capsys):
    """After step 4, where a checkpoint is due, and after the last, the tenth that is taken."""
    leap(4, 10)
    kept = []
    run = fit(short, [prepared], tmp_path / "run", on_validation=lambda step, n: kept.append([bool(p.isfinite().all()) for p in n.parameters()]) or {})
    told = capsys.readouterr().out
    assert "weights: found infinite ones after step 4, whose loss and gradient were finite: back to step 2, with 0.5 of the learning rate" in told
    assert "after step 8, whose loss and gradient were finite: back to step 6, with 0.25 of the learning rate" in told
    assert all(map(all, kept))
    assert (run.state, run.history["step"].tolist()) == ("done", list(range(8)))
    for path in (run.checkpoint_file, run.previous_file):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_checkpoint(path)["network"].values())


def test_weights_that_are_infinite_at_one_place_again_end_the_training_with_the_module(short, prepared, tmp_path, leap):
    leap(4, 6)
    with pytest.raises(UserError, match=r"^weights: found infinite ones after step 4, .*before and after going back.*finite: stages\.0\.downsample"):
        fit(short, [prepared], tmp_path / "run", progress=False)
    assert load_checkpoint(Run(tmp_path / "run").checkpoint_file)["step"] == 2


def test_a_training_that_is_stopped_with_infinite_weights_leaves_the_checkpoint_before(short, prepared, tmp_path, leap, monkeypatch):
    leap(3)
    monkeypatch.setattr(train.StopRequest, "asked", property(lambda self: len(taken) == 3, lambda self, value: None), raising=False)
    original, taken = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *arguments, **named: taken.append(1) or original(*arguments, **named))
    with pytest.raises(Stopped, match=r"after step 3; .*last\.ckpt is as it was, for the weights are infinite by now"):
        fit(short, [prepared], tmp_path / "run", progress=False)
    assert load_checkpoint(Run(tmp_path / "run").checkpoint_file)["step"] == 2


def test_a_start_from_infinite_weights_is_one_line(short, prepared, tmp_path):
    network = build_network(short)
    with torch.no_grad():
        network.head.bias[0] = math.nan
    save_weights(network, tmp_path / "bad.safetensors", short)
    with pytest.raises(UserError, match=r"^training\.init_from: .*bad\.safetensors: found weights that are not finite"):
        fit(override(short, {"training.init_from": str(tmp_path / "bad.safetensors")}), [prepared], tmp_path / "run", progress=False)
    assert not Run(tmp_path / "run").checkpoint_file.exists()


def test_going_back_does_not_give_up_the_best_weights(ct_set, brief, tmp_path, inject, monkeypatch):
    """The only checkpoint is that of the beginning; the best validation, of step 4, comes before the steps that fail."""
    inject([4, 5], once=True)
    changes = {"training.steps": 8, "training.validate_every": 2, "training.checkpoint_every": 8, "training.non_finite_steps": 2}
    made = cohort(override(brief, changes), [ct_set.set], fold=0)
    dices, weights = iter([0.7, 0.9, 0.3, 0.4, 0.5, 0.6]), []

    def validate(network, cases, settings, *, stop, progress):
        weights.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return pd.DataFrame([{"case": "x", "class": "liver", "dice": next(dices)}])

    monkeypatch.setattr(train, "validate", validate)
    run = fit(made.settings, made.train, tmp_path / "run", validation=made.validation, progress=False)
    assert run.history["validation_dice"].dropna().tolist() == [0.3, 0.4, 0.5, 0.6]
    assert run.status["best"] == 0.9
    assert pd.read_csv(run.validation_file)[["dice", "step"]].values.tolist() == [[0.9, 4]]
    kept = trained_network(run).state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights[1].items())


def test_the_first_module_that_is_not_finite_is_named_in_the_order_of_the_forward_pass(smoke):
    network, image = build_network(smoke), torch.randn(1, 1, 16, 16, 32)
    assert first_non_finite(network, image) == "none in the forward pass: the loss or a gradient overflows"
    with torch.no_grad():
        network.head.bias[0] = math.inf
        network.stages[1].blocks[0].mamba_norm.bias[0] = math.nan
    assert first_non_finite(network, image) == "stages.1.blocks.0.mamba_norm (DynamicTanh)"
    assert not network.head._forward_hooks


def test_a_checkpoint_beyond_the_failure_gives_another_try():
    guard = Guard(limit=2)
    assert not guard.takes(math.nan, 1.0)
    assert not guard.gives_in
    assert not guard.takes(1.0, math.inf)
    assert guard.gives_in
    assert guard.roll_back(10)
    guard.kept(8)
    assert guard.rollbacks == 1
    guard.kept(12)
    assert (guard.rollbacks, guard.rate, guard.skipped) == (0, 0.5, 2)
    assert guard.takes(1.0, 1.0)
    assert guard.roll_back(20)
    assert not guard.roll_back(20)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_no_memory_is_one_line_with_the_setting_to_lower_and_the_estimate(error, short, prepared, tmp_path, monkeypatch):
    def no_room(*arguments, **named):
        raise error

    monkeypatch.setattr(train, "train_step", no_room)
    with pytest.raises(UserError, match=r"^memory: training\.batch_size 4 with patches of 16 x 16 x 32 needs about 0\.\d GiB \(estimated\), more than is left"):
        fit(override(short, {"training.batch_size": 4}), [prepared], tmp_path / "run", progress=False)
    assert Run(tmp_path / "run").state == "failed"


def test_the_remedy_is_fewer_patches_and_then_smaller_ones(short):
    assert "Set training.batch_size=2, and training.accumulate=2" in str(out_of_memory(override(short, {"training.batch_size": 4}), 3.0, 2.0))
    one = override(short, {"training.batch_size": 1, "data.patch_voxels": (128, 128, 48)})
    assert "Lower data.patch_voxels, to 64, 64, 16 say" in str(out_of_memory(one, 3.0, None))


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", None),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible")),
        ("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)", None),
    ],
)
def test_a_loading_process_that_finds_no_memory_is_one_line_with_the_setting_to_lower(told, cause, short, prepared, tmp_path, monkeypatch):
    def ended(self, first, end):
        raise RuntimeError(told) from cause
        yield

    monkeypatch.setattr(train.Feed, "steps", ended)
    with pytest.raises(UserError, match=r"^training\.workers: found 4, of which the system has ended one for want of memory.* Set training\.workers=2, or 0"):
        fit(override(short, {"training.workers": 4}), [prepared], tmp_path / "run", progress=False)
    assert Run(tmp_path / "run").state == "failed"


def test_a_loading_process_that_ends_otherwise_is_no_want_of_memory():
    assert not lost_a_loader(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"))
    assert not lost_a_loader(RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "))
    assert not lost_a_loader(UserError("shared memory"))


def test_other_errors_are_no_want_of_memory():
    assert not is_out_of_memory(RuntimeError("Sizes of tensors must match"))
    assert not is_out_of_memory(ValueError("out of memory"))
