"""What the fused backends have in common: a forward and a backward function become one PyTorch operator, which autograd,
`torch.compile` and FLOP counters know.

    forward(u, delta, A, B, C, D, z, bias, softplus, keep)        -> y, kept
    backward(dy, u, delta, A, B, C, D, z, bias, softplus, kept)   -> the gradients of the eight tensors, None for what is absent
    outputs(u, delta, A, keep)                                    -> y and kept, not filled

D, z and bias may be absent. What is kept for the backward pass is empty where there will be none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import flops

TENSORS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, bool softplus"


def will_differentiate(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow, for what is computed of these tensors of any shape."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def operator(name: str, forward: Callable, backward: Callable, outputs: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator `name`: (u, delta, A, B, C, D, z, bias, softplus, keep) -> y, kept."""

    def gradients(*arguments: Any) -> list[Tensor]:
        return [_like(t, gradient, arguments[0]) for t, gradient in zip(arguments[1:9], backward(*arguments), strict=True)]

    def gradient_shapes(dy: Tensor, *arguments: Any) -> list[Tensor]:
        return [dy.new_empty(0) if t is None else torch.empty_like(t) for t in arguments[:8]]

    op = torch.library.custom_op(name, forward, mutates_args=(), schema=f"({TENSORS}, bool keep) -> (Tensor, Tensor)")
    gradient_op = torch.library.custom_op(name + "_backward", gradients, mutates_args=(), schema=f"(Tensor dy, {TENSORS}, Tensor kept) -> Tensor[]")
    op.register_fake(lambda u, delta, A, *rest: outputs(u, delta, A, rest[-1]))
    gradient_op.register_fake(gradient_shapes)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.softplus, _ = inputs
        ctx.present = [t is not None for t in tensors]
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    def autograd(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        found = gradient_op(dy, *tensors, ctx.softplus, kept)
        return *(gradient if there else None for gradient, there in zip(found, ctx.present, strict=True)), None, None

    op.register_autograd(autograd, setup_context=setup)
    flops.register(name)
    return op


def _like(t: Tensor | None, gradient: Tensor | None, dy: Tensor) -> Tensor:
    """The gradient with the strides that PyTorch would give a tensor like t. An operator returns no None: an empty tensor for what is absent."""
    if t is None:
        return dy.new_empty(0)
    assert gradient is not None
    like = torch.empty_like(t, device="meta").stride()
    return gradient if gradient.stride() == like else torch.empty_like(t).copy_(gradient)
