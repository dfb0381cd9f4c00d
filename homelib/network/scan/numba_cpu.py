"""Selective scan on a CPU, compiled by Numba: one pass over the tokens of a channel, forward and backward.

Each core takes some channels and walks along the sequence in blocks of T tokens: first all exp(delta A) of the block, which the compiler
turns into vector instructions, then the recurrence, N states at a time. The backward pass keeps the states at the block borders and
recomputes the rest: memory grows with B D L and not with B D L N. Step sizes, skip and gate are PyTorch's.

Letters as in `reference`; g is the gradient of the state h.
"""

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from .reference import skip_and_gate, step_sizes

T = 64  # tokens a block: T N numbers of each kind stay in the first-level cache
_MATH = {"contract", "reassoc", "nsz", "arcp"}  # may reorder sums, but infinities and NaN keep their meaning


def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
    """Same arguments and result as `reference.scan`, for CPU tensors; the state is float32."""
    steps = step_sizes(delta, delta_bias, delta_softplus)
    y, _ = _scan(*(t.float().contiguous() for t in (u, steps, A)), *(t.float().transpose(1, 2).contiguous() for t in (B, C)))
    return skip_and_gate(y, u, D, z)


@torch.library.custom_op("homelib::selective_scan_cpu", mutates_args=(), device_types="cpu")
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, D, L) and the states at the block borders (B, D, blocks, N); B and C are (B, L, N)."""
    y = torch.empty_like(u)
    borders = u.new_empty(*u.shape[:2], -(-u.shape[2] // T), A.shape[1])
    _run(_forward, u, delta, A, B, C, y, borders)
    return y, borders


@_scan.register_fake
def _(u, delta, A, B, C):
    return torch.empty_like(u), u.new_empty(*u.shape[:2], -(-u.shape[2] // T), A.shape[1])


@torch.library.custom_op("homelib::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def _scan_backward(dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    workers = min(u.shape[1], torch.get_num_threads())
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    dA = A.new_zeros(u.shape[0], *A.shape)
    dB, dC = B.new_zeros(workers, *B.shape), C.new_zeros(workers, *C.shape)  # one copy a worker: channels share them
    _run(_backward, dy.contiguous(), u, delta, A, B, C, borders, du, ddelta, dA, dB, dC)
    return du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0)


@_scan_backward.register_fake
def _(dy, u, delta, A, B, C, borders):
    return tuple(torch.empty_like(t) for t in (u, delta, A, B, C))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


_scan.register_autograd(lambda ctx, dy, _: _scan_backward(dy, *ctx.saved_tensors), setup_context=_setup)


def _run(kernel, *tensors: Tensor) -> None:
    """Run a kernel in place, on as many threads as PyTorch uses; Numba's first call would raise that number for PyTorch too."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    kernel(*(t.detach().numpy() for t in tensors))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@njit(fastmath=_MATH, inline="always")
def _decays(delta, A, bits, decay):
    """exp(delta_t A_n) for a block into `decay`, a float view of `bits`: 2^i 2^f, i whole and f in [-1/2, 1/2], 2^f by its series (error 1.2e-7)."""
    for t in range(delta.shape[0]):
        for n in range(A.shape[0]):
            x = max(np.float32(-126.0), min(np.float32(126.0), delta[t] * A[n] * np.float32(1.4426950408889634)))
            whole = np.floor(x + np.float32(0.5))
            f = x - whole
            p = np.float32(1.5403530393381606e-4)
            p = p * f + np.float32(1.3333558146428441e-3)
            p = p * f + np.float32(9.618129107628477e-3)
            p = p * f + np.float32(5.550410866482158e-2)
            p = p * f + np.float32(2.402265069591007e-1)
            p = p * f + np.float32(6.931471805599453e-1)
            p = p * f + np.float32(1.0)
            bits[t, n] = (np.int32(whole) + np.int32(127)) << np.int32(23)
            decay[t, n] *= p


@njit(parallel=True, cache=True, fastmath=_MATH)
def _forward(u, delta, A, B, C, y, borders):
    batch, channels, tokens = u.shape
    state = A.shape[1]
    for job in prange(batch * channels):
        b, d = job // channels, job % channels
        h = np.zeros(state, np.float32)
        bits = np.empty((T, state), np.int32)
        decay = bits.view(np.float32)
        for block in range(borders.shape[2]):
            start = block * T
            end = min(start + T, tokens)
            borders[b, d, block] = h
            _decays(delta[b, d, start:end], A[d], bits, decay)
            for t in range(start, end):
                driven = delta[b, d, t] * u[b, d, t]
                total = np.float32(0)
                for n in range(state):
                    h[n] = decay[t - start, n] * h[n] + driven * B[b, t, n]
                    total += h[n] * C[b, t, n]
                y[b, d, t] = total


@njit(parallel=True, cache=True, fastmath=_MATH)
def _backward(dy, u, delta, A, B, C, borders, du, ddelta, dA, dB, dC):
    batch, channels, tokens = u.shape
    state, workers = A.shape[1], dB.shape[0]
    for job in prange(batch * workers):
        b, worker = job // workers, job % workers
        bits = np.empty((T, state), np.int32)
        decay = bits.view(np.float32)
        h = np.empty((T + 1, state), np.float32)
        carry = np.empty(state, np.float32)
        for d in range(worker, channels, workers):
            carry[:] = 0
            for block in range(borders.shape[2] - 1, -1, -1):
                start = block * T
                end = min(start + T, tokens)
                h[0] = borders[b, d, block]
                _decays(delta[b, d, start:end], A[d], bits, decay)
                for t in range(start, end):
                    driven = delta[b, d, t] * u[b, d, t]
                    for n in range(state):
                        h[t - start + 1, n] = decay[t - start, n] * h[t - start, n] + driven * B[b, t, n]
                for t in range(end - 1, start - 1, -1):
                    step, value, dy_t, k = delta[b, d, t], u[b, d, t], dy[b, d, t], t - start
                    g_B, d_step = np.float32(0), np.float32(0)
                    for n in range(state):
                        g = dy_t * C[b, t, n] + carry[n]
                        dC[worker, b, t, n] += dy_t * h[k + 1, n]
                        dB[worker, b, t, n] += g * step * value
                        carry[n] = decay[k, n] * g
                        d_exponent = carry[n] * h[k, n]
                        g_B += g * B[b, t, n]
                        d_step += d_exponent * A[d, n]
                        dA[b, d, n] += d_exponent * step
                    du[b, d, t] = g_B * step
                    ddelta[b, d, t] = g_B * value + d_step
