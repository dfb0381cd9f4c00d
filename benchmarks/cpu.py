"""`make bench`: scan, HoME and the whole network on a CPU, beside their peers, in under 10 minutes on two cores.

    python -m benchmarks.cpu [scan] [conv] [home] [network] [scaling]

Prints tables and writes benchmarks/results/cpu.json (cpu-scan.json for that part alone). Every ratio is over a peer measured in the same run.
"""

import argparse
import time
from collections.abc import Callable, Sequence

from benchmarks.measure import exponent, in_process, save, table

SCAN = {"batch": 1, "channels": 96, "state": 16}
LENGTH, LONG, SHORT = 32_768, 262_144, 1_024
STAGE_TOKENS = (110_592, 13_824, 1_728, 216)  # at 96^3
SIDES = (32, 48, 64, 96, 128)
HOME_WAYS = {"stacked": {"looped": False}, "loop": {"looped": True}}
CONV_WAYS = {"homelib": {"naive": False}, "naive Conv1d": {"naive": True}}


def scan(threads: int) -> dict:
    """Forward and backward at 32,768 tokens; forward alone there and at 262,144; what is too slow for that at 1,024."""
    rows = []
    for scans, tokens, backward in (
        (("homelib numba", "homelib blocked", "mambapy pscan"), LENGTH, True),
        (("homelib numba", "homelib blocked", "homelib reference", "transformers sequential", "mamba_ssm selective_scan_ref"), LENGTH, False),
        (("homelib numba", "homelib reference", "mamba_ssm selective_scan_ref"), SHORT, True),
        (("homelib numba",), LONG, False),
    ):
        case = {"kind": "scan", "backward": backward, "tokens": tokens, "in_turn": {peer: {"peer": peer} for peer in scans}, **SCAN}
        done = in_process(case, threads=threads)
        for peer in scans:
            what = f"{peer}, {tokens:,} tokens, forward{' and backward' if backward else ''}"
            rows.append({"what": what, "peer": peer, "tokens": tokens, "backward": backward} | done.get(peer, done))
            if "seconds" in rows[-1]:
                rows[-1]["updates/s/core"] = SCAN["batch"] * SCAN["channels"] * SCAN["state"] * tokens / rows[-1]["seconds"] / threads
    ratios(rows, "homelib numba", ("tokens", "backward"))
    table("Selective scan, D=96, N=16, float32", rows, ["what", "seconds", "peak_mib", "updates/s/core", "times slower", "times memory"])
    return {"scan": rows}


