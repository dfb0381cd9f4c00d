"""MetricsReloaded's numbers for pairs of masks, from which `metrics_reloaded.json` beside this file was made; no registry has the package.

Source: https://github.com/Project-MONAI/MetricsReloaded, Apache-2.0. Taken were the methods that `THEIRS` names, with what they call, as they stand in
`MetricsReloaded/metrics/pairwise_measures.py` at commit 00219d05 and `MetricsReloaded/utility/utils.py` at 076e2fc8, of version 0.1.0.

With MetricsReloaded importable this writes the file again (the demo's scans are fetched where they are not in the cache):

    python tests/run/reference/metrics_reloaded.py
"""

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
from scipy.ndimage import shift

FILE = Path(__file__).with_suffix(".json")
NSD_MM = 2.0
THEIRS = {  # the name in the file -> their method
    "dsc": "dsc",
    "iou": "intersection_over_union",
    "sensitivity": "sensitivity",
    "ppv": "positive_predictive_values",
    "rel_vol_error": "rel_vol_error",
    "hd_perc": "measured_hausdorff_distance_perc",
    "assd": "measured_average_distance",
    "masd": "measured_masd",
    "nsd": "normalised_surface_distance",
}

Masks = tuple[np.ndarray, np.ndarray, tuple[float, float, float]]  # predicted, reference (D, H, W) bool, spacing in mm


def blob(seed: int, shape: tuple[int, int, int] = (20, 24, 28)) -> np.ndarray:
    """Twelve ellipsoids of whole-numbered centres and half axes, anywhere, some cut by the border: (D, H, W) bool."""
    rng, mask = np.random.default_rng(seed), np.zeros(shape, bool)
    places = np.indices(shape)
    for _ in range(12):
        centre, half = rng.integers(0, shape), rng.integers(1, 6, 3)
        mask |= sum(((place - c) * 60 // h) ** 2 for place, c, h in zip(places, centre, half, strict=True)) <= 3600
    return mask


def made() -> dict[str, Masks]:
    """Random pairs, thick slices along each axis, and what is tiny, thin or at the border."""
    pairs = {f"blobs {seed}": (blob(seed), blob(seed + 100), (1.0, 1.0, 1.0)) for seed in range(3)}
    for number, spacing_mm in enumerate([(3.0, 0.8, 0.8), (0.7, 2.0, 5.0), (0.4, 0.4, 0.4)], start=3):
        pairs[f"blobs {number}, moved"] = (blob(number), shift(blob(number), (1, -2, 1), order=0), spacing_mm)
    volumes = np.zeros((8, 20, 24, 28), bool)
    point, far, corner, face, plate, moved, beam, shorter = volumes
    point[9, 9, 9] = far[11, 14, 9] = True
    corner[:3, :4, :5] = face[:3, 10:18, 10:20] = True
    plate[10], moved[12:14] = True, True
    beam[10, 12], shorter[10, 12, 3:9] = True, True
    thick = (3.0, 0.8, 0.8)
    return pairs | {
        "one voxel and another": (point, far, thick),
        "one voxel and a blob": (point, blob(7), thick),
        "at a corner and at a face": (corner, face, thick),
        "plates": (plate, moved, thick),
        "a beam and a piece of it": (shorter, beam, thick),
    }


def real(label: np.ndarray, class_names: tuple[str, ...]) -> dict[str, Masks]:
    """Of ct-a's classes (D, H, W): structures that are moved or taken for each other, on the file's grid, 3 mm, and with thicker slices."""
    of = {name: label == index for index, name in enumerate(class_names)}
    return {
        "liver, moved": (shift(of["liver"], (2, -3, 1), order=0), of["liver"], (3.0, 3.0, 3.0)),
        "kidneys for the spleen": (of["kidneys"], of["spleen"], (0.8, 0.8, 3.0)),
        "aorta for the vena cava": (of["aorta"], of["inferior_vena_cava"], (3.0, 0.8, 0.8)),
    }


def ct_a(case) -> dict[str, Masks]:
    """`real` of the demo's case ct-a."""
    from homelib.data.manifest import load_manifest
    from homelib.data.prepare import read_array

    manifest = load_manifest(case.manifest)
    return real(manifest.merge(read_array(case.label, what="label")[0]), manifest.class_names)


def checksum(masks: Masks) -> int:
    """By which the masks of a test are known to be those that were measured."""
    return zlib.crc32(np.packbits(np.stack(masks[:2])).tobytes())


def measured(masks: Masks) -> dict[str, float | str]:
    """Their numbers; "nan", or the name of the error that they end with, where they give none."""
    from MetricsReloaded.metrics.pairwise_measures import BinaryPairwiseMeasures

    P, R, spacing_mm = masks
    pair = BinaryPairwiseMeasures(P.astype(int), R.astype(int), pixdim=list(spacing_mm), dict_args={"nsd": NSD_MM, "hd_perc": 95})
    found: dict[str, float | str] = {}
    for name, method in THEIRS.items():
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                value = float(getattr(pair, method)())
            found[name] = value if np.isfinite(value) else str(value)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            found[name] = type(error).__name__
    return found


def main() -> None:
    from homelib.data.demo import fetch_demo
    from homelib.study.edge_cases import masks

    told = {}
    for kind, pairs in {"made": made(), "edge": masks(), "real": ct_a(fetch_demo().cases["ct-a"])}.items():
        told[kind] = {name: {"spacing_mm": pair[2], "masks_crc32": checksum(pair), **measured(pair)} for name, pair in pairs.items()}
    about = {"package": "MetricsReloaded 0.1.0", "source": "https://github.com/Project-MONAI/MetricsReloaded", "nsd_mm": NSD_MM}
    about["commits"] = {
        "MetricsReloaded/metrics/pairwise_measures.py": "00219d05d09edb2ef5f9d453bd69f0f9fb318cd3",
        "MetricsReloaded/utility/utils.py": "076e2fc80a17247da2aad14c3ca0757d72c37281",
    }
    about["made_by"] = "tests/run/reference/metrics_reloaded.py, which makes the masks"
    FILE.write_text(json.dumps(about | told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
