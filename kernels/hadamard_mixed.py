"""X, W or dY quantized by rows with its features mixed, and by columns with its tokens mixed, in two reads for both.

Of blocks of 128, each of which has the rows and columns that one transform mixes, one kernel of the first read finds
both AbsMax, and one of the second writes both planes. A tile is transformed along its features and, read again from a
cache, along its tokens. Rows alone leave that out, or, where nothing can fall back, are read once. Other blocks and
wider elements than 16 bits are mixed first and quantized afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.hadamard import (
    _ROOT,
    _load_operand,
    _transform,
    largest_of_columns,
    quantize_hadamard,
    scales_from,
    store_column_statistics,
    store_transformed,
)
from lightning_int8.kernels.hadamard_features import (
    has_whole_rows,
    integers_of_rows,
    load_features,
    mix_features,
    quantize_whole_rows,
)
from lightning_int8.kernels.hadamard_ops import TOKENS
from lightning_int8.kernels.integers import _high_byte, inverse_scales, place
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import padded
from lightning_int8.kernels.quantize import MatrixStatistics, quantize_row, select_rows
from lightning_int8.kernels.quantize_launch import Allocator, check, empty_planes, on, options, parts
from lightning_int8.kernels.statistics import _PLAIN_WEIGHT

_B = tl.constexpr(TOKENS)


@triton.jit
def feature_statistics(tile, amax, weight, column_block, r, rows):
    """`statistics.row_statistics` of the rows ``r`` with the features of `load_features` transformed."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    by_row = (largest_of_columns(y0, y1, y2, y3, y4, y5, y6, y7) * _ROOT).to(tl.int32, bitcast=True)
    out = column_block.to(tl.int64) * rows + r
    tl.store(amax + out, by_row, mask=r < rows)
    if weight is not None:
        lower = tl.abs(y0) + tl.abs(y1) + (tl.abs(y2) + tl.abs(y3))
        total = tl.sum(lower + (tl.abs(y4) + tl.abs(y5) + (tl.abs(y6) + tl.abs(y7))), 0)
        tl.store(weight + out, total * (_PLAIN_WEIGHT * _ROOT), mask=r < rows)
    return by_row


@CachedLaunch
@triton.jit
def mixed_statistics(
    x,
    amax,  # int32 [QB, R], of the rows, their features transformed
    weight,  # float32 [QB, R], or None
    block_amax,  # int32 [RB, QB], or None
    amax_t,  # int32 [RB, Q], of the columns, their tokens transformed, or None
    sums,  # float32 [RB, Q], of the columns, or None; only with amax_t
    rows,
    columns,
    stride_r,
    stride_c,
    PART: tl.constexpr,
):
    """`matrix_statistics` of one block, its features transformed, and its `hadamard_statistics`; by ``PART``."""
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, _B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    largest = tl.zeros([PART], tl.int32)
    for start in range(0, _B, PART):
        row = row_block * _B + start
        tile = load_features(x, column_block, row, rows, columns, stride_r, stride_c, PART)
        by_row = feature_statistics(tile, amax, weight, column_block, row + tl.arange(0, PART), rows)
        largest = tl.maximum(largest, by_row)
    if block_amax is not None:
        tl.store(block_amax + pid, tl.max(largest, 0))
    if amax_t is not None:
        for start in range(0, _B, PART):
            column = column_block * _B + start
            tile = _load_operand(x, None, row_block, column, rows, columns, stride_r, stride_c, PART)
            store_column_statistics(tile, amax_t, sums, row_block, column, columns)


