"""Measuring HD95 beside MONAI, and predicting a large CT with many classes: time and memory. About 10 minutes on 2 cores.

    python -m benchmarks.evaluation [distances] [predict] [--scan 512 512 600] [--classes 3 26]

Prints tables and writes benchmarks/results/evaluation.json. Masks, scan and network are generated.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np

from benchmarks.measure import in_process, measure_in_turn, save, table

SPACING_MM = (0.8, 0.8, 3.0)
MASKS = (256, 256, 128)
LIMIT_GIB = 6  # of a whole process that predicts the scan
NAMES = ("background", "organ")


def masks(kind: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference (D, H, W) uint8: one bulky organ with a wavy border, shifted and with a hole; or tangled blobs all over the volume."""
    if kind == "organ":
        z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
        R = z**2 + y**2 + x**2 + 0.2 * np.sin(7 * z) * np.cos(5 * y + 3 * x) < 0.7
        P = np.roll(R, (3, -4, 1), (0, 1, 2))
        P[tuple(slice(n * 2 // 5, n // 2) for n in shape)] = False
    else:
        from scipy.ndimage import gaussian_filter

        rng = np.random.default_rng(0)
        one, other = (gaussian_filter(rng.standard_normal(shape).astype(np.float32), 12) for _ in range(2))
        R, P = one > np.quantile(one, 0.7), (mix := one + 0.3 * other) > np.quantile(mix, 0.7)
    return P.astype(np.uint8), R.astype(np.uint8)


def distances(shape: tuple[int, int, int] = MASKS, runs: int = 5) -> dict:
    """HD95 of one pair, ours in turn with MONAI's, in this process; compiled before."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    from homelib.run.evaluate import evaluate

    rows = []
    for kind in ("organ", "blobs"):
        P, R = masks(kind, shape)

        def monai(P=P, R=R):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pair = (torch.from_numpy(mask == 1)[None, None] for mask in (P, R))
                compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(SPACING_MM))

        for metric in ("hd95", "hd95_voxels"):

            def ours(P=P, R=R, metric=metric):
                rows = evaluate(P, R, spacing_mm=SPACING_MM, class_names=NAMES, case="", method="", label_origin="", metrics=(metric,))
                return {"mm": float(rows["value"].iloc[0])}

            found = measure_in_turn({"ours": ours, "MONAI": monai}, runs=runs)
            seconds, theirs = found["ours"].seconds, found["MONAI"].seconds
            about = {"what": f"{kind}, {metric}", "seconds": seconds, "MONAI's seconds": theirs, "times as fast": theirs / seconds, "runs": runs}
            rows.append(about | {"mm": found["ours"].detail["mm"], "peak_mib": found["ours"].peak_mib})
    title = f"HD95 of a pair of {'x'.join(map(str, shape))} voxels of 0.8x0.8x3 mm, medians of {runs} runs"
    table(title, rows, ["what", "seconds", "MONAI's seconds", "times as fast", "mm", "peak_mib"])
    return {"distances": rows}


def predict(shape: tuple[int, int, int], classes: tuple[int, ...], patch: int = 96) -> dict:
    """One generated CT, read, prepared, predicted and written by a network of one product; the whole process's most memory, beside what was stated."""
    from benchmarks.data_cases import write_scan

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        image, _ = write_scan(Path(folder), shape)
        for count in classes:
            case = {"kind": "predict_scan", "image": str(image), "classes": count, "patch": min(patch, *shape), "out": f"{folder}/labels-{count}.nii.gz"}
            done = in_process(case, threads=2, patience_seconds=3600)
            rows.append({"what": f"{count} classes"} | done)
            if "seconds" in done:
                detail = done["detail"]
                stated = max(detail["preparing_gib"], detail["predicting_gib"])
                rows[-1] |= {"peak GiB": detail["peak_gib"], "buffer GiB": detail["buffer_gib"], "stated GiB": stated}
                rows[-1] |= {"beyond GiB": detail["peak_gib"] - detail["before_gib"] - stated}
                rows[-1] |= {"M voxels/s": np.prod(shape) / done["seconds"] / 1e6, "below the limit": str(detail["peak_gib"] <= LIMIT_GIB)}
    columns = ["what", "seconds", "M voxels/s", "peak GiB", "buffer GiB", "stated GiB", "beyond GiB", "below the limit"]
    table(f"A CT of {'x'.join(map(str, shape))} voxels on the CPU, limit {LIMIT_GIB} GiB for the process", rows, columns)
    print("  stated: what home predict says before; beyond: the peak less that and less Python and its libraries")
    return {"predict": rows, "limit_gib": LIMIT_GIB, "scan": list(shape)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=["distances", "predict", []], help="both, if none is named")
    parser.add_argument("--scan", nargs=3, type=int, default=[512, 512, 600])
    parser.add_argument("--classes", nargs="+", type=int, default=[3, 26])
    parser.add_argument("--masks", nargs=3, type=int, default=list(MASKS))
    told = parser.parse_args()
    results = {}
    if not told.parts or "distances" in told.parts:
        results |= distances(tuple(told.masks))
    if not told.parts or "predict" in told.parts:
        results |= predict(tuple(told.scan), tuple(told.classes))
    small = ["small"] if told.scan != [512, 512, 600] or told.masks != list(MASKS) else []
    print(f"\n{save('-'.join(['evaluation', *told.parts, *small]), results)}")


if __name__ == "__main__":
    main()
