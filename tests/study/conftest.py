"""What the tests of homelib/study share: a finished smoke run, cases made from arrays, and networks whose routing was planted."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from homelib import MambaHoME, Settings
from homelib.config import override
from homelib.data.manifest import Case, load_manifest
from homelib.data.prepare import PreparedCase
from homelib.network.unet import pad
from homelib.study.demo import DemoRun, demo_run, trained

SPACING_MM = (4.0, 5.0, 6.0)


@pytest.fixture(scope="session")
def case_of():
    """A prepared case (of the manifest demo_ct) from an image in HU and a label."""

    def make(image: np.ndarray, label: np.ndarray | None = None, *, name: str = "made") -> PreparedCase:
        affine = np.diag([*SPACING_MM, 1.0])
        source = Case(name, Path("none.nii.gz"), None, "CT", "SYNTHETIC", "demo_ct")
        return PreparedCase(source, image.astype(np.float32), None if label is None else label.astype(np.uint8), affine, image.shape, affine)

    return make


@pytest.fixture(scope="session")
def smoke_demo(own_cache, tmp_path_factory) -> DemoRun:
    """The smoke profile's demo, a-to-c, trained for its four steps."""
    demo = demo_run("smoke", "a-to-c", folder=tmp_path_factory.mktemp("demo"), changes={"training.accelerator": "cpu"})
    trained(demo, progress=False)
    return demo


@pytest.fixture(scope="session")
def light_bright_tokens():
    """`plant(network, stage)`: the stage's first router gives expert 1 all of a token that holds a bright voxel, and expert 0 all of every other.

    Its decisions are made from the network's own input, token by token in raster order, apart from homelib's code.
    """

    def plant(network: MambaHoME, stage: int) -> None:
        seen = {}
        router = network.stages[stage].blocks[0].home.local_router
        network.stages[0].register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))

        def forward(x, mean, padded):
            B, G, K, _ = x.shape
            voxels = 2 ** (stage + 1)
            D, H, W = (n // voxels for n in seen["x"].shape[2:])
            bright = torch.zeros(B, G * K, dtype=torch.bool)
            for b, _, z, y, x in (seen["x"] > 0.5).nonzero().tolist():
                bright[b, ((z // voxels) * H + y // voxels) * W + x // voxels] = True
            A = torch.zeros(B, G * K, router.experts, router.slots)
            A[:, :, 1, 0], A[:, :, 0, 1] = bright.float(), 1 - bright.float()
            A[:, D * H * W :] = 1 / (router.experts * router.slots)  # fill tokens
            return rearrange(A, "b (g k) e s -> b g k e s", k=K)

        router.forward = forward

    return plant


# ---------------------------------------------------------------- a planted specialist

CLASSES = load_manifest("demo_ct").class_names
LIVER, SPLEEN = CLASSES.index("liver"), CLASSES.index("spleen")
LIVER_HU, SPLEEN_HU, AIR_HU = 250.0, 37.5, -1000.0  # 1, 0.5 and 0 of the network's range


class _Downsample(nn.Module):
    """Channel 0: the intensity of a token's voxels; the others empty."""

    def forward(self, x):
        return F.pad(F.avg_pool3d(x, 2), (0, 0, 0, 0, 0, 0, 0, 3))


class _Nothing(nn.Module):
    def forward(self, x, *others):
        return torch.zeros_like(x)


class _Local(nn.Module):
    """Bright tokens go to expert 2, whose slots nobody else fills; all others are shared by experts 0, 1 and 3. Or every token by all alike."""

    experts, slots = 4, 1

    def __init__(self, uniform: bool):
        super().__init__()
        self.uniform = uniform

    def forward(self, x, mean, padded):
        A = torch.full((*x.shape[:3], 4, 1), 0.25)
        if not self.uniform:
            bright = (x[..., 0] > 0.75).float()[..., None]
            A = torch.cat([(1 - bright) / 3, (1 - bright) / 3, bright, (1 - bright) / 3], -1)[..., None]
        return A


class _Global(nn.Module):
    """Every entry has a slot of its own."""

    experts = 4

    def forward(self, z, entries):
        eye = torch.eye(z.shape[1]).reshape(z.shape[1], 4, -1).expand(len(z), -1, -1, -1)
        return eye, eye


class PlantedNetwork(MambaHoME):
    """Only expert 2 of stage 0, level 1, can light channel 1 of a token; the liver is where it is lit. The spleen is read off the intensity.

    With uniform routing no expert lights anything, and the liver is read off the intensity too.
    """

    def __init__(self, settings: Settings, *, uniform: bool):
        super().__init__(settings.model)
        self.uniform = uniform
        stage = self.stages[0]
        stage.downsample, stage.gsc = _Downsample(), nn.Identity()
        block = stage.blocks[0]
        block.mamba, block.mamba_norm, block.home_norm = _Nothing(), nn.Identity(), nn.Identity()
        block.home.local_router, block.home.global_router = _Local(uniform), _Global()
        with torch.no_grad():
            local, shared = block.home.local_experts, block.home.global_experts
            for parameter in (*local.parameters(), *shared.parameters()):
                parameter.zero_()
            local.bias_out[:, 2] = 1.0  # whatever comes in: the same vector an expert
            if not uniform:
                local.bias_out[2] = torch.tensor([0.0, 1.0, 0.0, 0.0])
            for channel in range(4):  # GELU leaves large values as they are: level 2 passes on what it gets
                shared.weight_in[:, channel, channel], shared.weight_out[:, channel, channel] = 10.0, 0.1

    def forward(self, x):
        full = pad(x)
        tokens = F.interpolate(self.stages[0](full), size=full.shape[2:], mode="nearest")
        logits = torch.zeros(len(x), self.config.out_channels, *full.shape[2:])
        bright = full[:, 0] if self.uniform else tokens[:, 1]
        logits[:, LIVER] = 10 * (bright - 0.75)
        logits[:, SPLEEN] = 10 * (0.25 - (full[:, 0] - 0.5).abs())
        return logits[..., : x.shape[2], : x.shape[3], : x.shape[4]]


@pytest.fixture(scope="session")
def planted(smoke, case_of):
    """`planted(uniform=False)`: network in eval mode, settings, and three labelled cases with a liver and a spleen in other places in each."""

    def make(*, uniform: bool = False):
        changes = {"model.experts_local": (4, 2, 2, 2), "model.slots_per_expert": 1, "model.expert_glu": False, "model.channels": (4, 4, 8, 8)}
        settings = override(smoke, changes | {"model.out_channels": len(CLASSES), "data.patch_voxels": (32, 32, 32)})
        cases = []
        for number, (z, y, x) in enumerate([(4, 6, 8), (20, 10, 2), (10, 2, 22)]):
            image, label = np.full((40, 32, 36), AIR_HU), np.zeros((40, 32, 36), np.uint8)
            for index, value, (a, b, c) in ((LIVER, LIVER_HU, (z, y, x)), (SPLEEN, SPLEEN_HU, (z + 2, y + 14, x + 2))):
                box = (slice(a, a + 10), slice(b, b + 8), slice(c, c + 8))
                image[box], label[box] = value, index
            cases.append(case_of(image, label, name=f"case-{number}"))
        return PlantedNetwork(settings, uniform=uniform).eval(), settings, cases

    return make
