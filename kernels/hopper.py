"""The GEMMs on Hopper (sm_90), in Gluon: persistent, warp-specialized, TMA and `wgmma`.

One CTA per SM walks over output tiles of 128×256. Its 9 warps have three roles:

- the *producer*, one warp, copies 128×128 blocks of the operands with TMA into a ring of shared-memory stages, each one
  block of ``a`` and two of ``b`` (48 KiB), and signals each stage's ``full`` barrier;
- two *consumer* warpgroups, 64 rows of the tile each, multiply stage after stage, keep one stage's ``wgmma`` in flight
  behind the one they wait for, and signal the ``empty`` barrier of the stage before it.

`row`. A consumer keeps its 64×256 sums in INT32 registers over the whole contraction. The shift levels follow one
another in Horner form, so that one accumulator is enough: all ``high·high`` pairs, ``<< 8``, all ``high·low`` and
``low·high`` pairs, ``<< 8``, all ``low·low`` pairs. ``a``'s fallback blocks concern the whole width of the tile;
``b``'s concern one of its two 128-column halves, and are multiplied for that half alone. Nobody prepares lists of these
blocks: the producer searches the tile's rows of ``slot`` for the next fallback block while the ring is full, and the
consumers only need to know how many stages each level has, which one masked sum says.

`block`. Sums are FP32, and each block's INT32 product is scaled into them. On Hopper that costs about as much as the
product itself, so a consumer multiplies 64×128 at a time and scales it while the other consumer's product runs.

The quantize ops of this backend are the portable ones.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightning_int8.kernels import portable
from lightning_int8.kernels.planes import RESIDUAL_STEPS, QuantizedMatrix, blocks_along
from lightning_int8.kernels.portable import quantize_block, quantize_row, quantize_row_gradient

__all__ = ["gemm_block", "gemm_row", "quantize_block", "quantize_row", "quantize_row_gradient"]

# The edge of a fallback block; this backend has no other.
BLOCK = 128
TILE_M, TILE_N = BLOCK, 2 * BLOCK
STAGES = 4
# Tiles are visited in groups of this many rows of tiles, so that CTAs running at a time share operands in L2: without
# and with fallback blocks.
GROUPS = (8, 16)
# Registers per thread of the second consumer and the producer; the first consumer gets the rest, as many as the second.
REGISTERS = (232, 32)


@gluon.jit
def _tile(t, tiles_m, tiles_n, GROUP: gl.constexpr):
    width = GROUP * tiles_n
    first = t // width * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + t % width % rows, t % width // rows


@gluon.jit
def _slot_row(slot_ptr, row, rows, depth, DEPTH: gl.constexpr):
    """One row of ``slot`` (-1 past the last), the same in every warp: reducing it needs no shared memory."""
    k = gl.arange(0, DEPTH, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    return gl.load(slot_ptr + row * depth + k, mask=(k < depth) & (row < rows), other=-1)


@gluon.jit
def _count(flags):
    return gl.sum(flags.to(gl.int32), axis=0)


@gluon.jit
def _next(flags, after, DEPTH: gl.constexpr):
    """The first flagged block past ``after``, or ``DEPTH``."""
    k = gl.arange(0, DEPTH, flags.type.layout)
    return gl.min(gl.where(flags & (k > after), k, DEPTH), axis=0)


@gluon.jit
def _slot(slots, k, DEPTH: gl.constexpr):
    if slots is None:
        return k
    else:
        return gl.load(slots + k, mask=k < DEPTH, other=0)


@gluon.jit
def _acquire(it, full, empty, size: gl.constexpr, STAGES: gl.constexpr):
    """Waits until the ring's next stage is free and announces ``size`` bytes for it."""
    stage = it % STAGES
    mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), size)
    return stage


