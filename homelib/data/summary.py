"""What is in the data, as tables: cases, classes, intensities."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from .manifest import Case, load_manifest
from .prepare import PreparedCase


def cases_table(cases: Iterable[Case]) -> pd.DataFrame:
    """One row a case: modality, data set, voxels and spacing of its file, where its labels come from."""
    import nibabel as nib

    rows = []
    for case in cases:
        header = nib.load(case.image).header
        rows.append(
            {
                "case": case.id,
                "modality": case.modality,
                "data set": load_manifest(case.manifest).title,
                "voxels": " x ".join(map(str, header.get_data_shape())),
                "spacing mm": " x ".join(f"{s:.2f}" for s in header.get_zooms()[:3]),
                "label origin": case.label_origin,
            }
        )
    return pd.DataFrame(rows).set_index("case")


def class_table(cases: Iterable[PreparedCase]) -> pd.DataFrame:
    """One row a case and class: volume in ml, and median and 5th to 95th percentile of the intensity (HU for CT), on the prepared grid."""
    rows = []
    for case in cases:
        for index, name in enumerate(load_manifest(case.case.manifest).class_names):
            inside = case.image[case.label == index]
            if index and inside.size:
                low, middle, high = np.percentile(inside, (5, 50, 95))
                rows.append(
                    {
                        "case": case.case.id,
                        "label origin": case.case.label_origin,
                        "class": name,
                        "ml": inside.size * np.prod(case.spacing_mm) / 1000,
                        "median": middle,
                        "p5": low,
                        "p95": high,
                    }
                )
    return pd.DataFrame(rows)
