"""Which experts go with which classes, and how much of that would be there by chance.

    joint[c,e] = mean over labelled voxels of [class = c] weight of e     sums to one
    lift[c,e]  = joint[c,e] / (p[c] p[e])                                 1: no association
    I          = sum joint log2(joint / (p[c] p[e]))                      bits: 0: the expert says nothing of the class

Chance is what is left when the label is moved as a whole: by a random shift along all three axes, wrapping round. Voxels are not independent, and a
permutation of voxels would find an association between any two smooth volumes. A shift keeps the size, shape and neighbours of every
structure and of every expert's territory, and takes away only where they lie to each other. It is strict where all classes lie in one part
of the scan: a shift that is still within the body may keep part of a real association.

Nothing here is about other patients: that takes other scans. And it is association: what depends on an expert is for `homelib.study.knockout`.

C classes, E experts, n shifts. All shifts of one class and expert are one product of their Fourier transforms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import fft
from scipy.optimize import linear_sum_assignment

from ..config import IGNORE
from ..errors import UserError
from ..progress import bar
from .expert_maps import Layer, RoutingMaps

LEAST_LOG2 = -5.0  # of a lift, where lifts are compared: below a 32nd is as good as none
LEAST_SPREAD = 1e-3  # of a null: below is rounding
TIE = 0.01  # spreads; what differs by less is as far out. For bits a thousandth of it


@dataclass(frozen=True)
class Association:
    """Classes and experts of one layer over one or more scans.

    class_names: by index. joint: (C, E), summing to one. null: (n, C, E), the same after each shift. voxels: (C,) of each class.
    """

    class_names: tuple[str, ...]
    joint: np.ndarray
    null: np.ndarray
    voxels: np.ndarray

    @property
    def log2_lift(self) -> np.ndarray:
        """(C, E) of the C classes that are there, `LEAST_LOG2` at least."""
        return _log2_lift(self.joint[self.voxels > 0])

    def lift(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row a class and expert: class, expert, weight (its mean within the class), lift, voxels, low and high (the band of lifts by chance, of this
        class and expert by themselves), p (that any class and expert of the layer is as far out by chance; so p < 0.05 allows for all of them: largest
        distance from the mean of the shifts, in their standard deviations, of the arcsine of the weight's root)."""
        there = self.voxels > 0
        found, null = lift_of(self.joint[there]), lift_of(self.null[:, there])
        weight, by_chance = (joint / joint.sum(-1, keepdims=True) for joint in (self.joint[there], self.null[:, there]))
        angle, angles = (np.arcsin(np.sqrt(share.clip(0, 1))) for share in (weight, by_chance))  # evens out the spread of small and large shares
        middle, spread = angles.mean(0), np.maximum(angles.std(0), LEAST_SPREAD)
        extreme = np.abs((angles - middle) / spread).max((1, 2))
        p = (1 + (extreme[:, None, None] >= np.abs((angle - middle) / spread) - TIE).sum(0)) / (1 + len(null))
        low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        rows = []
        for row, index in enumerate(np.flatnonzero(there)):
            about = {"class": self.class_names[index]}
            for e in range(self.joint.shape[1]):
                facts = {"weight": weight[row, e], "lift": found[row, e], "voxels": int(self.voxels[index])}
                rows.append(about | {"expert": e} | facts | {"low": low[row, e], "high": high[row, e], "p": p[row, e]})
        return pd.DataFrame(rows)

    def information(self, *, confidence: float = 0.95) -> pd.Series:
        """Between class and expert: bits, share (of what there is to know of the class), chance (mean of the shifts), low and high (their band), p."""
        bits, null = bits_of(self.joint), bits_of(self.null)
        classes = self.joint.sum(1)[self.voxels > 0]
        entropy = -(classes * np.log2(classes)).sum()
        low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
        p = (1 + (null >= bits - TIE / 1000).sum()) / (1 + len(null))
        share = bits / entropy if entropy else np.nan
        return pd.Series({"bits": float(bits), "share": float(share), "chance": null.mean(), "low": low, "high": high, "p": p})


