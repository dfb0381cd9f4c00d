"""One run on prepared data sets, for the grids that name some: trained on the cases of a fold, measured on those that it left out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import preset
from ..data.layouts import find_cases
from ..data.manifest import Case, load_manifest
from ..data.parallel import default_workers
from ..errors import UserError
from ..paths import written_whole
from ..run.cohort import Cohort, DataSet, cohort
from ..run.folder import Run
from ..run.inputs import suffix_of
from ..run.named import predicted_names_of, to_classes
from ..run.pairs import Measure, Pair, measure_pairs
from ..run.predict_all import Ensemble, predict_all
from ..run.train import fit
from .beside import Shown, name_apart, runs_told, shown
from .routing_log import watch_of

METRICS = ("dice", "hd95")


def cohort_on(profile: str, data: Mapping[str, str], *, fold: int | None, changes: Mapping[str, Any]) -> Cohort:
    """The cases of prepared data sets (name -> folder of its files) and the settings that they complete. Raises UserError as `homelib.run.cohort` does."""
    return cohort(preset(profile), [DataSet(name, Path(root)) for name, root in data.items()], fold=fold, changes=changes)


def trained_on(made: Cohort, folder: str | Path) -> Run:
    """Train, or go on with, the run in a folder."""
    made = made.at_hand(print)
    watch = watch_of(made.settings, folder, made.train, made.validation)
    return fit(made.settings, made.train, folder, validation=made.validation, on_validation=watch)


def measured_on(run: Run, data: Mapping[str, str]) -> pd.DataFrame:
    """Predict and measure the labelled cases that a run was not trained on; writes `predictions/` and `metrics.csv`.

    Returns:
        One row a case, class and metric, with `role` "test", and `chose`: whether the run's best weights were chosen by the case (a fold's are).

    Raises:
        UserError: no such case, or one that cannot be predicted or measured.
    """
    settings, tables, left_out = run.settings, [], _left_out(run)
    ensemble = Ensemble.of([run.folder])
    for name, root in data.items():
        manifest = load_manifest(name)
        cases = [case for case in find_cases(manifest, root).cases if case.id in left_out and case.label is not None]
        done = predict_all(cases, ensemble, run.predictions, progress=False, say=print) if cases else []
        if failed := [one.message for one in done if one.state == "failed"]:
            raise UserError(failed[0])
        how = Measure(
            manifest.class_names,
            manifest.reference,
            predicted_names=predicted_names_of(run.predictions, manifest),
            method=settings.network,
            metrics=METRICS,
            tolerances_mm=(),
        )
        found = measure_pairs([_pair(case, run) for case in cases], how, workers=default_workers())
        if found.left_out:
            raise UserError(found.left_out[0])
        tables.append(found.rows)
    rows = pd.concat(tables, ignore_index=True)
    if rows.empty:
        raise UserError(f"{run.folder}: no labelled case that it was not trained on, expected some to measure. Grids on data sets need folds, or a test part.")
    rows = rows.assign(role="test", chose=rows["case"].isin(settings.data.validation_cases))
    with written_whole(run.metrics_file) as part:
        rows.to_csv(part, index=False)
    return rows


def others_on(told: str | Sequence[str], run: Run) -> dict[str, Run]:
    """Runs of other models that have measured the cases that ours left out, by name: the network's, with the folder's where two have the same.

    Raises UserError for a folder without a run, and for one that left out other cases.
    """
    expected, found = _left_out(run), dict[str, Run]()
    for other in runs_told(told):
        if _left_out(other) != expected:
            raise UserError(f"others: {other.folder}: found a run that left out {_few(_left_out(other))}, expected {_few(expected)}. Leave it out.")
        found[name_apart(other, (run.settings.network, *found))] = other
    return found


def metrics_beside(metrics: pd.DataFrame, others: Mapping[str, Run]) -> pd.DataFrame:
    """The rows of our run, then those of others, each under its name."""
    return pd.concat([metrics, *(other.metrics.assign(method=name) for name, other in others.items())], ignore_index=True)


def shown_on(run: Run, data: Mapping[str, str], case_id: str, *, others: Mapping[str, Run] | None = None) -> Shown:
    """A case as `measured_on` has left it, for figures, with what other runs have predicted. Raises UserError for one that a run has not predicted."""
    runs = {run.settings.network: run} | dict(others or {})
    for name, root in data.items():
        manifest = load_manifest(name)
        case = next((case for case in find_cases(manifest, root).cases if case.id == case_id and case.label is not None), None)
        if case is None:
            continue
        files = {method: _pair(case, one).predicted for method, one in runs.items()}
        if missing := [file for file in files.values() if not file.exists()]:
            raise UserError(f"{missing[0]}: no such file, expected a prediction of {case_id}; measure the run first.")
        seen = shown(case, files)
        named = {method: predicted_names_of(one.predictions, manifest) for method, one in runs.items()}  # of the union, where a run has several data sets
        return replace(seen, predicted={method: to_classes(label, named[method], seen.class_names) for method, label in seen.predicted.items()})
    raise UserError(f"{case_id}: no labelled case of {', '.join(data)}.")


def _left_out(run: Run) -> frozenset[str]:
    return frozenset((*run.settings.data.validation_cases, *run.settings.data.test_cases))


def _few(cases: Collection[str]) -> str:
    return ", ".join(sorted(cases)[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "") or "nothing"


def _pair(case: Case, run: Run) -> Pair:
    return Pair(case.id, run.predictions / f"{case.id}{suffix_of(case.image)}", case.label_file)
