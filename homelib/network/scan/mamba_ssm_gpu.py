"""Selective scan by the CUDA kernels of `mamba_ssm`, where that package was built."""

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

DEVICES, FLOAT64 = ("cuda",), False


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Same arguments and result, (B, D, L), as `reference.scan`. The kernels want one type for all tensors of tokens, and float32 for the rest."""
    delta, B, C, A = delta.to(u.dtype), B.to(u.dtype), C.to(u.dtype), A.float()
    z = None if z is None else z.to(u.dtype)
    D, delta_bias = (None if t is None else t.float() for t in (D, delta_bias))
    return selective_scan_fn(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
