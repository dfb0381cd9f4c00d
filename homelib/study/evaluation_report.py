"""What `home evaluate PRED REF` says: a table a metric with its definition, the rule for empty masks, and the counts that a mean hides."""

from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from scipy.stats import binomtest

from ..data.manifest import load_manifest
from ..data.parallel import default_workers
from ..errors import UserError
from ..progress import bar
from ..run.conventions import CONVENTIONS, OVERLAPS, averaged, convention_of, counts
from ..run.evaluate import COLUMNS
from ..run.footer import footer
from ..run.metrics import EMPTY_RULE, LESIONS
from ..run.named import meaning
from ..run.pairs import Measure, find_pairs, measure_pairs, read_rows, write_rows
from .tables_told import print_lines, print_table, three_places

SHOWN = ("dice", "iou", "hd95", "asd", "sensitivity", "precision", "volume_error")
DETECTION = (  # what its numbers mean
    "lesions: connected pieces of the reference (26 neighbours); found: those of which the prediction covers a tenth or more; spurious: pieces of the "
    "prediction of which less than a tenth lies in the reference",
    "lesion sensitivity: found / lesions; lesion precision: predicted pieces that are not spurious / all of them",
    "patients: one with a voxel of the class in the reference has it, and a single predicted voxel calls a patient positive, wherever it lies; "
    "low, high: Wilson's 95 % interval",
)


def evaluate_files(
    predicted: Path,
    reference: Path,
    console: Console,
    *,
    data: str | None,
    raw: bool,
    csv: Path | None,
    convention: str,
    lesions: tuple[str, ...],
    tolerances_mm: tuple[float, ...],
    workers: int | None,
) -> bool:
    """Pair, measure, write the rows, print tables and a line for every file left out; whether all files could be measured.

    Raises UserError: nothing to pair, a CSV that exists, an unknown convention, metric or class, `raw` without a data set.
    """
    convention_of(convention)
    out = csv or (predicted if predicted.is_dir() else predicted.parent) / "metrics.csv"
    if out.exists():
        raise UserError(f"{out}: exists already and is left as it is. Choose another --csv.")
    pairs, alone = find_pairs(predicted, reference)
    read = meaning(predicted, reference, data=data, raw=raw)
    manifest = read.manifest
    if read.told:
        console.print(read.told, highlight=False, markup=False)
    how = Measure(
        read.class_names,
        manifest=manifest.reference if manifest else None,
        predicted_names=read.predicted_names,
        reference_names=read.reference_names,
        method=(predicted if predicted.is_dir() else predicted.parent).resolve().name or "prediction",
        tolerances_mm=tolerances_mm,
        lesion_classes=lesions,
        raw_predictions=raw,
    )
    with bar(total=len(pairs), desc="evaluate", unit="case") as shown:
        measured = measure_pairs(pairs, how, workers=workers or default_workers(), on_case=shown.update)
    if len(pairs) == 1 and not alone and not measured.cases:
        raise UserError(measured.left_out[0])  # one line says it all
    for line in (*alone, *measured.left_out):
        console.print(line, highlight=False, markup=False)
    if not measured.cases:
        raise UserError(f"{predicted}: none of {len(pairs)} cases could be measured; the lines above say why.")
    write_rows(measured.rows, out)
    print_evaluation(measured.rows, console, convention=convention, data_set=manifest.name if manifest else None)
    console.print(f"{out}: {measured.cases} cases, {len(alone) + len(measured.left_out)} files left out.", highlight=False, markup=False)
    return not alone and not measured.left_out


