"""What both Hopper GEMMs are built from: the order of tiles, the producer and its ring of stages, products and stores.

See :mod:`lightning_int8.kernels.hopper` for how the roles work together.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def tile_at(t, tiles_m, tiles_n, GROUP: gl.constexpr):
    width = GROUP * tiles_n
    first = t // width * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + t % width % rows, t % width // rows


@gluon.jit
def part_at(t, tiles, depth, parts):
    """Tile and part number ``t``, and the part's blocks of the contraction: from one to before another.

    ``parts``: in how many the contraction is split, or ``None``. All tiles of a part follow one another, so that CTAs
    beside each other share operands in L2.
    """
    if parts is None:
        return t, 0, 0, depth
    else:
        part = t // tiles
        return t % tiles, part, part * depth // parts, (part + 1) * depth // parts


@gluon.jit
def slot_row(slot_ptr, row, rows, depth, begin, end, DEPTH: gl.constexpr):
    """One row of ``slot`` from block ``begin`` to before ``end``, -1 elsewhere and past the last row.

    The same in every warp: reducing it needs no shared memory.
    """
    layout: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0]))
    k = gl.arange(0, DEPTH, layout)
    return gl.load(slot_ptr + row * depth + k, mask=(k >= begin) & (k < end) & (row < rows), other=-1)


@gluon.jit
def count_listed(flags):
    return gl.sum(flags.to(gl.int32), axis=0)


@gluon.jit
def next_listed(flags, after, DEPTH: gl.constexpr):
    """The first flagged block past ``after``, or ``DEPTH``."""
    k = gl.arange(0, DEPTH, flags.type.layout)
    return gl.min(gl.where(flags & (k > after), k, DEPTH), axis=0)


@gluon.jit
def slot_at(slots, k, DEPTH: gl.constexpr):
    """``slots[k]``, out of registers; 0 past the end."""
    if slots is None:
        return k
    else:
        return gl.sum(gl.where(gl.arange(0, DEPTH, slots.type.layout) == k, slots, 0), axis=0)


@gluon.jit
def acquire(it, full, empty, size: gl.constexpr, STAGES: gl.constexpr):
    """Waits until the ring's next stage is free and announces ``size`` bytes for it."""
    stage = it % STAGES
    mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), size)
    return stage


