"""How sure a change of Dice is within one scan: the scan is cut into cubes, and these are drawn anew.

Neighbouring voxels are right or wrong together, so voxels cannot be drawn one by one; cubes of a few voxels are nearly independent. Such an
interval tells whether a change rests on a few places of this scan. It does not tell what another patient would show: that takes cases.

N cubes of a scan, of which M hold a voxel of some class, in the label or in a prediction; C classes; R draws. The other N - M cubes add nothing to any
Dice, so that only their number is drawn. A scan of 512x512x300 voxels has N = 155,648.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 8  # voxels
RESAMPLES = 2000
CHUNK_BYTES = 2**25  # of the numbers that are drawn, or multiplied, at a time


@dataclass(frozen=True)
class Counts:
    """Voxels by cube and class, (M, C) each: predicted, in the label, and both; background is not counted.

    cubes: (M,) which of the `total` cubes these are, in order. known: the classes that are measured.
    """

    total: int
    cubes: np.ndarray
    predicted: np.ndarray
    label: np.ndarray
    both: np.ndarray
    known: tuple[int, ...]

    @classmethod
    def of(cls, predicted: np.ndarray, label: np.ndarray, known: Sequence[int], *, side: int = SIDE) -> "Counts":
        """Of class indices (D, H, W). What is not below the highest known class is not counted, 255 say."""
        grid, C = [-(-n // side) for n in label.shape], max(known, default=0) + 1
        kinds = ((predicted, None), (label, None), (label, predicted))
        found = [_cells(classes, also, grid, C, side) for classes, also in kinds]
        cubes = np.unique(np.concatenate([cells // C for cells, _ in found]))
        tables = []
        for cells, voxels in found:
            table = np.zeros((len(cubes), C), np.int64)
            table[np.searchsorted(cubes, cells // C), cells % C] = voxels
            tables.append(table)
        of_predicted, of_label, of_both = tables
        return cls(int(np.prod(grid)), cubes, of_predicted, of_label, of_both, tuple(known))

    def dice(self) -> np.ndarray:
        """(C,): of all cubes. NaN where a class is neither there nor found, and for the background."""
        return _dice(self.both.sum(0), (self.predicted + self.label).sum(0))


class Draws:
    """The cubes of one scan, drawn anew: the same draws for all that is done to a network.

    Args:
        intact: what the network says when nothing is done to it.
        resamples: R.
        seed: of the draws.
    """

    def __init__(self, intact: Counts, *, resamples: int = RESAMPLES, seed: int = 0):
        self.intact, self.seed = intact, seed
        N = intact.total
        self.times = _drawn(np.random.default_rng(seed), np.full(resamples, N), len(intact.cubes), of=N)  # (R, M)
        self.left = N - self.times.sum(1, dtype=np.int64)  # (R,): draws that fall on other cubes
        self.dice = _dice(_weighed(self.times, intact.both), _weighed(self.times, intact.predicted + intact.label))

    def change(self, without: Counts, *, confidence: float = 0.95) -> dict[int, dict[str, float]]:
        """By class: Dice `intact` and `without`, `change`, and its interval `scan_low`, `scan_high` over the draws."""
        before, after = self.intact.dice(), without.dice()
        spread = self._of(without) - self.dice
        found = {}
        for index in self.intact.known:
            values = spread[np.isfinite(spread[:, index]), index]
            ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(values) else (np.nan, np.nan)
            told = (before[index], after[index], after[index] - before[index], *ends)
            found[index] = dict(zip(("intact", "without", "change", "scan_low", "scan_high"), map(float, told), strict=True))
        return found

    def _of(self, counts: Counts) -> np.ndarray:
        """(R, C): Dice of another prediction of the same scan in each draw. Cubes in which only it finds a class are drawn from what is left."""
        ours = self.intact.cubes
        shared = np.isin(counts.cubes, ours)
        place = np.searchsorted(ours, counts.cubes[shared])
        times = _drawn(np.random.default_rng((self.seed, 1)), self.left, int((~shared).sum()), of=counts.total - len(ours))

        def over_all(table: np.ndarray) -> np.ndarray:
            there = np.zeros((len(ours), table.shape[1]))
            there[place] = table[shared]
            return _weighed(self.times, there) + _weighed(times, table[~shared])

        return _dice(over_all(counts.both), over_all(counts.predicted + counts.label))


def _cells(classes: np.ndarray, also: np.ndarray | None, grid: Sequence[int], C: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells (cube times C plus class) that have voxels, and how many: of classes 1 to C - 1, and with `also` only where that says the same."""
    found = []
    for row in range(grid[0]):  # cubes by cubes along the first axis, so that no index of a whole volume exists
        part = classes[row * side : (row + 1) * side]
        inside = (part > 0) & (part < C)
        if also is not None:
            inside &= part == also[row * side : (row + 1) * side]
        _, y, x = np.nonzero(inside)
        cubes = (row * grid[1] + y // side) * grid[2] + x // side
        found.append(np.unique(cubes * C + part[inside], return_counts=True))
    return np.concatenate([cells for cells, _ in found]), np.concatenate([voxels for _, voxels in found])


def _drawn(rng: np.random.Generator, draws: np.ndarray, count: int, *, of: int) -> np.ndarray:
    """(R, count) uint8: how often each of `count` cubes comes up, hardly ever ten times, where `draws` (R,) fall on `of` cubes alike."""
    if not count:
        return np.zeros((len(draws), 0), np.uint8)
    shares, size = np.append(np.full(count, 1 / of), max(0.0, 1 - count / of)), max(1, CHUNK_BYTES // (8 * (count + 1)))
    parts = [rng.multinomial(draws[start : start + size], shares)[:, :count].astype(np.uint8) for start in range(0, len(draws), size)]
    return np.concatenate(parts)


def _weighed(times: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(R, M) @ (M, C) in float64, some draws at a time."""
    size, table = max(1, CHUNK_BYTES // (8 * max(1, len(table)))), table.astype(float)
    return np.concatenate([times[start : start + size].astype(float) @ table for start in range(0, len(times), size)])


def _dice(both: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(2.0 * both, total, out=np.full(total.shape, np.nan), where=total > 0)
