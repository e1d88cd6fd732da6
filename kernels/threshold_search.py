"""The AbsMax that fallback blocks exceed, found by each program for itself from the AbsMax of all blocks.

Those lie in L2. To count in each program costs less than a launch that does it once; so does looking for the threshold
when a state is not seeded yet or more blocks exceed it than have room, as long as the counts stay in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)
# At least the threads of any launch of these kernels.
THREADS = tl.constexpr(1024)


@triton.jit
def load_blocks(block_amax, start, total, CHUNK: tl.constexpr):
    """AbsMax of ``CHUNK`` blocks as bit patterns; -1 (a NaN) past the end and for blocks with NaN or an infinity."""
    index = start + tl.arange(0, CHUNK)
    bits = tl.load(block_amax + index, mask=index < total, other=-1)
    return tl.where(bits < INFINITY_BITS, bits, -1)


@triton.jit
def _fold(counted):
    """Counts of bools ``[CHUNK]``, added up within each thread: ``[THREADS]``, or as many as there are."""
    if counted.shape[0] <= THREADS:
        return counted.to(tl.int32)
    else:
        return tl.sum(tl.reshape(counted.to(tl.int32), [counted.shape[0] // THREADS, THREADS]), 0)


@triton.jit
def _count_above(blocks, block_amax, total, end, threshold, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """How many blocks before ``end`` exceed the threshold, and how many of all do."""
    over = blocks.to(tl.float32, bitcast=True) > threshold
    before = _fold(over & (tl.arange(0, CHUNK) < end))
    above = _fold(over)
    if not WHOLE:
        for start in range(CHUNK, total, CHUNK):
            over = load_blocks(block_amax, start, total, CHUNK).to(tl.float32, bitcast=True) > threshold
            before += _fold(over & (start + tl.arange(0, CHUNK) < end))
            above += _fold(over)
    # Both in one reduction, whose barriers are most of its time.
    both = tl.sum((before.to(tl.int64) << 32) + above, 0)
    return (both >> 32).to(tl.int32), both.to(tl.int32)


@triton.jit
def _count_reaching(blocks, block_amax, total, bound, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """How many bit patterns are ``bound`` or more."""
    count = _fold(blocks >= bound)
    if not WHOLE:
        for start in range(CHUNK, total, CHUNK):
            count += _fold(load_blocks(block_amax, start, total, CHUNK) >= bound)
    return tl.sum(count, 0)


@triton.jit
def _kth_largest(blocks, block_amax, total, k, bound, CHUNK: tl.constexpr, WHOLE: tl.constexpr):
    """The ``k+1``-th largest AbsMax, known to be at least ``bound``, or 0 when ``k`` covers all.

    Bisection of bit patterns. Those of 16-bit elements differ in few bits, and of others few lie close to the one that
    is looked for: 6 to 12 counts above a threshold that too many exceed, 14 to 19 without one.
    """
    ones = tl.reduce_or(tl.maximum(blocks, 0), 0)
    largest = tl.max(blocks, 0)
    if not WHOLE:
        for start in range(CHUNK, total, CHUNK):
            more = load_blocks(block_amax, start, total, CHUNK)
            ones |= tl.reduce_or(tl.maximum(more, 0), 0)
            largest = tl.maximum(largest, tl.max(more, 0))
    # All patterns are multiples of `step`; with one of 2^22 at most, nothing below overflows.
    step = tl.minimum(ones & -ones, 1 << 22)
    # More than `k` patterns reach `low`, unless it is 0, and no more than `k` reach `high`.
    low = bound.to(tl.int32, bitcast=True) & -step
    high = (largest & -step) + step
    reaching = tl.full([], 0, tl.int32)
    while (high - low > step) & (reaching != k + 1):
        middle = low + (((high - low) >> 1) & -step)
        count = _count_reaching(blocks, block_amax, total, middle, CHUNK, WHOLE)
        low = tl.where(count > k, middle, low)
        high = tl.where(count > k, high, middle)
        reaching = tl.where(count > k, count, reaching)
    # The least of those that reach `low`.
    found = tl.min(tl.where(blocks >= low, blocks, 0x7FFFFFFF), 0)
    if not WHOLE:
        for start in range(CHUNK, total, CHUNK):
            more = load_blocks(block_amax, start, total, CHUNK)
            found = tl.minimum(found, tl.min(tl.where(more >= low, more, 0x7FFFFFFF), 0))
    return tl.where(low > 0, found, 0).to(tl.float32, bitcast=True)


@triton.jit
def find_threshold(
    block_amax,
    total,
    before_end,
    state,
    seed_blocks,
    capacity,
    updates,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The AbsMax that fallback blocks exceed, and how many do among the first ``before_end``.

    The program that ``updates`` seeds ``state`` and adds to its counts. The others may read it before or after: they
    find the same threshold either way.
    """
    # The first blocks, which may be all (`WHOLE`), stay in registers; further ones are loaded again for each count.
    blocks = load_blocks(block_amax, 0, total, CHUNK)
    threshold = tl.full([], float("nan"), tl.float32)
    if state is not None:
        # A scalar is loaded by each warp for itself. Those of one program that load on either side of the seeding would
        # take different branches below and meet in the wrong barriers; a maximum over all threads is the same in all.
        bits = tl.load(state + tl.zeros([THREADS], tl.int32)).to(tl.int32, bitcast=True)
        threshold = tl.max(bits, 0).to(tl.float32, bitcast=True)
    unseeded = threshold != threshold
    # How many blocks shall exceed a threshold that is looked for, or -1: at first of an unseeded state, then for what
    # has room.
    wanted = tl.where(unseeded, seed_blocks, -1)
    bound = tl.where(unseeded, 0.0, tl.maximum(threshold, 0.0))
    before = tl.full([], 0, tl.int32)
    counting = tl.full([], 1, tl.int32)
    while counting != 0:
        if wanted >= 0:
            threshold = _kth_largest(blocks, block_amax, total, wanted, bound, CHUNK, WHOLE)
        before, above = _count_above(blocks, block_amax, total, before_end, threshold, CHUNK, WHOLE)
        if state is not None:
            if updates:
                # A tensor of zeros says nothing about later ones.
                if unseeded & (threshold > 0.0):
                    tl.store(state, threshold)
                finite = _count_reaching(blocks, block_amax, total, 0, CHUNK, WHOLE)
                tl.store(state + 1, tl.load(state + 1) + above.to(tl.float32))
                tl.store(state + 2, tl.load(state + 2) + finite.to(tl.float32))
        # Only what exceeds the state's own threshold is counted into it.
        updates = updates & False
        bound = tl.maximum(threshold, 0.0)
        wanted = tl.where(above > capacity, capacity, -1)
        counting = (above > capacity).to(tl.int32)
    return threshold, before
