"""Everything that `home routing` tells of one scan: tidy tables by name, and the few lines that sum them up."""

from collections.abc import Callable, Sequence

import pandas as pd
from torch import nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..run.predict import device_of, window_at
from .association import associations, information_table, lift_table
from .balance import LAYER, at_start, balance, use_of_experts
from .expert_maps import RoutingMaps
from .knockout import WHAT, Intervention, effect_intervals, effects
from .similarity import similarity

ABOUT = {
    "use": "load of every expert, and share of voxels that it wins",
    "balance": "how evenly and how sharply each layer routes; _start: the same network before training",
    "lift": "weight of every expert in every class, over its mean; low, high: the band by chance (shifts of the label); p allows for all cells of a layer",
    "information": "mutual information of class and expert in bits, with what shifts of the label leave of it",
    "similarity": "cosines of all pairs of tokens, slots and slot embeddings in a group, in the window in the scan's middle",
    "knockout": "Dice of every class with and without; scan_low, scan_high: 95 % within this scan",
}


def routing_tables(
    network: nn.Module,
    case: PreparedCase,
    settings: Settings,
    maps: RoutingMaps,
    *,
    shifts: int = 200,
    wanted: Sequence[Intervention] = (),
    on_prediction: Callable[[int], None] = lambda count: None,
) -> dict[str, pd.DataFrame]:
    """The tables of `ABOUT`, by name; lift and information where the scan is labelled, knockout where something is to be knocked out."""
    stages, blocks, levels = ([*dict.fromkeys(layer[place] for layer in maps.experts)] for place in range(3))
    start = at_start(case, settings, stages=stages, blocks=blocks, levels=levels)
    tables = {"use": use_of_experts(maps), "balance": balance(maps, start)}
    if maps.label is not None:
        found = associations(maps, shifts=shifts)
        tables |= {"lift": lift_table(found), "information": information_table(found)}
    middle = window_at(case, settings, [n // 2 for n in case.image.shape]).to(device_of(network))
    tables["similarity"] = similarity(network, middle, stages=stages)
    if wanted:
        tables["knockout"] = effects(network, [case], settings, wanted, on_prediction=on_prediction)
    return tables


def summary(tables: dict[str, pd.DataFrame]) -> list[str]:
    """A line a layer: how it routes, and the class and expert that are most clearly associated; then the largest losses by knock-out."""
    lines = []
    for _, row in tables["balance"].iterrows():
        stage, block, level = (int(row[name]) for name in LAYER)
        told = f"stage {stage}, block {block}, level {level}: entropy {row['entropy']:.3f} (untrained {row['entropy_start']:.3f})"
        told += f", busiest of {int(row['experts'])} experts {row['busiest']:.2f} times an even share"
        if "lift" in tables:
            told += _strongest(_of(tables["lift"], row), _of(tables["information"], row).iloc[0])
        lines.append(told)
    if "knockout" in tables:
        worst = effect_intervals(tables["knockout"]).query("`class` != 'mean'").nsmallest(5, "change")
        for _, row in worst.iterrows():
            what = Intervention(*(row[name] for name in WHAT))
            inside = f"{row['scan_low']:+.3f} to {row['scan_high']:+.3f} within this scan"
            lines.append(f"without {what}: Dice of {row['class']} {row['intact']:.3f} to {row['without']:.3f} ({row['change']:+.3f}; {inside})")
    return lines


def _of(table: pd.DataFrame, row: pd.Series) -> pd.DataFrame:
    return table[(table[LAYER] == row[LAYER].to_numpy()).all(axis=1)]


def _strongest(lift: pd.DataFrame, information: pd.Series) -> str:
    told = f"; class and expert share {information['bits']:.3f} bits (by chance {information['low']:.3f} to {information['high']:.3f})"
    beyond = lift[(lift["p"] < 0.05) & (lift["lift"] > 1) & (lift["class"] != "background")]
    if beyond.empty:
        return told + "; no expert is associated with a class beyond chance"
    best = beyond.loc[beyond["lift"].idxmax()]
    return told + f"; expert {best['expert']} is associated with {best['class']}, lift {best['lift']:.2f} (by chance {best['low']:.2f} to {best['high']:.2f})"
