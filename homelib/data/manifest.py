"""What a data set is: one YAML file in `data_manifests/`, read into a frozen, checked `Manifest`.

Glossary: a *raw label* is a value in a label file; a *class* merges one or more raw labels; a *class index* is what
the network sees: 0 background, then the classes in the order of the manifest.
"""

import difflib
import itertools
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from ..errors import UserError
from ..paths import shipped
from ..yaml_file import read_mapping, short
from .manifest_parts import (
    LARGEST_RAW_LABEL,
    Access,
    Archive,
    CaseEntry,
    Frozen,
    LabelOrigin,
    Layout,
    Modality,
    Name,
    Package,
    PackageFile,
    Phantom,
    Range,
    RawLabel,
    SplitRule,
)

__all__ = [
    "Archive",
    "Case",
    "CaseEntry",
    "Layout",
    "Manifest",
    "Package",
    "PackageFile",
    "Phantom",
    "Range",
    "SplitRule",
    "as_yaml",
    "list_manifests",
    "load_manifest",
]


@dataclass(frozen=True)
class Case:
    """A case on disk: the original files, unprocessed. `label` is None where there is none; `manifest` names its data set.

    `image` may be a folder of DICOM slices, `label` a folder of one mask a class. `part`: train, validation or test, where its layout says.
    """

    id: str
    image: Path
    label: Path | None
    modality: Modality
    label_origin: LabelOrigin
    manifest: str
    part: str | None = None

    @property
    def label_file(self) -> Path:
        """`label` of a case that has one. Raises UserError for another."""
        if self.label is None:
            raise UserError(f"{self.id}: found no label, expected a labelled case; leave it out, or add its label.")
        return self.label


