"""The transposed planes of ``silu(gate)·up``, made again in the backward from ``gate`` and ``up``.

A SwiGLU layer keeps ``gate`` and ``up`` for its backward anyway. With the scales and slots that the forward has found,
one read of both gives the planes that the down projection's wgrad takes, so that the forward need not leave them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.integers import (
    _finite_mask,
    _high_byte,
    _integer_bits,
    _place,
    _rows_of_block,
    _store_high,
    _store_low,
)
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import blocks_along, padded
from lightning_int8.kernels.quantize_launch import Allocator, on, options, parts
from lightning_int8.kernels.statistics import load_tile
from lightning_int8.kernels.swiglu import _inputs, silu_in


@CachedLaunch
@triton.jit
def swiglu_row_planes(
    gate,
    up,
    scale,  # float32 [R]
    slot,  # int32 [RB, QB]
    low_t,
    high_t,  # None: no fallback
    rows,
    columns,
    B: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
):
    """`row_planes` of ``PART`` columns of a block of ``silu(gate)·up``, both row-major ``[R, Q]``; transposed only."""
    row_block, column_block, part = _place(columns, B, PART)
    row = row_block * B
    column = column_block * B + part * PART
    i = _rows_of_block(B, RUN)
    j = tl.arange(0, PART)
    r = row + i
    dtype = gate.dtype.element_ty
    factor = tl.div_rn(1.0, tl.load(scale + r, mask=r < rows, other=1.0))
    silu = silu_in(load_tile(gate, row, column, i, j, rows, columns, columns, 1), dtype)
    h = (silu * load_tile(up, row, column, i, j, rows, columns, columns, 1)).to(dtype).to(tl.float32)
    bits = _integer_bits(h * factor[:, None], None, None, _finite_mask(factor)[:, None])
    _store_low(None, low_t, bits.to(tl.int8), row, column, rows, columns, B, PART, RUN)
    if high_t is not None:
        block_slot = tl.load(slot + row_block * tl.cdiv(columns, B) + column_block)
        if block_slot >= 0:
            _store_high(None, high_t, _high_byte(bits), block_slot, part, B, PART, RUN)


def swiglu_planes(
    gate: Tensor, up: Tensor, scale: Tensor, slot: Tensor, capacity: int, block: int
) -> tuple[Tensor, Tensor]:
    """``low_t`` and ``high_t`` as `swiglu.swiglu_row` gives them, from what it has found: bit for bit the same.

    Args:
        gate: bfloat16, float16 or float32 ``[R, Q]``, contiguous (others are copied), at least one element.
        up: The same.
        scale: Contiguous float32 ``[R]``.
        slot: Contiguous int32 ``[RB, QB]``.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        block: Block edge ``B``: 32, 64 or 128.

    Returns:
        ``low_t [Q, RB·B]`` and ``high_t [C, B, B]``, int8; entries of ``high_t`` past the number of fallback blocks are
        not written.
    """
    gate, up = _inputs(block, gate, up)
    rows, columns = gate.shape
    new = Allocator(gate.device)
    low_t, high_t = new.int8(columns, padded(rows, block)), new.int8(capacity, block, block)
    blocks = blocks_along(rows, block) * blocks_along(columns, block)
    with on(gate):
        swiglu_row_planes[parts("swiglu_row_planes", blocks, block)](
            gate, up, scale, slot, low_t, high_t if capacity > 0 else None, rows, columns,
            B=block, **options("swiglu_row_planes", block),
        )  # fmt: skip
    return low_t, high_t
