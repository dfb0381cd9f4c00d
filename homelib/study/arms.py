"""What a grid says: its arms beside each other, paired by seed and fold, from the rows that `Sweep.collect` has put together.

The unit is the run. With three seeds the interval is wide, and that is what three seeds tell: it is Student's, over the pairs.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import UserError
from .comparison import BASELINES

RESULTS = Path(__file__).parent / "results"  # tables that were made and committed: <grid>.csv, as `home ablate collect` writes it
CONFIDENCE = 0.95


def committed(grid: str) -> pd.DataFrame | None:
    """The committed results of a grid; None where there are none."""
    file = RESULTS / f"{grid}.csv"
    return pd.read_csv(file) if file.exists() else None


def scores(results: pd.DataFrame, metric: str = "dice") -> pd.DataFrame:
    """One row a run: run, arm, seed, fold, and `score`, the mean over classes and over the patients that it never saw.

    The baselines that every run is measured beside (`untrained network` and so on), and the patients that it was trained on, take no part.

    Raises UserError: no rows of the metric.
    """
    kept = results[(results["metric"] == metric) & (results["class"] != "background") & ~results["method"].isin(BASELINES)]
    kept = kept[kept["role"] == "test"] if "role" in kept else kept
    if kept.empty:
        raise UserError(f"metric: found {metric!r}, expected one of {', '.join(sorted(set(results['metric'])))}.")
    return kept.groupby(["run", "arm", "seed", "fold"], sort=False, dropna=False)["value"].mean().rename("score").reset_index()


def by_arm(results: pd.DataFrame, baseline: str, *, metric: str = "dice") -> pd.DataFrame:
    """Arms beside the baseline, in the order of the grid.

    Returns:
        Index arm; runs, mean, sd (over runs), and, over the pairs of one seed and fold: pairs, difference (to the baseline), low, high (its interval,
        NaN with fewer than two pairs).

    Raises:
        UserError: a baseline that has no finished run.
    """
    found = scores(results, metric)
    if baseline not in set(found["arm"]):
        raise UserError(f"baseline: found {baseline!r} without a finished run, expected one of {', '.join(dict.fromkeys(found['arm']))}.")
    table = found.assign(fold=found["fold"].astype(str)).set_index(["arm", "seed", "fold"])["score"]
    lines = {}
    for arm in dict.fromkeys(found["arm"]):
        its = table.loc[arm]
        low = high = difference = float("nan")
        pairs = (its - table.loc[baseline]).dropna()
        if arm != baseline and len(pairs):
            difference = float(pairs.mean())
            low, high = _interval(pairs.to_numpy())
        paired = {"pairs": 0 if arm == baseline else len(pairs), "difference": difference, "low": low, "high": high}
        lines[arm] = {"runs": len(its), "mean": float(its.mean()), "sd": float(its.std(ddof=1))} | paired
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("arm")


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of a mean."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half
