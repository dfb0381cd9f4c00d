"""Predictions and references as files: paired by case id, compared in space, measured case by case in processes; one line for every file left out."""

import re
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.examine import APART_MM, apart_mm
from ..data.grid import turned_to
from ..data.manifest import load_manifest
from ..data.naming import images_and_labels
from ..data.parallel import over
from ..data.prepare import read_array
from ..data.reading import has_suffix
from ..errors import UserError
from ..paths import written_whole
from .evaluate import COLUMNS, evaluate
from .metrics import FULL, LESIONS, NSD, metric_of
from .named import to_classes
from .record import stem

LEAST = ("case", "class", "metric", "value", "reference_voxels", "predicted_voxels")  # columns of rows, for means that say what they hide
_DECORATION = re.compile(r"(_0000|[_-](label|labels|seg|segmentation|mask|gt|pred|prediction))$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """The label files of a case, predicted and reference; either may be a folder of masks."""

    case: str
    predicted: Path
    reference: Path


@dataclass(frozen=True)
class Measured:
    """The rows of all pairs that could be measured, and a line for every file that could not."""

    rows: pd.DataFrame
    left_out: tuple[str, ...]
    cases: int


def find_pairs(predicted: str | Path, reference: str | Path) -> tuple[list[Pair], list[str]]:
    """Two files, or the labels of two folders by case id: a file's name without its ending and `_seg`, `_label`, `_0000` or the like; or the name of a
    folder of one case, with its label, alone or beside its scan, or with a mask a class.

    Returns:
        Pairs in order of their ids, and a line for each file without a partner.

    Raises:
        UserError: no such file or folder, a file and a folder, two labels of one id, no pair.
    """
    predicted, reference = Path(predicted), Path(reference)
    for path in (predicted, reference):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected labels as NIfTI, NRRD or MetaImage. Check the path.")
    if predicted.is_dir() != reference.is_dir():
        raise UserError(f"{predicted} and {reference}: found a file and a folder, expected two of a kind.")
    if predicted.is_file():
        return [Pair(case_id(predicted), predicted, reference)], []
    ours, theirs = _by_case(predicted), _by_case(reference)
    lines = [f"{path}: no reference for {case} in {reference}; left out." for case, path in ours.items() if case not in theirs]
    lines += [f"{path}: no prediction for {case} in {predicted}; left out." for case, path in theirs.items() if case not in ours]
    pairs = [Pair(case, ours[case], theirs[case]) for case in sorted(set(ours) & set(theirs))]
    if not pairs:
        first = f"{next(iter(ours), 'nothing')} and {next(iter(theirs), 'nothing')}"
        raise UserError(f"{predicted} and {reference}: no case id in both (first ids: {first}); expected files of the same names. Rename them.")
    return pairs, lines


def case_id(path: Path) -> str:
    """
    >>> case_id(Path("labels/case_07_seg.nii.gz"))
    'case_07'
    """
    return _DECORATION.sub("", stem(path)) or path.name


def _by_case(folder: Path) -> dict[str, Path]:
    """Its files; or, where it has none, what is in its folders."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    labels = [(case_id(path), path) for path in entries if path.is_file() and has_suffix(path)]
    labels = labels or [(entry.name, path) for entry in entries if entry.is_dir() for path in _labels_in(entry)]
    found: dict[str, Path] = {}
    for name, path in labels:
        if name in found:
            first, second = (each.relative_to(folder) for each in (found[name], path))
            raise UserError(f"{folder}: found {first} and {second} for the case {name}, expected one label a case. Move one away.")
        found[name] = path
    return found


def _labels_in(case: Path) -> list[Path]:
    """Of a folder of one case: what its name says is a label, else its only file, else the folder itself, a mask a class."""
    images, labels = images_and_labels(case)
    return [case / name for name in labels] or ([case / images[0]] if len(images) == 1 else [case] * bool(images))


@dataclass(frozen=True)
class Measure:
    """How pairs are measured. manifest: maps raw reference labels to classes; None takes both files' values as class indices.

    predicted_names, reference_names: what class indices stand for; empty: `class_names`.
    """

    class_names: tuple[str, ...]
    manifest: str | None = None
    _: KW_ONLY
    predicted_names: tuple[str, ...] = ()
    reference_names: tuple[str, ...] = ()
    method: str = "prediction"
    metrics: tuple[str, ...] = FULL
    tolerances_mm: tuple[float, ...] = (1.0, 2.0, 3.0)
    lesion_classes: tuple[str, ...] = ()
    raw_predictions: bool = False  # predictions hold the manifest's raw labels too

    @property
    def all_metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.metrics, *(NSD.format(f"{mm:g}") for mm in self.tolerances_mm))))


