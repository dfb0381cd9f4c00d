"""Selective scan, the heart of Mamba: one function, several backends, chosen here and nowhere else.

Shapes and meaning are those of `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`: u, delta and z (B, D, L); A (D, N);
B and C (B, N, L); D and delta_bias (D,). The recurrence itself runs in float32 (float64 for float64 inputs), whatever autocast says.
"""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import UserError
from . import blocked, numba_cpu, reference

BACKENDS: dict[str, Callable[..., Tensor]] = {"reference": reference.scan, "blocked": blocked.scan, "numba": numba_cpu.scan}


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
        backend: "auto", or a name in `BACKENDS`.

    Returns:
        y (B, D, L), in the type of `u`. Every floating input has a gradient.

    Raises:
        UserError: an unknown backend, or an argument whose shape does not fit; the message names it.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    scan = BACKENDS[resolve(backend, u.device.type, u.dtype)]
    with torch.autocast(u.device.type, enabled=False):
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def resolve(backend: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that `backend` stands for: "auto" is numba on a CPU (it keeps float32 states, so not for float64), else blocked."""
    fits_numba = device == "cpu" and dtype != torch.float64
    if known(backend) == "auto":
        return "numba" if fits_numba else "blocked"
    if backend == "numba" and not fits_numba:
        raise UserError(f"backend: found 'numba' for {dtype} on {device}, expected float32, float16 or bfloat16 on a cpu. Take 'auto' or 'blocked'.")
    return backend


def known(backend: str) -> str:
    """The name itself. Raises UserError where no backend bears it."""
    if backend not in ("auto", *BACKENDS):
        near = difflib.get_close_matches(backend, BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"backend: found {backend!r}, expected 'auto' or one of {', '.join(map(repr, BACKENDS))}.{hint}")
    return backend


def _check_shapes(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.dim() != 3 or not u.shape[-1]:
        raise UserError(f"u: found shape {tuple(u.shape)}, expected (B, D, L) with at least one token.")
    batch, channels, tokens = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise UserError(f"A: found shape {tuple(A.shape)}, expected (D, N) = ({channels}, N), from u {tuple(u.shape)}.")
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
