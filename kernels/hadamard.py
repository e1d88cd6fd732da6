"""The wgrad's operand with the tokens mixed by a Hadamard transform, in Triton for every GPU: see `hadamard_reference`.

AbsMax of a column of ``R x`` comes before its integers, so ``x`` is read and transformed twice. ``R`` is the product of
a 16×16 matrix for the bits 2 to 5 of a token's place, which tensor cores multiply with, and of an 8×8 one for the bits
0, 1 and 6, three additions an element; no pair of bits in the signs of D has one of each. Values of 16 bits, and of
float32 in three parts, times powers of two are exact, and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.hadamard_ops import TOKENS, padded_tokens
from lightning_int8.kernels.integers import _finite_mask, _integer_bits
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import MIN_SCALE, blocks_along
from lightning_int8.kernels.quantize_launch import Allocator, check, on, options
from lightning_int8.kernels.select import _MIN_SCALE_BITS, _over_constant
from lightning_int8.kernels.statistics import _larger, load_tile
from lightning_int8.kernels.swiglu import _INTERPRETED, _inputs, silu_in

_TOKENS = tl.constexpr(TOKENS)
_ROOT = tl.constexpr(TOKENS**0.5)


@triton.jit
def _load_operand(x, up, group, column, rows, columns, stride_r, stride_c, PART: tl.constexpr):
    """``[128, PART]`` of what is transformed, in its dtype: ``x``, or ``silu(x)·up`` with the strides of ``x``."""
    dtype = x.dtype.element_ty
    row = group * _TOKENS
    i = tl.arange(0, _TOKENS)
    j = tl.arange(0, PART)
    tile = load_tile(x, row, column, i, j, rows, columns, stride_r, stride_c)
    if up is not None:
        tile = silu_in(tile, dtype) * load_tile(up, row, column, i, j, rows, columns, stride_r, stride_c)
    return tile.to(dtype)


@triton.jit
def _upper_half(x):
    """float32 ``x`` cut off to bfloat16, whose other bits ``x`` less that has; the difference is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(matrix, tile):
    """``matrix @ tile``, a matrix of powers of two with signs, float32 with exact products."""
    if _INTERPRETED:
        return tl.dot(matrix, tile.to(tl.float32), input_precision="ieee")
    elif tile.dtype == tl.float32:
        matrix = matrix.to(tl.bfloat16)
        upper = _upper_half(tile)
        middle = _upper_half(tile - upper)
        total = tl.dot(matrix, (tile - upper - middle).to(tl.bfloat16))
        total = tl.dot(matrix, middle.to(tl.bfloat16), total)
        return tl.dot(matrix, upper.to(tl.bfloat16), total)
    else:
        return tl.dot(matrix.to(tile.dtype), tile)


