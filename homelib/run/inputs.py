"""What a user points at, as cases to predict: files, folders of files, folders of DICOM slices, a part of a data set."""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ..config import DataConfig, Settings
from ..data.cases import demo_data
from ..data.demo import DEMO_MANIFESTS
from ..data.dicom import DICOM_MODALITIES, told_modality
from ..data.layouts import find_cases
from ..data.manifest import Case, Manifest, Modality, load_manifest
from ..data.naming import images_and_labels
from ..data.reading import has_suffix, split_suffix
from ..data.split import split
from ..errors import UserError
from . import record
from .outputs import LABEL_MAP


def find_inputs(paths: Sequence[str | Path], manifest: Manifest, *, modality: str | None = None, say: Callable[[str], None] = lambda line: None) -> list[Case]:
    """Unlabelled cases of a data set's kind, in order. Ids are the files' names, less their ending and nnU-Net's `_0000`.

    Args:
        paths: files, folders of slices, and folders of both, however deep.
        modality: of all of them; None takes the data set's, or what a folder of DICOM slices says of itself.
        say: told what in a folder is left out, and why.

    Raises UserError: nothing there, two of one id, a modality that the data set has no window for.
    """
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file; expected a scan (NIfTI, NRRD, MetaImage), a folder of scans or of DICOM slices. Check the path.")
        here = {path: _id(path)} if path.is_file() or holds_slices(path) else _in_folder(path, say)
        if not here:
            raise UserError(f"{path}: no scan there, expected NIfTI, NRRD or MetaImage files, or DICOM slices. Check the folder.")
        found |= here
    manifest.window_of(modality or manifest.modality)
    asked = next((known for known in manifest.modalities if known == modality), None)
    cases = [Case(name, path, None, asked or _modality(path, manifest), "UNSTATED", manifest.reference) for path, name in found.items()]
    seen: dict[str, Path] = {}
    for case in cases:
        if (other := seen.setdefault(case.id, case.image)) != case.image:
            raise UserError(f"{case.image}: found the same name as {other}, expected a name of its own for each case. Rename one, or predict them apart.")
    return cases


def manifest_for(data: DataConfig, modality: str | None) -> Manifest:
    """Of a run's data sets the first that has a window for a modality, as scans are prepared by it; the run's first where none is asked for, or none has."""
    manifests = [load_manifest(name) for name in (data.manifest, *data.also)]
    return next((manifest for manifest in manifests if modality in manifest.modalities), manifests[0])


def find_part(manifest: Manifest, root: str | Path, part: str) -> list[Case]:
    """The cases of one part of a data set (`train`, `validation`, `test`, `fold-0`, or `all`). Raises UserError for a part that has none."""
    cases = find_cases(manifest, root).cases
    if part == "all":
        return list(cases)
    parts = split(manifest, cases, root=root)
    if chosen := [case for case in cases if parts[case.id] == part]:
        return chosen
    raise UserError(f"--part: found {part!r}, expected one of {', '.join(sorted(set(parts.values())))} or all.")


def find_one(told: str, settings: Settings, *, root: str | Path | None = None, label: Path | None = None, modality: str | None = None) -> Case:
    """One case for a run: by its id, of the run's data set below `root` or, without one, of the demo; or a scan by its path.

    Args:
        told: id or path. With `root` it is an id.
        settings: of the run.
        label: of a scan given by its path, with the data set's raw labels.

    Raises:
        UserError: no such case, several, or a label for one that has its own.
    """
    manifest = load_manifest(settings.data.manifest)
    if root is None and Path(told).exists():
        found = find_inputs([told], manifest, modality=modality)
        if len(found) != 1:
            raise UserError(f"{told}: found {len(found)} scans, expected one. Name a file.")
        return replace(found[0], label=label)
    if label is not None:
        raise UserError(f"--label: found it with the case {told}, expected it with the path of a scan alone.")
    if root is not None:
        known = {case.id: case for case in find_cases(manifest, root).cases}
    elif manifest.name in DEMO_MANIFESTS:
        known = {name: case for name, case in demo_data(settings.profile).cases.items() if case.manifest == manifest.name}
    else:
        raise UserError(f"{told}: no such file. Give the path of a scan, or a case of {manifest.name} with --root and the folder of that data set.")
    if told not in known:
        near = difflib.get_close_matches(told, known, n=3) or list(known)[:3]
        raise UserError(f"{told}: no such case of {manifest.name}, nor a file; there are {len(known)}, {', '.join(near)} among them.")
    return known[told]


def holds_slices(folder: Path) -> bool:
    """Whether a folder's first files look like DICOM: named so, or with DICM at byte 128."""
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))[:3]:
        if path.suffix.lower() in (".dcm", ".ima"):
            return True
        with path.open("rb") as stream:
            if stream.read(132)[128:] == b"DICM":
                return True
    return False


def _in_folder(folder: Path, say: Callable[[str], None]) -> dict[Path, str]:
    """Its scans, and those deeper down (patient/study/series): path -> id. Deeper down a folder of slices, or of one scan, lends it the names of its way,
    `patient_study_series` say; one of several scans has its own name behind. Labels there, and what was predicted, are left out and told of."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = {path: _id(path) for path in files if has_suffix(path)}
    images, labels = (sorted(name for name in names if "/" in name) for names in images_and_labels(folder, everywhere=True))
    predicted = {way for name in (*images, *labels) for way in _ways(name) if any((folder / way / told).exists() for told in (record.NAME, LABEL_MAP))}
    images, labels = ([name for name in names if not predicted & set(_ways(name))] for names in (images, labels))
    together = Counter(_ways(name)[0] for name in images)
    for name in images:
        path, way = folder / name, _ways(name)[0]
        found[path] = "_".join(way.parts if together[way] == 1 else (*way.parts, _id(path)))
    if labels:
        say(f"{folder}: left out {len(labels)} labels, by their names ({labels[0]}{', ...' if len(labels) > 1 else ''}).")
    if predicted:
        say(f"{folder}: left out {', '.join(sorted(map(str, predicted)))}, which hold predictions: a record of them, or a {LABEL_MAP}.")
    return found


def _ways(name: str) -> list[PurePosixPath]:
    """The folders on the way to a file, or to a folder of slices (`a/b/`): that of the scan first, in which it is alone or not."""
    path = PurePosixPath(name)
    return [*([path] if name.endswith("/") else []), *list(path.parents)[:-1]]


def _modality(path: Path, manifest: Manifest) -> Modality:
    """Of the data set; of slices what they say. Raises UserError for slices of a modality that the data set has no window for."""
    if path.is_file() or (told := told_modality(path)) is None:
        return manifest.modality
    if (said := DICOM_MODALITIES.get(told)) not in manifest.modalities:
        known = ", ".join(manifest.modalities)
        raise UserError(f"{path}: found DICOM slices of {told}, expected {known} as in {manifest.name}. Leave it out, or say --modality {manifest.modality}.")
    return said


def suffix_of(path: Path) -> str:
    """Of the file that a prediction for `path` is written to: the scan's own format, one file; NIfTI for DICOM slices."""
    found = (split_suffix(path.name)[1].lower() if path.is_file() else "") or ".nii.gz"
    return {".nhdr": ".nrrd", ".mhd": ".mha"}.get(found, found)


def _id(path: Path) -> str:
    name = path.name if path.name not in ("", "..") else path.resolve().name  # the folder where the user is, say
    if path.is_file():
        name = split_suffix(name)[0]
    return name.removesuffix("_0000") or name
