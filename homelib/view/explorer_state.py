"""What the explorer shows, without a browser: which slice of which maps (`State`), its picture, and what stands beside it.

Every function is pure. A picture is RGB, rows from top to bottom as displayed; places in it are shares of its width and height, 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgb

from ..axes import three
from .plots import PLANES, best_slices, class_colours, slice_of
from .routed import Place, Routed, Voxel, entropy, expert_colours

SHOWS = ("winner", "weight", "entropy")
COLOUR_MAPS = ("magma", "viridis", "cividis", "inferno", "gray")
LONG_SIDE = 480  # of a picture, in pixels: each voxel becomes a square of whole pixels, so that outlines are thinner than a voxel
MOST_BARS = 8  # of a group; what is less is told together

Channel = tuple[str, int]  # ("expert", e) or ("slot", m)


@dataclass(frozen=True)
class State:
    """All that a person has chosen. `index` and `voxel` are of the first case's grid."""

    plane: str
    index: int
    stage: int
    block: int
    level: int
    show: str = "winner"
    channel: Channel = ("expert", 0)
    opacity: float = 0.6
    colours: str = "magma"
    outline: bool = True
    voxel: Voxel | None = None

    @property
    def place(self) -> Place:
        return (self.stage, self.block, self.level)


@dataclass(frozen=True)
class Bar:
    """One share of a voxel's, with its name and colour."""

    name: str
    share: float
    colour: str


def places(cases: Sequence[Routed]) -> list[Place]:
    """Stage, block and level that all of the cases have, in order."""
    return sorted(set.intersection(*(set(case.experts) for case in cases)))


def channels(cases: Sequence[Routed], place: Place) -> list[Channel]:
    """What has a weight of its own at a place, in all of the cases: experts; at level 1 also slots, where there are maps of them."""
    found = [("expert", e) for e in range(min(len(case.weights(place)) for case in cases))]
    if place[2] == 1 and all(place[:2] in case.slots for case in cases):
        found += [("slot", m) for m in range(min(len(case.slots[place[:2]]) for case in cases))]
    return found


def start(cases: Sequence[Routed]) -> State:
    """The first place, in the axial slice that shows most of the label."""
    stage, block, level = places(cases)[0]
    return changed(State("coronal", 0, stage, block, level), cases, plane="axial")


