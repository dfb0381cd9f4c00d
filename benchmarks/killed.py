"""Killed at random moments, a training ends with the weights of one that nobody disturbed. Not a speed: a proof that takes too long for the tests.

    python -m benchmarks.killed [--kills 20] [--seed 0]

Writes benchmarks/results/killed.json. Exit status 1 where a weight differs or a checkpoint cannot be read.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.killing import kill_and_resume
from benchmarks.measure import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), kills=told.kills, seed=told.seed)
    print(f"killed {found['killed']} times in {found['runs']} trainings, at checkpoints of steps {found['steps']}; unreadable: {found['unreadable']}")
    print("all weights are bit for bit those of the undisturbed training" if found["identical"] else "WEIGHTS DIFFER from the undisturbed training")
    print(save("killed", {"seed": told.seed} | found | {"minutes": round((time.perf_counter() - began) / 60, 1)}))
    sys.exit(0 if found["identical"] and not found["unreadable"] else 1)


if __name__ == "__main__":
    main()
