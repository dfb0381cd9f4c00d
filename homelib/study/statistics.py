"""How sure a difference is: intervals by bootstrap, paired tests with Holm's correction, effect sizes, rankings and how stable they are, seeds.

Everything starts from the tidy rows of `homelib.run.evaluate`; the unit that is drawn and paired is the case (a patient), never the voxel, nor
the class: a case's value is the mean over its classes, and over seeds where rows have a column `seed`.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import UserError
from ..run.metrics import metric_of

RESAMPLES = 10_000
FEWEST = 6  # pairs that differ, below which a two-sided Wilcoxon test cannot reach 0.05: it leaves out the others


def by_case(rows: pd.DataFrame, metric: str, *, classes: tuple[str, ...] | None = None) -> pd.DataFrame:
    """(case, method) means over classes, and over seeds: one row a case, one column a method. Background takes no part; NaN is left out.

    Raises UserError: no rows of the metric, or methods that were measured on different cases or classes.
    """
    kept = compared(rows, metric)
    if classes is not None:
        kept = kept[kept["class"].isin(classes)]
    for what, plural in (("case", "cases"), ("class", "classes")):
        of = {method: set(part[what]) for method, part in kept.groupby("method", sort=False)}
        common = set.intersection(*of.values())
        for method, its in of.items():
            if its != common:
                told = f"{len(its)} {plural}, {len(common)} of them in all methods ({', '.join(sorted(its - common)[:3])} not)"
                raise UserError(f"method {method}: found {told}, expected the same {plural}. Measure the others too.")
    return kept.groupby(["case", "method"], sort=False)["value"].mean().unstack("method")[list(dict.fromkeys(kept["method"]))]


def compared(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric without the background. Where a method is rightly empty and another is not, the first has no number and the second the
    worst: beside each other the first counts as the best. Raises UserError where there are none."""
    kept = rows[(rows["metric"] == metric) & (rows["class"] != "background")]
    if kept.empty:
        raise UserError(f"metric: found {metric!r}, expected one of {', '.join(sorted(set(rows['metric'])))}.")
    about = metric_of(metric)
    if about.best is None or about.worst is None:
        return kept
    told_of_some = kept["value"].notna().groupby([kept["case"], kept["class"]]).transform("any")
    return kept.assign(value=kept["value"].mask(kept["value"].isna() & told_of_some, about.best))


