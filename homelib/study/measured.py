"""Results that took too long for a notebook: measured by a command of `benchmarks/`, kept in `benchmarks/results`, shown as they stand there."""

import json
from pathlib import Path

import pandas as pd

from ..data.manifest import load_manifest
from ..errors import UserError
from ..paths import shipped
from .balance import LAYER
from .specialists import SIGNIFICANT, over_seeds, specialists


def networks_over_seeds() -> pd.DataFrame:
    """Mean Dice over structures (percent) by direction, patient and network, over seeds, with the 95 % interval of that mean (Student's t).

    Returns:
        One row a network: direction, patient (the one trained on, or the one never seen), network, M parameters, steps, seeds (by number: "0, 1, 2"),
        Dice %, low, high. And label origin, of the patient's reference.

    Raises:
        UserError: the results are not there; `python -m benchmarks.three_seeds` makes them.
    """
    kept = json.loads(_kept("three_seeds.json", "three_seeds").read_text())
    runs, table = pd.DataFrame(kept["runs"]), pd.DataFrame(kept["over_seeds"])
    about = runs.groupby(["direction", "network"], as_index=False).agg(parameters=("parameters", "first"), steps=("steps", "first"), seeds=("seed", _numbers))
    table = table.drop(columns="seeds").merge(about, on=["direction", "network"], how="left", sort=False)
    table["patient"] = table["role"].map({"train": "trained on", "test": "never seen"})
    table["M parameters"] = table["parameters"] / 1e6
    case = runs.groupby(["direction", "role"])["case"].first()
    table["label origin"] = [load_manifest("demo_ct").origin_of(case[at]) for at in zip(table["direction"], table["role"], strict=True)]
    table["Dice %"], half = 100 * table["dice"], 100 * table["half_width"]
    table["low"], table["high"] = table["Dice %"] - half, table["Dice %"] + half
    return table[["direction", "patient", "label origin", "network", "M parameters", "steps", "seeds", "Dice %", "low", "high"]]


def _numbers(seeds: pd.Series) -> str:
    return ", ".join(map(str, sorted(set(seeds))))


def routing_over_seeds() -> dict[str, pd.DataFrame]:
    """What `python -m benchmarks.routing_seeds` found of networks from several seeds on a scan that none of them saw; low, high: Student's over seeds.

    Returns:
        By name, a row a layer (stage, block, level): "information": bits that class and expert share, by chance, and in how many seeds beyond it;
        "stability": how alike the matched experts of two seeds are (mean over pairs), the band by chance, and how many pairs are beyond it;
        "without": mean change of Dice over classes without the layer (level 0), and with a level's routing shuffled (or bypassed, where that was measured);
        "specialists": change of a class's Dice without its own expert less that without another (`specialists`), and of how many classes a seed.

    Raises:
        UserError: the results are not there.
    """
    kept = {name: pd.read_csv(_kept(f"routing_seeds/{name}.csv", "routing_seeds")) for name in ("information", "stability", "lift", "knockout")}
    beyond = {name: kept[name].assign(beyond=kept[name]["p"] < SIGNIFICANT).groupby(LAYER, sort=False) for name in ("information", "stability")}
    information = over_seeds(kept["information"], "bits", by=LAYER)
    information["by chance"], information["seeds beyond"] = (
        beyond["information"][name].agg(how).to_numpy() for name, how in (("chance", "mean"), ("beyond", "sum"))
    )
    pairs = beyond["stability"].agg(
        similarity=("similarity", "mean"), low=("low", "mean"), high=("high", "mean"), pairs=("beyond", "size"), beyond=("beyond", "sum")
    )
    whole = kept["knockout"][kept["knockout"]["what"] != "expert"]
    found = specialists(kept["lift"], kept["knockout"])
    excess = over_seeds(found, "excess", by=LAYER)
    excess["classes a seed"] = found.groupby([*LAYER, "seed"], sort=False).size().groupby(LAYER, sort=False).mean().to_numpy()
    without = over_seeds(whole, "change", by=[*LAYER, "what"])
    return {"information": information, "stability": pairs.reset_index(), "without": without, "specialists": excess}


def said_over_seeds(tables: dict[str, pd.DataFrame]) -> list[str]:
    """`routing_over_seeds` in a line a layer. "Associated with" is all that is said unless the classes lose more by their own expert than by others over
    the seeds, the interval of the excess being below zero; then it is "needs"."""
    lines = []
    excess = tables["specialists"].set_index(LAYER)
    for place, row in tables["information"].set_index(LAYER).iterrows():
        told = f"stage {place[0]}, block {place[1]}, level {place[2]}: class and expert share {row['bits']:.3f} bits ({row['low']:.3f} to {row['high']:.3f})"
        told += f", by chance {row['by chance']:.3f}; beyond it in {row['seeds beyond']:.0f} of {row['seeds']:.0f} seeds"
        if place in excess.index:
            own = excess.loc[place]
            verdict = "a class needs the expert that goes with it" if own["high"] < 0 else "associated with, and no more"
            interval = f"{own['low']:+.3f} to {own['high']:+.3f}" if own["seeds"] > 1 else "one seed, no interval"
            much = f"{own['excess']:+.3f} ({interval})"
            told += f". Without its own expert the Dice of a class changes by {much} more than without another: {verdict}"
        else:
            told += ". No class has an expert beyond chance"
        lines.append(told + ".")
    return lines


def _kept(name: str, made_by: str) -> Path:
    """A file of `benchmarks/results`, which a clone has, and a wheel as far as notebooks show it (pyproject.toml). Raises UserError where it is not there."""
    try:
        path = shipped("benchmarks") / "results" / name
    except FileNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise UserError(f"{name}: not there, expected in benchmarks/results. `python -m benchmarks.{made_by}` in a clone makes it.")
    return path
