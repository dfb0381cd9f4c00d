"""Is a CT in Hounsfield units? Judged by where its values lie, not by its lowest one: padding, noise or a single voxel say nothing.

HU put air at -1000, fat at -100, organs within 0 to 150; above 850 there is dense bone and metal alone, and always less of it than of the looser
bone below. A crop to tissue has no air and may be of either scale: what cannot be told is no fault.
"""

import numpy as np

PADDING = -1100.0  # below it no tissue lies and hardly any noise of air: filled in beyond the scanner's circle (-2000, -2048, -3024)
AIR = -850.0  # below it, air
AIR_SEEN = 0.01  # of all voxels, with values of their own: one value alone, -1000 or -1024, may be filling
LOOSE, DENSE, END = 400.0, 850.0, 1350.0  # of bone in HU; in a CT shifted by 1000 or 1024, hardly anything, and all soft tissue
SHIFTED = 0.01  # of what is no air, between DENSE and END at least, and three times what lies between LOOSE and DENSE
DARKEST, PILED = 0.01, 0.02  # share of the range, from the lowest value on, and of the voxels in it, which real noise leaves nearly empty


def shifted(values: np.ndarray) -> str:
    """What tells that a CT's values (any shape, finite) are HU and 1000 or 1024 more; empty where nothing does.

    >>> shifted(np.full(1000, 1064.0)), shifted(np.full(1000, 40.0))
    ('100% of what is no air within 850 to 1350, where HU have dense bone', '')
    """
    rest = _no_air(values)
    if not rest.size:
        return ""
    soft, loose = (np.count_nonzero((rest >= low) & (rest < high)) / rest.size for low, high in ((DENSE, END), (LOOSE, DENSE)))
    return f"{soft:.0%} of what is no air within {DENSE:g} to {END:g}, where HU have dense bone" if soft > max(SHIFTED, 3 * loose) else ""


def windowed(values: np.ndarray, window: tuple[float, float]) -> str:
    """What tells that a CT, some of whose voxels are `values` (n,), was cut off at a value within the window that is wanted, as grey values are; empty where
    nothing does."""
    rest = _no_air(values)
    if not rest.size or (low := float(rest.min())) <= window[0]:
        return ""
    end = low + DARKEST * (float(np.percentile(rest, 99)) - low)
    piled = np.count_nonzero(rest <= end) / rest.size
    return f"{piled:.0%} of them at {low:g} to {end:.4g}, and no air" if piled > PILED else ""


def _no_air(values: np.ndarray) -> np.ndarray:
    """Values that are neither padding nor air; none where air is seen, which is as it should be."""
    held = values[values >= PADDING]
    air = held[held < AIR]
    own = air.size - (np.unique(air, return_counts=True)[1].max() if air.size else 0)
    return held[held >= AIR] if own <= AIR_SEEN * values.size else held[:0]
