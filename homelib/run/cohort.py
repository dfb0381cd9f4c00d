"""A user's data to a training: cases that `home data prepare` has made, split by their manifest, and settings completed by it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import Settings, override
from ..data.check import faults, listed
from ..data.cohort import default_folder, failed_in, open_all
from ..data.layouts import find_cases
from ..data.manifest import Case, Manifest, load_manifest
from ..data.memory import residence, within_reach
from ..data.prepare import PreparedCase
from ..data.split import split
from ..errors import UserError
from .mixture import label_space

Faulty = Literal["refuse", "leave-out", "keep"]
FAULTY = get_args(Faulty)


@dataclass(frozen=True)
class DataSet:
    """A data set by name or path of its manifest, the folder of its files, and that of its prepared cases (None: where `home data prepare` puts them).

    faulty: what becomes of cases, of any part, that the last `home data check` calls faulty, or that could not be prepared. "keep" trains on the former.
    """

    manifest: str
    root: Path
    prepared: Path | None = None
    faulty: Faulty = "refuse"


@dataclass(frozen=True)
class Cohort:
    """Settings of a training, complete, and its cases, to be read by slices."""

    settings: Settings
    train: tuple[PreparedCase, ...]
    validation: tuple[PreparedCase, ...]
    told: tuple[str, ...] = ()  # lines: faulty cases that are left out, steps that no manifest states

    def at_hand(self, say: Callable[[str], None]) -> "Cohort":
        """The same with its training cases in memory, where all of them fit; the estimate is said, and what was told."""
        for line in self.told:
            say(line)
        chosen = residence(self.train, workers=self.settings.training.workers)
        say(str(chosen))
        return replace(self, train=tuple(within_reach(self.train, chosen, progress=True)))


def folds_of(sets: Sequence[DataSet]) -> int:
    """How many folds the manifests deal their cases into. Raises UserError where they have none, or differ."""
    found = {load_manifest(one.manifest).name: _folds(load_manifest(one.manifest)) for one in sets}
    folds = next(iter(found.values()), None)
    if folds is None or len(set(found.values())) != 1:
        told = ", ".join(f"{name} {number or 'none'}" for name, number in found.items())
        raise UserError(f"--fold: found folds: {told}; expected the same number in each. Write split: {{folds: 5}} in the manifest, or leave --fold out.")
    return folds


def cohort(settings: Settings, sets: Sequence[DataSet], *, fold: int | None = None, changes: Mapping[str, Any] | None = None) -> Cohort:
    """Open the prepared cases of one or more data sets and complete the settings by their manifests.

    Args:
        settings: of a preset.
        sets: what is trained on; classes of one name are one.
        fold: which is validated on, where the manifest deals its cases into folds; all others are trained on.
        changes: of the user, by dotted name; they win over what a manifest says.

    Returns:
        The cohort. Patch and epochs are the manifest's, where it has them; an epoch is as many steps as it takes to draw as many patches as there are cases.
        Where it states no epochs, steps are the preset's, and a line of `told` says so.

    Raises:
        UserError: a fold that is not there, or is needed; no labelled case to train on; cases faulty, not prepared, or with different spacings; one id twice.
    """
    changes, lines = dict(changes or {}), []
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    opened: dict[str, PreparedCase] = {}
    for one in sets:
        manifest = load_manifest(one.manifest)
        cases = {case.id: case for case in find_cases(manifest, one.root).cases}
        assigned = split(manifest, cases.values(), root=one.root)
        chosen = _parts(manifest, cases, assigned, fold)
        folder = one.prepared or default_folder(manifest, one.root)
        if wrong := _faulty(manifest, one, folder, cases):
            lines.append(f"{one.root}: left out {len(wrong)} faulty cases ({listed(wrong)}).")
            chosen = {part: [name for name in ids if name not in wrong] for part, ids in chosen.items()}
            if not chosen["train"]:
                raise UserError(f"{one.root}: found faults in all cases to train on ({listed(wrong)}), expected sound ones. Mend them.")
        labelled = [cases[name] for part in ("train", "validation") for name in chosen[part]]
        if twice := [case.id for case in labelled if case.id in opened]:
            raise UserError(f"{one.root}: found the case {twice[0]} in another data set too, expected ids of their own. Rename the files of one.")
        opened |= {case.case.id: case for case in open_all(labelled, folder)}
        for part, ids in chosen.items():
            parts[part] += ids
    spacings = sorted({case.spacing_mm for case in opened.values()})
    if len(spacings) != 1:
        raise UserError(
            f"prepared cases: found spacings {', '.join(map(str, spacings)) or 'of no case'}, expected one for all. Prepare them with one --spacing."
        )
    low_pass = {case.low_pass for case in opened.values()}
    if len(low_pass) != 1:
        raise UserError("prepared cases: found some with a low-pass and some without, expected one way for all. Prepare them alike (--low-pass).")
    first = load_manifest(sets[0].manifest)
    told: dict[str, Any] = {"data.manifest": first.reference, "data.also": tuple(load_manifest(one.manifest).reference for one in sets[1:])}
    told |= {f"data.{part}_cases": tuple(ids) for part, ids in parts.items()} | {"data.spacing_mm": spacings[0], "data.low_pass": low_pass.pop()}
    told |= {"data.patch_voxels": first.patch_voxels} if first.patch_voxels else {}
    complete = override(settings, told | {name: value for name, value in changes.items() if name.startswith("data.")})
    names = label_space(complete.data).class_names
    one_piece = tuple(name for name in settings.prediction.one_piece if name in names)  # a preset may name classes that this data has not
    complete = override(complete, {"model.out_channels": len(names), "prediction.one_piece": one_piece} | changes)
    if "training.steps" not in changes:
        epoch = -(-len(parts["train"]) // complete.training.patches_a_step)
        if first.epochs:
            complete = override(complete, {"training.steps": first.epochs * epoch})
        else:
            steps = complete.training.steps
            about = f"training.steps is the preset's, {steps}: {steps / epoch:.3g} epochs of {len(parts['train'])} cases"
            lines.append(f"{first.name}: its manifest states no epochs; {about}. Set it.")
    train, validation = (tuple(opened[name] for name in parts[part]) for part in ("train", "validation"))
    return Cohort(complete, train, validation, tuple(lines))


def _faulty(manifest: Manifest, one: DataSet, folder: Path, cases: Mapping[str, Case]) -> dict[str, str]:
    """The cases to leave out of every part, with what is wrong. A faulty case is so though it was prepared."""
    wrong = {} if one.faulty == "keep" else faults(manifest, one.root, list(cases.values()))[0]
    wrong |= {name: "not prepared" for name in failed_in(folder) if name in cases and name not in wrong}
    if wrong and one.faulty != "leave-out":
        raise UserError(
            f"{one.root}: found {len(wrong)} faulty cases ({listed(wrong)}), expected none. "
            f"Mend them (home data check {manifest.reference} {one.root}), or train with --faulty leave-out."
        )
    return wrong


def _folds(manifest: Manifest) -> int | None:
    return manifest.split.folds if manifest.split else None


def _parts(manifest: Manifest, cases: Mapping[str, Case], assigned: Mapping[str, str], fold: int | None) -> dict[str, list[str]]:
    """Ids to train on, validate on and test on. Cases without a label are tested on alone, where the split says so."""
    folds = _folds(manifest)
    if folds is None and fold is not None:
        raise UserError(f"--fold: found {fold}, but {manifest.name} has no folds. Write split: {{folds: 5}} in its manifest, or leave --fold out.")
    if folds is not None and (fold is None or not 0 <= fold < folds):
        raise UserError(f"--fold: found {fold}, expected 0 to {folds - 1}, or all: {manifest.name} deals its cases into {folds} folds.")
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for name, part in assigned.items():
        role = ("validation" if part == f"fold-{fold}" else "train") if part.startswith("fold-") else part
        if role == "test" or cases[name].label is not None:
            parts[role].append(name)
    if not parts["train"]:
        raise UserError(f"{manifest.name}: found no labelled case to train on among {len(cases)}, expected one at least. Check the folder and the split.")
    return parts
