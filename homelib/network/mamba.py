"""The Mamba-1 mixer (paper Eq. 1): a causal convolution and a selective scan over the tokens of a volume in raster order.

B batch, L tokens, d channels of the tokens, D = expand * d inner channels, N state, R rank of the step size. Parameter names
are those of `mamba_ssm.Mamba`, whose weights load as they are.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .causal_conv import causal_conv
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

    >>> MambaMixer(24)(torch.zeros(2, 100, 24)).shape
    torch.Size([2, 100, 24])
    """

    def __init__(self, channels: int, *, state_dim: int = 16, conv_width: int = 4, expand: int = 2, backend: str = "auto"):
        super().__init__()
        inner, rank = expand * channels, math.ceil(channels / 16)
        self.backend, self.splits = known(backend), (rank, state_dim, state_dim)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_dim + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self._init_step_size()

    def _init_step_size(self, smallest: float = 1e-3, largest: float = 0.1) -> None:
        """Step sizes at the start log-uniform in [1e-3, 0.1], so that the states remember from ten to a thousand tokens (Gu and Dao 2023, 3.6)."""
        rank, inner = self.dt_proj.in_features, self.dt_proj.out_features
        step = torch.exp(torch.empty(inner).uniform_(math.log(smallest), math.log(largest)))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        u, z = rearrange(self.in_proj(x), "b l (two d) -> two b d l", two=2)
        u = causal_conv(u, self.conv1d.weight, self.conv1d.bias)
        dt, B, C = self.x_proj(rearrange(u, "b d l -> b l d")).split(self.splits, dim=-1)
        delta = rearrange(F.linear(dt, self.dt_proj.weight), "b l d -> b d l")
        B, C = (rearrange(t, "b l n -> b n l") for t in (B, C))
        A = -torch.exp(self.A_log.float())
        y = selective_scan(u, delta, A, B, C, self.D.float(), z=z, delta_bias=self.dt_proj.bias.float(), delta_softplus=True, backend=self.backend)
        return self.out_proj(rearrange(y, "b d l -> b l d"))
