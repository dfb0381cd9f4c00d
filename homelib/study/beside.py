"""What figures of predictions are drawn from: a patient's volumes turned one way, our run's labels and, beside them, those of other models' runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..config import Settings
from ..data.grid import to_ras
from ..data.manifest import Case, load_manifest
from ..data.prepare import read_array, read_oriented
from ..errors import UserError
from ..run.folder import Run
from .comparison import measure
from .demo import DemoRun


@dataclass(frozen=True)
class Shown:
    """A patient's volumes (D, H, W) turned to RAS+, for figures: image, class indices of the reference, and of each method by its name.

    limits: intensities between which the image is shown.
    """

    image: np.ndarray
    spacing_mm: tuple[float, float, float]
    reference: np.ndarray
    predicted: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    limits: tuple[float, float]

    @property
    def labels(self) -> dict[str, np.ndarray]:
        """The reference and all predictions by method, (D, H, W) each."""
        return {"reference": self.reference} | self.predicted


def shown(case: Case, predicted: Mapping[str, Path]) -> Shown:
    """A labelled case with labels from files, which hold its manifest's class indices. Raises UserError for a file that is not there."""
    manifest = load_manifest(case.manifest)
    image, spacing_mm = read_oriented(case.image)
    raw, affine = read_array(case.label_file, what="label", labels=manifest.labels)
    labels = {method: read_oriented(file)[0].astype(np.uint8) for method, file in predicted.items()}
    return Shown(image, spacing_mm, to_ras(manifest.merge(raw), affine)[0], labels, manifest.class_names, manifest.window_of(case.modality))


def others_of(told: str | Sequence[str], demos: Mapping[str, DemoRun]) -> dict[str, dict[str, Run]]:
    """Runs of other models that were trained and tested on the demo's patients.

    Args:
        told: their folders, as a list or with commas between.
        demos: ours, by direction.

    Returns:
        For each direction its other runs by name: the network's, with the folder's where two have the same.

    Raises:
        UserError: no run there, or one of other patients.
    """
    found: dict[str, dict[str, Run]] = {direction: {} for direction in demos}
    for run in runs_told(told):
        directions = [direction for direction, demo in demos.items() if _patients(run.settings) == _patients(demo.settings)]
        if not directions:
            expected = " or ".join(_patients(demo.settings) for demo in demos.values())
            raise UserError(f"others: {run.folder}: found a run of {_patients(run.settings)}, expected {expected}. Leave it out.")
        for direction in directions:
            found[direction][name_apart(run, (demos[direction].settings.network, *found[direction]))] = run
    return found


def runs_told(told: str | Sequence[str]) -> list[Run]:
    """Runs by their folders, in a list or with commas between. Raises UserError where one holds none."""
    folders = [part.strip() for part in told.split(",")] if isinstance(told, str) else told
    return [Run.open(folder) for folder in folders if folder]


def name_apart(run: Run, taken: Collection[str]) -> str:
    """A run's network, with its folder's name where another has the same."""
    return f"{run.settings.network} ({run.name})" if run.settings.network in taken else run.settings.network


def measure_beside(demo: DemoRun, others: Mapping[str, Run], *, baselines: bool = True) -> pd.DataFrame:
    """`measure` of our run, and of the others, of which the network's rows are taken, each under its name. Each writes into its own folder, the others
    with baselines, which may have been there."""
    tables = [measure(demo.run, demo.data, baselines=baselines)]
    for name, run in others.items():
        rows = measure(run, demo.data)
        tables.append(rows[rows["method"] == run.settings.network].assign(method=name))
    return pd.concat(tables, ignore_index=True)


def shown_beside(demo: DemoRun, others: Mapping[str, Run], *, baseline: str) -> Shown:
    """The test patient as `measure_beside` has left it: ours, the other models, and a baseline."""
    case = demo.test_case.case
    files: dict[str, Path] = {demo.settings.network: _file(demo.run, case, demo.settings.network)}
    files |= {name: _file(run, case, run.settings.network) for name, run in others.items()}
    return shown(case, files | {baseline: _file(demo.run, case, baseline)})


def _file(run: Run, case: Case, method: str) -> Path:
    return run.predictions / f"{case.id}_{method.replace(' ', '-')}.nii.gz"


def _patients(settings: Settings) -> str:
    """Data set, and the cases that a run is trained and tested on."""
    data = settings.data
    return f"{load_manifest(data.manifest).name}, {' '.join(data.train_cases)} to {' '.join(data.test_cases)}"
