"""One run measured: the trained network on the patient it never saw and on its own, beside three baselines; predictions as NIfTI."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..data.cases import the_one
from ..data.demo import DemoData
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase, read_label
from ..progress import bar
from ..run.checkpoint import trained_network
from ..run.evaluate import evaluate
from ..run.folder import Run, written_whole
from ..run.predict import predict_label, save_label, to_native
from .baselines import ThresholdAndPosition, all_background, untrained

BASELINES = ("untrained network", "all background", "HU threshold and position")


def measure(run: Run, demo: DemoData, *, baselines: bool = True, progress: bool = False) -> pd.DataFrame:
    """Predict and evaluate a run on the files' own grids; writes `predictions/*.nii.gz` and `metrics.csv`.

    Args:
        baselines: measure them too; they are the same for every network, but for the untrained one.
        progress: show a bar of predictions, where there is a terminal.

    Returns:
        One row a case, method, class and metric (see `homelib.run.evaluate`), with `role`: "train" for the patient that the network
        was trained on, "test" for the one it never saw. Baselines are measured on the test patient, in Dice alone.
    """
    settings = run.settings
    train, test = (the_one(settings, demo, role) for role in ("train", "test"))
    network = trained_network(run)
    rule = ThresholdAndPosition.fit(train, settings.model.out_channels) if baselines else None
    tables, shown = [], bar(total=2 + (len(BASELINES) if baselines else 0), desc="evaluate", unit="prediction", show=progress)
    for role, case in (("train", train), ("test", test)):
        methods: dict[str, Callable[[PreparedCase], np.ndarray]] = {settings.network: lambda case: predict_label([network], case, settings)}
        if role == "test" and rule is not None:
            methods |= {
                "untrained network": lambda case: to_native(untrained(case, settings), case),
                "all background": lambda case: to_native(all_background(case, settings), case),
                "HU threshold and position": lambda case: to_native(rule(case), case),
            }
        labels = {}
        for method, predict in methods.items():
            labels[method] = predict(case)
            save_label(labels[method], case, run.predictions / f"{case.case.id}_{method.replace(' ', '-')}.nii.gz")
            shown.update()
        tables.append(measure_labels(labels, case, metrics={settings.network: ("dice", "hd95")}).assign(role=role))
    shown.close()
    metrics = pd.concat(tables, ignore_index=True)
    with written_whole(run.metrics_file) as part:
        metrics.to_csv(part, index=False)
    return metrics


def measure_labels(labels: Mapping[str, np.ndarray], case: PreparedCase, *, metrics: Mapping[str, Sequence[str]] | None = None) -> pd.DataFrame:
    """Label volumes against the reference of a case, on the file's own grid.

    Args:
        labels: method -> class indices (native D, H, W).
        case: with a label.
        metrics: by method; Dice alone where it names none.

    Returns:
        One row a method, class and metric (see `homelib.run.evaluate`).
    """
    manifest = load_manifest(case.case.manifest)
    reference = read_label(case.case.label_file, case.native_shape, case.native_affine, manifest)
    spacing_mm = tuple(((case.native_affine[:3, :3] ** 2).sum(0) ** 0.5).tolist())
    about: dict[str, Any] = {"spacing_mm": spacing_mm, "class_names": manifest.class_names, "case": case.case.id, "label_origin": case.case.label_origin}
    tables = [evaluate(label, reference, method=method, metrics=(metrics or {}).get(method, ("dice",)), **about) for method, label in labels.items()]
    return pd.concat(tables, ignore_index=True)
