"""Selective scan on a GPU, in Triton: softplus, scan, skip and gate fused, forward and backward, split along the sequence.

A volume gives few channels and very many tokens (96 channels and 110,592 tokens at 96^3), so a program takes CHANNELS channels of TOKENS tokens, a
chunk, and thousands run side by side. What ties the chunks together is a small state, so there are three phases:

    1. ends      what each chunk alone leaves behind: a weighted sum over its tokens, h_end = sum_t exp(A (steps after t)) driven_t
    2. chain     the state that enters each chunk: the same recurrence over chunks, of which there are L / TOKENS
    3. apply     the scan within each chunk from the state that enters it, skip and gate, or, backward, all gradients

The backward pass goes the same way from right to left with the gradient g of the state, and takes the states that enter each chunk from
the forward pass: memory grows with B D L and not with B D L N. Sums over channels and chunks are taken in a fixed order, so that the same
call gives the same bits.

Letters as in `reference`; s is the step size after softplus.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import operator, will_differentiate

FLOAT64 = False
TOKENS = 64  # of a chunk
CHANNELS = 16  # of a program
WARPS, WARPS_BACKWARD = 4, 8  # of a program; with 4 the backward pass has too few registers
CHAIN = (64, 32)  # chunks and numbers of state that a program of phase 2 takes at a time


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Same arguments and result, (B, D, L), as `reference.scan`, for CUDA tensors; the state is float32."""
    tensors = u, delta, A.float().contiguous(), B, C, D, z, delta_bias
    y, _ = _scan(*tensors, delta_softplus, will_differentiate(*tensors))
    return y


def _outputs(u, delta, A, keep):
    """y (B, D, L), and the states that enter the chunks (B, chunks, N, D)."""
    chunks = triton.cdiv(u.shape[2], TOKENS) if keep else 0
    return u.new_empty(u.shape), u.new_empty((u.shape[0], chunks, A.shape[1], u.shape[1]), dtype=torch.float32)


def _forward(u, delta, A, B, C, D, z, bias, softplus, keep):
    y, nothing = _outputs(u, delta, A, False)
    with _device(u):
        enters = _enters((u, delta, A, B, C, D, z, bias, softplus), u, reverse=False)
        grid, shapes = _layout(u, A)
        _apply[grid](*_tensors(u, delta, A, B, C, D, z, bias), enters, y, **_flags(D, z, bias, softplus), **shapes, num_warps=WARPS)
    return y, enters if keep else nothing


def _backward(dy, u, delta, A, B, C, D, z, bias, softplus, enters):
    (batch, channels, tokens), state, chunks = u.shape, A.shape[1], enters.shape[1]
    du, ddelta = torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(delta, memory_format=torch.contiguous_format)
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    with _device(u):
        grid, shapes = _layout(u, A)
        blocks = grid[1]
        dA = enters.new_empty(batch * chunks, state, channels)
        dD, dbias = (enters.new_empty(batch * chunks, channels) for _ in range(2))
        dB, dC = (enters.new_empty(blocks, batch, state, tokens) for _ in range(2))
        leaves = _enters((u, delta, A, B, C, D, z, bias, softplus), dy, reverse=True)
        given = _tensors(u, delta, A, B, C, D, z, bias)
        results = (du, ddelta, du if dz is None else dz, dA, dB, dC, dD, dbias)
        _apply_backward[grid](*given, dy, *dy.stride(), enters, leaves, *results, **_flags(D, z, bias, softplus), **shapes, num_warps=WARPS_BACKWARD)
    sums = dA.sum(0).T.to(A.dtype).contiguous(), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    dD, dbias = (None if t is None else part.sum(0).to(t.dtype) for t, part in ((D, dD), (bias, dbias)))
    return du, ddelta, *sums, dD, dz, dbias


_scan = operator("homelib::selective_scan_triton", _forward, _backward, _outputs)


