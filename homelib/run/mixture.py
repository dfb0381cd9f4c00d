"""One network, one or several data sets: the classes that it tells apart, and patches with labels of these classes.

With several, each patch is of a data set drawn with a chance of its share of the cases, cut and changed by that data set's own manifest. Its
labels become those of the union, and the loss is told which classes its data set has labelled (`homelib.data.labelspace`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import AugmentConfig, DataConfig, Settings
from ..data.labelspace import LabelSpace, union
from ..data.loading import Patches
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from .feed import Source

_CHOICE = 1_000_003  # apart from the seeds of the patches themselves


def label_space(data: DataConfig) -> LabelSpace:
    """The classes of the data set, or the union of those of several. Raises UserError as `union`."""
    return union([load_manifest(name) for name in (data.manifest, *data.also)], aliases=data.aliases)


def source_of(cases: Sequence[PreparedCase], settings: Settings) -> Source:
    """The patches of a training: of its data set, or of several."""
    data, training = settings.data, settings.training
    if not data.also:
        return Patches(cases, data, training.augment, seed=training.seed)
    return Mixture(cases, data, training.augment, seed=training.seed)


class Mixture:
    """Patches of several data sets. Raises UserError: cases of other data sets than those of the settings."""

    def __init__(self, cases: Sequence[PreparedCase], data: DataConfig, augment: AugmentConfig, *, seed: int):
        self.space, self.seed = label_space(data), seed
        by_name: dict[str, list[PreparedCase]] = {}
        for case in cases:
            by_name.setdefault(load_manifest(case.case.manifest).name, []).append(case)
        references = {load_manifest(reference).name: reference for reference in (data.manifest, *data.also)}
        if by_name.keys() != references.keys():
            raise UserError(f"data.train_cases: found cases of {', '.join(by_name) or 'none'}, expected some of each of {', '.join(references)}.")
        self.names = list(references)
        own = {name: data.model_copy(update={"manifest": reference, "also": (), "aliases": {}}) for name, reference in references.items()}
        self.patches = {name: Patches(by_name[name], own[name], augment, seed=seed) for name in self.names}
        share = np.array([len(by_name[name]) for name in self.names], float)
        self.ends = np.cumsum(share / share.sum())
        self.tables = {
            name: torch.from_numpy(self.space.to_union(np.arange(len(self.space.indices[name]), dtype=np.uint8), name)).long() for name in self.names
        }
        self.labelled = {name: self.space.labelled([name])[0] for name in self.names}

    def patch(self, step: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """One of them: image (1, D, H, W) float32, label (1, D, H, W) int64 of the union, labelled (classes,) bool."""
        drawn = np.random.default_rng((self.seed, step, place, _CHOICE)).random()
        name = self.names[min(int(np.searchsorted(self.ends, drawn, side="right")), len(self.names) - 1)]
        image, label = self.patches[name].patch(step, place)
        table = self.tables[name]
        in_union = torch.where(label < len(table), table[label.clamp(max=len(table) - 1)], label)  # 255 stays
        return image, in_union, self.labelled[name]
