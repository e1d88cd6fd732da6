"""Second read of a quantized tensor: its integers, in the layouts the GEMMs contract along.

Blocks are taken in the opposite order of the first read, so that this one begins with what that one left in L2. Compile
without fused multiply-add: the reference rounds after each multiplication and addition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_int8.kernels.select import reciprocal, round_half_even
from lightning_int8.kernels.statistics import load_tile


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def uniform(row, column, i, j, columns, seed):
    """See `rounding.uniform`, at the rows ``row + i`` and columns ``column + j``."""
    index = row.to(tl.int64) * columns + column + (i * columns + j)
    h = _mix(_mix(index.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True)) ^ (index >> 32).to(tl.uint32))
    return (h >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _to_integer(v, noise, limit):
    """``v`` rounded (stochastically unless ``noise`` is ``None``), held within ``±limit``, NaN to 0; int32."""
    if noise is None:
        v = tl.where(v == v, v, 0.0)
        return round_half_even(tl.minimum(tl.maximum(v, -limit), limit)).to(tl.int32)
    else:
        v = tl.floor(v + noise)
        v = tl.where(v == v, v, 0.0)
        return tl.minimum(tl.maximum(v, -limit), limit).to(tl.int32)


@triton.jit
def _store_low(low, low_t, value, row, column, rows, columns, B: tl.constexpr):
    """Writes a block into ``low [rows, QB·B]`` and transposed into ``low_t [columns, RB·B]``, unless ``None``.

    Padding rows of one are padding columns of the other, where the block's values are zero. The transposed store takes
    pointers that are contiguous along the other axis; `tl.trans` of 8-bit tiles is reported wrong in some versions.
    """
    i = tl.arange(0, B)
    if low is not None:
        pitch = tl.cdiv(columns, B) * B
        low += row.to(tl.int64) * pitch + column
        tl.store(low + (i[:, None] * pitch + i[None, :]), value.to(tl.int8), mask=(i < rows - row)[:, None])
    if low_t is not None:
        pitch_t = tl.cdiv(rows, B) * B
        low_t += column.to(tl.int64) * pitch_t + row
        tl.store(low_t + (i[None, :] * pitch_t + i[:, None]), value.to(tl.int8), mask=(i < columns - column)[None, :])


@triton.jit
def _store_high(high, high_t, value, slot, B: tl.constexpr):
    """Writes a block's extra plane as tile ``slot`` of ``high`` and transposed of ``high_t``, unless ``None``."""
    i = tl.arange(0, B)
    base = slot.to(tl.int64) * (B * B)
    if high is not None:
        tl.store(high + base + (i[:, None] * B + i[None, :]), value.to(tl.int8))
    if high_t is not None:
        tl.store(high_t + base + (i[None, :] * B + i[:, None]), value.to(tl.int8))


