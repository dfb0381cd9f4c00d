"""What `torch.compile` gains on a CPU: layers of the paper's network at 64^3, forward, as they are and compiled, in turn.

    python -m benchmarks.compile [--stages 1 3] [--runs 5] [--threads 2]

Beside the medians stand the seconds of the first calls at a length, at half of it and at a third of it, in which the compiler works. Some three minutes on
two cores. Prints the table and writes benchmarks/results/compile.json.
"""

import argparse

from benchmarks.gpu import told_compiled
from benchmarks.measure import in_process, save

TOKENS = (32_768, 4_096, 512, 64)  # of the stages, at 64^3
WAYS = {"as it is": {"compiled": False}, "compiled": {"compiled": True}}


def compiled(stages: list[int], *, runs: int, threads: int) -> dict:
    """Rows by stage and way."""
    rows = []
    for stage in stages:
        case = {"kind": "block", "stage": stage, "tokens": TOKENS[stage - 1], "backward": False, "runs": runs, "in_turn": WAYS}
        done = in_process(case, threads=threads)
        rows += [{"what": way, "peer": way, "stage": stage} | done.get(way, done) for way in WAYS]
    told_compiled(rows, f"A layer of the paper's network at 64^3, forward, float32, {threads} threads")
    return {"threads": threads, "compile": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], choices=range(1, 5))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    told = parser.parse_args()
    print(save("compile", compiled(told.stages, runs=told.runs, threads=told.threads)))


if __name__ == "__main__":
    main()
