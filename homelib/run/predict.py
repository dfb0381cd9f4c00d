"""Prediction: a sliding window over the prepared volume, taken back to the file's own grid slab by slab (paper App. B).

`predict_label` is what the command line does: it never holds a volume of all classes. `predict_probabilities` and `to_native` are the same in two
steps, for scans that are small enough to be looked at whole.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import find_objects
from scipy.ndimage import label as number_pieces
from torch import Tensor

from ..config import Settings
from ..data.loading import window
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from .folder import written_whole
from .guard import is_out_of_memory
from .mixture import label_space
from .native import NativeLabels, to_native
from .sliding import Network, Windows, cut, finished_rows

__all__ = ["keep_largest_pieces", "one_hot", "predict_label", "predict_probabilities", "save_label", "to_native", "windows_of"]

CPU = torch.device("cpu")


@torch.inference_mode()
def predict_probabilities(network: Network, case: PreparedCase, settings: Settings, *, on_window: Callable[[int], None] = lambda count: None) -> np.ndarray:
    """Class probabilities (classes, D, H, W) float32 on the prepared grid: windows of the training patch, overlapping, blended by a Gaussian.
    `on_window` is called with the number of windows done."""
    windows = windows_of(case, settings)
    parts = case_rows([network], case, settings, windows, device=device_of(network), accumulate_on=CPU, on_window=on_window)
    return np.moveaxis(np.concatenate([rows.numpy() for _, rows in parts], axis=1), 1, 1 + windows.axis)


@torch.inference_mode()
def predict_label(
    networks: Sequence[Network],
    case: PreparedCase,
    settings: Settings,
    *,
    on_window: Callable[[int], None] = lambda count: None,
    on_slab: Callable[[int, tuple[slice, ...], Tensor], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """Labels (native D, H, W) uint8 on the file's grid, of one network or the mean of several.

    Where memory does not suffice the case is begun again with half as many windows at a time, down to one, then with the sums in the
    CPU's memory instead of a GPU's.

    Args:
        networks: on one device.
        case: its image may lie in a file.
        settings: those of the run.
        on_window: called with the number of windows done; with minus the number so far where the case is begun again.
        on_slab: see `NativeLabels`.
        say: told what is done where memory does not suffice.

    Raises:
        UserError: not even that suffices.
    """
    windows, device, single = windows_of(case, settings), device_of(networks[0]), one_piece(settings)
    for number, (window_batch, where) in enumerate(attempts := _attempts(settings.prediction.window_batch, device)):
        done = 0

        def count(windows_done: int) -> None:
            nonlocal done
            done += windows_done
            on_window(windows_done)

        try:
            native = NativeLabels(case, windows.axis, on_slab=on_slab)
            how = {"device": device, "accumulate_on": where, "window_batch": window_batch, "on_window": count}
            for first_row, rows in case_rows(networks, case, settings, windows, **how):
                native.add(first_row, rows)
            return keep_largest_pieces(native.label, single)
        except (RuntimeError, MemoryError) as error:  # of a GPU a kind of its own, of the machine PyTorch's is a plain one and NumPy's a MemoryError
            if not is_out_of_memory(error):
                raise  # else what was held is freed when the exception is gone
        del native
        on_window(-done)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if number + 1 < len(attempts):
            size, where = attempts[number + 1]
            say(f"{case.case.id}: out of memory on {device}; once more with {size} windows at a time, sums of {windows.count} windows on {where}.")
    remedy = "Crop the scan, or predict on a machine with more" if device == CPU else "Predict with --accelerator cpu"
    raise UserError(f"{case.case.id}: not enough memory on {device} for one window of {'x'.join(map(str, windows.patch))} voxels, expected more. {remedy}.")


def device_of(network: Network) -> torch.device:
    """Of a network's parameters; the CPU for what has none."""
    parameter = next(iter(network.parameters()), None) if isinstance(network, torch.nn.Module) else None
    return parameter.device if parameter is not None else CPU


def keep_largest_pieces(label: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Label (D, H, W) with all but the largest connected piece (26 neighbours) of each of `classes` made background; in place."""
    for index, box in enumerate(find_objects(label), start=1):
        if index not in classes or box is None:
            continue
        part = label[box]
        pieces, count = number_pieces(part == index, np.ones((3, 3, 3)))
        if count > 1:
            largest = np.bincount(pieces.ravel())[1:].argmax() + 1
            part[(pieces != 0) & (pieces != largest)] = 0
    return label


def one_hot(label: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (classes, D, H, W) float32 of a label volume that is certain of itself."""
    return (np.arange(classes)[:, None, None, None] == label).astype(np.float32)


def save_label(label: np.ndarray, case: PreparedCase, path: Path) -> Path:
    """A label volume (native D, H, W) on the file's grid as NIfTI (uint8), with the file's affine. `path` ends in .nii.gz."""
    with written_whole(path) as part:
        nib.save(nib.Nifti1Image(label, case.native_affine), part)
    return path


def windows_of(case: PreparedCase, settings: Settings) -> Windows:
    """Where the run's windows lie in a prepared scan."""
    return Windows.over(case.image.shape, settings.data.patch_voxels, overlap=settings.prediction.overlap)


def case_rows(networks: Sequence[Network], case: PreparedCase, settings: Settings, windows: Windows, **how: Any) -> Iterator[tuple[int, Tensor]]:
    """`finished_rows` of a prepared scan, seen as the network was trained to see its data set: the first row, and (C, rows, A, B). `how`: as there."""
    return finished_rows(networks, case.image, windows, settings.prediction, **_sight(case), **how)


def window_at(case: PreparedCase, settings: Settings, at: Sequence[int]) -> Tensor:
    """(1, 1, *patch) float32: what the network sees in the window whose middle is nearest the voxel `at` of a prepared scan."""
    windows = windows_of(case, settings)
    return seen_at(case, windows, windows.nearest(at))


def seen_at(case: PreparedCase, windows: Windows, corner: Sequence[int]) -> Tensor:
    """(1, 1, *patch) float32: what the network sees in the window that begins at a corner of the padded volume."""
    return cut(case.image, windows, [corner], **_sight(case))


def _sight(case: PreparedCase) -> dict:
    """From intensities to what the network sees of them, and of what lies beyond the scan."""
    manifest = load_manifest(case.case.manifest)
    return {"prepare": lambda image: window(image, manifest, case.case.modality), "beyond": manifest.intensity_range[0]}


def one_piece(settings: Settings) -> list[int]:
    """Indices of the classes of which only the largest piece is kept. Raises UserError for one that the network does not know."""
    names = label_space(settings.data).class_names
    if unknown := [name for name in settings.prediction.one_piece if name not in names[1:]]:
        raise UserError(f"prediction.one_piece: found {unknown[0]!r}, expected some of {', '.join(names[1:])}.")
    return [names.index(name) for name in settings.prediction.one_piece]


def _attempts(window_batch: int, device: torch.device) -> list[tuple[int, torch.device]]:
    """Windows at a time and where sums lie, from what was asked for to what takes least of the device's memory."""
    sizes = [window_batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return [(size, device) for size in sizes] + ([(1, CPU)] if device != CPU else [])
