"""Selective scan, the heart of Mamba: one function, several backends (`backends` chooses).

Shapes and meaning are those of `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`: u, delta and z (B, D, L); A (D, N);
B and C (B, N, L); D and delta_bias (D,). The recurrence itself runs in float32 (float64 for float64 inputs), whatever autocast says.
"""

import torch
from torch import Tensor

from ...errors import UserError
from . import backends


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Scan a sequence with input-dependent state-space matrices (paper Eq. 1; Gu and Dao 2023).

    Args:
        u: input (B, D, L).
        delta: step sizes (B, D, L), before `delta_bias` and softplus.
        A: state matrix (D, N), negative for a decaying state.
        B, C: input and output matrices of every token (B, N, L).
        D: skip weight (D,).
        z: gate (B, D, L); the result is multiplied by silu(z).
        delta_bias: (D,), added to delta.
        delta_softplus: apply softplus to delta.
        backend: "auto" (the fastest that works on the device of u), "reference", "blocked", "numba", "triton" or "mamba_ssm".

    Returns:
        y (B, D, L), in the type of `u`. Every floating input has a gradient.

    Raises:
        UserError: an unknown backend, one that does not work here, or an argument whose shape does not fit; the message names it.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    scan = backends.LOADED[backends.resolve(backend, str(u.device), u.dtype)].scan
    with torch.autocast(u.device.type, enabled=False):
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None
) -> None:
    if u.dim() != 3 or not u.numel():
        raise UserError(f"u: found shape {tuple(u.shape)}, expected (B, D, L) with at least one item, channel and token.")
    batch, channels, tokens = u.shape
    if A.dim() != 2 or A.shape[0] != channels or not A.numel():
        raise UserError(f"A: found shape {tuple(A.shape)}, expected (D, N) = ({channels}, N) with at least one state, from u {tuple(u.shape)}.")
    expected = {
        "delta": (delta, u.shape),
        "B": (B, (batch, A.shape[1], tokens)),
        "C": (C, (batch, A.shape[1], tokens)),
        "D": (D, (channels,)),
        "z": (z, u.shape),
        "delta_bias": (delta_bias, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise UserError(f"{name}: found shape {tuple(tensor.shape)}, expected {tuple(shape)}, from u {tuple(u.shape)} and A {tuple(A.shape)}.")
