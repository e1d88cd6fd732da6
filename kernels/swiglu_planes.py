"""The transposed planes of ``silu(gate)·up``, made again in the backward from ``gate`` and ``up``.

A SwiGLU layer keeps ``gate`` and ``up`` for its backward anyway. With the scales and slots that the forward has found,
one read of both gives the planes that the down projection's wgrad takes, so that the forward need not leave them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.integers import inverse_scales, place, rows_of_block, store_row_planes
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
    slot,  # int32 [RB, QB], or None: no fallback
    low_t,
    high_t,
    rows,
    columns,
    B: tl.constexpr,
    PART: tl.constexpr,
    RUN: tl.constexpr,
):
    """`row_planes` of ``PART`` columns of a block of ``silu(gate)·up``, both row-major ``[R, Q]``; transposed only."""
    row_block, column_block, part = place(columns, B, PART)
    row = row_block * B
    column = column_block * B + part * PART
    i = rows_of_block(B, RUN)
    j = tl.arange(0, PART)
    dtype = gate.dtype.element_ty
    factor = inverse_scales(scale, row + i, rows)
    silu = silu_in(load_tile(gate, row, column, i, j, rows, columns, columns, 1), dtype)
    h = (silu * load_tile(up, row, column, i, j, rows, columns, columns, 1)).to(dtype).to(tl.float32)
    store_row_planes(
        h, factor, slot, None, low_t, None, high_t, row_block, column_block, part, rows, columns, B, PART, RUN
    )


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
            gate, up, scale, slot if capacity > 0 else None, low_t, high_t, rows, columns,
            B=block, **options("swiglu_row_planes", block),
        )  # fmt: skip
    return low_t, high_t
