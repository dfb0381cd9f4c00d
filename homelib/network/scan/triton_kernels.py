"""The kernels of `triton_gpu`: what one program does with a chunk of T tokens and a block of channels.

The recurrence runs token by token, the state of the block in registers, (BLOCK, N): channels over the lanes of a warp, a few numbers of state in each, so
that sums over states and over channels stay within the warp. What is the same for all states (step sizes, gates) is computed before and after that loop,
(BLOCK, PIECE) at a time, and handed over in `scratch`, memory of the program's own, small enough to stay in the cache. A program takes one item after the
other: item = (chunk, block, element of the batch).

The loop takes FOUR tokens at a time: all that they need is asked for before any of it is used, or each token would wait for memory by itself.

Letters as in `reference`; s is the step size after softplus, x = u, `driven` = s x, g the gradient of the state. A is taken times log2(e), since exp2 is what
a GPU computes. `weight`, B and C are (B, L, N), float32.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
PIECE: tl.constexpr = tl.constexpr(16)  # tokens of a tile; a chunk holds a multiple of them
FOUR: tl.constexpr = tl.constexpr(4)  # tokens at a time, whose states the backward pass holds in registers


# ---------------------------------------------------------------- places


@triton.jit
def _item(item, chunks, blocks, BLOCK: tl.constexpr):
    """Element of the batch, chunk, and (BLOCK,) channels."""
    rest = item // blocks
    return (rest // chunks).to(tl.int64), rest % chunks, (item % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _piece(first, channel, channels, tokens):
    """(PIECE,) tokens from the first on, and which (BLOCK, PIECE) numbers exist."""
    token = first + tl.arange(0, PIECE)
    return token, (channel < channels)[:, None] & (token < tokens)[None, :]


@triton.jit
def _places(stride_b, stride_d, stride_l, b, channel, token):
    """Of (BLOCK, PIECE) numbers in a (B, D, L) tensor."""
    return b * stride_b + channel[:, None].to(tl.int64) * stride_d + token[None, :].to(tl.int64) * stride_l


@triton.jit
def _tile(pointer, stride_b, stride_d, stride_l, b, channel, token, inside):
    """(BLOCK, PIECE) of a (B, D, L) tensor, float32, zero outside."""
    return tl.load(pointer + _places(stride_b, stride_d, stride_l, b, channel, token), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _vector(pointer, channel, channels, PRESENT: tl.constexpr):
    """(BLOCK,) of a (D,) tensor, zero where it is absent."""
    if PRESENT:
        return tl.load(pointer + channel, mask=channel < channels, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _states(channel, channels, state, STATES: tl.constexpr):
    """Places of (BLOCK, N) numbers in (D, N), and which exist."""
    n = tl.arange(0, STATES)
    return channel[:, None] * state + n[None, :], (channel < channels)[:, None] & (n < state)[None, :]


@triton.jit
def _handed(scratch, which, first, T: tl.constexpr, BLOCK: tl.constexpr):
    """Places of (BLOCK, PIECE) numbers handed over, the channels of a token side by side."""
    return scratch + which * (T * BLOCK) + (first + tl.arange(0, PIECE))[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None]


@triton.jit
def _at(scratch, which, t, T: tl.constexpr, BLOCK: tl.constexpr):
    """Places of the (BLOCK,) numbers of one token handed over."""
    return scratch + which * (T * BLOCK) + t * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _four(scratch, which, t, T: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) of each of four tokens handed over."""
    at = _at(scratch, which, t, T, BLOCK)
    return tl.load(at), tl.load(at + BLOCK), tl.load(at + 2 * BLOCK), tl.load(at + 3 * BLOCK)


@triton.jit
def _row(pointer, b, token, tokens, state, STATES: tl.constexpr):
    """(N,) of one token of a (B, L, N) tensor, zero outside."""
    n = tl.arange(0, STATES)
    return tl.load(pointer + (b * tokens + token) * state + n, mask=n < tl.where(token < tokens, state, 0), other=0.0)


