"""Several data sets, one network: the union of their classes, and a loss that does not punish what a data set has not labelled.

Background in a data set means "none of its own classes": a voxel of it may well be an organ that only another data set labels. So the
network's background and the classes that a data set lacks are added up before the loss (the marginal of their probabilities).
B batch, C classes of the union with background.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .manifest import Manifest

MOST_CLASSES = 254  # 255 is the label that a loss ignores


@dataclass(frozen=True)
class LabelSpace:
    """`class_names`: of the union by index, background first. `indices`: for each data set, the union's index of each of its own class indices."""

    class_names: tuple[str, ...]
    indices: dict[str, tuple[int, ...]]

    def to_union(self, label: np.ndarray, data_set: str) -> np.ndarray:
        """A data set's own class indices (any shape, as `Manifest.merge` gives them) to those of the union, uint8. 255 stays 255.

        Raises UserError: an index that the data set does not have, or a data set that is not one of these.
        """
        table = np.full(256, 255, np.uint8)
        own = self.indices[self._known(data_set)]
        table[: len(own)] = own
        strange = np.setdiff1d(np.unique(label), [*range(len(own)), 255])
        if strange.size:
            raise UserError(f"{data_set}: found class index {strange[0]}, expected 0 to {len(own) - 1}. Merge the raw labels first.")
        return table[label]

    def labelled(self, data_sets: Sequence[str]) -> Tensor:
        """(B, C) bool: which classes the data set of each item has labelled; background always."""
        has = torch.zeros(len(data_sets), len(self.class_names), dtype=torch.bool)
        for row, name in enumerate(data_sets):
            has[row, list(self.indices[self._known(name)])] = True
        return has

    def _known(self, data_set: str) -> str:
        if data_set not in self.indices:
            raise UserError(f"data set: found {data_set!r}, expected one of {', '.join(self.indices)}.")
        return data_set


def union(manifests: Sequence[Manifest], *, aliases: Mapping[str, str] | None = None) -> LabelSpace:
    """The label space of several data sets: classes of one name are one, in the order in which they first come.

    Args:
        manifests: at least one, of different names.
        aliases: class name -> the name it is to have in the union, `{"prostate_uterus": "prostate"}`.

    Raises:
        UserError: two manifests of one name, an alias of no class, two classes of one data set under one name, too many classes.
    """
    aliases = dict(aliases or {})
    names = [manifest.name for manifest in manifests]
    if len(set(names)) != len(names) or not names:
        raise UserError(f"label space: found the data sets {', '.join(names) or 'none'}, expected each once.")
    unused = set(aliases) - {name for manifest in manifests for name in manifest.classes}
    if unused:
        raise UserError(f"aliases: found {sorted(unused)[0]!r}, expected a class of {', '.join(names)}.")
    order = dict.fromkeys(aliases.get(name, name) for manifest in manifests for name in manifest.classes)
    if len(order) > MOST_CLASSES:
        raise UserError(f"label space: found {len(order)} classes, expected at most {MOST_CLASSES}. Join some by aliases.")
    index = {name: number for number, name in enumerate(order, start=1)}
    indices = {}
    for manifest in manifests:
        own = [index[aliases.get(name, name)] for name in manifest.classes]
        if len(set(own)) != len(own):
            raise UserError(f"aliases: found two classes of {manifest.name} under one name, expected one each; merge their raw labels in the manifest.")
        indices[manifest.name] = (0, *own)
    return LabelSpace(("background", *order), indices)


def marginal_logits(logits: Tensor, labelled: Tensor) -> Tensor:
    """Logits whose softmax gives background the probability of all that is not labelled, and an unlabelled class none.

    Args:
        logits: (B, C, ...), of the union.
        labelled: (B, C) bool, of `LabelSpace.labelled`.

    Returns:
        (B, C, ...), for a loss with labels of the union. No gradient tells the unlabelled classes of an item from its background.

    >>> softmax = marginal_logits(torch.zeros(1, 4, 1), torch.tensor([[True, True, False, False]])).softmax(1)
    >>> softmax.flatten().tolist()
    [0.75, 0.25, 0.0, 0.0]
    """
    if logits.shape[:2] != labelled.shape or not bool(labelled[:, 0].all()):
        raise ValueError(f"labelled: found {tuple(labelled.shape)}, expected {tuple(logits.shape[:2])} with background labelled everywhere")
    labelled = labelled.to(logits.device).reshape(*labelled.shape, *(1 for _ in logits.shape[2:]))
    lowest = torch.finfo(logits.dtype).min
    behind = labelled.clone()
    behind[:, 0] = False  # what is added up: background and the unlabelled
    background = torch.logsumexp(logits.masked_fill(behind, lowest), dim=1, keepdim=True)
    return torch.cat([background, logits[:, 1:].masked_fill(~labelled[:, 1:], lowest)], dim=1)
