"""The forward's operands with the features mixed by a Hadamard transform, in Triton for every GPU.

See `hadamard_reference.mix_features`. It is the transform of `hadamard` along the other dimension, read and written
once: the first version, which leaves quantization to the kernels that there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.hadamard import _ROOT, _TOKENS, _by_place, _load_operand, _options, _transform
from lightning_int8.kernels.hadamard_ops import TOKENS
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import blocks_along, padded
from lightning_int8.kernels.quantize_launch import check, on
from lightning_int8.kernels.swiglu import _inputs


@CachedLaunch
@triton.jit
def features_mixed(
    x,
    up,
    mixed,  # [M, Q']
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
    dtype = mixed.dtype.element_ty
    # [128, PART]: features are what `_transform` takes for tokens.
    tile = _load_operand(x, up, group, row, columns, rows, stride_c, stride_r, PART)
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    y = _by_place(
        (y0 * _ROOT).to(dtype),
        (y1 * _ROOT).to(dtype),
        (y2 * _ROOT).to(dtype),
        (y3 * _ROOT).to(dtype),
        (y4 * _ROOT).to(dtype),
        (y5 * _ROOT).to(dtype),
        (y6 * _ROOT).to(dtype),
        (y7 * _ROOT).to(dtype),
    )
    i = tl.arange(0, PART)
    pitch = groups * _TOKENS
    mixed += row.to(tl.int64) * pitch + group * _TOKENS
    tl.store(mixed + i[:, None] * pitch + tl.arange(0, _TOKENS)[None, :], y, mask=(i < rows - row)[:, None])


def mix_features(x: Tensor, up: Tensor | None) -> Tensor:
    """``x Rᵀ``: see `hadamard_reference.mix_features`.

    Args:
        x: bfloat16, float16, float32 or float64 ``[M, Q]``, any strides; fast if one of them is 1.
        up: ``None``, or like ``x``, but not float64; then others than contiguous ones are copied.

    Returns:
        ``[M, Q']``; the same bits in every run.
    """
    if up is not None:
        x, up = _inputs(TOKENS, x, up)
    x, rows, columns, _, groups = check(x, TOKENS)
    mixed = x.new_empty(rows, padded(columns, TOKENS))
    if mixed.numel() > 0:
        chosen = _options("features_mixed", TOKENS, x, up)
        with on(x):
            features_mixed[(groups * blocks_along(rows, chosen["PART"]),)](
                x, up, mixed, rows, columns, *x.stride(), **chosen
            )
    return mixed
