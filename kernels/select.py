"""Between the two reads: which blocks fall back, their slots, and the scales, without the host waiting for anything.

Each program finds the threshold for itself (`threshold_search`), then numbers the blocks of its own row of blocks and
makes the scales of its own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.threshold_search import INFINITY_BITS, THREADS, find_threshold, load_blocks

# Blocks numbered at a time: most rows of blocks in one step.
NUMBER_CHUNK = tl.constexpr(256)
_MIN_SCALE_BITS = tl.constexpr(0x0D800000)  # 2^-100, planes.MIN_SCALE


@triton.jit
def _store_data_seed(block_amax, total, seed, first, CHUNK: tl.constexpr):
    """The first program writes the exclusive or of all finite block AbsMax: see `rounding.data_seed`."""
    if first:
        result = tl.full([], 0, tl.int32)
        for start in range(0, total, CHUNK):
            result = result ^ tl.xor_sum(tl.maximum(load_blocks(block_amax, start, total, CHUNK), 0), 0)
        tl.store(seed, result)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def round_half_even(v):
    """``v`` rounded to the nearest whole number, halves to even, for ``|v| <= 2^22``: the sum's last bit is worth 1."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _over_constant(bits, divisor: tl.constexpr):
    """Bit patterns of ``float(bits) / divisor``, rounded as IEEE division rounds."""
    return _bits(tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, divisor, tl.float32)))


@triton.jit
def _above(block_amax, row_block, q, column_blocks, threshold, FALLBACK: tl.constexpr):
    """Which of the blocks ``q`` of a row of blocks fall back."""
    inside = q < column_blocks
    if FALLBACK:
        at = row_block.to(tl.int64) * column_blocks + q
        bits = tl.load(block_amax + at, mask=inside, other=INFINITY_BITS)
        return (bits < INFINITY_BITS) & (bits.to(tl.float32, bitcast=True) > threshold)
    else:
        return inside & (q < 0)


