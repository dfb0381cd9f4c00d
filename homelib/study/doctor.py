"""What this machine has: versions, device, memory, scan backends, and why an optional part is not used."""

import importlib
import importlib.metadata
import os
import platform
import sys

import torch

from ..network.scan import BACKENDS, resolve
from ..paths import cache_dir, runs_dir

PACKAGES = ("torch", "monai", "lightning-fabric", "numpy", "scipy", "pandas", "numba", "papermill", "jupyterlab", "ipywidgets")
OPTIONAL = {"mamba_ssm": "CUDA kernels of the scan", "causal_conv1d": "CUDA kernel of the causal convolution", "triton": "GPU kernels without a compiler"}


def examine() -> dict[str, dict[str, str]]:
    """Sections of name -> finding, all text."""
    import homelib

    machine = {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "python": sys.version.split()[0],
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        machine[f"cuda:{index}"] = f"{told.name}, {told.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        machine["cuda"] = "none: " + ("this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU or driver was found")
    return {
        "machine": machine,
        "packages": {"homelib": homelib.__version__} | {name: _version(name) for name in PACKAGES},
        "selective scan": {"auto means": resolve("auto"), "backends": ", ".join(BACKENDS)},
        "optional": {name: f"{_importable(name)} ({purpose}; not used by this version)" for name, purpose in OPTIONAL.items()},
        "folders": {"cache": str(cache_dir()), "runs": str(runs_dir().resolve())},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing: pip install " + package


def _importable(module: str) -> str:
    try:
        importlib.import_module(module)
        return "imports"
    except Exception as error:  # a broken CUDA build raises anything
        return f"not importable: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def environment_line() -> str:
    """The machine in one line, for the head of a notebook."""
    import homelib

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"homelib {homelib.__version__}, Python {sys.version.split()[0]}, PyTorch {torch.__version__}, {device}, scan backend {resolve('auto')}"
