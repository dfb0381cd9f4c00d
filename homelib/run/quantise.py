"""Weights in few bits: a trained network in a file that is a fifth as large, and predicts nearly the same.

Every row of a matrix or kernel keeps one scale s, and each of its values w the nearest of the 2^b - 1 multiples of s from -m s to m s, m = 2^(b-1) - 1
and s = max|w| / m. So no value is off by more than s / 2. Vectors (norms, biases) and Mamba's A, which is an exponent, stay as they are: they are few.

b bits a value; the codes w / s + m, 0 to 2 m, of a tensor stand one after the other without gaps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

AS_THEY_ARE = 32
BITS = (2, 3, 4, 5, 6, 7, 8, AS_THEY_ARE)
SCALE = ".scale"  # of a tensor, after its name
EMPTY = torch.empty(0, dtype=torch.bool)  # in place of one that is not there
SHORTEST_ROW = 8  # values: in a shorter row the scale takes what the codes spare


def quantise(state: Mapping[str, Tensor], bits: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors to be stored in place of `state`, and what it takes to read them again.

    Args:
        state: tensors of any shape by name, on the CPU.
        bits: 2 to 8, or 32 for all as it is.

    Returns:
        tensors: a rounded one as its codes, uint8, and under its name and `.scale` the float32 scales of its rows; all others as they are.
        told: for JSON; `bits`, and `shapes` of the rounded tensors by name. Empty for 32 bits.

    Raises:
        UserError: other bits, or values that are not finite.
    """
    check_bits(bits)
    if bits == AS_THEY_ARE:
        return dict(state), {}
    tensors, shapes, most = {}, {}, 2 ** (bits - 1) - 1
    for name, tensor in state.items():
        if not _is_rounded(name, tensor):
            tensors[name] = tensor
            continue
        rows = tensor.float().reshape(-1, _row(tensor.shape))
        if not rows.isfinite().all():
            raise UserError(f"{name}: found values that are not finite, expected weights of a trained network.")
        scale = rows.abs().amax(1) / most
        codes = (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-most, most) + most
        tensors[name] = torch.from_numpy(_packed(codes.to(torch.uint8).numpy().ravel(), bits))
        tensors[name + SCALE], shapes[name] = scale, list(tensor.shape)
    return tensors, {"bits": bits, "shapes": shapes}


def dequantise(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state, of any shape, of what `quantise` returned, its rounded tensors float32. Raises UserError where the tensors are not what is told of them."""
    if not told:
        return dict(tensors)
    try:
        bits, shapes = told["bits"], {name: torch.Size(shape) for name, shape in told["shapes"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"found {dict(told)!r}, expected bits and shapes of rounded tensors.") from None
    if bits not in BITS[:-1]:
        raise UserError(f"bits: found {bits!r}, expected 2 to 8.")
    state, most = {}, 2 ** (bits - 1) - 1
    for name, shape in shapes.items():
        codes, scale = (tensors.get(key, EMPTY) for key in (name, name + SCALE))
        values, row = shape.numel(), _row(shape) if len(shape) > 1 else 0
        found = [(part.dtype, tuple(part.shape)) for part in (codes, scale)]
        if not row or found != [(torch.uint8, (-(-values * bits // 8),)), (torch.float32, (values // row,))]:
            raise UserError(f"{name}: its codes and scales are not those of a tensor of shape {tuple(shape)} in {bits} bits.")
        rounded = torch.from_numpy(_unpacked(codes.numpy(), bits, values)).float().sub_(most).reshape(-1, row)
        state[name] = (rounded * scale[:, None]).reshape(shape)
    scales = {name + SCALE for name in shapes}
    return {name: state.get(name, tensor) for name, tensor in tensors.items() if name not in scales}


def check_bits(bits: int) -> None:
    """Raises UserError: bits that no weights are stored in."""
    if bits not in BITS:
        raise UserError(f"--bits: found {bits}, expected 2 to 8, or {AS_THEY_ARE} for weights as they are.")


def _is_rounded(name: str, tensor: Tensor) -> bool:
    leaf = name.rpartition(".")[2]
    matrix = tensor.is_floating_point() and tensor.dim() > 1 and _row(tensor.shape) >= SHORTEST_ROW
    return matrix and leaf != "A_log" and not leaf.startswith("bias")


def _row(shape: torch.Size) -> int:
    """Values in a row, which makes one output value: the last axis of a matrix, or of a stack of them (experts); of a 3D kernel all but the first."""
    return shape[-1] if len(shape) <= 3 else shape[1:].numel()


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """(n,) uint8 below 2^bits -> (ceil(n bits / 8),) uint8."""
    return np.packbits(np.unpackbits(codes[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def _unpacked(packed: np.ndarray, bits: int, values: int) -> np.ndarray:
    """What `_packed` was given, (values,) uint8."""
    each = np.unpackbits(packed, count=values * bits, bitorder="little").reshape(values, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]