@gluon.jit
def load_listed(
    flags, it, a_desc, a_slots, a_row, b_desc, b_slots, b_row, a_bufs, b_bufs, full, empty, SIDES: gl.constexpr,
    DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One stage for each flagged block of the contraction.

    An operand with ``slots`` (a row of ``slot``) comes from its high planes, ``b`` then for one side of the tile.
    """
    k = next_listed(flags, -1, DEPTH)
    a_slot, b_slot = slot_at(a_slots, k, DEPTH), slot_at(b_slots, k, DEPTH)
    while k < DEPTH:
        a_at, b_at = [a_row * BLOCK, k * BLOCK], [b_row * BLOCK, k * BLOCK]
        if a_slots is not None:
            a_at = [a_slot * BLOCK, 0]
        if b_slots is not None:
            b_at = [b_slot * BLOCK, 0]
        # What the next block needs is looked up before this one waits for its stage.
        k = next_listed(flags, k, DEPTH)
        a_slot, b_slot = slot_at(a_slots, k, DEPTH), slot_at(b_slots, k, DEPTH)
        stage = acquire(it, full, empty, (1 + SIDES) * BLOCK * BLOCK, STAGES)
        bar = full.index(stage)
        tma.async_copy_global_to_shared(a_desc, a_at, bar, a_bufs.index(stage))
        tma.async_copy_global_to_shared(b_desc, b_at, bar, b_bufs.index(2 * stage))
        if SIDES == 2:
            tma.async_copy_global_to_shared(b_desc, [b_at[0] + BLOCK, b_at[1]], bar, b_bufs.index(2 * stage + 1))
        it += 1
    return it


@gluon.jit
def producer(
    a_desc, a_high_desc, a_slot_ptr, b_desc, b_high_desc, b_slot_ptr, a_bufs, b_bufs, full, empty, tiles_m, tiles_n,
    blocks_n, depth, parts, HIGH_HIGH: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """For each tile ``high·high`` side by side, ``high·low``, ``low·high`` side by side, ``low·low``."""
    it = 0
    tiles = tiles_m * tiles_n
    for t in range(gl.program_id(0), tiles if parts is None else tiles * parts, gl.num_programs(0)):
        tile, _, begin, end = part_at(t, tiles, depth, parts)
        pm, pn = tile_at(tile, tiles_m, tiles_n, GROUP)
        if a_slot_ptr is not None:
            a_slots = slot_row(a_slot_ptr, pm, tiles_m, depth, begin, end, DEPTH)
        if b_slot_ptr is not None:
            left_slots = slot_row(b_slot_ptr, 2 * pn, blocks_n, depth, begin, end, DEPTH)
            right_slots = slot_row(b_slot_ptr, 2 * pn + 1, blocks_n, depth, begin, end, DEPTH)
        if HIGH_HIGH:
            for side in gl.static_range(2):
                b_slots = right_slots if side else left_slots
                it = load_listed(
                    (a_slots >= 0) & (b_slots >= 0), it, a_high_desc, a_slots, pm, b_high_desc, b_slots, 2 * pn + side,
                    a_bufs, b_bufs, full, empty, 1, DEPTH, BLOCK, STAGES,
                )  # fmt: skip
        if a_slot_ptr is not None:
            it = load_listed(
                a_slots >= 0, it, a_high_desc, a_slots, pm, b_desc, None, 2 * pn, a_bufs, b_bufs, full, empty, 2, DEPTH,
                BLOCK, STAGES,
            )  # fmt: skip
        if b_slot_ptr is not None:
            for side in gl.static_range(2):
                b_slots = right_slots if side else left_slots
                it = load_listed(
                    b_slots >= 0, it, a_desc, None, pm, b_high_desc, b_slots, 2 * pn + side, a_bufs, b_bufs, full,
                    empty, 1, DEPTH, BLOCK, STAGES,
                )  # fmt: skip
        for k in range(begin, end):
            stage = acquire(it, full, empty, 3 * BLOCK * BLOCK, STAGES)
            bar = full.index(stage)
            tma.async_copy_global_to_shared(a_desc, [pm * BLOCK, k * BLOCK], bar, a_bufs.index(stage))
            for half in gl.static_range(2):
                at = [(2 * pn + half) * BLOCK, k * BLOCK]
                tma.async_copy_global_to_shared(b_desc, at, bar, b_bufs.index(2 * stage + half))
            it += 1


@gluon.jit
def multiply(
    left, right, n, it, a_bufs, b_bufs, full, empty, WG: gl.constexpr, STAGES: gl.constexpr, FRESH: gl.constexpr = False
):
    """``acc += a @ bᵀ`` over the ring's next ``n`` stages, one in flight behind the one that is waited for.

    ``FRESH``: the first product replaces what the accumulators held; ``n`` is at least 1.
    """
    for k in range(n):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        a = a_bufs.index(stage).slice(64 * WG, 64)
        add = not FRESH or k > 0
        left = warpgroup_mma(a, b_bufs.index(2 * stage).permute((1, 0)), left, use_acc=add, is_async=True)
        right = warpgroup_mma(a, b_bufs.index(2 * stage + 1).permute((1, 0)), right, use_acc=add, is_async=True)
        left, right = warpgroup_mma_wait(2, deps=(left, right))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=k > 0)
        it += 1
    left, right = warpgroup_mma_wait(0, deps=(left, right))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=n > 0)
    return left, right, it


@gluon.jit
def begin_products(
    acc, it, n: gl.constexpr, a_bufs, b_bufs, full, SIDE: gl.constexpr, WG: gl.constexpr, STAGES: gl.constexpr
):
    """Issues the products of the ring's next ``n`` stages for one half of the tile's width; the stages stay taken."""
    for s in gl.static_range(n):
        stage = (it + s) % STAGES
        mbarrier.wait(full.index(stage), ((it + s) // STAGES) & 1)
        a = a_bufs.index(stage).slice(64 * WG, 64)
        acc = warpgroup_mma(a, b_bufs.index(2 * stage + SIDE).permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def multiply_half(acc, n, it, a_bufs, b_bufs, full, empty, WG: gl.constexpr, STAGES: gl.constexpr):
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
def halves(x):
    """``x`` cut into its left and right half, in registers."""
    return x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def finish(out, row, col, bias_ptr, sum_ptr, rows, cols):
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
def store_direct(out, row, col, c_ptr, bias_ptr, sum_ptr, rows, cols, CUTS: gl.constexpr):
    """Writes ``out`` at ``(row, col)`` piece by piece, so that addresses and loaded sums need few registers."""
    if CUTS > 0:
        left, right = halves(out)
        store_direct(left, row, col, c_ptr, bias_ptr, sum_ptr, rows, cols, CUTS - 1)
        middle = col + out.shape[1] // 2
        store_direct(right, row, middle, c_ptr, bias_ptr, sum_ptr, rows, cols, CUTS - 1)
    else:
        out, at, inside = finish(out, row, col, bias_ptr, sum_ptr, rows, cols)
        gl.store(c_ptr + at, out.to(c_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def store_tma(out, row, col, c_desc, c_buf):
    # The buffer is free again once TMA has read what was stored from it the time before last.
    tma.store_wait(1)
    c_buf.store(out.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [row, col], c_buf)


@gluon.jit
def store_half(out, row, col, c_ptr, c_desc, c_bufs, bias_ptr, sum_ptr, rows, cols, WG: gl.constexpr):
    """Adds bias and an existing sum to 64×128 FP32 values and writes them at ``(row, col)``."""
    if c_desc is not None:
        out, _, _ = finish(out, row, col, bias_ptr, sum_ptr, rows, cols)
        left, right = halves(out)
        store_tma(left, row, col, c_desc, c_bufs.index(2 * WG))
        store_tma(right, row, col + out.shape[1] // 2, c_desc, c_bufs.index(2 * WG + 1))
    else:
        store_direct(out, row, col, c_ptr, bias_ptr, sum_ptr, rows, cols, 2)


@gluon.jit
def load_scales(scale_ptr, start, size, LENGTH: gl.constexpr):
    """``LENGTH`` scales from ``start`` on, in few registers until they are used; ones if there are none."""
    # Not `None`, which functions of Triton 3.6 cannot return; `scaled` leaves the ones alone.
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    if scale_ptr is None:
        return gl.full((LENGTH,), 1.0, gl.float32, layout)
    else:
        at = start + gl.arange(0, LENGTH, layout)
        return gl.load(scale_ptr + at, mask=at < size, other=0)


@gluon.jit
def scaled(out, scale, scale_ptr, DIM: gl.constexpr):
    """``out`` times what :func:`load_scales` loaded, along its dimension ``DIM``."""
    if scale_ptr is None:
        return out
    else:
        layout: gl.constexpr = gl.SliceLayout(1 - DIM, out.type.layout)
        return out * gl.expand_dims(gl.convert_layout(scale, layout), 1 - DIM)


@gluon.jit
def rings(a_desc, c_desc, BLOCK: gl.constexpr, STAGES: gl.constexpr):
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
