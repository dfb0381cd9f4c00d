"""Sets of augmentations by name: the paper's (its section 3.2 and App. B) and that of the released code, on MONAI's transforms.

Both work on a patch in the unit range, after the window of its modality. The paper names its changes without a probability or a range: those
here are ours. The released code has neither flips, contrast nor affine changes; its own numbers stand beside each line.
"""

from collections.abc import Sequence

from monai.transforms import (
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
    Transform,
)

from ..errors import UserError

BOTH = ["image", "label"]
NEAREST_LABEL = ("bilinear", "nearest")
AFFINE_TOO = ("feta", "mvseg")  # how the names of those data sets begin that the paper gives an affine change too


def recipe(name: str, data_set: str, patch_voxels: Sequence[int]) -> tuple[dict, list[Transform]]:
    """A set of augmentations: how a patch is cut (arguments of `RandPatchd`), and what is then done to it, in order.

    Args:
        name: "paper" or "released".
        data_set: name of the manifest; FeTA and MVSeg have more in the paper.
        patch_voxels: (d, h, w).

    Raises:
        UserError: no such set, or patches that cannot be turned by 90 degrees, as the released code does.
    """
    if name == "paper":
        return _paper(data_set.startswith(AFFINE_TOO))
    if name == "released":
        return _released(tuple(patch_voxels))
    raise UserError(f"recipe: found {name!r}, expected paper or released.")


def _paper(affine: bool) -> tuple[dict, list[Transform]]:
    """Scaling, rotation, flips, brightness and contrast, Gaussian smoothing and noise; scaling and rotation are done as the patch is cut, out of
    the scan around it, so that no corner is left empty."""
    changes: list[Transform] = [RandFlipd(BOTH, prob=0.5, spatial_axis=axis) for axis in range(3)]
    if affine:
        changes.append(RandAffined(BOTH, prob=0.3, shear_range=[0.1] * 6, translate_range=[4] * 3, mode=NEAREST_LABEL, padding_mode="zeros"))
    changes += [
        RandScaleIntensityd("image", factors=0.2, prob=0.3),
        RandShiftIntensityd("image", offsets=0.1, prob=0.3),
        RandAdjustContrastd("image", gamma=(0.8, 1.25), prob=0.3),
        RandGaussianSmoothd("image", (0.25, 1.0), (0.25, 1.0), (0.25, 1.0), prob=0.2),
        RandGaussianNoised("image", std=0.02, prob=0.2),
    ]
    return {"class_centred": 0.5, "rotation_degrees": 15, "scaling": 0.2}, changes


def _released(patch_voxels: tuple[int, ...]) -> tuple[dict, list[Transform]]:
    """The released code's, except that a negative patch lies anywhere, where MONAI's `RandCropByPosNegLabeld` centres it on background."""
    turned = next(((a, b) for a, b in ((0, 1), (0, 2), (1, 2)) if patch_voxels[a] == patch_voxels[b]), None)
    if turned is None:
        sides = " x ".join(map(str, patch_voxels))
        raise UserError(f"data.patch_voxels: found {sides}, expected two equal sides, for this recipe turns patches by 90 degrees. Use another recipe.")
    changes: list[Transform] = [
        RandZoomd(BOTH, prob=0.3, min_zoom=1.3, max_zoom=1.5, mode=("trilinear", "nearest"), align_corners=(True, None)),  # inwards only
        RandRotate90d(BOTH, prob=0.1, spatial_axes=turned),
        RandShiftIntensityd("image", offsets=0.1, prob=0.2),
        RandGaussianSmoothd("image", (0.5, 1.15), (0.5, 1.15), (0.5, 1.15), prob=0.2),
        RandGaussianNoised("image", std=0.01, prob=0.2),
    ]
    return {"class_centred": 0.75, "by_voxel": True}, changes  # three patches on a labelled voxel, one anywhere
