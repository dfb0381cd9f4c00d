"""The paper's complexity formulas against what is measured: seconds and memory of a layer as the number of tokens grows (paper section 2.4).

    Mamba  O(B N d)                 linear in the tokens
    HoME   O(B G (E1 + E2) L d)     "linear in N", with G = N / K groups of L = K tokens

The formula of HoME leaves out that level 2 compares every slot of every group with every other: (G M)^2 scores, quadratic in the tokens. It grows slowly,
for M slots stand for K tokens, M / K = 1 / 128 at the first stage. A table of both tells where it begins to count.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..config import ModelConfig
from ..network.parts import home_of, mixer_of

MEASURED = Path(__file__).parent / "results" / "complexity.json"  # as `python -m benchmarks.complexity` has left it
RUNS = 3  # of each size, after one that does not count; their median is taken
COLUMNS = ("layer", "stage", "tokens", "seconds", "kept_mib", "formula", "level_1_scores", "level_2_scores")


def complexity(config: ModelConfig, tokens: Sequence[int], *, stage: int = 0, device: str = "cpu") -> pd.DataFrame:
    """Forward and backward of Mamba and of HoME of a stage (from 0, the finest), for sequences of several lengths.

    Returns:
        Tidy rows: layer, stage, tokens, seconds (forward and backward, one sequence), kept_mib (what the backward pass keeps), formula (the paper's count of
        operations, without its constant), level_1_scores and level_2_scores (numbers that HoME's routers compute; 0 for Mamba).
    """
    channels, rows = config.channels[stage], []
    torch.manual_seed(0)
    for name, built in (("Mamba", mixer_of(config, stage)), ("HoME", home_of(config, stage))):
        if built is None:  # a network without it
            continue
        layer = built.to(device)
        for N in tokens:
            x = torch.tanh(torch.randn(1, N, channels, device=device))  # as Dynamic Tanh leaves it
            rows.append({"layer": name, "stage": stage, "tokens": N, **_measured(layer, x), **_counted(config, stage, N, home=name == "HoME")})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def measured() -> tuple[pd.DataFrame, str] | None:
    """What `python -m benchmarks.complexity` has measured, of the paper's network and on which machine; None where it was not run."""
    if not MEASURED.exists():
        return None
    kept = json.loads(MEASURED.read_text())
    return pd.DataFrame(kept["rows"], columns=list(COLUMNS)), f"{kept['about']}, {kept['machine']['cpu']}"


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """How a layer's seconds, memory and the paper's formula grow: the slope p of log y over log N, y ~ N^p. 1 is linear, 2 quadratic."""
    lines = []
    for layer, part in table.groupby("layer", sort=False):
        logs = {name: np.log(part[name].to_numpy(float)) for name in ("tokens", "seconds", "kept_mib", "formula")}
        lines.append({"layer": layer} | {name: float(np.polyfit(logs["tokens"], logs[name], 1)[0]) for name in ("seconds", "kept_mib", "formula")})
    return pd.DataFrame(lines)


def _counted(config: ModelConfig, stage: int, N: int, *, home: bool) -> dict[str, int]:
    d = config.channels[stage]
    if not home:
        return {"formula": N * d, "level_1_scores": 0, "level_2_scores": 0}
    K, E1, E2 = config.group_size[stage], config.experts_local[stage], config.experts_global[stage]
    G, M = math.ceil(N / K), E1 * config.slots_per_expert
    return {"formula": G * (E1 + E2) * K * d, "level_1_scores": G * K * M, "level_2_scores": (G * M) ** 2}


def _measured(layer: nn.Module, x: torch.Tensor) -> dict[str, float]:
    seconds = []
    for _ in range(RUNS + 1):
        given = x.clone().requires_grad_()
        began = time.perf_counter()
        layer(given).square().mean().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": sorted(seconds[1:])[RUNS // 2], "kept_mib": _kept_bytes(layer, x) / 2**20}


def _kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """What a forward pass keeps for the backward pass, less the weights and the input."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_())
    total = sum(size for place, size in kept.items() if place not in own)
    del y
    return total
