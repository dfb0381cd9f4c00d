"""Selective scan on a GPU, in Triton: softplus, scan, skip and gate fused, forward and backward, split along the sequence.

A volume gives few channels and very many tokens (96 channels and 110,592 tokens at 96^3), so a program takes a block of channels of TOKENS tokens, a
chunk, and thousands run side by side. What ties the chunks together is a small state, so there are three phases (`triton_kernels`):

    1. ends      what each chunk alone leaves behind, from a state of zero
    2. chain     the state that enters each chunk: the same recurrence over chunks, of which there are L / TOKENS
    3. apply     the scan within each chunk from the state that enters it, skip and gate, or, backward, all gradients

The backward pass goes the same way from right to left with the gradient g of the state, and takes the states that enter each chunk from
the forward pass: memory grows with B D L and not with B D L N. Sums over channels and chunks are taken in a fixed order, so that the same
call gives the same bits.

Any strides will do: tensors of (B, D, L) may lie in memory as (B, L, D), and results lie as what they belong to.
"""

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .fused import operator, will_differentiate

FLOAT64 = False
TOKENS = 64  # of a chunk, a multiple of `kernels.PIECE`
NUMBERS = 512  # of state that a program holds: channels times states
CHANNELS = 16  # of a program, at most
WARPS = 1  # of a program: with one, no sum leaves the warp
REGISTERS = {"_ends": 96, "_apply": 96, "_apply_backward": 168}  # of a thread, at most
RESIDENT = {"_ends": 20, "_apply": 20, "_apply_backward": 12}  # programs that a multiprocessor, with so many registers, holds at a time
CHAIN = (64, 32)  # chunks and numbers of state that a program of phase 2 takes at a time
HANDED = {"_ends": 2, "_apply": 3, "_apply_backward": 6}  # (BLOCK, T) numbers of a program's scratch


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Same arguments and result, (B, D, L), as `reference.scan`, for CUDA tensors; the state is float32."""
    tensors = u, delta, A.float().contiguous(), B, C, D, z, delta_bias
    y, _ = _scan(*tensors, delta_softplus, will_differentiate(*tensors))
    return y


def _outputs(u, delta, A, keep):
    """y (B, D, L), which lies in memory as delta does, and the states that enter the chunks (B, chunks, D, N)."""
    chunks = triton.cdiv(u.shape[2], TOKENS) if keep else 0
    return torch.empty_like(delta, dtype=u.dtype), u.new_empty((u.shape[0], chunks, *A.shape), dtype=torch.float32)


def _forward(u, delta, A, B, C, D, z, bias, softplus, keep):
    y, nothing = _outputs(u, delta, A, False)
    with _device(u):
        work = _Work(u, A)
        B, C = _by_token(B), _by_token(C)
        enters = _enters(work, u, delta, z, B, A, bias, softplus, reverse=False)
        given = *_strided(u, delta, u if z is None else z), B, C, A, _or(D, A), _or(bias, A)
        work.run(kernels._apply, *given, enters, *_strided(y), **_flags(D, z, bias, softplus))
    return y, enters if keep else nothing


def _backward(dy, u, delta, A, B, C, D, z, bias, softplus, enters):
    du, ddelta, dz = (None if t is None else torch.empty_like(t) for t in (u, delta, z))
    with _device(u):
        work = _Work(u, A)
        batch, chunks = enters.shape[:2]
        dA = enters.new_empty(batch * chunks, *A.shape)
        dD, dbias = (enters.new_empty(batch * chunks, A.shape[0]) for _ in range(2))
        dB, dC = (enters.new_empty(work.blocks, batch, u.shape[2], A.shape[1]) for _ in range(2))
        by_token = _by_token(B), _by_token(C)
        leaves = _enters(work, dy, delta, z, by_token[1], A, bias, softplus, reverse=True)
        given = *_strided(u, delta, u if z is None else z), *by_token, A, _or(D, A), _or(bias, A)
        results = *_strided(du, ddelta, du if dz is None else dz), dA, dB, dC, dD, dbias
        work.run(kernels._apply_backward, *given, *_strided(dy), enters, leaves, *results, batch=batch, **_flags(D, z, bias, softplus))
    sums = dA.sum(0).to(A.dtype), dB.sum(0).mT.to(B.dtype), dC.sum(0).mT.to(C.dtype)
    dD, dbias = (None if t is None else part.sum(0).to(t.dtype) for t, part in ((D, dD), (bias, dbias)))
    return du, ddelta, *sums, dD, dz, dbias


_scan = operator("homelib::selective_scan_triton", _forward, _backward, _outputs)


def _enters(work: "_Work", values: Tensor, delta, z, weight, A, bias, softplus, *, reverse: bool) -> Tensor:
    """Phases 1 and 2: the state that enters every chunk from the left, or the decayed gradient that enters it from the right (B, chunks, D, N)."""
    batch, chunks = values.shape[0], work.sizes["chunks"]
    enters = torch.empty(batch, chunks, *A.shape, device=A.device, dtype=torch.float32)
    if chunks == 1:
        return enters.zero_()
    ends, elapsed = torch.empty_like(enters), enters.new_empty(batch, chunks, A.shape[0])
    flags = _flags(None, z if reverse else None, bias, softplus)
    del flags["HAS_D"]
    gate = values if z is None else z
    work.run(kernels._ends, *_strided(values, gate, delta), weight, A, _or(bias, A), ends, elapsed, REVERSE=reverse, **flags)
    rows, columns = CHAIN
    places = (triton.cdiv(A.numel(), columns), batch)
    channels, state = A.shape
    kernels._chain_chunks[places](ends, elapsed, A, enters, chunks, state, channels, REVERSE=reverse, ROWS=rows, COLUMNS=columns, num_warps=4)
    return enters


class _Work:
    """How a scan is shared among programs: sizes that every kernel is told, and as many programs as the GPU holds at a time, each with scratch."""

    def __init__(self, u: Tensor, A: Tensor):
        (batch, channels, tokens), state = u.shape, A.shape[1]
        self.states = triton.next_power_of_2(state)
        self.block = min(CHANNELS, max(1, NUMBERS // self.states), triton.next_power_of_2(channels))
        self.blocks, chunks = triton.cdiv(channels, self.block), triton.cdiv(tokens, TOKENS)
        self.sizes = {"tokens": tokens, "channels": channels, "state": state, "chunks": chunks, "blocks": self.blocks, "items": batch * chunks * self.blocks}
        self.multiprocessors = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 1

    def run(self, kernel, *arguments, **more) -> None:
        """A kernel over all items; last among its tensors is the scratch."""
        name = kernel.__name__
        numbers = HANDED[name] * TOKENS * self.block
        if name == "_apply_backward":  # the states put aside
            numbers += TOKENS // kernels.FOUR.value * self.block * self.states
        programs = min(self.sizes["items"], self.multiprocessors * RESIDENT[name])
        scratch = torch.empty(programs * numbers, device=arguments[0].device, dtype=torch.float32)
        shapes = {"T": TOKENS, "BLOCK": self.block, "STATES": self.states, "SCRATCH": numbers}
        kernel[(programs,)](*arguments, scratch, **self.sizes, **shapes, **more, num_warps=WARPS, maxnreg=REGISTERS[name])


def _by_token(weight: Tensor) -> Tensor:
    """B or C (B, N, L) as (B, L, N), float32: the states of a token side by side."""
    return weight.mT.float().contiguous()


def _strided(*tensors: Tensor) -> list:
    """Each tensor with its strides."""
    return [part for t in tensors for part in (t, *t.stride())]


def _flags(D, z, bias, softplus) -> dict[str, bool]:
    return {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None, "SOFTPLUS": softplus}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """In the place of what is absent, a tensor that is not looked at."""
    return other if tensor is None else tensor


def _device(u: Tensor):
    """Kernels start on the current device: make it the tensors' own."""
    return torch.cuda.device(u.device if u.is_cuda else -1)


# TRITON_INTERPRET=1 makes Python functions of the kernels, on any device: for tests. How Triton reads it differs by version, what it made of a kernel tells.
DEVICES = ("cuda",) if isinstance(kernels._ends, triton.JITFunction) else ("cuda", "cpu")
