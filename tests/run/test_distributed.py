"""Two processes on this machine train as one does with the batch of both, and one of them writes."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from homelib import UserError
from homelib.config import Settings, override
from homelib.data.cases import demo_data, with_demo_cases
from homelib.data.cases import prepared as prepared_cases
from homelib.network.unet import Block
from homelib.run import begin
from homelib.run.checkpoint import build_network, load_checkpoint, save_checkpoint, trained_network
from homelib.run.estimate import estimate
from homelib.run.folder import Run
from homelib.run.optimise import build_optimizer, learning_rate_factor
from homelib.run.resume import gather, scatter
from homelib.run.train import fit

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from lightning_fabric import Fabric
from lightning_fabric.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from homelib.config import Settings
from homelib.data.cases import demo_data, prepared
from homelib.network.unet import Block
from homelib.run import train


class OnCPU(FSDPStrategy):  # Fabric refuses its own without a GPU; PyTorch shards over Gloo all the same
    def setup_module(self, module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)


def launched_on_cpu(config):
    fabric = Fabric(accelerator="cpu", devices=config.devices, strategy=OnCPU(auto_wrap_policy={Block}))
    fabric.launch()
    return fabric


def spoilt(self, first, end):
    for step, batches in original(self, first, end):
        if step in (2, 5) and step not in seen:
            seen.append(step)
            batches = [(torch.full_like(image, torch.nan), *rest) for image, *rest in batches]
        yield step, batches


demo, launched, original, seen = demo_data("smoke"), train.launched, train.Feed.steps, []
for folder in sys.argv[1:]:
    settings = Settings.load(folder + ".json")
    train.launched = launched_on_cpu if settings.training.strategy == "fsdp" else launched
    train.Feed.steps = spoilt if folder.endswith("guarded") else original
    others = prepared(settings.model_copy(update={"data": settings.data.model_copy(update={"test_cases": settings.data.validation_cases})}), demo, "test")
    train.fit(settings, prepared(settings, demo), folder, validation=others)  # all in the first's process group: a new one would meet its addresses
"""


@dataclass(frozen=True)
class Trained:
    """The same training by one process and by two."""

    one: Run
    two: Run


