"""Results that took too long for a notebook: measured by a command of `benchmarks/`, kept in `benchmarks/results`, shown as they stand there."""

import json

import pandas as pd

from ..errors import UserError
from ..paths import shipped


def networks_over_seeds() -> pd.DataFrame:
    """Mean Dice over structures (percent) by direction, patient and network, over seeds, with the 95 % interval of that mean (Student's t).

    Returns:
        One row a network: direction, patient (the one trained on, or the one never seen), network, M parameters, steps, seeds, Dice %, low, high.

    Raises:
        UserError: the results are not there; `python -m benchmarks.three_seeds` makes them.
    """
    try:
        path = shipped("benchmarks") / "results" / "three_seeds.json"
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError("three_seeds.json: not there, expected in benchmarks/results. `python -m benchmarks.three_seeds` in a clone makes it.") from None
    runs, table = pd.DataFrame(kept["runs"]), pd.DataFrame(kept["over_seeds"])
    about = runs.groupby(["direction", "network"], as_index=False)[["parameters", "steps"]].first()
    table = table.merge(about, on=["direction", "network"], how="left", sort=False)
    table["patient"] = table["role"].map({"train": "trained on", "test": "never seen"})
    table["M parameters"] = table["parameters"] / 1e6
    table["Dice %"], half = 100 * table["dice"], 100 * table["half_width"]
    table["low"], table["high"] = table["Dice %"] - half, table["Dice %"] + half
    return table[["direction", "patient", "network", "M parameters", "steps", "seeds", "Dice %", "low", "high"]]
