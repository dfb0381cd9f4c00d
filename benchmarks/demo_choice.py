"""Choose the demo's spacing, augmentation and schedule by cross-validation inside the training patient. The test patient is never read.

A fold hides slabs of the training patient: their voxels carry no label in training (255). The trained network is scored on the hidden
slabs alone, in altered copies of the scan (another contrast phase, size, tilt, noise and field of view, fixed by seed), for what is asked of it is
another patient in another phase, not the same scan again. Beside it stands the Dice of the slabs that it did see, in the scan as it is: what it has learnt.

    python benchmarks/demo_choice.py --case ct-a --fold 0 --name plain training.augment.contrast_phase=0.0
"""

import argparse
import json
import tempfile
import time
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
COPIES = 4
FIELDS = ((0.0, 1.0), (0.0, 0.7), (0.3, 1.0), (0.15, 0.85))  # part of the body, from below, that a copy shows: another scan ends elsewhere
ALTERED = AugmentConfig(contrast_phase=1.0, rotation_degrees=12, scaling=0.15, noise=0.04, intensity_shift=0.05)


def hidden_voxels(case: PreparedCase, fold: int) -> np.ndarray:
    """Mask (D, H, W): every second slab along the body."""
    slab = np.arange(case.image.shape[2]) * case.spacing_mm[2] // SLAB_MM
    return np.broadcast_to((slab + fold) % 2 == 0, case.image.shape)


def altered_copies(case: PreparedCase, hidden: np.ndarray) -> list[tuple[PreparedCase, np.ndarray]]:
    """Copies of the case in other phases, sizes, tilts and fields of view, with their hidden voxels."""
    manifest = load_manifest(case.case.manifest)
    transform = augmentation(manifest, case.image.shape, ALTERED, manifest.contrast_of(case.case.id))
    (low, high), copies = manifest.intensity_window, []
    coded = case.label + np.uint8(100) * hidden  # label and mask go through the same transform
    cut, *rest = transform.transforms
    for seed in range(COPIES):
        transform.set_random_state(1000 + seed)
        done = cut({"image": case.image[None], "label": coded[None]})
        hidden_there, done["label"] = done["label"] >= 100, done["label"] % 100
        for step in rest:
            done = step(done)
        image = done["image"][0].numpy() * (high - low) + low
        bottom, top = (round(part * image.shape[2]) for part in FIELDS[seed % len(FIELDS)])
        image, label, mask = (part[:, :, bottom:top] for part in (image, done["label"][0].numpy(), hidden_there[0]))
        copies.append((replace(case, image=image, label=label), mask))
    return copies


def score(settings: Settings, case: PreparedCase, fold: int, folder: Path) -> pd.DataFrame:
    """Train without the hidden slabs. Dice by class: there, in each altered copy (method "hidden"), and in what was seen (method "seen")."""
    hidden = hidden_voxels(case, fold)
    seen = replace(case, label=np.where(hidden, IGNORE, case.label).astype(np.uint8))
    network = trained_network(fit(settings, [seen], folder, progress=False))
    rows, names = [], load_manifest(case.case.manifest).class_names
    looks = [("seen", case, ~hidden)] + [("hidden", copy, mask) for copy, mask in altered_copies(case, hidden)]
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
    parser.add_argument("--fold", type=int, default=0, choices=(0, 1))
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
