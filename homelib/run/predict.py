"""Prediction: a sliding window over the prepared volume, taken back to the file's own grid, as NIfTI (paper App. B)."""

from collections.abc import Callable
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


@torch.inference_mode()
def predict_probabilities(network: Callable[[Tensor], Tensor], case: PreparedCase, settings: Settings) -> np.ndarray:
    """Class probabilities (classes, D, H, W) float32 on the prepared grid: windows of the training patch, overlapping, blended by a Gaussian."""
    image = torch.from_numpy(window(case.image, load_manifest(case.case.manifest)))[None, None]
    parameter = next(iter(network.parameters()), torch.empty(0)) if isinstance(network, torch.nn.Module) else torch.empty(0)
    logits = sliding_window_inference(
        image.to(parameter.device),
        roi_size=settings.data.patch_voxels,
        sw_batch_size=settings.prediction.window_batch,
        predictor=network,
        overlap=settings.prediction.overlap,
        mode=settings.prediction.blend,
    )
    return logits[0].float().softmax(0).cpu().numpy()


def to_native(probabilities: np.ndarray, case: PreparedCase) -> np.ndarray:
    """Labels (native D, H, W) uint8 on the file's grid, from probabilities (classes, D, H, W) on the prepared one.

    Each class's probability is interpolated linearly in space, and the most probable class taken, one class at a time: memory is that of
    two volumes, whatever the number of classes. Outside the prepared box it is background.
    """
    best = label = None
    for index, volume in enumerate(probabilities):
        prepared = MetaTensor(torch.from_numpy(volume[None]), affine=case.affine)
        resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float32)
        native = resample(prepared, dst_affine=case.native_affine, spatial_size=case.native_shape)[0].numpy()
        if best is None:
            best, label = native, np.zeros(case.native_shape, np.uint8)
        else:
            better = native > best
            label[better] = index
            best = np.where(better, native, best)
    return label


def one_hot(label: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities (classes, D, H, W) float32 of a label volume that is certain of itself."""
    return (np.arange(classes)[:, None, None, None] == label).astype(np.float32)


def save_label(label: np.ndarray, case: PreparedCase, path: Path) -> Path:
    """A label volume on the file's grid as NIfTI (uint8), with the file's affine. `path` ends in .nii.gz."""
    with written_whole(path) as part:
        nib.save(nib.Nifti1Image(label, case.native_affine), part)
    return path
