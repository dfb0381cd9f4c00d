"""What the numbers in label files stand for: by a data set's raw labels, or by a map beside the file from class index to name."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.manifest import Manifest, load_manifest
from ..errors import UserError
from .outputs import LABEL_MAP
from .record import data_of, stem


@dataclass(frozen=True)
class Meaning:
    """Of predictions and their references. class_names: what is measured, background first. manifest: maps the references' raw labels to these; without
    one they hold class indices. predicted_names, reference_names: by index, empty: `class_names`. told: what was assumed, in a line; empty where it was said.
    """

    class_names: tuple[str, ...]
    manifest: Manifest | None = None
    predicted_names: tuple[str, ...] = ()
    reference_names: tuple[str, ...] = ()
    told: str = ""


def meaning(predicted: Path, reference: Path, *, data: str | None, raw: bool = False) -> Meaning:
    """By the data set that is named; else by a label map beside the references; else by the data set that the predictions were made for; else as the
    predictions are read.

    Args:
        predicted, reference: files or folders of labels.
        data: name or path of the references' data set.
        raw: the predictions hold its raw labels too.

    Raises:
        UserError: no label map where one is needed, one that does not fit, a data set that cannot be read, or several that it may be.
    """
    if data is not None:
        return _of_data(load_manifest(data), predicted, raw=raw)
    if raw:
        raise UserError("--raw: found no data set, expected its raw labels; give it by --data NAME.")
    if (theirs := _map_beside(reference)).exists() and theirs != _map_beside(predicted):
        names, own = class_names_of(predicted), _read_map(theirs)
        if set(names) != set(own):
            raise UserError(f"{theirs}: found the classes {', '.join(own[1:])}, expected those of the predictions, {', '.join(names[1:])}. Mend the wrong one.")
        return Meaning(names, reference_names=own, told=f"References: class indices, by {theirs}.")
    sets = data_of(predicted)
    if len(sets) > 1:
        raise UserError(f"--data: found none for predictions of a network of {' and '.join(sets)}, expected the data set of the references. Give it.")
    if sets:
        try:
            manifest = load_manifest(sets[0])
        except UserError as error:
            raise UserError(f"--data: found none, and that of the run of {predicted} cannot be read ({error}). Give that of the references.") from None
        told = f"References: raw labels of {manifest.name}, which {predicted} was predicted for. Others: --data NAME, or a {LABEL_MAP} beside them."
        return _of_data(manifest, predicted, raw=False, told=told)
    names = class_names_of(predicted)
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(names[1:], start=1))
    return Meaning(names, told=f"References: read as class indices ({listed}), for no --data was given. Where they hold a data set's raw labels, give it.")


def class_names_of(predicted: Path) -> tuple[str, ...]:
    """Of the label map beside the predictions. Raises UserError where there is none."""
    if not (path := _map_beside(predicted)).exists():
        raise UserError(f"{path}: no such file; expected the names of the classes there, or a data set by --data NAME.")
    return _read_map(path)


def predicted_names_of(predicted: Path, manifest: Manifest) -> tuple[str, ...]:
    """What the predictions' class indices stand for: by the label map beside them, else what they do in the manifest.

    A network of several data sets numbers the classes of their union; those that the manifest lacks are background to it.

    Raises UserError: a label map without one of the manifest's classes, or one that cannot be read.
    """
    if not (path := _map_beside(predicted)).exists():
        return manifest.class_names
    names = _read_map(path)
    if missing := [name for name in manifest.class_names if name not in names]:
        raise UserError(
            f"{path}: found no {missing[0]} among {', '.join(names[1:])}, expected every class of {manifest.name}. "
            "Correct the name there, or give a manifest with the classes that were predicted."
        )
    return names


def to_classes(volume: np.ndarray, names: tuple[str, ...], class_names: tuple[str, ...]) -> np.ndarray:
    """Class indices of `names`, in a volume (D, H, W), as those of `class_names`; what has another name is background."""
    table = np.array([class_names.index(name) if name in class_names else 0 for name in names], np.uint8 if len(class_names) <= 256 else np.uint16)
    return table[volume]


def _of_data(manifest: Manifest, predicted: Path, *, raw: bool, told: str = "") -> Meaning:
    return Meaning(manifest.class_names, manifest, () if raw else predicted_names_of(predicted, manifest), told=told)


def _map_beside(labels: Path) -> Path:
    if labels.is_dir():
        return labels / LABEL_MAP
    own = labels.with_name(f"{stem(labels)}.{LABEL_MAP}")
    return own if own.exists() else labels.with_name(LABEL_MAP)


def _read_map(path: Path) -> tuple[str, ...]:
    try:
        named = {int(value): str(name) for value, name in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):
        raise UserError(f'{path}: no label map; expected JSON such as {{"1": "liver"}}. Mend it, or move it away and give a data set by --data NAME.') from None
    return ("background", *(named.get(value, f"class_{value}") for value in range(1, max(named, default=0) + 1)))
