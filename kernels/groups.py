"""The wgrad with scales by groups of tokens: one `row` product a group, added up in float32.

The reference's and the portable backend's; :mod:`lightning_int8.kernels.hopper_groups` runs several groups at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_int8.kernels.planes import QuantizedMatrix, groups_along


def gemm_row_groups(
    gemm_row: Callable[..., Tensor], a: QuantizedMatrix, b: QuantizedMatrix, out_dtype: torch.dtype, group_blocks: int
) -> Tensor:
    """``a @ bᵀ`` where each ``group_blocks`` blocks of a row of ``a`` have a scale of their own.

    Args:
        gemm_row: A backend's; see :func:`lightning_int8.kernels.reference.gemm_row`.
        a: ``[R, Q]`` whose ``scale`` is contiguous float32 ``[groups, R]``, ``groups = ceil(QB / group_blocks)``.
        b: ``[N, Q]`` without a scale.
        out_dtype: Of the result.
        group_blocks: Blocks of the contraction in a group, at least 1.

    Returns:
        ``[R, N]``; the groups' products are added one after the other, in float32.

    Raises:
        ValueError: ``a.scale`` has another number of groups.
    """
    scale = scales_of(a, group_blocks)
    total = None
    for group in range(len(scale)):
        dtype = out_dtype if group == len(scale) - 1 else torch.float32
        blocks = slice(group * group_blocks, (group + 1) * group_blocks)
        total = gemm_row(columns_of(a, blocks, scale[group]), columns_of(b, blocks, None), None, dtype, total)
    return total  # type: ignore[return-value]


def scales_of(a: QuantizedMatrix, group_blocks: int) -> Tensor:
    """``a.scale``, float32 ``[groups, R]``; see :func:`gemm_row_groups` for the error."""
    groups = groups_along(a.size[1], a.block, group_blocks)
    if a.scale is None or a.scale.shape != (groups, a.size[0]):
        found = "no scale" if a.scale is None else f"a scale of shape {list(a.scale.shape)}"
        raise ValueError(f"gemm_row_groups needs one scale a row for each of {groups} groups, not {found}.")
    return a.scale


def columns_of(x: QuantizedMatrix, blocks: slice, scale: Tensor | None) -> QuantizedMatrix:
    """Some blocks of each row of ``x``, as views."""
    columns = slice(blocks.start * x.block, blocks.stop * x.block)
    width = min(columns.stop, x.size[1]) - columns.start
    slot = None if x.slot is None else x.slot[:, blocks]
    return QuantizedMatrix(x.low[:, columns], x.high, slot, scale, (x.size[0], width), x.block)
