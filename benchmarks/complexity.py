"""How Mamba and HoME grow with the tokens, beside the paper's formulas (section 2.4): seconds, memory, and the scores of both routers.

    python -m benchmarks.complexity [--stage 0] [--tokens 4096 8192 ... 262144] [--device cpu]

Prints the table and the slopes, and writes homelib/study/results/complexity.json, which notebook 02 draws.
"""

import argparse
import os

import torch

from benchmarks.measure import save
from homelib.config import ModelConfig
from homelib.study.complexity import MEASURED, complexity, exponents

TOKENS = (4096, 8192, 16384, 32768, 65536, 131072, 262144)  # the last are those of the first stage of a patch of 128 cubed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=0, choices=range(4))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--device", default="cpu")
    told, load = parser.parse_args(), os.getloadavg()[0]
    table = complexity(ModelConfig(), told.tokens, stage=told.stage, device=told.device)
    slopes = exponents(table)
    print(table.round(4).to_string(index=False), slopes.round(3).to_string(index=False), sep="\n\n")
    about = f"stage {told.stage} of the paper's network on {told.device}, {torch.get_num_threads()} threads, float32"
    print(save(MEASURED.stem, {"about": about, "load before": round(load, 2), "rows": table.to_dict("records")}, folder=MEASURED.parent))


if __name__ == "__main__":
    main()