def _enters(given, values: Tensor, *, reverse: bool) -> Tensor:
    """Phases 1 and 2: the state that enters every chunk from the left, or the decayed gradient that enters it from the right (B, chunks, N, D)."""
    u, delta, A, B, C, D, z, bias, softplus = given
    batch, channels, tokens = u.shape
    state, chunks = A.shape[1], -(-tokens // TOKENS)
    enters = torch.zeros(batch, chunks, state, channels, device=u.device, dtype=torch.float32)
    if chunks == 1:
        return enters
    ends, elapsed = torch.empty_like(enters), enters.new_empty(batch, chunks, channels)
    grid, shapes = _layout(u, A)
    flags = _flags(D, z if reverse else None, bias, softplus)
    gate, weight = u if z is None else z, C if reverse else B
    _ends[grid](
        values, *values.stride(), gate, *gate.stride(), delta, *delta.stride(), weight, *weight.stride(), A, _or(bias, A), ends, elapsed,
        REVERSE=reverse, HAS_Z=flags["HAS_Z"], HAS_BIAS=flags["HAS_BIAS"], SOFTPLUS=softplus, **shapes, num_warps=WARPS,
    )  # fmt: skip
    rows, columns = CHAIN
    places = (triton.cdiv(state * channels, columns), batch)
    _chain_chunks[places](ends, elapsed, A, enters, chunks, state, channels, REVERSE=reverse, ROWS=rows, COLUMNS=columns, num_warps=WARPS)
    return enters


def _layout(u: Tensor, A: Tensor) -> tuple[tuple[int, int, int], dict]:
    """One program a chunk, block of channels and element of the batch."""
    batch, channels, tokens = u.shape
    block = min(CHANNELS, triton.next_power_of_2(channels))
    chunks = triton.cdiv(tokens, TOKENS)
    sizes = {"tokens": tokens, "channels": channels, "state": A.shape[1], "chunks": chunks}
    return (chunks, triton.cdiv(channels, block), batch), sizes | {"T": TOKENS, "BLOCK": block}


def _tensors(u, delta, A, B, C, D, z, bias) -> list:
    """Each tensor of tokens with its strides; in the place of what is absent, a tensor that is not looked at."""
    z = u if z is None else z
    strided = [part for t in (u, delta, z, B, C) for part in (t, *t.stride())]
    return [*strided, A, _or(D, A), _or(bias, A)]


def _flags(D, z, bias, softplus) -> dict[str, bool]:
    return {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": bias is not None, "SOFTPLUS": softplus}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _device(u: Tensor):
    """Kernels start on the current device: make it the tensors' own."""
    return torch.cuda.device(u.device if u.is_cuda else -1)


# ---------------------------------------------------------------- kernels

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _then(decay_a, h_a, decay_b, h_b):
    """Two stretches of the recurrence h -> decay h + driven, one after the other."""
    return decay_a * decay_b, decay_b * h_a + h_b


@triton.jit
def _tile(pointer, stride_b, stride_d, stride_l, b, channel, token, inside):
    """(BLOCK, T) of a (B, D, L) tensor, float32, zero outside."""
    at = b * stride_b + channel[:, None].to(tl.int64) * stride_d + token[None, :].to(tl.int64) * stride_l
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _row(pointer, stride_b, stride_n, stride_l, b, n, token, inside):
    """(T,) of one state of a (B, N, L) tensor."""
    return tl.load(pointer + b * stride_b + n * stride_n + token.to(tl.int64) * stride_l, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _steps(raw, bias, inside, SOFTPLUS: tl.constexpr):
    """Step sizes, zero outside: there the state stays as it is. log(1 + e) by way of its own rounding error, which is exact for small e."""
    raw += bias[:, None]
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        one = 1.0 + e
        log1p = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
        raw = tl.maximum(raw, 0.0) + log1p
    return tl.where(inside, raw, 0.0)


@triton.jit
def _where_am_i(tokens, channels, T: tl.constexpr, BLOCK: tl.constexpr):
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel, token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), chunk * T + tl.arange(0, T)
    return chunk, b, channel, token, channel < channels, (channel < channels)[:, None] & (token < tokens)[None, :]


@triton.jit
def _vector(pointer, channel, exists, PRESENT: tl.constexpr):
    if PRESENT:
        return tl.load(pointer + channel, mask=exists, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _ends(
    value, v_b, v_d, v_l, gate, z_b, z_d, z_l, delta, d_b, d_d, d_l, weight, w_b, w_n, w_l, A, bias, ends, elapsed, tokens, channels, state, chunks,
    REVERSE: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 1: ends (B, chunks, N, D) and the chunks' sums of steps, elapsed (B, chunks, D)."""
    chunk, b, channel, token, exists, inside = _where_am_i(tokens, channels, T, BLOCK)
    s = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token, inside), _vector(bias, channel, exists, HAS_BIAS), inside, SOFTPLUS)
    x = _tile(value, v_b, v_d, v_l, b, channel, token, inside)
    if REVERSE:  # the gradient decays on its way to the chunk's first token, that one's decay included
        if HAS_Z:
            z = _tile(gate, z_b, z_d, z_l, b, channel, token, inside)
            x *= z * tl.sigmoid(z)
        way = tl.associative_scan(s, 1, _sum)
    else:
        x *= s
        way = tl.associative_scan(s, 1, _sum, reverse=True) - s
    base = b * chunks + chunk
    tl.store(elapsed + base * channels + channel, tl.sum(s, 1), mask=exists)
    for n in range(state):
        A_n = tl.load(A + channel * state + n, mask=exists, other=0.0) * LOG2_E
        W_n = _row(weight, w_b, w_n, w_l, b, n, token, token < tokens)
        end = tl.sum(tl.exp2(way * A_n[:, None]) * x * W_n[None, :], 1)
        tl.store(ends + (base * state + n) * channels + channel, end, mask=exists)


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def _chain_chunks(ends, elapsed, A, enters, chunks, state, channels, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Phase 2: enters (B, chunks, N, D), zero for the first chunk."""
    b, m = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    numbers = state * channels
    n, channel, exists = m // channels, m % channels, m < numbers
    A_m = tl.load(A + channel * state + n, mask=exists, other=0.0) * LOG2_E
    carry = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, chunks, ROWS):
        place = start + tl.arange(0, ROWS)
        chunk = chunks - 1 - place if REVERSE else place
        base, inside = b * chunks + chunk, (place < chunks)[:, None] & exists[None, :]
        steps = tl.load(elapsed + base[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        end = tl.load(ends + base[:, None] * numbers + m[None, :], mask=inside, other=0.0)
        decay, h = tl.associative_scan((tl.exp2(steps * A_m[None, :]), end), 0, _then)
        h += decay * carry[None, :]
        following = base - 1 if REVERSE else base + 1
        tl.store(enters + following[:, None] * numbers + m[None, :], h, mask=(place + 1 < chunks)[:, None] & exists[None, :])
        carry = tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[:, None], h, 0.0), 0)


@triton.jit
def _apply(
    u, u_b, u_d, u_l, delta, d_b, d_d, d_l, gate, z_b, z_d, z_l, B, B_b, B_n, B_l, C, C_b, C_n, C_l, A, D, bias, enters, y,
    tokens, channels, state, chunks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 3, forward."""
    chunk, b, channel, token, exists, inside = _where_am_i(tokens, channels, T, BLOCK)
    s = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token, inside), _vector(bias, channel, exists, HAS_BIAS), inside, SOFTPLUS)
    x = _tile(u, u_b, u_d, u_l, b, channel, token, inside)
    driven, total = s * x, x * _vector(D, channel, exists, HAS_D)[:, None]
    first, base = (tl.arange(0, T) == 0)[None, :], b * chunks + chunk
    for n in range(state):
        A_n = tl.load(A + channel * state + n, mask=exists, other=0.0) * LOG2_E
        B_t, C_t = _row(B, B_b, B_n, B_l, b, n, token, token < tokens), _row(C, C_b, C_n, C_l, b, n, token, token < tokens)
        h_in = tl.load(enters + (base * state + n) * channels + channel, mask=exists, other=0.0)
        decay = tl.exp2(s * A_n[:, None])
        _, h = tl.associative_scan((decay, driven * B_t[None, :] + tl.where(first, decay * h_in[:, None], 0.0)), 1, _then)
        total += h * C_t[None, :]
    if HAS_Z:
        z = _tile(gate, z_b, z_d, z_l, b, channel, token, inside)
        total *= z * tl.sigmoid(z)
    at = (b * channels + channel[:, None]) * tokens + token[None, :]
    tl.store(y + at, total, mask=inside)


@triton.jit
def _apply_backward(
    u, u_b, u_d, u_l, delta, d_b, d_d, d_l, gate, z_b, z_d, z_l, B, B_b, B_n, B_l, C, C_b, C_n, C_l, A, D, bias,
    dy, y_b, y_d, y_l, enters, leaves, du, ddelta, dz, dA, dB, dC, dD, dbias, tokens, channels, state, chunks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Phase 3, backward: the state h before every token, its gradient g after it, and from both all gradients."""
    chunk, b, channel, token, exists, inside = _where_am_i(tokens, channels, T, BLOCK)
    place = tl.arange(0, T)[None, :]
    left = inside & (place > 0)  # the token before is in the chunk, too
    right = (channel < channels)[:, None] & (token + 1 < tokens)[None, :] & (place < T - 1)
    shift = _vector(bias, channel, exists, HAS_BIAS)
    raw = _tile(delta, d_b, d_d, d_l, b, channel, token, inside)
    s = _steps(raw, shift, inside, SOFTPLUS)
    s_left = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token - 1, left), shift, left, SOFTPLUS)
    s_right = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token + 1, right), shift, right, SOFTPLUS)
    x, x_left = _tile(u, u_b, u_d, u_l, b, channel, token, inside), _tile(u, u_b, u_d, u_l, b, channel, token - 1, left)
    D_c = _vector(D, channel, exists, HAS_D)[:, None]
    upstream = _tile(dy, y_b, y_d, y_l, b, channel, token, inside)
    dy_t = upstream
    if HAS_Z:
        z = _tile(gate, z_b, z_d, z_l, b, channel, token, inside)
        dy_t = upstream * z * tl.sigmoid(z)
    driven, driven_left = s * x, s_left * x_left
    total, g_B, d_step = x * D_c, tl.zeros((BLOCK, T), tl.float32), tl.zeros((BLOCK, T), tl.float32)
    first, last, base = place == 0, place == T - 1, b * chunks + chunk
    for n in range(state):
        A_n = tl.load(A + channel * state + n, mask=exists, other=0.0)[:, None]
        B_t, C_t = _row(B, B_b, B_n, B_l, b, n, token, token < tokens)[None, :], _row(C, C_b, C_n, C_l, b, n, token, token < tokens)[None, :]
        B_left = _row(B, B_b, B_n, B_l, b, n, token - 1, (token - 1 < tokens) & (tl.arange(0, T) > 0))[None, :]
        border = (base * state + n) * channels + channel
        h_in, g_in = tl.load(enters + border, mask=exists, other=0.0), tl.load(leaves + border, mask=exists, other=0.0)
        decay = tl.exp2(s * (A_n * LOG2_E))
        _, before = tl.associative_scan((tl.exp2(s_left * (A_n * LOG2_E)), driven_left * B_left + tl.where(first, h_in[:, None], 0.0)), 1, _then)
        h = decay * before + driven * B_t
        _, g = tl.associative_scan((tl.exp2(s_right * (A_n * LOG2_E)), dy_t * C_t + tl.where(last, g_in[:, None], 0.0)), 1, _then, reverse=True)
        total += h * C_t
        g_B += g * B_t
        d_exponent = g * decay * before
        d_step += d_exponent * A_n
        tl.store(dA + border, tl.sum(d_exponent * s, 1), mask=exists)
        row = ((tl.program_id(1).to(tl.int64) * tl.num_programs(2) + b) * state + n) * tokens + token
        tl.store(dB + row, tl.sum(g * driven, 0), mask=token < tokens)
        tl.store(dC + row, tl.sum(h * dy_t, 0), mask=token < tokens)
    at = (b * channels + channel[:, None]) * tokens + token[None, :]
    tl.store(du + at, g_B * s + dy_t * D_c, mask=inside)
    d_raw = g_B * x + d_step
    if SOFTPLUS:
        d_raw *= tl.sigmoid(raw + shift[:, None])
    d_raw = tl.where(inside, d_raw, 0.0)
    tl.store(ddelta + at, d_raw, mask=inside)
    if HAS_Z:
        gate_t = tl.sigmoid(z)
        tl.store(dz + at, upstream * total * gate_t * (1.0 + z * (1.0 - gate_t)), mask=inside)
    tl.store(dD + base * channels + channel, tl.sum(dy_t * x, 1), mask=exists)
    tl.store(dbias + base * channels + channel, tl.sum(d_raw, 1), mask=exists)


# TRITON_INTERPRET=1 makes Python functions of the kernels, on any device: for tests. How Triton reads it differs by version, what it made of a kernel tells.
DEVICES = ("cuda",) if isinstance(_ends, triton.JITFunction) else ("cuda", "cpu")
