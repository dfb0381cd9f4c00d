"""The Mamba-1 mixer (paper Eq. 1): a causal convolution and a selective scan over the tokens of a volume in raster order.

B batch, L tokens, d channels of the tokens, D = expand * d inner channels, N state, R rank of the step size. Parameter names
are those of `mamba_ssm.Mamba`, whose weights load as they are.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import at_least_one
from .causal_conv import causal_conv
from .order import SCANS, Grid, check_tokens, turned, turned_back
from .scan import selective_scan
from .scan.backends import known


class MambaMixer(nn.Module):
    """Selective state-space mixer, (B, L, d) -> (B, L, d), linear in L (Gu and Dao 2023, as the released `mamba_ssm.Mamba`).

    Args:
        channels: d.
        state_dim: N, numbers of state an inner channel.
        conv_width: tokens that the causal convolution sees.
        expand: inner channels an outer one.
        backend: of `homelib.selective_scan`; it never changes weights.
        direction: "forward" (as released), "backward", "both" (as in Vision Mamba), or "three" (as in SegMamba's paper: forward, backward and from
            slice to slice, which needs the grid of the tokens). Directions share the projections in and out; each has a convolution and a scan of
            its own, and their outputs are added.

    >>> MambaMixer(24)(torch.zeros(2, 100, 24)).shape
    torch.Size([2, 100, 24])
    """

    def __init__(self, channels: int, *, state_dim: int = 16, conv_width: int = 4, expand: int = 2, backend: str = "auto", direction: str = "forward"):
        super().__init__()
        at_least_one(channels=channels, state_dim=state_dim, conv_width=conv_width, expand=expand)
        inner, rank = expand * channels, math.ceil(channels / 16)
        self.backend, self.splits, self.directions = known(backend), (rank, state_dim, state_dim), SCANS[direction]
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_dim + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)
        init_step_size(self.dt_proj)
        self.others = nn.ModuleList(Direction(inner, rank=rank, state_dim=state_dim, conv_width=conv_width) for _ in self.directions[1:])

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """x (B, L, d); grid (D, H, W) of its tokens, which only a scan from slice to slice needs. Raises UserError for another shape, or an empty one."""
        check_tokens(x, self.in_proj.in_features)
        u, z = rearrange(self.in_proj(x), "b l (two d) -> two b d l", two=2)
        scans = []
        for direction, weights in zip(self.directions, (self, *self.others), strict=True):
            y = self._scan(weights, turned(u, direction, grid), turned(z, direction, grid))
            scans.append(turned_back(y, direction, grid))
        return self.out_proj(rearrange(functools.reduce(torch.add, scans), "b d l -> b l d"))

    def _scan(self, weights: Any, u: Tensor, z: Tensor) -> Tensor:
        """Convolution and selective scan of u (B, D, L), gated by z, with the weights of one direction: of this module, or of a `Direction`."""
        u = causal_conv(u, weights.conv1d.weight, weights.conv1d.bias)
        dt, B, C = weights.x_proj(rearrange(u, "b d l -> b l d")).split(self.splits, dim=-1)
        delta = rearrange(F.linear(dt, weights.dt_proj.weight), "b l d -> b d l")
        B, C = (rearrange(t, "b l n -> b n l") for t in (B, C))
        A = -torch.exp(weights.A_log.float())
        bias = weights.dt_proj.bias.float()
        return selective_scan(u, delta, A, B, C, weights.D.float(), z=z, delta_bias=bias, delta_softplus=True, backend=self.backend)


class Direction(nn.Module):
    """The weights of a further direction of the scan, named as those of the first."""

    def __init__(self, inner: int, *, rank: int, state_dim: int, conv_width: int):
        super().__init__()
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_dim + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        init_step_size(self.dt_proj)


def init_step_size(projection: nn.Linear, smallest: float = 1e-3, largest: float = 0.1) -> None:
    """Step sizes at the start log-uniform in [1e-3, 0.1], so that the states remember from ten to a thousand tokens (Gu and Dao 2023, 3.6)."""
    rank, inner = projection.in_features, projection.out_features
    step = torch.exp(torch.empty(inner).uniform_(math.log(smallest), math.log(largest)))
    with torch.no_grad():
        projection.weight.uniform_(-(rank**-0.5), rank**-0.5)
        projection.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
