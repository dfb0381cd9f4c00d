"""How Mamba and HoME grow with the tokens, beside the paper's formulas (section 2.4): seconds, memory, and the scores of both routers.

    python -m benchmarks.complexity [--stage 0] [--tokens 4096 8192 16384 32768 65536] [--device cpu]

Prints the table and the slopes, draws benchmarks/results/complexity.png, and writes benchmarks/results/complexity.json.
"""

import argparse

import matplotlib
import torch

from benchmarks.measure import RESULTS, save
from homelib.config import ModelConfig
from homelib.study.complexity import complexity, exponents
from homelib.view.ablations import complexity_lines

TOKENS = (4096, 8192, 16384, 32768, 65536)  # 262,144 are those of the first stage of a patch of 128 cubed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", type=int, default=0, choices=range(4))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    table = complexity(ModelConfig(), told.tokens, stage=told.stage, device=told.device)
    slopes = exponents(table)
    print(table.round(4).to_string(index=False), slopes.round(3).to_string(index=False), sep="\n\n")
    matplotlib.use("Agg")
    about = f"the paper's stage {told.stage + 1} on {told.device}, {torch.get_num_threads()} threads, float32"
    complexity_lines(table, title=about).savefig(RESULTS / "complexity.png", dpi=120)
    print(save("complexity", {"about": about, "rows": table.to_dict("records"), "slopes": slopes.to_dict("records")}))


if __name__ == "__main__":
    main()
