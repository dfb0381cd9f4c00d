"""What stands in HoME's place in the control "mlp": one plain MLP with as many parameters, on every token by itself."""

from torch import Tensor, nn
from torch.nn import functional as F

from .order import Grid


class PlainMLP(nn.Module):
    """(B, N, d) -> (B, N, d): Linear, GELU (GEGLU with `glu`), Linear, as wide as comes nearest to the parameters wanted."""

    def __init__(self, channels: int, *, parameters: int, glu: bool):
        super().__init__()
        self.glu = glu
        rows = 2 if glu else 1
        hidden = max(1, round((parameters - channels) / (rows * (channels + 1) + channels)))
        self.wide = nn.Linear(channels, rows * hidden)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        x = self.wide(x)
        if self.glu:
            x, gate = x.chunk(2, dim=-1)
            return self.narrow(x * F.gelu(gate))
        return self.narrow(F.gelu(x))
