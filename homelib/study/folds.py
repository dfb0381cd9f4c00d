"""Cross-validation: one run a fold, each validated on its own, and what they found together."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import Settings
from ..paths import written_whole
from ..run.cohort import DataSet, cohort, folds_of
from ..run.folder import Run
from ..run.train import fit
from .routing_log import watch_of


def train_folds(
    settings: Settings, sets: Sequence[DataSet], folder: str | Path, *, changes: Mapping[str, Any] | None = None, say: Callable[[str], None] = print
) -> pd.DataFrame:
    """Train every fold, in `folder/fold-0` and so on, then `collect`. What is finished is not done again."""
    for fold in range(folds_of(sets)):
        run = Run(Path(folder) / f"fold-{fold}")
        made = cohort(settings, sets, fold=fold, changes=changes).at_hand(say)
        watch = watch_of(made.settings, run.folder, made.train, made.validation)
        fit(made.settings, made.train, run.folder, validation=made.validation, on_validation=watch)
        say(f"{run.folder}: done, {len(run.history)} steps")
    return collect(folder)


def collect(folder: str | Path) -> pd.DataFrame:
    """The validation Dice of all folds that are there, each with its best weights; writes `folds.csv`.

    Returns:
        Columns fold, case, class, dice, step (of the best weights). A case is in one fold alone, so that all rows are of cases not trained on.
    """
    tables = []
    for path in sorted(Path(folder).glob("fold-*/validation.csv")):
        table = pd.read_csv(path, dtype={"case": str})  # 007 is a name
        table.insert(0, "fold", int(path.parent.name.removeprefix("fold-")))
        tables.append(table)
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["fold", "case", "class", "dice", "step"])
    with written_whole(Path(folder) / "folds.csv") as part:
        found.to_csv(part, index=False)
    return found


def by_class(found: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of each class in each fold, and over all cases; the last row is the mean over classes."""
    table = found.pivot_table(index="class", columns="fold", values="dice", aggfunc="mean", sort=False)
    table.columns = [f"fold {fold}" for fold in table.columns]
    table["all"] = found.groupby("class", sort=False)["dice"].mean()
    table.loc["mean"] = table.mean()
    return table
