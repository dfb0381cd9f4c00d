"""HoME: hierarchical soft mixture of experts (paper section 2.2, in the form of the authors' released code).

Level 1 is local: the tokens of a group share a few slots, and each expert works on its own slots. Level 2 is global: a second soft
mixture lets the slots of all groups exchange what they hold. Then every token reads the slots back with the weights that filled them.

B batch, L tokens, d channels, G groups, K tokens a group, E experts of a level, S slots an expert, M = E S slots a group,
n slots of all groups (G M), P slots an expert at level 2.

    A[g,k,m]    = softmax_m <RMS(x[g,k]), RMS(W mean_k x[g,k])[m]>       Eq. 3-5 (slot embeddings made from the group: released form)
    slot[g,m]   = sum_k A[g,k,m] x[g,k]                                  Eq. 6
    y1[g,m]     = gate[g] gate[e] FFN_e(slot[g,m])                       Eq. 7-9 (each expert its own slots: released form)
    y2          = soft mixture of level 2 over all G M slots             Eq. 10-12
    y[g,k]      = sum_m A[g,k,m] y2[g,m]                                 Eq. 13

The two routers are modules of their own, so that a trace sees what they decide by a forward hook, and costs nothing when there is none.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from ..errors import at_least_one
from .order import Grid, check_tokens, fill_of, gathered, groups_of, scattered


class HoME(nn.Module):
    """Two-level hierarchical soft mixture of experts, (B, L, d) -> (B, L, d) (paper section 2.2; the released form, exactly).

    Args:
        channels: d.
        group_size: K, consecutive tokens that share slots.
        experts_local: E of level 1.
        slots_per_expert: S of level 1.
        experts_global: E of level 2; None leaves level 2 out.
        expert_mult: width of an expert's hidden layer over d (two thirds of it with GEGLU).
        expert_glu: GEGLU experts, else plain GELU.
        mask_padding: leave the zeros that fill level 2 up to a multiple of its experts out of means and softmaxes. The released code
            counts them, which is the default. In the paper's configuration there are none.
        dispatch: "slots", or "tokens": what fills the slots then sums to one over the tokens of a group, as in Soft MoE (Puigcerver et al. 2024).
        group_order: "raster", or "blocks" or "hilbert" (`order.groups_of`), which need the grid of the tokens.

    >>> HoME(24, group_size=32, experts_local=3, slots_per_expert=2, experts_global=6)(torch.zeros(2, 150, 24)).shape
    torch.Size([2, 150, 24])
    """

    def __init__(
        self,
        channels: int,
        *,
        group_size: int,
        experts_local: int,
        slots_per_expert: int,
        experts_global: int | None,
        expert_mult: int = 2,
        expert_glu: bool = True,
        mask_padding: bool = False,
        dispatch: str = "slots",
        group_order: str = "raster",
    ):
        super().__init__()
        at_least_one(channels=channels, group_size=group_size, experts_local=experts_local, slots_per_expert=slots_per_expert, expert_mult=expert_mult)
        self.channels, self.group_size, self.group_order = channels, group_size, group_order
        self.local_router: nn.Module = LocalRouter(channels, experts_local, slots_per_expert, over_tokens=dispatch == "tokens")
        self.local_experts = Experts(experts_local, channels, mult=expert_mult, glu=expert_glu)
        self.expert_gate = nn.Parameter(torch.ones(experts_local))
        self.group_gate = nn.Linear(channels, 1)
        self.levels = 1 if experts_global is None else 2
        if experts_global is None:
            return
        at_least_one(experts_global=experts_global)
        self.global_norm = RMSNorm(channels)
        self.global_router = GlobalRouter(channels, experts_global, mask_padding=mask_padding)
        self.global_experts = Experts(experts_global, channels, mult=expert_mult, glu=expert_glu)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """x (B, N, d); grid (D, H, W) of its tokens, which only orders other than raster need. Raises UserError for another shape, or an empty one."""
        check_tokens(x, self.channels)
        tokens, order = x.shape[1], None if self.group_order == "raster" else groups_of(self.group_order, grid, self.group_size, str(x.device))
        x, mean, padded = self._group(x, order)  # (B, G, K, d), (B, G, d), (G, K)
        A, dispatch = self._assign(x, mean, padded)  # (B, G, K, E, S)
        slots = torch.einsum("bgkes,bgkd->bgesd", dispatch, x)
        y = self._local(slots, mean)
        y = self._global(rearrange(y, "b g e s d -> b (g e s) d"))
        y = rearrange(y, "b (g m) d -> b g m d", g=x.shape[1])
        y = torch.einsum("bgkm,bgmd->bgkd", A.flatten(-2), y)
        return self._ungroup(y, tokens, order)

    def _group(self, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Groups of consecutive tokens, filled with zeros; their means (zeros counted, as released); which tokens are fill."""
        if order is not None:
            x, padded = gathered(x, order)
            return x, x.mean(2), padded
        lacking = fill_of(x.shape[1], self.group_size)
        padded = None
        if lacking:
            padded = torch.arange(x.shape[1] + lacking, device=x.device) >= x.shape[1]
            padded = rearrange(padded, "(g k) -> g k", k=self.group_size)
            x = F.pad(x, (0, 0, 0, lacking))
        x = rearrange(x, "b (g k) d -> b g k d", k=self.group_size)
        return x, x.mean(2), padded

    def _ungroup(self, y: Tensor, tokens: int, order: Tensor | None) -> Tensor:
        """Back to the sequence, without fill."""
        return rearrange(y, "b g k d -> b (g k) d")[:, :tokens] if order is None else scattered(y, order, tokens)

    def _assign(self, x: Tensor, mean: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Router 1: what a token reads back from each slot, and what it gives to it: the same, as released, unless dispatch is over tokens."""
        A = self.local_router(x, mean, padded)
        return A if isinstance(A, tuple) else (A, A)

    def _local(self, slots: Tensor, mean: Tensor) -> Tensor:
        """Level 1: every expert on its own slots (B, G, E, S, d), times the expert's gate and the group's gate."""
        y = self.local_experts(rearrange(slots, "b g e s d -> e (b g s) d"))
        y = rearrange(y, "e (b g s) d -> b g e s d", b=slots.shape[0], g=slots.shape[1])
        gate = self.open_gate(self.group_gate(mean))  # (B, G, 1)
        return y * self.expert_gate[:, None, None] * gate[..., None, None]

    @staticmethod
    def open_gate(logit: Tensor) -> Tensor:
        """How far a group's gate is open, 0.01 to 1; (B, G, 1), as its logit."""
        return torch.sigmoid(logit).clamp(0.01, 1.0)

    def _global(self, z: Tensor) -> Tensor:
        """Level 2: a soft mixture of experts over the slots of all groups, (B, n, d) -> (B, n, d)."""
        if self.levels == 1:
            return z
        n = z.shape[1]
        z = self.global_norm(z)
        z = F.pad(z, (0, 0, 0, fill_of(n, self.global_router.experts)))
        dispatch, combine = self.global_router(z, n)  # (B, n, E, P) each
        slots = torch.einsum("bnep,bnd->ebpd", dispatch, z)
        y = self.global_experts(rearrange(slots, "e b p d -> e (b p) d"))
        y = rearrange(y, "e (b p) d -> b (e p) d", b=z.shape[0])
        return torch.einsum("bnm,bmd->bnd", combine.flatten(-2), y)[:, :n]


class LocalRouter(nn.Module):
    """Router 1: which slots of its group a token fills, A (B, G, K, E, S); the slots of a token sum to one (Eq. 3-5).

    With `over_tokens` it is A and, of the same logits, what sums to one over the K tokens of a slot: (A, dispatch), as in Soft MoE.
    """

    def __init__(self, channels: int, experts: int, slots: int, *, over_tokens: bool = False):
        super().__init__()
        self.experts, self.slots, self.over_tokens = experts, slots, over_tokens
        self.token_norm = RMSNorm(channels)
        self.slot_embed = nn.Linear(channels, experts * slots * channels, bias=False)
        self.slot_norm = RMSNorm(channels)

    def forward(self, x: Tensor, mean: Tensor, padded: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        slot_embed = self.slot_norm(rearrange(self.slot_embed(mean), "b g (m d) -> b g m d", d=x.shape[-1]))
        # <token_norm(x), slot_embed> with the norm's factors taken out of the sum: normalised tokens never exist, which is most of the time and memory
        logits = torch.einsum("bgkd,bgmd->bgkm", x, (slot_embed * self.token_norm.gamma).to(x.dtype)) * self.token_norm.scale(x)
        if padded is not None:  # the same lowest value in all slots: a fill token spreads evenly, and being zero it adds nothing
            logits = logits.masked_fill(padded[..., None], torch.finfo(logits.dtype).min)
        axes = (-1, -2) if self.over_tokens else (-1,)
        over = [rearrange(at_least_float32(logits).softmax(axis).to(x.dtype), "b g k (e s) -> b g k e s", e=self.experts) for axis in axes]
        return (over[0], over[1]) if self.over_tokens else over[0]


class GlobalRouter(nn.Module):
    """Router 2: what the slots of level 2 gather (dispatch) and what each entry reads back (combine), (B, n, E, P) each.

    Dispatch sums to one over the n entries, combine over the E P slots. Slot embeddings are made from the means of runs of E entries.
    """

    def __init__(self, channels: int, experts: int, *, mask_padding: bool = False):
        super().__init__()
        self.experts, self.mask_padding = experts, mask_padding
        self.slot_embed = nn.Linear(channels, experts * channels, bias=False)
        self.slot_norm = RMSNorm(channels)

    def forward(self, z: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        """z (B, n, d), n a multiple of E, of which the first `entries` are real and the rest zeros."""
        runs = reduce(z, "b (p e) d -> b p d", "mean", e=self.experts)  # zeros counted or not: the norm takes the difference away
        slot_embed = rearrange(self.slot_embed(runs), "b p (e d) -> b (e p) d", e=self.experts)
        real = torch.arange(z.shape[1], device=z.device) < entries
        logits = at_least_float32(torch.einsum("bnd,bmd->bnm", z, self.slot_norm(slot_embed)))
        to_slots = logits.masked_fill(~real[:, None], float("-inf")) if self.mask_padding else logits
        dispatch, combine = to_slots.softmax(1).to(z.dtype), logits.softmax(2).to(z.dtype)
        dispatch, combine = (rearrange(t, "b n (e p) -> b n e p", e=self.experts) for t in (dispatch, combine))
        return dispatch, combine


class Experts(nn.Module):
    """E feed-forward networks with stacked weights, one batched product a layer: (E, n, d) -> (E, n, d), expert e on row e.

    With `glu`: Linear(d, 2h), value * GELU(gate), Linear(h, d), where h = int(d mult 2/3); without: Linear, GELU, Linear with h = d mult.
    """

    def __init__(self, experts: int, channels: int, *, mult: int, glu: bool):
        super().__init__()
        hidden = int(channels * mult * 2 / 3) if glu else channels * mult
        self.glu = glu
        self.weight_in = nn.Parameter(torch.empty(experts, hidden * (2 if glu else 1), channels))
        self.bias_in = nn.Parameter(torch.empty(experts, hidden * (2 if glu else 1)))
        self.weight_out = nn.Parameter(torch.empty(experts, channels, hidden))
        self.bias_out = nn.Parameter(torch.empty(experts, channels))
        for weight, bias in ((self.weight_in, self.bias_in), (self.weight_out, self.bias_out)):
            bound = weight.shape[-1] ** -0.5  # as nn.Linear
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.baddbmm(self.bias_in[:, None], x, self.weight_in.mT)
        if self.glu:
            x, gate = x.chunk(2, dim=-1)
            x = x * F.gelu(gate)
        else:
            x = F.gelu(x)
        return torch.baddbmm(self.bias_out[:, None], x, self.weight_out.mT)


class RMSNorm(nn.Module):
    """v / max(||v||, 1e-8) * sqrt(d) * gamma over the last axis of (..., d), computed in float32 (1e-8 is zero in half precision)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale(x) * self.gamma).to(x.dtype)

    def scale(self, x: Tensor) -> Tensor:
        """sqrt(d) / max(||v||, 1e-8), (..., 1)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return x.shape[-1] ** 0.5 / norm.clamp_min(1e-8)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision of any shape to float32, float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