def changed(state: State, cases: Sequence[Routed], **changes: Any) -> State:
    """The state after a choice, with all that goes along with it: there is always a slice, a place and a channel that the cases have.

    A new plane is shown at the voxel that was picked; without one where it shows most of the label, or in its middle.
    """
    new, shape = replace(state, **changes), cases[0].image.shape
    there = places(cases)
    for known in ((new.stage, new.block, new.level), (new.stage, new.block), (new.stage,), ()):  # the nearest place to what was asked for
        if near := [place for place in there if place[: len(known)] == known]:
            new = replace(new, stage=near[0][0], block=near[0][1], level=near[0][2])
            break
    if new.channel not in channels(cases, new.place):
        new = replace(new, channel=("expert", 0))
    if new.voxel is not None:
        new = replace(new, voxel=three(int(np.clip(v, 0, n - 1)) for v, n in zip(new.voxel, shape, strict=True)))
    fixed = PLANES[new.plane][0]
    if new.plane != state.plane and "index" not in changes:
        label = cases[0].label
        if new.voxel is not None:
            new = replace(new, index=new.voxel[fixed])
        else:
            new = replace(new, index=best_slices(label)[new.plane] if label is not None else shape[fixed] // 2)
    return replace(new, index=int(np.clip(new.index, 0, shape[fixed] - 1)))


def for_case(state: State, case: Routed, first: Routed) -> State:
    """The same state in the grid of another case: the slice and the voxel at the same share of the way through the scan."""
    voxel = None if state.voxel is None else voxel_in(state.voxel, first, case)
    return replace(state, index=_index_in(state.index, PLANES[state.plane][0], first, case), voxel=voxel)


def voxel_in(voxel: Voxel, of: Routed, to: Routed) -> Voxel:
    """A voxel of one case's grid in that of another."""
    return three(_index_in(index, axis, of, to) for axis, index in enumerate(voxel))


def _index_in(index: int, axis: int, of: Routed, to: Routed) -> int:
    old, new = of.image.shape[axis], to.image.shape[axis]
    return index if old == new else round(index * (new - 1) / max(1, old - 1))


# ---------------------------------------------------------------- the picture


def _slices(volumes: np.ndarray, plane: str, index: int) -> np.ndarray:
    """(n, D, H, W) -> (n, rows, columns), as `slice_of`."""
    return np.take(volumes, index, axis=PLANES[plane][0] + 1).transpose(0, 2, 1)[:, ::-1, ::-1]


def values(case: Routed, state: State) -> np.ndarray:
    """A slice (h, w) of what is shown: the winner's number, the channel's weight, or the entropy."""
    kind, number = state.channel
    if state.show == "weight":
        maps = case.slots[state.place[:2]] if kind == "slot" else case.weights(state.place)
        return slice_of(maps[number], state.plane, state.index)
    weights = _slices(case.weights(state.place), state.plane, state.index)
    return weights.argmax(0) if state.show == "winner" else entropy(weights)


def picture(case: Routed, state: State, *, reach: float) -> np.ndarray:
    """The slice with what is shown over it, (rows, columns, 3) uint8, each voxel a square of pixels.

    Args:
        reach: the weight at the upper end of the colours.
    """
    low, high = case.limits
    grey = np.clip((slice_of(case.image, state.plane, state.index).astype(np.float32) - low) / (high - low), 0, 1)[..., None]
    shown = values(case, state)
    if state.show == "winner":
        over = np.array([to_rgb(colour) for colour in expert_colours(len(case.weights(state.place)))], np.float32)[shown]
    else:
        shares = np.clip(shown.astype(np.float32) / (reach if state.show == "weight" else 1), 0, 1)
        over = mpl.colormaps[state.colours](np.arange(256))[:, :3].astype(np.float32)[(shares * 255).round().astype(np.uint8)]
    mixed = (255 * ((1 - state.opacity) * grey + state.opacity * over)).round().astype(np.uint8)
    zoom = max(1, round(LONG_SIDE / max(grey.shape)))
    mixed = mixed.repeat(zoom, 0).repeat(zoom, 1)
    if state.outline and case.label is not None:
        label = slice_of(case.label, state.plane, state.index).repeat(zoom, 0).repeat(zoom, 1)
        colours = (255 * np.array([to_rgb(colour) for colour in class_colours(len(case.class_names))])).round().astype(np.uint8)
        edge = _edge(label) & (label < len(colours))
        mixed[edge] = colours[label[edge]]
    return mixed


def _edge(label: np.ndarray) -> np.ndarray:
    """The outermost pixels of every class, background aside."""
    padded = np.pad(label, 1, mode="edge")
    inside = np.ones(label.shape, bool)
    for beside in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        inside &= beside == label
    return (label > 0) & ~inside


def size_mm(case: Routed, plane: str) -> tuple[float, float]:
    """Width and height of a slice."""
    across, up = (axis for axis in range(3) if axis != PLANES[plane][0])
    return tuple(case.image.shape[axis] * float(case.spacing_mm[axis]) for axis in (across, up))


# ---------------------------------------------------------------- a voxel


def voxel_at(case: Routed, state: State, across: float, down: float) -> Voxel:
    """The voxel at a place of the picture."""
    voxel = [state.index] * 3
    for axis, share in zip((axis for axis in range(3) if axis != PLANES[state.plane][0]), (across, down), strict=True):
        n = case.image.shape[axis]
        voxel[axis] = n - 1 - int(np.clip(share * n, 0, n - 1))
    return three(voxel)


def place_of(case: Routed, state: State) -> tuple[float, float] | None:
    """Where the picked voxel's centre is in the picture; None: nothing is picked, or it is in another slice."""
    fixed = PLANES[state.plane][0]
    if state.voxel is None or state.voxel[fixed] != state.index:
        return None
    return tuple((case.image.shape[axis] - 0.5 - state.voxel[axis]) / case.image.shape[axis] for axis in range(3) if axis != fixed)


def stepped(case: Routed, state: State, across: int, down: int) -> Voxel:
    """The voxel beside the picked one in the slice that is shown, to the right and down; the middle of the slice where none is picked in it."""
    at = place_of(case, state) or (0.5, 0.5)
    moved = list(voxel_at(case, state, *at))
    for axis, step in zip((axis for axis in range(3) if axis != PLANES[state.plane][0]), (across, down), strict=True):
        moved[axis] = int(np.clip(moved[axis] - step, 0, case.image.shape[axis] - 1))
    return three(moved)


def bars(case: Routed, state: State) -> dict[str, list[Bar]]:
    """The shares of the picked voxel's token: experts and slots of level 1, experts of level 2, as far as they were traced."""
    if state.voxel is None:
        return {}
    at, found = (slice(None), *state.voxel), {}
    for level, title in ((1, "level 1, experts"), (2, "level 2, experts")):
        if (state.stage, state.block, level) in case.experts:
            shares = case.experts[state.stage, state.block, level][at].astype(float)
            found[title] = _largest("expert", shares, expert_colours(len(shares)))
            if level == 1 and (state.stage, state.block) in case.slots:
                slots = case.slots[state.stage, state.block][at].astype(float)
                of = np.arange(len(slots)) // (len(slots) // len(shares))
                found["level 1, slots"] = _largest("slot", slots, [expert_colours(len(shares))[e] for e in of])
    return found


def _largest(name: str, shares: np.ndarray, colours: Sequence[str]) -> list[Bar]:
    """A bar a share in order; where there are many the largest of them first, and the others as one."""
    if len(shares) <= MOST_BARS:
        return [Bar(f"{name} {i}", float(share), colours[i]) for i, share in enumerate(shares)]
    order = np.argsort(-shares, kind="stable")
    shown, others = order[:MOST_BARS], order[MOST_BARS:]
    return [Bar(f"{name} {i}", float(shares[i]), colours[i]) for i in shown] + [Bar(f"{len(others)} others", float(shares[others].sum()), "#888888")]


# ---------------------------------------------------------------- in words


def told(case: Routed, state: State) -> str:
    """What is seen, in one line."""
    n = case.image.shape[PLANES[state.plane][0]]
    what = {"winner": "winning expert", "weight": f"weight of {' '.join(map(str, state.channel))}", "entropy": "entropy of the experts' weights"}[state.show]
    return f"{case.name}: {state.plane} slice {state.index} of 0 to {n - 1}, {what}, stage {state.stage}, block {state.block}, level {state.level}"


def told_voxel(case: Routed, state: State) -> str:
    """In words: the picked voxel, its class and its intensity; or how one is picked."""
    if state.voxel is None:
        return "No voxel is picked: click into the picture, or move in it with the arrow keys."
    value = f"intensity {float(case.image[state.voxel]):.4g}"
    name = case.class_at(state.voxel)
    return f"Voxel {state.voxel}: {name and name + ', '}{value}"
