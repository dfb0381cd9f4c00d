"""Selective scan in pure PyTorch, a block of tokens at a time: any device, trainable, memory bounded by the block.

A block of T = S x P tokens is cut into P runs of S. All runs are scanned side by side from a zero state (S vectorised steps), the runs'
last states are chained (P steps), and the state that enters each run is added, decayed. So L tokens cost about 2 sqrt(T) L / T calls of
PyTorch instead of L, and nothing of size (B, D, L, N) ever exists: the backward pass keeps the states at the block borders and
recomputes the rest, block by block from the end.

Letters as in `reference`; g is the gradient of the state h.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import skip_and_gate, step_sizes

DEVICES, FLOAT64 = None, True
BLOCK_NUMBERS = {"cpu": 2**18}  # numbers in one (T, B, D, N) block: a CPU is fastest while they stay in its cache ...
ELSEWHERE = 2**22  # ... and a GPU when there is enough to fill it
MAX_TOKENS = 4096


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Same arguments and result, (B, D, L), as `reference.scan`."""
    steps = step_sizes(delta, delta_bias, delta_softplus)
    kind = steps.dtype
    y = _BlockedScan.apply(u.to(kind), steps, A.to(kind), B.to(kind), C.to(kind))
    return skip_and_gate(y, u, D, z)


def block_layout(device: str, batch: int, channels: int, state: int) -> tuple[int, int]:
    """(S, P): steps a run (a power of two) and runs a block, near each other, for a block of about `BLOCK_NUMBERS` numbers."""
    tokens = max(16, min(MAX_TOKENS, BLOCK_NUMBERS.get(device, ELSEWHERE) // (batch * channels * state)))
    steps = 2 ** (tokens.bit_length() // 2)
    return steps, max(1, tokens // steps)


class _BlockedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        steps, runs = block_layout(u.device.type, u.shape[0], u.shape[1], A.shape[1])
        h = u.new_zeros(u.shape[0], *A.shape)
        outputs, borders = [], []
        for block in _blocks(u.shape[-1], steps * runs):
            borders.append(h)
            states, _, _ = _block_states(u, delta, A, B, block, steps, runs, h)
            h = states[-1].clone()
            outputs.append(torch.einsum("tbdn,bnt->bdt", states, C[..., block]))
        ctx.save_for_backward(u, delta, A, B, C, torch.stack(borders))
        ctx.layout = steps, runs
        return torch.cat(outputs, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, borders = ctx.saved_tensors
        steps, runs = ctx.layout
        du, ddelta, dB, dC = (torch.empty_like(t) for t in (u, delta, B, C))
        dA = torch.zeros_like(A)
        carry = torch.zeros_like(borders[0])  # decayed gradient that enters the block from the right
        for border, block in reversed(list(zip(borders, _blocks(u.shape[-1], steps * runs), strict=True))):
            h, decay, inputs = _block_states(u, delta, A, B, block, steps, runs, border)
            dy_t, C_t = dy[..., block].permute(2, 0, 1), C[..., block].permute(2, 0, 1)
            dC[..., block] = torch.einsum("tbdn,tbd->bnt", h, dy_t)

            # g_t = C_t dy_t + decay_{t+1} g_{t+1}: the same recurrence, from right to left
            g = dy_t[..., None] * C_t[:, :, None]
            g[-1] += carry
            after = torch.cat([decay[1:], torch.ones_like(decay[:1])])
            g = _recurrence(after.flip(0), g.flip(0), torch.zeros_like(carry), steps, runs).flip(0)
            carry = decay[0] * g[0]

            B_t = B[..., block].permute(2, 0, 1)
            g_B = torch.einsum("tbdn,tbn->tbd", g, B_t)
            before = torch.cat([border[None], h[:-1]])
            d_exponent = g * before * decay  # gradient of delta_t A
            delta_t, u_t = (t[..., block].permute(2, 0, 1) for t in (delta, u))
            du[..., block] = (g_B * delta_t).permute(1, 2, 0)
            ddelta[..., block] = (g_B * u_t + torch.einsum("tbdn,dn->tbd", d_exponent, A)).permute(1, 2, 0)
            dA += torch.einsum("tbdn,tbd->dn", d_exponent, delta_t)
            dB[..., block] = torch.einsum("tbdn,tbd->bnt", g, inputs)
        return du, ddelta, dA, dB, dC


def _blocks(tokens: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def _block_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, block: slice, steps: int, runs: int, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States (T, B, D, N) of one block, its decays exp(delta A) of that shape, and its inputs delta u (T, B, D)."""
    delta_t, u_t = (t[..., block].permute(2, 0, 1) for t in (delta, u))
    inputs = delta_t * u_t
    decay = torch.exp(delta_t[..., None] * A)
    driven = inputs[..., None] * B[..., block].permute(2, 0, 1)[:, :, None]
    return _recurrence(decay, driven, h0, steps, runs), decay, inputs


def _recurrence(decay: Tensor, driven: Tensor, h0: Tensor, steps: int, runs: int) -> Tensor:
    """h_t = decay_t h_{t-1} + driven_t for all t, both (T, B, D, N), from h0 (B, D, N)."""
    tokens = decay.shape[0]
    lacking = -tokens % steps
    if lacking:  # decay 1 and input 0 leave the state as it is
        decay = torch.cat([decay, decay.new_ones(lacking, *decay.shape[1:])])
        driven = torch.cat([driven, driven.new_zeros(lacking, *driven.shape[1:])])
    # (S, P, B, D, N): step s of every run is one slice. Copies, for both are changed in place.
    within, h = (t.unflatten(0, (-1, steps)).transpose(0, 1).clone(memory_format=torch.contiguous_format) for t in (decay, driven))
    slices = list(zip(within.unbind(0), h.unbind(0), strict=True))
    for (decay_before, h_before), (decay_s, h_s) in zip(slices, slices[1:], strict=False):
        h_s.addcmul_(decay_s, h_before)
        decay_s.mul_(decay_before)  # now the decay since the start of the run
    entering = [h0]
    for decay_run, h_run in zip(within[-1].unbind(0), h[-1].unbind(0), strict=True):
        entering.append(torch.addcmul(h_run, decay_run, entering[-1]))
    h.addcmul_(within, torch.stack(entering[:-1]))
    return h.transpose(0, 1).flatten(0, 1)[:tokens]
