"""Everything that `home routing` tells of one scan: tidy tables by name, as they are made, the few lines that sum them up, and the memory it takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn

from ..config import Settings
from ..data.prepare import PreparedCase
from ..run.needed import predicting
from ..run.predict import device_of, window_at
from .association import Association, information_table, lift_table
from .balance import LAYER, balance, use_of_experts
from .expert_maps import Layer, RoutingMaps, experts_of, maps_bytes
from .knockout import WHAT, Intervention, effect_intervals, effects
from .similarity import similarity
from .trace import stages_of

ABOUT = {
    "use": "load of every expert, and share of voxels that it wins",
    "balance": "how evenly and how sharply each layer routes; _start: the same network before training",
    "lift": "weight of every expert in every class, over its mean; low, high: the band by chance (shifts of the label); p allows for all cells of a layer",
    "information": "mutual information of class and expert in bits, with what shifts of the label leave of it",
    "similarity": "cosines of all pairs of tokens, slots and slot embeddings in a group, in the window in the scan's middle",
    "knockout": "Dice of every class with and without; scan_low, scan_high: 95 % within this scan; flipped: voxels of another class than before",
}


def routing_tables(
    network: nn.Module,
    case: PreparedCase,
    settings: Settings,
    maps: RoutingMaps,
    *,
    found: Mapping[Layer, Association] | None = None,
    start: pd.DataFrame | None = None,
    wanted: Sequence[Intervention] = (),
    on_prediction: Callable[[int], None] = lambda count: None,
    on_rows: Callable[[pd.DataFrame], None] = lambda rows: None,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tables of `ABOUT` as they are made, by name; those that take longest come last.

    Args:
        maps: of the case, by this network.
        found: `associations` of the maps; without them there is neither lift nor information.
        start: the balance before training (`balance` of `at_start`).
        wanted: what is to be knocked out; nothing makes no table of it.
        on_prediction, on_rows: as `effects`.
    """
    yield "use", use_of_experts(maps)
    yield "balance", balance(maps, start)
    if found is not None:
        yield "lift", lift_table(found)
        yield "information", information_table(found)
    stages, blocks, levels = ([*dict.fromkeys(layer[place] for layer in maps.experts)] for place in range(3))
    middle = window_at(case, settings, [n // 2 for n in case.image.shape]).to(device_of(network))
    yield "similarity", similarity(network, middle, stages=stages, blocks=blocks, levels=levels)
    if wanted:
        yield "knockout", effects(network, [case], settings, wanted, on_prediction=on_prediction, on_rows=on_rows)


def summary(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """A line a layer: how it routes, and the class and expert that are most clearly associated; then the largest losses by knock-out, and those without any."""
    lines = []
    for _, row in tables["balance"].iterrows():
        stage, block, level = (int(row[name]) for name in LAYER)
        told = f"stage {stage}, block {block}, level {level}: entropy {row['entropy']:.3f}"
        told += f" (untrained {row['entropy_start']:.3f})" if "entropy_start" in row else ""
        told += f", busiest of {int(row['experts'])} experts {row['busiest']:.2f} times an even share"
        if "lift" in tables:
            told += _strongest(_of(tables["lift"], row), _of(tables["information"], row).iloc[0])
        lines.append(told)
    if "knockout" in tables:
        over = effect_intervals(tables["knockout"])
        for _, row in over.query("`class` != 'mean'").nsmallest(5, "change").iterrows():
            inside = f"{row['scan_low']:+.3f} to {row['scan_high']:+.3f} within this scan"
            lines.append(f"{_named(row)}: Dice of {row['class']} {row['intact']:.3f} to {row['without']:.3f} ({row['change']:+.3f}; {inside})")
        lines += _without_effect(over[over["class"] == "mean"])
    return lines


def memory(
    network: nn.Module,
    case: PreparedCase,
    settings: Settings,
    layers: Sequence[Layer],
    *,
    slots: bool = False,
    shifts: bool = True,
    knock_out: bool = False,
    nifti: bool = True,
    native: bool = False,
) -> dict[str, int]:
    """Bytes beyond the network: `maps`, which stay, and what each part of the work takes beside them, one after the other.

    windows: of the maps, and of those before training. files: the largest NIfTI. shifts: transforms of the experts' maps for the band by chance, where the
    scan is labelled. knock-out: logits of the intact network, and a prediction.
    """
    whole, of_maps = int(np.prod(case.image.shape)), maps_bytes(network, case, settings, layers, slots=slots)
    most = max(experts_of(network, layer) for layer in layers)
    parts = {"maps": of_maps["maps"], "windows": of_maps["buffer"] + of_maps["window"]}
    if nifti:
        homes = [stages_of(network)[stage].blocks[block].home.local_router for stage, block, _ in layers]
        frames = max([most, *(home.experts * home.slots for home in homes if slots)])
        parts["files"] = int(np.prod(case.native_shape)) * (frames + 8 + 8) if native else 2 * 4 * frames * whole  # nibabel packs a copy
    if shifts and case.label is not None:
        parts["shifts"] = 4 * (most + 3) * whole
    if knock_out:
        of_prediction = predicting(case.image.shape, case.native_shape, settings)
        parts["knock-out"] = 4 * settings.model.out_channels * whole + of_prediction["buffer"] + 2 * of_prediction["windows"]
    return parts


def told_memory(parts: Mapping[str, int]) -> str:
    """`memory` in words, GiB."""
    beside = {what: size / 2**30 for what, size in parts.items() if what != "maps"}
    told = ", ".join(f"{what} {size:.2f}" for what, size in beside.items())
    return f"memory beyond the network, GiB: maps {parts['maps'] / 2**30:.2f}, and beside them at most {max(beside.values()):.2f} ({told}; one after the other)"


def _named(row: pd.Series) -> Intervention:
    return Intervention(*(row[name] for name in WHAT))


def _without_effect(of_scan: pd.DataFrame) -> list[str]:
    """Dice alone cannot tell an expert that nobody needs from one that was never taken away: how many interventions flip no voxel, and what the logits say."""
    lines, still = [], of_scan[of_scan["flipped"] == 0]
    dead = still[still["logit_change"] == 0]
    if len(still) > len(dead):
        moved = still[still["logit_change"] > 0]["logit_change"]
        told = f"{len(moved)} of {len(of_scan)} interventions change the class of no voxel, though they change logits"
        lines.append(f"{told}, by {moved.min():.2g} to {moved.max():.2g} at most")
    if len(dead):
        names = ", ".join(str(_named(row)) for _, row in dead.head(3).iterrows()) + (", ..." if len(dead) > 3 else "")
        lines.append(f"{len(dead)} of {len(of_scan)} interventions change no logit at all: {names}")
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
