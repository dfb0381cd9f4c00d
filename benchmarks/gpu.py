"""`make bench-gpu`: scan, HoME, a training step, the whole network and prediction on one GPU, beside their peers, in under eight minutes.

    python -m benchmarks.gpu [scan] [step] [home] [network] [compile] [prediction] [scaling] [--check]

Needs torch and triton; the network and a step want numpy, einops and MONAI too. On a machine without a network they come as wheels of pure Python, which
`make wheels-gpu` collects (see `benchmarks.bare`). What cannot be imported is skipped with its reason. Prints tables and writes
benchmarks/results/gpu.json after each part (gpu-scan.json for that part alone); what there was no time for is said. Exit status 1 if nothing was measured.

--check runs every case once, small and on the CPU, and writes nothing: it tells, before there is a GPU, what is lacking. Its times mean nothing.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import bare
from benchmarks.cpu import HOME_WAYS, STAGE_TOKENS, ratios, scaled
from benchmarks.measure import PATIENCE_SECONDS, in_process, save, table

BUDGET_SECONDS = 470
LEAST_SECONDS = 20  # that a case is begun with: its process alone takes some ten
TYPES = ("float32", "bfloat16")
MONAIS = ("SwinUNETR (48)", "SegResNet (32)", "DynUNet (32)")


@dataclass(frozen=True)
class Scale:
    """How large the cases are."""

    device: str
    scan: dict  # B, D, N
    tokens: tuple[int, ...]  # of the four stages
    short: int  # tokens for what goes through them one by one
    side: int  # of a patch
    scan_size: int  # side of a scan to be predicted
    sides: tuple[int, ...]
    width: int
    runs: int
    warm_up: int
    compiler: str
    others: tuple[str, ...]  # networks of MONAI; the first wants 64 voxels a side

    @property
    def often(self) -> dict:
        """Runs and warm-up of what takes milliseconds."""
        return {"runs": self.runs, "warm_up": self.warm_up}

    @property
    def seldom(self) -> dict:
        """Of what takes seconds: half as many runs, five at least where anything is measured."""
        return {"runs": -(-self.runs // 2), "warm_up": self.warm_up}


FULL = Scale("cuda:0", {"batch": 2, "channels": 96, "state": 16}, STAGE_TOKENS, 4_096, 96, 224, (32, 48, 64, 96, 128), 48, 10, 3, "inductor", MONAIS)
CHECK = Scale("cpu", {"batch": 1, "channels": 3, "state": 2}, (300, 100, 60, 40), 40, 32, 40, (16, 32), 4, 1, 1, "aot_eager", MONAIS[1:])


class Bench:
    """Cases in processes of their own, within a budget of time."""

    def __init__(self, scale: Scale, seconds: float):
        self.scale, self.budget, self.began = scale, seconds, time.monotonic()

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def run(self, case: dict) -> dict:
        """As `in_process`; skipped where too little of the budget is left."""
        if self.left < LEAST_SECONDS:
            return {"skipped": f"no time left of {self.budget:.0f} s"}
        return in_process(case | {"device": self.scale.device}, threads=8, patience_seconds=min(PATIENCE_SECONDS, self.left))

    def rows(self, case: dict, ways: dict[str, dict], **about) -> list[dict]:
        """A row for each way of a case, measured in turn in one process."""
        done = self.run(case | {"in_turn": ways})
        return [{"what": way, "peer": way} | about | done.get(way, done) for way in ways]


def scan(bench: Bench) -> list[dict]:
    """Stage 1 of the paper's network at 96^3, batch 2; and, at few tokens, what goes through them one by one."""
    rows = []
    fast = ("homelib triton", "homelib mamba_ssm", "homelib blocked", "mambapy pscan")
    slow = ("homelib triton", "homelib reference", "transformers sequential", "mamba_ssm selective_scan_ref")
    for peers, tokens, dtype, backward in (
        (fast, bench.scale.tokens[0], "float32", True),
        (fast, bench.scale.tokens[0], "bfloat16", True),
        (fast, bench.scale.tokens[0], "float32", False),
        (slow, bench.scale.short, "float32", False),
    ):
        case = {"kind": "scan", "backward": backward, "tokens": tokens, "dtype": dtype, **bench.scale.often, **bench.scale.scan}
        rows += bench.rows(case, {peer: {"peer": peer} for peer in peers}, tokens=tokens, dtype=dtype, backward=backward)
    for row in rows:
        name = "mamba_ssm's CUDA kernel" if row["peer"] == "homelib mamba_ssm" else row["peer"]
        row["what"] = f"{name}, {row['tokens']:,} tokens, {row['dtype']}, forward{' and backward' if row['backward'] else ''}"
    ratios(rows, "homelib triton", ("tokens", "dtype", "backward"))
    title = "Selective scan, " + ", ".join(f"{letter}={bench.scale.scan[name]}" for letter, name in (("B", "batch"), ("D", "channels"), ("N", "state")))
    table(title, rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return rows


def step(bench: Bench) -> list[dict]:
    """A training step of the paper's configuration at 96^3, batch 2: the published recipe (float32, a loop over experts, PyTorch's instance norm), ours, and
    MONAI's networks."""
    rows = []
    ours, half = {"which": "MambaHoME", "width": bench.scale.width}, {"dtype": "bfloat16"}
    for name, case in {
        "published recipe, our scan": ours | {"dtype": "float32", "published": True, "backend": "triton"},
        "ours, bfloat16": ours | half,
        "ours, bfloat16, channels_last": ours | half | {"channels_last": True},
        "published recipe, mamba_ssm's kernel": ours | {"dtype": "float32", "published": True, "backend": "mamba_ssm"},
        "ours, float32": ours | {"dtype": "float32"},
        "ours, bfloat16, checkpointing": ours | half | {"checkpointing": True},
        **{f"{name}, bfloat16": {"which": name} | half for name in bench.scale.others},
    }.items():
        done = bench.run({"kind": "step", "size": bench.scale.side, "batch": 2, **bench.scale.seldom, **case})
        if "held_mib" in done.get("detail", {}):  # a process a case: with weights and optimiser
            done["peak_mib"] = done["detail"]["held_mib"]
        rows.append({"what": name, "peer": name} | done)
    ratios(rows, "ours, bfloat16", ())
    title = f"Training step, {bench.scale.side}^3, batch 2; memory with weights and optimiser"
    table(title, rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return rows


def home(bench: Bench) -> list[dict]:
    """Stacked experts and a loop over them, forward and backward, batch 2."""
    rows = []
    ways = {f"{way}, {dtype}": differs | {"dtype": dtype} for dtype in TYPES for way, differs in HOME_WAYS.items()}
    for stage in (4, 3, 2, 1):
        case = {"kind": "home", "stage": stage, "tokens": bench.scale.tokens[stage - 1], "backward": True, "batch": 2}
        rows += bench.rows(case | bench.scale.often, ways, stage=stage)
    for row in rows:
        row["peer"], row["dtype"] = row["what"].split(", ")
        row["what"] = f"stage {row['stage']}, {row['what']}"
    ratios(rows, "stacked", ("stage", "dtype"))
    table("HoME layer, forward and backward, paper configuration, 96^3, batch 2", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return rows


def network(bench: Bench) -> list[dict]:
    """A forward pass of a patch: types, and the memory format of the convolutions."""
    ours = {"which": "MambaHoME", "width": bench.scale.width}
    ways = {f"{dtype}{', channels_last' if last else ''}": ours | {"dtype": dtype, "channels_last": last} for dtype in TYPES for last in (False, True)}
    ways |= {f"{name}, bfloat16": {"which": name, "dtype": "bfloat16"} for name in bench.scale.others}
    rows = bench.rows({"kind": "network", "size": bench.scale.side, **bench.scale.often}, ways)
    ratios(rows, "bfloat16", ())
    table(f"Forward pass, {bench.scale.side}^3, batch 1", rows, ["what", "seconds", "peak_mib", "times slower", "times memory"])
    return rows


def compiled(bench: Bench) -> list[dict]:
    """A layer of the first and of the third stage as it is, and through torch.compile."""
    rows = []
    for stage in (1, 3):
        case = {"kind": "block", "stage": stage, "tokens": bench.scale.tokens[stage - 1], "backward": True, "dtype": "bfloat16"}
        case |= {"compiler": bench.scale.compiler, **bench.scale.often}
        rows += bench.rows(case, {"as it is": {"compiled": False}, "compiled": {"compiled": True}}, stage=stage)
    told_compiled(rows, f"A layer, forward and backward, bfloat16, {bench.scale.side}^3")
    return rows


def told_compiled(rows: list[dict], title: str) -> None:
    """Table of rows of the kind "block", with the seconds of their first calls."""
    for row in rows:
        row["what"] = f"stage {row['stage']}, {row['peer']}"
        row |= {f"first call, {told}": seconds for told, seconds in row.get("detail", {}).get("first calls", {}).items()}
    ratios(rows, "as it is", ("stage",))
    firsts = [f"first call, {told}" for told in ("this length", "half of it", "a third of it")]
    table(title, rows, ["what", "seconds", "peak_mib", "times slower", "times memory", *firsts])


def prediction(bench: Bench) -> list[dict]:
    """Labels of a whole scan by sliding windows."""
    case = {"kind": "prediction", "size": bench.scale.scan_size, "patch": bench.scale.side, "width": bench.scale.width, **bench.scale.seldom}
    rows = bench.rows(case, {dtype: {"dtype": dtype} for dtype in TYPES})
    ratios(rows, "float32", ())
    table(f"Prediction of {bench.scale.scan_size}^3 voxels, windows of {bench.scale.side}^3", rows, ["what", "seconds", "peak_mib", "times slower"])
    return rows


def scaling(bench: Bench) -> list[dict]:
    """Exponents of time and memory of scan, HoME and network in the number of tokens or voxels."""
    cases = {
        "scan, forward and backward": {"kind": "scan", "peer": "homelib triton", "backward": True, **bench.scale.scan, "batch": 1},
        "HoME of stage 1, forward": {"kind": "home", "stage": 1, "looped": False, "backward": False},
        "network, forward, bfloat16": {"kind": "network", "which": "MambaHoME", "width": bench.scale.width, "dtype": "bfloat16"},
    }
    return scaled({what: case | bench.scale.seldom for what, case in cases.items()}, bench.scale.sides, bench.run)


PARTS: dict[str, Callable[[Bench], list[dict]]] = {
    "scan": scan, "step": step, "home": home, "network": network, "compile": compiled, "prediction": prediction, "scaling": scaling,
}  # fmt: skip


def run_parts(names: list[str], bench: Bench, keep: Callable[[dict], None]) -> tuple[int, int]:
    """Run parts by name, and hand all results so far to `keep` after each. Rows that were measured, and all."""
    results: dict = {"budget_seconds": bench.budget, "part_seconds": {}}
    for name in names:
        start = time.monotonic()
        results[name] = PARTS[name](bench)
        results["part_seconds"][name] = round(time.monotonic() - start)
        keep(results)
    rows = [(name, row) for name in names for row in results[name]]
    late = [f"{name}: {row['what']}" for name, row in rows if "no time left" in row.get("skipped", "")]
    if late:
        print(f"\nLeft out for want of time, {len(late)} of {len(rows)} rows: {'; '.join(late)}. `python -m benchmarks.gpu PART` runs a part alone.")
    return sum("seconds" in row for _, row in rows), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, if none is named")
    parser.add_argument("--check", action="store_true", help="every case once, small, on the CPU; writes nothing")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="in which to end")
    told = parser.parse_args()
    if not told.check and not torch.cuda.is_available():
        raise SystemExit("bench-gpu: PyTorch finds no CUDA GPU here; run it on a machine that has one, or see by --check what is lacking.")
    for line in bare.ready():
        print(line)
    name = "-".join(["gpu", *told.parts])
    bench = Bench(CHECK if told.check else FULL, told.seconds)
    measured, rows = run_parts(told.parts or list(PARTS), bench, lambda results: None if told.check else save(name, results))
    print(f"\n{measured} of {rows} rows", "could be run." if told.check else f"were measured, benchmarks/results/{name}.json")
    if not measured:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
