"""Rows with their features mixed by a Hadamard transform, in Triton for every GPU: alone, and the parts of both.

It is the transform of `hadamard` along the other dimension: features are what `_transform` takes for tokens, and its
columns are rows here. Programs that hold whole rows read what cannot fall back once: W, and X in evaluation.
`mix_features` only transforms, for what the kernels that quantize do not take.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.hadamard import (
    _ROOT,
    _TOKENS,
    _by_place,
    _load_operand,
    _options,
    _transform,
    integers_by_place,
    largest_of_columns,
)
from lightning_int8.kernels.hadamard_ops import TOKENS
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.plain_rows import MAX_COLUMNS
from lightning_int8.kernels.planes import blocks_along, padded
from lightning_int8.kernels.quantize_launch import Allocator, check, empty_planes, on, options
from lightning_int8.kernels.select import _MIN_SCALE_BITS, _over_constant


@triton.jit
def load_features(x, column_block, row, rows, columns, stride_r, stride_c, PART: tl.constexpr):
    """128 features of ``PART`` rows of ``x``, in its dtype, as `_transform` takes them: ``[128, PART]``."""
    return _load_operand(x, None, column_block, row, columns, rows, stride_c, stride_r, PART)


@triton.jit
def integers_of_rows(y0, y1, y2, y3, y4, y5, y6, y7, factor, dtype: tl.constexpr):
    """Integers ``[PART, 128]`` of the eight parts of `_transform`, given the rows' reciprocal scales ``[PART]``."""
    return integers_by_place(y0, y1, y2, y3, y4, y5, y6, y7, (factor * _ROOT)[None, :], dtype)


@CachedLaunch
@triton.jit
def mixed_rows(
    x,
    low,  # int8 [R, G·128]
    slot,  # int32 [RB, G], blocks of 128
    scale,  # float32 [R]
    rows,
    columns,
    stride_r,
    PART: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Everything of ``PART`` rows of ``x [R, Q]``, whose columns are adjacent.

    ``GROUPS``, a power of two, is at least G, how many groups of 128 features there are.
    """
    groups = tl.cdiv(columns, _TOKENS)
    row = tl.program_id(0) * PART
    r = row + tl.arange(0, PART)
    # What `_transform` takes for columns: a group of features of one row.
    n = tl.arange(0, PART * GROUPS)
    i = tl.arange(0, _TOKENS)
    group = n % GROUPS
    inside = (i[:, None] < columns - group[None, :] * _TOKENS) & (row + n // GROUPS < rows)[None, :]
    x += row.to(tl.int64) * stride_r
    offset = (n // GROUPS) * stride_r + group * _TOKENS
    tile = tl.load(x + (i[:, None] + offset[None, :]), mask=inside, other=0.0)
    if row % _TOKENS == 0:
        g = tl.arange(0, GROUPS)
        tl.store(slot + row // _TOKENS * groups + g, tl.full([GROUPS], -1, tl.int32), mask=g < groups)
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    largest = (largest_of_columns(y0, y1, y2, y3, y4, y5, y6, y7) * _ROOT).to(tl.int32, bitcast=True)
    largest = tl.max(tl.reshape(largest, [PART, GROUPS]), 1)
    found = tl.maximum(_over_constant(largest, 127.0), _MIN_SCALE_BITS).to(tl.float32, bitcast=True)
    tl.store(scale + r, found, mask=r < rows)
    factor = tl.div_rn(tl.full([PART], 1.0, tl.float32), found)
    factor = tl.reshape(tl.broadcast_to(factor[:, None], [PART, GROUPS]), [PART * GROUPS])
    integers = integers_of_rows(y0, y1, y2, y3, y4, y5, y6, y7, factor, tl.int8)
    low += row.to(tl.int64) * groups * _TOKENS
    at = (n // GROUPS * groups + group) * _TOKENS
    inside = (row + n // GROUPS < rows) & (group < groups)
    tl.store(low + (at[:, None] + tl.arange(0, _TOKENS)[None, :]), integers, mask=inside[:, None])


@CachedLaunch
@triton.jit
def features_mixed(
    x,
    mixed,  # float32 [M, Q']
    rows,
    columns,
    stride_r,
    stride_c,
    PART: tl.constexpr,
):
    """128 features of ``PART`` rows."""
    groups = tl.cdiv(columns, _TOKENS)
    group = tl.program_id(0) % groups
    row = tl.program_id(0) // groups * PART
    tile = load_features(x, group, row, rows, columns, stride_r, stride_c, PART)
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    i = tl.arange(0, PART)
    pitch = groups * _TOKENS
    mixed += row.to(tl.int64) * pitch + group * _TOKENS
    y = _by_place(y0, y1, y2, y3, y4, y5, y6, y7) * _ROOT
    tl.store(mixed + (i[:, None] * pitch + tl.arange(0, _TOKENS)[None, :]), y, mask=(i < rows - row)[:, None])


def mix_features(x: Tensor) -> Tensor:
    """``x Rᵀ``: see `hadamard_reference.mix_features`.

    Args:
        x: bfloat16, float16, float32 or float64 ``[M, Q]``, any strides; fast if one of them is 1.

    Returns:
        float32 ``[M, Q']``; the same bits in every run.
    """
    x, rows, columns, _, groups = check(x, TOKENS)
    mixed = Allocator(x.device).float32(rows, padded(columns, TOKENS))
    if mixed.numel() > 0:
        chosen = _options("features_mixed", TOKENS, x, None)
        with on(x):
            features_mixed[(groups * blocks_along(rows, chosen["PART"]),)](
                x, mixed, rows, columns, *x.stride(), **chosen
            )
    return mixed


def has_whole_rows(x: Tensor) -> bool:
    """Whether `quantize_whole_rows` takes ``x``: adjacent columns, and no more than registers hold."""
    return x.stride(1) == 1 and 0 < x.shape[1] <= MAX_COLUMNS and x.shape[0] > 0


def quantize_whole_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of `hadamard_mixed.quantize_mixed` without fallback, of blocks of 128, where `has_whole_rows`."""
    rows, columns = x.shape
    new = Allocator(x.device)
    low, _, high, _, slot = empty_planes(new, rows, columns, 0, TOKENS, False)
    scale, chosen = new.float32(rows), options("mixed_rows", TOKENS)
    groups = triton.next_power_of_2(slot.shape[1])
    part, warps = max(1, chosen["PART"] // groups), chosen["num_warps"] * max(1, groups // chosen["PART"])
    with on(x):
        mixed_rows[(blocks_along(rows, part),)](
            x, low, slot, scale, rows, columns, x.stride(0),
            GROUPS=groups, **chosen | {"PART": part, "num_warps": warps},
        )  # fmt: skip
    return low, high, slot, scale