@gluon.jit
def _load_listed(
    flags, it, a_desc, a_slots, a_row, b_desc, b_slots, b_row, a_bufs, b_bufs, full, empty, SIDES: gl.constexpr,
    DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One stage for each flagged block of the contraction.

    An operand with ``slots`` (a row of ``slot``) comes from its high planes, ``b`` then for one side of the tile.
    """
    k = _next(flags, -1, DEPTH)
    a_slot, b_slot = _slot(a_slots, k, DEPTH), _slot(b_slots, k, DEPTH)
    while k < DEPTH:
        a_at, b_at = [a_row * BLOCK, k * BLOCK], [b_row * BLOCK, k * BLOCK]
        if a_slots is not None:
            a_at = [a_slot * BLOCK, 0]
        if b_slots is not None:
            b_at = [b_slot * BLOCK, 0]
        # What the next block needs is looked up before this one waits for its stage.
        k = _next(flags, k, DEPTH)
        a_slot, b_slot = _slot(a_slots, k, DEPTH), _slot(b_slots, k, DEPTH)
        stage = _acquire(it, full, empty, (1 + SIDES) * BLOCK * BLOCK, STAGES)
        bar = full.index(stage)
        tma.async_copy_global_to_shared(a_desc, a_at, bar, a_bufs.index(stage))
        tma.async_copy_global_to_shared(b_desc, b_at, bar, b_bufs.index(2 * stage))
        if SIDES == 2:
            tma.async_copy_global_to_shared(b_desc, [b_at[0] + BLOCK, b_at[1]], bar, b_bufs.index(2 * stage + 1))
        it += 1
    return it


@gluon.jit
def _producer(
    a_desc, a_high_desc, a_slot_ptr, b_desc, b_high_desc, b_slot_ptr, a_bufs, b_bufs, full, empty, tiles_m, tiles_n,
    blocks_n, depth, HIGH_HIGH: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """For each tile ``high·high`` side by side, ``high·low``, ``low·high`` side by side, ``low·low``."""
    it = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pm, pn = _tile(t, tiles_m, tiles_n, GROUP)
        a_slots = None
        if a_slot_ptr is not None:
            a_slots = a_slot_ptr + pm * depth
            a_flags = _slot_row(a_slot_ptr, pm, tiles_m, depth, DEPTH) >= 0
        if HIGH_HIGH:
            for side in range(2):
                row = 2 * pn + side
                flags = a_flags & (_slot_row(b_slot_ptr, row, blocks_n, depth, DEPTH) >= 0)
                it = _load_listed(
                    flags, it, a_high_desc, a_slots, pm, b_high_desc, b_slot_ptr + row * depth, row, a_bufs, b_bufs,
                    full, empty, 1, DEPTH, BLOCK, STAGES,
                )  # fmt: skip
        if a_slot_ptr is not None:
            it = _load_listed(
                a_flags, it, a_high_desc, a_slots, pm, b_desc, None, 2 * pn, a_bufs, b_bufs, full, empty, 2, DEPTH,
                BLOCK, STAGES,
            )  # fmt: skip
        if b_slot_ptr is not None:
            for side in range(2):
                row = 2 * pn + side
                flags = _slot_row(b_slot_ptr, row, blocks_n, depth, DEPTH) >= 0
                it = _load_listed(
                    flags, it, a_desc, None, pm, b_high_desc, b_slot_ptr + row * depth, row, a_bufs, b_bufs, full,
                    empty, 1, DEPTH, BLOCK, STAGES,
                )  # fmt: skip
        for k in range(depth):
            stage = _acquire(it, full, empty, 3 * BLOCK * BLOCK, STAGES)
            bar = full.index(stage)
            tma.async_copy_global_to_shared(a_desc, [pm * BLOCK, k * BLOCK], bar, a_bufs.index(stage))
            for half in gl.static_range(2):
                at = [(2 * pn + half) * BLOCK, k * BLOCK]
                tma.async_copy_global_to_shared(b_desc, at, bar, b_bufs.index(2 * stage + half))
            it += 1


@gluon.jit
def _multiply(left, right, n, it, a_bufs, b_bufs, full, empty, WG: gl.constexpr, STAGES: gl.constexpr):
    """``acc += a @ bᵀ`` over the ring's next ``n`` stages, one in flight behind the one that is waited for."""
    for k in range(n):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        a = a_bufs.index(stage).slice(64 * WG, 64)
        left = warpgroup_mma(a, b_bufs.index(2 * stage).permute((1, 0)), left, is_async=True)
        right = warpgroup_mma(a, b_bufs.index(2 * stage + 1).permute((1, 0)), right, is_async=True)
        left, right = warpgroup_mma_wait(2, deps=(left, right))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=k > 0)
        it += 1
    left, right = warpgroup_mma_wait(0, deps=(left, right))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=n > 0)
    return left, right, it


