"""What this machine has: versions, device, memory, scan backends, and why an optional part is not used."""

import importlib.metadata
import os
import platform
import sys

import torch

from ..network.causal_conv import used_on
from ..network.scan.backends import report, resolve
from ..paths import cache_dir, runs_dir

PACKAGES = ("torch", "monai", "lightning-fabric", "numpy", "scipy", "pandas", "numba", "papermill", "jupyterlab", "ipywidgets")


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
    if torch.backends.mps.is_available():
        machine["mps"] = "a GPU by Metal"
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())), *(["mps"] if "mps" in machine else [])]
    return {
        "machine": machine,
        "packages": {"homelib": homelib.__version__} | {name: _version(name) for name in PACKAGES},
        **{f"selective scan on {device}": report(device) | {"causal convolution": used_on(device)} for device in devices},
        "folders": {"cache": str(cache_dir()), "runs": str(runs_dir().resolve())},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing: pip install " + package


def environment_line() -> str:
    """The machine in one line, for the head of a notebook."""
    import homelib

    if torch.cuda.is_available():
        device, told = "cuda:0", torch.cuda.get_device_name(0)
    elif torch.backends.mps.is_available():
        device, told = "mps", "GPU by Metal"
    else:
        device, told = "cpu", f"CPU, {torch.get_num_threads()} threads"
    backend = resolve("auto", device)
    return f"homelib {homelib.__version__}, Python {sys.version.split()[0]}, PyTorch {torch.__version__}, {told}, scan backend {backend}"
