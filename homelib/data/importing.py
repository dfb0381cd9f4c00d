"""A manifest for a folder that has none: its layout is read off the names, its classes off `dataset.json` or the labels themselves.

What the folder itself does not say (window, who made the labels, licence) is filled in with a usual value and stands under `unverified`,
to be looked at by the user. Nothing is written into the folder.
"""

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from ..errors import UserError
from ..paths import written_whole
from ..progress import bar
from .layouts import find_cases
from .manifest import Case, Manifest, load_manifest
from .naming import find_layouts
from .reading import ReadFault, masks_in, read, read_label

WINDOWS = {"CT": (-175.0, 250.0), "MRI": (0.0, 1000.0), "US": (0.0, 255.0)}  # the paper's
_WORDS = {"CT": "CT", "MR": "MRI", "MRI": "MRI", "T1": "MRI", "T2": "MRI", "T1W": "MRI", "T2W": "MRI", "FLAIR": "MRI", "US": "US", "ULTRASOUND": "US"}
LOOKED_AT = 20  # cases that are opened, spread over all
_MOST_LABELS = 255
_SUBJECT = "sub-[A-Za-z0-9]+"  # of a BIDS session's case, sub-01_ses-1
_IGNORED = "ignore"  # nnU-Net's name of a label that is none


