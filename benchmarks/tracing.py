"""What tracing the routing costs: a training step of Mamba-HoME without hooks, with an inactive trace behind it, and while all stages are traced.

    python -m benchmarks.tracing [--size 96 32] [--runs 5 60] [--width 24] [--batch 1] [--threads 2] [--device cpu]

Prints a table and writes benchmarks/results/tracing.json. Wanted: an inactive trace within 1 % of none, and at most 1 GiB more with all stages
traced and reduced (experts, winner, entropy of both levels). The first stage has 24 channels, half the paper's, whose step at 96^3 needs about 20 GiB on
a CPU. What is kept depends on tokens, experts and slots, which are the paper's, and not on channels. `--width 48` is the paper's network.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch

from benchmarks.measure import Measured, in_process, measure_in_turn, save, table

WAYS = ("no hooks", "trace inactive", "all stages, reduced", "all stages, kept")
WIDTH = 24  # of the first stage
REDUCE = ("experts", "winner", "entropy")


def steps(*, size: int, width: int, batch: int, device: str = "cpu", runs: int = 7) -> dict[str, Measured]:
    """Forward, loss and backward of a cube, by turns in every way. The inactive trace has been entered and left before each step."""
    from benchmarks.cases import build
    from homelib.run.loss import segmentation_loss
    from homelib.study.trace import trace_routing

    network = build("MambaHoME", backend="auto", width=width).to(device)
    x = torch.randn(batch, 1, size, size, size, device=device)
    y = torch.randint(0, 3, x.shape, device=device)

    def step(tracing: Callable) -> dict:
        with tracing() as trace:
            loss = segmentation_loss(network(x), y)
            loss.backward()
            network.zero_grad(set_to_none=True)
            kept = sum(routing.bytes for routing in trace.routings) if trace is not None else 0
        return {"kept_mib": kept / 2**20}

    def left() -> nullcontext:
        with trace_routing(network):
            pass
        return nullcontext()

    ways = (nullcontext, left, lambda: trace_routing(network, reduce=REDUCE), lambda: trace_routing(network))
    return measure_in_turn({name: lambda how=how: step(how) for name, how in zip(WAYS, ways, strict=True)}, runs=runs, device=device)


def of_size(told: argparse.Namespace, size: int, runs: int) -> list[dict]:
    case = {"kind": "tracing", "size": size, "width": told.width, "batch": told.batch, "runs": runs, "device": told.device}
    done = in_process(case, threads=told.threads, patience_seconds=told.patience)
    rows = [{"what": name, "size": size} | (done if "skipped" in done else done[name]) for name in WAYS]
    if "skipped" not in done:
        base = rows[0]
        for row in rows:
            row["over none, %"] = 100 * (row["seconds"] / base["seconds"] - 1)
            row["extra MiB"] = row["peak_mib"] - base["peak_mib"]
            row["kept MiB"] = row["detail"]["kept_mib"]
    columns = ["what", "seconds", "fastest", "over none, %", "peak_mib", "extra MiB", "kept MiB"]
    table(f"A step, {size}^3, batch {told.batch}, first stage {told.width} channels, {told.device}, {told.threads} threads", rows, columns)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[96, 32], help="the large one for memory, the small one for time")
    parser.add_argument("--runs", type=int, nargs="+", default=[5, 60], help="of each size")
    for name, default in (("width", WIDTH), ("batch", 1), ("threads", 2), ("patience", 3600)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    rows = [row for size, runs in zip(told.size, told.runs, strict=True) for row in of_size(told, size, runs)]
    print(f"\n{save('tracing' if told.width == WIDTH else f'tracing-{told.width}', vars(told) | {'rows': rows})}")


if __name__ == "__main__":
    main()