@triton.jit
def _four_rows(pointer, b, token, tokens, state, STATES: tl.constexpr):
    """(N,) of each of four tokens."""
    first, second = _row(pointer, b, token, tokens, state, STATES), _row(pointer, b, token + 1, tokens, state, STATES)
    return first, second, _row(pointer, b, token + 2, tokens, state, STATES), _row(pointer, b, token + 3, tokens, state, STATES)


# ---------------------------------------------------------------- steps and gates


@triton.jit
def _steps(raw, inside, SOFTPLUS: tl.constexpr):
    """Step sizes of delta + bias, zero outside: there the state stays as it is. log(1 + e) as 2 artanh(e / (2 + e)), whose series is exact for small e, too."""
    if SOFTPLUS:
        e = tl.exp2(-tl.abs(raw * LOG2_E))
        w = e / (2.0 + e)
        v = w * w
        series = 1.0 + v * (1 / 3 + v * (1 / 5 + v * (1 / 7 + v * (1 / 9 + v * (1 / 11 + v / 13)))))
        raw = tl.maximum(raw, 0.0) + 2.0 * w * series
    return tl.where(inside, raw, 0.0)


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _decay(s, A_n):
    """exp(s A), (BLOCK, N), of a token's steps."""
    return tl.exp2(s[:, None] * A_n)


@triton.jit
def _forth(h, decay, driven, B_t):
    """The state after a token."""
    return h * decay + driven[:, None] * B_t[None, :]


# ---------------------------------------------------------------- the three phases