def associate(
    maps: np.ndarray, label: np.ndarray, class_names: Sequence[str], *, shifts: int = 200, seed: int = 0, on_maps: Callable[[int], None] = lambda count: None
) -> Association:
    """Classes and experts of one layer in one scan.

    Args:
        maps: (E, D, H, W), summing to one over E.
        label: (D, H, W) class indices; voxels of 255 are left out.
        class_names: by index.
        shifts: n, drawn at random.
        seed: of them. The same shifts for all layers of a scan.
        on_maps: called for each class with the number of maps that were compared with it; a class that is not there is compared with none.

    Raises:
        UserError: another shape than the maps', a class that has no name, no labelled voxel.
    """
    shape = maps.shape[1:]
    if label.shape != shape:
        raise UserError(f"label: found {label.shape} voxels, expected the maps' {shape}.")
    known = label != IGNORE
    if not known.any() or label[known].max() >= len(class_names):
        raise UserError(f"label: found {label[known].max() if known.any() else 'no class'}, expected class indices 0 to {len(class_names) - 1}.")
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, np.maximum(np.array(shape), 2), size=(shifts, 3)) % shape
    experts = [fft.rfftn(np.asarray(weight, np.float32)) for weight in maps]
    joint, null = np.zeros((len(class_names), len(maps))), np.zeros((shifts, len(class_names), len(maps)))
    for index in np.flatnonzero(np.bincount(label[known])):
        mask = label == index
        joint[index] = maps[:, mask].sum(1, dtype=float)
        moved = fft.rfftn(mask.astype(np.float32)).conj()
        for e, weight in enumerate(experts):
            null[:, index, e] = fft.irfftn(moved * weight, shape)[tuple(steps.T)]  # at s: the sum over voxels of mask(x - s) weight(x)
        on_maps(len(maps))
    null = null.clip(0)
    voxels = np.bincount(label[known], minlength=len(class_names))
    return Association(tuple(class_names), joint / joint.sum(), null / null.sum((1, 2), keepdims=True), voxels)


def associations(
    maps: RoutingMaps, *, layers: Sequence[Layer] | None = None, shifts: int = 200, seed: int = 0, progress: bool = False
) -> dict[Layer, Association]:
    """Of the chosen layers of a labelled scan, None is all; with a bar, where it is asked for and there is a terminal.

    Raises UserError: a scan without a label, a layer that is not there.
    """
    if maps.label is None:
        raise UserError(f"{maps.name or 'case'}: found no label, expected one: lift is by class.")
    chosen = list(maps.experts if layers is None else layers)
    classes = len(np.setdiff1d(maps.label, [IGNORE]))
    with bar(total=classes * sum(len(maps[layer]) for layer in chosen), desc="lift", unit="map", show=progress) as shown:
        how = {"shifts": shifts, "seed": seed, "on_maps": shown.update}
        return {layer: associate(maps[layer], maps.label, maps.class_names, **how) for layer in chosen}


def lift_table(found: Mapping[Layer, Association]) -> pd.DataFrame:
    """`Association.lift` of every layer, with columns stage, block, level."""
    return pd.concat([_at(layer, one.lift()) for layer, one in found.items()], ignore_index=True)


def information_table(found: Mapping[Layer, Association]) -> pd.DataFrame:
    """`Association.information`, a row a layer, with columns stage, block, level."""
    return pd.concat([_at(layer, one.information().to_frame().T) for layer, one in found.items()], ignore_index=True)


def pooled(found: Sequence[Association]) -> Association:
    """One layer over several scans: their voxels together, each shifted by itself. Raises UserError where classes, experts or shifts differ."""
    first = found[0]
    if any(one.class_names != first.class_names or one.null.shape != first.null.shape for one in found):
        raise UserError("associations: found other classes, experts or numbers of shifts, expected those of one layer of one network.")
    voxels = np.array([one.voxels.sum() for one in found], float)
    share = voxels / voxels.sum()
    joint = sum(part * one.joint for part, one in zip(share, found, strict=True))
    null = sum(part * one.null for part, one in zip(share, found, strict=True))
    return Association(first.class_names, joint, null, np.sum([one.voxels for one in found], 0))


