"""What `home compare` says: methods beside each other on the same cases, with intervals, paired tests, a ranking, and how much of it is the seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from ..errors import UserError
from ..run.footer import footer
from ..run.metrics import metric_of
from ..run.pairs import read_rows
from .comparison import BASELINES
from .evaluation_report import labels_told
from .statistics import FEWEST, by_case, compare, intervals, ranking, seeds
from .tables_told import print_lines, print_table


def gather(methods: list[str]) -> pd.DataFrame:
    """Tidy rows of several `metrics.csv`, with columns method and seed.

    Args:
        methods: NAME=PATH, or PATH, whose method is then its folder's name. A path is a CSV or a folder with a metrics.csv. One name given
            several times: runs of one method from several seeds. Of a run on the demo, the network's rows on the patient it never saw.

    Raises:
        UserError: no such file, columns missing, a run without rows of its network, or one name for two methods that nobody has named.
    """
    parts, unnamed = [], set()
    seen: Counter[str] = Counter()
    for told in methods:
        name, path, given = _named(told)
        if name in unnamed or (seen[name] and not given):
            raise UserError(f"{told}: found the name {name} again, expected NAME=PATH for each: two names for two methods, one name for two seeds of one.")
        unnamed |= set() if given else {name}
        rows = read_rows(path / "metrics.csv" if path.is_dir() else path)
        if "role" in rows:  # a run's own metrics.csv, with baselines beside the network and the training patient beside the test patient
            rows = rows[(rows["role"] == "test") & ~rows["method"].isin(BASELINES)]
            if rows.empty:
                raise UserError(f"{path}: found no rows of the network on a patient it never saw, expected some; `home evaluate` measures the run anew.")
        parts.append(rows.assign(method=name, seed=seen[name]))
        seen[name] += 1
    return pd.concat(parts, ignore_index=True)


def _named(told: str) -> tuple[str, Path, bool]:
    """The method's name, its path, and whether the name was given."""
    name, equals, path = told.partition("=")
    if equals and name and not Path(told).exists():
        return name, Path(path), True
    place = Path(told)
    return (place.parent if place.suffix == ".csv" else place).resolve().name, place, False


def print_comparison(rows: pd.DataFrame, console: Console, *, metric: str, against: str | None = None) -> None:
    """Intervals by class, ranking, paired tests, and seeds where a method has several.

    Raises UserError: an unknown metric or method, methods that were measured on different cases.
    """
    if metric not in set(rows["metric"]):
        raise UserError(f"--metric: found {metric!r}, expected one of {', '.join(sorted(set(rows['metric'])))}.")
    about, cases = metric_of(metric), len(by_case(rows, metric))
    better = {True: "higher is better", False: "lower is better", None: "a fact"}[about.higher_is_better]
    found = intervals(rows, metric)
    found["shown"] = [
        f"{mean:.3f}" + ("" if np.isnan(low) else f" ({low:.3f} to {high:.3f})")
        for mean, low, high in zip(found["mean"], found["low"], found["high"], strict=True)
    ]
    by_class = found.pivot_table(index="class", columns="method", values="shown", aggfunc="first", sort=False)
    methods = list(dict.fromkeys(rows["method"]))
    by_class = by_class[methods].reindex([*[name for name in by_class.index if name != "mean"], "mean"])
    how = f"mean over {cases} cases, {labels_told(rows)}, with its 95 % interval (bootstrap over cases); mean: over a case's classes, then over cases"
    print_table(by_class, f"{metric} [{about.unit}], {better}: {how}", console)
    if about.higher_is_better is not None and len(methods) > 1:
        ranks = ranking(rows, metric).set_index("method")
        print_table(ranks, "ranking, and where it stands when the cases are drawn anew (first: how often best)", console)
    if len(methods) > 1:
        tests = compare(rows, metric, against=against)
        tests.index = pd.Index(tests.pop("first") + " - " + tests.pop("second"), name="pair")
        print_table(tests, "paired differences: Wilcoxon's signed-rank test, Holm's correction", console)
        for pair, line in tests[tests["p"].isna()].iterrows():
            told = f"{line['differ']} of {line['cases']} cases differ, and a two-sided test cannot reach 0.05 with fewer than {FEWEST}"
            console.print(f"No p value for {pair}: {told}.", highlight=False, markup=False)
    if rows["seed"].nunique() > 1:
        print_table(seeds(rows, metric).set_index("method"), "seeds: seed_sd between the seeds' means, case_sd between the cases", console)
    print_lines(footer(rows[rows["metric"] == metric], [metric]), console)
    if about.worst is not None:
        console.print(
            "Where one method is rightly empty and another is not, the first counts as the best value here, else the pair would drop out.", highlight=False
        )
