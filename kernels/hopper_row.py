"""The `row` GEMM on Hopper: INT32 over the whole contraction, shift level after shift level, scales at the end."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from lightning_int8.kernels.hopper_pipeline import (
    begin_products,
    count_listed,
    load_scales,
    multiply,
    multiply_half,
    part_at,
    producer,
    rings,
    scaled,
    slot_row,
    store_half,
    tile_at,
)
from lightning_int8.kernels.launch import CachedLaunch


@gluon.jit
def _slots_of_a(t, a_slot_ptr, tiles_m, tiles_n, depth, parts, DEPTH: gl.constexpr, GROUP: gl.constexpr):
    tile, _, begin, end = part_at(t, tiles_m * tiles_n, depth, parts)
    pm, _ = tile_at(tile, tiles_m, tiles_n, GROUP)
    return slot_row(a_slot_ptr, pm, tiles_m, depth, begin, end, DEPTH)


@gluon.jit
def _finished(acc, row_scale, col_scale, a_scale_ptr, b_scale_ptr, parts):
    """The scaled values, or a part's integers as they are."""
    if parts is None:
        return scaled(scaled(acc.to(gl.float32), row_scale, a_scale_ptr, 0), col_scale, b_scale_ptr, 1)
    else:
        return acc


@gluon.jit
def _row_consumer(
    a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs, b_bufs, full,
    empty, tiles_m, tiles_n, rows, cols, depth, parts, DEPTH: gl.constexpr, BLOCK: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, LAG: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    blocks_n = (cols + BLOCK - 1) // BLOCK
    tiles = tiles_m * tiles_n
    last = (tiles if parts is None else tiles * parts) - 1
    if a_slot_ptr is not None:
        a_slots = _slots_of_a(gl.program_id(0), a_slot_ptr, tiles_m, tiles_n, depth, parts, DEPTH, GROUP)
    LISTED: gl.constexpr = a_slot_ptr is not None or b_slot_ptr is not None
    left = gl.zeros((64, BLOCK), gl.int32, mma)
    right = gl.zeros((64, BLOCK), gl.int32, mma)
    it = 0
    for t in range(gl.program_id(0), last + 1, gl.num_programs(0)):
        tile, part, begin, end = part_at(t, tiles, depth, parts)
        pm, pn = tile_at(tile, tiles_m, tiles_n, GROUP)
        if LISTED:
            left = gl.zeros((64, BLOCK), gl.int32, mma)
            right = gl.zeros((64, BLOCK), gl.int32, mma)
        if a_slot_ptr is not None:
            a_flags = a_slots >= 0
        if b_slot_ptr is not None:
            left_flags = slot_row(b_slot_ptr, 2 * pn, blocks_n, depth, begin, end, DEPTH) >= 0
            right_flags = slot_row(b_slot_ptr, 2 * pn + 1, blocks_n, depth, begin, end, DEPTH) >= 0
            left_n, right_n = count_listed(left_flags), count_listed(right_flags)
        if a_slot_ptr is not None and b_slot_ptr is not None:
            n, m = count_listed(a_flags & left_flags), count_listed(a_flags & right_flags)
            left, it = multiply_half(left, n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
            right, it = multiply_half(right, m, it, a_bufs, b_bufs, full, empty, WG, STAGES)
            left, right = left << 8, right << 8
        if a_slot_ptr is not None:
            n = count_listed(a_flags)
            left, right, it = multiply(left, right, n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
        if b_slot_ptr is not None:
            left, it = multiply_half(left, left_n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
            right, it = multiply_half(right, right_n, it, a_bufs, b_bufs, full, empty, WG, STAGES)
        if LISTED:
            left, right = left << 8, right << 8
        row, col = pm * BLOCK + WG * 64, 2 * pn * BLOCK
        out_ptr = c_ptr if parts is None else c_ptr + part.to(gl.int64) * rows * cols
        if a_slot_ptr is not None:
            # Of the next tile, so that it can begin at once.
            ahead = min(t + gl.num_programs(0), last)
            a_slots = _slots_of_a(ahead, a_slot_ptr, tiles_m, tiles_n, depth, parts, DEPTH, GROUP)
        row_scale = load_scales(a_scale_ptr, row, rows, 64)
        left_scale = load_scales(b_scale_ptr, col, cols, BLOCK)
        right_scale = load_scales(b_scale_ptr, col + BLOCK, cols, BLOCK)
        n = end - begin - LAG
        left, right, it = multiply(left, right, n, it, a_bufs, b_bufs, full, empty, WG, STAGES, not LISTED)
        # The right half's last products run while the left half is scaled and stored.
        left = begin_products(left, it, LAG, a_bufs, b_bufs, full, 0, WG, STAGES)
        left = warpgroup_mma_wait(0, deps=(left,))
        right = begin_products(right, it, LAG, a_bufs, b_bufs, full, 1, WG, STAGES)
        out = _finished(left, row_scale, left_scale, a_scale_ptr, b_scale_ptr, parts)
        store_half(out, row, col, out_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
        right = warpgroup_mma_wait(0, deps=(right,))
        for s in gl.static_range(LAG):
            mbarrier.arrive(empty.index((it + s) % STAGES))
        it += LAG
        out = _finished(right, row_scale, right_scale, a_scale_ptr, b_scale_ptr, parts)
        store_half(out, row, col + BLOCK, out_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG)
    if c_desc is not None:
        tma.store_wait(0)


# Token counts vary: their divisibility must not compile a kernel anew.
@CachedLaunch
@gluon.jit(do_not_specialize=["rows", "depth", "parts"])
def row_kernel(
    a_desc, a_high_desc, a_slot_ptr, a_scale_ptr, b_desc, b_high_desc, b_slot_ptr, b_scale_ptr, bias_ptr, sum_ptr,
    c_ptr, c_desc, rows, cols, depth, parts, DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, LAG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    a_bufs, b_bufs, c_bufs, full, empty = rings(a_desc, c_desc, BLOCK, STAGES)
    tiles_m, tiles_n = (rows + BLOCK - 1) // BLOCK, (cols + 2 * BLOCK - 1) // (2 * BLOCK)
    HIGH_HIGH: gl.constexpr = a_slot_ptr is not None and b_slot_ptr is not None
    gl.warp_specialize(
        [
            (_row_consumer, (
                a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs,
                b_bufs, full, empty, tiles_m, tiles_n, rows, cols, depth, parts, DEPTH, BLOCK, STAGES, GROUP, LAG, 0,
            )),
            (_row_consumer, (
                a_slot_ptr, b_slot_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sum_ptr, c_ptr, c_desc, c_bufs, a_bufs,
                b_bufs, full, empty, tiles_m, tiles_n, rows, cols, depth, parts, DEPTH, BLOCK, STAGES, GROUP, LAG, 1,
            )),
            (producer, (
                a_desc, a_high_desc, a_slot_ptr, b_desc, b_high_desc, b_slot_ptr, a_bufs, b_bufs, full, empty, tiles_m,
                tiles_n, (cols + BLOCK - 1) // BLOCK, depth, parts, HIGH_HIGH, DEPTH, BLOCK, STAGES, GROUP,
            )),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
