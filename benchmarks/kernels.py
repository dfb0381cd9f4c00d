"""Where a GPU's time goes: the kernels of one case, by what they do and by name.

    python -m benchmarks.kernels '{"kind": "step", "which": "MambaHoME", "size": 96, "batch": 2, "dtype": "bfloat16"}' [NAME]

A case is one of `benchmarks.cases`. Prints tables, and with a NAME writes benchmarks/results/kernels-NAME.json. A run may take longer than its kernels, where
Python cannot start them as fast as they end.
"""

import argparse
import json
import statistics
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import bare
from benchmarks.cases import KINDS
from benchmarks.measure import save, synchronize, table

RUNS, PROFILED = 5, 2
DOES = {  # the first that has a part of the kernel's name
    "scan": ("_ends", "_chain_chunks", "_apply", "selective_scan"),
    "instance norm": ("batch_norm", "_moments", "_merge", "_normalise", "_products", "_gradient"),
    "layout of convolutions": ("nchwToNhwc", "nhwcToNchw"),
    "copies": ("Memcpy", "Memset", "copy_kernel", "CatArray", "FillFunctor"),
    "softmax": ("softmax", "SoftMax"),
    "optimiser": ("multi_tensor",),
    "convolutions": ("fprop", "dgrad", "wgrad", "conv", "cudnn"),
    "matrix products": ("gemm", "cutlass", "nvjet", "gemv"),
    "sums": ("reduce_kernel",),
    "element by element": ("",),
}


def does(kernel: str) -> str:
    """What a kernel does, by its name. Those of Triton have short ones, which may stand in a longer one by chance."""
    for told, parts in DOES.items():
        if any(kernel.startswith(part) if part.startswith("_") else part in kernel for part in parts):
            return told
    raise AssertionError(kernel)


def by_kind(rows: list[dict]) -> list[dict]:
    """Sums of kernels (name, milliseconds, launches), the longest first."""
    sums = {told: [row for row in rows if does(row["name"]) == told] for told in DOES}
    found = [{"what": told, **{key: sum(row[key] for row in of) for key in ("milliseconds", "launches")}} for told, of in sums.items() if of]
    return sorted(found, key=lambda row: -row["milliseconds"])


def measured(case: dict, device: str) -> dict:
    """Seconds of a run, the median; memory beyond what was there before; and each kernel's milliseconds and launches a run."""
    _, run = KINDS[case.pop("kind")](**case, device=device)
    run(), run()
    seconds = []
    for _ in range(RUNS):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            run()
        synchronize(device)
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0]
    rows = [{"name": e.key, "milliseconds": e.self_device_time_total / PROFILED / 1e3, "launches": e.count / PROFILED} for e in events]
    held = torch.cuda.max_memory_allocated(device) / 2**20
    return {"seconds": statistics.median(seconds), "held_mib": held, "kernels": sorted(rows, key=lambda row: -row["milliseconds"])}


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.kernels: PyTorch finds no CUDA GPU here; run it on a machine that has one.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", type=json.loads, help="as JSON, with its kind: " + ", ".join(KINDS))
    parser.add_argument("name", nargs="?", help="of the file of results")
    told = parser.parse_args()
    case = told.case
    if not isinstance(case, dict) or case.get("kind") not in KINDS:
        parser.error(f"case: found {json.dumps(case)}, expected an object with a kind, one of {', '.join(KINDS)}")
    bare.ready()
    found = {"case": dict(case)} | measured(case, "cuda:0")
    kinds = by_kind(found["kernels"])
    longest = [row | {"what": row["name"][:90]} for row in found["kernels"][:20]]
    whole = sum(row["milliseconds"] for row in kinds)
    table(f"{found['seconds'] * 1e3:.1f} ms a run, {whole:.1f} of them kernels", kinds, ["what", "milliseconds", "launches"])
    table("The longest", longest, ["what", "milliseconds", "launches"])
    if told.name:
        print(save(f"kernels-{told.name}", found | {"by_kind": kinds}))


if __name__ == "__main__":
    main()