def measure_pairs(pairs: Sequence[Pair], how: Measure, *, workers: int = 1, on_case: Callable[[], None] = lambda: None) -> Measured:
    """All pairs, `workers` at a time; a pair that cannot be measured is a line. `on_case` is called after each.

    Raises UserError: an unknown metric or class, or raw predictions of no data set.
    """
    if how.raw_predictions and how.manifest is None:
        raise UserError("raw_predictions: found no data set, expected the one whose raw labels the predictions hold. Name it.")
    for name in how.all_metrics:
        _known_metric(name, "metrics")
    if unknown := set(how.lesion_classes) - set(how.class_names):
        raise UserError(f"lesions: found {', '.join(sorted(unknown))}, expected classes: {', '.join(how.class_names[1:])}.")
    tables, lines = {}, {}
    for index, found in over(_measured, [(pair, how) for pair in pairs], workers=workers):
        on_case()
        if isinstance(found, UserError):
            lines[index] = str(found)
        elif isinstance(found, Exception):
            lines[index] = f"{pairs[index].predicted}: {type(found).__name__}: {' '.join(str(found).split())[:200]}; left out. Check both files."
        else:
            tables[index] = found
    rows = pd.concat([tables[index] for index in sorted(tables)], ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
    return Measured(rows, tuple(lines[index] for index in sorted(lines)), len(tables))


def _measured(job: tuple[Pair, Measure]) -> pd.DataFrame | UserError:
    try:
        return _measure(*job)
    except UserError as error:
        return UserError(str(error))  # a plain one can be sent from a process


def _measure(pair: Pair, how: Measure) -> pd.DataFrame:
    manifest = load_manifest(how.manifest) if how.manifest else None
    if manifest is None and (masks := next((path for path in (pair.predicted, pair.reference) if path.is_dir()), None)):
        raise UserError(f"{masks}: found a folder of masks, expected a data set that names their classes; left out. Give --data NAME.")
    (P, p_affine), (R, r_affine) = (
        read_array(path, what="label", labels=manifest.labels if manifest and path.is_dir() else None) for path in (pair.predicted, pair.reference)
    )
    if P.shape != R.shape or apart_mm(p_affine, r_affine, R.shape) > APART_MM:  # perhaps the same space, in another order or direction of axes
        R, r_affine = turned_to(R, r_affine, p_affine)
    if P.shape != R.shape:
        told = " and ".join("x".join(map(str, volume.shape)) for volume in (P, R))
        raise UserError(f"{pair.predicted}: found {told} voxels of prediction and reference, expected the same grid; left out. Resample the prediction.")
    if (apart := apart_mm(p_affine, r_affine, R.shape)) > APART_MM:
        raise UserError(f"{pair.predicted}: lies up to {apart:.3g} mm from its reference, expected at most {APART_MM}; left out. Check its affine.")
    if manifest is not None:
        raw, R = R, manifest.merge(R)
        if raw.any() and not R.any() and not (found := set(np.unique(raw).tolist())) & set(manifest.labels):
            values = ", ".join(f"{value:g}" for value in sorted(found - {0})[:5])
            raise UserError(f"{pair.reference}: found the values {values}, none of a class of {manifest.name}; left out. Is it this data set's label?")
    else:
        R = _renumbered(R, pair.reference, how.reference_names, how)
    P = manifest.merge(P) if manifest and how.raw_predictions else _renumbered(P, pair.predicted, how.predicted_names, how)
    return evaluate(
        P,
        R,
        spacing_mm=tuple(np.linalg.norm(r_affine[:3, :3], axis=0).tolist()),
        class_names=how.class_names,
        case=pair.case,
        method=how.method,
        label_origin=manifest.origin_of(pair.case) if manifest else "UNSTATED",
        metrics=how.all_metrics,
        lesion_classes=how.lesion_classes,
        background=True,
    )


def _renumbered(volume: np.ndarray, path: Path, names: tuple[str, ...], how: Measure) -> np.ndarray:
    names = names or how.class_names
    return to_classes(_indices(volume, path, len(names)), names, how.class_names)


def _indices(volume: np.ndarray, path: Path, classes: int) -> np.ndarray:
    """A volume of class indices as integers. Raises UserError for values that are none."""
    whole = volume if volume.dtype.kind in "iu" else np.round(volume)
    low, high = whole.min(), whole.max()
    if low < 0 or high >= classes or (whole is not volume and not np.array_equal(whole, volume)):
        told = f"found values from {volume.min():g} to {volume.max():g}, expected class indices, 0 to {classes - 1}; left out. Or raw labels: --data NAME"
        raise UserError(f"{path}: {told}.")
    return whole.astype(np.uint8 if classes <= 256 else np.uint16, copy=False)


def read_rows(path: Path, *, columns: Sequence[str] = LEAST) -> pd.DataFrame:
    """The tidy CSV again, ids as text. Raises UserError: no such file, no CSV, `columns` missing, no rows, a value that is no number, an unknown metric."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `home evaluate` writes it.")
    try:
        rows = pd.read_csv(path, dtype={"case": str}, keep_default_na=False, na_values={"value": ["", "nan", "NaN"]})
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read as a CSV, expected what `home evaluate` writes.") from None
    if missing := set(columns) - set(rows):
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}, expected what `home evaluate` writes.")
    if rows.empty:
        raise UserError(f"{path}: no rows, expected one a case, class and metric.")
    numbers = pd.to_numeric(rows["value"], errors="coerce")
    if (wrong := rows["value"][numbers.isna() & rows["value"].notna()]).size:
        raise UserError(f"{path}: line {wrong.index[0] + 2}: found the value {wrong.iloc[0]!r}, expected a number. Mend it, or measure anew.")
    for name in set(rows["metric"]) - set(LESIONS):
        _known_metric(name, f"{path}: metric")
    return rows.assign(value=numbers)


def _known_metric(name: str, field: str) -> None:
    try:
        metric_of(name)
    except KeyError:
        raise UserError(f"{field}: found {name!r}, expected some of {', '.join(FULL)}, or nsd_2mm.") from None


def write_rows(rows: pd.DataFrame, path: Path) -> Path:
    """The tidy CSV, all digits kept. Raises UserError where a file is there already."""
    if path.exists():
        raise UserError(f"{path}: exists already and is left as it is. Choose another --csv.")
    with written_whole(path) as part:
        rows.to_csv(part, index=False)
    return path
