"""Faults that downloads have, made in copies of a case, to see what a check says of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..paths import cache_dir
from .manifest import Case

SHIFT_MM = 20


def spoilt_copies(case: Case) -> list[Case]:
    """Four copies of a NIfTI case in the cache, each with one fault: an image cut off in its download, one that is not in HU, a label that was
    moved, and one that was resampled as if it were an image. The case itself is only read. Raises UserError for an unlabelled one."""
    folder = cache_dir() / "spoilt" / case.id
    folder.mkdir(parents=True, exist_ok=True)
    image: Any = nib.load(case.image)
    label: Any = nib.load(case.label_file)
    grey, moved, blended = (folder / f"{name}.nii.gz" for name in ("grey", "moved", "blended"))
    values, place = np.asarray(label.dataobj).astype(np.uint8), label.affine.copy()
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).clip(-1024, 3071).astype(np.int16) + np.int16(1024), image.affine), grey)
    place[0, 3] += SHIFT_MM
    nib.save(nib.Nifti1Image(values, place), moved)
    mixed = values.astype(np.float32)
    mixed[1:] = (mixed[1:] + mixed[:-1]) / 2
    nib.save(nib.Nifti1Image(mixed, label.affine), blended)
    cut = folder / "cut.nii.gz"
    whole = Path(case.image).read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    copies: dict[str, dict[str, Any]] = {"cut": {"image": cut}, "grey": {"image": grey}, "moved": {"label": moved}, "blended": {"label": blended}}
    return [replace(case, id=f"{case.id}-{name}", **files) for name, files in copies.items()]
