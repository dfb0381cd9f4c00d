"""Many scans through a run, or through several at once: each by itself, finished ones skipped, one that cannot be read reported and passed over."""

import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from ..config import Settings
from ..data.manifest import Case, load_manifest
from ..data.prepare import PreparedCase, preparation, prepare_into, sha256_of
from ..errors import UserError
from ..paths import written_whole
from .checkpoint import trained_network
from .folder import Run
from .guard import is_out_of_memory
from .inputs import suffix_of
from .mixture import label_space
from .outputs import SUFFIXES, ProbabilityMaps, map_files, require_label_map, write_label, write_label_map
from .pairs import LABEL_MAP
from .predict import memory_estimate, one_piece, predict_label, windows_of

TOLD = ".predicted.json"  # in the folder: by which networks and settings, and which inputs are done


@dataclass(frozen=True)
class Predicted:
    """What became of a scan. voxels: by class name, of a scan that was predicted now. message: of a failed one."""

    case: str
    state: Literal["predicted", "unchanged", "failed"]
    path: Path | None = None
    message: str = ""
    shape: tuple[int, ...] = ()
    voxels: dict[str, int] | None = None


@dataclass(frozen=True)
class Ensemble:
    """Networks with the settings they share; `fingerprint` is that of their weights."""

    networks: tuple[torch.nn.Module, ...]
    settings: Settings
    fingerprint: str

    @classmethod
    def of(cls, folders: Sequence[str | Path], *, accelerator: str | None = None) -> "Ensemble":
        """Trained runs; a folder without a run that holds runs `fold*` stands for all of these.

        Args:
            folders: of runs for the same task.
            accelerator: auto, cpu or cuda; None is the first run's. Without a GPU the CPU is taken, unless cuda is asked for here.

        Raises:
            UserError: no run, runs that differ in what they were trained for (data, classes, spacing, patch), or no such device.
        """
        if accelerator not in (None, "auto", "cpu", "cuda") or (accelerator == "cuda" and not torch.cuda.is_available()):
            raise UserError(f"--accelerator: found {accelerator!r}, expected auto, cpu{', or cuda' if torch.cuda.is_available() else '; no GPU is here'}.")
        runs = [run for folder in folders for run in _runs(Path(folder))]
        settings = runs[0].settings
        for run in runs[1:]:
            for name, ours, theirs in _shared(settings, run.settings):
                if ours != theirs:
                    raise UserError(f"{run.folder}: {name}: found {theirs}, expected {ours} as in {runs[0].folder}. Only runs for the same task can be joined.")
        wanted = accelerator or settings.training.accelerator
        device = torch.device("cuda" if wanted in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
        networks = tuple(trained_network(run).to(device) for run in runs)
        told = [sha256_of(run.weights_file) for run in runs]
        return cls(networks, settings, hashlib.sha256("".join(told).encode()).hexdigest())

    def with_prediction(self, **changes: object) -> "Ensemble":
        prediction = self.settings.prediction.model_copy(update=changes)
        return Ensemble(self.networks, self.settings.model_copy(update={"prediction": prediction}), self.fingerprint)


def predict_all(
    cases: Sequence[Case],
    ensemble: Ensemble,
    out: str | Path,
    *,
    probabilities: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Predicted]:
    """Predict scans into a folder, `<case><ending of the scan>`, or one scan into a file.

    Args:
        cases: unlabelled or labelled; labels are not looked at.
        out: a folder; or, for one case, a file that ends in .nii.gz, .nii, .nrrd or .mha and is not there yet.
        probabilities: write each class's probability too, into `probabilities/` beside the labels.
        progress: show a bar of voxels.
        say: told the memory estimate of each scan, and what is done where memory does not suffice.

    Raises:
        UserError: nothing to predict, an `out` that is neither, or holds what other networks or settings have predicted, or a label map of others.
    """
    out = Path(out)
    as_file = out.name.endswith(SUFFIXES)
    one_piece(ensemble.settings)
    if not as_file and re.fullmatch(r"\.[A-Za-z]\w*", out.suffix) and not out.is_dir():
        raise UserError(f"--out: found {out.name!r}, expected a name that ends in .nii.gz, .nii, .nrrd or .mha, or a folder.")
    if as_file and len(cases) != 1:
        raise UserError(f"--out: found the file {out.name!r} for {len(cases)} scans, expected a folder.")
    if as_file and out.exists():
        raise UserError(f"{out}: exists already and is left as it is. Choose another --out.")
    names = label_space(ensemble.settings.data).class_names
    folder = out.parent if as_file else out
    label_map = out.with_name(f"{_stem(out)}.{LABEL_MAP}") if as_file else folder / LABEL_MAP
    done = None if as_file else _Done.open(folder, ensemble, probabilities)
    require_label_map(names, label_map)
    bar = tqdm(total=0, unit="voxel", unit_scale=True, disable=not progress, file=sys.stderr, mininterval=1)
    results = []
    for number, case in enumerate(cases, start=1):
        path = out if as_file else out / f"{case.id}{suffix_of(case.image)}"
        bar.set_description(f"{case.id} ({number} of {len(cases)})")
        if done is not None and done.has(case, path):
            results.append(Predicted(case.id, "unchanged", path))
            continue
        try:
            if path.exists():
                raise UserError(f"{path}: exists already, of another scan or run, and is left as it is. Choose another --out.")
            ours = done is not None and done.began(case)
            if probabilities and not ours and (there := next((file for file in _maps(path, names) if file.exists()), None)):
                raise UserError(f"{there}: exists already, of another scan or run, and is left as it is. Choose another --out.")
            label, affine = _one(case, ensemble, path, names, probabilities, bar, say, begin=lambda case=case: done and done.add(case))
            write_label(label, affine, path, classes=len(names))
            counts = {name: int(np.count_nonzero(label == index)) for index, name in enumerate(names) if index}
            results.append(Predicted(case.id, "predicted", path, shape=label.shape, voxels=counts))
        except UserError as error:
            results.append(Predicted(case.id, "failed", None, str(error)))
        except OSError as error:
            results.append(Predicted(case.id, "failed", None, f"{error.filename or path}: {error.strerror or error}. Check the scan, and the disk's room."))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            results.append(Predicted(case.id, "failed", None, f"{case.image}: no memory left. Crop the scan, or predict on a machine with more."))
    bar.close()
    if any(result.state != "failed" for result in results) and not label_map.exists():
        write_label_map(names, label_map)
    return results


def _one(
    case: Case,
    ensemble: Ensemble,
    path: Path,
    names: tuple[str, ...],
    probabilities: bool,
    bar: tqdm,
    say: Callable[[str], None],
    *,
    begin: Callable[[], object],
) -> tuple[np.ndarray, np.ndarray]:
    """Labels (D, H, W) uint8 of a scan, and its affine (4, 4): prepared into a file of its own and predicted from there, so that its intensities are
    never whole in memory while windows are. Probabilities are written, where asked for; `begin` is called before the first file is."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "case.zip"
        data = ensemble.settings.data
        prepare_into(kept, _unlabelled(case), preparation(spacing_mm=data.spacing_mm, low_pass=data.low_pass), told="")
        prepared = PreparedCase.open(case, kept)
        estimate = memory_estimate(prepared, ensemble.settings)
        told = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in estimate.items())
        times = "x".join(map(str, prepared.image.shape))
        say(f"{case.id}: {times} voxels as prepared; memory beyond the network, GiB: {told}; in all {sum(estimate.values()) / 2**30:.2f}.")
        voxels = int(np.prod(prepared.image.shape))
        count = windows_of(prepared, ensemble.settings).count
        bar.total += voxels
        how = {"on_window": lambda windows: bar.update(voxels * windows / count), "say": say}
        if probabilities:
            with ProbabilityMaps(prepared.native_shape, names, path.parent) as maps:
                label = predict_label(ensemble.networks, prepared, ensemble.settings, on_slab=maps.add, **how)
                begin()
                maps.write(prepared.native_affine, _stem(path), path.name.removeprefix(_stem(path)))
        else:
            label = predict_label(ensemble.networks, prepared, ensemble.settings, **how)
            begin()
    return label, prepared.native_affine


class _Done:
    """Which scans of a folder are predicted, by which networks and settings."""

    def __init__(self, path: Path, by: dict, inputs: dict[str, str]):
        self.path, self.by, self.inputs = path, by, inputs

    @classmethod
    def open(cls, folder: Path, ensemble: Ensemble, probabilities: bool) -> "_Done":
        prediction = ensemble.settings.prediction.model_dump(mode="json", exclude={"window_batch"})  # which changes no label
        by = {"weights": ensemble.fingerprint, "prediction": prediction, "probabilities": probabilities}
        path = folder / TOLD
        try:
            kept = json.loads(path.read_text())
            inputs, theirs = dict(kept["inputs"]), kept["by"]
        except FileNotFoundError:
            return cls(path, by, {})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: damaged, expected what was predicted here. Choose another --out, or delete the folder.") from None
        if theirs != by:
            differ = ", ".join(name for name in by if theirs.get(name) != by[name])
            raise UserError(f"{folder}: holds predictions of another run or of other settings ({differ}); nothing was changed. Choose another --out.")
        return cls(path, by, inputs)

    def has(self, case: Case, path: Path) -> bool:
        return path.exists() and self.began(case)

    def began(self, case: Case) -> bool:
        """Whether what lies here of the case, whole or not, was written by us."""
        return self.inputs.get(case.id) == _stamp(case)

    def add(self, case: Case) -> None:
        """Before any file has its name, so that a run that is killed in between does the scan again. Other processes may write here too."""
        with FileLock(self.path.with_name(f"{TOLD}.lock")):
            if self.path.exists():
                self.inputs = json.loads(self.path.read_text())["inputs"]
            self.inputs[case.id] = _stamp(case)
            with written_whole(self.path) as part:
                part.write_text(json.dumps({"by": self.by, "inputs": self.inputs, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}, indent=1) + "\n")


def _maps(path: Path, names: tuple[str, ...]) -> list[Path]:
    return map_files(path.parent, names, _stem(path), path.name.removeprefix(_stem(path)))


def _stamp(case: Case) -> str:
    """Place, size and time of change of a scan's file, or of all files of its folder; and the window that it is seen through."""
    path = case.image
    window = f"{case.modality} {load_manifest(case.manifest).window_of(case.modality)}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    told = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.exists()]
    return f"{path.resolve()} " + hashlib.sha256("\n".join([window, *told]).encode()).hexdigest()


def _runs(folder: Path) -> list[Run]:
    if not (folder / "settings.json").exists() and folder.is_dir():
        if folds := sorted(path for path in folder.glob("fold*") if (path / "settings.json").exists()):
            return [Run.open(path) for path in folds]
    return [Run.open(folder)]


def _shared(a: Settings, b: Settings) -> list[tuple[str, object, object]]:
    names = ("manifest", "also", "aliases", "spacing_mm", "patch_voxels")
    return [(f"data.{name}", getattr(a.data, name), getattr(b.data, name)) for name in names] + [
        ("model.out_channels", a.model.out_channels, b.model.out_channels)
    ]


def _unlabelled(case: Case) -> Case:
    return Case(case.id, case.image, None, case.modality, case.label_origin, case.manifest, case.part)


def _stem(path: Path) -> str:
    return path.name.removesuffix(next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), ""))
