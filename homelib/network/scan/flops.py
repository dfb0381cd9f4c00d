"""How much a scan computes, told to PyTorch's FLOP counter for the fused operators, which it could not look into.

A counter knows of the operators that are there when it begins: a backend is there once `backends.resolve` has named it, or a scan has run.
As it counts a matrix product: an addition and a multiplication are one each. An exponential is taken as one, too. B batch, D channels, L tokens, N states.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

STATE = 7  # a number of the state: delta A, its exp, (delta u) B, decay h, their sum, C h and its sum
TOKEN = 12  # a channel and token: bias and softplus 4, delta u, skip 2, gate with its SiLU 5
STATE_BACK = 18  # the state again 5, and the gradients of the state 3, of A and delta 5, of B 2, of C 2, of u 1
TOKEN_BACK = 30  # the forward's 12 again, and the gradients of softplus, skip and gate 18


def scan_flops(shape_u: Sequence[int], states: int, *, per_state: int = STATE, per_token: int = TOKEN) -> int:
    """FLOPs of a scan of u (B, D, L) with N states: linear in the tokens."""
    batch, channels, tokens = shape_u
    return batch * channels * tokens * (per_state * states + per_token)


def register(name: str) -> None:
    """Tell the counter about a fused operator, `homelib::...`, and about its backward pass."""
    namespace, op = name.split("::")
    operators = getattr(torch.ops, namespace)

    @register_flop_formula(getattr(operators, op))
    def forward(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *rest: Any, **also: Any) -> int:
        return scan_flops(u, A[1])

    @register_flop_formula(getattr(operators, op + "_backward"))
    def backward(dy: Sequence[int], u: Sequence[int], delta: Sequence[int], A: Sequence[int], *rest: Any, **also: Any) -> int:
        return scan_flops(u, A[1], per_state=STATE_BACK, per_token=TOKEN_BACK)
