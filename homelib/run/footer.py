"""What stands below every table of results: what its numbers mean, what an empty mask counts, and how many structures a mean hides."""

import textwrap
from collections.abc import Iterable, Sequence

import pandas as pd

from .conventions import counts
from .metrics import DIAGONAL, EMPTY_RULE, metric_of

STRUCTURE = ["run", "arm", "seed", "fold", "role", "method", "case", "class"]  # columns that tell one from another, where rows have them


def footer(rows: pd.DataFrame, metrics: Sequence[str], *, by: str = "method", rule: str = EMPTY_RULE) -> tuple[str, ...]:
    """Lines for a table of some metrics, made of tidy rows.

    Args:
        rows: all that the table was made of.
        metrics: those that it shows.
        by: the column whose values stand beside each other in it; structures are counted for each.
        rule: what an empty mask counts.
    """
    return (*definitions(metrics), f"Empty masks: {rule}", structures(rows, by=by))


def definitions(metrics: Sequence[str]) -> list[str]:
    """A line a metric: unit, direction, best and worst, definition."""
    lines = []
    for metric in map(metric_of, metrics):
        direction = {True: "higher is better", False: "lower is better", None: "a fact" if metric.best is None else "nearer the best is better"}
        ends = (
            ""
            if metric.best is None
            else f", best {metric.best:g}"
            + ("" if metric.worst is None else ", worst the image's diagonal" if metric.worst == DIAGONAL else f", worst {metric.worst:g}")
        )
        lines.append(f"{metric.name} [{metric.unit}]: {metric.definition} ({direction[metric.higher_is_better]}{ends})")
    return lines


def wrapped(lines: Iterable[str], *, width: int = 120) -> str:
    """Lines to be printed in a notebook, broken between words: JupyterLab breaks a long one wherever it ends.

    >>> wrapped(["a line of words", "another"], width=9)
    'a line of\\nwords\\nanother'
    """
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)


def structures(rows: pd.DataFrame, *, by: str = "method") -> str:
    """How many there are in the references, how many of them are missed, and how many were found where there are none; background takes no part.

    >>> about = {"case": "1", "metric": "dice", "predicted_voxels": 0}
    >>> rows = pd.DataFrame([about | {"class": name, "reference_voxels": voxels} for name, voxels in (("liver", 9), ("spleen", 0))])
    >>> structures(rows)
    'Structures: 1 in the references, 1 missed, 0 spurious.'
    """
    kept = rows[rows["class"] != "background"]
    kept = kept.drop_duplicates([column for column in STRUCTURE if column in kept])
    groups = list(kept.groupby(by, sort=False)) if by in kept else [("", kept)]
    told = []
    for name, part in groups:
        its = counts(part)
        told.append((f"{name}: " if len(groups) > 1 else "") + f"{its['references']} in the references, {its['missed']} missed, {its['spurious']} spurious")
    return f"Structures: {'; '.join(told)}."
