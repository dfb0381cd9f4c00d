"""Selective scan on a CPU, compiled by Numba: softplus, scan, skip and gate in one pass over memory, forward and backward.

LANES channels go side by side through the vector units. A core takes LANES channels of T tokens into a tile of its own, which stays in
its cache whatever strides the tensors have, runs the recurrence there, and writes the tile back. The backward pass keeps the states at
the tiles' borders and recomputes the rest, so that memory grows with B D L and not with B D L N. The cores share out the channels, and
the sequence too where channels are too few for them (`pieces_for`).

A tile is a flat array of rows of LANES numbers. Fixed distances between rows, and indices that cannot be negative, let the compiler turn
a loop over lanes into vector instructions without asking whether arrays overlap.

Letters as in `reference`; g is the gradient of the state h.
"""

import functools
from types import FunctionType

import numba
import numpy as np
import torch
from numba import njit, prange, types
from torch import Tensor

from .fused import operator, will_differentiate

DEVICES, FLOAT64 = ("cpu",), False
T = np.uint64(64)  # tokens a tile: the more, the fewer states are kept at borders; the backward pass holds 2 T N LANES numbers in its cache
LANES = np.uint64(32)  # or 48, where that shares the channels out better: see `lanes_for`
R1, R2, R3, R4, R5, R6, R7, R8, R9, R10 = (np.uint64(i) * LANES for i in range(1, 11))  # where the second row of a tile begins, and so on
MATH = {"contract", "reassoc", "nsz", "arcp"}  # may reorder sums, but infinities and NaN keep their meaning
LOG2_E, LN_2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Same arguments and result, (B, D, L), as `reference.scan`, for CPU tensors; the state is float32."""
    tensors = [None if t is None else t.float() for t in (u, delta, A, B, C, D, z, delta_bias)]
    y, _ = _scan(*tensors, delta_softplus, will_differentiate(*tensors))
    return y.to(u.dtype)


def _outputs(u, delta, A, keep):
    """y (B, D, L), and the states at the tiles' borders (B, tiles, N, D)."""
    return torch.empty_like(u), u.new_empty(u.shape[0], -(-u.shape[2] // int(T)) if keep else 0, A.shape[1], u.shape[1])


def _scan_forward(u, delta, A, B, C, D, z, bias, softplus, keep):
    y, borders = _outputs(u, delta, A, keep)
    _run(_forward, _inputs(u, delta, A, B, C, D, z, bias), (z is not None, softplus), (y, borders), reverse=False)
    return y, borders


def _scan_backward(dy, u, delta, A, B, C, D, z, bias, softplus, borders):
    (batch, channels, tokens), state = u.shape, A.shape[1]
    threads = torch.get_num_threads()
    groups, pieces = -(-channels // lanes_for(batch, channels, threads)), pieces_for(batch, channels, tokens, threads)
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(u if z is None else z)
    dA, dD, dbias = u.new_empty(batch * pieces, state, channels), u.new_empty(batch * pieces, channels), u.new_empty(batch * pieces, channels)
    dB, dC = u.new_empty(groups, batch, tokens, state), u.new_empty(groups, batch, tokens, state)
    results = (dy, borders, du, ddelta, dz, dA, dB, dC, dD, dbias)
    _run(_backward, _inputs(u, delta, A, B, C, D, z, bias), (z is not None, softplus), results, reverse=True)
    dB, dC = (t.sum(0).transpose(1, 2) for t in (dB, dC))
    gradients = (du, ddelta, dA.sum(0).T.contiguous(), dB, dC, dD.sum(0), dz, dbias.sum(0))
    return [None if given is None else gradient for given, gradient in zip((u, delta, A, B, C, D, z, bias), gradients, strict=True)]


_scan = operator("homelib::selective_scan_cpu", _scan_forward, _scan_backward, _outputs)


def lanes_for(batch: int, channels: int, threads: int) -> int:
    """Channels side by side: 32, or 48 where that ends sooner (96 channels are three groups of 32, too many or too few for two cores)."""

    def time(lanes):
        return -(-batch * -(-channels // lanes) // threads) * lanes

    return 48 if time(48) < time(32) else 32


def pieces_for(batch: int, channels: int, tokens: int, threads: int) -> int:
    """Pieces of the sequence that cores work on side by side. They cost a pass more, to learn what enters each: for over two cores a job."""
    jobs = batch * -(-channels // lanes_for(batch, channels, threads))
    return min(threads // jobs, max(1, tokens // 256)) if threads > 2 * jobs else 1


def _inputs(u, delta, A, B, C, D, z, bias) -> tuple[Tensor, ...]:
    """What is absent becomes zeros, or, for z, something that is not looked at."""
    none = u.new_zeros(u.shape[1])
    return u, delta, A, B, C, none if D is None else D, u if z is None else z, none if bias is None else bias


def _run(kernel, inputs: tuple[Tensor, ...], flags: tuple[bool, bool], results: tuple[Tensor, ...], *, reverse: bool) -> None:
    """Run a kernel in place, on as many threads as PyTorch uses; Numba's first call would raise that number for PyTorch too.

    In pieces: once from zero states, to learn what leaves each piece; the pieces are chained; and again with the states that enter.
    """
    u, A = inputs[0], inputs[2]
    (batch, channels, tokens), state, threads = u.shape, A.shape[1], torch.get_num_threads()
    compiled, pieces = _compiled(kernel, len(results), lanes_for(batch, channels, threads)), pieces_for(batch, channels, tokens, threads)
    enters, leaves = (u.new_zeros(batch, pieces, state, channels) for _ in range(2))
    elapsed = u.new_empty(batch, pieces, channels)  # sum of a piece's step sizes
    arrays = [t.detach().numpy() for t in (*inputs, *results, enters, leaves, elapsed)]
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # Numba's settings come to be as it loads
    compiled(*flags, *arrays)
    if pieces > 1:
        decay = torch.exp(A.T * elapsed[:, :, None])
        for before, after in _neighbours(pieces, reverse):
            enters[:, after] = decay[:, before] * enters[:, before] + leaves[:, before]
        compiled(*flags, *arrays)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _neighbours(pieces: int, reverse: bool) -> list[tuple[int, int]]:
    order = list(range(pieces))[:: -1 if reverse else 1]
    return list(zip(order, order[1:], strict=False))


@njit(fastmath=MATH, inline="always")
def exp2(x):
    """2^x = 2^i 2^f, i whole and f in [-1/2, 1/2], 2^f by its series (relative error 1.2e-7). From 2^-126 to 2^126; NaN stays NaN."""
    x = np.float32(-126) if x < np.float32(-126) else x
    x = np.float32(126) if x > np.float32(126) else x
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    p = np.float32(1.5403530393381606e-4)
    p = p * f + np.float32(1.3333558146428441e-3)
    p = p * f + np.float32(9.618129107628477e-3)
    p = p * f + np.float32(5.550410866482158e-2)
    p = p * f + np.float32(2.402265069591007e-1)
    p = p * f + np.float32(6.931471805599453e-1)
    p = p * f + ONE
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(fastmath=MATH, inline="always")
def sigmoid(x):
    return ONE / (ONE + exp2(-x * LOG2_E))


@njit(fastmath=MATH, inline="always")
def softplus(x):
    """log(1 + e^x) = max(x, 0) + 2 artanh(s), s = e^-|x| / (2 + e^-|x|) <= 1/3, by its series (relative error 1e-7)."""
    e = exp2(-abs(x) * LOG2_E)
    s = e / (TWO + e)
    q = s * s
    p = np.float32(1 / 13)
    p = p * q + np.float32(1 / 11)
    p = p * q + np.float32(1 / 9)
    p = p * q + np.float32(1 / 7)
    p = p * q + np.float32(1 / 5)
    p = p * q + np.float32(1 / 3)
    p = p * q + ONE
    return (x if x > ZERO else ZERO) + TWO * s * p


@njit(fastmath=MATH, inline="always")
def load(tile, row, rows, source, b, first, wide, start, count):
    """source[b, first : first + wide, start : start + count] into one row a token."""
    for c in range(wide):
        for t in range(count):
            tile[t * rows + row + c] = source[b, first + c, start + t]


@njit(fastmath=MATH, inline="always")
def store(tile, row, rows, target, b, first, wide, start, count):
    for c in range(wide):
        for t in range(count):
            target[b, first + c, start + t] = tile[t * rows + row + c]


def _forward(has_z, has_softplus, u, delta, A, B, C, D, z, bias, y, borders, enters, leaves, elapsed):
    batch, channels, tokens, state = np.uint64(u.shape[0]), np.uint64(u.shape[1]), np.uint64(u.shape[2]), np.uint64(A.shape[1])
    groups, pieces, tiles = (channels + LANES - np.uint64(1)) // LANES, np.uint64(enters.shape[1]), (tokens + T - np.uint64(1)) // T
    keep = borders.shape[1] > 0
    for job in prange(np.int64(batch * groups * pieces)):
        piece, group, b = np.uint64(job) % pieces, np.uint64(job) // pieces % groups, np.uint64(job) // pieces // groups
        first = group * LANES
        wide = min(LANES, channels - first)
        fixed = np.zeros(R3, np.float32)  # D, bias, elapsed
        states = np.zeros(state * R2, np.float32)  # rows a state: A, h
        tile = np.zeros(T * R5, np.float32)  # rows a token: step, driven, y, u, z
        for c in range(wide):
            fixed[c], fixed[R1 + c] = D[first + c], bias[first + c]
        for n in range(state):
            for c in range(wide):
                states[n * R2 + c] = A[first + c, n] * LOG2_E
                states[n * R2 + R1 + c] = enters[b, piece, n, first + c]

        for i in range(tiles * piece // pieces, tiles * (piece + np.uint64(1)) // pieces):
            start = i * T
            count = min(T, tokens - start)
            if keep:
                for n in range(state):
                    for c in range(wide):
                        borders[b, i, n, first + c] = states[n * R2 + R1 + c]
            load(tile, np.uint64(0), R5, delta, b, first, wide, start, count)
            load(tile, R3, R5, u, b, first, wide, start, count)
            for t in range(count):
                s = t * R5
                for c in range(LANES):
                    step = tile[s + c] + fixed[R1 + c]
                    step = softplus(step) if has_softplus else step
                    tile[s + c] = step
                    tile[s + R1 + c] = step * tile[s + R3 + c]
                    tile[s + R2 + c] = fixed[c] * tile[s + R3 + c]
                    fixed[R2 + c] += step
                for n in range(state):
                    p, B_n, C_n = n * R2, B[b, n, start + t], C[b, n, start + t]
                    for c in range(LANES):
                        h = exp2(tile[s + c] * states[p + c]) * states[p + R1 + c] + tile[s + R1 + c] * B_n
                        states[p + R1 + c] = h
                        tile[s + R2 + c] += h * C_n
            if has_z:
                load(tile, R4, R5, z, b, first, wide, start, count)
                for t in range(count):
                    s = t * R5
                    for c in range(LANES):
                        tile[s + R2 + c] *= tile[s + R4 + c] * sigmoid(tile[s + R4 + c])
            store(tile, R2, R5, y, b, first, wide, start, count)

        for c in range(wide):
            elapsed[b, piece, first + c] = fixed[R2 + c]
        for n in range(state):
            for c in range(wide):
                leaves[b, piece, n, first + c] = states[n * R2 + R1 + c]


def _backward(has_z, has_softplus, u, delta, A, B, C, D, z, bias, dy, borders, du, ddelta, dz, dA, dB, dC, dD, dbias, enters, leaves, elapsed):
    batch, channels, tokens, state = np.uint64(u.shape[0]), np.uint64(u.shape[1]), np.uint64(u.shape[2]), np.uint64(A.shape[1])
    groups, pieces, tiles = (channels + LANES - np.uint64(1)) // LANES, np.uint64(enters.shape[1]), (tokens + T - np.uint64(1)) // T
    for job in prange(np.int64(batch * groups * pieces)):
        piece, group, b = np.uint64(job) % pieces, np.uint64(job) // pieces % groups, np.uint64(job) // pieces // groups
        first = group * LANES
        wide = min(LANES, channels - first)
        fixed = np.zeros(R5, np.float32)  # D, bias, elapsed, dD, dbias
        states = np.zeros(state * R4, np.float32)  # rows a state: A, h, carry, dA
        tile = np.zeros(T * R10, np.float32)  # rows a token: step, u, dy (then that of y before the gate), driven, d_driven, d_step, y, slope, z, -
        history = np.zeros(T * state * R2, np.float32)  # rows a token and state: decay, h before
        for c in range(wide):
            fixed[c], fixed[R1 + c] = D[first + c], bias[first + c]
        for n in range(state):
            for c in range(wide):
                states[n * R4 + c] = A[first + c, n] * LOG2_E
                states[n * R4 + R2 + c] = enters[b, piece, n, first + c]

        last = tiles * (piece + np.uint64(1)) // pieces
        for back in range(last - tiles * piece // pieces):
            i = last - np.uint64(1) - back
            start = i * T
            count = min(T, tokens - start)
            for n in range(state):
                for c in range(wide):
                    states[n * R4 + R1 + c] = borders[b, i, n, first + c]
            load(tile, np.uint64(0), R10, delta, b, first, wide, start, count)
            load(tile, R1, R10, u, b, first, wide, start, count)
            load(tile, R2, R10, dy, b, first, wide, start, count)
            if has_z:
                load(tile, R8, R10, z, b, first, wide, start, count)
            for t in range(count):
                s = t * R10
                for c in range(LANES):
                    raw = tile[s + c] + fixed[R1 + c]
                    step = softplus(raw) if has_softplus else raw
                    tile[s + c] = step
                    tile[s + R3 + c] = step * tile[s + R1 + c]
                    tile[s + R4 + c] = ZERO
                    tile[s + R5 + c] = ZERO
                    tile[s + R6 + c] = fixed[c] * tile[s + R1 + c]
                    tile[s + R7 + c] = sigmoid(raw) if has_softplus else ONE
                    fixed[R2 + c] += step
                if has_z:  # dy becomes the gradient of y before the gate, z the gate's own factor of dz
                    for c in range(LANES):
                        gate, z_c, dy_c = sigmoid(tile[s + R8 + c]), tile[s + R8 + c], tile[s + R2 + c]
                        tile[s + R2 + c] = dy_c * z_c * gate
                        tile[s + R8 + c] = dy_c * gate * (ONE + z_c * (ONE - gate))
                for n in range(state):  # forward again
                    p, q, B_n, C_n, dC_n = n * R4, (t * state + n) * R2, B[b, n, start + t], C[b, n, start + t], ZERO
                    for c in range(LANES):
                        decay, before = exp2(tile[s + c] * states[p + c]), states[p + R1 + c]
                        h = decay * before + tile[s + R3 + c] * B_n
                        history[q + c] = decay
                        history[q + R1 + c] = before
                        states[p + R1 + c] = h
                        tile[s + R6 + c] += h * C_n
                        dC_n += h * tile[s + R2 + c]
                    dC[group, b, start + t, n] = dC_n
            for back_t in range(count):
                t = count - np.uint64(1) - back_t
                s = t * R10
                for n in range(state):
                    p, q, B_n, C_n, dB_n = n * R4, (t * state + n) * R2, B[b, n, start + t], C[b, n, start + t], ZERO
                    for c in range(LANES):
                        g = tile[s + R2 + c] * C_n + states[p + R2 + c]
                        dB_n += g * tile[s + R3 + c]
                        tile[s + R4 + c] += g * B_n
                        carry = history[q + c] * g
                        states[p + R2 + c] = carry
                        d_exponent = carry * history[q + R1 + c]
                        tile[s + R5 + c] += d_exponent * states[p + c]
                        states[p + R3 + c] += d_exponent * tile[s + c]
                    dB[group, b, start + t, n] = dB_n
                for c in range(LANES):
                    step, u_c, dy_c, d_driven = tile[s + c], tile[s + R1 + c], tile[s + R2 + c], tile[s + R4 + c]
                    d_step = (d_driven * u_c + tile[s + R5 + c] * LN_2) * tile[s + R7 + c]
                    tile[s + R4 + c] = d_driven * step + dy_c * fixed[c]
                    tile[s + R5 + c] = d_step
                    tile[s + R8 + c] *= tile[s + R6 + c]
                    fixed[R3 + c] += dy_c * u_c
                    fixed[R4 + c] += d_step
            store(tile, R4, R10, du, b, first, wide, start, count)
            store(tile, R5, R10, ddelta, b, first, wide, start, count)
            if has_z:
                store(tile, R8, R10, dz, b, first, wide, start, count)

        for c in range(wide):
            elapsed[b, piece, first + c] = fixed[R2 + c]
            dD[b * pieces + piece, first + c] = fixed[R3 + c]
            dbias[b * pieces + piece, first + c] = fixed[R4 + c]
        for n in range(state):
            for c in range(wide):
                leaves[b, piece, n, first + c] = states[n * R4 + R2 + c]
                dA[b * pieces + piece, n, first + c] = states[n * R4 + R3 + c]


@functools.cache
def _compiled(kernel, results: int, lanes: int):
    """A kernel for any strides, compiled at its first use (seconds, then kept on disk). Lanes are a constant of it: the function is copied with its own."""
    rows = {f"R{i}": np.uint64(i * lanes) for i in range(1, 11)}
    copy = FunctionType(kernel.__code__, globals() | rows | {"LANES": np.uint64(lanes)}, f"{kernel.__name__}_{lanes}")
    copy.__qualname__ = copy.__name__  # the kept file bears it
    line, matrix, volume, hyper = (types.Array(types.float32, dimensions, "A") for dimensions in (1, 2, 3, 4))
    kinds = {1: line, 2: matrix, 3: volume, 4: hyper}
    inputs = (volume, volume, matrix, volume, volume, line, volume, line)
    shapes = {2: (3, 4), 10: (3, 4, 3, 3, 3, 3, 4, 4, 2, 2)}[results]
    signature = types.void(types.boolean, types.boolean, *inputs, *(kinds[d] for d in shapes), hyper, hyper, volume)
    return njit(signature, parallel=True, cache=True, fastmath=MATH)(copy)
