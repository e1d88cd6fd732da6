"""The `block` GEMM on Hopper: INT32 within a block of the contraction, scaled into FP32 sums across blocks."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lightning_int8.kernels.hopper_pipeline import (
    next_listed,
    producer,
    rings,
    slot_row,
    store_half,
    tile_at,
)
from lightning_int8.kernels.launch import CachedLaunch


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
    k = next_listed(flags, -1, DEPTH)
    while k < DEPTH:
        scale = gl.load(a_scale_ptr + k) * gl.load(b_scale_ptr + k) * (1.0 / RESIDUAL_STEPS)
        k = next_listed(flags, k, DEPTH)
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
    # From registers, so that both halves' products read it once.
    rows_of_a: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    blocks_n = (cols + BLOCK - 1) // BLOCK
    it = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pm, pn = tile_at(t, tiles_m, tiles_n, GROUP)
        left = gl.zeros((64, BLOCK), gl.float32, mma)
        right = gl.zeros((64, BLOCK), gl.float32, mma)
        a_scales = a_scale_ptr + pm * depth
        left_scales = b_scale_ptr + 2 * pn * depth
        # Past the last column block any scale does: what it multiplies is not stored.
        right_scales = b_scale_ptr + min(2 * pn + 1, blocks_n - 1) * depth
        if a_slot_ptr is not None:
            flags = slot_row(a_slot_ptr, pm, tiles_m, depth, 0, depth, DEPTH) >= 0
            k = next_listed(flags, -1, DEPTH)
            while k < DEPTH:
                scale = gl.load(a_scales + k) * (1.0 / RESIDUAL_STEPS)
                left_scale, right_scale = scale * gl.load(left_scales + k), scale * gl.load(right_scales + k)
                k = next_listed(flags, k, DEPTH)
                stage = it % STAGES
                mbarrier.wait(full.index(stage), (it // STAGES) & 1)
                a = a_bufs.index(stage).slice(64 * WG, 64).load(rows_of_a)
                left = _add_scaled(left, a, b_bufs.index(2 * stage), left_scale)
                right = _add_scaled(right, a, b_bufs.index(2 * stage + 1), right_scale)
                mbarrier.arrive(empty.index(stage))
                it += 1
        if b_slot_ptr is not None:
            flags = slot_row(b_slot_ptr, 2 * pn, blocks_n, depth, 0, depth, DEPTH) >= 0
            left, it = _add_extra(
                left, flags, it, a_scales, left_scales, a_bufs, b_bufs, full, empty, RESIDUAL_STEPS, DEPTH, STAGES, WG
            )
            flags = slot_row(b_slot_ptr, 2 * pn + 1, blocks_n, depth, 0, depth, DEPTH) >= 0
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
            a = a_bufs.index(stage).slice(64 * WG, 64).load(rows_of_a)
            left = _add_scaled(left, a, b_bufs.index(2 * stage), left_factor)
            right = _add_scaled(right, a, b_bufs.index(2 * stage + 1), right_factor)
            mbarrier.arrive(empty.index(stage))
            it += 1

        row, col = pm * BLOCK + WG * 64, 2 * pn * BLOCK
        store_half(left, row, col, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
        store_half(right, row, col + BLOCK, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
    if c_desc is not None:
        tma.store_wait(0)


# Token counts vary: their divisibility must not compile a kernel anew.
@CachedLaunch
@gluon.jit(do_not_specialize=["rows", "depth"])
def block_kernel(
    a_desc, a_high_desc, a_slot_ptr, a_scale_ptr, b_desc, b_high_desc, b_slot_ptr, b_scale_ptr, bias_ptr, sum_ptr,
    c_ptr, c_desc, rows, cols, depth, RESIDUAL_STEPS: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    a_bufs, b_bufs, c_bufs, full, empty = rings(a_desc, c_desc, BLOCK, STAGES)
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
            (producer, (
                a_desc, a_high_desc, a_slot_ptr, b_desc, b_high_desc, b_slot_ptr, a_bufs, b_bufs, full, empty, tiles_m,
                tiles_n, (cols + BLOCK - 1) // BLOCK, depth, None, False, DEPTH, BLOCK, STAGES, GROUP,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
