"""Choose the demo's spacing, augmentation and schedule by cross-validation inside the training patient. The test patient is never read.

A fold keeps a part of the training patient from the training, and the trained network is scored there. Folds 0 and 1 hide slabs: their voxels carry
no label (255). Folds "top" and "bottom" end the training scan early, as if the scanner had stopped there: what lies beyond is never seen, for
another patient's scan goes on where the training patient's ends; in "top-mirrored" the copies go on beyond the ends too. Scored are altered copies of
the scan (another contrast phase, size, tilt, noise and, for slabs, field of view, fixed by seed), for what is asked of the network is another patient
in another phase, not the same scan again. Beside it stands the Dice of the part that it did see, in the scan as it is: what it has learnt.

    python benchmarks/demo_choice.py --case ct-a --fold 0 --name plain training.augment.contrast_phase=0.0
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from homelib.config import IGNORE, AugmentConfig, Settings, override, preset
from homelib.data.demo import fetch_demo
from homelib.data.loading import augmentation
from homelib.data.manifest import load_manifest
from homelib.data.prepare import PreparedCase, prepare
from homelib.run.checkpoint import trained_network
from homelib.run.evaluate import evaluate
from homelib.run.predict import predict_probabilities
from homelib.run.train import fit

SLAB_MM = 40.0  # four or more slabs a fold, each thicker than an aorta
ENDS = {"top": (0.0, 0.88), "bottom": (0.5, 1.0), "top-mirrored": (0.0, 0.88)}  # part of the body, from below, that the training scan of a fold shows
MIRRORED_MM = 100.0  # that copies go on beyond both ends, mirrored, in the fold that says so: an organ is then seen anywhere in a window
FIELDS = ((0.0, 1.0), (0.0, 0.7), (0.3, 1.0), (0.15, 0.85))  # that a copy shows: another scan ends elsewhere
WHOLE = ((0.0, 1.0),) * len(FIELDS)
ALTERED = AugmentConfig(contrast_phase=1.0, rotation_degrees=12, scaling=0.15, noise=0.04, intensity_shift=0.05)


def without(case: PreparedCase, fold: str) -> tuple[PreparedCase, np.ndarray]:
    """The case that a fold trains on, and the mask (D, H, W) of what it does not show of the whole."""
    height = np.arange(case.image.shape[2])
    if fold in ENDS:
        first, last = (round(part * len(height)) for part in ENDS[fold])
        hidden = (height < first) | (height >= last)
        seen = replace(case, image=case.image[:, :, ~hidden], label=case.label[:, :, ~hidden])
    else:  # every second slab
        hidden = (height * case.spacing_mm[2] // SLAB_MM + int(fold)) % 2 == 0
        seen = replace(case, label=np.where(hidden, IGNORE, case.label).astype(np.uint8))
    return seen, np.broadcast_to(hidden, case.image.shape)


def altered_copies(case: PreparedCase, hidden: np.ndarray, fields: Sequence[tuple[float, float]], beyond: int = 0) -> list[tuple[PreparedCase, np.ndarray]]:
    """Copies of the case in other phases, sizes, tilts and fields of view, mirrored `beyond` voxels past their ends, with their hidden voxels."""
    manifest = load_manifest(case.case.manifest)
    transform = augmentation(manifest, case.image.shape, ALTERED, manifest.contrast_of(case.case.id))
    (low, high), copies = manifest.intensity_window, []
    coded = case.label + np.uint8(100) * hidden  # label and mask go through the same transform
    cut, *rest = transform.transforms
    for seed in range(len(fields)):
        transform.set_random_state(1000 + seed)
        done = cut({"image": case.image[None], "label": coded[None]})
        hidden_there, done["label"] = done["label"] >= 100, done["label"] % 100
        for step in rest:
            done = step(done)
        image = done["image"][0].numpy() * (high - low) + low
        bottom, top = (round(part * image.shape[2]) for part in fields[seed])
        image, label, mask = (part[:, :, bottom:top] for part in (image, done["label"][0].numpy(), hidden_there[0]))
        if beyond:
            further = (0, 0), (0, 0), (beyond, beyond)
            image, label, mask = np.pad(image, further, "reflect"), np.pad(label, further), np.pad(mask, further)
        copies.append((replace(case, image=image, label=label), mask))
    return copies


def score(settings: Settings, case: PreparedCase, fold: str, folder: Path) -> pd.DataFrame:
    """Train without the hidden part. Dice by class: there, in each altered copy (method "hidden"), and in what was seen (method "seen")."""
    seen, hidden = without(case, fold)
    network = trained_network(fit(settings, [seen], folder, progress=False))
    rows, names = [], load_manifest(case.case.manifest).class_names
    beyond = round(MIRRORED_MM / case.spacing_mm[2]) if fold.endswith("mirrored") else 0
    looks = [("seen", case, ~hidden)] + [("hidden", copy, mask) for copy, mask in altered_copies(case, hidden, WHOLE if fold in ENDS else FIELDS, beyond)]
    for number, (method, copy, mask) in enumerate(looks):
        predicted = predict_probabilities(network, copy, settings).argmax(0)
        rows.append(
            evaluate(
                np.where(mask, predicted, 0),
                np.where(mask, copy.label, 0),
                spacing_mm=case.spacing_mm,
                class_names=names,
                case=f"copy {number}",
                method=method,
                label_origin=case.case.label_origin,
                metrics=("dice",),
            )
        )
    return pd.concat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="ct-a")
    parser.add_argument("--fold", default="0", choices=("0", "1", *ENDS))
    parser.add_argument("--name", required=True, help="of the candidate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="benchmarks/results/demo_choice.jsonl")
    parser.add_argument("changes", nargs="*", help="settings by dotted name, training.steps=300")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    changes = {name: yaml.safe_load(value) for name, value in (change.split("=", 1) for change in told.changes)}
    settings = override(preset("laptop"), changes | {"data.train_cases": [told.case], "data.test_cases": []})
    case = prepare(fetch_demo().cases[told.case], spacing_mm=settings.data.spacing_mm)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table = score(settings, case, told.fold, Path(folder))
    by_class = {method: rows.groupby("class", sort=False)["value"].mean().round(3).to_dict() for method, rows in table.groupby("method")}
    row = {
        "name": told.name,
        "case": told.case,
        "fold": told.fold,
        "mean_dice": {method: round(float(np.mean(list(values.values()))), 3) for method, values in by_class.items()},
        "seconds": round(time.perf_counter() - start),
        "changes": changes,
        "dice": by_class,
    }
    print(json.dumps(row))
    Path(told.out).parent.mkdir(parents=True, exist_ok=True)
    with open(told.out, "a") as out:
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
