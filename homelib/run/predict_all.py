"""Many scans through a run, or through several at once: each by itself, finished ones skipped, one that cannot be read reported and passed over."""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ..config import Settings
from ..data.header import read_header
from ..data.manifest import Case, load_manifest
from ..data.prepare import PreparedCase, preparation, prepare_into, sha256_of
from ..data.reading import times
from ..errors import UserError
from ..progress import bar
from . import needed
from .checkpoint import trained_network
from .folder import Run
from .guard import is_out_of_memory
from .inputs import suffix_of
from .mixture import label_space
from .outputs import LABEL_MAP, ProbabilityMaps, map_files, require_label_map, write_label, write_label_map
from .predict import one_piece, predict_label, windows_of
from .record import Record, is_file, stem


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
        return cls(networks, settings, fingerprint_of([run.weights_file for run in runs]))

    def with_prediction(self, **changes: object) -> "Ensemble":
        prediction = self.settings.prediction.model_copy(update=changes)
        return Ensemble(self.networks, self.settings.model_copy(update={"prediction": prediction}), self.fingerprint)


def fingerprint_of(weights: Sequence[Path]) -> str:
    """Of the weights in some files, in their order."""
    return hashlib.sha256("".join(map(sha256_of, weights)).encode()).hexdigest()


def predict_all(
    cases: Sequence[Case],
    ensemble: Ensemble,
    out: str | Path,
    *,
    probabilities: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
    on_done: Callable[[Predicted], None] = lambda result: None,
) -> list[Predicted]:
    """Predict scans into a folder, `<case><ending of the scan>`, or one scan into a file.

    Args:
        cases: unlabelled or labelled; labels are not looked at.
        out: a folder; or, for one case, a file that ends in .nii.gz, .nii, .nrrd or .mha.
        probabilities: write each class's probability too, into `probabilities/` beside the labels.
        progress: show a bar of voxels, where there is a terminal.
        say: told the memory estimate of each scan, before it is read and when it is prepared, and what is done where memory does not suffice.
        on_done: called with each result as soon as it is there.

    Raises:
        UserError: nothing to predict, an `out` that is neither, or holds what other networks or settings have predicted, or a label map of others.
    """
    out = Path(out)
    names = label_space(ensemble.settings.data).class_names
    _require_place(out, cases, ensemble.settings)
    label_map = out.with_name(f"{stem(out)}.{LABEL_MAP}") if is_file(out) else out / LABEL_MAP
    record = _record(out, ensemble, probabilities)
    require_label_map(names, label_map)
    shown = bar(total=0, unit="voxel", scaled=True, show=progress)
    results = []
    for number, case in enumerate(cases, start=1):
        path = out if is_file(out) else out / f"{case.id}{suffix_of(case.image)}"
        shown.set_description(f"{case.id} ({number} of {len(cases)})")
        result = Predicted(case.id, "unchanged", path)
        if not record.has(case, path):
            result = _tried(partial(_one, case, ensemble, path, names, probabilities, shown, say, record), case, path)
        results.append(result)
        on_done(result)
    shown.close()
    if any(result.state != "failed" for result in results) and not label_map.exists():
        write_label_map(names, label_map)
    return results


def _require_place(out: Path, cases: Sequence[Case], settings: Settings) -> None:
    """Raises UserError: classes that the network does not know, or an `out` that is neither a folder nor, for one scan, a file."""
    one_piece(settings)
    if not is_file(out) and re.fullmatch(r"\.[A-Za-z]\w*", out.suffix) and not out.is_dir():
        raise UserError(f"--out: found {out.name!r}, expected a name that ends in .nii.gz, .nii, .nrrd or .mha, or a folder.")
    if is_file(out) and len(cases) != 1:
        raise UserError(f"--out: found the file {out.name!r} for {len(cases)} scans, expected a folder.")