class Manifest(Frozen):
    """One data set. Lengths in mm, intensities in HU (CT) or in the units of the image file (MRI, US).

    `labels` is the official label map, raw value -> name; `classes` maps a class name to the raw labels merged into it, and its
    order gives the class index, from 1. `intensity_window` is clipped to, then mapped onto `intensity_range`; `other_windows` has
    that of a second modality. `contrast_ranges` gives, for a class, the lowest and highest offset (HU) that turns the contrast
    phase of a scan into another one; an augmentation draws from it. `patch_voxels` and `epochs` are the paper's, None where it
    says nothing. `may_be_empty` says that a case may have no voxel of any class, as healthy controls have of a lesion; such a label is a fault otherwise.
    `archives` are what `home data fetch` downloads. Cases are listed one by one (`cases`, the demo's) or found in a folder
    of the user's (`layouts`).
    `unverified` says what of all this was not read off the official source.
    """

    name: Name
    title: str
    modality: Modality
    source: str
    page: str = Field("", pattern=r"^(https?://\S+)?$")
    doi: str | None = Field(None, pattern=r"^10\.\d{4,9}/\S+$")
    licence: str
    access: Access = "open"
    access_steps: tuple[str, ...] = ()
    citation: str
    expected_cases: int | None = Field(None, ge=1)
    labels: dict[RawLabel, str] = {}
    classes: dict[Name, Annotated[tuple[RawLabel, ...], Field(min_length=1)]] = Field(min_length=1, max_length=255)
    spacing_mm: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    intensity_window: Range
    other_windows: dict[Modality, Range] = {}
    intensity_range: Range = (0.0, 1.0)
    contrast_ranges: dict[Name, Range] = {}
    patch_voxels: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]] | None = None
    epochs: int | None = Field(None, ge=1)
    label_origin: LabelOrigin = "UNSTATED"
    may_be_empty: bool = False
    archives: tuple[Archive, ...] = ()
    layouts: tuple[Layout, ...] = ()
    split: SplitRule | None = None
    packages: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Package] = {}
    cases: tuple[CaseEntry, ...] = ()
    unverified: tuple[str, ...] = ()
    notes: str = ""

    _path: Path | None = PrivateAttr(None)

    @field_validator("classes")
    @classmethod
    def _each_label_once(cls, classes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        owner: dict[int, str] = {}
        for name, values in classes.items():
            for value in values:
                if value in owner:
                    raise ValueError(f"each raw label once: {value} stands in {owner[value]} and in {name}")
                owner[value] = name
        if "background" in classes:
            raise ValueError("no class called background: it is always class 0")
        return classes

    @field_validator("intensity_window", "intensity_range")
    @classmethod
    def _low_below_high(cls, pair: Range) -> Range:
        if not pair[0] < pair[1]:
            raise ValueError("low before high")
        return pair

    @field_validator("other_windows")
    @classmethod
    def _each_low_below_high(cls, windows: dict[str, Range]) -> dict[str, Range]:
        for pair in windows.values():
            cls._low_below_high(pair)
        return windows

    @model_validator(mode="after")
    def _layouts_and_labels_agree(self) -> "Manifest":
        if not self.cases and not self.layouts:
            raise ValueError("cases or layouts: where is the data?")
        if self.modality in self.other_windows:
            raise ValueError(f"other_windows of other modalities: that of {self.modality}, its own, is intensity_window")
        for index, layout in enumerate(self.layouts):
            if layout.modality and layout.modality not in self.modalities:
                raise ValueError(f"layouts[{index}].modality with a window of its own: other_windows has none for {layout.modality}")
        unknown = [f"{value} in {name}" for name, values in self.classes.items() for value in values if self.labels and value not in self.labels]
        if unknown:
            raise ValueError(f"raw labels that stand in the label map: classes has {', '.join(unknown)}")
        by = self.split.stratify_by if self.split else None
        if by and by != "modality" and by not in self.classes:
            raise ValueError(f"split.stratify_by: modality or a class, not {by!r}")
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> "Manifest":
        ids = [case.id for case in self.cases]
        for index, case in enumerate(self.cases):
            if ids.index(case.id) != index:
                raise ValueError(f"each case id once: cases[{index}].id is {case.id!r} again")
            for role in ("image", "label"):
                source = getattr(case, role)
                if isinstance(source, PackageFile) and source.package not in self.packages:
                    raise ValueError(f"cases[{index}].{role}.package {source.package!r} under packages, where there are: {', '.join(self.packages) or 'none'}")
        own = [(f"cases[{index}].contrast_ranges", case.contrast_ranges or {}) for index, case in enumerate(self.cases)]
        for where, ranges in [("contrast_ranges", self.contrast_ranges), *own]:
            for name, (low, high) in ranges.items():
                if name not in self.classes:
                    raise ValueError(f"{where} names a class: {name!r} is none of {', '.join(self.classes)}")
                if low > high:
                    raise ValueError(f"{where}.{name}: low before high, not {low:g}, {high:g}")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """All class names by class index, `"background"` first."""
        return ("background", *self.classes)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Its own modality first, then those with another window."""
        return (self.modality, *self.other_windows)

    def strange(self, values: Iterable[int]) -> list[int]:
        """Which of these raw label values the manifest does not know, sorted: neither 0, nor of its label map, nor, where it has none, of its classes."""
        return strange_values(values, self.labels, self.classes)

    def window_of(self, modality: str) -> Range:
        """The intensity window of one modality. Raises UserError where the manifest has none."""
        for known, window in ((self.modality, self.intensity_window), *self.other_windows.items()):
            if known == modality:
                return window
        raise UserError(f"{self.name}: no intensity window for {modality}, expected one of {', '.join(self.modalities)}; add it to other_windows.")

    @property
    def reference(self) -> str:
        """What `load_manifest` takes to read it again: its name where it ships with the workbook, else the path it was read from."""
        return str(self._path) if self._path is not None else self.name

    def contrast_of(self, case_id: str) -> dict[str, Range]:
        """Contrast offsets (low, high, in HU) by class name for one case; the manifest's own where the case has none or is unknown."""
        own = next((case.contrast_ranges for case in self.cases if case.id == case_id), None)
        return dict(self.contrast_ranges if own is None else own)

    def origin_of(self, case: str) -> LabelOrigin:
        """Where the label of a case comes from: as its entry says, SYNTHETIC of a phantom in its place (`phantom-a` for `ct-a`), else as the data set says."""
        listed = {entry.id: entry.label_origin for entry in self.cases}
        phantoms: dict[str, LabelOrigin] = {"phantom-" + entry.id.split("-", 1)[-1]: "SYNTHETIC" for entry in self.cases}
        return (phantoms | listed).get(case, self.label_origin)

    def merge(self, labels: np.ndarray) -> np.ndarray:
        """Raw label values -> class indices by a lookup table; a raw value of no class becomes background.

        Args:
            labels: array of any shape; integers, or floats that hold whole numbers.

        Returns:
            uint8 array of the same shape, values 0 .. number of classes.

        Raises:
            UserError: a negative, non-whole or absurdly large (> 65535) label value.

        >>> load_manifest("demo_mr_spine").merge(np.array([0, 49, 100, 61]))
        array([0, 1, 2, 3], dtype=uint8)
        """
        labels = np.asarray(labels)
        wanted = f"{self.name}: whole numbers from 0 to {LARGEST_RAW_LABEL} are expected in a label volume"
        if labels.dtype.kind not in "iufb":
            raise UserError(f"{wanted}, found dtype {labels.dtype}; is this the label file?")
        if labels.dtype.kind == "f":
            off = ~(labels == np.round(labels)) | ~np.isfinite(labels)  # NaN is unequal to itself
            if off.any():
                raise UserError(f"{wanted}, found {labels[off].flat[0]:g}; resample labels with nearest neighbour, and check that this is no image.")
        if labels.size and (labels.min() < 0 or labels.max() > LARGEST_RAW_LABEL):
            worst = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(f"{wanted}, found {worst:g}; check that this is the label file and no image.")
        listed = max(max(values) for values in self.classes.values())
        table = np.zeros(max(listed, int(labels.max()) if labels.size else 0) + 1, np.uint8)
        for index, values in enumerate(self.classes.values(), start=1):
            table[list(values)] = index
        return table[labels if labels.dtype.kind in "iu" else labels.astype(np.int32)]


def strange_values(values: Iterable[int], labels: Mapping[int, str], classes: Mapping[str, Sequence[int]]) -> list[int]:
    """As `Manifest.strange`."""
    known = set(labels) or set(itertools.chain(*classes.values()))
    return sorted({int(value) for value in values} - known - {0})


def as_yaml(manifest: Manifest) -> str:
    """A manifest as text, short lists in a line, without what is empty."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    fields = {field: plain(value) for field, value in manifest.model_dump(exclude_none=True).items() if value not in ("", (), {}) and value is not False}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=150, default_flow_style=None)


def list_manifests() -> list[str]:
    """Names of the data sets that ship with the workbook, sorted."""
    return sorted(path.stem for path in shipped("data_manifests").glob("*.yaml"))


def load_manifest(name_or_path: str | Path) -> Manifest:
    """Read a manifest by its name (`"demo_ct"`) or by the path of a YAML file.

    Raises:
        UserError: one line for an unknown name, a missing file, a file that is no plain YAML, or a wrong or unknown field.
    """
    text = str(name_or_path)
    if re.fullmatch(r"[A-Za-z0-9_-]+", text):
        names = list_manifests()
        if text not in names:
            near = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or names
            raise UserError(f"data set {text!r} is unknown; nearest: {', '.join(near)}. Give one of these, or the path of a manifest (.yaml).")
        path = shipped("data_manifests") / f"{text}.yaml"
    else:
        path = Path(name_or_path).expanduser().absolute()
    tree = read_mapping(path, what="data manifest", known=list_manifests(), fields=tuple(Manifest.model_fields))
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise UserError(_one_line(path, error)) from None
    if manifest.name != path.stem:
        raise UserError(f"{path}: name: found {manifest.name!r}, expected {path.stem!r}, the name of the file; make them agree.")
    if path.parent != shipped("data_manifests"):
        manifest._path = path
    return manifest


_FIELDS = sorted({name for model in (Manifest, Archive, CaseEntry, Layout, Package, PackageFile, Phantom, SplitRule) for name in model.model_fields})


def _one_line(path: Path, error: ValidationError) -> str:
    """The first fault of a manifest as one line: file, field, found, expected. A misspelt field comes before what it leaves missing."""
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    parts = [part for index, part in enumerate(fault["loc"]) if index < 1 or fault["loc"][index - 1] not in ("image", "label")]  # less the union's tag
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    found, more = short(reprlib.repr(fault["input"])), f" ({len(faults) - 1} more after this one)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(parts[-1]), _FIELDS, n=3, cutoff=0.5) if parts[-1] not in _FIELDS else []
        return f"{path}: {field}: unknown field here; {'nearest: ' + ', '.join(near) if near else 'remove it'}.{more}"
    if fault["type"] == "missing":
        return f"{path}: {field}: missing; add it.{more}"
    if fault["type"] == "value_error":
        wanted = short(fault["msg"].removeprefix("Value error, "), 300)
        return f"{path}: {f'{field}: found {found}, ' if field else ''}expected {wanted}; correct it.{more}"
    wanted = short(fault["msg"]).removeprefix("Input should ").removeprefix("be ")
    return f"{path}: {field}: found {found}, expected: {wanted}; correct it.{more}"
