"""Scales and integers of whole rows in one read, where no block falls back: W for the forward.

A program holds its rows in registers, finds their AbsMax, and writes their integers. W in float32 is the widest tensor
that is quantized, and there are seven of it in a decoder layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_int8.kernels.integers import _finite_mask, _integer_bits
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.select import _MIN_SCALE_BITS, _over_constant, round_half_even
from lightning_int8.kernels.statistics import magnitude_bits
from lightning_int8.kernels.threshold_search import INFINITY_BITS

# The longest row that one program's registers hold.
MAX_COLUMNS = 16384


@CachedLaunch
@triton.jit
def plain_row_planes(
    x,
    low,  # int8 [R, QB·B]
    slot,  # int32 [RB, QB]
    scale,  # float32 [R]
    int_max,  # float32 [R]
    rows,
    columns,
    stride_r,
    B: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Everything of ``PART`` rows of ``x [R, Q]``, whose columns are adjacent, where the INT32 bound cannot bind.

    ``WIDTH``, a power of two, is at least ``QB·B``.
    """
    row = tl.program_id(0) * PART
    i = tl.arange(0, PART)
    j = tl.arange(0, WIDTH)
    r = row + i
    x += row.to(tl.int64) * stride_r
    inside = (r < rows)[:, None] & (j < columns)[None, :]
    tile = tl.load(x + (i[:, None] * stride_r + j[None, :]), mask=inside, other=0.0).to(tl.float32)
    # Of bit patterns, since those keep NaN.
    largest = tl.max(magnitude_bits(tile), 1)
    s = tl.maximum(_over_constant(largest, 127.0), _MIN_SCALE_BITS)
    found = s.to(tl.float32, bitcast=True)
    factor = tl.div_rn(tl.full([PART], 1.0, tl.float32), found)
    tl.store(scale + r, found, mask=r < rows)
    value = round_half_even(largest.to(tl.float32, bitcast=True) * factor)
    tl.store(int_max + r, tl.where(s < INFINITY_BITS, tl.minimum(value, 127.0), 0.0), mask=r < rows)
    column_blocks = tl.cdiv(columns, B)
    if row % B == 0:
        # As many blocks as columns at most.
        tl.store(slot + row // B * column_blocks + j, tl.full([WIDTH], -1, tl.int32), mask=j < column_blocks)
    pitch = column_blocks * B
    low += row.to(tl.int64) * pitch
    bits = _integer_bits(tile * factor[:, None], None, None, _finite_mask(factor)[:, None])
    inside = (r < rows)[:, None] & (j < pitch)[None, :]
    tl.store(low + (i[:, None] * pitch + j[None, :]), bits.to(tl.int8), mask=inside)
