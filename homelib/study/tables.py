"""Result tables: from the tidy rows of `metrics.csv` to what a person reads. Every mean is made here, from the rows, each time."""

from typing import TYPE_CHECKING, Any

import pandas as pd

from .printed import under_heads

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

LEFT: Any = {"selector": "th, td", "props": "text-align: left"}


def in_words(table: pd.DataFrame) -> "Styler":
    """For a notebook, a table of sentences rather than of numbers: whole, and set to the left.

    >>> in_words(pd.DataFrame({"remedy": ["Fetch it again."]})).hide()   # doctest: +SKIP
    """
    return table.style.set_table_styles([LEFT])


def dice_table(metrics: pd.DataFrame, *, role: str) -> pd.DataFrame:
    """Dice by class (rows) and method (columns), in percent, with the voxels of the reference and where it comes from; the last row is the mean over classes.

    Args:
        metrics: rows as `homelib.study.comparison.measure` gives them.
        role: "test" (the patient the network never saw) or "train".
    """
    rows = metrics[(metrics["role"] == role) & (metrics["metric"] == "dice")]
    classes, methods = (list(dict.fromkeys(rows[column])) for column in ("class", "method"))
    table = 100 * rows.groupby(["class", "method"])["value"].mean().unstack().reindex(index=classes, columns=methods)  # a pivot_table would drop absent classes
    about = rows.drop_duplicates("class").set_index("class")
    table.loc["mean"] = table.mean()
    table.insert(0, "reference voxels", [*about["reference_voxels"], about["reference_voxels"].sum()])
    table.insert(0, "label origin", [*about["label_origin"], ""])
    return table


def distance_table(metrics: pd.DataFrame, *, role: str) -> pd.DataFrame:
    """HD95 in mm by class, with the counts of voxels: missed and spurious structures have the image's diagonal, and are counted."""
    rows = metrics[(metrics["role"] == role) & (metrics["metric"] == "hd95")].set_index("class")
    table = rows[["method", "value", "reference_voxels", "predicted_voxels"]].rename(columns={"value": "HD95 mm"})
    table["missed"] = (table["reference_voxels"] > 0) & (table["predicted_voxels"] == 0)
    table["spurious"] = (table["reference_voxels"] == 0) & (table["predicted_voxels"] > 0)
    return table


def best_median_worst(metrics: pd.DataFrame, *, by: str, metric: str = "dice") -> dict[str, str]:
    """Which `by` ("case" or "class") has the highest, the middle and the lowest mean: what a figure must show, not what looks best.

    >>> best_median_worst(pd.DataFrame({"case": list("abc"), "class": "x", "metric": "dice", "value": [0.1, 0.9, 0.5]}), by="case")
    {'best': 'b', 'median': 'c', 'worst': 'a'}
    """
    rows = metrics[(metrics["metric"] == metric) & (metrics["class"] != "background")]
    ranked = rows.groupby(by, sort=False)["value"].mean().dropna().sort_values(ascending=False, kind="stable").index.tolist()
    return {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2 if len(ranked) > 2 else 0], "worst": ranked[-1]}


def means(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice over classes (percent), one row a run, role and method; a run is named by the column `run` where there is one."""
    keys = [key for key in ("run", "role", "case", "label_origin", "method") if key in metrics]
    rows = metrics[metrics["metric"] == "dice"]
    return (100 * rows.groupby(keys, sort=False)["value"].mean()).rename("mean Dice %").reset_index()


def to_markdown(table: pd.DataFrame, *, digits: int = 1) -> str:
    """A table in Markdown, numbers rounded and to the right."""
    cells = [
        [str(name), *(f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in row)]
        for name, row in zip(table.index, table.itertuples(index=False), strict=True)
    ]
    head = [str(table.index.name or ""), *map(str, table.columns)]
    lines = [head, under_heads([[line[i] for line in cells] for i in range(1, len(head))]), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
