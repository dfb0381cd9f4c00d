"""Grids of ablations: a question as a YAML file, with its arms, seeds and folds, read into the runs that answer it.

An *arm* is a variant of the network or of its training: a name, and what it changes of the settings. Every arm is run with every seed and
every fold, so that differences between arms are paired. Shipped grids lie in `notebooks/grids/`.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ..config import Settings, override, preset
from ..errors import UserError
from ..frozen import Frozen
from ..paths import shipped
from ..yaml_file import read_mapping

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,59}$")]  # small letters: a folder's name on every file system
Table = Annotated[str, Field(pattern=r"^T\d+$")]
Seed = Annotated[int, Field(ge=0)]
DIRECTIONS = ("a-to-c", "c-to-a")  # of the demo
AXES = ("training.seed", "data.train_cases", "data.validation_cases", "data.test_cases")  # set by seeds and folds, so by no arm
WITHOUT_EFFECT = {  # on what a run finds: they take no part in its fingerprint
    "model": {"scan_backend"},
    "training": {"accelerator", "workers", "loggers", "checkpoint_every"},
}
LATER = {  # settings that are younger than committed results: at their default, which is what was done before them, they take no part in a fingerprint
    "data": {"low_pass"},
    "training": {"loss", "init_head", "validation_cases_most", "log_routing"},
}


@dataclass(frozen=True)
class Planned:
    """One run of a grid. `name` is that of its folder; `changes` are all it needs, the seed too, on top of the grid's profile.

    fold: "a-to-c" or "c-to-a" of the demo, the number of a fold, or None where the grid has none. fingerprint: of all that decides what the
    run finds; two runs of one fingerprint are the same run.
    """

    name: str
    arm: str
    seed: int
    fold: str | int | None
    changes: Mapping[str, Any]
    fingerprint: str


class Grid(Frozen):
    """A question about the network, and the arms that answer it.

    `changes` hold for every arm; an arm's own are set after, and win. `data` names data sets; empty is the demo. `folds` are directions of the
    demo or numbers of folds; empty is none. `baseline` is the arm that the others are compared with, the first one where it is not said. `paper` says
    which row of which of the paper's tables (`homelib.study.paper_tables`) is the same arm: table -> arm -> row.
    """

    name: Name
    question: str = Field(min_length=1)
    profile: str
    data: tuple[str, ...] = ()
    changes: dict[str, Any] = {}
    arms: dict[Name, dict[str, Any]] = Field(min_length=1)
    baseline: Name | None = None
    paper: dict[Table, dict[Name, str]] = {}
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    folds: tuple[int | str, ...] = ()
    notes: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.baseline is not None and self.baseline not in self.arms:
            raise ValueError(f"baseline: found {self.baseline!r}, expected one of the arms {', '.join(self.arms)}")
        for table, rows in self.paper.items():
            if unknown := [arm for arm in rows if arm not in self.arms]:
                raise ValueError(f"paper.{table}: found {unknown[0]!r}, expected one of the arms {', '.join(self.arms)}")
        for axis in ("seeds", "folds"):
            values = getattr(self, axis)
            if len(set(values)) < len(values):
                raise ValueError(f"{axis}: found {list(values)}, expected each once")
        wanted = "numbers of folds, 0 and up" if self.data else f"{' and '.join(DIRECTIONS)}, for the grid names no data set"
        if not all(isinstance(fold, int) and fold >= 0 if self.data else fold in DIRECTIONS for fold in self.folds):
            raise ValueError(f"folds: found {list(self.folds)}, expected {wanted}")
        seen: dict[str, str] = {}
        for arm in self.arms:
            told = fingerprint(self.settings(arm))
            if told in seen:
                raise ValueError(f"arms.{arm}: has the settings of {seen[told]}, expected others; it would be the same run twice")
            seen[told] = arm
        return self

    @property
    def compared_with(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    def settings(self, arm: str, *, seed: int = 0) -> Settings:
        """All settings of an arm, but for the cases of a fold. Raises UserError with the arm's name for an unknown field or a wrong value."""
        for place, changes in (("changes", self.changes), (f"arms.{arm}", self.arms[arm])):
            if axis := next((name for name in AXES if name in changes), None):
                raise UserError(f"{place}: {axis}: set by the grid's seeds and folds; leave it out.")
        try:
            return override(preset(self.profile), self._changes(arm, seed))
        except UserError as error:
            raise UserError(f"arms.{arm}: {error}") from None

    def runs(self) -> list[Planned]:
        """Every arm with every seed and fold: seed by seed, so that a grid that is stopped early is one of fewer seeds."""
        planned = []
        for seed, fold, arm in product(self.seeds, self.folds or (None,), self.arms):
            told = fingerprint(self.settings(arm, seed=seed), fold=fold, data=self.data)
            planned.append(Planned(_folder(arm, seed, fold), arm, seed, fold, self._changes(arm, seed), told))
        return planned

    def _changes(self, arm: str, seed: int) -> dict[str, Any]:
        return {**self.changes, **self.arms[arm], "training.seed": seed}


def fingerprint(settings: Settings, *, fold: str | int | None = None, data: tuple[str, ...] = ()) -> str:
    """A mark of all that decides what a run finds: its settings, less those that change only where and how fast; its fold and its data sets.

    >>> fingerprint(preset("smoke")) == fingerprint(override(preset("smoke"), {"training.workers": 2}))
    True
    """
    tree = settings.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    usual = settings.model_dump(mode="json", exclude_defaults=True)
    for part, names in LATER.items():
        for name in names - usual.get(part, {}).keys():
            tree[part].pop(name, None)
    told = {"settings": tree, "fold": fold, "data": data}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def list_grids() -> list[str]:
    """Names of the grids that ship with the workbook, sorted."""
    return sorted(path.stem for path in (shipped("notebooks") / "grids").glob("*.yaml"))


def load_grid(name_or_path: str | Path) -> Grid:
    """Read a grid by its name (`"experts"`) or by the path of a YAML file.

    Raises:
        UserError: one line for an unknown name, a file that is no plain YAML, an unknown or wrong field, or an arm whose changes do not fit.
    """
    text = str(name_or_path)
    if re.fullmatch(r"[A-Za-z0-9_-]+", text):
        if text not in list_grids():
            near = difflib.get_close_matches(text, list_grids(), n=3, cutoff=0.4) or list_grids()
            raise UserError(f"grid {text!r} is unknown; nearest: {', '.join(near)}. Give one of these, or the path of a grid (.yaml).")
        path = shipped("notebooks") / "grids" / f"{text}.yaml"
    else:
        path = Path(name_or_path).expanduser().absolute()
    tree = read_mapping(path, what="grid", known=list_grids(), fields=tuple(Grid.model_fields))
    try:
        grid = Grid(**{str(name): value for name, value in tree.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if grid.name != path.stem:
        raise UserError(f"{path}: name: found {grid.name!r}, expected {path.stem!r}, the name of the file; make them agree.")
    return grid


def _folder(arm: str, seed: int, fold: str | int | None) -> str:
    parts = [arm, f"seed{seed}"] + ([] if fold is None else [fold if isinstance(fold, str) else f"fold{fold}"])
    return "_".join(parts)
