"""Prediction: a sliding window over the prepared volume, taken back to the file's own grid, as NIfTI (paper App. B)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.transforms import SpatialResample
from torch import Tensor

from ..config import Settings
from ..data.loading import window
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from .folder import written_whole

SLAB_VOXELS = 2**23  # of the file's grid that are dealt with at a time
SHEAR_VOXELS = 0.01  # that axes may lean, over the whole scan, and be taken as the grid's


@torch.inference_mode()
def predict_probabilities(network: Callable[[Tensor], Tensor], case: PreparedCase, settings: Settings) -> np.ndarray:
    """Class probabilities (classes, D, H, W) float32 on the prepared grid: windows of the training patch, overlapping, blended by a Gaussian."""
    manifest = load_manifest(case.case.manifest)
    image = torch.from_numpy(window(case.image, manifest, case.case.modality))[None, None]
    parameter = next(iter(network.parameters()), torch.empty(0)) if isinstance(network, torch.nn.Module) else torch.empty(0)
    logits = sliding_window_inference(
        image.to(parameter.device),
        roi_size=settings.data.patch_voxels,
        sw_batch_size=settings.prediction.window_batch,
        predictor=network,
        overlap=settings.prediction.overlap,
        mode=settings.prediction.blend,
        cval=manifest.intensity_range[0],  # beyond a scan that is smaller than the patch
    )
    return logits[0].float().softmax(0).cpu().numpy()


def to_native(probabilities: np.ndarray, case: PreparedCase) -> np.ndarray:
    """Labels (native D, H, W) uint8 on the file's grid, from probabilities (classes, D, H, W) on the prepared one.

    Each class's probability is interpolated linearly in space, and the most probable class taken. It goes slab by slab and class by class:
    memory is that of a few slabs, whatever the number of classes. Outside the prepared box it is background.
    """
    volumes = torch.from_numpy(np.ascontiguousarray(probabilities))
    label = np.empty(case.native_shape, np.uint8)
    rows = max(1, SLAB_VOXELS // (case.native_shape[1] * case.native_shape[2]))
    for start in range(0, case.native_shape[0], rows):
        slab = slice(start, min(start + rows, case.native_shape[0]))
        best = None
        for index, native in enumerate(_on_native_slab(volumes, case, slab)):
            if best is None:
                best, chosen = native, torch.zeros(native.shape, dtype=torch.uint8)
            else:
                chosen.masked_fill_(native > best, index)
                best = torch.maximum(best, native)
        label[slab] = chosen.numpy()
    return label


def _on_native_slab(volumes: Tensor, case: PreparedCase, slab: slice) -> Iterator[Tensor]:
    """Each volume of (classes, D, H, W) interpolated on some rows of the file's grid, with zeros around it.

    Both grids have the same axes but for order and direction, so that it can be done one axis after another; a file with sheared axes (a CT
    with a tilted gantry) goes the general way.
    """
    to_prepared = np.linalg.inv(case.affine) @ case.native_affine
    axes = np.abs(to_prepared[:3, :3]).argmax(0)  # prepared axis of each native one
    rest = to_prepared[:3, :3].copy()
    rest[axes, range(3)] = 0
    shape = (slab.stop - slab.start, *case.native_shape[1:])
    if np.abs(rest).max() * max(case.native_shape) > SHEAR_VOXELS or len(set(axes)) < 3:
        affine = case.native_affine @ np.array([[1, 0, 0, slab.start], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
        for volume in volumes:
            yield resample(MetaTensor(volume[None], affine=case.affine), dst_affine=affine, spatial_size=shape)[0].as_tensor()
        return
    at = [to_prepared[p, n] * np.arange(case.native_shape[n]) + to_prepared[p, 3] for n, p in enumerate(axes)]
    at[0] = at[0][slab]
    for volume in volumes:
        volume = volume.permute(*axes)
        for axis in (2, 1, 0):  # the first axis last: its rows are whole in memory
            volume = _interpolate(volume, axis, torch.from_numpy(at[axis]))
        yield volume


def _interpolate(volume: Tensor, axis: int, at: Tensor) -> Tensor:
    """Linear interpolation along one axis at positions in voxels (float64); zero beyond the ends."""
    size, along = volume.shape[axis], [1, 1, 1]
    along[axis] = -1
    total = None
    for index in (at.floor(), at.floor() + 1):
        weight = (1 - (at - index).abs()) * ((index >= 0) & (index < size))
        rows = volume.index_select(axis, index.long().clamp(0, size - 1))
        weight = weight.to(volume.dtype).view(along)
        total = rows.mul_(weight) if total is None else total.addcmul_(rows, weight)
    return total


def one_hot(label: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (classes, D, H, W) float32 of a label volume that is certain of itself."""
    return (np.arange(classes)[:, None, None, None] == label).astype(np.float32)


def save_label(label: np.ndarray, case: PreparedCase, path: Path) -> Path:
    """A label volume on the file's grid as NIfTI (uint8), with the file's affine. `path` ends in .nii.gz."""
    with written_whole(path) as part:
        nib.save(nib.Nifti1Image(label, case.native_affine), part)
    return path
