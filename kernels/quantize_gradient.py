"""Quantize kernels in Triton for dY with `row` scaling: two operands and the bias gradient in two reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_int8.kernels.integers import gradient_planes
from lightning_int8.kernels.planes import MIN_SCALE, blocks_along, groups_along, seed_count
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
    row_options,
    select_sizes,
)
from lightning_int8.kernels.reference import _INT32_LIMIT
from lightning_int8.kernels.select import gradient_select
from lightning_int8.kernels.statistics import gradient_statistics


class GradientStatistics(NamedTuple):
    """What the first read of ``dy [M, N]`` leaves: see `statistics.gradient_statistics`; ``None`` is not needed."""

    a_amax: Tensor | None
    a_weight: Tensor | None
    a_block_amax: Tensor | None
    g_amax: Tensor | None
    g_weight: Tensor | None
    g_block_amax: Tensor | None
    int_sums: Tensor | None
    column_sums: Tensor | None

    @classmethod
    def empty(
        cls, dy: Tensor, a: bool, g: bool, bias: bool, capacity: int, block: int, copies: tuple[int, ...] = ()
    ) -> GradientStatistics:
        """Room for the statistics of ``dy`` as A and as G, or of ``copies`` like it, uninitialized."""
        rows, columns = dy.shape
        new = Allocator(dy.device, copies)
        row_blocks, column_blocks = blocks_along(rows, block), blocks_along(columns, block)
        return cls(
            new.int32(column_blocks, rows) if a else None,
            new.float32(column_blocks, rows) if a and (capacity > 0 or may_bind(columns)) else None,
            new.int32(row_blocks, column_blocks) if a else None,
            new.int32(row_blocks, columns) if g else None,
            new.float32(row_blocks, columns) if g else None,
            new.int32(column_blocks, row_blocks) if g else None,
            new.float32(row_blocks) if g else None,
            new.float32(row_blocks, columns) if bias else None,
        )


def quantize_row_gradient(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    input_int_max: Tensor | None,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    stochastic: str,
    bias: bool,
    statistics: Sequence[Tensor] = (),
    group_blocks: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes dY ``[M, N]`` as ``A = dY·diag(t)`` and ``G = (dY·diag(s))ᵀ``, with the bias gradient, in two reads.

    Arguments and results of `reference.quantize_row_gradient`, equal to it as `quantize_row` is to its own; ``dbias``
    is a float32 sum in a fixed order, another than the reference's.

    Args:
        dy: bfloat16, float16, float32 or float64 ``[M, N]``, any strides; fast if one of them is 1.
        weight_scale: ``t``, contiguous float32 ``[N]``, or ``None``: no A.
        input_scale: ``s``, contiguous float32 ``[M]``, or ``None``: no G.
        input_int_max: Contiguous float32 ``[M]``; goes with ``input_scale``.
        state: float32 ``[operands, 4]`` or ``None``: A uses row 1 and G, if there is one, row 2, updated in place when
            ``update``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks of A, and of G, that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``: 32, 64 or 128.
        stochastic: See `reference.quantize_row_gradient`.
        bias: Whether to write ``dbias``.
        statistics: What the first read would find, if something else has found it already: the fields of
            `GradientStatistics`, empty tensors where ``None``.
        group_blocks: See `reference.quantize_row_gradient`.

    Returns:
        A's ``low [M, NB·B]``, ``high [C, B, B]`` int8, ``slot [MB, NB]`` int32, ``scale [M]`` float32; G's
        ``low [N, MB·B]``, ``high [C, B, B]``, ``slot [NB, MB]``, ``scale [N]`` or ``[groups, N]``; ``dbias`` float32
        ``[N]``. What is not wanted comes back empty.
    """
    dy, rows, columns, row_blocks, column_blocks = check(dy, block)
    has_a, has_g = weight_scale is not None, input_scale is not None
    new = Allocator(dy.device)
    fallback, blocks = capacity > 0, row_blocks * column_blocks
    groups = (groups_along(rows, block, group_blocks),) if group_blocks else ()

    def results(wanted: bool, rows: int, columns: int, *groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not wanted:
            return new.int8(0), new.int8(0), new.int32(0), new.float32(0)
        low, _, high, _, slot = empty_planes(new, rows, columns, capacity, block, False)
        return low, high, slot, new.float32(*groups, rows)

    a_low, a_high, a_slot, a_scale = results(has_a, rows, columns)
    g_low, g_high, g_slot, g_scale = results(has_g, columns, rows, *groups)
    dbias = new.float32(columns if bias else 0)
    out = a_low, a_high, a_slot, a_scale, g_low, g_high, g_slot, g_scale, dbias
    if dy.numel() == 0:
        for scale in (a_scale, g_scale):
            scale.fill_(MIN_SCALE)
        g_slot.fill_(-1)
        dbias.zero_()
        return out
    if not (has_a or has_g or bias):
        return out
    if len(statistics) > 0:
        found = GradientStatistics(*(part if part.numel() > 0 else None for part in statistics))
    else:
        found = GradientStatistics.empty(dy, has_a, has_g, bias, capacity, block)
        with on(dy):
            gradient_statistics[(blocks,)](
                dy, input_scale, input_int_max, weight_scale, *found, rows, columns, *dy.stride(),
                B=block, **row_options("gradient_statistics", block, dy),
            )  # fmt: skip
    a_inverse, g_inverse = new.float32(rows), new.float32(*groups, columns)
    a_seed = new.int32(1) if has_a and stochastic == "all" else None
    g_seed = new.int32(1) if has_g and stochastic != "nothing" else None
    g_state = operand_state(state, 2) if has_g else None
    sizes = select_sizes(block, blocks, max(row_blocks, column_blocks))
    with on(dy):
        gradient_select[(row_blocks + column_blocks, blocks_along(block, sizes["PART"]))](
            found.a_block_amax, operand_state(state, 1), found.a_amax, found.a_weight, int32_limit(columns), a_slot,
            a_scale, a_inverse, a_seed, found.g_block_amax, g_state, found.g_amax, found.g_weight,
            found.int_sums, _INT32_LIMIT * 2.0**-31, g_slot, group_blocks or row_blocks, g_scale, g_inverse, g_seed,
            found.column_sums, dbias, seed_count(blocks, seed_rate), capacity, int(update), rows, columns,
            FALLBACK=fallback, **sizes,
        )  # fmt: skip
        if has_a or has_g:
            gradient_planes[parts("gradient_planes", blocks, block)](
                dy, weight_scale, a_inverse, a_slot, a_seed, a_low, a_high if fallback else None,
                input_scale, group_blocks or row_blocks, g_inverse, g_slot, g_seed, g_low,
                g_high if fallback else None, rows, columns, *dy.stride(),
                B=block, SMALL_ONLY=stochastic == "small", **options("gradient_planes", block),
            )  # fmt: skip
    return out