@triton.jit
def _number_blocks(
    row_block,
    column_blocks,
    block_amax,
    slot,
    threshold,
    before,
    block_scale,
    FALLBACK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes the slots (and, unless ``None``, the block scales) of one row of blocks."""
    for start in range(0, column_blocks, CHUNK):
        q = start + tl.arange(0, CHUNK)
        at = row_block.to(tl.int64) * column_blocks + q
        over = _above(block_amax, row_block, q, column_blocks, threshold, FALLBACK).to(tl.int32)
        order = before + tl.cumsum(over, 0) - 1
        before += tl.sum(over, 0)
        tl.store(slot + at, tl.where(over > 0, order, -1), mask=q < column_blocks)
        if block_scale is not None:
            bits = tl.load(block_amax + at, mask=q < column_blocks, other=0)
            s = tl.maximum(_over_constant(bits, 127.0), _MIN_SCALE_BITS)
            tl.store(block_scale + at, s.to(tl.float32, bitcast=True), mask=q < column_blocks)


@triton.jit
def _merge(plain, fallen, least, weighted, plain_2, fallen_2, least_2, weighted_2):
    return (
        tl.maximum(plain, plain_2),
        tl.maximum(fallen, fallen_2),
        tl.minimum(least, least_2),
        weighted + weighted_2,
    )


@triton.jit
def _row_scales(
    row_block,
    part,
    rows,
    column_blocks,
    begin,
    end,
    block_amax,  # int32 [RB, QB]
    threshold,
    amax,  # int32 [QB, R]
    weight,  # float32 [QB, R], or None: the INT32 bound cannot bind
    limit,  # float32, `L` of `reference.row_scale` in units of 2^31
    scale,  # float32 [R]
    inverse,  # float32 [R], reciprocals of the scales, or None
    int_max,  # float32 [R], or None
    FALLBACK: tl.constexpr,
    FOLDED: tl.constexpr,
    B: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Scales, and largest integers unless ``None``, of ``PART`` rows of a row of blocks: see `reference.row_scale`.

    Of the blocks from ``begin`` to ``end`` of each row.
    """
    # Each thread gathers what it has loaded itself, in as many places side by side; they meet once, at the end.
    SIDE: tl.constexpr = min(CHUNK, THREADS // PART)
    r = row_block * B + part * PART + tl.arange(0, PART)
    plain = tl.zeros([SIDE, PART], tl.int32)
    fallen = tl.zeros([SIDE, PART], tl.int32)
    least = tl.full([SIDE, PART], 0x7FFFFFFF, tl.int32)
    weighted = tl.zeros([SIDE, PART], tl.float32)
    for start in range(begin, end, CHUNK):
        q = start + tl.arange(0, CHUNK)
        inside = (q < end)[:, None] & (r < rows)[None, :]
        at = q.to(tl.int64)[:, None] * rows + r[None, :]
        bits = tl.load(amax + at, mask=inside, other=0)
        if weight is not None:
            weighted += tl.sum(_side_by_side(tl.load(weight + at, mask=inside, other=0.0), SIDE), 0)
        over = _above(block_amax, row_block, q, column_blocks, threshold, FALLBACK)[:, None]
        plain = tl.maximum(plain, tl.max(_side_by_side(tl.where(over, 0, bits), SIDE), 0))
        fallen = tl.maximum(fallen, tl.max(_side_by_side(tl.where(over, bits, 0), SIDE), 0))
        if FOLDED:
            least = tl.minimum(least, tl.min(_side_by_side(tl.where(inside, bits, 0x7FFFFFFF), SIDE), 0))
    plain, fallen, least, weighted = tl.reduce((plain, fallen, least, weighted), 0, _merge)
    # Maxima of bit patterns, since those keep NaN.
    largest = tl.maximum(plain, fallen)
    limiting = plain
    if FOLDED:
        limiting = tl.maximum(plain, least)
    s = tl.maximum(_over_constant(limiting, 127.0), _over_constant(largest, 32512.0))
    s = tl.maximum(s, _MIN_SCALE_BITS)
    if weight is not None:
        bound = _bits(tl.div_rn(weighted, tl.zeros([PART], tl.float32) + limit))
        # NaN may come of 0·inf, an infinity of rounding: AbsMax alone carries those.
        s = tl.maximum(s, tl.where(bound <= INFINITY_BITS, tl.minimum(bound, INFINITY_BITS - 1), 0))
    tl.store(scale + r, s.to(tl.float32, bitcast=True), mask=r < rows)
    factor = tl.div_rn(tl.full([PART], 1.0, tl.float32), s.to(tl.float32, bitcast=True))
    if inverse is not None:
        tl.store(inverse + r, factor, mask=r < rows)
    if int_max is not None:
        # Rounding is monotonic, so a row's largest magnitude has its largest integer.
        most = tl.minimum(round_half_even(plain.to(tl.float32, bitcast=True) * factor), 127.0)
        most = tl.maximum(most, tl.minimum(round_half_even(fallen.to(tl.float32, bitcast=True) * factor), 32512.0))
        # A row with NaN or an infinity has integers 0.
        tl.store(int_max + r, tl.where(s < INFINITY_BITS, most, 0.0), mask=r < rows)


@triton.jit
def _side_by_side(tile, SIDE: tl.constexpr):
    """``[CHUNK, PART]`` as ``[CHUNK / SIDE, SIDE, PART]``."""
    return tl.reshape(tile, [tile.shape[0] // SIDE, SIDE, tile.shape[1]])


@CachedLaunch
@triton.jit(do_not_specialize=["seed_blocks", "capacity", "update"])
def matrix_select(
    block_amax,  # int32 [RB, QB]
    state,  # float32 [4], the operand's row of `FallbackState.tensor`, or None
    seed_blocks,
    capacity,
    update,
    slot,  # int32 [RB, QB]
    seed,  # int32 [1], or None: no stochastic rounding
    block_scale,  # float32 [RB, QB], or None: `row` scaling
    amax,  # int32 [QB, R], `row` scaling
    weight,  # float32 [QB, R], or None
    limit,
    scale,  # float32 [R]
    int_max,  # float32 [R]
    rows,
    columns,
    FALLBACK: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    COLUMN_CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """Everything between the two reads of ``x [R, Q]``, for ``PART`` rows of a row of blocks."""
    row_block = tl.program_id(0)
    part = tl.program_id(1)
    row_blocks = tl.cdiv(rows, B)
    column_blocks = tl.cdiv(columns, B)
    total = tl.multiple_of(row_blocks * column_blocks, MULTIPLE)
    threshold = tl.full([], float("inf"), tl.float32)
    before = tl.full([], 0, tl.int32)
    if FALLBACK:
        threshold, before = find_threshold(
            block_amax, total, row_block * column_blocks, state, seed_blocks, capacity,
            (row_block == 0) & (part == 0) & (update != 0), CHUNK, WHOLE,
        )  # fmt: skip
    if seed is not None:
        _store_data_seed(block_amax, total, seed, (row_block == 0) & (part == 0), CHUNK)
    if part == 0:
        _number_blocks(
            row_block, column_blocks, block_amax, slot, threshold, before, block_scale, FALLBACK, NUMBER_CHUNK
        )
    if block_scale is None:
        _row_scales(
            row_block, part, rows, column_blocks, 0, column_blocks, block_amax, threshold, amax, weight, limit, scale,
            None, int_max, FALLBACK, True, B, PART, COLUMN_CHUNK,
        )  # fmt: skip


@CachedLaunch
@triton.jit(do_not_specialize=["seed_blocks", "capacity", "update", "group_blocks"])
def gradient_select(
    a_block_amax,  # int32 [MB, NB], or None: no A
    a_state,  # float32 [4], or None
    a_amax,  # int32 [NB, M]
    a_weight,  # float32 [NB, M], or None
    a_limit,
    a_slot,  # int32 [MB, NB]
    a_scale,  # float32 [M]
    a_inverse,  # float32 [M]
    a_seed,  # int32 [1], or None
    g_block_amax,  # int32 [NB, MB], or None: no G
    g_state,
    g_amax,  # int32 [MB, N]
    g_weight,  # float32 [MB, N]
    int_sums,  # float32 [MB]
    int32_limit,  # 0.98, in units of 2^31
    g_slot,  # int32 [NB, MB]
    group_blocks,  # so many blocks of a row of G share a scale
    g_scale,  # float32 [groups, N]
    g_inverse,  # float32 [groups, N]
    g_seed,
    column_sums,  # float32 [MB, N], or None: no bias gradient
    dbias,  # float32 [N]
    seed_blocks,
    capacity,
    update,
    rows,
    columns,
    FALLBACK: tl.constexpr,
    B: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    MULTIPLE: tl.constexpr,
    COLUMN_CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """Everything between the two reads of ``dy [M, N]``: the first NB programs make G and dbias, MB more make A.

    Each takes ``PART`` rows of its row of blocks of G or A.
    """
    pid = tl.program_id(0)
    part = tl.program_id(1)
    row_blocks = tl.cdiv(rows, B)
    column_blocks = tl.cdiv(columns, B)
    total = tl.multiple_of(row_blocks * column_blocks, MULTIPLE)
    threshold = tl.full([], float("inf"), tl.float32)
    before = tl.full([], 0, tl.int32)
    if pid < column_blocks:
        if g_block_amax is not None:
            if FALLBACK:
                threshold, before = find_threshold(
                    g_block_amax, total, pid * row_blocks, g_state, seed_blocks, capacity,
                    (pid == 0) & (part == 0) & (update != 0), CHUNK, WHOLE,
                )  # fmt: skip
            if g_seed is not None:
                _store_data_seed(g_block_amax, total, g_seed, (pid == 0) & (part == 0), CHUNK)
            if part == 0:
                _number_blocks(pid, row_blocks, g_block_amax, g_slot, threshold, before, None, FALLBACK, NUMBER_CHUNK)
            for group in range(tl.cdiv(row_blocks, group_blocks)):
                begin = group * group_blocks
                end = tl.minimum(begin + group_blocks, row_blocks)
                int_sum = tl.full([], 0.0, tl.float32)
                for start in range(begin, end, COLUMN_CHUNK):
                    m = start + tl.arange(0, COLUMN_CHUNK)
                    int_sum += tl.sum(tl.load(int_sums + m, mask=m < end, other=0.0), 0)
                limit = int32_limit - int_sum * 4.656612873077393e-10
                _row_scales(
                    pid, part, columns, row_blocks, begin, end, g_block_amax, threshold, g_amax, g_weight, limit,
                    g_scale + group * columns, g_inverse + group * columns, None, FALLBACK, False, B, PART,
                    COLUMN_CHUNK,
                )  # fmt: skip
        if column_sums is not None:
            _sum_columns(pid, part, row_blocks, columns, column_sums, dbias, B, PART, COLUMN_CHUNK)
    else:
        if a_block_amax is not None:
            row_block = pid - column_blocks
            if FALLBACK:
                threshold, before = find_threshold(
                    a_block_amax, total, row_block * column_blocks, a_state, seed_blocks, capacity,
                    (row_block == 0) & (part == 0) & (update != 0), CHUNK, WHOLE,
                )  # fmt: skip
            if a_seed is not None:
                _store_data_seed(a_block_amax, total, a_seed, (row_block == 0) & (part == 0), CHUNK)
            if part == 0:
                _number_blocks(
                    row_block, column_blocks, a_block_amax, a_slot, threshold, before, None, FALLBACK, NUMBER_CHUNK
                )
            _row_scales(
                row_block, part, rows, column_blocks, 0, column_blocks, a_block_amax, threshold, a_amax, a_weight,
                a_limit, a_scale, a_inverse, None, FALLBACK, False, B, PART, COLUMN_CHUNK,
            )  # fmt: skip


@triton.jit
def _sum_columns(
    column_block,
    part,
    row_blocks,
    columns,
    column_sums,
    dbias,
    B: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums of ``PART`` columns."""
    SIDE: tl.constexpr = min(CHUNK, THREADS // PART)
    c = column_block * B + part * PART + tl.arange(0, PART)
    total = tl.zeros([SIDE, PART], tl.float32)
    for start in range(0, row_blocks, CHUNK):
        m = start + tl.arange(0, CHUNK)
        at = m.to(tl.int64)[:, None] * columns + c[None, :]
        inside = (m < row_blocks)[:, None] & (c < columns)[None, :]
        total += tl.sum(_side_by_side(tl.load(column_sums + at, mask=inside, other=0.0), SIDE), 0)
    tl.store(dbias + c, tl.sum(total, 0), mask=c < columns)
