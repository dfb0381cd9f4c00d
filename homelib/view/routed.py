"""What the routing figures and the explorer are handed: one scan, and where the experts of one network look in it.

E experts of a level, S slots an expert (level 1), (D, H, W) the image's grid, (d, h, w) the grid of a stage's tokens in one window.
"""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..axes import three
from ..errors import UserError

Place = tuple[int, int, int]  # stage, block, level
Voxel = tuple[int, int, int]  # along D, H, W

# Tol's bright colours and an orange: apart for colour-blind readers, and light enough to lie over a scan
EXPERT_COLOURS = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#EE7733"]


@dataclass(frozen=True)
class Routed:
    """One case of one run.

    Args:
        name: of the case, and of the run where there are several.
        image: (D, H, W), RAS+.
        experts: (stage, block, level) -> (E, D, H, W), each expert's share of every voxel; over the experts they sum to one.
        spacing_mm: of the image's grid.
        limits: lowest and highest intensity that is shown, black and white.
        slots: (stage, block) -> (E * S, D, H, W), level 1, the slots of expert 0 first. May be empty.
        groups: (stage, block) -> integers, the group of every token of one window: (d, h, w), or on the image's grid with -1 beyond the window. May be
            empty.
        label: (D, H, W) class indices, or None.
        class_names: by index.

    Raises:
        UserError: an array whose shape does not fit the image's.
    """

    name: str
    image: np.ndarray
    experts: Mapping[Place, np.ndarray]
    spacing_mm: tuple[float, float, float]
    limits: tuple[float, float]
    slots: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)
    groups: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)
    label: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = tuple(self.image.shape)
        if not self.experts:
            raise UserError(f"{self.name}: found no maps of experts, expected at least one (stage, block, level). Trace a stage.")
        told = {f"experts{place}": maps for place, maps in self.experts.items()} | {f"slots{place}": maps for place, maps in self.slots.items()}
        for what, maps in told.items():
            if maps.ndim != 4 or tuple(maps.shape[1:]) != shape:
                raise UserError(f"{self.name}, {what}: found shape {tuple(maps.shape)}, expected (n, {', '.join(map(str, shape))}), the image's grid.")
        for place, maps in self.slots.items():
            experts = self.experts.get((*place, 1))
            if experts is None or len(maps) % len(experts):
                found = "no map of experts" if experts is None else f"{len(experts)} experts"
                raise UserError(f"{self.name}, slots{place}: found {len(maps)} slots and {found} at level 1, expected as many slots for each expert.")
        if self.label is not None and tuple(self.label.shape) != shape:
            raise UserError(f"{self.name}, label: found shape {tuple(self.label.shape)}, expected {shape}, the image's.")

    @classmethod
    def of(cls, maps: Any, *, name: str = "", groups: Mapping[tuple[int, int], np.ndarray] | None = None) -> "Routed":
        """Of the maps of one scan (`homelib.study.expert_maps.RoutingMaps`), made now or loaded from what `home routing` saved.

        Args:
            maps: has image, experts, spacing_mm, limits, slots, groups (by stage), label, class_names and name.
            name: another than that of the case.
            groups: others than those of the window in the scan's middle, (d, h, w) or (D, H, W) each.
        """
        shown = {place[:2]: maps.groups[place[0]] for place in maps.experts if place[0] in maps.groups} if groups is None else groups
        slots = {place: weights for place, weights in maps.slots.items() if (*place, 1) in maps.experts}
        return cls(name or maps.name, maps.image, maps.experts, maps.spacing_mm, maps.limits, slots, shown, maps.label, maps.class_names)

    def weights(self, place: Place) -> np.ndarray:
        """(E, D, H, W). Raises UserError: a place that was not traced."""
        if place not in self.experts:
            there = ", ".join(map(str, sorted(self.experts)))
            raise UserError(f"{self.name}: found no maps of stage, block, level {place}; there are {there}.")
        return self.experts[place]

    def weight(self, place: Place, expert: int) -> np.ndarray:
        """(D, H, W) of one expert. Raises UserError: a place that was not traced, an expert that it does not have."""
        weights = self.weights(place)
        if expert not in range(len(weights)):
            raise UserError(f"{self.name}, expert: found {expert}, expected 0 to {len(weights) - 1}, those of stage, block, level {place}.")
        return weights[expert]

    def class_at(self, voxel: Voxel) -> str:
        """The name of the class at a voxel, in words; "no class" where none is known (255), "" for a scan without a label."""
        if self.label is None:
            return ""
        index = int(self.label[tuple(voxel)])
        return self.class_names[index].replace("_", " ") if index < len(self.class_names) else "no class"

    def top(self, place: Place) -> float:
        """The largest weight of any expert anywhere at a place: where a scale of weights ends."""
        return float(self.weights(place).max())


def entropy(weights: np.ndarray) -> np.ndarray:
    """Normalised entropy of shares that sum to one over E, (E, ...) -> (...) float32: 0 all on one expert, 1 even; 0 where there is one expert alone."""
    if len(weights) == 1:
        return np.zeros(weights.shape[1:], np.float32)
    p = weights.astype(np.float32)
    return -(p * np.log(np.maximum(p, 1e-12))).sum(0) / np.float32(np.log(len(p)))


def centre_of(label: np.ndarray | None, index: int) -> Voxel:
    """The voxel of a class of a label (D, H, W) that lies nearest to its centre of mass: it is always inside the class.

    Raises UserError: a class that is nowhere, or no label.
    """
    if label is None:
        raise UserError(f"label: found none, expected one with class {index}.")
    voxels = np.argwhere(label == index)
    if not len(voxels):
        raise UserError(f"label: found no voxel of class {index}, expected one of {', '.join(map(str, np.unique(label)))}.")
    return three(voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()].tolist())


def expert_colours(experts: int) -> list[str]:
    """A colour an expert, all different; beyond the first eight in turn light and dark around the colour wheel."""
    more = max(0, experts - len(EXPERT_COLOURS))
    wheel = [colorsys.hsv_to_rgb(i / more, 0.85, 1.0 if i % 2 else 0.6) for i in range(more)]
    return [*EXPERT_COLOURS, *("#" + "".join(f"{round(255 * part):02X}" for part in colour) for colour in wheel)][:experts]
