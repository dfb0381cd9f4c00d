"""How sure a change of Dice is within one scan: the scan is cut into cubes, and these are drawn anew.

Neighbouring voxels are right or wrong together, so voxels cannot be drawn one by one; cubes of a few voxels are nearly independent. Such an
interval tells whether a change rests on a few places of this scan. It does not tell what another patient would show: that takes cases.

N cubes, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 8  # voxels
RESAMPLES = 2000


@dataclass(frozen=True)
class Counts:
    """Voxels by cube and class, (N, C) each: predicted, in the label, and both. `known`: the classes that are measured."""

    predicted: np.ndarray
    label: np.ndarray
    both: np.ndarray
    known: tuple[int, ...]

    @classmethod
    def of(cls, predicted: np.ndarray, label: np.ndarray, known: Sequence[int], *, side: int = SIDE) -> "Counts":
        """Of class indices (D, H, W)."""
        cubes = [-(-n // side) for n in label.shape]
        at = np.ravel_multi_index(np.ix_(*(np.arange(n) // side for n in label.shape)), cubes)
        N, C = int(np.prod(cubes)), max(known, default=0) + 1

        def counted(classes: np.ndarray, where: np.ndarray) -> np.ndarray:
            return np.bincount(at[where] * C + classes[where], minlength=N * C).reshape(N, C)

        return cls(counted(predicted, predicted < C), counted(label, label < C), counted(label, (label == predicted) & (label < C)), tuple(known))

    def dice(self, weights: np.ndarray | None = None) -> np.ndarray:
        """(n, C) with each cube counted `weights` (n, N) times; None: (1, C), each once. NaN where a class is neither there nor found."""
        weights = np.ones((1, len(self.label))) if weights is None else weights
        both, total = weights @ self.both, weights @ (self.predicted + self.label)
        return np.divide(2.0 * both, total, out=np.full(total.shape, np.nan), where=total > 0)


def change(intact: Counts, without: Counts, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> dict[int, dict[str, float]]:
    """By class: Dice `intact` and `without`, `change`, and its interval `scan_low`, `scan_high` over cubes that are drawn anew, the same for both."""
    N = len(intact.label)
    drawn = np.random.default_rng(seed).multinomial(N, np.full(N, 1 / N), size=resamples).astype(float)
    before, after = intact.dice()[0], without.dice()[0]
    spread = without.dice(drawn) - intact.dice(drawn)
    found = {}
    for index in intact.known:
        values = spread[np.isfinite(spread[:, index]), index]
        ends = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]) if len(values) else (np.nan, np.nan)
        told = (before[index], after[index], after[index] - before[index], *ends)
        found[index] = dict(zip(("intact", "without", "change", "scan_low", "scan_high"), map(float, told), strict=True))
    return found
