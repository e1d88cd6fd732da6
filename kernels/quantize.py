"""Quantize kernels in Triton for every NVIDIA GPU since Ampere: the functions of `reference`, bit for bit.

Three launches, none of which the host waits for: statistics (first read), select (thresholds, slots and scales, from
statistics that lie in L2), and the integers in both layouts (second read). One launch where rows cannot fall back.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from lightning_int8.kernels.integers import block_planes, row_planes
from lightning_int8.kernels.plain_rows import MAX_COLUMNS, plain_row_planes
from lightning_int8.kernels.planes import MIN_SCALE, blocks_along, padded, seed_count
from lightning_int8.kernels.quantize_launch import (
    Allocator,
    check,
    empty_planes,
    int32_limit,
    may_bind,
    on,
    operand_state,
    options,
    parts,
    select_sizes,
)
from lightning_int8.kernels.select import matrix_select
from lightning_int8.kernels.statistics import matrix_statistics


def quantize_row(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes X or W ``[R, Q]`` with ``row`` scaling: arguments and results of `reference.quantize_row`.

    Equal to it bit for bit, except that the sum behind a scale that the INT32 bound sets is taken in another order, and
    that entries of ``high`` past the number of fallback blocks are not written.

    Args:
        x: bfloat16, float16, float32 or float64 ``[R, Q]``, any strides; fast if one of them is 1.
        state: float32 ``[operands, 4]`` or ``None``; row ``operand`` is read, and updated in place when ``update``.
        operand: Row of ``state``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``: 32, 64 or 128.
        transpose: Whether to write ``low_t`` and ``high_t``.

    Returns:
        ``low [R, QB·B]``, ``low_t [Q, RB·B]``, ``high [C, B, B]``, ``high_t [C, B, B]`` int8; ``slot [RB, QB]`` int32;
        ``scale [R]``, ``int_max [R]`` float32.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    whole = x.stride(1) == 1 and 0 < columns <= MAX_COLUMNS and rows > 0
    if capacity == 0 and not transpose and whole and not may_bind(columns):
        return _plain_rows(x, block)
    statistics = MatrixStatistics.empty(x, capacity, block)
    if x.numel() > 0:
        with on(x):
            matrix_statistics[(row_blocks * column_blocks,)](
                x, *statistics, rows, columns, *x.stride(), B=block, **options("matrix_statistics", block)
            )
    return row_from_statistics(x, statistics, state, operand, seed_rate, capacity, block, update, transpose)


def _plain_rows(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`quantize_row` in one read, where a row's scale depends on nothing but the row: W for the forward."""
    rows, columns = x.shape
    new = Allocator(x.device)
    low, low_t, high, high_t, slot = empty_planes(new, rows, columns, 0, block, False)
    scale, int_max = new.float32(rows), new.float32(rows)
    width, chosen = triton.next_power_of_2(low.shape[1]), options("plain_row_planes", block)
    part, warps = min(block, max(1, chosen["PART"] // width)), chosen["num_warps"] * max(1, width // chosen["PART"])
    with on(x):
        plain_row_planes[(blocks_along(rows, part),)](
            x, low, slot, scale, int_max, rows, columns, x.stride(0),
            B=block, WIDTH=width, **chosen | {"PART": part, "num_warps": warps},
        )  # fmt: skip
    return low, low_t, high, high_t, slot, scale, int_max


class MatrixStatistics(NamedTuple):
    """What the first read of ``x [R, Q]`` leaves for `row` scaling; ``None`` is not needed.

    Attributes:
        amax: int32 ``[QB, R]``, bit patterns of AbsMax.
        weight: float32 ``[QB, R]``: see `statistics.matrix_statistics`.
        block_amax: int32 ``[RB, QB]``.
    """

    amax: Tensor
    weight: Tensor | None
    block_amax: Tensor | None

    @classmethod
    def empty(cls, x: Tensor, capacity: int, block: int) -> MatrixStatistics:
        """Room for the statistics of ``x``, uninitialized."""
        rows, columns = x.shape
        new, column_blocks = Allocator(x.device), blocks_along(columns, block)
        return cls(
            new.int32(column_blocks, rows),
            new.float32(column_blocks, rows) if capacity > 0 or may_bind(columns) else None,
            new.int32(blocks_along(rows, block), column_blocks) if capacity > 0 else None,
        )


def row_from_statistics(
    x: Tensor,
    statistics: MatrixStatistics,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_row` does after its first read, given what that read found."""
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    new = Allocator(x.device)
    low, low_t, high, high_t, slot = empty_planes(new, rows, columns, capacity, block, transpose)
    scale, int_max = new.float32(rows), new.float32(rows)
    if x.numel() == 0:
        return low, low_t, high, high_t, slot, scale.fill_(MIN_SCALE), int_max.zero_()
    with on(x):
        select_rows(x, statistics, state, operand, seed_rate, capacity, block, update, slot, scale, int_max)
        row_planes[parts("row_planes", row_blocks * column_blocks, block)](
            x, scale, slot if capacity > 0 else None, low, low_t if transpose else None, high,
            high_t if transpose else None, rows, columns, *x.stride(),
            B=block, **options("row_planes", block),
        )  # fmt: skip
    return low, low_t, high, high_t, slot, scale, int_max


def select_rows(
    x: Tensor,
    statistics: MatrixStatistics,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    slot: Tensor,
    scale: Tensor,
    int_max: Tensor | None,
) -> None:
    """Between the two reads of `quantize_row`: writes ``slot``, ``scale`` and, unless ``None``, ``int_max``."""
    rows, columns = x.shape
    row_blocks, column_blocks = slot.shape
    blocks = row_blocks * column_blocks
    sizes = select_sizes(block, blocks, column_blocks)
    matrix_select[(row_blocks, blocks_along(block, sizes["PART"]))](
        statistics.block_amax, operand_state(state, operand), seed_count(blocks, seed_rate), capacity, int(update),
        slot, None, None, statistics.amax, statistics.weight, int32_limit(columns), scale, int_max, rows, columns,
        FALLBACK=capacity > 0, **sizes,
    )  # fmt: skip


def quantize_block(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
    stochastic: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes X, W or dY ``[R, Q]`` with one scale per block: arguments and results of `reference.quantize_block`.

    Equal to it bit for bit; entries of ``high`` past the number of fallback blocks are not written.

    Args:
        x: bfloat16, float16, float32 or float64 ``[R, Q]``, any strides; fast if one of them is 1.
        state: float32 ``[operands, 4]`` or ``None``; row ``operand`` is read, and updated in place when ``update``.
        operand: Row of ``state``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``: 32, 64 or 128.
        transpose: Whether to write ``low_t`` and ``high_t``.
        stochastic: See `reference.quantize_block`.

    Returns:
        ``low [R, QB·B]``, ``low_t [Q, RB·B]``, ``high [C, B, B]`` (residuals), ``high_t [C, B, B]`` int8;
        ``slot [RB, QB]`` int32; ``scale [RB, QB]`` float32.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    new = Allocator(x.device)
    low, low_t, high, high_t, slot = empty_planes(new, rows, columns, capacity, block, transpose)
    scale = new.float32(row_blocks, column_blocks)
    if x.numel() == 0:
        return low, low_t, high, high_t, slot, scale
    fallback, blocks = capacity > 0, row_blocks * column_blocks
    block_amax, seed = new.int32(row_blocks, column_blocks), new.int32(1) if stochastic != "nothing" else None
    with on(x):
        matrix_statistics[(blocks,)](
            x, None, None, block_amax, rows, columns, *x.stride(), B=block, **options("matrix_statistics", block)
        )
        matrix_select[(row_blocks, 1)](
            block_amax, operand_state(state, operand), seed_count(blocks, seed_rate), capacity, int(update), slot, seed,
            scale, None, None, 0.0, None, None, rows, columns,
            FALLBACK=fallback, **select_sizes(block, blocks, column_blocks),
        )  # fmt: skip
        block_planes[parts("block_planes", blocks, block)](
            x, scale, slot, seed, low, low_t if transpose else None, high if fallback else None,
            high_t if fallback and transpose else None, rows, columns, *x.stride(),
            B=block, SMALL_ONLY=stochastic == "small", **options("block_planes", block),
        )  # fmt: skip
    return low, low_t, high, high_t, slot, scale


def transposed_integers(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """The ``low_t`` of `quantize_row` or `quantize_block` without fallback, in one read, given the scales it has found.

    Args:
        x: bfloat16, float16, float32 or float64 ``[R, Q]``, any strides; fast if one of them is 1.
        scale: Contiguous float32 ``[R]`` or ``[RB, QB]``.
        block: Block edge ``B``: 32, 64 or 128.

    Returns:
        int8 ``[Q, RB·B]``.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    low_t = Allocator(x.device).int8(columns, padded(rows, block))
    if x.numel() == 0:
        return low_t
    blocks = row_blocks * column_blocks
    with on(x):
        if scale.dim() == 1:
            row_planes[parts("row_planes", blocks, block)](
                x, scale, None, None, low_t, None, None, rows, columns, *x.stride(),
                B=block, **options("row_planes", block),
            )  # fmt: skip
        else:
            block_planes[parts("block_planes", blocks, block)](
                x, scale, None, None, None, low_t, None, None, rows, columns, *x.stride(),
                B=block, SMALL_ONLY=False, **options("block_planes", block),
            )  # fmt: skip
    return low_t
