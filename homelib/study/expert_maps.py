"""Where every expert looks in a whole scan: routing weights by the same sliding window and blending as the prediction, several layers in one pass.

A token is a cube of voxels, and is shown as one. Windows overlap, and groups begin anew in each: a map is the blend of what several windows decided,
as a prediction is; `window_groups` shows the groups of one window. The decoder routes nothing, and does not run. As files for a viewer:
`homelib.study.map_files`.

E experts of a layer, S slots an expert; D, H, W the prepared grid. A *layer* is (stage, block, level), each counted as in `homelib.study.trace`.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Settings
from ..data.manifest import load_manifest
from ..data.prepare import PreparedCase
from ..errors import UserError
from ..network.unet import pad
from ..paths import written_whole
from ..run.mixture import label_space
from ..run.predict import case_rows, device_of, windows_of
from ..run.sliding import ROWS_BYTES
from .trace import LEVELS, checked_stages, entropy, groups_of, stages_of, trace_routing

Layer = tuple[int, int, int]
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)  # what reading a file that is no whole npz may raise
TOLD = ("name", "class_names", "spacing_mm", "modality", "data_set", "limits")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RoutingMaps:
    """A scan and the weight of every expert at each of its voxels.

    image: (D, H, W) float32, in the unit of the scan. label: (D, H, W) uint8 class indices of `class_names`, 255 where none is known, or None.
    affine: (4, 4), voxel to mm (RAS+). experts: (stage, block, level) -> (E, D, H, W) float16; over the experts they sum to one, but for rounding.
    slots: (stage, block) -> (E S, D, H, W) float16 of level 1, where asked for. groups: stage -> (D, H, W) int32, of the window nearest the scan's middle,
    -1 beyond it (`window_groups`). name: of the case. class_names: by index. modality, data_set: of the case. limits: intensities shown black and white.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    experts: dict[Layer, np.ndarray]
    slots: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    groups: dict[int, np.ndarray] = field(default_factory=dict)
    name: str = ""
    class_names: tuple[str, ...] = ()
    modality: str = ""
    data_set: str = ""
    limits: tuple[float, float] = (0.0, 1.0)

    def __getitem__(self, layer: Layer) -> np.ndarray:
        """(E, D, H, W) float16 of a layer. Raises UserError for one that is not there."""
        if layer not in self.experts:
            raise UserError(f"stage, block, level: found {layer}, expected one of {', '.join(map(str, self.experts))}.")
        return self.experts[layer]

    def winner(self, layer: Layer) -> np.ndarray:
        """(D, H, W) uint8: the expert with the largest weight (uint16 beyond 256 experts)."""
        maps = self[layer]
        return maps.argmax(0).astype(np.uint8 if len(maps) <= 256 else np.uint16)

    def entropy(self, layer: Layer) -> np.ndarray:
        """(D, H, W) float32: of the weights, over its largest value: 0 is one expert alone, 1 all alike."""
        found = [entropy(torch.from_numpy(plane).float(), 0) for plane in np.moveaxis(self[layer], 1, 0)]  # plane by plane: float32 of all is large
        return torch.stack(found).numpy()

    def save(self, path: str | Path) -> Path:
        """All of it as one compressed `.npz`, written whole."""
        told = {name: getattr(self, name) for name in TOLD} | {"labelled": self.label is not None}
        arrays: dict[str, Any] = {"told": np.array(json.dumps(told)), "image": self.image, "affine": self.affine}
        arrays |= {} if self.label is None else {"label": self.label}
        arrays |= {_key("experts", layer): volume for layer, volume in self.experts.items()}
        arrays |= {_key("slots", place): volume for place, volume in self.slots.items()}
        arrays |= {_key("groups", (stage,)): volume for stage, volume in self.groups.items()}
        path = Path(path)
        with written_whole(path) as part, part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RoutingMaps":
        """What `save` wrote. Raises UserError: no such file, or no whole one of this kind."""
        try:
            with np.load(path, allow_pickle=False) as kept:
                told = json.loads(str(kept["told"]))
                kinds = ("experts", "slots", "groups")
                of: dict[str, Any] = {kind: {_place(name): kept[name] for name in kept.files if name.startswith(kind + "/")} for kind in kinds}
                image, affine, label = kept["image"], kept["affine"], kept["label"] if told["labelled"] else None
                about: dict[str, Any] = {name: tuple(told[name]) if isinstance(told[name], list) else told[name] for name in TOLD}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected routing maps as home routing writes them.") from None
        except DAMAGED as error:
            raise UserError(f"{path}: no whole file of routing maps ({type(error).__name__}). Run home routing again.") from None
        of["groups"] = {stage: volume for (stage,), volume in of["groups"].items()}
        return cls(image=image, label=label, affine=affine, **of, **about)


