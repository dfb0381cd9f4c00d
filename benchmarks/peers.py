"""The peers, from their public packages, behind the signature of `homelib.selective_scan`.

Each is a function (u, delta, A, B, C, D, z, delta_bias) -> y, softplus on. What cannot be imported raises ImportError with its reason.
"""

import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def homelib(backend: str) -> Callable[..., Tensor]:
    from homelib.network.scan import selective_scan

    def scan(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u, delta, A, B, C, D, z=z, delta_bias=delta_bias, delta_softplus=True, backend=backend)

    return scan


def mambapy() -> Callable[..., Tensor]:
    """`pscan` of mambapy, with the lines around it of its `MambaBlock.selective_scan`."""
    from mambapy.pscan import pscan

    def scan(u, delta, A, B, C, D, z, delta_bias):
        dtype = u.dtype
        u, delta, B, C = (t.mT.float() for t in (u, delta, B, C))  # its products want one type
        delta = F.softplus(delta + delta_bias)
        states = pscan((delta[..., None] * A).exp(), delta[..., None] * B[:, :, None] * u[..., None])
        y = (states @ C[..., None])[..., 0] + D * u
        return (y.mT * F.silu(z)).to(dtype)

    return scan


def transformers() -> Callable[..., Tensor]:
    """The sequential path of transformers' Mamba, which it takes without kernels."""
    try:
        from transformers.models.mamba.modeling_mamba import mamba_selective_scan as function
    except ImportError as error:
        raise ImportError(f"transformers >= 5.20 is wanted, for its `mamba_selective_scan`: {error}") from None

    def scan(u, delta, A, B, C, D, z, delta_bias):
        return function(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True)

    return scan


def mamba_ssm_ref() -> Callable[..., Tensor]:
    """`selective_scan_ref` of mamba_ssm. Its module wants the compiled kernels when it is imported, though this function does not use them."""
    name = "mamba_ssm/ops/selective_scan_interface.py"
    try:
        files = importlib.metadata.files("mamba-ssm") or []
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("mamba-ssm is not installed (MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm)") from None
    path = next((file.locate() for file in files if str(file) == name), None)
    if path is None:
        raise ImportError(f"mamba-ssm has no file {name}")
    wanted = {
        "mamba_ssm": {}, "mamba_ssm.utils": {}, "mamba_ssm.utils.torch": {"custom_fwd": _same, "custom_bwd": _same},
        "mamba_ssm.ops": {}, "mamba_ssm.ops.triton": {}, "mamba_ssm.ops.triton.layer_norm": {"_layer_norm_fwd": None}, "selective_scan_cuda": {},
    }  # fmt: skip
    before = {module: sys.modules.get(module) for module in wanted}
    for module, names in wanted.items():
        stand_in = types.ModuleType(module)
        vars(stand_in).update(names)
        sys.modules[module] = stand_in
    try:
        spec = importlib.util.spec_from_file_location("mamba_ssm_selective_scan_interface", path)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    finally:
        for module, was in before.items():
            if was is None:
                del sys.modules[module]
            else:
                sys.modules[module] = was

    def scan(u, delta, A, B, C, D, z, delta_bias):
        return loaded.selective_scan_ref(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=True)

    return scan


def _same(function):
    return function


SCANS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    **{f"homelib {name}": lambda name=name: homelib(name) for name in ("reference", "blocked", "numba", "triton", "mamba_ssm")},
    "mambapy pscan": mambapy,
    "transformers sequential": transformers,
    "mamba_ssm selective_scan_ref": mamba_ssm_ref,
}


def networks(classes: int) -> dict[str, Callable]:
    """MONAI's networks, one channel in, at their usual sizes."""
    from monai.networks.nets import DynUNet, SegResNet, SwinUNETR

    return {
        "SwinUNETR (48)": lambda: SwinUNETR(in_channels=1, out_channels=classes, feature_size=48),
        "SegResNet (32)": lambda: SegResNet(in_channels=1, out_channels=classes, init_filters=32),
        "DynUNet (32)": lambda: DynUNet(3, 1, classes, kernel_size=[3] * 5, strides=[1, 2, 2, 2, 2], upsample_kernel_size=[2] * 4),
    }
