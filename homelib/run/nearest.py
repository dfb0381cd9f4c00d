"""The distance to the nearest marked voxel, in mm, exactly: one distance transform a mask, and its last axis only where somebody asks.

Two passes go over the whole box: the nearest mark along H, then along W by the lower envelope of parabolas (Felzenszwalb and Huttenlocher,
2012). What is left is a search along D, from each asked voxel outwards until no nearer mark is possible; it looks at D places at most. So the
time is bounded by the box whatever the masks look like, and memory is one float32 a voxel.
"""

import numpy as np
from numba import njit

_FAR = np.float32(1e30)  # voxels or mm2, of a line without a mark; adding 1 to it changes nothing


def nearest_mm(marked: np.ndarray, asked: np.ndarray, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """Distances (n,) float64 in mm from the voxels `asked` (n, 3) to the nearest of those `marked` (D, H, W) bool, of which there is one at least."""
    squared = np.empty(marked.shape, np.float32)
    depth, height, width = (float(s) for s in spacing_mm)
    _in_planes(marked, squared, height, width)
    return _along_depth(squared, np.ascontiguousarray(asked), depth)


@njit(nogil=True, cache=True)
def _in_planes(marked: np.ndarray, squared: np.ndarray, height: float, width: float) -> None:
    """Squared distance of every voxel to the nearest mark of its own plane."""
    D, H, W = marked.shape
    line, steps = np.empty(W, np.float32), np.empty((H, W), np.float32)  # steps: voxels along H to the nearest mark, exact in float32
    vertex, start = np.empty(W, np.int64), np.empty(W + 1, np.float64)
    scale, inverse = 1 / (width * width), 1 / np.maximum(1, np.arange(W + 1))  # a product is several times as fast as a division
    for z in range(D):
        mark = marked[z]
        for x in range(W):
            steps[0, x] = np.float32(0) if mark[0, x] else _FAR
        for y in range(1, H):  # rows are whole in memory, so that both sweeps go at the memory's speed
            for x in range(W):
                steps[y, x] = np.float32(0) if mark[y, x] else steps[y - 1, x] + np.float32(1)
        for y in range(H - 2, -1, -1):
            for x in range(W):
                steps[y, x] = min(steps[y, x], steps[y + 1, x] + np.float32(1))
        for y in range(H):
            for x in range(W):
                line[x] = np.float32((height * steps[y, x]) ** 2) if steps[y, x] < _FAR else _FAR
            count = _envelope(line, scale, inverse, vertex, start)
            if not count:
                squared[z, y] = _FAR
                continue
            for part in range(count):
                v = vertex[part]
                first = max(0, int(np.ceil(start[part])))
                last = min(W - 1, int(np.floor(start[part + 1]))) if part + 1 < count else W - 1
                for x in range(first, last + 1):
                    squared[z, y, x] = np.float32((width * (x - v)) ** 2) + line[v]


@njit(nogil=True, cache=True)
def _envelope(line: np.ndarray, scale: float, inverse: np.ndarray, vertex: np.ndarray, start: np.ndarray) -> int:
    """Which parabolas `(x - v)^2 / scale + line[v]` are lowest, and from where on each is; their number, 0 where none is finite."""
    count = 0
    for v in range(len(line)):
        if line[v] >= _FAR:
            continue
        where = -1.0
        while count:
            u = vertex[count - 1]
            where = 0.5 * ((np.float64(line[v]) - line[u]) * scale * inverse[v - u] + v + u)
            if where > start[count - 1]:
                break
            count -= 1
        vertex[count] = v
        start[count] = where if count else -1.0
        count += 1
    return count


@njit(nogil=True, cache=True)
def _along_depth(squared: np.ndarray, asked: np.ndarray, depth: float) -> np.ndarray:
    D = squared.shape[0]
    found = np.empty(len(asked), np.float64)
    for index in range(len(asked)):
        z, y, x = asked[index]
        best = np.float64(squared[z, y, x])
        for away in range(1, D):
            more = (depth * away) ** 2
            if more >= best:
                break
            if z - away >= 0:
                best = min(best, squared[z - away, y, x] + more)
            if z + away < D:
                best = min(best, squared[z + away, y, x] + more)
        found[index] = np.sqrt(best)
    return found
