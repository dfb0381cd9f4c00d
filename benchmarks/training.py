"""The training loop beside bare forward, backward and step; and whether the making of patches hides behind them.

    python -m benchmarks.training [loop] [loading] [--profile laptop] [--steps 40] [--threads 2]

Prints tables and writes benchmarks/results/training.json. On a GPU, where there is one, `--accelerator cpu` keeps to the processor.
"""

import argparse

from benchmarks.measure import in_process, save, table


def loop(told: argparse.Namespace) -> list[dict]:
    done = in_process({"kind": "loop", "profile": told.profile, "steps": told.steps, "accelerator": told.accelerator}, threads=told.threads)
    rows = [{"what": "fit"} | done]
    if "seconds" in done:
        bare = done["detail"]["bare_seconds"]
        rows[0]["over bare, %"] = 100 * (done["seconds"] / bare - 1)
        rows.insert(0, {"what": "forward, loss, backward, clip, step", "seconds": bare})
    table(f"A step of the loop, patches at hand, profile {told.profile}, {told.threads} threads", rows, ["what", "seconds", "over bare, %", "runs"])
    return rows


def loading(told: argparse.Namespace) -> list[dict]:
    rows = []
    for what, workers in (("patches at hand", None), ("made in the training", 0), ("by 1 process", 1), ("by 2 processes", 2)):
        case = {"kind": "loading", "profile": told.profile, "steps": told.steps, "workers": workers, "accelerator": told.accelerator}
        done = in_process(case, threads=told.threads)
        rows.append({"what": what} | done)
        if "seconds" in done:
            rows[-1]["a batch alone"] = done["detail"]["a batch alone"]
            if "seconds" in rows[0]:
                rows[-1]["waiting, %"] = 100 * (done["seconds"] / rows[0]["seconds"] - 1)
    table(f"A step by who makes its patches, profile {told.profile}, {told.threads} threads", rows, ["what", "seconds", "waiting, %", "a batch alone"])
    return rows


PARTS = {"loop": loop, "loading": loading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="both, if none is named")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    told = parser.parse_args()
    results = {"profile": told.profile, "steps": told.steps, "threads": told.threads}
    results |= {name: PARTS[name](told) for name in told.parts or PARTS}
    print(f"\n{save('-'.join(['training', *told.parts, *([told.profile] if told.profile != 'laptop' else [])]), results)}")


if __name__ == "__main__":
    main()