@CachedLaunch
@triton.jit
def mixed_planes(
    x,
    scale,  # float32 [R]
    slot,  # int32 [RB, QB], or None: no fallback
    low,  # int8 [R, QB·128], the features transformed
    high,
    inverse,  # float32 [Q]: see `hadamard_scales`
    low_t,  # int8 [Q, RB·128], the tokens transformed, or None
    rows,
    columns,
    stride_r,
    stride_c,
    PART: tl.constexpr,
):
    """Integers of ``PART`` rows of a block, both bytes by rows, and of ``PART`` columns of it, transposed."""
    row_block, column_block, part = place(columns, _B, PART)
    i = tl.arange(0, PART)
    j = tl.arange(0, _B)
    row = row_block * _B + part * PART
    factor = inverse_scales(scale, row + i, rows)
    tile = load_features(x, column_block, row, rows, columns, stride_r, stride_c, PART)
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    column_blocks = tl.cdiv(columns, _B)
    at = low + (row.to(tl.int64) * column_blocks + column_block) * _B
    at += i[:, None] * (column_blocks * _B) + j[None, :]
    if slot is None:
        integers = integers_of_rows(y0, y1, y2, y3, y4, y5, y6, y7, factor, tl.int8)
        tl.store(at, integers, mask=(i < rows - row)[:, None])
    else:
        integers = integers_of_rows(y0, y1, y2, y3, y4, y5, y6, y7, factor, tl.int16)
        tl.store(at, integers.to(tl.int8), mask=(i < rows - row)[:, None])
        block_slot = tl.load(slot + row_block * column_blocks + column_block)
        if block_slot >= 0:
            at_high = block_slot.to(tl.int64) * (_B * _B) + ((part * PART + i)[:, None] * _B + j[None, :])
            tl.store(high + at_high, _high_byte(integers.to(tl.int32)))
    if low_t is not None:
        column = column_block * _B + part * PART
        c = column + i
        factor_t = tl.load(inverse + c, mask=c < columns, other=1.0)[None, :]
        tile = _load_operand(x, None, row_block, column, rows, columns, stride_r, stride_c, PART)
        store_transformed(tile, factor_t, low_t, row_block, column, rows, columns)


def quantize_mixed(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    columns: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both operands of X, W or dY: see `hadamard_reference.quantize_mixed`.

    Takes what `quantize.quantize_row` takes, and has the same bits in every run; the columns' are to the bit those of
    `hadamard.quantize_hadamard`.
    """
    x, *_ = check(x, block)
    new = Allocator(x.device)
    in_one_read = capacity == 0 and block == TOKENS and has_whole_rows(x)
    if block == TOKENS and x.numel() > 0 and x.element_size() == 2 and (columns or not in_one_read):
        return _in_two_reads(x, state, operand, seed_rate, capacity, update, columns, sums)
    if in_one_read:
        rows = quantize_whole_rows(x)
    else:
        low, _, high, _, slot, scale, _ = quantize_row(
            mix_features(x), state, operand, seed_rate, capacity, block, update, False
        )
        rows = low, high, slot, scale
    if columns:
        return *rows, *quantize_hadamard(x, None, block, sums)
    return *rows, new.int8(0), new.float32(0), new.float32(0)


def _in_two_reads(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    update: bool,
    columns: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`quantize_mixed` of 16-bit elements and blocks of 128; ``sums`` in a fixed order."""
    height, width = x.shape
    new = Allocator(x.device)
    low, _, high, _, slot = empty_planes(new, height, width, capacity, TOKENS, False)
    scale, low_t, scale_t, inverse, total = new.float32(height), new.int8(0), new.float32(0), None, new.float32(0)
    # The contraction is over all columns of `low`: no transformed feature is padding.
    statistics = MatrixStatistics.empty(low, capacity, TOKENS)
    amax_t = new.int32(slot.shape[0], width) if columns else None
    partial = new.float32(slot.shape[0], width) if sums else None
    with on(x):
        mixed_statistics[(slot.numel(),)](
            x, *statistics, amax_t, partial, height, width, *x.stride(), **options("mixed_statistics", TOKENS)
        )
        select_rows(low, statistics, state, operand, seed_rate, capacity, TOKENS, update, slot, scale, None)
        if amax_t is not None:
            scale_t, inverse, total = scales_from(amax_t, partial, TOKENS)
            low_t = new.int8(width, padded(height, TOKENS))
        mixed_planes[parts("mixed_planes", slot.numel(), TOKENS)](
            x, scale, slot if capacity > 0 else None, low, high, inverse, low_t if columns else None, height, width,
            *x.stride(), **options("mixed_planes", TOKENS),
        )  # fmt: skip
    return low, high, slot, scale, low_t, scale_t, total
