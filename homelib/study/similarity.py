"""How alike tokens, slots and slot embeddings are: cosines of all pairs within a group. Experts can tell apart only what differs.

Level 1: the tokens of a group, its slots (what the router mixes of them) and its slot embeddings (by which it chooses). Level 2: the same of the
entries from all groups, and of its own slots. Fill is left out. The mean and the standard deviation over all pairs follow from the sum and the
Gram matrix of the unit vectors, so that no matrix of pairs exists.

B batch, G groups, n vectors of a group, d channels.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..network.home import GlobalRouter, LocalRouter
from ..network.unet import pad
from .expert_maps import layers_of
from .trace import LEVELS, stages_of


@torch.inference_mode()
def similarity(
    network: nn.Module, x: Tensor, *, stages: Sequence[int] | None = None, blocks: Sequence[int] | None = None, levels: Sequence[int] = LEVELS
) -> pd.DataFrame:
    """Pairwise cosine similarity in the chosen HoME layers, for a patch.

    Args:
        network: MambaHoME.
        x: (B, C, D, H, W), as the network sees it.
        stages, blocks, levels: which; None is all.

    Returns:
        One row a layer, level and kind: stage, block, level, of ("tokens", "slots", "slot embeddings"), mean, sd (over the pairs of a group; mean over groups),
        vectors (in all).

    Raises:
        UserError: as `layers_of`.
    """
    layers, hooks = layers_of(network, stages, blocks, levels), []
    rows: list[dict] = []
    try:
        for stage, block, level in layers:
            home = stages_of(network)[stage].blocks[block].home
            hooks += _watch(home.local_router if level == 1 else home.global_router, {"stage": stage, "block": block, "level": level}, rows)
        h = pad(x)
        for part in stages_of(network)[: max(stage for stage, _, _ in layers) + 1]:
            h = part(h)
    finally:
        for hook in hooks:
            hook.remove()
    return pd.DataFrame(rows)


def pairwise_cosine(vectors: Tensor) -> tuple[float, float, int]:
    """Mean and standard deviation of the cosines of all pairs of (..., n, d), and the number of vectors; vectors of length zero are left out.

    Each group counts alike; NaN where none has two vectors.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    unit = torch.where(length > 0, vectors / length.clamp_min(torch.finfo(length.dtype).tiny), 0)
    n = (length > 0).sum((-2, -1))
    pairs = (n * (n - 1)).clamp_min(1)
    mean = (unit.sum(-2).square().sum(-1) - n) / pairs
    square = ((unit.mT @ unit).square().sum((-2, -1)) - n) / pairs
    some = n > 1
    if not some.any():
        return float("nan"), float("nan"), int(n.sum())
    return mean[some].mean().item(), (square - mean.square()).clamp_min(0).sqrt()[some].mean().item(), int(n.sum())


def _watch(router: LocalRouter | GlobalRouter, about: dict, rows: list[dict]) -> list:
    seen: dict[str, Tensor] = {}

    def embedded(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen["slot embeddings"] = output

    def routed(module: nn.Module, args: tuple, output: Any) -> None:
        if about["level"] == 1:
            tokens, slots = args[0], torch.einsum("bgkes,bgkd->bgesd", output, args[0]).flatten(2, 3)
        else:
            tokens, slots = args[0], torch.einsum("bnep,bnd->bepd", output[0], args[0]).flatten(1, 2)
        for kind, vectors in (("tokens", tokens), ("slots", slots), ("slot embeddings", seen.pop("slot embeddings"))):
            mean, sd, count = pairwise_cosine(vectors)
            rows.append(about | {"of": kind, "mean": mean, "sd": sd, "vectors": count})

    return [router.slot_norm.register_forward_hook(embedded), router.register_forward_hook(routed)]