def import_folder(root: str | Path, out: str | Path, *, modality: str | None = None, progress: bool = False) -> Manifest:
    """Write the manifest of a folder to `out` (`my_data.yaml`, whose name becomes the data set's) and return it.

    Args:
        root: nnU-Net raw, Medical Segmentation Decathlon, BIDS-like, one folder a case (files, DICOM slices, one mask a class), or pairs of files.
        out: a new file; an old one is left as it is.
        modality: CT, MRI or US; None reads it off `dataset.json`, DICOM, or a word in the names.
        progress: show a bar of the cases that are opened, where there is a terminal.

    Raises:
        UserError: no images found, an unknown modality, labels that cannot be read or are none, a name that is no name of a data set.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    if out.exists():
        raise UserError(f"{out}: exists already and is left as it is. Choose another --out.")
    if out.suffix != ".yaml" or not re.fullmatch(r"[a-z][a-z0-9_]{0,59}", out.stem):
        raise UserError(f"{out}: found the name {out.name!r}, expected small letters, digits and _, ending in .yaml: my_data.yaml, say.")
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected one with images and labels.")
    described = _described(root)
    layouts, more, labels_left = find_layouts(root)
    if not layouts:
        raise UserError(f"{root}: no images found; expected NIfTI, NRRD, MetaImage or folders of DICOM slices. In other formats, convert them first.")
    unverified = [
        "Source, licence and label_origin: say where the data are from.",
        "The intensity window is the paper's for this modality; compare it with your images.",
    ]
    if more:
        unverified.append(f"Images whose names fit no layout here are left out, {more[0]} first of {len(more)} kinds. Rename them, or write their layouts.")
    if labels_left and any("label" in layout for layout in layouts):
        told = ", ".join(labels_left[:3]) + (" and others" if len(labels_left) > 3 else "")
        unverified.append(f"Labels left out, for one label a case is taken: {told}. Of a second rater, say: write their layout, or move the others.")
    found_modality = modality or described.get("modality") or _modality_of_names(layouts)
    fields: dict[str, Any] = {
        "name": out.stem,
        "title": str(described.get("title") or root.resolve().name),
        "modality": found_modality or "CT",
        "source": str(root.resolve()),
        "licence": str(described.get("licence") or "unverified"),
        "access": "private",
        "citation": str(described.get("reference") or "unverified"),
        "classes": {"any": [1]},
        "spacing_mm": [1.0, 1.0, 1.0],
        "intensity_window": list(WINDOWS.get(found_modality or "CT", WINDOWS["CT"])),
        "layouts": layouts,
        "split": {"seed": 0, "folds": 5} | ({"patient": _SUBJECT} if any("sub-*/" in layout["image"] for layout in layouts) else {}),
    }
    try:
        cases = find_cases(Manifest.model_validate(fields | {"modality": "CT"}), root).cases
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{root}: its names make no layout ({fault['input']!r}: {fault['msg']}); rename the files, or write the layouts by hand.") from None
    if not cases:
        raise UserError(f"{root}: images were found, but no case could be told from their names; write the layouts by hand (home data show in_house).")
    if labels_left and not any(case.label for case in cases):
        told = f"found images ({layouts[0]['image']}) and labels ({labels_left[0]}), but no id in both"
        raise UserError(f"{root}: {told}; expected each label under its image's id. Rename them, or write the layouts by hand.")
    looked = [cases[index] for index in np.unique(np.linspace(0, len(cases) - 1, min(LOOKED_AT, len(cases))).round().astype(int))]
    spacing, said = _grids(bar(looked, desc="images", unit="case", show=progress))
    fields["modality"] = found_modality = found_modality or said
    if found_modality not in WINDOWS:
        wanted = f"found {found_modality!r}" if found_modality else "the files do not say it"
        raise UserError(f"modality: {wanted}, expected one of {', '.join(WINDOWS)}. Give --modality.")
    fields |= {"expected_cases": len(cases), "spacing_mm": spacing, "intensity_window": list(WINDOWS[found_modality])}
    labels = described.get("labels") or _mask_names(looked) or _values(bar(looked, desc="labels", unit="case", show=progress), unverified)
    fields["labels"], fields["classes"] = labels, _classes(labels)
    if regions := described.get("regions"):
        told = ", ".join(regions)
        unverified.append(f"Regions of several values in dataset.json ({told}): a voxel has one class here, the smallest region's. Merge values by hand.")
    if _IGNORED in fields["classes"] and len(fields["classes"]) > 1:
        ignored = fields["classes"].pop(_IGNORED)
        unverified.append(f"Voxels of the label ignore ({', '.join(map(str, ignored))}) are background here: they cannot be left out of the loss.")
    unverified.append(f"spacing_mm is the median of {len(looked)} cases; choose the one to train at.")
    fields["unverified"] = unverified
    with written_whole(out) as part:
        part.write_text("# Written by home data import; look at what stands under unverified.\n" + _dump(fields), encoding="utf-8", errors="backslashreplace")
    try:
        return load_manifest(out)
    except UserError:
        out.unlink()
        raise


def _dump(fields: dict) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=150, default_flow_style=None)


# ---------------------------------------------------------------- what dataset.json says (nnU-Net of either version, and the Decathlon)


def _described(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        channels = tree.get("channel_names") or tree.get("modality") or {}
        channels = {"0": channels} if isinstance(channels, str) else channels
        if len(channels) > 1:
            raise UserError(f"{path}: found {len(channels)} channels, expected one image a case; several are not supported.")
        named: dict[int, str] = {}
        regions: list[tuple[str, list[int]]] = []
        for key, value in tree.get("labels", {}).items():
            name, values = (value, [key]) if str(key).isdigit() else (key, value if isinstance(value, list) else [value])
            regions.append((str(name), [int(one) for one in values]))
        for name, values in sorted(regions, key=lambda region: len(region[1])):  # a region lists the values of its parts, which keep their own names
            for one in values:
                named.setdefault(one, name)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: found no description of a data set ({type(error).__name__}: {error}), expected nnU-Net's or the Decathlon's. Mend it or move it."
        ) from None
    named.pop(0, None)
    word = str(next(iter(channels.values()), "")).upper().strip() if isinstance(channels, dict) else ""
    return {
        "title": tree.get("name"),
        "licence": tree.get("licence") or tree.get("license"),
        "reference": tree.get("reference"),
        "modality": _WORDS.get(word),
        "labels": dict(sorted(named.items())),
        "regions": [name for name, values in regions if len(values) > 1],
    }


def _modality_of_names(layouts: list[dict]) -> str | None:
    """CT from `ct.nii.gz`, MRI from `_T2w`: where all layouts say the same."""
    words = {_WORDS.get(word.upper()) for layout in layouts for word in re.split(r"[^A-Za-z0-9]+", layout["image"])} - {None}
    return words.pop() if len(words) == 1 else None


# ---------------------------------------------------------------- what some of the files say


def _grids(cases: Iterable[Case]) -> tuple[list[float], str | None]:
    """Median spacing in mm along right-left, front-back and up, and the modality that DICOM states."""
    import nibabel

    spacings, faults, modality = [], [], None
    for case in cases:
        try:
            volume = read(case.image)
        except ReadFault as error:
            faults.append(error)
            continue
        axes = nibabel.io_orientation(volume.affine)[:, 0].astype(int)
        spacings.append(np.array(volume.spacing_mm)[np.argsort(axes)])
        modality = modality or _WORDS.get(volume.modality or "")
    if not spacings:
        raise faults[-1]
    return np.median(spacings, axis=0).round(3).tolist(), modality


def _mask_names(cases: list[Case]) -> dict[int, str]:
    """A number for each mask in folders of masks."""
    names = {name for case in cases if case.label and case.label.is_dir() for name in masks_in(case.label)}
    return dict(enumerate(sorted(names), start=1))


def _values(cases: Collection[Case], unverified: list[str]) -> dict[int, str]:
    """The raw values in some label files, with names to be replaced."""
    values: set[int] = set()
    opened, empty, strange = 0, 0, ""
    for case in cases:
        if case.label is None:
            continue
        try:
            found = np.unique(read_label(case.label, {}).data)
        except ReadFault:
            continue  # the check will tell
        if len(found) > _MOST_LABELS or not np.isfinite(found).all() or (found != np.rint(found)).any() or found.min() < 0:
            strange = f"{case.label}: found values from {found.min():g} to {found.max():g}, expected whole labels from 0. Is it a label and no image?"
            continue
        opened += 1
        empty += not found.any()
        values |= {int(value) for value in found if value}
    if not values:
        nothing = f"found no label that holds anything in {len(cases)} cases looked at, expected labels beside the images"
        raise UserError(strange or f"{nothing}. Name them, or write the layouts by hand.")
    if strange:
        unverified.append(f"Left out: {strange}")
    if empty:
        unverified.append(f"{empty} of {opened} labels looked at hold nothing: where these are healthy cases, write may_be_empty: true.")
    unverified.append(f"Labels are the values found in {opened} cases: name them, and add what others hold.")
    return {value: f"label_{value}" for value in sorted(values)}


def _classes(labels: dict[int, str]) -> dict[str, list[int]]:
    """A class for each label; labels of one name are merged, those whose names differ in what a class's name cannot hold are not."""
    classes: dict[str, list[int]] = {}
    class_of: dict[str, str] = {}
    for value, name in labels.items():
        if name not in class_of:
            plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
            plain = (plain if re.match("[a-z]", plain) and plain != "background" else f"label_{plain or value}")[:50]
            class_of[name] = f"{plain}_{value}" if plain in classes else plain
        classes.setdefault(class_of[name], []).append(value)
    return classes
