"""`make bench-gpu`: scan, HoME and a training step on one GPU, beside their peers, in under eight minutes.

    python -m benchmarks.gpu [scan] [home] [step] [scaling]

Needs torch and triton, and of homelib's own dependencies einops, pydantic, numpy and monai; no network. What cannot be imported is skipped with
its reason. Prints tables and writes benchmarks/results/gpu.json (gpu-scan.json for that part alone).
"""

import argparse

import torch

from benchmarks.cpu import HOME_WAYS, STAGE_TOKENS, ratios
from benchmarks.measure import exponent, in_process, save, table

DEVICE = "cuda:0"
SCAN = {"batch": 2, "channels": 96, "state": 16, "device": DEVICE}
LENGTH = STAGE_TOKENS[0]
SIDES = (32, 48, 64, 96, 128)


def scan() -> dict:
    """Stage 1 of the paper's network at 96^3, batch 2."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for backward in (True, False):
            for peer in ("homelib triton", "homelib mamba_ssm", "homelib blocked", "mambapy pscan"):
                case = {"kind": "scan", "peer": peer, "backward": backward, "tokens": LENGTH, "dtype": dtype, "runs": 20, "warm_up": 3, **SCAN}
                name = "mamba_ssm's CUDA kernel" if peer == "homelib mamba_ssm" else peer
                what = f"{name}, {dtype}, forward{' and backward' if backward else ''}"
                rows.append({"what": what, "peer": peer, "dtype": dtype, "backward": backward} | in_process(case, threads=8))
    ratios(rows, "homelib triton", ("dtype", "backward"))
    table(f"Selective scan, B=2, D=96, N=16, {LENGTH:,} tokens", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return {"scan": rows}


def home() -> dict:
    """Stacked experts and a loop over them, forward and backward, batch 2."""
    rows = []
    for stage, tokens in enumerate(STAGE_TOKENS, 1):
        for dtype in ("float32", "bfloat16"):
            case = {"kind": "home", "stage": stage, "tokens": tokens, "backward": True, "batch": 2, "dtype": dtype, "runs": 20, "in_turn": HOME_WAYS}
            done = in_process(case | {"device": DEVICE}, threads=8)
            for way in HOME_WAYS:
                rows.append({"what": f"stage {stage}, {dtype}, {way}", "peer": way, "stage": stage, "dtype": dtype} | done.get(way, done))
    ratios(rows, "stacked", ("stage", "dtype"))
    table("HoME layer, forward and backward, paper configuration, 96^3, batch 2", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return {"home": rows}


def step() -> dict:
    """A training step of the paper's configuration at 96^3, batch 2: the published recipe (float32, a loop over experts) and ours."""
    rows = []
    published = {"which": "MambaHoME", "dtype": "float32", "looped": True}
    for name, case in {
        "published recipe, mamba_ssm's kernel": published | {"backend": "mamba_ssm"},
        "published recipe, our scan": published | {"backend": "triton"},
        "ours, float32": {"which": "MambaHoME", "dtype": "float32"},
        "ours, bfloat16": {"which": "MambaHoME", "dtype": "bfloat16"},
        "ours, bfloat16, channels_last": {"which": "MambaHoME", "dtype": "bfloat16", "channels_last": True},
        "ours, bfloat16, checkpointing": {"which": "MambaHoME", "dtype": "bfloat16", "checkpointing": True},
        "SwinUNETR (48), bfloat16": {"which": "SwinUNETR (48)", "dtype": "bfloat16"},
        "SegResNet (32), bfloat16": {"which": "SegResNet (32)", "dtype": "bfloat16"},
        "DynUNet (32), bfloat16": {"which": "DynUNet (32)", "dtype": "bfloat16"},
    }.items():
        rows.append({"what": name, "peer": name} | in_process({"kind": "step", "size": 96, "batch": 2, "device": DEVICE, "warm_up": 3, **case}, threads=8))
    ratios(rows, "ours, bfloat16", ())
    table("Training step, 96^3, batch 2", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return {"step": rows}


def scaling() -> dict:
    """Exponents of time and memory of the scan in the number of tokens."""
    rows = []
    for side in SIDES:
        case = {"kind": "scan", "peer": "homelib triton", "backward": True, "tokens": side**3, "runs": 10, "warm_up": 3, **SCAN, "batch": 1}
        rows.append({"what": f"triton, {side}^3 tokens, forward and backward", "tokens": side**3} | in_process(case, threads=8))
    kept = [row for row in rows if "seconds" in row]
    table("Scaling of the scan", rows, ["what", "seconds", "peak_mib"])
    if len(kept) < 2:
        return {"scaling": rows}
    sizes = [row["tokens"] for row in kept]
    found = {f"{name} exponent": exponent(sizes, [row[field] for row in kept]) for name, field in (("time", "seconds"), ("memory", "peak_mib"))}
    print("  " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return {"scaling": rows} | found


PARTS = {"scan": scan, "home": home, "step": step, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    told = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench-gpu: PyTorch finds no CUDA GPU here; run it on a machine that has one.")
    results = {}
    for name in told.parts or PARTS:
        results |= PARTS[name]()
    print(f"\n{save('-'.join(['gpu', *told.parts]), results)}")


if __name__ == "__main__":
    main()
