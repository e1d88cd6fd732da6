"""First read of a quantized tensor: AbsMax and weighted sums by row, by column and by block.

AbsMax travels as the bit pattern of a non-negative float32 in an int32: it orders like the float, and an integer
maximum keeps NaN (the largest patterns), which a float maximum on a GPU drops.

All partial results have one value for each row of the operand and each block along its contraction, stored
``[contraction blocks, rows]`` so that each program writes one contiguous piece and no atomics are needed: sums are the
same in every run, as activation checkpointing needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_int8.kernels.launch import CachedLaunch

# Integers of the other operand in units of 2^31, in which sums do not overflow: see `reference.row_scale`.
_PLAIN_WEIGHT = tl.constexpr(127 * 2.0**-31)


@triton.jit
def load_tile(x, row, column, i, j, rows, columns, stride_r, stride_c):
    """The rows ``row + i`` and columns ``column + j`` of ``x``, float32, zero outside the matrix.

    Only the first element's offset needs 64 bits: the launchers see to it that offsets within a block fit 32.
    """
    inside = (i < rows - row)[:, None] & (j < columns - column)[None, :]
    x += row.to(tl.int64) * stride_r + column.to(tl.int64) * stride_c
    return tl.load(x + (i[:, None] * stride_r + j[None, :] * stride_c), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def magnitude_bits(x):
    """The bit pattern of ``|x|``."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _larger(a, b):
    """The larger one, or NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_statistics(a, amax, weight, column_block, r, rows):
    """Writes AbsMax and weighted sums of the rows ``r`` of a tile within ``column_block``; returns AbsMax as bits."""
    by_row = tl.reduce(tl.abs(a), 1, _larger).to(tl.int32, bitcast=True)
    out = column_block.to(tl.int64) * rows + r
    if amax is not None:
        tl.store(amax + out, by_row, mask=r < rows)
    if weight is not None:
        tl.store(weight + out, tl.sum(tl.abs(a) * _PLAIN_WEIGHT, 1), mask=r < rows)
    return by_row


@triton.jit
def fold_rows(tile):
    """``[PART, B]`` as ``[PART·B / 256, 256 / B, B]``, whose first axis one warp reduces without exchanging anything.

    A warp's 16-byte loads of a 16-bit tile cover 256 elements at a time, so each thread holds the same place of all.
    """
    B: tl.constexpr = tile.shape[1]
    return tl.reshape(tile, [tile.shape[0] * B // 256, 256 // B, B])


@triton.jit
def column_statistics(tile, fold, int_max, largest, weighted):
    """Adds rows ``[PART, B]`` of ``G = dY·s`` to the AbsMax and weighted sums ``[256 / B, B]`` of its columns."""
    g = tl.abs(tile * fold[:, None])
    largest = _larger(largest, tl.reduce(fold_rows(g), 0, _larger))
    return largest, weighted + tl.sum(fold_rows(g * (int_max * 4.656612873077393e-10)[:, None]), 0)


@triton.jit
def store_column_statistics(
    largest, weighted, amax, weight, block_amax, row_block, column_block, rows, columns, B: tl.constexpr
):
    """Writes what `column_statistics` has gathered of one block."""
    bits = tl.max(largest.to(tl.int32, bitcast=True), 0)
    c = column_block * B + tl.arange(0, B)
    out = row_block.to(tl.int64) * columns + c
    tl.store(amax + out, bits, mask=c < columns)
    tl.store(weight + out, tl.sum(weighted, 0), mask=c < columns)
    tl.store(block_amax + column_block * tl.cdiv(rows, B) + row_block, tl.max(bits, 0))


@CachedLaunch
@triton.jit
def matrix_statistics(
    x,
    amax,  # int32 [QB, R], or None
    weight,  # float32 [QB, R]: sum of |x|·127·2^-31, or None
    block_amax,  # int32 [RB, QB]
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
):
    """Statistics of one ``B×B`` block of ``x [R, Q]``."""
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    i = tl.arange(0, B)
    tile = load_tile(x, row_block * B, column_block * B, i, i, rows, columns, stride_r, stride_c)
    by_row = tl.max(magnitude_bits(tile), 1)
    r = row_block * B + i
    out = column_block.to(tl.int64) * rows + r
    if amax is not None:
        tl.store(amax + out, by_row, mask=r < rows)
    if weight is not None:
        tl.store(weight + out, tl.sum(tl.abs(tile) * _PLAIN_WEIGHT, 1), mask=r < rows)
    if block_amax is not None:
        tl.store(block_amax + pid, tl.max(by_row, 0))


@CachedLaunch
@triton.jit
def gradient_statistics(
    dy,
    row_fold,  # s, float32 [M], or None: no G
    row_int_max,  # float32 [M]
    column_fold,  # t, float32 [N], or None: no A
    a_amax,  # int32 [NB, M]
    a_weight,  # float32 [NB, M]: sum of |A|·127·2^-31, or None
    a_block_amax,  # int32 [MB, NB]
    g_amax,  # int32 [MB, N]
    g_weight,  # float32 [MB, N]: sum of |G|·int_max·2^-31
    g_block_amax,  # int32 [NB, MB]
    int_sums,  # float32 [MB]: sums of int_max
    column_sums,  # float32 [MB, N]: sums of dY, or None: no bias gradient
    rows,
    columns,
    stride_r,
    stride_c,
    B: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Statistics of one ``B×B`` block of ``dy [M, N]`` in both directions: of ``A = dY·t`` and ``G = (dY·s)ᵀ``.

    One warp takes ``PART`` rows at a time, which completes the rows' statistics, and adds them to those of the columns.
    """
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    i = tl.arange(0, PART)
    j = tl.arange(0, B)
    c = column_block * B + j
    if column_fold is not None:
        fold_c = tl.load(column_fold + c, mask=c < columns, other=0.0)
    a_largest = tl.zeros([PART], tl.int32)
    g_largest = tl.zeros([256 // B, B], tl.float32)
    g_weighted = tl.zeros([256 // B, B], tl.float32)
    dy_sum = tl.zeros([256 // B, B], tl.float32)
    int_sum = tl.zeros([PART], tl.float32)
    for start in tl.range(0, B, PART, num_stages=STAGES):
        tile = load_tile(dy, row_block * B + start, column_block * B, i, j, rows, columns, stride_r, stride_c)
        r = row_block * B + start + i
        if column_fold is not None:
            by_row = row_statistics(tile * fold_c[None, :], a_amax, a_weight, column_block, r, rows)
            a_largest = tl.maximum(a_largest, by_row)
        if row_fold is not None:
            fold_r = tl.load(row_fold + r, mask=r < rows, other=0.0)
            int_max = tl.load(row_int_max + r, mask=r < rows, other=0.0)
            g_largest, g_weighted = column_statistics(tile, fold_r, int_max, g_largest, g_weighted)
            int_sum += int_max
        if column_sums is not None:
            dy_sum += tl.sum(fold_rows(tile), 0)
    if column_fold is not None:
        tl.store(a_block_amax + pid, tl.max(a_largest, 0))
    if row_fold is not None:
        store_column_statistics(
            g_largest, g_weighted, g_amax, g_weight, g_block_amax, row_block, column_block, rows, columns, B
        )
        if column_block == 0:
            tl.store(int_sums + row_block, tl.sum(int_sum, 0))
    if column_sums is not None:
        tl.store(column_sums + row_block.to(tl.int64) * columns + c, tl.sum(dy_sum, 0), mask=c < columns)
