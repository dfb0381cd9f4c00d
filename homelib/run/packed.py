"""A trained network outside of its run folder: settings, manifest and weights side by side, as `home export` writes them.

A MONAI bundle's `configs/inference.json` names `load` and `segment`, so that it does what `home predict` does, by the same code.
"""

from pathlib import Path

from ..config import Settings, override
from ..data.manifest import load_manifest
from ..errors import UserError
from .checkpoint import build_network, load_weights
from .inputs import find_inputs
from .predict_all import Ensemble, fingerprint_of, predict_all

LAYOUTS = (  # settings, weights, folder of the manifest
    ("config.json", "model.safetensors", "."),
    ("configs/settings.json", "models/model.safetensors", "configs"),
)


def load(folder: str | Path) -> Ensemble:
    """The network of a hub folder or of a MONAI bundle, on the CPU or, where there is one, on the GPU.

    Raises UserError: no such folder, or one that is not whole.
    """
    import torch

    folder = Path(folder)
    for settings_file, weights, manifest_folder in LAYOUTS:
        if (folder / settings_file).exists():
            settings = Settings.load(folder / settings_file)
            here = lambda name, place=folder / manifest_folder: str(path.resolve()) if (path := place / f"{name}.yaml").exists() else name  # noqa: E731
            settings = override(settings, {"data.manifest": here(settings.data.manifest), "data.also": tuple(map(here, settings.data.also))})
            network = load_weights(build_network(settings), folder / weights).eval()
            device = "cuda" if settings.training.accelerator in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
            return Ensemble((network.to(device),), settings, fingerprint_of([folder / weights]))
    raise UserError(f"{folder}: no config.json and no configs/settings.json, expected a folder that `home export` has written.")


def segment(ensemble: Ensemble, image: str | Path, output: str | Path) -> Path:
    """Labels of one scan (NIfTI, NRRD, MetaImage or a folder of DICOM slices) into a file, unless they are there already. Raises UserError."""
    cases = find_inputs([image], load_manifest(ensemble.settings.data.manifest))
    if not str(output).endswith((".nii.gz", ".nii", ".nrrd", ".mha")):
        raise UserError(f"output: found {str(output)!r}, expected a name that ends in .nii.gz, .nii, .nrrd or .mha.")
    (done,) = predict_all(cases, ensemble, output)
    if done.path is None:
        raise UserError(done.message)
    return done.path
