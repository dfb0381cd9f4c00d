"""Mamba-HoME, SegMamba (the same without HoME) and a plain U-Net of equal parameters, at equal steps, each from several seeds, on the demo's data.

    python -m benchmarks.three_seeds [--profile laptop] [--seeds 0 1 2] [--directions a-to-c c-to-a] [--folder runs/three_seeds] [--set training.steps=800]

Every run is a run folder, which is gone on with when the command is given again. Prints the Dice on the patient never seen, its mean over seeds with
a 95 % interval (Student's t), and writes benchmarks/results/three_seeds.json. No setting was chosen for any of the three but by Mamba-HoME's.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from scipy.stats import t

from benchmarks.measure import save
from homelib.config import override
from homelib.data.manifest import load_manifest
from homelib.data.prepare import read_label
from homelib.run.checkpoint import build_network, trained_network
from homelib.run.evaluate import evaluate
from homelib.run.folder import Run
from homelib.run.predict import predict_label
from homelib.study.comparison import measure
from homelib.study.demo import DemoRun, demo_run, trained

NETWORKS = ("MambaHoME", "SegMamba", "UNet")


def train_and_measure(profile: str, direction: str, network: str, seed: int, folder: Path, changes: dict) -> list[dict]:
    """One run, and its Dice on both patients: a row each, with the Dice of every class, and the same without `prediction.one_piece`."""
    changes = changes | {"network": network, "training.seed": seed}
    demo = demo_run(profile, direction, folder=folder / f"{network}-{seed}", changes=changes)
    run = trained(demo)
    if not run.metrics_file.exists():
        measure(run, demo.data)
    metrics = run.metrics
    own = metrics[(metrics["method"] == network) & (metrics["metric"] == "dice")]
    in_pieces = predicted_in_pieces(run, demo)
    parameters = sum(parameter.numel() for parameter in build_network(demo.settings).parameters())
    minutes = run.history["seconds"].iloc[-1] / 60
    rows = []
    for role, table in own.groupby("role"):
        told = {"network": network, "seed": seed, "direction": direction, "role": role, "case": table["case"].iloc[0], "dice": table["value"].mean()}
        told |= {"label_origin": table["label_origin"].iloc[0], "parameters": parameters, "steps": len(run.history), "minutes": minutes}
        rows.append(told | {"dice_by_class": as_dict(table), "dice_by_class_in_pieces": as_dict(in_pieces[role])})
    return rows


def predicted_in_pieces(run: Run, demo: DemoRun) -> dict[str, pd.DataFrame]:
    """Dice by class of both patients, all pieces of every class kept: what `prediction.one_piece` takes away shows beside it."""
    settings, network = override(run.settings, {"prediction.one_piece": ()}), trained_network(run)
    found = {}
    for role, case in (("train", demo.train_case), ("test", demo.test_case)):
        manifest = load_manifest(case.case.manifest)
        reference = read_label(case.case.label, case.native_shape, case.native_affine, manifest)
        predicted, about = predict_label([network], case, settings), {"case": case.case.id, "method": settings.network, "metrics": ("dice",)}
        spacing_mm = tuple(np.linalg.norm(case.native_affine[:3, :3], axis=0).tolist())
        found[role] = evaluate(predicted, reference, spacing_mm=spacing_mm, class_names=manifest.class_names, label_origin=case.case.label_origin, **about)
    return found


def as_dict(rows: pd.DataFrame) -> dict[str, float | None]:
    """class -> Dice; None where it is not defined (a class that is in neither label)."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(rows["class"], rows["value"], strict=True)}


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """By network, direction and role: the mean over seeds and the half width of its 95 % interval (NaN for one seed)."""
    found = []
    for names, table in rows.groupby(["direction", "role", "network"], sort=False):
        values = table["dice"].to_numpy()
        half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
        found.append(dict(zip(("direction", "role", "network"), names, strict=True)) | {"seeds": len(values), "dice": values.mean(), "half_width": half})
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--directions", nargs="+", default=["a-to-c", "c-to-a"], choices=("a-to-c", "c-to-a"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--folder", type=Path, default=Path("runs/three_seeds"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", action="append", default=[], help="a setting by dotted name, training.steps=800")
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    changes = {name: yaml.safe_load(value) for name, value in (change.split("=", 1) for change in told.set)}
    rows = []
    for seed in told.seeds:  # all networks of one seed first, so that a command that is stopped leaves whole comparisons
        for direction in told.directions:
            for network in told.networks:
                rows += train_and_measure(told.profile, direction, network, seed, told.folder, changes)
                print(f"{network}, seed {seed}, {direction}: " + ", ".join(f"{row['role']} {row['dice']:.3f}" for row in rows[-2:]), flush=True)
    table = over_seeds(pd.DataFrame(rows))
    print(table.round(3).to_string(index=False))
    name = "three_seeds" if told.profile == "laptop" else f"three_seeds-{told.profile}"
    print(save(name, {"profile": told.profile, "changes": changes, "runs": rows, "over_seeds": table.to_dict("records")}))


if __name__ == "__main__":
    main()
