"""Preparing scans and reading patches, beside plain scripts that do the same.

    python -m benchmarks.data [prepare] [dataset] [patches] [--shape 512 512 600]

Prints tables and writes benchmarks/results/data.json. Every ratio is over a peer measured in the same run. The scans are generated.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import data_cases
from benchmarks.measure import in_process, save, table


def prepare(shape: tuple[int, int, int], threads: int, folder: Path) -> dict:
    """One scan in one process: voxels of the file a second, and memory as a number of its volumes (float32)."""
    image, label = map(str, data_cases.write_scan(folder, shape))
    rows = []
    for peer in data_cases.PREPARE:
        done = in_process({"kind": "prepare", "peer": peer, "image": image, "label": label}, threads=1)
        rows.append({"what": peer} | done)
        if "seconds" in done:
            rows[-1] |= {"M voxels/s": done["detail"]["voxels"] / done["seconds"] / 1e6, "volumes": done["detail"]["volumes"]}
    _ratios(rows, "M voxels/s")
    table(f"Preparing one scan of {_times(shape)} in one process", rows, ["what", "seconds", "M voxels/s", "homelib over it", "peak_mib", "volumes"])
    return {"prepare": rows}


def dataset(shape: tuple[int, int, int], threads: int, folder: Path) -> dict:
    """Scans in as many processes as there are threads, three a process; the processes' start counts. Memory is
    the whole of the largest process that worked, libraries included."""
    pairs = [tuple(map(str, data_cases.write_scan(folder, shape, seed=seed))) for seed in range(3 * threads)]
    rows = []
    for peer in ("homelib", "MONAI script"):
        done = in_process({"kind": "data_set", "peer": peer, "pairs": pairs, "workers": threads}, threads=1)
        rows.append({"what": f"{peer}, {threads} processes"} | done)
        if "seconds" in done:
            rows[-1]["parent_mib"] = rows[-1].pop("peak_mib")  # which only hands out work
            rows[-1] |= {"M voxels/s": done["detail"]["voxels"] / done["seconds"] / 1e6, "largest worker, MiB": done["detail"]["worker_mib"]}
    _ratios(rows, "M voxels/s")
    columns = ["what", "seconds", "M voxels/s", "homelib over it", "largest worker, MiB"]
    table(f"Preparing {len(pairs)} scans of {_times(shape)}", rows, columns)
    return {"dataset": rows}


def patches(shape: tuple[int, int, int], threads: int, folder: Path) -> dict:
    """Random patches of 96^3, of a scan kept at its own spacing; half as large where the scan is smaller."""
    image, label = map(str, data_cases.write_scan(folder, shape))
    kept = folder / "kept.zip"
    data_cases.keep(image, label, kept)
    side = min(96, min(shape) // 2)
    rows = []
    for peer, count in (("homelib", 20), ("NIfTI decoded each time", 2)):
        case = {"kind": "patches", "peer": peer, "image": image, "label": label, "kept": str(kept), "side": side, "count": count}
        done = in_process(case, threads=1)
        rows.append({"what": peer} | done)
        if "seconds" in done:
            rows[-1] |= {"patches/s": count / done["seconds"], "patches' memory": done["peak_mib"] / done["detail"]["one patch MiB"]}
    _ratios(rows, "patches/s")
    table(f"Patches of {side}^3, image and label, of {_times(shape)}", rows, ["what", "patches/s", "homelib over it", "peak_mib", "patches' memory"])
    return {"patches": rows}


def _ratios(rows: list[dict], column: str) -> None:
    for row in rows:
        if column in row and column in rows[0]:
            row["homelib over it"] = rows[0][column] / row[column]


def _times(shape) -> str:
    return "x".join(map(str, shape))


PARTS = {"prepare": prepare, "dataset": dataset, "patches": patches}
SHAPES = {"prepare": (512, 512, 300), "dataset": (512, 512, 300), "patches": (512, 512, 600)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--shape", nargs=3, type=int, help="of the scans; by default larger ones for patches than for preparing")
    parser.add_argument("--threads", type=int, default=2)
    told = parser.parse_args()
    results = {"threads": told.threads}
    for name in told.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            results |= PARTS[name](tuple(told.shape or SHAPES[name]), told.threads, Path(folder))
    small = ["small"] if told.shape else []
    print(f"\n{save('-'.join(['data', *told.parts, *small]), results)}")


if __name__ == "__main__":
    main()
