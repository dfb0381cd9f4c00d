"""Two processes on this machine train as one does with the batch of both, and one of them writes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from homelib import UserError
from homelib.config import override
from homelib.data.cases import demo_data, with_demo_cases
from homelib.data.cases import prepared as prepared_cases
from homelib.network.unet import Block
from homelib.run import begin
from homelib.run.checkpoint import build_network, load_checkpoint, save_checkpoint, trained_network
from homelib.run.estimate import estimate
from homelib.run.folder import Run
from homelib.run.optimise import build_optimizer
from homelib.run.resume import gather, scatter
from homelib.run.train import fit

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from homelib.config import Settings
from homelib.data.cases import demo_data, prepared
from homelib.run.train import fit
settings, demo = Settings.load(sys.argv[1]), demo_data("smoke")
cases = {case.case.id: case for case in prepared(settings, demo)}
others = prepared(settings.model_copy(update={"data": settings.data.model_copy(update={"test_cases": settings.data.validation_cases})}), demo, "test")
fit(settings, list(cases.values()), sys.argv[2], validation=others)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_two_processes_match_one_with_the_doubled_batch(smoke, phantoms, tmp_path):
    demo = demo_data("smoke")
    settings = override(with_demo_cases(smoke, demo), {"data.test_cases": (), "data.validation_cases": ("phantom-c",), "data.patch_voxels": (16, 16, 16)})
    settings = override(settings, {"training.steps": 20, "training.validate_every": 10, "training.clip_norm": 1.0, "training.learning_rate": 1e-4})
    one = override(settings, {"training.batch_size": 4})
    two = override(settings, {"training.batch_size": 2, "training.devices": 2, "training.strategy": "ddp"})
    script, wanted = tmp_path / "train.py", tmp_path / "two.json"
    script.write_text(SCRIPT)
    two.save(wanted)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(wanted), str(tmp_path / "two")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("step 20/20") == 1  # told once
    asked = settings.model_copy(update={"data": settings.data.model_copy(update={"validation_cases": (), "test_cases": ("phantom-c",)})})
    alone = fit(one, prepared_cases(one, demo), tmp_path / "one", validation=prepared_cases(asked, demo, "test"), progress=False)
    both = Run(tmp_path / "two")
    np.testing.assert_allclose(both.history["loss"], alone.history["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(both.history["gradient_norm"], alone.history["gradient_norm"], rtol=1e-3)
    np.testing.assert_allclose(both.history["validation_dice"].dropna(), alone.history["validation_dice"].dropna(), atol=1e-3)
    assert both.state == "done"
    assert load_checkpoint(both.checkpoint_file)["step"] == 20
    assert len(pd.read_csv(both.validation_file)) == 8


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


SHARDED = """
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from homelib.network.unet import Block
from homelib.run import train


class OnCPU(FSDPStrategy):  # Fabric refuses its own without a GPU; PyTorch shards over Gloo all the same
    def setup_module(self, module):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **self._fsdp_kwargs)


def launched(config):
    fabric = Fabric(accelerator="cpu", devices=config.devices, strategy=OnCPU(auto_wrap_policy={Block}))
    fabric.launch()
    return fabric


train.launched = launched
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_two_processes_that_share_the_weights_out_match_one(smoke, phantoms, tmp_path):
    """FSDP for real, over Gloo: kept, validated, encoder frozen at first, rates that fall towards the input. The scan is PyTorch's own: a weight
    that Numba has looked at cannot be taken apart again."""
    demo = demo_data("smoke")
    settings = override(with_demo_cases(smoke, demo), {"data.test_cases": (), "data.validation_cases": ("phantom-c",), "data.patch_voxels": (16, 16, 16)})
    changes = {"steps": 8, "validate_every": 4, "clip_norm": 1.0, "learning_rate": 1e-3, "frozen_steps": 3, "layer_rate": 0.5}
    settings = override(settings, {f"training.{name}": value for name, value in changes.items()} | {"model.scan_backend": "blocked"})
    one = override(settings, {"training.batch_size": 2})
    two = override(settings, {"training.batch_size": 1, "training.devices": 2, "training.strategy": "fsdp"})
    script, wanted = tmp_path / "train.py", tmp_path / "two.json"
    script.write_text(SHARDED + SCRIPT)
    two.save(wanted)
    asked = settings.model_copy(update={"data": settings.data.model_copy(update={"validation_cases": (), "test_cases": ("phantom-c",)})})
    fit(one, prepared_cases(one, demo), tmp_path / "one", validation=prepared_cases(asked, demo, "test"), progress=False)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(wanted), str(tmp_path / "two")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    both, alone = Run(tmp_path / "two"), Run(tmp_path / "one")
    ours, theirs = (trained_network(run).state_dict() for run in (both, alone))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)  # best.safetensors is whole, and of one process
    np.testing.assert_allclose(both.history["loss"][:4], alone.history["loss"][:4], rtol=0, atol=1e-5)  # with the encoder frozen
    np.testing.assert_allclose(both.history["loss"], alone.history["loss"], rtol=0, atol=5e-3)  # AdamW's first step is of full length, however small a gradient
    np.testing.assert_allclose(both.history["gradient_norm"][:4], alone.history["gradient_norm"][:4], rtol=1e-3)
    np.testing.assert_allclose(both.history["validation_dice"].dropna(), alone.history["validation_dice"].dropna(), atol=1e-2)
