"""What this machine has, and what of it is used: versions, memory, room, data, scan backends; of what is not used why, and what would change that."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from ..data.demo import DEMO_MANIFESTS, FetchError, fetch_cases
from ..data.manifest import load_manifest
from ..data.memory import GIB, free_memory_gib, total_memory_gib
from ..errors import UserError
from ..network import causal_conv, instance_norm
from ..network.scan.backends import report, resolve
from ..paths import cache_dir, runs_dir

PACKAGES = ("torch", "monai", "lightning-fabric", "numpy", "scipy", "pandas", "numba", "papermill", "jupyterlab", "ipywidgets")  # shown at any rate
EXTRAS = {
    "cuda": "compiled kernels on an NVIDIA GPU",
    "zoo": "network=ResEncUNet",
    "tensorboard": "training.loggers=[csv, tensorboard]",
    "onnx": "home export --to onnx",
    "voila": "notebook 06 as a page of its own",
    "site": "make site",
    "bench": "the peers of make bench",
    "dev": "make test",
}
MADE_FOR = {"numba": "cpu", "triton": "cuda", "mamba_ssm": "cuda", causal_conv.KERNEL: "cuda"}  # the others run on any device
ROOM_GIB = 1  # free, below which a disk deserves a word; the demo's scans and runs take a part of it
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET")  # and all HOMELIB_*
ROOT = Path(__file__).resolve().parents[2]  # the clone; or site-packages


class Finding(NamedTuple):
    """What is there; where it is not used, or should be otherwise, why; and the one line that would change it."""

    value: str
    reason: str = ""
    remedy: str = ""


def examine() -> dict[str, dict[str, Finding]]:
    """Sections of name -> finding. Nothing that is amiss raises an error."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    devices = ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    return {
        "machine": _machine(gpus),
        "packages": _packages(),
        "extras": {extra: _extra(extra, use) for extra, use in EXTRAS.items()},
        **{f"selective scan on {device}": _scan(device) for device in devices},
        "demo data": {name: _demo(name) for name in DEMO_MANIFESTS},
        "folders": {"cache": _cache(), "runs": _folder(runs_dir().resolve(), "HOMELIB_RUNS")},
    }


def as_markdown(found: dict[str, dict[str, Finding]]) -> str:
    """A block for an issue: one table, folded up. The home folder, and a folder anywhere that has its name, is ~ there."""
    lines = [f"<details><summary>home doctor: {environment_line()}</summary>", "", "| | found | why | remedy |", "| --- | --- | --- | --- |"]
    for section, findings in found.items():
        lines.append(f"| **{section}** | | | |")
        lines += [f"| {' | '.join(map(_cell, (name, *finding)))} |" for name, finding in findings.items()]
    return _without_home("\n".join([*lines, "", "</details>"]))


def _cell(text: str) -> str:
    """Of a table in Markdown, where < would begin a tag."""
    return text.replace("|", r"\|").replace("<", "&lt;")


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


# ---------------------------------------------------------------- machine


def _machine(gpus: list[str]) -> dict[str, Finding]:
    machine = {
        "system": Finding(f"{platform.system()} {platform.release()} ({platform.machine()})"),
        "python": Finding(sys.version.split()[0]),
        "cores": Finding(str(os.cpu_count())),
        "torch threads": Finding(str(torch.get_num_threads())),
        "memory": _memory(),
        "environment": Finding(_environment()),
    }
    for index, name in enumerate(gpus):
        told, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        machine[name] = Finding(f"{told.name}, {total / GIB:.0f} GiB, {free / GIB:.0f} free, compute capability {told.major}.{told.minor}")
    if not gpus:
        machine["cuda"] = _no_gpu()
    if torch.backends.mps.is_available():
        machine["mps"] = Finding("a GPU by Metal")
    return machine


def _memory() -> Finding:
    try:
        return Finding(f"{total_memory_gib():.1f} GiB, {free_memory_gib():.1f} free")
    except (AttributeError, OSError, ValueError):  # Windows does not tell it here
        return Finding("unknown")


def _environment() -> str:
    told = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("HOMELIB_") or name in ENVIRONMENT]
    return ", ".join(told) or "nothing set"


def _no_gpu() -> Finding:
    if torch.version.cuda is not None:
        return Finding("none", "no GPU or driver was found", "see that nvidia-smi lists a GPU; without one nothing is amiss, the CPU is used")
    built = "this PyTorch is built without CUDA"
    if shutil.which("nvidia-smi"):
        return Finding("none", f"{built}, and there is an NVIDIA driver", "make clean env (it takes PyTorch's CUDA build where nvidia-smi finds a GPU)")
    return Finding("none", f"{built}, and no NVIDIA driver was found", "nothing, without an NVIDIA GPU; with one its driver, then make clean env")


# ---------------------------------------------------------------- packages


def _packages() -> dict[str, Finding]:
    """homelib, those of `PACKAGES`, and any other that is missing or too old."""
    import homelib

    needed = _requirements()
    found = {name: _installed(needed.get(name, Requirement(name))) for name in dict.fromkeys([*PACKAGES, *needed])}
    return {"homelib": Finding(homelib.__version__ + _commit())} | {name: told for name, told in found.items() if name in PACKAGES or told.remedy}


