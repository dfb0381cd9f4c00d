"""What notebook 00 shows within a minute: a patient whom a trained network never saw, segmented, and where its experts look.

The network is the demo's, its weights in few bits, in `homelib/weights/demo` with a card that says how they were made (`scripts/weights.py`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.manifest import Case, load_manifest
from ..data.prepare import prepare
from ..errors import UserError
from ..run.packed import load
from ..run.predict import keep_largest_pieces, one_piece, predict_probabilities, to_native
from ..run.predict_all import Ensemble
from .comparison import measure_labels
from .expert_maps import RoutingMaps, routing_maps

WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "demo"


@dataclass(frozen=True)
class FirstLook:
    """A scan as the shipped network sees it.

    maps: the prepared scan, its reference and the experts of one layer (`homelib.study.expert_maps`). predicted: (D, H, W) uint8 class indices, on the
    same grid. rows: Dice on the file's own grid, a row a class. seconds: for reading, preparing, predicting and tracing.
    """

    maps: RoutingMaps
    predicted: np.ndarray
    rows: pd.DataFrame
    seconds: float


def shipped_weights(folder: Path = WEIGHTS) -> tuple[Ensemble | None, str]:
    """The demo's trained network, and a line that tells of it; None where the workbook has no weights, and the line says how to make them.

    Raises UserError: a folder that is not whole.
    """
    if not folder.is_dir():
        return None, f"{folder.parent.name}/{folder.name}: no trained weights here; `make demo && make weights` makes them."
    ensemble = load(folder)
    settings, (network,) = ensemble.settings, ensemble.networks
    manifest = load_manifest(settings.data.manifest)
    cases = ", ".join(f"{case} (labels {manifest.origin_of(case)})" for case in settings.data.train_cases)
    parameters, size = sum(parameter.numel() for parameter in network.parameters()), sum(file.stat().st_size for file in folder.iterdir())
    count = len(settings.data.train_cases)
    return ensemble, (
        f"{settings.network}, {parameters:,} parameters in {size / 1e6:.1f} MB; trained on {count} patient{'s' if count != 1 else ''}, {cases}, "
        f"in {settings.training.steps} steps, seed {settings.training.seed}."
    )


def first_look(ensemble: Ensemble, case: Case, *, stage: int = 0) -> FirstLook:
    """Segment a labelled scan, and trace the experts of a stage's first block (level 1) in it.

    Raises UserError: a scan that the network was trained on, or a stage that it does not have.
    """
    settings, (network,) = ensemble.settings, ensemble.networks
    if case.id in settings.data.train_cases:
        raise UserError(f"{case.id}: the network was trained on it, expected a scan that it never saw.")
    start = time.perf_counter()
    prepared = prepare(case, spacing_mm=settings.data.spacing_mm, low_pass=settings.data.low_pass)
    probabilities, single = predict_probabilities(network, prepared, settings), one_piece(settings)
    maps = routing_maps(network, prepared, settings, stages=[stage], blocks=[0], levels=[1])
    label = keep_largest_pieces(to_native(probabilities, prepared), single)
    seconds = time.perf_counter() - start
    predicted = keep_largest_pieces(probabilities.argmax(0).astype(np.uint8), single)
    return FirstLook(maps, predicted, measure_labels({settings.network: label}, prepared).assign(role="test"), seconds)
