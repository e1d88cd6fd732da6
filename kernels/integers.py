"""Second read of a quantized tensor: its integers, in the layouts the GEMMs contract along.

Blocks are taken in the opposite order of the first read, so that this one begins with what that one left in L2. Compile
without fused multiply-add: the reference rounds after each multiplication and addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.select import round_half_even
from lightning_int8.kernels.statistics import load_tile


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def uniform(i, j, seed):
    """See `rounding.uniform`, at the rows ``i`` and columns ``j``, one of them ``[n, 1]`` and the other ``[1, n]``."""
    row = _mix(i.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True))
    h = (row ^ (j.to(tl.uint32) * 0x9E3779B1)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _integer_bits(v, noise, limit, mask):
    """``v`` rounded, as an int32 whose low 16 bits are those of the integer; 0 where ``mask`` is 0 (else it is -1).

    To the nearest, halves to even, the integers need no limit: scales see to it. With ``noise`` they are held within
    ``±limit``. Adding 1.5·2^23 leaves the integer in the low bits of the sum, whose last bit is worth 1.
    """
    if noise is not None:
        v = tl.minimum(tl.maximum(tl.floor(v + noise), -limit), limit)
    return (v + 12582912.0).to(tl.int32, bitcast=True) & mask


@triton.jit
def _round_small(v, noise):
    """``v``, but what is below one step rounded up or down at random, so that its mean stays."""
    return tl.where(tl.abs(v) < 1.0, tl.floor(v + noise), v)


@triton.jit
def _finite_mask(inverse):
    """-1, or 0 where the scale carries NaN or an infinity: the integers under it are defined to be 0."""
    return tl.where(inverse > 0.0, -1, 0)


@triton.jit
def _high_byte(bits):
    """The high byte of the integer in ``bits`` that leaves a low byte in [-128, 127]."""
    return ((bits + 128) >> 8).to(tl.int8)


@triton.jit
def rows_of_block(B: tl.constexpr, RUN: tl.constexpr):
    """The order in which a program takes the rows of a block: those that one thread will hold are adjacent.

    A thread gets every ``B / RUN``-th row of a tile. Given that these are adjacent rows of the matrix, it holds runs of
    ``RUN`` bytes of the transposed plane, which go through shared memory as words instead of bytes.
    """
    i = tl.arange(0, B)
    return (i % (B // RUN)) * RUN + i // (B // RUN)


@triton.jit
def _transposed(value, B: tl.constexpr, PART: tl.constexpr, RUN: tl.constexpr):
    """A tile with rows as in `rows_of_block`, transposed, and its rows, now columns, in their own order."""
    return tl.reshape(tl.permute(tl.reshape(value, [RUN, B // RUN, PART]), (2, 1, 0)), [PART, B])


@triton.jit
def _store_low(low, low_t, value, row, column, rows, columns, B: tl.constexpr, PART: tl.constexpr, RUN: tl.constexpr):
    """Writes a tile into ``low [rows, QB·B]`` and transposed into ``low_t [columns, RB·B]``, unless ``None``.

    Padding rows of one are padding columns of the other, where the tile's values are zero.
    """
    j = tl.arange(0, PART)
    if low is not None:
        i = rows_of_block(B, RUN)
        pitch = tl.cdiv(columns, B) * B
        low += row.to(tl.int64) * pitch + column
        tl.store(low + (i[:, None] * pitch + j[None, :]), value, mask=(i < rows - row)[:, None])
    if low_t is not None:
        i = tl.arange(0, B)
        pitch_t = tl.cdiv(rows, B) * B
        low_t += column.to(tl.int64) * pitch_t + row
        mask = (j < columns - column)[:, None]
        tl.store(low_t + (j[:, None] * pitch_t + i[None, :]), _transposed(value, B, PART, RUN), mask=mask)


@triton.jit
def _store_high(high, high_t, value, slot, part, B: tl.constexpr, PART: tl.constexpr, RUN: tl.constexpr):
    """Writes ``PART`` columns of an extra plane to tile ``slot`` of ``high`` and, transposed, ``high_t``."""
    j = part * PART + tl.arange(0, PART)
    base = slot.to(tl.int64) * (B * B)
    if high is not None:
        tl.store(high + base + (rows_of_block(B, RUN)[:, None] * B + j[None, :]), value)
    if high_t is not None:
        tl.store(high_t + base + (j[:, None] * B + tl.arange(0, B)[None, :]), _transposed(value, B, PART, RUN))


@triton.jit
def place(columns, B: tl.constexpr, PART: tl.constexpr):
    """This program's row of blocks, column of blocks, and which ``PART`` columns of the block; blocks from the last."""
    PARTS: tl.constexpr = B // PART
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block = pid // PARTS
    column_blocks = tl.cdiv(columns, B)
    return block // column_blocks, block % column_blocks, pid % PARTS