@gluon.jit
def _multiply_half(acc, n, it, a_bufs, b_bufs, full, empty, WG: gl.constexpr, STAGES: gl.constexpr):
    """The same for one half of the tile's width."""
    for k in range(n):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        a = a_bufs.index(stage).slice(64 * WG, 64)
        acc = warpgroup_mma(a, b_bufs.index(2 * stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=k > 0)
        it += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=n > 0)
    return acc, it


@gluon.jit
def _halves(x):
    """``x`` cut into its left and right half, in registers."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _finish(out, row, col, bias_ptr, sum_ptr, rows, cols):
    """Adds bias and an existing sum; returns also where the values go and which of them are inside the matrix."""
    r = row + gl.arange(0, out.shape[0], gl.SliceLayout(1, out.type.layout))
    c = col + gl.arange(0, out.shape[1], gl.SliceLayout(0, out.type.layout))
    at = r.to(gl.int64)[:, None] * cols + c[None, :]
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    if bias_ptr is not None:
        out += gl.load(bias_ptr + c, mask=c < cols, other=0).to(gl.float32)[None, :]
    if sum_ptr is not None:
        out += gl.load(sum_ptr + at, mask=inside, other=0).to(gl.float32)
    return out, at, inside


@gluon.jit
def _store_direct(out, row, col, c_ptr, bias_ptr, sum_ptr, rows, cols, CUTS: gl.constexpr):
    """Writes ``out`` at ``(row, col)`` piece by piece, so that addresses and loaded sums need few registers."""
    if CUTS > 0:
        left, right = _halves(out)
        _store_direct(left, row, col, c_ptr, bias_ptr, sum_ptr, rows, cols, CUTS - 1)
        middle = col + out.shape[1] // 2
        _store_direct(right, row, middle, c_ptr, bias_ptr, sum_ptr, rows, cols, CUTS - 1)
    else:
        out, at, inside = _finish(out, row, col, bias_ptr, sum_ptr, rows, cols)
        gl.store(c_ptr + at, out.to(c_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _store_tma(out, row, col, c_desc, c_buf):
    # The buffer is free again once TMA has read what was stored from it the time before last.
    tma.store_wait(1)
    c_buf.store(out.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [row, col], c_buf)


@gluon.jit
def _store_half(out, row, col, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG: gl.constexpr):
    """Adds bias and an existing sum to 64×128 FP32 values and writes them at ``(row, col)``."""
    if c_desc is not None:
        out, _, _ = _finish(out, row, col, bias_ptr, sum_ptr, rows, cols)
        left, right = _halves(out)
        _store_tma(left, row, col, c_desc, c_bufs.index(2 * WG))
        _store_tma(right, row, col + out.shape[1] // 2, c_desc, c_bufs.index(2 * WG + 1))
    else:
        _store_direct(out, row, col, c_ptr, bias_ptr, sum_ptr, rows, cols, 2)


@gluon.jit
def _load_scales(scale_ptr, start, size, like, DIM: gl.constexpr):
    """``like.shape[DIM]`` scales from ``start`` on, in that dimension's layout; ones if there are none."""
    layout: gl.constexpr = gl.SliceLayout(1 - DIM, like.type.layout)
    if scale_ptr is None:
        return gl.full((like.shape[DIM],), 1.0, gl.float32, layout)
    else:
        at = start + gl.arange(0, like.shape[DIM], layout)
        return gl.load(scale_ptr + at, mask=at < size, other=0)


