"""What is in the data, as tables: cases, what a check finds, grids, classes, intensities, parts."""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from ..paths import cache_dir
from .check import check_cases
from .examine import Report
from .findings import Finding
from .grid import to_ras
from .manifest import Case, Manifest, SplitRule, load_manifest
from .prepare import PreparedCase, read_array, read_label
from .split import split

AXES = ("right-left", "front-back", "up-down")


def cases_table(cases: Iterable[Case]) -> pd.DataFrame:
    """One row a case: modality, data set, voxels and spacing of its file, where its labels come from."""
    import nibabel as nib

    rows = []
    for case in cases:
        header: Any = nib.load(case.image).header
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


def check_tables(cases: Iterable[Case]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A check of these cases, each data set against its manifest: all findings, a row each, and what was read of each case."""
    findings: list[Finding] = []
    reports: dict[str, Report] = {}
    for name, of_one in groupby(sorted(cases, key=lambda case: case.manifest), key=lambda case: case.manifest):
        manifest = load_manifest(name)
        checked = check_cases(list(of_one), manifest, kept=cache_dir() / "checks" / f"{manifest.name}-cases", workers=1)
        findings, reports = [*findings, *checked.findings], reports | checked.reports
    columns = ["severity", "case", "check", "found", "expected", "remedy"]
    read = ["modality", "type", "orientation", "min", "median", "p99", "max"]
    rows = [{"case": case_id, **{name: report.statistics[name] for name in read if name in report.statistics}} for case_id, report in reports.items()]
    return pd.DataFrame([{name: asdict(finding)[name] for name in columns} for finding in findings], columns=columns), pd.DataFrame(rows).set_index("case")


def grids_table(cases: Iterable[PreparedCase]) -> pd.DataFrame:
    """One row a case and axis: spacing and extent of the file (mm), and the spacing it is prepared at."""
    rows = []
    for case in cases:
        order = np.abs(case.native_affine[:3, :3] / np.linalg.norm(case.native_affine[:3, :3], axis=0)).argmax(0)
        spacing = np.linalg.norm(case.native_affine[:3, :3], axis=0)
        for axis, name in enumerate(AXES):
            own = int(np.flatnonzero(order == axis)[0])
            extent = spacing[own] * case.native_shape[own]
            rows.append({"case": case.case.id, "axis": name, "spacing_mm": spacing[own], "prepared_mm": case.spacing_mm[axis], "extent_mm": extent})
    return pd.DataFrame(rows)


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


def parts_table(cases: Iterable[Case], manifest: Manifest, rule: SplitRule) -> pd.DataFrame:
    """One row a case, by id: its part or fold under a rule, and its stratum (the modality where that stratifies)."""
    cases = sorted(cases, key=lambda case: case.id)
    parts = split(manifest.model_copy(update={"split": rule}), cases)
    stratum = {case.id: case.modality if rule.stratify_by == "modality" else "all" for case in cases}
    return pd.DataFrame([{"case": case.id, "part": parts[case.id], "stratum": stratum[case.id]} for case in cases])


def in_its_file(case: PreparedCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image and class indices (D, H, W) of a case as its files hold them, turned to RAS+ but not resampled, and their affine (4, 4)."""
    volume, affine = read_array(case.case.image)
    label = read_label(case.case.label_file, volume.shape, affine, load_manifest(case.case.manifest))
    image, turned = to_ras(volume, affine)
    return image, to_ras(label, affine)[0], turned
