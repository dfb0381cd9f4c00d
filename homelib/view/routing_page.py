"""The pictures of `home routing`'s page: of every layer three planes through what it is most associated with, its experts in a slice, and the lifts."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import plots, routing, routing_charts
from .routed import Place, Routed

MOST = 13  # experts that are shown in a slice: with scan, winner and groups four lines of four


def pictures(routed: Routed, tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, Figure]]:
    """Captions and figures, layer by layer.

    Args:
        routed: the scan, with groups on the image's grid.
        tables: `use`, with columns stage, block, level, expert, weight; and `lift`, where there is a label: class, expert, weight, lift, voxels and its band.
    """
    index = plots.best_slices(routed.label)["axial"] if routed.label is not None else routed.image.shape[2] // 2
    for place, weights in routed.experts.items():
        name = routing.told(place)
        lift = _of(tables["lift"], place) if "lift" in tables else None
        expert, about = _most(routed, _of(tables["use"], place), lift)
        through = f"three planes through {routed.class_names[about].replace('_', ' ')}" if about is not None else "three planes through the middle"
        yield f"{name}: {through}, expert {expert}", routing.planes_through(routed, place, expert=expert, about=about)
        caption = f"{name}: experts in axial slice {index}"
        yield (
            caption,
            routing.expert_panel(
                routed.image,
                weights,
                routed.groups.get(place[:2]),
                spacing_mm=routed.spacing_mm,
                limits=routed.limits,
                title=f"{routed.name}, {caption}",
                index=index,
                label=routed.label,
                class_names=routed.class_names,
                most=MOST,
            ),
        )
        if lift is not None:
            caption = f"{name}: lift by class"
            yield caption, routing_charts.lift_matrix(lift, title=f"{routed.name}, {name}: lift of each expert in each class")


def _of(table: pd.DataFrame, place: Place) -> pd.DataFrame:
    return table[(table[["stage", "block", "level"]] == list(place)).all(axis=1)]


def _most(routed: Routed, use: pd.DataFrame, lift: pd.DataFrame | None) -> tuple[int, int | None]:
    """The expert to show and the class to go through: the pair that adds most to their mutual information, p(class, expert) log lift, for the highest lift of
    all may be of an expert that is hardly used. Without a label, or any class, the busiest expert and none."""
    inside = lift[lift["class"] != "background"] if lift is not None else pd.DataFrame()
    if inside.empty:
        return int(use.loc[use["weight"].idxmax(), "expert"]), None
    best = inside.loc[(inside["voxels"] * inside["weight"] * np.log2(inside["lift"].clip(lower=1e-9))).idxmax()]
    return int(best["expert"]), routed.class_names.index(best["class"])