@pytest.fixture(scope="module")
def trainings(smoke, phantoms, tmp_path_factory) -> dict[str, Trained]:
    """By name. The two processes start once and train one after the other: DDP, with steps that fail at two places, then FSDP over Gloo: kept, validated,
    encoder frozen at first, rates that fall towards the input. FSDP's scan is PyTorch's own: a weight that Numba has looked at cannot be taken apart."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch is built without torch.distributed")
    folder, demo = tmp_path_factory.mktemp("distributed"), demo_data("smoke")
    base = override(with_demo_cases(smoke, demo), {"data.test_cases": (), "data.validation_cases": ("phantom-c",), "data.patch_voxels": (16, 16, 16)})
    asked = {
        "ddp": {"steps": 20, "validate_every": 10, "clip_norm": 1.0, "learning_rate": 1e-4, "batch_size": 4},
        "fsdp": {"steps": 8, "validate_every": 4, "clip_norm": 1.0, "learning_rate": 1e-3, "frozen_steps": 3, "layer_rate": 0.5, "batch_size": 2},
    }
    guarded = {"steps": 8, "validate_every": 8, "checkpoint_every": 2, "non_finite_steps": 1, "batch_size": 1, "devices": 2, "strategy": "ddp"}
    override(base, {f"training.{field}": value for field, value in guarded.items()}).save(folder / "guarded.json")
    alone = {name: override(base, {f"training.{field}": value for field, value in changes.items()}) for name, changes in asked.items()}
    alone["fsdp"] = override(alone["fsdp"], {"model.scan_backend": "blocked"})
    for name, settings in alone.items():
        each = {"training.batch_size": settings.training.batch_size // 2, "training.devices": 2, "training.strategy": name}
        override(settings, each).save(folder / f"{name}.json")
    (folder / "train.py").write_text(SCRIPT)
    folders = [folder / name for name in ("ddp", "guarded", "fsdp")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "train.py", *folders]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-12000:]  # torchrun's own words come last, the cause before them
    for path in folders:
        assert done.stdout.count(f"{path.name}: step {(steps := Settings.load(path.with_suffix('.json')).training.steps)}/{steps}") == 1  # told once
    for name, settings in alone.items():
        others = settings.model_copy(update={"data": settings.data.model_copy(update={"validation_cases": (), "test_cases": ("phantom-c",)})})
        fit(settings, prepared_cases(settings, demo), folder / f"{name}-alone", validation=prepared_cases(others, demo, "test"), progress=False)
    return {name: Trained(Run(folder / f"{name}-alone"), Run(folder / name)) for name in (*asked, "guarded")}


@pytest.mark.long
def test_two_processes_match_one_with_the_doubled_batch(trainings):
    alone, both = trainings["ddp"].one, trainings["ddp"].two
    np.testing.assert_allclose(both.history["loss"], alone.history["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(both.history["gradient_norm"], alone.history["gradient_norm"], rtol=1e-3)
    np.testing.assert_allclose(both.history["validation_dice"].dropna(), alone.history["validation_dice"].dropna(), atol=1e-3)
    assert both.state == "done"
    assert load_checkpoint(both.checkpoint_file)["step"] == 20
    assert len(pd.read_csv(both.validation_file)) == 8


@pytest.mark.long
def test_two_processes_go_back_together_as_often_as_the_training_went_well_between(trainings):
    run = trainings["guarded"].two
    assert (run.state, run.status["skipped"], run.history["step"].tolist()) == ("done", 2, list(range(8)))
    factor = run.history["learning_rate"] / [run.settings.training.learning_rate * learning_rate_factor(step, run.settings.training) for step in range(8)]
    assert factor.tolist() == pytest.approx([1.0] * 2 + [0.5] * 2 + [0.25] * 4)
    one, other = load_checkpoint(run.checkpoint_file)["random"]  # of each process
    assert set(one) == set(other)


@pytest.mark.long
def test_two_processes_that_share_the_weights_out_match_one(trainings):
    alone, both = trainings["fsdp"].one, trainings["fsdp"].two
    ours, theirs = (trained_network(run).state_dict() for run in (both, alone))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)  # best.safetensors is whole, and of one process
    np.testing.assert_allclose(both.history["loss"][:4], alone.history["loss"][:4], rtol=0, atol=1e-5)  # with the encoder frozen
    np.testing.assert_allclose(both.history["loss"], alone.history["loss"], rtol=0, atol=5e-3)  # AdamW's first step is of full length, however small a gradient
    np.testing.assert_allclose(both.history["gradient_norm"][:4], alone.history["gradient_norm"][:4], rtol=1e-3)
    np.testing.assert_allclose(both.history["validation_dice"].dropna(), alone.history["validation_dice"].dropna(), atol=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_one_line(smoke, prepared, tmp_path):
    with pytest.raises(UserError, match=r"^training\.accelerator cuda, devices 1, strategy auto: .*") as caught:
        fit(override(smoke, {"training.accelerator": "cuda"}), [prepared], tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^training\.accelerator cuda, devices 1"):
        estimate(override(smoke, {"training.accelerator": "cuda"}), [prepared])


def test_more_gpus_than_there_are_is_one_line(smoke, prepared, tmp_path, monkeypatch):
    def refused(**asked):
        raise MisconfigurationException("You requested gpu: [0, 1]\n But your machine only has: [0]")

    settings = override(smoke, {"training.accelerator": "cuda", "training.devices": 2, "training.strategy": "ddp"})
    monkeypatch.setattr(begin, "Fabric", refused)
    with pytest.raises(UserError, match=r"^training\.accelerator cuda, devices 2, strategy ddp: You requested gpu: \[0, 1\] But your machine only has: \[0\]$"):
        fit(settings, [prepared], tmp_path / "run", progress=False)


def test_fsdp_without_a_gpu_is_one_line(smoke, prepared, tmp_path):
    with pytest.raises(UserError, match=r"^training\.strategy: found fsdp on cpu, expected a CUDA GPU for it\. Set training\.strategy=ddp\.$"):
        fit(override(smoke, {"training.strategy": "fsdp", "training.devices": 2}), [prepared], tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def one_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_what_fsdp_wraps_is_kept_by_its_own_names_and_goes_on_alike(smoke, one_process_group, tmp_path):
    """In one process nothing is split up; that takes several GPUs. Names, the way through the file, and memory formats are the same."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    x = torch.randn(1, 1, 16, 16, 32)

    def made():
        policy = ModuleWrapPolicy({Block})
        network = FullyShardedDataParallel(build_network(smoke), auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))
        return network, build_optimizer(network, smoke.training)

    def step(network, optimizer):
        network(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = made(), made()
    step(*one)
    weights, state = gather(*one, sharded=True)
    assert weights.keys() == build_network(smoke).state_dict().keys()
    save_checkpoint(tmp_path / "last.ckpt", {"network": weights, "optimizer": state})
    kept = load_checkpoint(tmp_path / "last.ckpt")
    scatter(*other, kept["network"], kept["optimizer"], sharded=True)
    step(*one)
    step(*other)
    a, b = (gather(*pair, sharded=True)[0] for pair in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{"training.ema": 0.9}, {"training.deep_supervision": True}])
def test_fsdp_does_not_go_with_what_needs_whole_weights(changes, smoke):
    with pytest.raises(UserError, match=r"^training\.strategy: fsdp goes with neither training\.ema nor training\.deep_supervision"):
        override(smoke, changes | {"training.strategy": "fsdp"})
