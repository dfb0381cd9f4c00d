"""Validation within a training: sliding-window predictions of some cases, Dice by case and class on the prepared grid."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from torch import nn

from ..config import IGNORE, Settings
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..progress import bar
from .evaluate import evaluate
from .mixture import label_space
from .predict import predict_probabilities, windows_of

COLUMNS = ("case", "class", "dice")


class _Ended(Exception):
    """A validation was asked to stop within a case."""


def chosen(cases: Sequence[PreparedCase], most: int | None) -> list[PreparedCase]:
    """`most` of the cases (None: all), in the order given: the same ones every time, whatever others are there, for they are those whose ids have the
    smallest hashes. So of several data sets each has about its share."""
    if most is None or most >= len(cases):
        return list(cases)
    mark = {case.case.id: hashlib.sha256(case.case.id.encode("utf-8", "surrogateescape")).digest() for case in cases}
    among = sorted(mark, key=mark.__getitem__)[:most]
    return [case for case in cases if case.case.id in among]


def validate(
    network: nn.Module, cases: Sequence[PreparedCase], settings: Settings, *, stop: Callable[[], bool] = lambda: False, progress: bool = False
) -> pd.DataFrame | None:
    """Dice of each case and class that its data set has labelled; NaN where a class is neither there nor found.

    Args:
        network: left in eval mode.
        cases: prepared and labelled.
        settings: of the run.
        stop: asked after each window; True ends it.
        progress: show a bar of windows, where there is a terminal.

    Returns:
        Columns case, class, dice; None where it was ended.
    """

    network.eval()
    windows = sum(windows_of(case, settings).count for case in cases)
    with bar(total=windows, desc="validate", unit="window", keep=False, show=progress) as shown:

        def look(windows: int) -> None:
            shown.update(windows)
            if stop():
                raise _Ended

        try:
            return _dice(network, cases, settings, look)
        except _Ended:
            return None


def _dice(network: nn.Module, cases: Sequence[PreparedCase], settings: Settings, look: Callable[[int], None]) -> pd.DataFrame:
    space, rows = label_space(settings.data), []
    for case in cases:
        predicted = predict_probabilities(network, case, settings, on_window=look).argmax(0)
        predicted, label, known = beside_label(predicted, case, settings)
        names = [space.class_names[index] for index in known]
        table = evaluate(
            predicted,
            label,
            spacing_mm=case.spacing_mm,
            class_names=space.class_names,
            case=case.case.id,
            method=settings.network,
            label_origin=case.case.label_origin,
            metrics=("dice",),
        )
        rows += [{"case": row["case"], "class": row["class"], "dice": row["value"]} for _, row in table.iterrows() if row["class"] in names]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def beside_label(predicted: np.ndarray, case: PreparedCase, settings: Settings) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Class indices (D, H, W) of the run, predicted and of the label, on the prepared grid; and the classes that the case's data set has labelled.

    What the data set knows nothing of counts neither for nor against the network: it is background in what is returned of the prediction.
    """
    space, data_set = label_space(settings.data), load_manifest(case.case.manifest).name
    label = space.to_union(np.asarray(case.label), data_set)
    predicted = np.where((label == IGNORE) | ~np.isin(predicted, space.indices[data_set]), 0, predicted)
    return predicted, label, list(space.indices[data_set][1:])


def class_mean_dice(table: pd.DataFrame) -> float:
    """The mean over classes of the means over cases; 0 where there is nothing to be found and nothing was."""
    by_class = table.groupby("class")["dice"].mean()
    mean = by_class.mean()
    return float(mean) if np.isfinite(mean) else 0.0