def home(threads: int) -> dict:
    """Stacked experts and a loop over them, at the four stages of the paper's network on 96^3."""
    rows = []
    for stage, tokens in enumerate(STAGE_TOKENS, 1):
        for backward in (False, True):
            case = {"kind": "home", "stage": stage, "tokens": tokens, "backward": backward, "runs": 9, "in_turn": HOME_WAYS}
            done = in_process(case, threads=threads)
            for way in HOME_WAYS:
                what = f"stage {stage}, {way}, forward{' and backward' if backward else ''}"
                rows.append({"what": what, "peer": way, "stage": stage, "backward": backward} | done.get(way, done))
    ratios(rows, "stacked", ("stage", "backward"))
    table("HoME layer, paper configuration, 96^3", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return {"home": rows}


def conv(threads: int) -> dict:
    """The causal convolution before the scan, as `Conv1d` padded on both sides and cut, and as homelib has it; stages 1 and 4 at 96^3."""
    rows = []
    for channels, tokens in ((96, STAGE_TOKENS[0]), (768, STAGE_TOKENS[3])):
        for backward in (False, True):
            case = {"kind": "conv", "channels": channels, "tokens": tokens, "backward": backward, "runs": 15, "in_turn": CONV_WAYS}
            done = in_process(case, threads=threads)
            for way in CONV_WAYS:
                what = f"{way}, D={channels}, {tokens:,} tokens, forward{' and backward' if backward else ''}"
                rows.append({"what": what, "peer": way, "channels": channels, "backward": backward} | done.get(way, done))
    ratios(rows, "homelib", ("channels", "backward"))
    table("Causal convolution and SiLU", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return {"conv": rows}


def network(threads: int) -> dict:
    """Forward passes at 64^3, in float32 and by autocast in bfloat16: ours with the compiled scan, with the sequential one, and MONAI's networks."""
    ours, monais = {"which": "MambaHoME", "parts": True}, ("SwinUNETR (48)", "SegResNet (32)", "DynUNet (32)")
    last, sequential = {"channels_last": True}, {"channels_last": True, "backend": "reference"}
    half = {"dtype": "bfloat16"}
    rows = []
    for group in (
        {"MambaHoME": ours | last, "MambaHoME, not channels_last": ours},
        {"MambaHoME, sequential scan": ours | sequential},
        {"MambaHoME": ours | last | half, "MambaHoME, sequential scan": ours | sequential | half},
        {"SegMamba": ours | last | {"which": "SegMamba"}} | {name: {"which": name, "channels_last": True} for name in monais},
        {name: {"which": name, "channels_last": True} | half for name in monais},
    ):
        done = in_process({"kind": "network", "size": 64, "in_turn": group}, threads=threads)
        for name, case in group.items():
            rows.append({"what": name, "peer": name, "type": case.get("dtype", "float32")} | done.get(name, done))
            if "detail" in rows[-1]:
                rows[-1] |= {"M parameters": rows[-1]["detail"].pop("parameters") / 1e6, **rows[-1]["detail"]}
    ratios(rows, "MambaHoME", ("type",))
    parts = ["scan", "HoME", "convolutions", "instance norm", "rest"]
    table("Forward pass of 64^3, paper configuration", rows, ["what", "type", "M parameters", "seconds", "peak_mib", "times slower", *parts])
    return {"network": rows}


def scaling(threads: int) -> dict:
    """Exponents of time and memory in the number of tokens (scan, HoME) or voxels (network, a quarter of the paper's width)."""
    cases = {
        "scan, D=16, forward and backward": {"kind": "scan", "peer": "homelib numba", "backward": True, **SCAN, "channels": 16},
        "HoME of stage 1, forward": {"kind": "home", "stage": 1, "looped": False, "backward": False},
        "network, 12 to 96 channels, forward": {"kind": "network", "which": "MambaHoME", "width": 12, "channels_last": True},
    }
    return {"scaling": scaled(cases, SIDES, lambda case: in_process(case, threads=threads))}


def scaled(cases: dict[str, dict], sides: Sequence[int], done: Callable[[dict], dict]) -> list[dict]:
    """Each case at side^3 tokens, or voxels, of all sides in turn, and the exponents over those that could be measured; the table is printed."""
    rows = []
    for what, case in cases.items():
        sizes = {side: {"size": side} if case["kind"] == "network" else {"tokens": side**3} for side in sides}
        found = done(case | {"in_turn": {f"{side}^3": size for side, size in sizes.items()}})
        kept = {side: found[f"{side}^3"] for side in sizes if "seconds" in found.get(f"{side}^3", {})}
        if len(kept) < 2:
            reasons = [found.get("skipped"), *(told["skipped"] for told in found.values() if isinstance(told, dict) and "skipped" in told)]
            rows.append({"what": what, "skipped": next(filter(None, reasons))})
            continue
        voxels, seconds, memory = [side**3 for side in kept], [one["seconds"] for one in kept.values()], [one["peak_mib"] for one in kept.values()]
        row = {"what": what, "tokens": voxels, "seconds": seconds, "MiB": memory}
        row |= {"time exponent": exponent(voxels, seconds), "memory exponent": exponent(voxels, [max(m, 0.1) for m in memory])}
        rows.append(row | {f"s at {side}^3": s for side, s in zip(kept, seconds, strict=True)} | {f"MiB at {max(kept)}^3": memory[-1]})
    columns = ["what", *(f"s at {side}^3" for side in sides), f"MiB at {sides[-1]}^3", "time exponent", "memory exponent"]
    table(f"Scaling from {sides[0]}^3 to {sides[-1]}^3", rows, columns)
    return rows


def ratios(rows: list[dict], base: str, alike: tuple[str, ...]) -> None:
    """Seconds and memory over those of `base`, within rows that are alike in some columns."""
    for row in rows:
        of = next((r for r in rows if r["peer"] == base and all(r[k] == row[k] for k in alike) and "seconds" in r), None)
        if of is not None and "seconds" in row:
            row["times slower"] = row["seconds"] / of["seconds"]
            row["times memory"] = row["peak_mib"] / max(of["peak_mib"], 0.1)


PARTS = {"scan": scan, "conv": conv, "home": home, "network": network, "scaling": scaling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--threads", type=int, default=2)
    told = parser.parse_args()
    results = {"threads": told.threads, "part_seconds": {}}
    for name in told.parts or PARTS:
        start = time.perf_counter()
        results |= PARTS[name](told.threads)
        results["part_seconds"][name] = round(time.perf_counter() - start)
        print(f"  {results['part_seconds'][name]} s")
    print(f"\n{save('-'.join(['cpu', *told.parts]), results)}")


if __name__ == "__main__":
    main()