@gluon.jit
def _row_consumer(
    a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs, b_bufs, full,
    empty, tiles_m, tiles_n, rows, cols, depth, DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    blocks_n = (cols + BLOCK - 1) // BLOCK
    tiles = tiles_m * tiles_n
    if a_slot_ptr is not None:
        first, _ = _tile(gl.program_id(0), tiles_m, tiles_n, GROUP)
        a_slots = _slot_row(a_slot_ptr, first, tiles_m, depth, DEPTH)
    it = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        pm, pn = _tile(t, tiles_m, tiles_n, GROUP)
        left = gl.zeros((64, BLOCK), gl.int32, mma)
        right = gl.zeros((64, BLOCK), gl.int32, mma)
        if a_slot_ptr is not None:
            a_flags = a_slots >= 0
        if b_slot_ptr is not None:
            left_flags = _slot_row(b_slot_ptr, 2 * pn, blocks_n, depth, DEPTH) >= 0
            right_flags = _slot_row(b_slot_ptr, 2 * pn + 1, blocks_n, depth, DEPTH) >= 0
            left_n, right_n = _count(left_flags), _count(right_flags)
        if a_slot_ptr is not None and b_slot_ptr is not None:
            n, m = _count(a_flags & left_flags), _count(a_flags & right_flags)
            left, it = _multiply_half(left, n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
            right, it = _multiply_half(right, m, it, a_bufs, b_bufs, full, empty, WG, STAGES)
            left, right = left << 8, right << 8
        if a_slot_ptr is not None:
            n = _count(a_flags)
            left, right, it = _multiply(left, right, n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
        if b_slot_ptr is not None:
            left, it = _multiply_half(left, left_n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
            right, it = _multiply_half(right, right_n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
        if a_slot_ptr is not None or b_slot_ptr is not None:
            left, right = left << 8, right << 8
        row, col = pm * BLOCK + WG * 64, 2 * pn * BLOCK
        if a_slot_ptr is not None:
            # Of the next tile, so that it can begin at once.
            next_pm, _ = _tile(min(t + gl.num_programs(0), tiles - 1), tiles_m, tiles_n, GROUP)
            a_slots = _slot_row(a_slot_ptr, next_pm, tiles_m, depth, DEPTH)
        row_scale = _load_scales(a_scale_ptr, row, rows, left, 0)
        left, right, it = _multiply(left, right, depth, it, a_bufs, b_bufs, full, empty, WG, STAGES)
        left_scale = _load_scales(b_scale_ptr, col, cols, left, 1)
        right_scale = _load_scales(b_scale_ptr, col + BLOCK, cols, right, 1)
        out = left.to(gl.float32) * row_scale[:, None] * left_scale[None, :]
        _store_half(out, row, col, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
        out = right.to(gl.float32) * row_scale[:, None] * right_scale[None, :]
        _store_half(out, row, col + BLOCK, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
    if c_desc is not None:
        tma.store_wait(0)


@gluon.jit
def _rings(a_desc, c_desc, BLOCK: gl.constexpr, STAGES: gl.constexpr):
    a_bufs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK, BLOCK], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.int8, [2 * STAGES, BLOCK, BLOCK], a_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    c_bufs = a_bufs
    if c_desc is not None:
        c_bufs = gl.allocate_shared_memory(c_desc.dtype, [4, 64, BLOCK // 2], c_desc.layout)
    return a_bufs, b_bufs, c_bufs, full, empty


# Token counts vary: their divisibility must not compile a kernel anew.
@gluon.jit(do_not_specialize=["rows", "depth"])
def _row_kernel(
    a_desc, a_high_desc, a_slot_ptr, a_scale_ptr, b_desc, b_high_desc, b_slot_ptr, b_scale_ptr, bias_ptr, sum_ptr,
    c_ptr, c_desc, rows, cols, depth, DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    a_bufs, b_bufs, c_bufs, full, empty = _rings(a_desc, c_desc, BLOCK, STAGES)
    tiles_m, tiles_n = (rows + BLOCK - 1) // BLOCK, (cols + 2 * BLOCK - 1) // (2 * BLOCK)
    HIGH_HIGH: gl.constexpr = a_slot_ptr is not None and b_slot_ptr is not None
    gl.warp_specialize(
        [
            (_row_consumer, (
                a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs,
                b_bufs, full, empty, tiles_m, tiles_n, rows, cols, depth, DEPTH, BLOCK, STAGES, GROUP, 0,
            )),
            (_row_consumer, (
                a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs,
                b_bufs, full, empty, tiles_m, tiles_n, rows, cols, depth, DEPTH, BLOCK, STAGES, GROUP, 1,
            )),
            (_producer, (
                a_desc, a_high_desc, a_slot_ptr, b_desc, b_high_desc, b_slot_ptr, a_bufs, b_bufs, full, empty, tiles_m,
                tiles_n, (cols + BLOCK - 1) // BLOCK, depth, HIGH_HIGH, DEPTH, BLOCK, STAGES, GROUP,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


# --- block scaling ----------------------------------------------------------------------------------------------------


@gluon.jit
def _add_scaled(acc, a, b, scale):
    """``acc + scale·(a @ bᵀ)``; the other consumer's product runs during the conversion."""
    # Not `gl.zeros`: Triton 3.6 cannot hand a layout to a function.
    product = gl.full(acc.shape, 0, gl.int32, acc.type.layout)
    product = warpgroup_mma(a, b.permute((1, 0)), product, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=(product,))
    return acc + product.to(gl.float32) * scale


@gluon.jit
def _add_extra(
    acc, flags, it, a_scale_ptr, b_scale_ptr, a_bufs, b_bufs, full, empty, RESIDUAL_STEPS: gl.constexpr,
    DEPTH: gl.constexpr, STAGES: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """Adds the products of the flagged blocks' residuals to one half of the tile's width."""
    k = _next(flags, -1, DEPTH)
    while k < DEPTH:
        scale = gl.load(a_scale_ptr + k) * gl.load(b_scale_ptr + k) * (1.0 / RESIDUAL_STEPS)
        k = _next(flags, k, DEPTH)
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        acc = _add_scaled(acc, a_bufs.index(stage).slice(64 * WG, 64), b_bufs.index(2 * stage), scale)
        mbarrier.arrive(empty.index(stage))
        it += 1
    return acc, it


@gluon.jit
def _block_consumer(
    a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs, b_bufs, full,
    empty, tiles_m, tiles_n, rows, cols, depth, RESIDUAL_STEPS: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    blocks_n = (cols + BLOCK - 1) // BLOCK
    it = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pm, pn = _tile(t, tiles_m, tiles_n, GROUP)
        left = gl.zeros((64, BLOCK), gl.float32, mma)
        right = gl.zeros((64, BLOCK), gl.float32, mma)
        a_scales = a_scale_ptr + pm * depth
        left_scales = b_scale_ptr + 2 * pn * depth
        # Past the last column block any scale does: what it multiplies is not stored.
        right_scales = b_scale_ptr + min(2 * pn + 1, blocks_n - 1) * depth
        if a_slot_ptr is not None:
            flags = _slot_row(a_slot_ptr, pm, tiles_m, depth, DEPTH) >= 0
            k = _next(flags, -1, DEPTH)
            while k < DEPTH:
                scale = gl.load(a_scales + k) * (1.0 / RESIDUAL_STEPS)
                left_scale, right_scale = scale * gl.load(left_scales + k), scale * gl.load(right_scales + k)
                k = _next(flags, k, DEPTH)
                stage = it % STAGES
                mbarrier.wait(full.index(stage), (it // STAGES) & 1)
                a = a_bufs.index(stage).slice(64 * WG, 64)
                left = _add_scaled(left, a, b_bufs.index(2 * stage), left_scale)
                right = _add_scaled(right, a, b_bufs.index(2 * stage + 1), right_scale)
                mbarrier.arrive(empty.index(stage))
                it += 1
        if b_slot_ptr is not None:
            flags = _slot_row(b_slot_ptr, 2 * pn, blocks_n, depth, DEPTH) >= 0
            left, it = _add_extra(
                left, flags, it, a_scales, left_scales, a_bufs, b_bufs, full, empty, RESIDUAL_STEPS, DEPTH, STAGES, WG
            )
            flags = _slot_row(b_slot_ptr, 2 * pn + 1, blocks_n, depth, DEPTH) >= 0
            right, it = _add_extra(
                right, flags, it, a_scales, right_scales, a_bufs, b_bufs, full, empty, RESIDUAL_STEPS, DEPTH, STAGES, WG
            )
        a_scale, left_scale, right_scale = gl.load(a_scales), gl.load(left_scales), gl.load(right_scales)
        for k in range(depth):
            left_factor, right_factor = a_scale * left_scale, a_scale * right_scale
            # Loaded a block ahead of its use.
            ahead = min(k + 1, depth - 1)
            a_scale = gl.load(a_scales + ahead)
            left_scale, right_scale = gl.load(left_scales + ahead), gl.load(right_scales + ahead)
            stage = it % STAGES
            mbarrier.wait(full.index(stage), (it // STAGES) & 1)
            a = a_bufs.index(stage).slice(64 * WG, 64)
            left = _add_scaled(left, a, b_bufs.index(2 * stage), left_factor)
            right = _add_scaled(right, a, b_bufs.index(2 * stage + 1), right_factor)
            mbarrier.arrive(empty.index(stage))
            it += 1

        row, col = pm * BLOCK + WG * 64, 2 * pn * BLOCK
        _store_half(left, row, col, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
        _store_half(right, row, col + BLOCK, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
    if c_desc is not None:
        tma.store_wait(0)


# Token counts vary: their divisibility must not compile a kernel anew.
@gluon.jit(do_not_specialize=["rows", "depth"])
def _block_kernel(
    a_desc, a_high_desc, a_slot_ptr, a_scale_ptr, b_desc, b_high_desc, b_slot_ptr, b_scale_ptr, bias_ptr, sum_ptr,
    c_ptr, c_desc, rows, cols, depth, RESIDUAL_STEPS: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    a_bufs, b_bufs, c_bufs, full, empty = _rings(a_desc, c_desc, BLOCK, STAGES)
    tiles_m, tiles_n = (rows + BLOCK - 1) // BLOCK, (cols + 2 * BLOCK - 1) // (2 * BLOCK)
    gl.warp_specialize(
        [
            (_block_consumer, (
                a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs,
                b_bufs, full, empty, tiles_m, tiles_n, rows, cols, depth, RESIDUAL_STEPS, DEPTH, BLOCK, STAGES, GROUP,
                0,
            )),
            (_block_consumer, (
                a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs,
                b_bufs, full, empty, tiles_m, tiles_n, rows, cols, depth, RESIDUAL_STEPS, DEPTH, BLOCK, STAGES, GROUP,
                1,
            )),
            (_producer, (
                a_desc, a_high_desc, a_slot_ptr, b_desc, b_high_desc, b_slot_ptr, a_bufs, b_bufs, full, empty, tiles_m,
                tiles_n, (cols + BLOCK - 1) // BLOCK, depth, False, DEPTH, BLOCK, STAGES, GROUP,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip


# --- launchers --------------------------------------------------------------------------------------------------------


def gemm_row(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``row`` scaling: see :func:`lightning_int8.kernels.reference.gemm_row`, of which it is bit-exact.

    Blocks of 128 only; other sizes go to the portable kernel. Operands are contiguous and 16-byte aligned.
    """
    if a.block != BLOCK or b.block != BLOCK:
        return portable.gemm_row(a, b, bias, out_dtype, accumulate)
    rows, cols, depth = a.size[0], b.size[0], blocks_along(a.size[1], BLOCK)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.low.device)
    if out.numel() == 0:
        return out
    _row_kernel[_grid(out)](
        *_operand(a), *_operand(b), bias, accumulate, out, _output(out, accumulate), rows, cols, depth,
        DEPTH=_lanes(depth), BLOCK=BLOCK, STAGES=STAGES, GROUP=_group(a, b), REGISTERS=REGISTERS, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def gemm_block(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``block`` scaling: see :func:`lightning_int8.kernels.reference.gemm_block`.

    Within float32 rounding of it: the scales are multiplied with each other first, and added by fused multiply-add.
    Blocks of 128 only; other sizes go to the portable kernel. Operands are contiguous and 16-byte aligned.
    """
    if a.block != BLOCK or b.block != BLOCK:
        return portable.gemm_block(a, b, bias, out_dtype, accumulate)
    if a.scale is None or b.scale is None:
        raise ValueError("gemm_block needs the block scales of both operands.")
    rows, cols, depth = a.size[0], b.size[0], blocks_along(a.size[1], BLOCK)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.low.device)
    if out.numel() == 0:
        return out
    _block_kernel[_grid(out)](
        *_operand(a), *_operand(b), bias, accumulate, out, _output(out, accumulate), rows, cols, depth,
        RESIDUAL_STEPS=RESIDUAL_STEPS, DEPTH=_lanes(depth), BLOCK=BLOCK, STAGES=STAGES, GROUP=_group(a, b),
        REGISTERS=REGISTERS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _operand(a: QuantizedMatrix) -> tuple[TensorDescriptor, TensorDescriptor | None, Tensor | None, Tensor | None]:
    low = TensorDescriptor.from_tensor(a.low, [BLOCK, BLOCK], _layout(torch.int8))
    scale = None if a.scale is None else a.scale.contiguous()
    if a.high is None or a.slot is None or a.high.shape[0] == 0:
        return low, None, None, scale
    high = TensorDescriptor.from_tensor(a.high.view(-1, BLOCK), [BLOCK, BLOCK], _layout(torch.int8))
    return low, high, a.slot.contiguous(), scale


def _group(a: QuantizedMatrix, b: QuantizedMatrix) -> int:
    return GROUPS[a.slot is not None or b.slot is not None]


def _lanes(depth: int) -> int:
    """The width of the vector that holds one row of ``slot``; from 128 on, so that few kernels are compiled."""
    return max(128, triton.next_power_of_2(depth))


def _output(out: Tensor, accumulate: Tensor | None) -> TensorDescriptor | None:
    """How TMA writes the output, or ``None`` where threads do.

    That is: 4-byte outputs, whose sectors are whole either way; row strides that TMA cannot take; and where threads
    read an existing sum anyway.
    """
    if out.element_size() != 2 or out.shape[1] % 8 or accumulate is not None:
        return None
    return TensorDescriptor.from_tensor(out, [64, BLOCK // 2], _layout(out.dtype))


@functools.cache
def _layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK] if dtype == torch.int8 else [64, BLOCK // 2], kind)


def _grid(out: Tensor) -> tuple[int]:
    tiles = triton.cdiv(out.shape[0], TILE_M) * triton.cdiv(out.shape[1], TILE_N)
    return (min(tiles, _processors(out.device.index)),)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