@torch.inference_mode()
def routing_maps(
    network: nn.Module,
    case: PreparedCase,
    settings: Settings,
    *,
    stages: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    levels: Sequence[int] = LEVELS,
    slots: bool = False,
    dtype: type = np.float16,
    on_window: Callable[[int], None] = lambda count: None,
) -> RoutingMaps:
    """The weights of every expert of the chosen layers over a scan, in one pass over its windows.

    Args:
        network: MambaHoME, in eval mode.
        case: prepared; its image may lie in a file.
        settings: of the run: patch, overlap, blending, mirrors.
        stages, blocks, levels: which layers; None is all. They decide the memory: see `maps_bytes`.
        slots: keep the weight of every level-1 slot too.
        dtype: that maps are kept in.
        on_window: called with the number of windows done.

    Raises:
        UserError: a network without HoME; a stage, block or level that it does not have.
    """
    layers = layers_of(network, stages, blocks, levels)
    places = list(dict.fromkeys(layer[:2] for layer in layers)) if slots else []
    channels: list[int] = []
    deepest = max(layer[0] for layer in layers)

    def routed(x: Tensor) -> Tensor:
        h = padded = pad(x)
        for stage in stages_of(network)[: deepest + 1]:
            h = stage(h)
        parts = [trace[stage, block].weights(level) for stage, block, level in layers] + [trace[place].slots for place in places]
        channels[:] = [part.shape[1] for part in parts]
        shown = [F.interpolate(part.float(), size=padded.shape[2:], mode="nearest") for part in parts]
        return torch.cat([part[..., : x.shape[2], : x.shape[3], : x.shape[4]] for part in shown], 1)

    windows = windows_of(case, settings)
    found: np.ndarray = np.empty(0)  # made when the first rows tell of how many channels
    how: dict[str, Any] = {"device": device_of(network), "accumulate_on": CPU, "on_window": on_window, "finish": lambda blended: blended}
    with trace_routing(network, sorted({layer[0] for layer in layers}), levels=sorted({1, *levels})) as trace:
        for first, rows in case_rows([routed], case, settings, windows, **how):
            found = found if found.size else np.empty((len(rows), *windows.shape), dtype)
            np.moveaxis(found, 1 + windows.axis, 1)[:, first : first + rows.shape[1]] = rows.numpy()
    parts = dict(zip([*layers, *places], np.split(found, np.cumsum(channels)[:-1]), strict=True))
    manifest, space = load_manifest(case.case.manifest), label_space(settings.data)
    middle = [n // 2 for n in windows.shape]
    return RoutingMaps(
        image=np.asarray(case.image),
        label=None if case.label is None else space.to_union(np.asarray(case.label), manifest.name),
        spacing_mm=case.spacing_mm,
        affine=case.affine,
        experts={layer: parts[layer] for layer in layers},
        slots={place: parts[place] for place in places},
        groups={stage: window_groups(case, settings, stage, middle) for stage in sorted({layer[0] for layer in layers})},
        name=case.case.id,
        class_names=space.class_names,
        modality=case.case.modality,
        data_set=manifest.name,
        limits=manifest.window_of(case.case.modality),
    )


def expert_maps(network: nn.Module, case: PreparedCase, settings: Settings, *, stage: int = 0, block: int = 0, level: int = 1) -> np.ndarray:
    """Weight of every expert of one layer over the whole scan, (E, D, H, W) float32 on the prepared grid; the experts sum to one at each voxel."""
    return routing_maps(network, case, settings, stages=[stage], blocks=[block], levels=[level], dtype=np.float32)[stage, block, level]


def layers_of(network: nn.Module, stages: Sequence[int] | None = None, blocks: Sequence[int] | None = None, levels: Sequence[int] = LEVELS) -> list[Layer]:
    """(stage, block, level) of a network's HoME layers, in order; None is all. Raises UserError for what it does not have."""
    depths = {stage: len(stages_of(network)[stage].blocks) for stage in checked_stages(network, stages)}
    if unknown := [block for block in blocks or () if block not in range(max(depths.values(), default=0))]:
        raise UserError(f"blocks: found {unknown[0]}, expected 0 to {max(depths.values(), default=1) - 1}.")
    if unknown := [level for level in levels if level not in LEVELS]:
        raise UserError(f"levels: found {unknown[0]}, expected 1, 2 or both.")
    wanted = [(s, b, level) for s, depth in depths.items() for b in range(depth) if blocks is None or b in blocks for level in sorted(set(levels))]
    if not wanted:
        raise UserError("stages, blocks, levels: found none that are all there, expected at least one layer.")
    return wanted


def experts_of(network: nn.Module, layer: Layer) -> int:
    """How many experts a layer has."""
    home = stages_of(network)[layer[0]].blocks[layer[1]].home
    return (home.local_router if layer[2] == 1 else home.global_router).experts


def maps_bytes(network: nn.Module, case: PreparedCase, settings: Settings, layers: Iterable[Layer], *, slots: bool = False) -> dict[str, int]:
    """Bytes that `routing_maps` takes for these layers, by what they are for: the maps (with groups, image and label), which stay; and while it runs the
    sums that are being blended and the windows."""
    layers = list(layers)
    channels = sum(experts_of(network, layer) for layer in layers)
    if slots:
        homes = [stages_of(network)[stage].blocks[block].home for stage, block in {layer[:2] for layer in layers}]
        channels += sum(home.local_router.experts * home.local_router.slots for home in homes)
    windows, patch = windows_of(case, settings), int(np.prod(settings.data.patch_voxels))
    window = 2 * 4 * channels * patch * settings.prediction.window_batch  # each layer's, and all of them together
    each_voxel = 2 * channels + 4 * len({layer[0] for layer in layers}) + 5
    return {"maps": each_voxel * int(np.prod(windows.shape)), "buffer": windows.buffer_bytes(channels) + 2 * ROWS_BYTES, "window": window}


def token_groups(settings: Settings, stage: int) -> np.ndarray:
    """(d, h, w) int32: the group of every token of a stage in one window."""
    side = 2 ** (stage + 1)
    padded = pad(torch.zeros(1, 1, *settings.data.patch_voxels)).shape[2:]
    return groups_of(tuple(n // side for n in padded), settings.model.group_size[stage]).numpy().astype(np.int32)


def window_groups(case: PreparedCase, settings: Settings, stage: int, at: Sequence[int]) -> np.ndarray:
    """(D, H, W) int32: the group of every voxel in the one window whose middle is nearest the voxel `at`, -1 beyond it. Its borders are where slots
    begin anew, which a map shows as edges that no anatomy has."""
    windows, groups = windows_of(case, settings), token_groups(settings, stage)
    for axis in range(3):
        groups = groups.repeat(2 ** (stage + 1), axis)
    found = np.full(windows.padded, -1, np.int32)
    inside = tuple(slice(start, start + n) for start, n in zip(windows.nearest(at), windows.patch, strict=True))
    found[inside] = groups[tuple(slice(0, n) for n in windows.patch)]
    return found[tuple(slice(start, start + n) for start, n in zip(windows.before, windows.shape, strict=True))]


def _key(kind: str, place: tuple[int, ...]) -> str:
    return "/".join([kind, *map(str, place)])


def _place(key: str) -> tuple[int, ...]:
    return tuple(int(part) for part in key.split("/")[1:])
