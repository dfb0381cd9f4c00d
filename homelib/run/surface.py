"""How far two surfaces are apart, in mm: surfels with their areas, as DeepMind's surface-distance defines them, and surface voxels, as MONAI does.

A surfel sits between eight neighbouring voxel centres that are not all inside or all outside; which of them are inside is its code, 1 to 254,
and a table gives the area of the triangles that marching cubes puts there. The table is MONAI's, which is DeepMind's.

Distances are exact, from one distance transform a mask (`homelib.run.nearest`), and read for the surface alone.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from monai.metrics.utils import get_code_to_measure_table
from scipy.ndimage import binary_erosion

from .nearest import nearest_mm

ROUNDING = 1e-6  # relative, of a distance: a surface exactly at a tolerance is within it


@dataclass(frozen=True)
class Distances:
    """From each element of one surface to the nearest of the other, in mm, and the elements' areas in mm2 (or 1 each); for P and for R."""

    from_predicted: np.ndarray
    from_reference: np.ndarray
    predicted_areas: np.ndarray
    reference_areas: np.ndarray


def surfel_distances(P: np.ndarray, R: np.ndarray, spacing_mm: tuple[float, ...]) -> Distances:
    """Between the surfels of two masks (D, H, W) bool, neither empty. The volume's border bounds a mask that touches it."""
    codes = both(_codes, P, R)
    surfaces = [code - np.uint8(1) < 254 for code in codes]  # neither 0 nor 255: 0 - 1 is 255 in eight bits
    table = _areas(tuple(float(s) for s in spacing_mm))
    areas = [table[code[surface]] for code, surface in zip(codes, surfaces, strict=True)]
    return Distances(*_between(surfaces[0], surfaces[1], spacing_mm), *areas)


def voxel_distances(P: np.ndarray, R: np.ndarray, spacing_mm: tuple[float, ...]) -> Distances:
    """Between the surface voxels (those with one of 6 neighbours outside) of two masks (D, H, W) bool, neither empty."""
    surfaces = both(lambda mask: mask & ~binary_erosion(mask), P, R)
    return Distances(*_between(surfaces[0], surfaces[1], spacing_mm), *(np.ones(int(surface.sum())) for surface in surfaces))


def hausdorff95(distances: Distances) -> float:
    """By area: the smallest distance within which 95 % of a surface lies; the larger of both."""
    pairs = ((distances.from_predicted, distances.predicted_areas), (distances.from_reference, distances.reference_areas))
    return max(_weighted_percentile(*pair, 95) for pair in pairs)


def hausdorff95_voxels(distances: Distances) -> float:
    """numpy's 95th percentile of each direction, and the larger."""
    return float(max(np.percentile(distances.from_predicted, 95), np.percentile(distances.from_reference, 95)))


def hausdorff95_pooled(distances: Distances) -> float:
    """numpy's 95th percentile of both directions together."""
    return float(np.percentile(np.concatenate([distances.from_predicted, distances.from_reference]), 95))


def average(distances: Distances) -> float:
    """Mean over both surfaces, by area."""
    total = (distances.from_predicted * distances.predicted_areas).sum() + (distances.from_reference * distances.reference_areas).sum()
    return float(total / (distances.predicted_areas.sum() + distances.reference_areas.sum()))


def within(distances: Distances, tolerance_mm: float) -> float:
    """Share of the area of both surfaces within a distance of the other: the normalised surface distance."""
    limit = tolerance_mm * (1 + ROUNDING)
    near = distances.predicted_areas[distances.from_predicted <= limit].sum() + distances.reference_areas[distances.from_reference <= limit].sum()
    return float(near / (distances.predicted_areas.sum() + distances.reference_areas.sum()))


def both(function: Callable, one: Any, other: Any) -> list:
    """A function of each of two masks, at once: what is done to masks is compiled code, which waits for no other thread."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(function, (one, other)))


def _codes(mask: np.ndarray) -> np.ndarray:
    """(D + 1, H + 1, W + 1) uint8: which of the eight voxels around each corner of a voxel are inside; the first weighs 128, the last 1."""
    codes = mask.view(np.uint8)
    for axis, bits in ((2, 1), (1, 2), (0, 4)):  # a neighbour one step back along an axis weighs 2, 4 or 16 times as much
        longer = np.zeros([n + (a == axis) for a, n in enumerate(codes.shape)], np.uint8)
        before, after = np.moveaxis(longer, axis, 0)[:-1], np.moveaxis(longer, axis, 0)[1:]
        before |= np.moveaxis(codes, axis, 0)
        after |= np.moveaxis(codes, axis, 0) << bits
        codes = longer
    return codes


@cache
def _areas(spacing_mm: tuple[float, ...]) -> np.ndarray:
    """(256,) mm2 by code."""
    return get_code_to_measure_table(spacing_mm)[0].numpy().astype(np.float64)


def _between(P: np.ndarray, R: np.ndarray, spacing_mm: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the places of each surface to the other's; 0 where both have one, without a search."""

    def directed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        distances = np.zeros(np.count_nonzero(one))
        apart = ~other[one]
        if apart.any():
            places = np.column_stack(np.unravel_index(np.flatnonzero(one)[apart], one.shape))
            distances[apart] = nearest_mm(other, places, spacing_mm)
        return distances

    return tuple(both(lambda pair: directed(*pair), (P, R), (R, P)))


def _weighted_percentile(distances: np.ndarray, areas: np.ndarray, percent: float) -> float:
    order = np.argsort(distances)
    reached = np.cumsum(areas[order])
    return float(distances[order][np.searchsorted(reached, percent / 100 * reached[-1])])
