"""The portable INT8 GEMMs, in plain Triton: every NVIDIA GPU from Ampere on.

Per output tile both kernels loop over the base planes, and over lists of *items*. An item is a block of the contraction
and, for each operand, where its tile comes from: the base plane, or a slot of the compact `high` planes. A branch in a
loop would stop Triton from pipelining its loads, so the fallback blocks are listed beforehand, on the device, by
:func:`_list_kernel`: per row tile of `a`, per column tile of `b` and, where `row` scaling multiplies two high planes,
per pair of them. The loops then have dynamic trip counts and no branch.

`row`: the loops come by shift level in Horner form, `(((high·high ≪ 8) + high·low + low·high) ≪ 8) + low·low`, in one
INT32 accumulator. It may wrap on the way; the quantizer's scales guarantee that the sum fits. `block`: every block's
product is INT32 and is scaled into an FP32 accumulator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import RESIDUAL_STEPS, QuantizedMatrix, blocks_along
from lightning_int8.kernels.tiles import Tile, choose

BLOCKS = (32, 64, 128)


# --- lists ------------------------------------------------------------------------------------------------------------


@triton.jit
def _any_high(slot, tile, k, blocks, depth, stride_r, stride_k, SUB: tl.constexpr):
    """The slots of one tile along ``k``: with several blocks a tile, 0 where any of them has one."""
    found = tl.full(k.shape, -1, tl.int32)
    for g in tl.static_range(SUB):
        row = tile * SUB + g
        s = tl.load(slot + row * stride_r + k * stride_k, mask=(k < depth) & (row < blocks), other=-1)
        found = s if SUB == 1 else tl.where(s >= 0, 0, found)
    return found


@CachedLaunch
@triton.jit
def _list_kernel(
    a_slot, b_slot, counts, items, depth,
    a_tiles, b_tiles, a_blocks, b_blocks, a_stride_r, a_stride_k, b_stride_r, b_stride_k,
    A_HIGH: tl.constexpr, B_HIGH: tl.constexpr, A_SUB: tl.constexpr, B_SUB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Program: one list. Those of `a`'s tiles come first, then `b`'s, then the pairs'.
    row = tl.program_id(0)
    pair = row - a_tiles - b_tiles
    of_a = (row < a_tiles) | (pair >= 0)
    of_b = row >= a_tiles
    a_tile = tl.where(pair >= 0, pair // b_tiles, row)
    b_tile = tl.where(pair >= 0, pair % b_tiles, row - a_tiles)
    out = items + row.to(tl.int64) * (3 * depth)
    count = 0
    for start in range(0, depth, CHUNK):
        k = start + tl.arange(0, CHUNK)
        take = k < depth
        sa = tl.full((CHUNK,), -1, tl.int32)
        sb = tl.full((CHUNK,), -1, tl.int32)
        if A_HIGH:
            if of_a:
                sa = _any_high(a_slot, a_tile, k, a_blocks, depth, a_stride_r, a_stride_k, A_SUB)
                take &= sa >= 0
        if B_HIGH:
            if of_b:
                sb = _any_high(b_slot, b_tile, k, b_blocks, depth, b_stride_r, b_stride_k, B_SUB)
                take &= sb >= 0
        at = count + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + at, k, mask=take)
        tl.store(out + depth + at, sa, mask=take)
        tl.store(out + 2 * depth + at, sb, mask=take)
        count += tl.sum(take.to(tl.int32), 0)
    tl.store(counts + row, count)


# --- what both kernels share ------------------------------------------------------------------------------------------


@triton.jit
def _tile_of(pid, a_tiles, b_tiles, GROUP: tl.constexpr):
    # Groups of GROUP row tiles walk the columns together, so that both operands stay in the L2 cache.
    width = GROUP * b_tiles
    first = (pid // width) * GROUP
    size = min(a_tiles - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def _low(low, rows, ld, k, B: tl.constexpr):
    return tl.load(low + rows[:, None] * ld + (k * B + tl.arange(0, B))[None, :])


@triton.jit
def _item(
    low, high, slot_table, stride_r, stride_k, rows, ld, k, slot,
    B: tl.constexpr, SUB: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One operand's tile of an item; KIND: 0 base plane, 1 high plane, 2 either, by the sign of ``slot``."""
    columns = tl.arange(0, B)
    if KIND == 0:
        return _low(low, rows, ld, k, B)
    if SUB == 1:
        tile = high + slot.to(tl.int64) * (B * B)
        if KIND == 1:
            return tl.load(tile + ((rows % B) * B)[:, None] + columns[None, :])
        is_high = slot >= 0
        tile = tl.where(is_high, tile, low + k * B)
        offset = tl.where(is_high, (rows % B) * B, rows * ld)
        return tl.load(tile + offset[:, None] + columns[None, :])
    # Several blocks a tile: each row looks up its own slot, and plain blocks read as zero.
    slots = tl.load(slot_table + (rows // B) * stride_r + k * stride_k)
    offset = slots.to(tl.int64) * (B * B) + (rows % B) * B
    mask = slots >= 0
    tile = tl.load(high + offset[:, None] + columns[None, :], mask=mask[:, None] & (slot >= 0), other=0)
    if KIND == 2:
        base = tl.load(
            low + rows[:, None] * ld + (k * B + columns)[None, :], mask=(slot < 0) & (columns >= 0)[None, :], other=0
        )
        tile = tile | base
    return tile


@triton.jit
def _read(item, depth):
    """An item's block and slots. Loops over items are a stage deeper, as Triton pipelines these reads as well."""
    return tl.load(item), tl.load(item + depth), tl.load(item + 2 * depth)


@triton.jit
def _finish(value, bias, accumulate, out, pm, pn, rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    in_row = n < columns - pn * BN
    inside = (m < rows - pm * BM)[:, None] & in_row[None, :]
    if bias is not None:
        value += tl.load(bias + pn * BN + n, mask=in_row, other=0.0).to(tl.float32)[None, :]
    # 64 bits for the tile's corner only: a 64-bit address for each element would not fit the registers.
    corner = (pm * BM).to(tl.int64) * columns + pn * BN
    at = m[:, None] * columns + n[None, :]
    if accumulate is not None:
        value += tl.load(accumulate + corner + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + corner + at, value.to(out.dtype.element_ty), mask=inside)


# --- row --------------------------------------------------------------------------------------------------------------


@CachedLaunch
@triton.jit
def _gemm_row_kernel(
    a_low, a_high, a_slot, a_scale, b_low, b_high, b_slot, b_scale, bias, accumulate, out, counts, items,
    rows, columns, depth, a_ld, b_ld, a_tiles, b_tiles, a_stride_r, a_stride_k, b_stride_r, b_stride_k,
    A_HIGH: tl.constexpr, B_HIGH: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    A_SUB: tl.constexpr = (BM + B - 1) // B
    B_SUB: tl.constexpr = (BN + B - 1) // B
    pm, pn = _tile_of(tl.program_id(0), a_tiles, b_tiles, GROUP)
    # Rows past the edge read the last row again; only their stores are masked.
    m = tl.minimum(pm * BM + tl.arange(0, BM), rows - 1).to(tl.int64)
    n = tl.minimum(pn * BN + tl.arange(0, BN), columns - 1).to(tl.int64)
    a_lists = tl.cdiv(rows, A_SUB * B)
    b_lists = tl.cdiv(columns, B_SUB * B)
    a_list = (pm * BM) // (A_SUB * B)
    b_list = (pn * BN) // (B_SUB * B)
    acc = tl.zeros((BM, BN), tl.int32)
    if A_HIGH and B_HIGH:
        pair = a_lists + b_lists + a_list * b_lists + b_list
        listed = items + pair.to(tl.int64) * (3 * depth)
        for i in tl.range(0, tl.load(counts + pair), num_stages=STAGES + 1):
            k, a_at, b_at = _read(listed + i, depth)
            a = _item(a_low, a_high, a_slot, a_stride_r, a_stride_k, m, a_ld, k, a_at, B, A_SUB, 1)
            b = _item(b_low, b_high, b_slot, b_stride_r, b_stride_k, n, b_ld, k, b_at, B, B_SUB, 1)
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        acc = acc << 8
    if A_HIGH or B_HIGH:
        A_KIND: tl.constexpr = (2 if B_HIGH else 1) if A_HIGH else 0
        B_KIND: tl.constexpr = (2 if A_HIGH else 1) if B_HIGH else 0
        a_count = 0
        b_count = 0
        if A_HIGH:
            a_count = tl.load(counts + a_list)
        if B_HIGH:
            b_count = tl.load(counts + a_lists + b_list)
        # An operand without fallback blocks has no lists, and nothing may be read where they would be.
        a_first = items + (a_list if A_HIGH else a_lists + b_list).to(tl.int64) * (3 * depth)
        b_first = (
            items + (a_lists + b_list if B_HIGH else a_list).to(tl.int64) * (3 * depth) - (a_count if B_HIGH else 0)
        )
        for i in tl.range(0, a_count + b_count, num_stages=STAGES + 1):
            k, a_at, b_at = _read(tl.where(i < a_count, a_first, b_first) + i, depth)
            a = _item(a_low, a_high, a_slot, a_stride_r, a_stride_k, m, a_ld, k, a_at, B, A_SUB, A_KIND)
            b = _item(b_low, b_high, b_slot, b_stride_r, b_stride_k, n, b_ld, k, b_at, B, B_SUB, B_KIND)
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        acc = acc << 8
    a_ptrs = a_low + m[:, None] * a_ld + tl.arange(0, B)[None, :]
    b_ptrs = b_low + n[:, None] * b_ld + tl.arange(0, B)[None, :]
    for _ in tl.range(0, depth, num_stages=STAGES):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs).T, acc, out_dtype=tl.int32)
        a_ptrs += B
        b_ptrs += B
    value = acc.to(tl.float32)
    if a_scale is not None:
        value *= tl.load(a_scale + m)[:, None]
    if b_scale is not None:
        value *= tl.load(b_scale + n)[None, :]
    _finish(value, bias, accumulate, out, pm, pn, rows, columns, BM, BN)


# --- block ------------------------------------------------------------------------------------------------------------


@triton.jit
def _promote(acc, product, a_scale, b_scale, step, A_SUB: tl.constexpr, B_SUB: tl.constexpr):
    value = product.to(tl.float32)
    sa = tl.load(a_scale) * step
    sb = tl.load(b_scale)
    if A_SUB == 1 and B_SUB == 1:
        return acc + value * (sa * sb)
    if A_SUB == 1:
        return acc + value * (sa * sb)[None, :]
    if B_SUB == 1:
        return acc + value * (sa * sb)[:, None]
    return acc + (value * sa[:, None]) * sb[None, :]


@CachedLaunch
@triton.jit
def _gemm_block_kernel(
    a_low, a_high, a_slot, a_scale, b_low, b_high, b_slot, b_scale, bias, accumulate, out, counts, items,
    rows, columns, depth, a_ld, b_ld, a_tiles, b_tiles, a_stride_r, a_stride_k, b_stride_r, b_stride_k,
    a_scale_r, a_scale_k, b_scale_r, b_scale_k, step,
    A_HIGH: tl.constexpr, B_HIGH: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    A_SUB: tl.constexpr = (BM + B - 1) // B
    B_SUB: tl.constexpr = (BN + B - 1) // B
    pm, pn = _tile_of(tl.program_id(0), a_tiles, b_tiles, GROUP)
    m = tl.minimum(pm * BM + tl.arange(0, BM), rows - 1).to(tl.int64)
    n = tl.minimum(pn * BN + tl.arange(0, BN), columns - 1).to(tl.int64)
    # One scale a tile, or one a row.
    if A_SUB == 1:
        a_scales = a_scale + (pm * BM // B) * a_scale_r
    else:
        a_scales = a_scale + (m // B) * a_scale_r
    if B_SUB == 1:
        b_scales = b_scale + (pn * BN // B) * b_scale_r
    else:
        b_scales = b_scale + (n // B) * b_scale_r
    acc = tl.zeros((BM, BN), tl.float32)
    a_ptrs = a_low + m[:, None] * a_ld + tl.arange(0, B)[None, :]
    b_ptrs = b_low + n[:, None] * b_ld + tl.arange(0, B)[None, :]
    for i in tl.range(0, depth, num_stages=STAGES):
        product = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs).T, out_dtype=tl.int32)
        acc = _promote(acc, product, a_scales + i * a_scale_k, b_scales + i * b_scale_k, 1.0, A_SUB, B_SUB)
        a_ptrs += B
        b_ptrs += B
    if A_HIGH or B_HIGH:
        A_KIND: tl.constexpr = (2 if B_HIGH else 1) if A_HIGH else 0
        B_KIND: tl.constexpr = (2 if A_HIGH else 1) if B_HIGH else 0
        a_list = (pm * BM) // (A_SUB * B)
        b_list = tl.cdiv(rows, A_SUB * B) + (pn * BN) // (B_SUB * B)
        a_count = 0
        b_count = 0
        if A_HIGH:
            a_count = tl.load(counts + a_list)
        if B_HIGH:
            b_count = tl.load(counts + b_list)
        # An operand without fallback blocks has no lists, and nothing may be read where they would be.
        a_first = items + (a_list if A_HIGH else b_list).to(tl.int64) * (3 * depth)
        b_first = items + (b_list if B_HIGH else a_list).to(tl.int64) * (3 * depth) - (a_count if B_HIGH else 0)
        for i in tl.range(0, a_count + b_count, num_stages=STAGES + 1):
            k, a_at, b_at = _read(tl.where(i < a_count, a_first, b_first) + i, depth)
            a = _item(a_low, a_high, a_slot, a_stride_r, a_stride_k, m, a_ld, k, a_at, B, A_SUB, A_KIND)
            b = _item(b_low, b_high, b_slot, b_stride_r, b_stride_k, n, b_ld, k, b_at, B, B_SUB, B_KIND)
            product = tl.dot(a, b.T, out_dtype=tl.int32)
            acc = _promote(acc, product, a_scales + k * a_scale_k, b_scales + k * b_scale_k, step, A_SUB, B_SUB)
    _finish(acc, bias, accumulate, out, pm, pn, rows, columns, BM, BN)


# --- launchers --------------------------------------------------------------------------------------------------------


def gemm_row(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``row`` scaling: bit for bit what :func:`lightning_int8.kernels.reference.gemm_row` computes.

    Args:
        a: ``[R, Q]`` with ``low`` int8 ``[R, QB·B]``, each row contiguous, ``high`` int8 ``[C, B, B]`` contiguous or
            ``None``, ``slot`` int32 ``[RB, QB]`` of any strides, ``scale`` float32 ``[R]`` or ``None``; ``B`` is 32, 64
            or 128.
        b: ``[N, Q]``, likewise, with the same ``B``.
        bias: float ``[N]``.
        out_dtype: float32, bfloat16 or float16.
        accumulate: float ``[R, N]`` that is added last, in float32; it is not written.

    Returns:
        ``[R, N]`` in ``out_dtype``, contiguous.
    """
    _check(a, b)
    tile = choose("row", a.size[0], b.size[0], a.block, has_fallback(b), accumulate is not None, a.low.device)
    return launch_row(a, b, bias, out_dtype, accumulate, tile)


def gemm_block(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``block`` scaling: :func:`lightning_int8.kernels.reference.gemm_block` up to FP32 rounding.

    The FP32 sum takes the base blocks first and the fallback blocks after them. Arguments and result are as in
    :func:`gemm_row`, but both ``scale`` are float32 ``[RB, QB]``, of any strides.
    """
    _check(a, b)
    tile = choose("block", a.size[0], b.size[0], a.block, has_fallback(b), accumulate is not None, a.low.device)
    return launch_block(a, b, bias, out_dtype, accumulate, tile)


def launch_row(
    a: QuantizedMatrix, b: QuantizedMatrix, bias: Tensor | None, out_dtype: torch.dtype, accumulate: Tensor | None,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """:func:`gemm_row` with a given tile."""
    out = torch.empty(a.size[0], b.size[0], dtype=out_dtype, device=a.low.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):
        programs, args, constants = _arguments(a, b, bias, accumulate, out, tile, pairs=True)
        # Like the reference, which rounds after each multiplication and addition of the epilogue.
        _gemm_row_kernel[(programs,)](*args, **constants, enable_fp_fusion=False)
    return out


def launch_block(
    a: QuantizedMatrix, b: QuantizedMatrix, bias: Tensor | None, out_dtype: torch.dtype, accumulate: Tensor | None,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """:func:`gemm_block` with a given tile."""
    if a.scale is None or b.scale is None:
        raise ValueError("gemm_block needs the block scales of both operands.")
    out = torch.empty(a.size[0], b.size[0], dtype=out_dtype, device=a.low.device)
    if out.numel() == 0:
        return out
    scale_strides = (*a.scale.stride(), *b.scale.stride())
    with torch.cuda.device_of(out):
        programs, args, constants = _arguments(a, b, bias, accumulate, out, tile, pairs=False)
        _gemm_block_kernel[(programs,)](*args, *scale_strides, 1.0 / RESIDUAL_STEPS, **constants)
    return out


def has_fallback(a: QuantizedMatrix) -> bool:
    """Whether any block of ``a`` may have fallen back."""
    return a.high is not None and a.slot is not None and a.high.shape[0] > 0


def _check(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    if a.block != b.block or a.size[1] != b.size[1]:
        raise ValueError(
            f"the operands must agree in their contraction and block edge, but a is {a.size} in blocks of {a.block} "
            f"and b is {b.size} in blocks of {b.block}: their contraction has {a.size[1]} and {b.size[1]} elements."
        )
    if a.block not in BLOCKS:
        raise ValueError(f"block={a.block} must be one of {', '.join(map(str, BLOCKS))}.")


def _arguments(
    a: QuantizedMatrix, b: QuantizedMatrix, bias: Tensor | None, accumulate: Tensor | None, out: Tensor, tile: Tile,
    pairs: bool,
) -> tuple[int, tuple, dict]:  # fmt: skip
    """The number of programs, the arguments that both kernels share, and their constants and options."""
    depth = blocks_along(a.size[1], a.block)
    a_high, b_high = has_fallback(a), has_fallback(b)
    counts, items = _lists(a, b, a_high, b_high, depth, tile, pairs and a_high and b_high)
    a_tiles, b_tiles = blocks_along(out.shape[0], tile.rows), blocks_along(out.shape[1], tile.columns)
    args = (
        a.low, a.high if a_high else a.low, a.slot if a_high else counts, a.scale,
        b.low, b.high if b_high else b.low, b.slot if b_high else counts, b.scale,
        None if bias is None else bias.contiguous(), None if accumulate is None else accumulate.contiguous(), out,
        counts, items, *out.shape, depth, a.low.stride(0), b.low.stride(0), a_tiles, b_tiles, *_strides(a),
        *_strides(b),
    )  # fmt: skip
    constants = {
        "A_HIGH": a_high, "B_HIGH": b_high, "B": a.block, "BM": tile.rows, "BN": tile.columns, "GROUP": tile.group,
        "STAGES": tile.stages, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return a_tiles * b_tiles, args, constants


def _strides(a: QuantizedMatrix) -> tuple[int, ...]:
    return a.slot.stride() if a.slot is not None and has_fallback(a) else (0, 0)


def _lists(
    a: QuantizedMatrix, b: QuantizedMatrix, a_high: bool, b_high: bool, depth: int, tile: Tile, pairs: bool
) -> tuple[Tensor, Tensor]:
    """The lists of fallback blocks: int32 ``counts [L]`` and ``items [L, 3, depth]``, the rows ``k, a slot, b slot``.

    Lists are those of `a`'s row tiles, then of `b`'s column tiles, then of pairs in row-major order. Rows are filled up
    to their count.
    """
    if not (a_high or b_high):
        return a.low, a.low
    block = a.block
    a_sub, b_sub = blocks_along(tile.rows, block), blocks_along(tile.columns, block)
    a_lists, b_lists = blocks_along(a.size[0], a_sub * block), blocks_along(b.size[0], b_sub * block)
    number = a_lists + (b_lists if b_high else 0) + (a_lists * b_lists if pairs else 0)
    counts = torch.empty(number, dtype=torch.int32, device=a.low.device)
    items = torch.empty(number * 3 * depth, dtype=torch.int32, device=a.low.device)
    _list_kernel[(number,)](
        a.slot if a_high else counts, b.slot if b_high else counts, counts, items, depth, a_lists, b_lists,
        blocks_along(a.size[0], block), blocks_along(b.size[0], block), *_strides(a), *_strides(b),
        A_HIGH=a_high, B_HIGH=b_high, A_SUB=a_sub, B_SUB=b_sub, CHUNK=min(256, triton.next_power_of_2(depth)),
        num_warps=1,
    )  # fmt: skip
    return counts, items