def interval(values: np.ndarray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean of values (n,), one a case (bias-corrected and accelerated); NaN where there are fewer than two, the value itself where
    all are one."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, confidence_level=confidence, n_resamples=resamples, method="BCa", rng=np.random.default_rng(seed))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def intervals(rows: pd.DataFrame, metric: str, *, confidence: float = 0.95, resamples: int = RESAMPLES) -> pd.DataFrame:
    """One line a method and class, with the mean over cases, its interval and the number of cases; and one a method over classes (`mean`)."""
    table, kept = by_case(rows, metric), compared(rows, metric)
    lines = []
    for method in table:
        part = kept[kept["method"] == method]
        groups = [(name, group.groupby("case")["value"].mean().to_numpy()) for name, group in part.groupby("class", sort=False)]
        for name, values in [*groups, ("mean", table[method].to_numpy())]:
            values = values[np.isfinite(values)]
            low, high = interval(values, confidence=confidence, resamples=resamples)
            mean = float(values.mean()) if len(values) else float("nan")
            lines.append({"method": method, "class": name, "mean": mean, "low": low, "high": high, "cases": len(values)})
    return pd.DataFrame(lines)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's corrected p values (n,), in the order given.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, float)
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty(len(p))
    result[order] = np.minimum(corrected, 1)
    return result


def compare(rows: pd.DataFrame, metric: str, *, against: str | None = None, classes: tuple[str, ...] | None = None) -> pd.DataFrame:
    """Paired two-sided Wilcoxon signed-rank tests between methods, corrected by Holm over all of them.

    Args:
        against: compare this method with each other one; None compares all pairs.

    Returns:
        One line a pair: first, second, cases, differ (in how many of them the two are not alike), difference (mean of first - second), low, high (its
        bootstrap interval), p, p_holm, rank_biserial (from -1 to 1: share of rank sums for the first less those for the second), cohen_dz (mean
        difference over its standard deviation), better ("first" or "second" by the metric's direction, "" for none). p is NaN where fewer than six
        cases differ, which cannot reach 0.05; 1 where six or more are all alike.

    Raises:
        UserError: an unknown method, one method alone, or methods measured on different cases.
    """
    table = by_case(rows, metric, classes=classes)
    if against is not None and against not in table:
        raise UserError(f"method: found {against!r}, expected one of {', '.join(table)}.")
    pairs = [(against, other) for other in table if other != against] if against is not None else list(combinations(table, 2))
    if not pairs:
        raise UserError(f"methods: found {', '.join(table)} alone, expected two or more to compare.")
    lines = [_compared(table[first].to_numpy(float), table[second].to_numpy(float), metric) | {"first": first, "second": second} for first, second in pairs]
    found = pd.DataFrame(lines)
    tested = found["p"].notna().to_numpy()
    found["p_holm"] = np.nan
    found.loc[tested, "p_holm"] = holm(found["p"].to_numpy()[tested])
    return found[["first", "second", "cases", "differ", "difference", "low", "high", "p", "p_holm", "rank_biserial", "cohen_dz", "better"]]


def _compared(a: np.ndarray, b: np.ndarray, metric: str) -> dict:
    both = np.isfinite(a) & np.isfinite(b)
    difference = a[both] - b[both]
    low, high = interval(difference)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    mean = float(difference.mean()) if len(difference) else float("nan")
    apart = difference[difference != 0]
    ranks = stats.rankdata(np.abs(apart))
    biserial = float((ranks[apart > 0].sum() - ranks[apart < 0].sum()) / ranks.sum()) if len(apart) else 0.0
    p = float("nan")
    if len(apart) >= FEWEST:
        p = float(stats.wilcoxon(apart).pvalue)
    elif len(difference) >= FEWEST and not len(apart):
        p = 1.0
    higher = metric_of(metric).higher_is_better
    better = "" if not mean or higher is None or np.isnan(mean) else "first" if (mean > 0) == higher else "second"
    dz = mean / spread if spread else float("nan")
    found = {"cases": len(difference), "differ": len(apart), "difference": mean, "low": low, "high": high, "p": p}
    return found | {"rank_biserial": biserial, "cohen_dz": dz, "better": better}


def ranking(rows: pd.DataFrame, metric: str, *, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Methods by their mean over cases, best first, and how stable that is when cases are drawn anew.

    Returns:
        Columns method, mean, rank, first (share of bootstrap samples in which it is first), rank_low and rank_high (2.5th and 97.5th percentile of
        its rank), mean_rank (over cases, each ranked by itself).
    """
    table = by_case(rows, metric)
    higher = metric_of(metric).higher_is_better
    values = table.to_numpy(float) * (-1 if higher else 1)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(values), size=(resamples, len(values)))
    ranks = stats.rankdata(np.nanmean(values[drawn], axis=1), axis=1, method="min")
    result = pd.DataFrame(
        {
            "method": list(table),
            "mean": table.mean().to_numpy(),
            "rank": stats.rankdata(np.nanmean(values, axis=0), method="min").astype(int),
            "first": (ranks == 1).mean(0),
            "rank_low": np.percentile(ranks, 2.5, axis=0),
            "rank_high": np.percentile(ranks, 97.5, axis=0),
            "mean_rank": np.nanmean(stats.rankdata(values, axis=1, nan_policy="omit"), axis=0),
        }
    )
    return result.sort_values("rank", kind="stable").reset_index(drop=True)


def seeds(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """How much of a method's number is the seed: rows need a column `seed`.

    Returns:
        One line a method: seeds, mean, seed_sd (standard deviation of the seeds' means over cases), case_sd (of the cases' means over seeds), lowest and
        highest seed. A difference between methods below about twice seed_sd is what another seed may undo.

    Raises:
        UserError: no column `seed`, or seeds measured on different cases.
    """
    if "seed" not in rows:
        raise UserError("rows: no column seed, expected the seed of each run. Add it when the runs' metrics are put together.")
    lines = []
    for method, part in compared(rows, metric).groupby("method", sort=False):
        table = part.groupby(["case", "seed"])["value"].mean().unstack("seed")
        measured = part.groupby("seed")["case"].unique().map(set)
        if any(cases != measured.iloc[0] for cases in measured):
            raise UserError(f"method {method}: its seeds were measured on different cases, expected the same ones. Measure the others too.")
        means = table.mean()
        sd = float(means.std(ddof=1)) if len(means) > 1 else float("nan")
        case_sd = float(table.mean(axis=1).std(ddof=1)) if len(table) > 1 else float("nan")
        about = {"method": method, "seeds": len(means), "mean": means.mean(), "seed_sd": sd, "case_sd": case_sd}
        lines.append(about | {"lowest": means.min(), "highest": means.max()})
    return pd.DataFrame(lines)
