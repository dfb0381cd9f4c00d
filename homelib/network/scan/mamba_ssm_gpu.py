"""Selective scan by the CUDA kernels of `mamba_ssm`, where that package was built."""

from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from torch import Tensor

DEVICES, FLOAT64 = ("cuda",), False


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """Same arguments and result as `reference.scan`. The kernels want one type for all tensors of tokens, and float32 for the rest."""
    delta, B, C, z = (None if t is None else t.to(u.dtype) for t in (delta, B, C, z))
    A, D, delta_bias = (None if t is None else t.float() for t in (A, D, delta_bias))
    return selective_scan_fn(u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
