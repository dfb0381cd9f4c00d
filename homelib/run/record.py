"""What was predicted, kept beside it: by which networks and settings, for which data sets, of which scans. So a rerun skips what is done, and an
evaluation knows whose labels the references are."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from ..data.manifest import Case, load_manifest
from ..data.reading import split_suffix
from ..errors import UserError
from ..paths import written_whole
from .outputs import SUFFIXES

NAME = ".predicted.json"


def is_file(out: Path) -> bool:
    """Whether labels are to be written to a file of this name, and not into a folder."""
    return out.name.endswith(SUFFIXES)


def stem(path: Path) -> str:
    """A file's name without its ending."""
    return split_suffix(path.name)[0]


def place_of(out: Path) -> Path:
    """The record of a folder of labels, or of one file."""
    return out.with_name(f".{stem(out)}{NAME}") if is_file(out) else out / NAME


def data_of(predicted: Path) -> tuple[str, ...]:
    """The data sets (name or path) that the networks of a folder's labels, or of a file, were trained for; empty where no record tells."""
    places = [place_of(predicted)] if predicted.is_dir() else [place_of(predicted), predicted.with_name(NAME)]
    kept = next((_read(place) for place in places if place.exists()), {})
    return tuple(kept.get("data", ()))


class Record:
    """Of one folder, or one file. Other processes may write to it too."""

    def __init__(self, path: Path, by: dict, data: Sequence[str], inputs: dict[str, str]):
        self.path, self.by, self.data, self.inputs = path, by, list(data), inputs

    @classmethod
    def open(cls, out: Path, *, by: dict, data: Sequence[str]) -> "Record":
        """What is there, or an empty one; a file that is gone may be predicted by others.

        Args:
            out: folder or file of labels.
            by: what decides what is predicted: weights, settings.
            data: the data sets that the networks were trained for.

        Raises:
            UserError: a damaged record, or one of other networks or settings.
        """
        path = place_of(out)
        kept = _read(path) if path.exists() else None
        if kept is None or (kept["by"] != by and is_file(out) and not out.exists()):
            return cls(path, by, data, {})
        if kept["by"] != by:
            differ = ", ".join(name for name in by if kept["by"].get(name) != by[name])
            told = "is a prediction" if is_file(out) else "holds predictions"
            raise UserError(f"{out}: {told} of another run or of other settings ({differ}); nothing was changed. Choose another --out.")
        return cls(path, by, data, dict(kept["inputs"]))

    def has(self, case: Case, path: Path) -> bool:
        return path.exists() and self.began(case)

    def began(self, case: Case) -> bool:
        """Whether what lies here of the case, whole or not, was written by us."""
        return self.inputs.get(case.id) == _stamp(case)

    def add(self, case: Case) -> None:
        """Before any file has its name, so that a run that is killed in between does the scan again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f"{self.path.name}.lock")):
            if self.path.exists() and (kept := _read(self.path))["by"] == self.by:
                self.inputs = dict(kept["inputs"])
            self.inputs[case.id] = _stamp(case)
            told = {"by": self.by, "data": self.data, "inputs": self.inputs, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
            with written_whole(self.path) as part:
                part.write_text(json.dumps(told, indent=1) + "\n")


def _read(path: Path) -> dict:
    try:
        kept = json.loads(path.read_text())
        dict(kept["inputs"]), dict(kept["by"]), list(kept.get("data", ()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged, expected what was predicted here. Choose another --out, or delete it and what was predicted.") from None
    return kept


def _stamp(case: Case) -> str:
    """Place, size and time of change of a scan's file, or of all files of its folder; and the window that it is seen through."""
    path = case.image
    window = f"{case.modality} {load_manifest(case.manifest).window_of(case.modality)}"
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    told = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.exists()]
    return f"{path.resolve()} " + hashlib.sha256("\n".join([window, *told]).encode("utf-8", "surrogateescape")).hexdigest()