@triton.jit
def _halves(x):
    """``[16, n]`` as its left and right half."""
    return tl.split(tl.permute(tl.reshape(x, [16, 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _transform(tile):
    """``R x / sqrt(128)`` of a tile ``[128, PART]``, in eight parts ``[16, PART]``.

    Row ``m`` of part ``4·b6 + 2·b1 + b0`` is the place with these bits, ``b2 = m // 8``, and ``b3`` to ``b5`` those of
    ``m % 8``. Of a product a thread has the rows ``m`` and ``m + 8``, and so of all parts eight adjacent places.
    """
    PART: tl.constexpr = tile.shape[1]
    m = tl.arange(0, 16)[:, None]
    k = tl.arange(0, 16)[None, :]
    n = (m // 8) | (m % 8) * 2
    ones = n & k
    ones = ones ^ (ones >> 2)
    pairs = k & (k >> 1)
    sign = (ones ^ (ones >> 1) ^ pairs ^ (pairs >> 2)) & 1
    matrix = tl.where(sign == 0, 1.0 / _TOKENS, -1.0 / _TOKENS)
    tile = tl.permute(tl.reshape(tile, [2, 16, 4, PART]), (1, 0, 2, 3))
    x = _multiply(matrix, tl.reshape(tile, [16, 8 * PART]))
    a, b = _halves(x)
    a, b = a + b, a - b
    a0, a1 = _halves(a)
    b0, b1 = _halves(b)
    # The bits 0 and 1 have the last of D's signs.
    c0, c1, c2, c3 = _four(a0, a1)
    d0, d1, d2, d3 = _four(b0, b1)
    return c0, c1, c2, c3, d0, d1, d2, d3


@triton.jit
def _four(lower, upper):
    """The bits 0 and 1 of ``lower``, whose bit 1 is 0, and ``upper``: with D, so that the last of them changes sign."""
    x0, x1 = _halves(lower)
    x2, x3 = _halves(upper)
    p = x0 + x1
    q = x0 - x1
    r = x2 - x3
    s = x2 + x3
    return p + r, q + s, p - r, q - s


@triton.jit
def _by_place(y0, y1, y2, y3, y4, y5, y6, y7):
    """The eight parts of `_transform`, transposed: ``[PART, 128]``, the places in their order."""
    PART: tl.constexpr = y0.shape[1]
    # [16, PART, b6, b1, b0]
    y = tl.join(tl.join(tl.join(y0, y4), tl.join(y2, y6)), tl.join(tl.join(y1, y5), tl.join(y3, y7)))
    return tl.reshape(tl.permute(tl.reshape(y, [2, 8, PART, 2, 4]), (2, 3, 1, 0, 4)), [PART, _TOKENS])


@CachedLaunch
@triton.jit
def hadamard_statistics(
    x,
    up,
    amax,  # int32 [G, Q]
    sums,  # float32 [G, Q], or None
    rows,
    columns,
    stride_r,
    stride_c,
    PART: tl.constexpr,
):
    """Bit patterns of AbsMax of ``R x / sqrt(128)``, and sums of ``x``, over 128 rows, of ``PART`` columns."""
    parts = tl.cdiv(columns, PART)
    group = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * PART
    tile = _load_operand(x, up, group, column, rows, columns, stride_r, stride_c, PART)
    store_column_statistics(tile, amax, sums, group, column, columns)


@triton.jit
def store_column_statistics(tile, amax, sums, group, column, columns):
    """Writes bit patterns of AbsMax of the columns of `_transform` and, unless ``None``, the sums of ``tile``."""
    c = column + tl.arange(0, tile.shape[1])
    at = group.to(tl.int64) * columns + c
    if sums is not None:
        tl.store(sums + at, tl.sum(tile.to(tl.float32), 0), mask=c < columns)
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    bits = largest_of_columns(y0, y1, y2, y3, y4, y5, y6, y7).to(tl.int32, bitcast=True)
    tl.store(amax + at, bits, mask=c < columns)


@triton.jit
def largest_of_columns(y0, y1, y2, y3, y4, y5, y6, y7):
    """AbsMax ``[PART]`` of the columns of `_transform`, NaN where there is one."""
    lower = _larger(_magnitude(y0, y1), _magnitude(y2, y3))
    return tl.reduce(_larger(lower, _larger(_magnitude(y4, y5), _magnitude(y6, y7))), 0, _larger)


@triton.jit
def _magnitude(a, b):
    return _larger(tl.abs(a), tl.abs(b))


@CachedLaunch
@triton.jit
def hadamard_scales(
    amax,  # int32 [G, Q]
    scale,  # float32 [Q]
    inverse,  # float32 [Q], of the scales for R x / sqrt(128)
    sums,  # float32 [G, Q], or None
    total,  # float32 [Q]: their sums over G
    groups,
    columns,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The scales of ``PART`` columns, and the last step of summing them up."""
    c = tl.program_id(0) * PART + tl.arange(0, PART)
    largest = tl.zeros([CHUNK, PART], tl.int32)
    summed = tl.zeros([CHUNK, PART], tl.float32)
    for start in range(0, groups, CHUNK):
        g = start + tl.arange(0, CHUNK)
        inside = (g < groups)[:, None] & (c < columns)[None, :]
        bits = tl.load(amax + g.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0)
        largest = tl.maximum(largest, bits)
        if sums is not None:
            summed += tl.load(sums + g.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0.0)
    if sums is not None:
        tl.store(total + c, tl.sum(summed, 0), mask=c < columns)
    # Divided first: R x itself may be larger than the largest float32. Maxima of bit patterns, since those keep NaN.
    s = _over_constant(tl.max(largest, 0), 127.0).to(tl.float32, bitcast=True) * _ROOT
    s = tl.maximum(s.to(tl.int32, bitcast=True), _MIN_SCALE_BITS).to(tl.float32, bitcast=True)
    tl.store(scale + c, s, mask=c < columns)
    tl.store(inverse + c, tl.div_rn(tl.full([PART], _ROOT, tl.float32), s), mask=c < columns)


@triton.jit
def _rounded(y, factor, mask, dtype: tl.constexpr):
    return _integer_bits(y * factor, None, None, mask).to(dtype)


@triton.jit
def integers_by_place(y0, y1, y2, y3, y4, y5, y6, y7, factor, dtype: tl.constexpr):
    """Integers ``[PART, 128]`` of the eight parts of `_transform`, whose values are multiplied with ``[1, PART]``."""
    mask = _finite_mask(factor)
    return _by_place(
        _rounded(y0, factor, mask, dtype),
        _rounded(y1, factor, mask, dtype),
        _rounded(y2, factor, mask, dtype),
        _rounded(y3, factor, mask, dtype),
        _rounded(y4, factor, mask, dtype),
        _rounded(y5, factor, mask, dtype),
        _rounded(y6, factor, mask, dtype),
        _rounded(y7, factor, mask, dtype),
    )


@CachedLaunch
@triton.jit
def hadamard_planes(
    x,
    up,
    inverse,  # float32 [Q]
    low_t,  # int8 [Q, G·128]
    rows,
    columns,
    stride_r,
    stride_c,
    PART: tl.constexpr,
):
    """Integers of 128 rows of ``PART`` columns of ``R x``, transposed; tiles from the last, which L2 may still hold."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    parts = tl.cdiv(columns, PART)
    group = pid // parts
    column = pid % parts * PART
    c = column + tl.arange(0, PART)
    factor = tl.load(inverse + c, mask=c < columns, other=1.0)[None, :]
    tile = _load_operand(x, up, group, column, rows, columns, stride_r, stride_c, PART)
    store_transformed(tile, factor, low_t, group, column, rows, columns)


@triton.jit
def store_transformed(tile, factor, low_t, group, column, rows, columns):
    """Writes the integers of `_transform`, transposed; ``factor [1, PART]`` is what its values are multiplied with."""
    PART: tl.constexpr = tile.shape[1]
    c = column + tl.arange(0, PART)
    y0, y1, y2, y3, y4, y5, y6, y7 = _transform(tile)
    low = integers_by_place(y0, y1, y2, y3, y4, y5, y6, y7, factor, tl.int8)
    pitch = tl.cdiv(rows, _TOKENS) * _TOKENS
    low_t += column.to(tl.int64) * pitch + group * _TOKENS
    at = tl.arange(0, PART)[:, None] * pitch + tl.arange(0, _TOKENS)[None, :]
    tl.store(low_t + at, low, mask=(c < columns)[:, None])


def quantize_hadamard(x: Tensor, up: Tensor | None, block: int, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``R x`` quantized: see `hadamard_reference.quantize_hadamard`, also for how near to it.

    Args:
        x: bfloat16, float16, float32 or float64 ``[M, Q]``, any strides; fast if one of them is 1.
        up: ``None``, or like ``x``, but not float64; then others than contiguous ones are copied.
        block: Block edge of the wgrad: 32, 64 or 128.
        sums: Whether to sum up what is transformed over its rows.

    Returns:
        ``low_t`` int8 ``[Q, M']``, ``scale`` float32 ``[Q]`` and sums float32 ``[Q]``, empty unless ``sums``; the same
        bits in every run.
    """
    if up is not None:
        x, up = _inputs(block, x, up)
    check(x, block)
    # Tiles have 128 rows, whatever the block.
    x, rows, columns, _, _ = check(x, TOKENS)
    new = Allocator(x.device)
    low_t = new.int8(columns, padded_tokens(rows, block))
    if x.numel() == 0:
        return low_t, new.float32(columns).fill_(MIN_SCALE), new.float32(columns if sums else 0).zero_()
    groups, chosen = blocks_along(rows, TOKENS), _options("hadamard_statistics", block, x, up)
    amax, partial = new.int32(groups, columns), new.float32(groups, columns) if sums else None
    planes = _options("hadamard_planes", block, x, up)
    with on(x):
        hadamard_statistics[(groups * blocks_along(columns, chosen["PART"]),)](
            x, up, amax, partial, rows, columns, *x.stride(), **chosen
        )
        scale, inverse, total = scales_from(amax, partial, block)
        hadamard_planes[(groups * blocks_along(columns, planes["PART"]),)](
            x, up, inverse, low_t, rows, columns, *x.stride(), **planes
        )
    return low_t, scale, total


def scales_from(amax: Tensor, sums: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """``scale``, ``inverse`` and ``total`` (empty without ``sums``) of `hadamard_scales`, on the current device."""
    (groups, columns), new, chosen = amax.shape, Allocator(amax.device), options("hadamard_scales", block)
    scale, inverse, total = new.float32(columns), new.float32(columns), new.float32(columns if sums is not None else 0)
    hadamard_scales[(blocks_along(columns, chosen["PART"]),)](
        amax, scale, inverse, sums, total, groups, columns, **chosen
    )
    return scale, inverse, total


def _options(kernel: str, block: int, x: Tensor, up: Tensor | None) -> dict:
    """As `options`; half the columns at a time where elements are wider than 16 bits, or come from two tensors."""
    found = options(kernel, block)
    wide = up is not None or x.element_size() > 2
    return found | {"PART": found["PART"] // 2} if wide else found
