"""Splitting the contraction of the `row` GEMM on Hopper, where an output has too few tiles for the GPU.

The wgrad of a narrow linear has few tiles over many tokens: 32 for 2048 → 512, on 132 multiprocessors. Cut into parts,
it has a tile for each of them. Every part writes its INT32 sums, and one more kernel adds them and finishes the output.
Integer sums do not depend on their order, so the result has the same bits however many parts there are; a part's sum
may even wrap, as the whole one fits (:func:`lightning_int8.kernels.reference.row_scale`).
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import blocks_along

# Past these, parts are too short and their sums too many bytes to gain.
MAX_PARTS = 8
# Microseconds, for `choose_parts`, fitted to products on an H200 at r = 0 (docs/log.md): a tile's products with one
# block of the contraction; one more kernel; an INT32 written and read again.
BLOCK_TIME, SUM_TIME, ELEMENT_TIME = 0.6, 3.0, 8 / 3e6


# Asked in each launch, where what it takes is the host's time.
@functools.lru_cache(maxsize=1024)
def choose_parts(rows: int, cols: int, depth: int, tiles: int, processors: int, shortest: int) -> int:
    """In how many parts to cut the contraction so that the product and the sum of its parts take the least time.

    Each CTA makes one part of one tile after another, so a round of them takes as long as a part's products. Outputs
    that fill the GPU are not split.

    Args:
        rows: Of the output.
        cols: Of the output.
        depth: Blocks of the contraction.
        tiles: Of the output.
        processors: Multiprocessors of the GPU.
        shortest: The least number of blocks that a part must have.

    Returns:
        From 1 (not split) to ``MAX_PARTS``.
    """
    most = max(1, min(MAX_PARTS, depth // shortest)) if tiles <= processors else 1

    def microseconds(parts: int) -> float:
        products = blocks_along(tiles * parts, processors) * blocks_along(depth, parts) * BLOCK_TIME
        return products if parts == 1 else products + SUM_TIME + parts * rows * cols * ELEMENT_TIME

    return min(range(1, most + 1), key=microseconds)


@CachedLaunch
@triton.jit(do_not_specialize=["rows", "parts"])
def _sum_kernel(
    sums, a_scale, b_scale, bias, accumulate, out, rows, cols, parts,
    MAX_PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    at = m.to(tl.int64)[:, None] * cols + n[None, :]
    size = rows.to(tl.int64) * cols
    total = tl.zeros((BM, BN), tl.int32)
    # Unrolled, so that all parts are on their way at a time.
    for part in tl.static_range(MAX_PARTS):
        total += tl.load(sums + part * size + at, mask=inside & (part < parts), other=0)
    value = total.to(tl.float32)
    if a_scale is not None:
        value *= tl.load(a_scale + m, mask=m < rows, other=0.0)[:, None]
    if b_scale is not None:
        value *= tl.load(b_scale + n, mask=n < cols, other=0.0)[None, :]
    if bias is not None:
        value += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    if accumulate is not None:
        value += tl.load(accumulate + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def add_parts(
    sums: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    accumulate: Tensor | None,
    out: Tensor,
) -> None:
    """``out = (sum of sums)·a_scale·b_scale + bias + accumulate``, in float32 from the exact sum on.

    Args:
        sums: int32 ``[parts, R, N]``, at most ``MAX_PARTS`` of them, contiguous.
        a_scale: float32 ``[R]`` contiguous, or ``None``.
        b_scale: float32 ``[N]`` contiguous, or ``None``.
        bias: float ``[N]`` contiguous, or ``None``.
        accumulate: float ``[R, N]`` contiguous, or ``None``.
        out: float32, bfloat16 or float16 ``[R, N]`` contiguous; written.
    """
    parts, rows, cols = sums.shape
    tile = 4, 256
    # Like the reference, which rounds after each multiplication and addition of the epilogue.
    _sum_kernel[blocks_along(rows, tile[0]), blocks_along(cols, tile[1])](
        sums, a_scale, b_scale, bias, accumulate, out, rows, cols, parts,
        MAX_PARTS=MAX_PARTS, BM=tile[0], BN=tile[1], num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