@triton.jit
def row_planes(
    x,
    scale,  # float32 [R]
    slot,  # int32 [RB, QB]
    low,
    low_t,
    high,  # None: no fallback
    high_t,
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
):
    """Integers of one block of ``x [R, Q]``, both bytes in both layouts."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    column_blocks = tl.cdiv(columns, B)
    row = pid // column_blocks * B
    column = pid % column_blocks * B
    r = row + tl.arange(0, B)
    inverse = reciprocal(tl.load(scale + r, mask=r < rows, other=1.0))
    v = load_tile(x, row, column, rows, columns, stride_r, stride_c, B) * inverse[:, None]
    if high is not None:
        block_slot = tl.load(slot + pid)
        q = _to_integer(v, None, tl.where(block_slot >= 0, 32512.0, 127.0))
        _store_low(low, low_t, q, row, column, rows, columns, B)
        if block_slot >= 0:
            _store_high(high, high_t, (q + 128) >> 8, block_slot, B)
    else:
        _store_low(low, low_t, _to_integer(v, None, 127.0), row, column, rows, columns, B)


@triton.jit
def gradient_planes(
    dy,
    column_fold,  # t, float32 [N], or None: no A
    a_scale,  # float32 [M]
    a_slot,  # int32 [MB, NB]
    a_seed,  # int32 [1], or None: round to nearest
    a_low,  # int8 [M, NB·B]
    a_high,  # None: no fallback
    row_fold,  # s, float32 [M], or None: no G
    g_scale,  # float32 [N]
    g_slot,  # int32 [NB, MB]
    g_seed,
    g_low,  # int8 [N, MB·B]
    g_high,
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
):
    """Integers of one block of ``dy [M, N]`` as A and as G, each in the layout its GEMM contracts along."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    row_blocks = tl.cdiv(rows, B)
    column_blocks = tl.cdiv(columns, B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    row = row_block * B
    column = column_block * B
    i = tl.arange(0, B)
    r = row + i
    c = column + i
    tile = load_tile(dy, row, column, rows, columns, stride_r, stride_c, B)
    if column_fold is not None:
        inverse = reciprocal(tl.load(a_scale + r, mask=r < rows, other=1.0))
        v = (tile * tl.load(column_fold + c, mask=c < columns, other=0.0)[None, :]) * inverse[:, None]
        noise = None
        if a_seed is not None:
            noise = uniform(row, column, i[:, None], i[None, :], columns, tl.load(a_seed))
        if a_high is not None:
            slot = tl.load(a_slot + pid)
            q = _to_integer(v, noise, tl.where(slot >= 0, 32512.0, 127.0))
            _store_low(a_low, None, q, row, column, rows, columns, B)
            if slot >= 0:
                _store_high(a_high, None, (q + 128) >> 8, slot, B)
        else:
            _store_low(a_low, None, _to_integer(v, noise, 127.0), row, column, rows, columns, B)
    if row_fold is not None:
        inverse = reciprocal(tl.load(g_scale + c, mask=c < columns, other=1.0))
        v = (tile * tl.load(row_fold + r, mask=r < rows, other=0.0)[:, None]) * inverse[None, :]
        noise = None
        if g_seed is not None:
            noise = uniform(column, row, i[None, :], i[:, None], rows, tl.load(g_seed))
        if g_high is not None:
            slot = tl.load(g_slot + column_block * row_blocks + row_block)
            q = _to_integer(v, noise, tl.where(slot >= 0, 32512.0, 127.0))
            _store_low(None, g_low, q, row, column, rows, columns, B)
            if slot >= 0:
                _store_high(None, g_high, (q + 128) >> 8, slot, B)
        else:
            _store_low(None, g_low, _to_integer(v, noise, 127.0), row, column, rows, columns, B)


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
):
    """Base plane and, of a fallback block, residuals of one block of ``x [R, Q]``, in both layouts."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    column_blocks = tl.cdiv(columns, B)
    row = pid // column_blocks * B
    column = pid % column_blocks * B
    inverse = tl.div_rn(1.0, tl.load(scale + pid))
    v = load_tile(x, row, column, rows, columns, stride_r, stride_c, B) * inverse
    noise = None
    if seed is not None:
        i = tl.arange(0, B)
        noise = uniform(row, column, i[:, None], i[None, :], columns, tl.load(seed))
    if high is not None:
        block_slot = tl.load(slot + pid)
        if block_slot >= 0:
            q = round_half_even(v)
            _store_low(low, low_t, _to_integer(v, None, 127.0), row, column, rows, columns, B)
            # 254 residual steps to a base step: planes.RESIDUAL_STEPS
            _store_high(high, high_t, _to_integer((v - q) * 254.0, noise, 127.0), block_slot, B)
        else:
            _store_low(low, low_t, _to_integer(v, noise, 127.0), row, column, rows, columns, B)
    else:
        _store_low(low, low_t, _to_integer(v, noise, 127.0), row, column, rows, columns, B)