def _record(out: Path, ensemble: Ensemble, probabilities: bool) -> Record:
    """Of what was predicted here before. Raises UserError where that was by others, or where a file is there of which nothing is known."""
    settings = ensemble.settings
    prediction = settings.prediction.model_dump(mode="json", exclude={"window_batch"})  # which changes no label
    by = {"weights": ensemble.fingerprint, "prediction": prediction, "probabilities": probabilities}
    manifests = [load_manifest(name) for name in (settings.data.manifest, *settings.data.also)]
    data = [manifest.name if manifest.reference == manifest.name else str(Path(manifest.reference).resolve()) for manifest in manifests]
    record = Record.open(out, by=by, data=data)
    if is_file(out) and out.exists() and not record.inputs:
        raise UserError(f"{out}: exists already and is left as it is. Choose another --out.")
    return record


def _tried(predict: Callable[[], Predicted], case: Case, path: Path) -> Predicted:
    """A scan predicted; or why it was not, in a line, so that it stops no other."""
    try:
        return predict()
    except UserError as error:
        told = str(error)
    except OSError as error:
        told = f"{error.filename or path}: {error.strerror or error}. Check the scan, and the disk's room."
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        told = f"{case.image}: no memory left. Crop the scan, or predict on a machine with more."
    return Predicted(case.id, "failed", None, told)


def _one(
    case: Case,
    ensemble: Ensemble,
    path: Path,
    names: tuple[str, ...],
    probabilities: bool,
    shown: tqdm,
    say: Callable[[str], None],
    record: Record,
) -> Predicted:
    """A scan predicted and written: prepared into a file of its own and predicted from there, so that its intensities are never whole in memory while
    windows are. Nothing of others is written over, and the record tells of the scan before its first file is there."""
    if path.exists():
        raise UserError(f"{path}: exists already, of another scan or run, and is left as it is. Choose another --out.")
    if probabilities and not record.began(case) and (there := next((file for file in _maps(path, names) if file.exists()), None)):
        raise UserError(f"{there}: exists already, of another scan or run, and is left as it is. Choose another --out.")
    settings = ensemble.settings
    spacing_mm = settings.data.spacing_mm or load_manifest(case.manifest).spacing_mm
    with contextlib.suppress(UserError):  # reading the scan, which is next, says best what is wrong with it
        say(_estimate(case, settings, spacing_mm, len(ensemble.networks)))
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "case.zip"
        prepare_into(kept, _unlabelled(case), preparation(spacing_mm=spacing_mm, low_pass=settings.data.low_pass), told="")
        prepared = PreparedCase.open(case, kept)
        shape, voxels = prepared.image.shape, int(np.prod(prepared.image.shape))
        stages = {"predicting": needed.predicting(shape, prepared.native_shape, settings, networks=len(ensemble.networks))}
        say(f"{case.id}: {times(shape)} voxels as prepared; memory beyond the networks, GiB: {needed.told(stages)}.")
        shown.total += voxels
        count = windows_of(prepared, settings).count
        how: dict[str, Any] = {"on_window": lambda windows: shown.update(voxels * windows / count), "say": say}
        if probabilities:
            with ProbabilityMaps(prepared.native_shape, names, path.parent) as maps:
                label = predict_label(ensemble.networks, prepared, settings, on_slab=maps.add, **how)
                record.add(case)
                maps.write(prepared.native_affine, stem(path), path.name.removeprefix(stem(path)))
        else:
            label = predict_label(ensemble.networks, prepared, settings, **how)
            record.add(case)
    write_label(label, prepared.native_affine, path, classes=len(names))
    counts = {name: int(np.count_nonzero(label == index)) for index, name in enumerate(names) if index}
    return Predicted(case.id, "predicted", path, shape=label.shape, voxels=counts)


def _estimate(case: Case, settings: Settings, spacing_mm: tuple[float, float, float], networks: int) -> str:
    """Of memory, by the scan's header. Raises UserError for one that cannot be read."""
    header = read_header(case.image)
    shape = needed.prepared_shape(header, spacing_mm)
    stages = {"preparing": needed.preparing(header, shape), "predicting": needed.predicting(shape, header.shape, settings, networks=networks)}
    return f"{case.id}: {times(header.shape)} voxels, {times(shape)} or fewer as prepared; memory beyond the networks, GiB at most: {needed.told(stages)}."


def _maps(path: Path, names: tuple[str, ...]) -> list[Path]:
    return map_files(path.parent, names, stem(path), path.name.removeprefix(stem(path)))


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
