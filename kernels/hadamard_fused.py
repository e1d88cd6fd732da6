"""X and dY quantized for two products in two reads: for the forward or dgrad by rows, for the wgrad transformed.

Of blocks of 128, each of which has the rows that one transform mixes, one kernel of the first read finds both AbsMax,
and one of the second writes both planes. Other blocks, wider elements than 16 bits, which registers do not hold, and
what has no elements are quantized one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.hadamard import (
    largest_of,
    quantize_hadamard,
    scales_from,
    store_largest,
    store_transformed,
)
from lightning_int8.kernels.hadamard_ops import TOKENS
from lightning_int8.kernels.integers import _finite_mask, _high_byte, _integer_bits, inverse_scales, place
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import blocks_along, padded, seed_count
from lightning_int8.kernels.quantize import MatrixStatistics, quantize_row, select_rows
from lightning_int8.kernels.quantize_gradient import GradientStatistics, quantize_row_gradient
from lightning_int8.kernels.quantize_launch import (
    Allocator,
    check,
    empty_planes,
    int32_limit,
    on,
    operand_state,
    options,
    parts,
    select_sizes,
)
from lightning_int8.kernels.select import gradient_select
from lightning_int8.kernels.statistics import load_tile, row_statistics
from lightning_int8.kernels.swiglu import activation, swiglu_row

_B = tl.constexpr(TOKENS)


@CachedLaunch
@triton.jit
def row_hadamard_statistics(
    x,
    fold,  # float32 [Q], the columns' factors before rows are quantized, or None
    amax,  # int32 [QB, R]
    weight,  # float32 [QB, R], or None
    block_amax,  # int32 [RB, QB], or None
    column_sums,  # float32 [RB, Q], or None
    mixed_amax,  # int32 [RB, Q], of the columns transformed
    rows,
    columns,
    stride_r,
    stride_c,
):
    """`matrix_statistics` or, with ``fold``, `gradient_statistics` of A, and `hadamard_statistics`, of one block."""
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, _B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    i = tl.arange(0, _B)
    c = column_block * _B + i
    tile = load_tile(x, row_block * _B, column_block * _B, i, i, rows, columns, stride_r, stride_c)
    value = tile
    if fold is not None:
        value = tile * tl.load(fold + c, mask=c < columns, other=0.0)[None, :]
    by_row = row_statistics(value, amax, weight, column_block, row_block * _B + i, rows)
    if block_amax is not None:
        tl.store(block_amax + pid, tl.max(by_row, 0))
    if column_sums is not None:
        tl.store(column_sums + row_block.to(tl.int64) * columns + c, tl.sum(tile, 0), mask=c < columns)
    store_largest(tile.to(x.dtype.element_ty), mixed_amax, row_block, column_block * _B, columns)


@CachedLaunch
@triton.jit
def row_hadamard_planes(
    x,
    fold,  # as `row_hadamard_statistics`
    scale,  # float32 [R]
    slot,  # int32 [RB, QB], or None: no fallback
    low,  # int8 [R, QB·128]
    high,
    inverse,  # float32 [Q]: see `hadamard_scales`
    low_t,  # int8 [Q, RB·128]
    rows,
    columns,
    stride_r,
    stride_c,
    PART: tl.constexpr,
):
    """Integers of ``PART`` columns of a block: both bytes by rows, and the block transformed, transposed."""
    row_block, column_block, part = place(columns, _B, PART)
    row = row_block * _B
    column = column_block * _B + part * PART
    i = tl.arange(0, _B)
    j = tl.arange(0, PART)
    c = column + j
    factor = inverse_scales(scale, row + i, rows)
    mixed_factor = tl.load(inverse + c, mask=c < columns, other=1.0)[None, :]
    tile = load_tile(x, row, column, i, j, rows, columns, stride_r, stride_c).to(x.dtype.element_ty)
    value = tile.to(tl.float32)
    if fold is not None:
        value = value * tl.load(fold + c, mask=c < columns, other=0.0)[None, :]
    bits = _integer_bits(value * factor[:, None], None, None, _finite_mask(factor)[:, None])
    pitch = tl.cdiv(columns, _B) * _B
    low += row.to(tl.int64) * pitch + column
    tl.store(low + (i[:, None] * pitch + j[None, :]), bits.to(tl.int8), mask=(i < rows - row)[:, None])
    if slot is not None:
        block_slot = tl.load(slot + row_block * tl.cdiv(columns, _B) + column_block)
        if block_slot >= 0:
            at = block_slot.to(tl.int64) * (_B * _B) + (i[:, None] * _B + (part * PART + j)[None, :])
            tl.store(high + at, _high_byte(bits))
    store_transformed(tile, mixed_factor, low_t, row_block, column, rows, columns)


def quantize_row_hadamard(
    x: Tensor, state: Tensor | None, operand: int, seed_rate: float, capacity: int, block: int, update: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `quantize.quantize_row` and `hadamard.quantize_hadamard` make of X, to the bit; takes what they take.

    Returns:
        ``low``, ``high``, ``slot`` and ``scale`` by rows, ``low_t`` and its ``scale`` for the wgrad.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    if not _fits(x, block):
        planes = quantize_row(x, state, operand, seed_rate, capacity, block, update, False)
        return *_by_rows(planes), *quantize_hadamard(x, None, block)
    statistics = MatrixStatistics.empty(x, capacity, block)
    mixed_amax = Allocator(x.device).int32(row_blocks, columns)
    with on(x):
        row_hadamard_statistics[(row_blocks * column_blocks,)](
            x, None, *statistics, None, mixed_amax, rows, columns, *x.stride(),
            **options("row_hadamard_statistics", TOKENS),
        )  # fmt: skip
    return _row_from_statistics(x, statistics, mixed_amax, state, operand, seed_rate, capacity, update)


def swiglu_row_hadamard(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h = silu(gate)·up``, and what `quantize_row_hadamard` makes of it; takes what `swiglu.swiglu_row` takes.

    Returns:
        ``h``, then the six tensors of `quantize_row_hadamard`.
    """
    if not _fits(gate, block):
        h, *planes = swiglu_row(gate, up, state, operand, seed_rate, capacity, block, update, False)
        return h, *_by_rows(planes), *quantize_hadamard(h, None, block)
    statistics = MatrixStatistics.empty(gate, capacity, block)
    h = activation(gate, up, block, statistics)
    mixed_amax = largest_of(h, None, block)
    return h, *_row_from_statistics(h, statistics, mixed_amax, state, operand, seed_rate, capacity, update)


