"""HoME as the paper's equations write it (section 2.2, Eq. 3 to 13), where the released code does otherwise: a switch of the ablation, `home: equations`.

B batch, N tokens, d channels, G groups, K tokens a group, E1 and E2 experts of the levels, S slots an expert, M = E1 S slots a group.

    A[g,k,m]   = softmax_m <x[g,k], slot_embed[m]>                            Eq. 3-5: learnt slots, no norm
    slot[g,m]  = sum_k A[g,k,m] x[g,k]                                        Eq. 6
    y1[g,m]    = sum_e softmax_e(MLP_1(mean_m slot[g]))  FFN_e(slot[g,m])     Eq. 7-9: every expert on all slots of a group
    y2[g,m]    = sum_e softmax_e(MLP_2(y1[g,m]))         FFN_e(y1[g,m])       Eq. 10-12: slot by slot
    y[g,k]     = sum_m A[g,k,m] y2[g,m]                                       Eq. 13

What the paper leaves open, and what is taken: W of Eq. 13 is A, as in the released code; MLP_1 and MLP_2 have one hidden layer of d, with GELU; the
experts are those of the released code; slots start with the scale d^-1/2. Eq. 4 and 5 give 0/0 for a fill token, all of whose logits are minus
infinity; it spreads evenly, as in the released code, and being zero it adds nothing.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import at_least_one
from .home import Experts, HoME, at_least_float32


class EquationHoME(HoME):
    """The paper's HoME, (B, N, d) -> (B, N, d). Arguments as `HoME`, less those of what it does not have."""

    def __init__(
        self,
        channels: int,
        *,
        group_size: int,
        experts_local: int,
        slots_per_expert: int,
        experts_global: int,
        expert_mult: int = 2,
        expert_glu: bool = True,
        group_order: str = "raster",
    ):
        nn.Module.__init__(self)
        at_least_one(channels=channels, group_size=group_size, experts_local=experts_local, slots_per_expert=slots_per_expert)
        at_least_one(experts_global=experts_global, expert_mult=expert_mult)
        self.channels, self.group_size, self.group_order = channels, group_size, group_order
        self.local_router = StaticRouter(channels, experts_local, slots_per_expert)
        self.local_weights = ExpertWeights(channels, experts_local)
        self.local_experts = Experts(experts_local, channels, mult=expert_mult, glu=expert_glu)
        self.global_weights = ExpertWeights(channels, experts_global)
        self.global_experts = Experts(experts_global, channels, mult=expert_mult, glu=expert_glu)

    def _local(self, slots: Tensor, mean: Tensor) -> Tensor:
        """Eq. 7-9: slots (B, G, E, S, d) by all experts of level 1, weighed alike for all slots of a group."""
        weights = self.local_weights(slots.mean((2, 3)))  # (B, G, E)
        M = slots.shape[2] * slots.shape[3]
        y = mixed(self.local_experts, rearrange(slots, "b g e s d -> (b g e s) d"), rearrange(weights, "b g e -> (b g) e").repeat_interleave(M, 0))
        return y.view_as(slots)

    def _global(self, z: Tensor) -> Tensor:
        """Eq. 10-12: slots of all groups (B, n, d) by all experts of level 2, each slot with weights of its own."""
        return mixed(self.global_experts, z.flatten(0, 1), self.global_weights(z).flatten(0, 1)).view_as(z)


class StaticRouter(nn.Module):
    """Eq. 3-5: which of M learnt slots a token fills, A (B, G, K, E, S); the slots of a token sum to one."""

    def __init__(self, channels: int, experts: int, slots: int):
        super().__init__()
        self.experts, self.slots = experts, slots
        self.slot_embed = nn.Parameter(torch.randn(experts * slots, channels) * channels**-0.5)

    def forward(self, x: Tensor, mean: Tensor, padded: Tensor | None) -> Tensor:
        logits = torch.einsum("bgkd,md->bgkm", x, self.slot_embed.to(x.dtype))
        if padded is not None:
            logits = logits.masked_fill(padded[..., None], torch.finfo(logits.dtype).min)
        return rearrange(at_least_float32(logits).softmax(-1).to(x.dtype), "b g k (e s) -> b g k e s", e=self.experts)


class ExpertWeights(nn.Module):
    """softmax(MLP(x)) over experts, (..., d) -> (..., E) (Eq. 7 and 10)."""

    def __init__(self, channels: int, experts: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, experts))

    def forward(self, x: Tensor) -> Tensor:
        return at_least_float32(self.mlp(x)).softmax(-1).to(x.dtype)


def mixed(experts: Experts, x: Tensor, weights: Tensor) -> Tensor:
    """sum_e weights[n,e] FFN_e(x[n]) for x (n, d): every expert sees every row (Eq. 8 and 9, 11 and 12)."""
    y = experts(x.expand(len(experts.weight_in), *x.shape))
    return torch.einsum("end,ne->nd", y, weights)
