"""What preparation alone costs a label: taken to the prepared grid and back to the file's own, without any network.

No prediction on that grid can be better than this. How a label is kept there decides: one class a voxel, or how much of each class is in it.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.manifest import Case, load_manifest
from ..data.prepare import Preparation, PreparedCase, prepare_into, read_label
from ..run.evaluate import evaluate
from ..run.predict import one_hot, to_native

WAYS = {
    "nearest": "one class a voxel: of the nearest",
    "linear": "one class a voxel: of the largest share",
    "shares": "each class's share",
}


def round_trip(case: Case, *, spacing_mm: tuple[float, float, float] | None = None, ways: tuple[str, ...] = ("nearest", "shares")) -> pd.DataFrame:
    """Dice of a label there and back, a row a class and way (see `homelib.run.evaluate`).

    Args:
        case: with a label.
        spacing_mm: of the prepared grid; None is the manifest's.
        ways: to keep a label, as in `homelib.data.prepare.Preparation.labels`.
    """
    manifest = load_manifest(case.manifest)
    tables = []
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            prepare_into(Path(folder) / "case.zip", case, Preparation(spacing_mm=spacing_mm, labels=way), told="once")
            prepared = PreparedCase.open(case, Path(folder) / "case.zip")
            if way == "shares":
                kept = np.stack([np.asarray(share) for share in prepared.shares])
            else:
                kept = one_hot(np.asarray(prepared.label), len(manifest.class_names))
        back = to_native(kept, prepared)
        reference = read_label(case.label_file, prepared.native_shape, prepared.native_affine, manifest)
        spacing = tuple(np.linalg.norm(prepared.native_affine[:3, :3], axis=0).tolist())
        about: dict[str, Any] = {"class_names": manifest.class_names, "case": case.id, "method": WAYS[way], "label_origin": case.label_origin}
        tables.append(evaluate(back, reference, spacing_mm=spacing, **about, metrics=("dice",)))
    return pd.concat(tables, ignore_index=True)
