"""A network over a whole volume, window by window, with memory for a slab of it alone.

Windows of the training patch lie as MONAI's `sliding_window_inference` places and weighs them. They are taken in the order of one axis, the
slab axis; once no later window reaches a row, its logits are finished and handed on, and their memory is used again. So the buffer holds
classes x patch along the slab axis x the other two axes, whatever the length of the scan, and no volume of all classes ever exists.

Glossary: C classes; a *row* is a plane of the volume across the slab axis; P is the patch's size along that axis, A and B the volume's size
along the other two.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from torch import Tensor

from ..axes import three
from ..config import PredictionConfig
from ..data.cache import Chunked

Network = Callable[[Tensor], Tensor]
ROWS_BYTES = 2**27  # of what is handed on at a time
MIRRORS = tuple(axes for n in range(4) for axes in itertools.combinations((2, 3, 4), n))


@dataclass(frozen=True)
class Windows:
    """Where windows lie: `starts` along each axis, in a volume that is as large as the patch at least. `before` is what was added to reach that."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    padded: tuple[int, int, int]
    before: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    axis: int

    @classmethod
    def over(cls, shape: Sequence[int], patch: Sequence[int], *, overlap: float) -> "Windows":
        """As MONAI: steps of patch * (1 - overlap), the last window flush with the end; a smaller scan lies in the middle of its one window."""
        padded = three(max(n, p) for n, p in zip(shape, patch, strict=True))
        before = three((full - n) // 2 for full, n in zip(padded, shape, strict=True))
        starts = []
        for n, p in zip(padded, patch, strict=True):
            step = p if p == n else max(1, int(p * (1 - overlap)))
            count = next(k for k in range(n) if k * step + p >= n) + 1
            starts.append(tuple(min(k * step, n - p) for k in range(count)))
        buffer = [patch[axis] * np.prod(padded) / padded[axis] for axis in range(3)]
        return cls(three(shape), three(patch), padded, before, three(starts), int(np.argmin(buffer)))

    @property
    def count(self) -> int:
        return int(np.prod([len(starts) for starts in self.starts]))

    def nearest(self, at: Sequence[int]) -> tuple[int, int, int]:
        """Where the window begins, in the padded volume, whose middle is nearest the voxel `at` of the scan."""
        corner = []
        for place, before, starts, p in zip(at, self.before, self.starts, self.patch, strict=True):
            corner.append(starts[int(np.abs(np.array(starts) + p / 2 - place - before).argmin())])
        return three(corner)

    @property
    def row_voxels(self) -> int:
        return int(np.prod(self.padded)) // self.padded[self.axis]

    def buffer_bytes(self, classes: int) -> int:
        """What the sums of weighted logits and of weights take, float32."""
        return 4 * (classes + 1) * self.patch[self.axis] * self.row_voxels

    def window_bytes(self, classes: int, count: int, *, alone: bool) -> int:
        """What `count` windows at a time take: themselves, their logits, and of one the weighted logits. alone: no mean over networks or mirrors is
        made, for which there are three of the logits at a time."""
        voxels = 4 * int(np.prod(self.patch))
        return voxels * ((1 + classes) * count + classes) if alone else voxels * (2 + 3 * classes) * count

    def handed_on(self, classes: int) -> list[list[int]]:
        """How many rows are handed on together, window by window along the slab axis: those that no later window reaches, as `ROWS_BYTES` hold them."""
        starts, rows = self.starts[self.axis], max(1, ROWS_BYTES // (4 * classes * self.row_voxels))
        done = [*(after - before for before, after in itertools.pairwise(starts)), self.patch[self.axis]]
        return [[min(rows, count - first) for first in range(0, count, rows)] for count in done]


def finished_rows(
    networks: Sequence[Network],
    image: np.ndarray | Chunked,
    windows: Windows,
    settings: PredictionConfig,
    *,
    prepare: Callable[[np.ndarray], np.ndarray],
    beyond: float,
    device: torch.device,
    accumulate_on: torch.device | None = None,
    window_batch: int | None = None,
    on_window: Callable[[int], None] = lambda count: None,
    finish: Callable[[Tensor], Tensor] = lambda blended: blended.softmax(0),
) -> Iterator[tuple[int, Tensor]]:
    """Probabilities in slabs, along the slab axis, from its first row to its last.

    Args:
        networks: their logits are averaged, and those over mirrored windows where the settings ask for it. Anything that gives (B, C, *patch) for
            windows (B, 1, *patch) will do: maps of routing weights are blended as logits are.
        image: (D, H, W), sliced window by window: it may lie in a file.
        windows: where to look.
        settings: blend, mirrors, windows at a time.
        prepare: from intensities to what the network sees.
        beyond: what the network sees outside of the scan.
        device: of the networks.
        accumulate_on: of the buffer; None is `device`.
        window_batch: windows at a time, instead of the settings'.
        on_window: called with the number of windows done.
        finish: from the blended logits (C, rows, A, B) to what is handed on.

    Yields:
        The first row, and the probabilities (C, rows, A, B) float32 on `accumulate_on`, slab axis first; a tensor of its own.
    """
    axis, where = windows.axis, accumulate_on or device
    others = [a for a in range(3) if a != axis]
    weight = compute_importance_map(windows.patch, mode=settings.blend, sigma_scale=0.125, device=device, dtype=torch.float32)
    weight = weight.movedim(axis, 0) if weight.ndim == 3 else weight
    starts = windows.starts[axis]
    P = windows.patch[axis]
    sums = weights = torch.empty(0)  # made when the first logits tell of how many classes
    cuts = [slice(windows.before[a], windows.before[a] + windows.shape[a]) for a in others]
    for number, start in enumerate(starts):
        places = list(itertools.product(windows.starts[others[0]], windows.starts[others[1]]))
        size = window_batch or settings.window_batch
        for first in range(0, len(places), size):
            chosen = places[first : first + size]
            corners = [tuple(np.insert(place, axis, start)) for place in chosen]
            logits = _logits(networks, cut(image, windows, corners, prepare=prepare, beyond=beyond).to(device), mirror=settings.mirror)
            if not len(sums):
                sums = torch.zeros(logits.shape[1], P, *(windows.padded[a] for a in others), device=where)
                weights = torch.zeros(P, *sums.shape[2:], device=where)
            for (a, b), its in zip(chosen, logits, strict=True):
                box = (slice(None), slice(a, a + windows.patch[others[0]]), slice(b, b + windows.patch[others[1]]))
                sums[(slice(None), *box)] += (its.movedim(1 + axis, 1) * weight).to(where)
                weights[box] += weight.to(where)
            on_window(len(chosen))
        parts = windows.handed_on(len(sums))[number]
        yield from _finished(sums, weights, parts, first_row=start, windows=windows, cuts=cuts, finish=finish)
        done = sum(parts)
        if number + 1 < len(starts):
            for volume in (*sums, weights):  # class by class: the copy that an overlapping move needs stays small
                volume[: P - done] = volume[done:].clone()
                volume[P - done :] = 0


def _finished(
    sums: Tensor, weights: Tensor, parts: Sequence[int], *, first_row: int, windows: Windows, cuts: list[slice], finish: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """The buffer's first rows as they are handed on, in parts of so many, without what lies beyond the scan."""
    before, n = windows.before[windows.axis], windows.shape[windows.axis]
    for start, rows in zip(itertools.accumulate(parts, initial=0), parts, strict=False):  # accumulate ends with all of them
        low, high = max(start, before - first_row), min(start + rows, before + n - first_row)
        if low < high:
            box = (slice(low, high), *cuts)
            yield first_row + low - before, finish(sums[(slice(None), *box)] / weights[box])


def cut(
    image: np.ndarray | Chunked, windows: Windows, corners: Sequence[Sequence[int]], *, prepare: Callable[[np.ndarray], np.ndarray], beyond: float
) -> Tensor:
    """Windows (n, 1, *patch) float32 that begin at `corners` of the padded volume. Arguments as `finished_rows`."""
    batch = np.full((len(corners), 1, *windows.patch), beyond, np.float32)
    for its, corner in zip(batch, corners, strict=True):
        box: list[slice] = []
        into: list[slice] = []
        for start, before, n, p in zip(corner, windows.before, windows.shape, windows.patch, strict=True):
            low, high = max(0, start - before), min(n, start - before + p)
            box.append(slice(int(low), int(high)))
            into.append(slice(int(low - start + before), int(high - start + before)))
        its[0, *into] = prepare(image[tuple(box)])
    return torch.from_numpy(batch)


def _logits(networks: Sequence[Network], batch: Tensor, *, mirror: bool) -> Tensor:
    """(n, C, *patch) float32: the mean over networks and, where asked for, over all eight mirror images."""
    total: Tensor | None = None
    axes_of = MIRRORS if mirror else MIRRORS[:1]
    for axes in axes_of:
        seen = batch.flip(axes) if axes else batch
        for network in networks:
            logits = network(seen).float()
            logits = logits.flip(axes) if axes else logits
            total = logits if total is None else total + logits
    assert total is not None  # of one network at least
    count = len(axes_of) * len(networks)
    return total if count == 1 else total / count  # one less copy, which is large