def quantize_row_gradient_hadamard(
    dy: Tensor,
    weight_scale: Tensor,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    bias: bool,
    statistics: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A of `quantize_gradient.quantize_row_gradient`, to nearest, and `hadamard.quantize_hadamard` of dY, to the bit.

    Takes what they take; ``dbias`` is a float32 sum in a fixed order, another than there.

    Returns:
        A's ``low``, ``high``, ``slot`` and ``scale``, ``dbias``, ``low_t`` and its ``scale`` for the wgrad.
    """
    dy, rows, columns, row_blocks, column_blocks = check(dy, block)
    if not _fits(dy, block):
        low, high, slot, scale, *_, dbias = quantize_row_gradient(
            dy, weight_scale, None, None, state, seed_rate, capacity, block, update, "nothing", bias, statistics
        )
        return low, high, slot, scale, dbias, *quantize_hadamard(dy, None, block)
    new = Allocator(dy.device)
    low, _, high, _, slot = empty_planes(new, rows, columns, capacity, block, False)
    scale, dbias = new.float32(rows), new.float32(columns if bias else 0)
    sizes = select_sizes(block, row_blocks * column_blocks, max(row_blocks, column_blocks))
    with on(dy):
        if len(statistics) > 0:
            found = GradientStatistics(*(part if part.numel() > 0 else None for part in statistics))
            mixed_amax = largest_of(dy, None, block)
        else:
            found = GradientStatistics.empty(dy, True, False, bias, capacity, block)
            mixed_amax = new.int32(row_blocks, columns)
            row_hadamard_statistics[(row_blocks * column_blocks,)](
                dy, weight_scale, found.a_amax, found.a_weight, found.a_block_amax, found.column_sums, mixed_amax,
                rows, columns, *dy.stride(), **options("row_hadamard_statistics", TOKENS),
            )  # fmt: skip
        gradient_select[(row_blocks + column_blocks, blocks_along(block, sizes["PART"]))](
            found.a_block_amax, operand_state(state, 1), found.a_amax, found.a_weight, int32_limit(columns), slot,
            scale, None, None, None, None, None, None, None, 0.0, None, row_blocks, None, None, None,
            found.column_sums, dbias, seed_count(row_blocks * column_blocks, seed_rate), capacity, int(update), rows,
            columns, FALLBACK=capacity > 0, **sizes,
        )  # fmt: skip
    return low, high, slot, scale, dbias, *_planes(dy, weight_scale, scale, slot, low, high, mixed_amax)


def _fits(x: Tensor, block: int) -> bool:
    """Whether ``x`` is what the kernels here take."""
    return block == TOKENS and x.numel() > 0 and x.element_size() == 2


def _by_rows(planes: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What of the results of `quantize_row` the forward takes."""
    low, _, high, _, slot, scale, _ = planes
    return low, high, slot, scale


def _row_from_statistics(
    x: Tensor,
    statistics: MatrixStatistics,
    mixed_amax: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    update: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_row_hadamard` does after its first read."""
    new = Allocator(x.device)
    low, _, high, _, slot = empty_planes(new, *x.shape, capacity, TOKENS, False)
    scale = new.float32(x.shape[0])
    with on(x):
        select_rows(x, statistics, state, operand, seed_rate, capacity, TOKENS, update, slot, scale, None)
    return low, high, slot, scale, *_planes(x, None, scale, slot, low, high, mixed_amax)


def _planes(
    x: Tensor, fold: Tensor | None, scale: Tensor, slot: Tensor, low: Tensor, high: Tensor, mixed_amax: Tensor
) -> tuple[Tensor, Tensor]:
    """The second read: writes ``low`` and ``high``; returns the transformed integers, transposed, and their scales."""
    rows, columns = x.shape
    low_t = Allocator(x.device).int8(columns, padded(rows, TOKENS))
    mixed_scale, inverse = scales_from(mixed_amax, TOKENS)
    with on(x):
        row_hadamard_planes[parts("row_hadamard_planes", slot.numel(), TOKENS)](
            x, fold, scale, slot if high.shape[0] > 0 else None, low, high, inverse, low_t, rows, columns, *x.stride(),
            **options("row_hadamard_planes", TOKENS),
        )  # fmt: skip
    return low_t, mixed_scale