@triton.jit
def inverse_scales(scale, r, rows):
    """Reciprocals of the scales of the rows ``r``."""
    return tl.div_rn(1.0, tl.load(scale + r, mask=r < rows, other=1.0))


@triton.jit
def store_row_planes(
    value,
    factor,  # the rows' reciprocal scales; loaded before the tile, or it takes 50 more registers
    slot,  # int32 [RB, QB], or None: no fallback
    low,
    low_t,
    high,
    high_t,
    row_block,
    column_block,
    part,
    rows,
    columns,
    B: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
):
    """Quantizes a tile, with rows as in `rows_of_block`, of `place`, and writes what planes are not ``None``."""
    row = row_block * B
    column = column_block * B + part * PART
    bits = _integer_bits(value * factor[:, None], None, None, _finite_mask(factor)[:, None])
    _store_low(low, low_t, bits.to(tl.int8), row, column, rows, columns, B, PART, RUN)
    if slot is not None:
        block_slot = tl.load(slot + row_block * tl.cdiv(columns, B) + column_block)
        if block_slot >= 0:
            _store_high(high, high_t, _high_byte(bits), block_slot, part, B, PART, RUN)


@CachedLaunch
@triton.jit
def row_planes(
    x,
    scale,  # float32 [R]
    slot,  # int32 [RB, QB], or None: no fallback
    low,
    low_t,
    high,
    high_t,
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
):
    """Integers of ``PART`` columns of a block of ``x [R, Q]``, both bytes in both layouts."""
    row_block, column_block, part = place(columns, B, PART)
    row = row_block * B
    column = column_block * B + part * PART
    i = rows_of_block(B, RUN)
    factor = inverse_scales(scale, row + i, rows)
    value = load_tile(x, row, column, i, tl.arange(0, PART), rows, columns, stride_r, stride_c)
    store_row_planes(
        value, factor, slot, low, low_t, high, high_t, row_block, column_block, part, rows, columns, B, PART, RUN
    )