def evaluate_rows(path: Path, console: Console, *, data: str | None, convention: str) -> None:
    """Print the tables of rows that were measured before, under any convention. Raises UserError: no such rows, or those of several methods."""
    rows = read_rows(path, columns=COLUMNS)
    if (count := rows["method"].nunique()) != 1:
        raise UserError(f"{path}: found {count} methods, expected one; home compare takes several, home tables those of a run on the demo.")
    print_evaluation(rows, console, convention=convention, data_set=load_manifest(data).name if data else None)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a class, then the mean over classes: its counts, and the mean over cases of every metric. Background takes no part."""
    kept = rows[(rows["class"] != "background") & ~rows["metric"].isin(LESIONS)]
    metrics = [name for name in dict.fromkeys(kept["metric"]) if name in SHOWN or name.startswith("nsd_")]
    classes = list(dict.fromkeys(kept["class"]))
    values = kept.groupby(["class", "metric"])["value"].mean().unstack().reindex(index=classes, columns=metrics)
    values.loc["mean"] = values.mean()
    one = kept.drop_duplicates(["case", "class"])
    told = pd.DataFrame([counts(one[one["class"] == name]) for name in classes] + [counts(one)], index=values.index)
    return pd.concat([told, values], axis=1)


def detection(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a class whose lesions were counted: lesion-wise sensitivity and precision, and by patient (does the case have any?) sensitivity and
    specificity with Wilson's 95 % interval; NaN where there is nothing to count."""
    lines = []
    for name, part in rows[rows["metric"].isin(LESIONS)].groupby("class", sort=False):
        total = part.groupby("metric")["value"].sum()
        cases = part.drop_duplicates("case")
        ill, called = cases["reference_voxels"] > 0, cases["predicted_voxels"] > 0
        line = {
            "class": name,
            "lesions": int(total["lesions_reference"]),
            "found": int(total["lesions_found"]),
            "spurious lesions": int(total["lesions_spurious"]),
            "lesion sensitivity": _share(total["lesions_found"], total["lesions_reference"]),
            "lesion precision": _share(total["lesions_predicted"] - total["lesions_spurious"], total["lesions_predicted"]),
        }
        for what, right, of in (("sensitivity", ill & called, ill), ("specificity", ~ill & ~called, ~ill)):
            hits, number = int(right.sum()), int(of.sum())
            span = binomtest(hits, number).proportion_ci(method="wilson") if number else (np.nan, np.nan)
            line |= {f"patients ({what})": number, f"patient {what}": _share(hits, number), f"{what} low": span[0], f"{what} high": span[1]}
        lines.append(line)
    return pd.DataFrame(lines).set_index("class") if lines else pd.DataFrame()


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def print_evaluation(rows: pd.DataFrame, console: Console, *, convention: str = "own", data_set: str | None = None) -> None:
    """The summary of the rows, under a convention where one is asked for, with definitions, rule and counts."""
    cases = rows["case"].nunique()
    if convention == "own":
        table, title = summary(rows), f"mean over {cases} cases, {labels_told(rows)}; own convention: {CONVENTIONS['own'].definition}"
        shown, rule = set(table), EMPTY_RULE
    else:
        chosen = convention_of(convention, data_set=data_set)
        flat = averaged(rows, chosen)
        table = flat.pivot_table(index="class", columns="metric", values="value", sort=False, dropna=False)
        told = flat.drop_duplicates("class").set_index("class")[["references", "missed", "spurious"]]
        table, title = pd.concat([told, table], axis=1), f"{cases} cases, {labels_told(rows)}; convention {chosen.name}: {chosen.definition}"
        shown, rule = {*OVERLAPS, chosen.distance_metric}, "as the convention says."
    print_table(table, title, console, number=three_places)
    if not (found := detection(rows)).empty:
        print_table(found.astype(object).T.rename_axis("detection"), "lesions and patients", console, number=three_places)
        print_lines(DETECTION, console)
    print_lines(footer(rows, [name for name in dict.fromkeys(rows["metric"]) if name in shown], rule=rule), console)


def labels_told(rows: pd.DataFrame) -> str:
    """Where the reference labels of the cases come from: "labels MODEL", or with the number of cases where they differ."""
    if "label_origin" not in rows:
        return "labels of an origin that is not told"
    number = rows.drop_duplicates(["case", "label_origin"])["label_origin"].value_counts(sort=False)
    return "labels " + (number.index[0] if len(number) == 1 else ", ".join(f"{origin} ({count})" for origin, count in number.items()))
