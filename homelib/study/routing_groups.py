"""Class and expert over several scans of one network: by modality, and by data set.

Each scan's association is small and is kept beside its maps, so that scans that were looked at one after the other, from several folders say, are put
together without their maps. Experts of two networks have nothing to do with each other: what was found with other weights is left out.

C classes, E experts, n shifts.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..axes import three
from ..errors import UserError
from ..paths import written_whole
from .association import Association, by_group
from .expert_maps import DAMAGED, Layer

FILE = "associations.npz"
GROUPS = ("modality", "data_set")


@dataclass(frozen=True)
class Kept:
    """What one scan says. name, modality, data_set: of the case. weights: a mark of the network's (`mark_of`). found: of each layer."""

    name: str
    modality: str
    data_set: str
    weights: str
    found: Mapping[Layer, Association]

    def save(self, path: Path) -> Path:
        """As one compressed `.npz`, written whole."""
        first = next(iter(self.found.values()))
        told = {name: getattr(self, name) for name in ("name", "modality", "data_set", "weights")} | {"class_names": first.class_names}
        arrays: dict[str, Any] = {"told": np.array(json.dumps(told)), "voxels": first.voxels}
        for layer, one in self.found.items():
            arrays |= {"/".join(map(str, (kind, *layer))): table for kind, table in (("joint", one.joint), ("null", one.null))}
        with written_whole(path) as part, part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        return path

    @classmethod
    def load(cls, path: Path) -> "Kept":
        """What `save` wrote. Raises UserError: no whole file of this kind."""
        try:
            with np.load(path, allow_pickle=False) as kept:
                told = json.loads(str(kept["told"]))
                names, layers = tuple(told.pop("class_names")), [three(map(int, name.split("/")[1:])) for name in kept.files if name.startswith("joint/")]
                tables = {layer: [kept["/".join(map(str, (kind, *layer)))] for kind in ("joint", "null")] for layer in layers}
                found = {layer: Association(names, joint, null, kept["voxels"]) for layer, (joint, null) in tables.items()}
                return cls(found=found, **told)
        except DAMAGED as error:
            raise UserError(f"{path}: no whole file of associations ({type(error).__name__}). Delete it, or run home routing again.") from None


def mark_of(weights: Path) -> str:
    """A short mark of a file of weights."""
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def alike(kept: Sequence[Kept], as_in: Kept) -> tuple[list[Kept], list[str]]:
    """Those of the same weights, classes, layers and number of shifts as one of them; and the names of the others."""

    def form(one: Kept) -> tuple:
        return one.weights, {layer: (table.class_names, table.null.shape) for layer, table in one.found.items()}

    same = [one for one in kept if form(one) == form(as_in)]
    return same, [one.name for one in kept if form(one) != form(as_in)]


def grouped(kept: Sequence[Kept]) -> dict[str, pd.DataFrame]:
    """`lift_by_modality`, `information_by_modality` and the same by data set: the scans of a group together, with the number of cases (`by_group`)."""
    tables: dict[str, pd.DataFrame] = {}
    for name in GROUPS:
        lift, information = by_group([one.found for one in kept], [getattr(one, name) for one in kept], name=name)
        tables |= {f"lift_by_{name}": lift, f"information_by_{name}": information}
    return tables


def counted(kept: Iterable[Kept]) -> str:
    """How many scans of each group there are, in words: `modality CT 2, MRI 1; data_set ...`."""
    kept = list(kept)
    told = []
    for name in GROUPS:
        values = pd.Series([getattr(one, name) for one in kept]).value_counts(sort=False)
        told.append(f"{name} {', '.join(f'{value} {number}' for value, number in values.items())}")
    return "; ".join(told)