@CachedLaunch
@triton.jit(do_not_specialize=["group_blocks"])
def gradient_planes(
    dy,
    column_fold,  # t, float32 [N], or None: no A
    a_inverse,  # float32 [M]
    a_slot,  # int32 [MB, NB]
    a_seed,  # int32 [1], or None: round to nearest
    a_low,  # int8 [M, NB·B]
    a_high,  # None: no fallback
    row_fold,  # s, float32 [M], or None: no G
    group_blocks,  # so many blocks of a row of G share a scale
    g_inverse,  # float32 [groups, N]
    g_slot,  # int32 [NB, MB]
    g_seed,
    g_low,  # int8 [N, MB·B]
    g_high,
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
    SMALL_ONLY: tl.constexpr,
):
    """Integers of ``PART`` columns of a block of ``dy [M, N]`` as A and as G, each in the layout of its GEMM.

    With ``SMALL_ONLY`` G has noise below one step alone.
    """
    row_block, column_block, part = place(columns, B, PART)
    row = row_block * B
    column = column_block * B + part * PART
    i = rows_of_block(B, RUN)
    j = tl.arange(0, PART)
    r = row + i
    c = column + j
    tile = load_tile(dy, row, column, i, j, rows, columns, stride_r, stride_c)
    if column_fold is not None:
        slot = tl.full([], -1, tl.int32)
        if a_high is not None:
            slot = tl.load(a_slot + row_block * tl.cdiv(columns, B) + column_block)
        noise = None
        if a_seed is not None:
            noise = uniform(r[:, None], c[None, :], tl.load(a_seed))
        factor = tl.load(a_inverse + r, mask=r < rows, other=1.0)
        v = (tile * tl.load(column_fold + c, mask=c < columns, other=0.0)[None, :]) * factor[:, None]
        bits = _integer_bits(v, noise, tl.where(slot >= 0, 32512.0, 127.0), _finite_mask(factor)[:, None])
        _store_low(a_low, None, bits.to(tl.int8), row, column, rows, columns, B, PART, RUN)
        if a_high is not None:
            if slot >= 0:
                _store_high(a_high, None, _high_byte(bits), slot, part, B, PART, RUN)
    if row_fold is not None:
        if dy.dtype.element_ty.primitive_bitwidth <= 16:
            # Read again, from L1: held through the above it takes 80 more registers, and half the programs fit.
            tile = load_tile(dy, row, column, i, j, rows, columns, stride_r, stride_c)
        slot = tl.full([], -1, tl.int32)
        if g_high is not None:
            slot = tl.load(g_slot + column_block * tl.cdiv(rows, B) + row_block)
        factor = tl.load(g_inverse + row_block // group_blocks * columns + c, mask=c < columns, other=1.0)
        v = (tile * tl.load(row_fold + r, mask=r < rows, other=0.0)[:, None]) * factor[None, :]
        noise = None
        if g_seed is not None:
            noise = uniform(c[None, :], r[:, None], tl.load(g_seed))
            if SMALL_ONLY:
                v = _round_small(v, noise)
                noise = None
        bits = _integer_bits(v, noise, tl.where(slot >= 0, 32512.0, 127.0), _finite_mask(factor)[None, :])
        _store_low(None, g_low, bits.to(tl.int8), row, column, rows, columns, B, PART, RUN)
        if g_high is not None:
            if slot >= 0:
                _store_high(None, g_high, _high_byte(bits), slot, part, B, PART, RUN)


@CachedLaunch
@triton.jit
def block_planes(
    x,
    scale,  # float32 [RB, QB]
    slot,  # int32 [RB, QB]
    seed,  # int32 [1], or None: round to nearest
    low,
    low_t,
    high,  # None: no fallback
    high_t,
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
    SMALL_ONLY: tl.constexpr,
):
    """Base plane and, of a fallback block, residuals of ``PART`` columns of a block of ``x``, in both layouts.

    With ``SMALL_ONLY`` plain blocks have noise below one step alone.
    """
    row_block, column_block, part = place(columns, B, PART)
    row = row_block * B
    column = column_block * B + part * PART
    i = rows_of_block(B, RUN)
    j = tl.arange(0, PART)
    block = row_block * tl.cdiv(columns, B) + column_block
    block_slot = tl.full([], -1, tl.int32)
    if high is not None:
        block_slot = tl.load(slot + block)
    factor = tl.div_rn(1.0, tl.load(scale + block))
    mask = _finite_mask(factor)
    v = load_tile(x, row, column, i, j, rows, columns, stride_r, stride_c) * factor
    bits = _integer_bits(v, None, None, mask)
    noise = None
    if seed is not None:
        noise = uniform((row + i)[:, None], (column + j)[None, :], tl.load(seed))
        if SMALL_ONLY:
            plain = _integer_bits(_round_small(v, noise), None, None, mask)
            noise = None
        else:
            # Of a fallback block, the residuals carry the noise.
            plain = _integer_bits(v, noise, 127.0, mask)
        bits = tl.where(block_slot >= 0, bits, plain)
    _store_low(low, low_t, bits.to(tl.int8), row, column, rows, columns, B, PART, RUN)
    if high is not None:
        if block_slot >= 0:
            if noise is None:
                # Read again, from L1: few blocks fall back, and held through the above it takes registers in all.
                v = load_tile(x, row, column, i, j, rows, columns, stride_r, stride_c) * factor
            # 254 residual steps to a base step: planes.RESIDUAL_STEPS
            residual = _integer_bits((v - round_half_even(v)) * 254.0, noise, 127.0, mask)
            _store_high(high, high_t, residual.to(tl.int8), block_slot, part, B, PART, RUN)
