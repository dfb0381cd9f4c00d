"""A run for others: a MONAI bundle, a folder as model hubs have it, or an ONNX graph of the network for windows of the training patch.

The first two need this package to be installed: the network is in no other. They carry weights (safetensors, no code), settings, the manifests of the data
and a model card with what was measured.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import nn

from .. import __version__
from ..config import Settings, override
from ..data.manifest import Manifest, as_yaml, load_manifest
from ..errors import UserError
from .checkpoint import build_network, load_weights, save_weights
from .folder import Run
from .footer import footer
from .metrics import LESIONS, metric_of
from .mixture import label_space
from .pairs import read_rows
from .quantise import AS_THEY_ARE, check_bits
from .to_onnx import write_onnx

NEEDS = "Needs the Python package homelib.\n\n"


@dataclass(frozen=True)
class About:
    """What a run was trained on, the classes of its output by index, and the bits that its weights are stored in."""

    manifests: list[Manifest]
    class_names: tuple[str, ...]
    bits: int = AS_THEY_ARE

    first = property(lambda self: self.manifests[0])
    names = property(lambda self: " and ".join(manifest.name for manifest in self.manifests))
    title = property(lambda self: " and ".join(manifest.title for manifest in self.manifests))
    modality = property(lambda self: " and ".join(dict.fromkeys(manifest.modality for manifest in self.manifests)))
    segments = property(lambda self: ", ".join(name.replace("_", " ") for name in self.class_names[1:]))

    def write_manifests(self, folder: Path) -> None:
        for manifest in self.manifests:
            _text(folder / f"{manifest.name}.yaml", as_yaml(manifest))


def export(run: Run, to: str, out: str | Path, *, bits: int = AS_THEY_ARE) -> Path:
    """Write a run to a folder that is not there yet.

    Args:
        run: trained.
        to: "bundle", "hub" or "onnx".
        out: the folder; written beside and renamed.
        bits: 2 to 8 for a small file whose weights are rounded (`homelib.run.quantise`), 32 for weights as they are. A graph has the latter alone.

    Raises:
        UserError: an unknown form, other bits, a folder that exists, a run without weights, ONNX without its packages.
    """
    if to not in FORMS:
        raise UserError(f"--to: found {to!r}, expected one of {', '.join(FORMS)}.")
    check_bits(bits)
    if to == "onnx" and bits != AS_THEY_ARE:
        raise UserError(f"--bits: found {bits} with --to onnx, expected {AS_THEY_ARE}: a graph's weights stay as they are. Leave it off, or use --to hub.")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already and is left as it is. Choose another --out.")
    data = run.settings.data
    manifests = [load_manifest(name) for name in (data.manifest, *data.also)]
    settings = override(run.settings, {"data.manifest": manifests[0].name, "data.also": tuple(manifest.name for manifest in manifests[1:])})
    about = About(manifests, label_space(data).class_names, bits)
    network = load_weights(build_network(settings), run.weights_file)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        part = Path(folder) / "whole"
        part.mkdir()
        FORMS[to](run, part, settings, about, network)
        part.rename(out)
    return out


def _hub(run: Run, folder: Path, settings: Settings, about: About, network: nn.Module) -> None:
    save_weights(network, folder / "model.safetensors", settings, class_names=about.class_names, bits=about.bits)
    settings.save(folder / "config.json")
    about.write_manifests(folder)
    load = "from homelib.run.packed import load, segment\nsegment(load('.'), 'scan.nii.gz', 'labels.nii.gz')"
    _text(folder / "README.md", _front_matter(about) + model_card(run, settings, about, use=f"{NEEDS}```python\n{load}\n```"))


def _bundle(run: Run, folder: Path, settings: Settings, about: About, network: nn.Module) -> None:
    save_weights(network, folder / "models" / "model.safetensors", settings, class_names=about.class_names, bits=about.bits)
    (folder / "configs").mkdir()
    settings.save(folder / "configs" / "settings.json")
    about.write_manifests(folder / "configs")
    inference = {
        "bundle_root": ".",
        "image": "scan.nii.gz",
        "output": "labels.nii.gz",
        "network": {"_target_": "homelib.run.packed.load", "folder": "@bundle_root"},
        "run": [{"_target_": "homelib.run.packed.segment", "ensemble": "@network", "image": "@image", "output": "@output"}],
    }
    _text(folder / "configs" / "inference.json", json.dumps(inference, indent=1))
    _text(folder / "configs" / "metadata.json", json.dumps(_metadata(settings, about), indent=1))
    command = "python -m monai.bundle run --config_file configs/inference.json --bundle_root . --image scan.nii.gz --output labels.nii.gz"
    _text(folder / "docs" / "README.md", model_card(run, settings, about, use=f"{NEEDS}```\n{command}\n```"))


def _onnx(run: Run, folder: Path, settings: Settings, about: About, network: nn.Module) -> None:
    write_onnx(network, settings, folder / "model.onnx")
    settings.save(folder / "config.json")
    about.write_manifests(folder)
    _text(folder / "labels.json", json.dumps(dict(enumerate(about.class_names)), indent=1) + "\n")
    low, high = about.first.intensity_range
    patch = "x".join(map(str, settings.data.patch_voxels))
    use = (
        f"`model.onnx` takes `image` (1, {settings.model.in_channels}, {patch}) float32, a window of a scan that was turned to RAS+, resampled and "
        f"scaled to {low:g} to {high:g}, and gives `logits` of the classes in `labels.json`. Each Mamba layer is one Scan node, carried out token by token."
    )
    card = model_card(run, settings, about, use=use).replace(", on the scan's own grid", "")
    _text(folder / "README.md", _front_matter(about) + card)


FORMS: dict[str, Callable] = {"bundle": _bundle, "hub": _hub, "onnx": _onnx}


def _metadata(settings: Settings, about: About) -> dict:
    """What MONAI's bundle format asks to be told."""
    manifest = about.first
    low, high = manifest.intensity_range
    patch = list(settings.data.patch_voxels)
    image = {"type": "image", "format": "hounsfield" if manifest.modality == "CT" else "magnitude", "modality": manifest.modality, "num_channels": 1}
    image |= {"spatial_shape": patch, "dtype": "float32", "value_range": [low, high], "is_patch_data": True, "channel_def": {"0": "image"}}
    classes = {str(index): name for index, name in enumerate(about.class_names)}
    pred = {"type": "image", "format": "segmentation", "num_channels": len(classes), "spatial_shape": patch, "dtype": "float32"}
    pred |= {"value_range": [0, 1], "is_patch_data": True, "channel_def": classes}
    return {
        "version": "0.1.0",
        "changelog": {"0.1.0": "first export"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"homelib": __version__, "nibabel": version("nibabel")},
        "name": f"{settings.network} on {about.names}",
        "task": "segmentation",
        "description": f"{settings.network} segments {about.segments} in {about.modality}.",
        "authors": "",
        "copyright": "",
        "data_source": " and ".join(manifest.source for manifest in about.manifests),
        "data_type": "nifti",
        "intended_use": "Research only.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


def _front_matter(about: About) -> str:
    return f"---\nlibrary_name: homelib\nlicense: other\ntags: [image-segmentation, medical, 3d, {about.modality}]\n---\n\n"


def model_card(run: Run, settings: Settings, about: About, *, use: str) -> str:
    """Markdown: what it segments, from which data, what was measured and on whom, its limits."""
    spacing = "x".join(f"{mm:g}" for mm in settings.data.spacing_mm or about.first.spacing_mm)
    cases = settings.data.train_cases
    lines = [
        f"# {settings.network} on {about.title}",
        f"Segments {about.segments} in {about.modality}, on the scan's own grid.",
        "## Use",
        use,
        "## Data",
        *(f"{manifest.title}: {_ended(manifest.source)} Licence: {_ended(manifest.licence)} {manifest.citation}" for manifest in about.manifests),
        f"Trained on {_cases(cases)}; {settings.training.steps} steps, seed {settings.training.seed}. "
        f"Label origin: {_origins(about, cases)}. Scans are resampled to {spacing} mm.",
        "## Measured",
        _measured(run) + _rounded(about.bits),
        "## Limits",
        "For research, not for diagnosis. It knows the modality, field of view and structures of its training data and nothing else; elsewhere it is wrong "
        "without a warning. A scan in another unit or orientation than its header says gives nonsense.",
        *(f"Unverified about the data: {line}" for manifest in about.manifests for line in manifest.unverified),
    ]
    return "\n\n".join(lines) + "\n"


def _ended(sentence: str) -> str:
    return sentence.rstrip(".") + "."


def _origins(about: About, cases: tuple[str, ...]) -> str:
    """Of the labels of the training cases; of several data sets, whose cases are not told apart, those of the data sets."""
    one = len(about.manifests) == 1
    return ", ".join(dict.fromkeys([about.first.origin_of(case) for case in cases if one] or [manifest.label_origin for manifest in about.manifests]))


def _cases(ids: tuple[str, ...]) -> str:
    return f"{len(ids)} cases ({', '.join(ids[:8])}{', ...' if len(ids) > 8 else ''})" if ids else "cases that its settings do not name"


def _measured(run: Run) -> str:
    """Mean of every metric by class on the test cases, from the run's own rows: those of its network, or of the one method that was measured."""
    if not run.metrics_file.exists():
        return "Nothing was measured for this run."
    rows = read_rows(run.metrics_file)
    if "role" in rows:
        rows = rows[rows["role"] == "test"]
    if "method" in rows and rows["method"].nunique() > 1:
        rows = rows[rows["method"] == run.settings.network]
    rows = rows[rows["class"] != "background"]
    if rows.empty:
        return "No test case was measured for this run."
    origin = ", ".join(dict.fromkeys(rows["label_origin"])) if "label_origin" in rows else "UNSTATED"
    metrics = [name for name in dict.fromkeys(rows["metric"]) if name not in LESIONS]
    means = rows.groupby(["class", "metric"], sort=False)["value"].mean().unstack()[metrics]
    units = [f"{name} [{metric_of(name).unit}]" if metric_of(name).unit != "1" else name for name in metrics]
    lines = [["class", *units], ["---", *["---:"] * len(metrics)]]
    lines += [[name.replace("_", " "), *(f"{value:.3f}" for value in values)] for name, values in zip(means.index, means.to_numpy(), strict=True)]
    head = f"Means over {rows['case'].nunique()} test cases ({', '.join(list(dict.fromkeys(rows['case']))[:8])}), labels {origin}."
    return "\n".join([head, "", *("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {line}" for line in footer(rows, metrics))])


def _rounded(bits: int) -> str:
    """How the weights that are here differ from those that were measured."""
    if bits == AS_THEY_ARE:
        return ""
    return (
        f"\n\nThe weights here are rounded, which is not in the figures above: {bits} bits a value, the nearest of {2**bits - 1} multiples of a scale "
        "that each row of a matrix or kernel has. Vectors and Mamba's A are float32 as they were. `homelib.run.quantise` reads them."
    )


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
