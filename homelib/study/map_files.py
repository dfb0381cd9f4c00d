"""Routing maps as NIfTI, for 3D Slicer, ITK-SNAP or niivue: on the grid that the network saw, or on the grid of the scan's own file.

Both lie at the same place in mm. A viewer that lays voxel over voxel wants one grid: maps on the prepared grid go over the `image` beside them, maps on
the file's grid over the file. There each voxel has the value of the prepared voxel that is nearest to its centre, so that shares still sum to one.
"""

from pathlib import Path

import numpy as np

from ..data.prepare import PreparedCase
from ..run.outputs import write_label, write_label_map, write_volume
from .expert_maps import RoutingMaps


def write_nifti(maps: RoutingMaps, folder: str | Path, *, native: PreparedCase | None = None) -> list[Path]:
    """A file for each of:

    - `image` and `label`, as prepared;
    - `stage0_groups`, of each stage: the group of every voxel in the window nearest the scan's middle, plus one; 0 beyond it. Slots begin anew in each;
    - `stage0_block0_level1_weights`, of each layer: 4D, an expert a frame, float32;
    - `_winner`: a label, the expert's number plus one (viewers take 0 for nothing; `_winner.json` names them); and `_entropy`, float32;
    - `stage0_block0_slots`, where there are any: 4D as the weights.

    Args:
        maps: of a case.
        folder: made where it is not there.
        native: that case, to write on its file's grid: without `image`, which that file is; weights in steps of 1/255 (a byte a voxel, for there are many
            more of these); 0 everywhere beyond the box that was prepared.
    """
    folder, written = Path(folder), []
    affine = maps.affine if native is None else native.native_affine
    nearest = None if native is None else _nearest(native)

    def on_grid(volume: np.ndarray) -> np.ndarray:
        if nearest is None:
            return volume
        taken = np.take(volume.ravel(), nearest, mode="clip")
        taken[nearest < 0] = 0
        return taken

    def frames(name: str, volumes: np.ndarray) -> None:
        if nearest is None:
            written.append(write_volume(np.moveaxis(volumes, 0, -1).astype(np.float32), affine, folder / f"{name}.nii.gz"))
            return
        whole = np.empty((*nearest.shape, len(volumes)), np.uint8)
        for number, volume in enumerate(volumes):
            whole[..., number] = on_grid((volume.astype(np.float32) * 255).round().astype(np.uint8))
        written.append(write_volume(whole, affine, folder / f"{name}.nii.gz", slope=1 / 255))

    def labels(name: str, numbers: np.ndarray, names: list[str] | tuple[str, ...]) -> None:
        written.append(write_label(on_grid(numbers), affine, folder / f"{name}.nii.gz", classes=256 if numbers.max() < 256 else 2**16))
        if names:
            written.append(write_label_map(names, folder / f"{name}.json"))

    if nearest is None:
        written.append(write_volume(maps.image.astype(np.float32), affine, folder / "image.nii.gz"))
    if maps.label is not None:
        labels("label", maps.label, maps.class_names)
    for stage, groups in maps.groups.items():
        labels(f"stage{stage}_groups", (groups + 1).astype(np.uint16), ())
    for layer, weights in maps.experts.items():
        name = "stage{}_block{}_level{}".format(*layer)
        frames(f"{name}_weights", weights)
        written.append(write_volume(on_grid(maps.entropy(layer)), affine, folder / f"{name}_entropy.nii.gz"))
        labels(f"{name}_winner", maps.winner(layer).astype(np.uint16) + 1, ["none", *(f"expert {e}" for e in range(len(weights)))])
    for (stage, block), weights in maps.slots.items():
        frames(f"stage{stage}_block{block}_slots", weights)
    return written


def _nearest(case: PreparedCase) -> np.ndarray:
    """(native D, H, W) int64: which voxel of the prepared volume, counted in C order, is nearest to each of the file's; -1 beyond it. Plane by plane."""
    shape, to_prepared = case.image.shape, np.linalg.inv(case.affine) @ case.native_affine
    found = np.empty(case.native_shape, np.int64)
    j, k = np.ogrid[: case.native_shape[1], : case.native_shape[2]]
    for i in range(case.native_shape[0]):
        at = [np.floor(row[0] * i + row[1] * j + row[2] * k + row[3] + 0.5).astype(np.int64) for row in to_prepared[:3]]
        inside = np.logical_and.reduce([(0 <= index) & (index < n) for index, n in zip(at, shape, strict=True)])
        found[i] = np.where(inside, (at[0] * shape[1] + at[1]) * shape[2] + at[2], -1)
    return found
