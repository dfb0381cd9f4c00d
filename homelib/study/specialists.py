"""Does a class lose most by the expert that goes with it? Association (`association.lift_table`) put beside knock-outs (`knockout.effects`).

An expert that is merely near a class in space, or that others stand in for, is associated with it and can be missed without loss. A specialist cannot.
"""

import pandas as pd

from .balance import LAYER
from .scores import mean_interval

SIGNIFICANT = 0.05


def specialists(lift: pd.DataFrame, knockout: pd.DataFrame) -> pd.DataFrame:
    """Of every layer and class that has an expert beyond chance (p < 0.05, lift above 1), the one with the highest lift, and what removing it does.

    Args:
        lift: of `lift_table`, of one network or of several with a column `seed`.
        knockout: of `effects`, likewise, of single experts.

    Returns:
        Columns (seed,) stage, block, level, class, expert, lift, own (change of the class's Dice without that expert), others (mean change without each of
        the layer's other experts), excess (own less others: below zero the class depends on its expert more than on others), scan_low and scan_high of own.
    """
    keys = [*(["seed"] if "seed" in lift else []), *LAYER, "class"]
    beyond = lift[(lift["p"] < SIGNIFICANT) & (lift["lift"] > 1) & (lift["class"] != "background")]
    chosen = beyond.loc[beyond.groupby(keys, sort=False)["lift"].idxmax(), [*keys, "expert", "lift"]]
    single = knockout[knockout["what"] == "expert"]
    own = chosen.merge(single[[*keys, "expert", "change", "scan_low", "scan_high"]], on=[*keys, "expert"]).rename(columns={"change": "own"})
    beside = single.merge(chosen[[*keys, "expert"]], on=keys, suffixes=("", "_chosen"))
    beside = beside[beside["expert"] != beside["expert_chosen"]]
    found = own.merge(beside.groupby(keys, sort=False)["change"].mean().rename("others").reset_index(), on=keys)
    return found.assign(excess=found["own"] - found["others"])[[*keys, "expert", "lift", "own", "others", "excess", "scan_low", "scan_high"]]


def over_seeds(table: pd.DataFrame, value: str, *, by: list[str]) -> pd.DataFrame:
    """Mean of `value` over seeds, each seed's rows averaged first, with Student's 95 % interval. Columns: by, seeds, value, low, high."""
    lines = []
    for names, part in table.groupby(by, sort=False):
        values = part.groupby("seed")[value].mean().to_numpy()
        mean, low, high = mean_interval(values)
        lines.append(dict(zip(by, names, strict=True)) | {"seeds": len(values), value: mean, "low": low, "high": high})
    return pd.DataFrame(lines, columns=[*by, "seeds", value, "low", "high"])
