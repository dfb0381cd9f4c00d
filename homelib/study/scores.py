"""What the arms of a grid scored: means over runs with intervals, paired differences, and which arms are not to be told from the best one.

A *run* is an arm with one seed and fold; its score is the mean over classes (background takes no part) and cases. Two arms are compared on the seeds
and folds that both have, so that what a seed or a fold does to both cancels out. Where six cases or more differ the case is the unit that is tested
(Wilcoxon's signed ranks, `statistics.compare`), for a claim about patients; with fewer it is the run (Student's t), which says no more than that the
arms differ in training on these very patients. Holm's correction is over all pairs of a table. Where an arm is rightly empty and another is not, it
counts as the best (`statistics.compared`).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import UserError
from ..run.metrics import metric_of
from .comparison import BASELINES
from .statistics import compare, compared, holm

COLUMNS = ("arm", "seed", "fold", "case", "class", "metric", "value", "reference_voxels", "predicted_voxels")
LEVEL = 0.05
BEST, ALIKE = "best", "alike"


def read_results(path: str | Path) -> pd.DataFrame:
    """Tidy rows of a grid's `results.csv`, or of the folder with it: those of its networks on test cases, without baselines.

    Raises UserError: no such file, columns missing, or no row left.
    """
    file = Path(path) / "results.csv" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such file; `home ablate collect` writes it.")
    rows = pd.read_csv(file, dtype={"case": str, "fold": str, "arm": str}, keep_default_na=False, na_values={"value": ["", "nan", "NaN"]})
    if missing := [column for column in COLUMNS if column not in rows]:
        raise UserError(f"{file}: no column {', '.join(missing)}, expected what `home ablate collect` writes.")
    if "role" in rows:
        rows = rows[(rows["role"] == "test") & ~rows["method"].isin(BASELINES)]
    if rows.empty:
        raise UserError(f"{file}: no rows of test cases; is a run of the grid finished?")
    return rows.reset_index(drop=True)


def by_run(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Score of every run: one row a seed and fold, one column an arm, NaN where a run is lacking. Raises UserError for a metric that was not measured."""
    by_case = compared(rows, metric).groupby(["arm", "seed", "fold", "case"])["value"].mean()
    table = by_case.groupby(["arm", "seed", "fold"]).mean().unstack("arm")
    return table[[arm for arm in dict.fromkeys(rows["arm"]) if arm in table]]


def mean_interval(values: np.ndarray, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of values (n,), and Student's interval of it: for the few runs that there are, where a bootstrap would be too sure. NaN with fewer than two.

    >>> mean_interval(np.array([1.0, 2.0, 3.0]))
    (2.0, -0.4841377118331593, 4.484137711833159)
    """
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def differences(rows: pd.DataFrame, metric: str, *, against: str, confidence: float = 0.95) -> pd.DataFrame:
    """Every other arm less `against`, run by run.

    Returns:
        One line an arm: arm, runs (that both have), difference, low, high (Student's interval over runs), unit ("cases" or "runs", what was tested),
        p, p_holm (NaN where there is one run alone).

    Raises:
        UserError: an unknown arm or metric.
    """
    table = by_run(rows, metric)
    if against not in table:
        raise UserError(f"arm: found {against!r}, expected one of {', '.join(table)}.")
    tested = _by_cases(rows, metric, against)
    lines = []
    for arm in table.columns.drop(against):
        pairs = (table[arm] - table[against]).dropna().to_numpy()
        mean, low, high = mean_interval(pairs, confidence=confidence)
        unit, p = ("cases", tested[arm]) if arm in tested else ("runs", _t_test(pairs))
        lines.append({"arm": arm, "runs": len(pairs), "difference": mean, "low": low, "high": high, "unit": unit, "p": p})
    found = pd.DataFrame(lines, columns=["arm", "runs", "difference", "low", "high", "unit", "p"])
    known = found["p"].notna().to_numpy()
    found["p_holm"] = np.nan
    found.loc[known, "p_holm"] = holm(found["p"].to_numpy(float)[known])
    return found


def scores(rows: pd.DataFrame, metric: str, *, confidence: float = 0.95) -> pd.DataFrame:
    """One line an arm: arm, runs, cases, mean, low, high (Student's interval over runs), difference to the best arm, p_holm of it, and mark.

    The mark is "best" for the best mean, "alike" for an arm that is not significantly worse than it (p_holm of at least 0.05), "" else; an arm that
    cannot be tested, of one run alone, has none.
    """
    table = by_run(rows, metric)
    higher = metric_of(metric).higher_is_better
    means = table.mean()
    best = None if higher is None or means.isna().all() else means.idxmax() if higher else means.idxmin()
    beside = differences(rows, metric, against=best, confidence=confidence).set_index("arm") if best is not None else None
    cases = rows[rows["metric"] == metric].groupby("arm")["case"].nunique()
    lines = []
    for arm in table:
        mean, low, high = mean_interval(table[arm].to_numpy(), confidence=confidence)
        line = {"arm": arm, "runs": int(table[arm].notna().sum()), "cases": int(cases[arm]), "mean": mean, "low": low, "high": high}
        if beside is None or arm == best:
            lines.append(line | {"difference": 0.0 if arm == best else float("nan"), "p_holm": float("nan"), "mark": BEST if arm == best else ""})
        else:
            p = float(beside.loc[arm, "p_holm"])
            lines.append(line | {"difference": float(beside.loc[arm, "difference"]), "p_holm": p, "mark": ALIKE if p >= LEVEL else ""})
    return pd.DataFrame(lines)


def _t_test(pairs: np.ndarray) -> float:
    """Two-sided p of a mean difference of zero; 1 where all are zero, NaN for fewer than two pairs."""
    if len(pairs) < 2:
        return float("nan")
    if np.ptp(pairs) == 0:  # no spread: a difference that every run has alike, to the last digit
        return 1.0 if pairs[0] == 0 else 0.0
    return float(stats.ttest_1samp(pairs, 0).pvalue)


def _by_cases(rows: pd.DataFrame, metric: str, against: str) -> dict[str, float]:
    """Arm -> p over cases, where it can be told (`statistics.compare`) of those common to it and `against`; of means over the seeds and folds of both."""
    found = {}
    kept = compared(rows, metric)
    for arm in dict.fromkeys(kept["arm"]):
        pair = kept[kept["arm"].isin([arm, against])]
        keys = ["seed", "fold", "case"]
        both = pair.groupby(keys)["arm"].transform("nunique") == 2
        pair = pair[both]
        if arm != against and not pair.empty:
            found[arm] = float(compare(pair.assign(method=pair["arm"]), metric, against=against)["p"].iloc[0])
    return {arm: p for arm, p in found.items() if not np.isnan(p)}