def _requirements(extra: str = "") -> dict[str, Requirement]:
    """What homelib, or one of its extras, needs on this system, as its installed metadata says; nothing where it is not installed."""
    try:
        lines = importlib.metadata.requires("homelib") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed = [Requirement(line) for line in lines]
    chosen = [one for one in needed if ("extra ==" in str(one.marker)) == bool(extra) and (one.marker is None or one.marker.evaluate({"extra": extra}))]
    return {one.name: one for one in chosen}


def _installed(needed: Requirement) -> Finding:
    install = f"pip install '{needed.name}{needed.specifier}'"
    try:
        version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("missing", "homelib needs it", install)
    if not needed.specifier.contains(version, prereleases=True):
        return Finding(version, f"expected {needed.specifier}", install)
    return Finding(version)


def _extra(extra: str, use: str) -> Finding:
    """Whether all packages of an extra are there."""
    if not (needed := _requirements(extra)):
        return Finding("unknown", f"for {use}: not for this system, or newer than what homelib was installed as", "pip install -e . in the clone")
    states = {name: _installed(one) for name, one in needed.items()}
    lacking = [f"{name} {told.value}" for name, told in states.items() if told.remedy]
    if not lacking:
        return Finding("installed: " + ", ".join(f"{name} {told.value}" for name, told in states.items()))
    return Finding("not installed", f"for {use}: {', '.join(lacking)}", _cuda_kernels() if extra == "cuda" else _pip(extra))


def _pip(extra: str) -> str:
    return f"pip install -e '.[{extra}]'" if (ROOT / "pyproject.toml").exists() else f"pip install 'homelib[{extra}]'"


def _cuda_kernels() -> str:
    build = f"CUDA_HOME=<toolkit> MAMBA_KEEP_CUDA_BUILD=TRUE {_pip('cuda').replace('install', 'install --no-build-isolation')}"
    return build if torch.cuda.is_available() else f"an NVIDIA GPU; then {build}"


def _commit() -> str:
    """Of the clone that the package lies in, and whether it was changed since."""
    if not (ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=, changed since", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" at {done.stdout.strip()}" if done.returncode == 0 else ""


# ---------------------------------------------------------------- backends


def _scan(device: str) -> dict[str, Finding]:
    """Every backend of the selective scan on a device, the causal convolution before it, and instance norm."""
    told = report(device)
    chosen = next(name for name, line in told.items() if line.startswith("chosen"))
    found = {}
    for name, line in told.items():
        if name == chosen:
            found[name] = Finding(line)
        elif line.startswith("works"):
            found[name] = Finding(line, f"auto takes {chosen} here", f"--set model.scan_backend={name}")
        else:
            found[name] = Finding("not used", line, _backend(name, device, line))
    for name, module in (("causal convolution", causal_conv), ("instance norm", instance_norm)):
        used, _, why = module.used_on(device).partition(" (")
        found[name] = Finding(used, why.removesuffix(")"), _backend(module.KERNEL, device, why) if why else "")
    return found


def _backend(name: str, device: str, why: str) -> str:
    """What would make a backend work on a device."""
    kind = MADE_FOR[name] if name in MADE_FOR else torch.device(device).type
    if kind != torch.device(device).type:
        return {"cpu": "nothing: it is for CPUs", "cuda": "an NVIDIA GPU"}[kind]
    if "ImportError" not in why and "ModuleNotFoundError" not in why:
        return "send this report: it should work here. Until then auto does without it"
    if name in ("mamba_ssm", causal_conv.KERNEL):
        return _cuda_kernels()
    return f"pip install '{name}{_requirements('cuda' if kind == 'cuda' else '').get(name, Requirement(name)).specifier}'"


# ---------------------------------------------------------------- data and folders


def _demo(name: str) -> Finding:
    """Whether the scans of a demo data set are in the cache, as their checksums say."""
    remedy = "home data fetch demo"
    try:
        return Finding("in the cache: " + ", ".join(fetch_cases(load_manifest(name), offline=True, progress=False)))
    except FetchError:
        first = "unset HOMELIB_OFFLINE, then " if os.environ.get("HOMELIB_OFFLINE") else ""
        return Finding("not in the cache", "never fetched, or damaged; home demo fetches them, or takes phantoms where it cannot", first + remedy)
    except (UserError, OSError) as error:
        return Finding("not in the cache", _line(error), "HOMELIB_CACHE=/a/folder/of/yours " + remedy)


def _cache() -> Finding:
    try:
        return _folder(cache_dir(), "HOMELIB_CACHE")
    except OSError as error:
        return Finding("none", _line(error), "export HOMELIB_CACHE=/a/folder/of/yours")


def _folder(folder: Path, variable: str) -> Finding:
    """A folder, or the one that it would be made in: its place, and the room on its disk."""
    there = next((place for place in (folder, *folder.parents) if place.is_dir()), Path("."))
    free = shutil.disk_usage(there).free / GIB
    value, elsewhere = f"{folder}, {free:.1f} GiB free", f"export {variable}=/a/folder/of/yours"
    if not os.access(there, os.W_OK):
        return Finding(value, f"{there} cannot be written to", elsewhere)
    return Finding(value, f"less than {ROOM_GIB} GiB free", f"make room there, or {elsewhere}") if free < ROOM_GIB else Finding(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _without_home(text: str) -> str:
    home = Path.home()
    for place in dict.fromkeys([str(home), str(home.resolve())]):
        text = re.sub(rf"{re.escape(place)}(?![\w.-])", "~", text) if place != home.anchor else text
    return re.sub(rf"(?<=[/\\]){re.escape(home.name)}(?![\w.-])", "~", text) if home.name else text
