"""Lesions counted one by one: which pieces of the reference are found, and which pieces of the prediction are nothing."""

import numpy as np
from scipy.ndimage import label as number_pieces

NEIGHBOURS = np.ones((3, 3, 3))  # 26: pieces that touch by a corner are one
COVERED = 0.1  # of a piece, that makes it a hit


def count_lesions(P: np.ndarray, R: np.ndarray) -> dict[str, int]:
    """Pieces of the reference R and the prediction P (D, H, W) bool, those of R that are found and those of P that are spurious.

    A piece counts as a hit where the other mask covers a tenth of it or more: a stray voxel finds no tumour, and one large blob over
    everything is no spurious lesion but is told by its precision.

    >>> R, P = np.zeros((2, 1, 1, 9), bool)
    >>> R[..., :2], R[..., 5:7], P[..., 1:4], P[..., 8:] = True, True, True, True
    >>> count_lesions(P, R)
    {'lesions_reference': 2, 'lesions_predicted': 2, 'lesions_found': 1, 'lesions_spurious': 1}
    """
    references, found = _hits(R, P)
    predictions, true = _hits(P, R)
    return {"lesions_reference": references, "lesions_predicted": predictions, "lesions_found": found, "lesions_spurious": predictions - true}


def _hits(pieces: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """How many pieces a mask has, and how many of them the other covers."""
    numbered, count = number_pieces(pieces, NEIGHBOURS)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    covered = np.bincount(numbered[other], minlength=count + 1)[1:]
    return count, int((covered >= COVERED * sizes).sum())
