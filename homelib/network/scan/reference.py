"""Selective scan, one token at a time: the oracle that every other backend is held to.

Mamba's recurrence (paper Eq. 1; Gu and Dao 2023, Algorithm 2), discretised by a step size that depends on the token:

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t

B batch, D channels, L tokens, N state. The letters A, B, C, D are the state-space matrices, as everywhere in the literature.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICES, FLOAT64 = None, True


def step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """Positive step sizes (B, D, L), at least float32, from raw ones: softplus(delta + delta_bias)."""
    delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return F.softplus(delta) if delta_softplus else delta


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D u) * silu(z), all (B, D, L) but D (D,): computed as `y` is, at least float32, and returned in the type of `u`."""
    if D is not None:
        y = y + D[:, None] * u.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """The plain loop: y (B, D, L) of u, delta and z (B, D, L), A (D, N), B and C (B, N, L), D and delta_bias (D,), as `homelib.selective_scan` takes them.

    `unbind` and not `u[..., t]`: the backward pass of an index fills a whole tensor of zeros a token, which makes it quadratic in L.
    """
    steps = step_sizes(delta, delta_bias, delta_softplus)
    inputs, A = steps * u, A.to(steps.dtype)
    h = inputs.new_zeros(*A.shape) + 0 * inputs[:, :, :1]  # (B, D, N)
    y = []
    tokens = zip(steps.unbind(-1), inputs.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True)
    for delta_t, input_t, B_t, C_t in tokens:
        h = torch.exp(delta_t[..., None] * A) * h + input_t[..., None] * B_t[:, None]
        y.append((h * C_t[:, None]).sum(-1))
    return skip_and_gate(torch.stack(y, -1), u, D, z)
