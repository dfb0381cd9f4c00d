"""What `home train` prints beside its lines: an estimate before, and the folds after."""

from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from ..run.cohort import Cohort
from ..run.estimate import PAPER_DAYS, PAPER_EPOCHS, PAPER_GPUS, estimate, paper_seconds_a_patch
from .folds import by_class


def print_estimate(made: Cohort, console: Console) -> None:
    """Measure a few steps of a training and print hours, what takes most of them, and the disk rate by number of GPUs; memory; the paper's figure."""
    for line in made.told:
        console.print(line, highlight=False, markup=False)
    found = estimate(made.settings, made.train, made.validation, progress=True)
    table = Table(
        "GPUs", "hours", "of it validation", "most for", "MiB/s read", "loading processes a GPU", title=f"{found.steps} steps, {found.patches} patches"
    )
    for row in found.rows():
        hours = (f"{row[name]:.3g}" for name in ("hours", "of it validation"))
        table.add_row(str(row["GPUs"]), *hours, row["limit"], f"{row['MiB/s read']:.3g}", str(row["workers a GPU"]))
    console.print(table)
    measured = f"{found.step_seconds:.3g} s a step, {found.patch_seconds:.3g} s to make a patch, {found.patch_mib:.3g} MiB read for it"
    console.print(f"Measured here ({found.device}): {measured}. Memory of a device: {found.memory_gib:.3g} GiB.", highlight=False)
    if found.validation_cases:
        console.print(
            f"Validation: {found.validations} times {found.validation_cases} cases, {found.validation_seconds:.3g} s each on one device. "
            "Fewer: training.validation_cases_most, training.validate_every.",
            highlight=False,
        )
    console.print("Hours are those of as many devices like this one that never wait for each other: a lower bound.", highlight=False)
    paper = f"{PAPER_EPOCHS} epochs of pre-training, patches of 96 cubed, in {PAPER_DAYS} days on {PAPER_GPUS} H100"
    console.print(f"The paper: {paper}, {paper_seconds_a_patch():.2g} s a patch and GPU.", highlight=False)


def print_folds(found: pd.DataFrame, folder: Path, console: Console) -> None:
    """Dice by class and fold, of the table that `folds.collect` makes."""
    classes = by_class(found)
    table = Table("class", *classes.columns, title="validation Dice of each fold's best weights, chosen by it")
    for name, row in classes.iterrows():
        table.add_row(str(name).replace("_", " "), *(f"{value:.3f}" for value in row))
    console.print(table, f"{folder / 'folds.csv'}: one row a case and class", sep="\n", highlight=False)
