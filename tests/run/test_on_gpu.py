"""Training on a CUDA GPU: the CPU's steps within what float32 and bfloat16 allow, and NCCL."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from homelib.config import override
from homelib.run.checkpoint import load_checkpoint
from homelib.run.folder import Run
from homelib.run.train import fit

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in float32 and not in TF32, which is less exact by 1000 times."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def short(smoke):
    return override(smoke, {"data.patch_voxels": (32, 32, 32), "training.steps": 4, "training.batch_size": 2, "training.clip_norm": 1.0})


@pytest.mark.parametrize(("precision", "loss", "gradient"), [("32-true", 1e-4, 1e-3), ("bf16-mixed", 2e-2, 0.1)])
def test_a_step_is_that_of_the_cpu(precision, loss, gradient, short, prepared, tmp_path, exact):
    """The first one: AdamW makes a step of full length of however small a gradient, so that later ones drift apart."""
    alone = fit(short, [prepared], tmp_path / "cpu", progress=False)
    settings = override(short, {"training.accelerator": "cuda", "training.precision": precision})
    run = fit(settings, [prepared], tmp_path / "cuda", progress=False)
    np.testing.assert_allclose(run.history["loss"][0], alone.history["loss"][0], rtol=loss)
    np.testing.assert_allclose(run.history["gradient_norm"][0], alone.history["gradient_norm"][0], rtol=gradient)
    assert np.isfinite(run.history[["loss", "gradient_norm"]]).all(axis=None)
    np.testing.assert_allclose(run.history["loss"], alone.history["loss"], rtol=max(0.05, loss))
    state = load_checkpoint(run.checkpoint_file)
    assert all(tensor.dtype == torch.float32 for tensor in state["network"].values())
    assert "cuda" in state["random"][0]


def test_a_training_that_is_stopped_goes_on_alike(short, prepared, tmp_path, exact):
    settings = override(short, {"training.accelerator": "cuda"})
    undisturbed = fit(settings, [prepared], tmp_path / "undisturbed", progress=False)

    def crash(step, network):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit(settings, [prepared], tmp_path / "run", progress=False, on_validation=crash)
    run = fit(settings, [prepared], tmp_path / "run", progress=False)
    np.testing.assert_allclose(run.history["loss"], undisturbed.history["loss"], rtol=1e-3)


def test_one_process_with_nccl_is_one_without(tmp_path):
    """In processes of their own, for a process group cannot be left again."""
    common = ["--profile", "smoke", "--set", "training.accelerator=cuda"]
    for name, more in (("alone", []), ("ddp", ["--set", "training.strategy=ddp"])):
        command = [sys.executable, "-c", "from homelib.cli import main; main()", "train", str(tmp_path / name), *common, *more]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    alone, ddp = Run(tmp_path / "alone"), Run(tmp_path / "ddp")
    assert (ddp.state, len(ddp.history)) == ("done", 4)
    np.testing.assert_allclose(ddp.history["loss"], alone.history["loss"], rtol=1e-2)