@triton.jit
def _ends(
    value, v_b, v_d, v_l, gate, z_b, z_d, z_l, delta, d_b, d_d, d_l, weight, A, bias, ends, elapsed, scratch, tokens, channels, state, chunks, blocks, items,
    REVERSE: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Phase 1: what each chunk alone leaves behind, ends (B, chunks, D, N), and the sums of its steps, elapsed (B, chunks, D).

    Forward from left to right, of driven and B; with REVERSE from right to left, of dy, gated, and C, the decay of each token after what it adds.
    """
    scratch += tl.program_id(0) * SCRATCH
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        b, chunk, channel = _item(item, chunks, blocks, BLOCK)
        shift, passed = _vector(bias, channel, channels, HAS_BIAS), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, T, PIECE):
            token, inside = _piece(chunk * T + first, channel, channels, tokens)
            s = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token, inside) + shift[:, None], inside, SOFTPLUS)
            x = _tile(value, v_b, v_d, v_l, b, channel, token, inside)
            if REVERSE:
                if HAS_Z:
                    x *= _silu(_tile(gate, z_b, z_d, z_l, b, channel, token, inside))
            else:
                x *= s
            tl.store(_handed(scratch, 0, first, T, BLOCK), s)
            tl.store(_handed(scratch, 1, first, T, BLOCK), x)
            passed += tl.sum(s, 1)
        tl.store(elapsed + (b * chunks + chunk) * channels + channel, passed, mask=channel < channels)
        tl.debug_barrier()
        place, exists = _states(channel, channels, state, STATES)
        A_n = tl.load(A + place, mask=exists, other=0.0) * LOG2_E
        h = tl.zeros((BLOCK, STATES), tl.float32)
        for i in range(T // FOUR):
            t = T - FOUR - i * FOUR if REVERSE else i * FOUR
            s_0, s_1, s_2, s_3 = _four(scratch, 0, t, T, BLOCK)
            x_0, x_1, x_2, x_3 = _four(scratch, 1, t, T, BLOCK)
            w_0, w_1, w_2, w_3 = _four_rows(weight, b, chunk * T + t, tokens, state, STATES)
            if REVERSE:
                h = (h + x_3[:, None] * w_3[None, :]) * _decay(s_3, A_n)
                h = (h + x_2[:, None] * w_2[None, :]) * _decay(s_2, A_n)
                h = (h + x_1[:, None] * w_1[None, :]) * _decay(s_1, A_n)
                h = (h + x_0[:, None] * w_0[None, :]) * _decay(s_0, A_n)
            else:
                h = _forth(h, _decay(s_0, A_n), x_0, w_0)
                h = _forth(h, _decay(s_1, A_n), x_1, w_1)
                h = _forth(h, _decay(s_2, A_n), x_2, w_2)
                h = _forth(h, _decay(s_3, A_n), x_3, w_3)
        tl.store(ends + (b * chunks + chunk) * channels * state + place, h, mask=exists)
        tl.debug_barrier()


@triton.jit
def _then(decay_a, h_a, decay_b, h_b):
    """Two stretches of the recurrence h -> decay h + driven, one after the other."""
    return decay_a * decay_b, decay_b * h_a + h_b


@triton.jit
def _chain_chunks(ends, elapsed, A, enters, chunks, state, channels, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Phase 2: the state that enters each chunk, enters (B, chunks, D, N), zero for the first one."""
    first = 0
    if REVERSE:
        first = chunks - 1
    b, m = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    numbers = state * channels
    channel, exists = m // state, m < numbers
    A_m = tl.load(A + m, mask=exists, other=0.0) * LOG2_E
    carry = tl.zeros((COLUMNS,), tl.float32)
    tl.store(enters + (b * chunks + first) * numbers + m, carry, mask=exists)
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
    u, u_b, u_d, u_l, delta, d_b, d_d, d_l, gate, z_b, z_d, z_l, B, C, A, D, bias, enters, y, y_b, y_d, y_l, scratch,
    tokens, channels, state, chunks, blocks, items,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Phase 3, forward."""
    scratch += tl.program_id(0) * SCRATCH
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        b, chunk, channel = _item(item, chunks, blocks, BLOCK)
        shift, skip = _vector(bias, channel, channels, HAS_BIAS)[:, None], _vector(D, channel, channels, HAS_D)[:, None]
        for first in range(0, T, PIECE):
            token, inside = _piece(chunk * T + first, channel, channels, tokens)
            s = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token, inside) + shift, inside, SOFTPLUS)
            tl.store(_handed(scratch, 0, first, T, BLOCK), s)
            tl.store(_handed(scratch, 1, first, T, BLOCK), s * _tile(u, u_b, u_d, u_l, b, channel, token, inside))
        tl.debug_barrier()
        place, exists = _states(channel, channels, state, STATES)
        A_n = tl.load(A + place, mask=exists, other=0.0) * LOG2_E
        h = tl.load(enters + (b * chunks + chunk) * channels * state + place, mask=exists, other=0.0)
        for i in range(T // FOUR):
            t = i * FOUR
            s_0, s_1, s_2, s_3 = _four(scratch, 0, t, T, BLOCK)
            x_0, x_1, x_2, x_3 = _four(scratch, 1, t, T, BLOCK)
            B_0, B_1, B_2, B_3 = _four_rows(B, b, chunk * T + t, tokens, state, STATES)
            C_0, C_1, C_2, C_3 = _four_rows(C, b, chunk * T + t, tokens, state, STATES)
            h_0 = _forth(h, _decay(s_0, A_n), x_0, B_0)
            h_1 = _forth(h_0, _decay(s_1, A_n), x_1, B_1)
            h_2 = _forth(h_1, _decay(s_2, A_n), x_2, B_2)
            h = _forth(h_2, _decay(s_3, A_n), x_3, B_3)
            at = _at(scratch, 2, t, T, BLOCK)
            tl.store(at, tl.sum(h_0 * C_0[None, :], 1))
            tl.store(at + BLOCK, tl.sum(h_1 * C_1[None, :], 1))
            tl.store(at + 2 * BLOCK, tl.sum(h_2 * C_2[None, :], 1))
            tl.store(at + 3 * BLOCK, tl.sum(h * C_3[None, :], 1))
        tl.debug_barrier()
        for first in range(0, T, PIECE):
            token, inside = _piece(chunk * T + first, channel, channels, tokens)
            total = tl.load(_handed(scratch, 2, first, T, BLOCK)) + _tile(u, u_b, u_d, u_l, b, channel, token, inside) * skip
            if HAS_Z:
                total *= _silu(_tile(gate, z_b, z_d, z_l, b, channel, token, inside))
            tl.store(y + _places(y_b, y_d, y_l, b, channel, token), total, mask=inside)


@triton.jit
def _back(
    g, d_A, h_before, h, decay, s, driven, dy, B_t, C_t, A_n, at, dB, dC, here, exists,
    HAS_Z: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of the backward pass: g comes from the right and goes on to the left; what it does to the token is handed over (`at`) or stored (`here`)."""
    g += dy[:, None] * C_t[None, :]
    d_exponent = g * decay * h_before
    tl.store(at + 3 * (T * BLOCK), tl.sum(g * B_t[None, :], 1))
    tl.store(at + 4 * (T * BLOCK), tl.sum(d_exponent * A_n, 1) * LN_2)
    if HAS_Z:
        tl.store(at + 5 * (T * BLOCK), tl.sum(h * C_t[None, :], 1))
    tl.store(dB + here, tl.sum(g * driven[:, None], 0), mask=exists)
    tl.store(dC + here, tl.sum(h * dy[:, None], 0), mask=exists)
    return g * decay, d_A + d_exponent * s[:, None]


@triton.jit
def _apply_backward(
    u, u_b, u_d, u_l, delta, d_b, d_d, d_l, gate, z_b, z_d, z_l, B, C, A, D, bias,
    dy, y_b, y_d, y_l, enters, leaves, du, du_b, du_d, du_l, ddelta, dd_b, dd_d, dd_l, dz, dz_b, dz_d, dz_l, dA, dB, dC, dD, dbias, scratch,
    tokens, channels, state, chunks, blocks, items, batch,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, SCRATCH: tl.constexpr,
):  # fmt: skip
    """Phase 3, backward: the states again, of which that before every fourth token is put aside, then from right to left, four tokens at a time.

    dA (B chunks, D, N), dD and dbias (B chunks, D), dB and dC (blocks, B, L, N) are sums of what one program sees.
    """
    scratch += tl.program_id(0) * SCRATCH
    lane = tl.arange(0, BLOCK)[:, None] * STATES + tl.arange(0, STATES)[None, :]
    aside = scratch + 6 * (T * BLOCK) + lane
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        b, chunk, channel = _item(item, chunks, blocks, BLOCK)
        part = (item % blocks).to(tl.int64) * batch
        shift = _vector(bias, channel, channels, HAS_BIAS)[:, None]
        for first in range(0, T, PIECE):
            token, inside = _piece(chunk * T + first, channel, channels, tokens)
            s = _steps(_tile(delta, d_b, d_d, d_l, b, channel, token, inside) + shift, inside, SOFTPLUS)
            gated = _tile(dy, y_b, y_d, y_l, b, channel, token, inside)
            if HAS_Z:
                gated *= _silu(_tile(gate, z_b, z_d, z_l, b, channel, token, inside))
            tl.store(_handed(scratch, 0, first, T, BLOCK), s)
            tl.store(_handed(scratch, 1, first, T, BLOCK), s * _tile(u, u_b, u_d, u_l, b, channel, token, inside))
            tl.store(_handed(scratch, 2, first, T, BLOCK), gated)
        tl.debug_barrier()

        place, exists = _states(channel, channels, state, STATES)
        A_n = tl.load(A + place, mask=exists, other=0.0) * LOG2_E
        border = (b * chunks + chunk) * channels * state + place
        h = tl.load(enters + border, mask=exists, other=0.0)
        for i in range(T // FOUR):
            s_0, s_1, s_2, s_3 = _four(scratch, 0, i * FOUR, T, BLOCK)
            x_0, x_1, x_2, x_3 = _four(scratch, 1, i * FOUR, T, BLOCK)
            B_0, B_1, B_2, B_3 = _four_rows(B, b, chunk * T + i * FOUR, tokens, state, STATES)
            tl.store(aside + i * (BLOCK * STATES), h)
            h = _forth(h, _decay(s_0, A_n), x_0, B_0)
            h = _forth(h, _decay(s_1, A_n), x_1, B_1)
            h = _forth(h, _decay(s_2, A_n), x_2, B_2)
            h = _forth(h, _decay(s_3, A_n), x_3, B_3)

        g, d_A = tl.load(leaves + border, mask=exists, other=0.0), tl.zeros((BLOCK, STATES), tl.float32)
        for i in range(T // FOUR):
            t = T - FOUR - i * FOUR
            h = tl.load(aside + t // FOUR * (BLOCK * STATES))
            s_0, s_1, s_2, s_3 = _four(scratch, 0, t, T, BLOCK)
            x_0, x_1, x_2, x_3 = _four(scratch, 1, t, T, BLOCK)
            B_0, B_1, B_2, B_3 = _four_rows(B, b, chunk * T + t, tokens, state, STATES)
            dy_0, dy_1, dy_2, dy_3 = _four(scratch, 2, t, T, BLOCK)
            C_0, C_1, C_2, C_3 = _four_rows(C, b, chunk * T + t, tokens, state, STATES)
            e_0, e_1, e_2, e_3 = _decay(s_0, A_n), _decay(s_1, A_n), _decay(s_2, A_n), _decay(s_3, A_n)
            h_0 = _forth(h, e_0, x_0, B_0)
            h_1 = _forth(h_0, e_1, x_1, B_1)
            h_2 = _forth(h_1, e_2, x_2, B_2)
            h_3 = _forth(h_2, e_3, x_3, B_3)
            at, here, n, left = _at(scratch, 0, t, T, BLOCK), ((part + b) * tokens + chunk * T + t) * state, tl.arange(0, STATES), tokens - chunk * T - t
            here += n
            in_0, in_1 = n < tl.where(left > 0, state, 0), n < tl.where(left > 1, state, 0)
            in_2, in_3 = n < tl.where(left > 2, state, 0), n < tl.where(left > 3, state, 0)
            g, d_A = _back(g, d_A, h_2, h_3, e_3, s_3, x_3, dy_3, B_3, C_3, A_n, at + 3 * BLOCK, dB, dC, here + 3 * state, in_3, HAS_Z, T, BLOCK)
            g, d_A = _back(g, d_A, h_1, h_2, e_2, s_2, x_2, dy_2, B_2, C_2, A_n, at + 2 * BLOCK, dB, dC, here + 2 * state, in_2, HAS_Z, T, BLOCK)
            g, d_A = _back(g, d_A, h_0, h_1, e_1, s_1, x_1, dy_1, B_1, C_1, A_n, at + BLOCK, dB, dC, here + state, in_1, HAS_Z, T, BLOCK)
            g, d_A = _back(g, d_A, h, h_0, e_0, s_0, x_0, dy_0, B_0, C_0, A_n, at, dB, dC, here, in_0, HAS_Z, T, BLOCK)
        tl.store(dA + border, d_A, mask=exists)
        tl.debug_barrier()

        skip = _vector(D, channel, channels, HAS_D)[:, None]
        d_skip, d_shift = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, T, PIECE):
            token, inside = _piece(chunk * T + first, channel, channels, tokens)
            s, g_B = tl.load(_handed(scratch, 0, first, T, BLOCK)), tl.load(_handed(scratch, 3, first, T, BLOCK))
            gated = tl.load(_handed(scratch, 2, first, T, BLOCK))
            x = _tile(u, u_b, u_d, u_l, b, channel, token, inside)
            d_s = g_B * x + tl.load(_handed(scratch, 4, first, T, BLOCK))
            if SOFTPLUS:
                d_s *= tl.sigmoid(_tile(delta, d_b, d_d, d_l, b, channel, token, inside) + shift)
            d_s = tl.where(inside, d_s, 0.0)
            if HAS_Z:
                z, upstream = _tile(gate, z_b, z_d, z_l, b, channel, token, inside), _tile(dy, y_b, y_d, y_l, b, channel, token, inside)
                opened = tl.sigmoid(z)
                total = tl.load(_handed(scratch, 5, first, T, BLOCK)) + x * skip
                tl.store(dz + _places(dz_b, dz_d, dz_l, b, channel, token), upstream * total * opened * (1.0 + z * (1.0 - opened)), mask=inside)
            tl.store(du + _places(du_b, du_d, du_l, b, channel, token), g_B * s + gated * skip, mask=inside)
            tl.store(ddelta + _places(dd_b, dd_d, dd_l, b, channel, token), d_s, mask=inside)
            d_skip += tl.sum(gated * x, 1)
            d_shift += tl.sum(d_s, 1)
        row = (b * chunks + chunk) * channels + channel
        tl.store(dD + row, d_skip, mask=channel < channels)
        tl.store(dbias + row, d_shift, mask=channel < channels)
        tl.debug_barrier()