def by_group(found: Sequence[Mapping[Layer, Association]], groups: Sequence[str], *, name: str = "modality") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Lift and information of scans put together by group.

    Args:
        found: `associations` of each scan.
        groups: of each scan: its modality, its data set.
        name: of the column.

    Returns:
        `lift_table` and `information_table`, with the column `name` and the number of cases.
    """
    lifts: list[pd.DataFrame] = []
    bits: list[pd.DataFrame] = []
    for group in dict.fromkeys(groups):
        members = [its for its, of in zip(found, groups, strict=True) if of == group]
        together = {layer: pooled([its[layer] for its in members]) for layer in members[0]}
        for tables, table in ((lifts, lift_table(together)), (bits, information_table(together))):
            table.insert(0, name, group)
            table.insert(1, "cases", len(members))
            tables.append(table)
    return pd.concat(lifts, ignore_index=True), pd.concat(bits, ignore_index=True)


def match_experts(first: Association, second: Association) -> pd.DataFrame:
    """Experts of two networks paired so that their log2 lifts over classes lie nearest each other (Hungarian method): an expert's number means nothing
    from seed to seed. Columns first, second (experts), similarity (cosine of their log2 lifts: 1 the same classes, 0 others).

    Raises UserError: other classes in one than in the other.
    """
    one, other = _shared(first, second)
    rows, columns = _matched(one, other)
    alike = [_cosine(one[row], other[column]) for row, column in zip(rows, columns, strict=True)]
    return pd.DataFrame({"first": rows, "second": columns, "similarity": alike})


def stability(found: Mapping[str, Association], *, confidence: float = 0.95) -> pd.DataFrame:
    """How alike the experts of networks from several seeds are, each pair of networks matched: cosine of all their log2 lifts.

    Matching makes any two networks look alike, so that the number alone means little: low and high are the band of the same number where the second
    network's maps are shifted against the label, p how often it is as high.

    Args:
        found: one layer in the same scans, by the seed's name.

    Returns:
        Columns first, second, similarity, low, high, p.
    """
    lines = []
    for a, b in combinations(found, 2):
        one, other = _shared(found[a], found[b])
        there = (found[a].voxels > 0) & (found[b].voxels > 0)
        similarity = _similarity(one, other)
        null = np.array([_similarity(one, _log2_lift(shifted[there]).T) for shifted in found[b].null])
        low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
        p = (1 + (null >= similarity).sum()) / (1 + len(null))
        lines.append({"first": a, "second": b, "similarity": similarity, "low": low, "high": high, "p": p})
    return pd.DataFrame(lines, columns=["first", "second", "similarity", "low", "high", "p"])


def _shared(first: Association, second: Association) -> tuple[np.ndarray, np.ndarray]:
    """Log2 lifts (E, C) of both, of the classes that both have."""
    if first.class_names != second.class_names:
        raise UserError("associations: found other classes in one than in the other, expected the same ones.")
    there = (first.voxels > 0) & (second.voxels > 0)
    return _log2_lift(first.joint[there]).T, _log2_lift(second.joint[there]).T


def _matched(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which row of (E, C) goes with which of (E', C): the least sum of squared distances."""
    return linear_sum_assignment(((first[:, None] - second) ** 2).sum(-1))


def _similarity(first: np.ndarray, second: np.ndarray) -> float:
    rows, columns = _matched(first, second)
    return _cosine(first[rows].ravel(), second[columns].ravel())


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length > LEAST_SPREAD else 0.0


def lift_of(joint: np.ndarray) -> np.ndarray:
    """(..., C, E) of joints; an expert that is never used has no association, 1."""
    expected = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True) / joint.sum((-2, -1), keepdims=True)
    return np.divide(joint, expected, out=np.ones_like(joint), where=expected > 1e-12)


def _log2_lift(joint: np.ndarray) -> np.ndarray:
    return np.log2(np.maximum(lift_of(joint), 2**LEAST_LOG2))


def bits_of(joint: np.ndarray) -> np.ndarray:
    """Mutual information of joints (..., C, E)."""
    expected = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, expected, out=np.ones_like(joint), where=joint > 1e-12)
    return (joint * np.log2(ratio)).sum((-2, -1))


def _at(layer: Layer, table: pd.DataFrame) -> pd.DataFrame:
    for place, name in enumerate(("stage", "block", "level")):
        table.insert(place, name, layer[place])
    return table
