"""The loss: Dice + cross-entropy (paper section 3.2), or one of them alone, which an ablation asks for."""

from typing import Literal

import torch
from torch import Tensor

from ..config import IGNORE

SMOOTH = 1e-5  # of the Dice, as in MONAI: a class that is neither there nor found has 1


def segmentation_loss(
    logits: Tensor,
    label: Tensor,
    class_weights: Tensor | None = None,
    *,
    batch_dice: bool = False,
    terms: Literal["dice_ce", "dice", "ce"] = "dice_ce",
) -> Tensor:
    """Dice + cross-entropy, over the voxels whose label is not 255.

    The sum of MONAI's DiceLoss and torch's cross_entropy, from one softmax and without a one-hot target (1 GB for two patches of 128^3
    voxels and 30 classes). An ignored voxel has no gradient and adds nothing to the loss; where all are ignored the loss is 0.

    Args:
        logits: (B, classes, D, H, W).
        label: (B, 1, D, H, W) class indices.
        class_weights: (classes,) of the cross-entropy; None weighs every voxel alike, as the paper does.
        batch_dice: one Dice a class over the batch, so that a class which a patch happens to lack costs it nothing.
        terms: both, or one alone.
    """
    keep = label != IGNORE
    if not keep.any():
        return 0 * logits.float().sum()
    index = label.masked_fill(~keep, 0)
    log_p = logits.float().log_softmax(1)
    log_hit = log_p.gather(1, index)  # of the true class

    weight = keep.float() if class_weights is None else class_weights[index] * keep
    entropy = -(weight * log_hit).sum() / weight.sum()
    if terms == "ce":
        return entropy

    index, hit, kept = (part.flatten(1) for part in (index, log_hit.exp() * keep, keep.float()))
    none = log_p.new_zeros(log_p.shape[:2])
    overlap, true = none.scatter_add(1, index, hit), none.scatter_add(1, index, kept)
    found = torch.einsum("bkv,bv->bk", log_p.exp().flatten(2), kept)
    if batch_dice:
        overlap, true, found = (part.sum(0) for part in (overlap, true, found))
    dice = (2 * overlap + SMOOTH) / (true + found + SMOOTH)
    return 1 - dice.mean() + (entropy if terms == "dice_ce" else 0)
