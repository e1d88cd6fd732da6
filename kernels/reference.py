"""The ground truth: every quantize and GEMM op in plain PyTorch, integer for integer, and the CPU backend.

`row` scaling. With the fallback mask given, row ``r`` of a matrix ``[R, Q]`` gets one scale
``s = max(plain AbsMax / 127, AbsMax / 32512, INT32 bound)`` and the integers ``q = round(x / s)``, which fit 8 bits in
plain blocks and 16 in fallback blocks: ``q = 256·high + low``. The product of two such matrices is one INT32 sum over
the whole contraction; scales come in at the end.

`block` scaling (arXiv 2503.08040). Each ``B×B`` block has ``s = AbsMax / 127``; a fallback block adds the residual
``round((x / s - q)·254)`` as a second plane. Products are INT32 within a block of the contraction, then FP32.

All arithmetic is float32 in the order written, without fused multiply-add, so that a kernel can match it bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels import groups
from lightning_int8.kernels.planes import (
    INT8_MAX,
    INT16_MAX,
    MIN_SCALE,
    RESIDUAL_STEPS,
    QuantizedMatrix,
    blocks_along,
    padded,
    seed_count,
)
from lightning_int8.kernels.rounding import data_seed, uniform

# 2^31 less 2%: room for the rounding of float32 sums of up to 2^18 terms.
_INT32_LIMIT = 0.98 * 2.0**31


# --- which blocks fall back -------------------------------------------------------------------------------------------


def block_amax(x: Tensor, block: int) -> Tensor:
    """AbsMax of each ``block``² block of ``x [R, Q]``, float32 ``[RB, QB]``; NaN where the block holds one."""
    return row_block_amax(x, block).unflatten(0, (-1, block)).amax(1)


def row_block_amax(x: Tensor, block: int) -> Tensor:
    """AbsMax of each row within each block column: float32 ``[RB·B, QB]``, zero for rows past ``R``."""
    rows, columns = x.shape
    x = F.pad(x, (0, padded(columns, block) - columns, 0, padded(rows, block) - rows))
    return x.abs().unflatten(1, (-1, block)).amax(2).float()


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The value that at most ``k`` of ``values`` exceed (the ``k+1``-th largest), or 0 when ``k`` covers all."""
    values = values.flatten()
    if k >= values.numel():
        return values.new_zeros(())
    return values.sort(descending=True).values[k]


def fallback_mask(
    amax: Tensor, state: Tensor | None, operand: int, seed_rate: float, capacity: int, update: bool
) -> Tensor:
    """Which blocks fall back: those whose AbsMax exceeds the operand's threshold, at most ``capacity`` of them.

    Blocks with a NaN or an infinity never fall back and are not counted. Without a ``state``, or before its first
    update, the threshold is taken from ``amax`` itself so that ``seed_rate`` of the blocks fall back.

    Args:
        amax: Block AbsMax, float32 ``[RB, QB]``.
        state: ``FallbackState.tensor``, float32 ``[operands, 5]``; its row ``operand`` is updated in place (threshold
            seeded, counts added) when ``update``.
        operand: Row of ``state``.
        seed_rate: Fraction in [0, 1].
        capacity: Most blocks that may fall back.
        update: Whether ``state`` may change.

    Returns:
        bool ``[RB, QB]``.
    """
    if capacity == 0:
        return torch.zeros_like(amax, dtype=torch.bool)
    finite = amax.isfinite()
    values = amax.where(finite, 0.0)
    threshold = state[operand, 0] if state is not None else values.new_tensor(float("nan"))
    if bool(threshold.isnan()):
        threshold = kth_largest(values, seed_count(values.numel(), seed_rate))
        # A tensor of zeros (a gradient before anything has flowed) says nothing about later ones.
        if state is not None and update and threshold > 0:
            state[operand, 0] = threshold
    above = values > threshold
    count = above.sum()
    if state is not None and update:
        state[operand, 1] += count
        state[operand, 2] += finite.sum()
    if count > capacity:
        above = values > kth_largest(values, capacity)
    return above


def slots(mask: Tensor) -> Tensor:
    """Numbers the fallback blocks in row-major order: int32 of ``mask``'s shape, -1 for plain blocks."""
    order = mask.flatten().cumsum(0, dtype=torch.int32).view_as(mask) - 1
    return order.where(mask, order.new_tensor(-1))


def _spread(mask: Tensor, rows: int, columns: int, block: int) -> Tensor:
    """Per-block values spread over the elements of ``[rows, columns]``."""
    return mask.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


def _gather_blocks(dense: Tensor, slot: Tensor, capacity: int, block: int) -> Tensor:
    """The fallback blocks of ``dense [R, Q]`` in slot order, int8 ``[capacity, B, B]``, the rest zero."""
    rows, columns = dense.shape
    dense = F.pad(dense, (0, padded(columns, block) - columns, 0, padded(rows, block) - rows))
    tiles = dense.unflatten(1, (-1, block)).unflatten(0, (-1, block)).transpose(1, 2)[slot >= 0]
    high = dense.new_zeros(capacity, block, block)
    high[: tiles.shape[0]] = tiles
    return high


def _dense_high(a: QuantizedMatrix) -> Tensor | None:
    """The extra plane as a dense int8 ``[R, QB·B]``, or ``None`` when no block has fallen back."""
    if a.high is None or a.slot is None or a.slot.max() < 0:
        return None
    # Index -1 takes the zero block appended last.
    tiles = torch.cat([a.high, a.high.new_zeros(1, a.block, a.block)])[a.slot.long()]
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: a.size[0]].contiguous()


def _pad_columns(q: Tensor, block: int) -> Tensor:
    return F.pad(q, (0, padded(q.shape[1], block) - q.shape[1])).contiguous()


def _transposed(low: Tensor, high: Tensor, block: int) -> tuple[Tensor, Tensor]:
    # `contiguous` may return its argument (empty, or one column), and an op's outputs must not share memory.
    low_t = F.pad(low.t(), (0, padded(low.shape[0], block) - low.shape[0]))
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (low_t, high.mT))


# --- row scaling ------------------------------------------------------------------------------------------------------


def row_scale(x: Tensor, mask: Tensor, block: int, other_max: Tensor | None, folded: bool) -> Tensor:
    """One scale per row of ``x [R, Q]`` such that no INT32 sum of its product can overflow.

    ``s_r = max(max over plain blocks |x_r| / 127, max over all |x_r| / 32512, sum_q |x_rq| m_q / L, 2^-100)`` where
    ``m_q`` bounds the other operand's integers in column ``q`` of the contraction and ``L = 0.98·2^31 - sum_q m_q``.

    When the scale will be ``folded`` into dY, it is also at least ``min over blocks |x_r| / 127``, the least AbsMax
    that one of the row's blocks has: a row whose blocks have all fallen back would otherwise get 16-bit integers
    throughout and a scale 256 times too small, and its tokens would drown in the rounding of dY·diag(s) (measured:
    12.8 dB instead of 32.1 dB for dW where tokens differ in magnitude).

    Proof that ``|sum_q a_rq b_cq| < 2^31``: rounding (to nearest or stochastic) moves an integer by less than one, so
    ``sum_q |a_rq| |b_cq| < sum_q (|x_rq| / s_r + 1) m_q <= L (1 + e) + sum_q m_q < 2^31`` as long as the float32 sum's
    relative error ``e`` is below 2%, which it is for 2^18 terms in any order; terms that underflow belong to scales
    below 2^-100. Two's complement addition wraps, so intermediate results may pass 2^31 without harm. ``L`` is
    positive: with ``m_q = 127`` up to ``Q = 16·10^6``, and with ``m_q = 32512``, the largest integer there is, up to
    ``Q = 64731`` (``MAX_WGRAD_TOKENS`` is 32768).

    Args:
        x: float32 ``[R, Q]``.
        mask: bool ``[RB, QB]``, the fallback blocks.
        block: Block edge.
        other_max: float32 ``[Q]``, or ``None`` for 127 everywhere.
        folded: Whether the other GEMM of this operand takes the scale through dY.

    Returns:
        ``s``, float32 ``[R]``; NaN or infinite for rows that hold one.
    """
    rows, columns = x.shape
    amax = row_block_amax(x, block)
    plain = amax.masked_fill(mask.repeat_interleave(block, 0), 0.0).amax(1)[:rows]
    largest = amax.amax(1)[:rows]
    if folded:
        plain = torch.maximum(plain, amax.amin(1)[:rows])
    if other_max is None:
        other_max = x.new_full((columns,), float(INT8_MAX))
    # Weights and limit in units of 2^31, so that no sum overflows float32 unless it is itself near the largest one.
    weighted = (x.abs() * (other_max * 2.0**-31)).sum(1)
    limit = (_INT32_LIMIT - other_max.sum(dtype=torch.float64)) * 2.0**-31
    # NaN may come of 0·inf, but AbsMax alone carries NaN and infinity.
    bound = (weighted / limit.float()).nan_to_num_(0.0)
    scale = torch.maximum(_over(plain, INT8_MAX), _over(largest, INT16_MAX))
    return torch.maximum(scale, bound).clamp_min(MIN_SCALE)


def _over(x: Tensor, divisor: int) -> Tensor:
    """``x / divisor`` rounded once on every device: by a number, CUDA multiplies with the rounded reciprocal."""
    return x / x.new_tensor(float(divisor))


def row_integers(
    x: Tensor, scale: Tensor, mask: Tensor, block: int, noise: Tensor | None, small_only: bool = False
) -> Tensor:
    """``q = round(x / s)`` as int16 ``[R, Q]``: within ±127 in plain blocks and ±32512 in fallback blocks.

    With ``noise`` stochastically, or with ``small_only`` where ``|x| < s`` alone.
    """
    v = x * (1.0 / scale)[:, None]
    if noise is None:
        q = v.round_()
    elif small_only:
        q = torch.where(v.abs() < 1, (v + noise).floor_(), v.round())
    else:
        q = v.add_(noise).floor_()
    if bool(mask.any()):
        limit = torch.where(mask, float(INT16_MAX), float(INT8_MAX))
        limit = _spread(limit, *x.shape, block)
        q = torch.minimum(torch.maximum(q, -limit), limit)
    else:
        q = q.clamp_(-INT8_MAX, INT8_MAX)
    # Rows with NaN or infinity carry it in their scale; their integers must be something defined.
    return q.nan_to_num_(0.0).to(torch.int16)


def split_bytes(q: Tensor) -> tuple[Tensor, Tensor]:
    """``q = 256·high + low`` with ``low`` in [-128, 127] and ``high`` in [-127, 127], both int8."""
    high = (q + 128) >> 8
    return (q - (high << 8)).to(torch.int8), high.to(torch.int8)


def _row_planes(
    x: Tensor,
    mask: Tensor,
    capacity: int,
    block: int,
    other_max: Tensor | None,
    noise: Tensor | None,
    folded: bool,
    group_blocks: int = 0,
    small_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``scale`` is ``[R]``, or ``[groups, R]`` where each ``group_blocks`` blocks of a row have their own."""
    width = group_blocks * block if group_blocks else max(1, x.shape[1])
    scales, integers = [], []
    for start in range(0, max(1, x.shape[1]), width):
        columns = slice(start, start + width)
        part, part_mask = x[:, columns], mask[:, start // block : blocks_along(start + width, block)]
        part_max = None if other_max is None else other_max[columns]
        scales.append(row_scale(part, part_mask, block, part_max, folded))
        part_noise = None if noise is None else noise[:, columns]
        integers.append(row_integers(part, scales[-1], part_mask, block, part_noise, small_only))
    q = torch.cat(integers, 1)
    scale = torch.stack(scales) if group_blocks else scales[0]
    int_max = q.abs().amax(1).float()
    slot = slots(mask)
    if bool(mask.any()):
        low, high = split_bytes(q)
        return low, _gather_blocks(high, slot, capacity, block), slot, scale, int_max
    low = q.to(torch.int8)
    return low, low.new_zeros(capacity, block, block), slot, scale, int_max


def quantize_row(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes X or W ``[R, Q]`` with ``row`` scaling, with the transposed planes the backward contracts over ``R``.

    Args:
        x: float ``[R, Q]``, any strides.
        state: See :func:`fallback_mask`, also for the next four.
        operand: Row of ``state``.
        seed_rate: Fraction of the blocks.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``.
        transpose: Whether the transposed planes are wanted; they come back empty (zero elements) otherwise.

    Returns:
        ``low [R, QB·B]``, ``low_t [Q, RB·B]``, ``high [C, B, B]``, ``high_t [C, B, B]`` (each tile transposed), all
        int8; ``slot`` int32 ``[RB, QB]``; ``scale`` float32 ``[R]``; ``int_max`` float32 ``[R]``, the largest
        ``|q|`` of each row, which bounds the wgrad.
    """
    x = x.float()
    mask = fallback_mask(block_amax(x, block), state, operand, seed_rate, capacity, update)
    low, high, slot, scale, int_max = _row_planes(x, mask, capacity, block, None, None, folded=True)
    low_t, high_t = _transposed(low, high, block) if transpose else (low.new_empty(0), high.new_empty(0))
    return _pad_columns(low, block), low_t, high, high_t, slot, scale, int_max


def quantize_row_gradient(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    input_int_max: Tensor | None,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    stochastic: str,
    bias: bool,
    statistics: Sequence[Tensor] = (),
    group_blocks: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes dY ``[M, N]`` twice: ``A = dY·diag(t)`` for the dgrad and ``G = (dY·diag(s))ᵀ`` for the wgrad.

    Folding W's row scales ``t`` and X's row scales ``s`` into dY leaves the integers of W and X as they are, so each is
    quantized once for all three GEMMs.

    Args:
        dy: float ``[M, N]``, any strides.
        weight_scale: ``t``, float32 ``[N]``; ``None`` when there is no dgrad.
        input_scale: ``s``, float32 ``[M]``; ``None`` when there is no wgrad.
        input_int_max: ``int_max`` of X, float32 ``[M]``; goes with ``input_scale``.
        state: See :func:`fallback_mask`, also for the next three; A uses row 1 and G row 2.
        seed_rate: Fraction of the blocks.
        capacity: Most blocks of each that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``.
        stochastic: What to round stochastically (:mod:`lightning_int8.kernels.rounding`): ``"nothing"``; in G what is
            below one step, which to nearest would become zero or grow to the step (``"small"``; A's scales are each
            token's own); or ``"all"`` of A and G.
        bias: Whether the bias gradient is wanted.
        statistics: What a kernel has found of ``dy`` before; not needed here.
        group_blocks: So many blocks along the tokens share G's scales, one a row for each of ``ceil(MB /
            group_blocks)`` groups; 0: all do.

    Returns:
        A's ``low [M, NB·B]``, ``high [C, B, B]``, ``slot [MB, NB]``, ``scale [M]``; G's ``low [N, MB·B]``,
        ``high [C, B, B]``, ``slot [NB, MB]`` (numbered in the row-major block order of G itself), ``scale [N]``, or
        ``[groups, N]`` with ``group_blocks``; ``dbias`` float32 ``[N]``. What is not wanted comes back empty.
    """
    dy = dy.float()
    out: list[Tensor] = []
    for operand, fold in ((1, weight_scale), (2, input_scale)):
        if fold is None:
            out += [dy.new_empty(0, dtype=d) for d in (torch.int8, torch.int8, torch.int32, torch.float32)]
            continue
        value = dy * fold[None, :] if operand == 1 else (dy * fold[:, None]).t().contiguous()
        amax = block_amax(value, block)
        mask = fallback_mask(amax, state, operand, seed_rate, capacity, update)
        random = stochastic == "all" or (operand == 2 and stochastic == "small")
        noise = uniform(*value.shape, data_seed(amax), value.device) if random else None
        other_max = None if operand == 1 else input_int_max
        groups = 0 if operand == 1 else group_blocks
        low, high, slot, scale, _ = _row_planes(
            value, mask, capacity, block, other_max, noise, False, groups, stochastic == "small"
        )
        out += [_pad_columns(low, block), high, slot, scale]
    a_low, a_high, a_slot, a_scale, g_low, g_high, g_slot, g_scale = out
    dbias = dy.sum(0) if bias else dy.new_empty(0)
    return a_low, a_high, a_slot, a_scale, g_low, g_high, g_slot, g_scale, dbias


def gemm_row(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``row`` scaling: one INT32 sum over the whole contraction, then the scales.

    ``acc = (((high·highᵀ ≪ 8) + high·lowᵀ + low·highᵀ) ≪ 8) + low·lowᵀ`` exactly (see :func:`row_scale` for why it
    cannot overflow), then ``float(acc)·a.scale·b.scale + bias + accumulate`` in float32.

    Returns:
        ``[a.size[0], b.size[0]]`` in ``out_dtype``.
    """
    acc = integer_product(a, b)
    out = acc.to(torch.float32)
    for scale, dim in ((a.scale, 1), (b.scale, 0)):
        if scale is not None:
            out *= scale.unsqueeze(dim)
    return _finish(out, bias, out_dtype, accumulate)


gemm_row_groups = functools.partial(groups.gemm_row_groups, gemm_row)


def integer_product(a: QuantizedMatrix, b: QuantizedMatrix) -> Tensor:
    """The exact integers ``q_a @ q_bᵀ`` of two ``row`` operands, int32 ``[a.size[0], b.size[0]]``."""
    a_high, b_high = _dense_high(a), _dense_high(b)
    acc = int8_matmul(a.low, b.low)
    if a_high is not None or b_high is not None:
        cross = torch.zeros_like(acc)
        if a_high is not None:
            cross += int8_matmul(a_high, b.low)
        if b_high is not None:
            cross += int8_matmul(a.low, b_high)
        if a_high is not None and b_high is not None:
            cross += int8_matmul(a_high, b_high) << 8
        acc += cross << 8
    return acc


# --- block scaling ----------------------------------------------------------------------------------------------------


def quantize_block(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
    stochastic: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes X, W or dY ``[R, Q]`` with one scale per block; a square block transposes together with its scale.

    Args:
        x: float ``[R, Q]``, any strides.
        state: See :func:`fallback_mask`, also for the next four.
        operand: Row of ``state``.
        seed_rate: Fraction of the blocks.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``.
        transpose: Whether the transposed planes are wanted; they come back empty otherwise.
        stochastic: What to round stochastically: ``"nothing"``; in plain blocks what is below one step (``"small"``);
            or the finest plane of each block (``"all"``).

    Returns:
        ``low [R, QB·B]``, ``low_t [Q, RB·B]``, ``high [C, B, B]`` (residuals), ``high_t [C, B, B]``, all int8;
        ``slot`` int32 ``[RB, QB]``; ``scale`` float32 ``[RB, QB]``.
    """
    x = x.float()
    amax = block_amax(x, block)
    mask = fallback_mask(amax, state, operand, seed_rate, capacity, update)
    scale = _over(amax, INT8_MAX).clamp_min(MIN_SCALE)
    v = x * _spread(1.0 / scale, *x.shape, block)
    q = v.round()
    noise = None if stochastic == "nothing" else uniform(*x.shape, data_seed(amax), x.device)
    slot = slots(mask)
    if bool(mask.any()):
        residual = (v - q) * RESIDUAL_STEPS
        residual = residual.round_() if noise is None or stochastic == "small" else (residual + noise).floor_()
        residual = residual.clamp_(-INT8_MAX, INT8_MAX).nan_to_num_(0.0).to(torch.int8)
        high = _gather_blocks(residual, slot, capacity, block)
    else:
        high = torch.zeros(capacity, block, block, dtype=torch.int8, device=x.device)
    if noise is not None:
        kept = _spread(mask, *x.shape, block)
        if stochastic == "small":
            kept = kept | ~(v.abs() < 1)
        q = q.where(kept, (v + noise).floor())
    low = q.clamp_(-INT8_MAX, INT8_MAX).nan_to_num_(0.0).to(torch.int8)
    low_t, high_t = _transposed(low, high, block) if transpose else (low.new_empty(0), high.new_empty(0))
    return _pad_columns(low, block), low_t, high, high_t, slot, scale


def gemm_block(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``block`` scaling: INT32 within a block of the contraction, FP32 across blocks.

    ``acc += s·low·lowᵀ + s/254·(high·lowᵀ + low·highᵀ)`` for each block of the contraction, ``s = a.scale·b.scale``.
    The product of two residuals is below 2^-16 of the block's and is left out.

    Returns:
        ``[a.size[0], b.size[0]]`` in ``out_dtype``.
    """
    if a.scale is None or b.scale is None:
        raise ValueError("gemm_block needs the block scales of both operands.")
    rows, columns, block = a.size[0], b.size[0], a.block
    a_high, b_high = _dense_high(a), _dense_high(b)
    out = torch.zeros(rows, columns, dtype=torch.float32, device=a.low.device)
    for k in range(blocks_along(a.size[1], block)):
        part = slice(k * block, (k + 1) * block)
        a_low, b_low = a.low[:, part].contiguous(), b.low[:, part].contiguous()
        product = int8_matmul(a_low, b_low).float()
        extra = None
        if a_high is not None and bool((a.slot[:, k] >= 0).any()):  # type: ignore[index]
            extra = int8_matmul(a_high[:, part].contiguous(), b_low)
        if b_high is not None and bool((b.slot[:, k] >= 0).any()):  # type: ignore[index]
            other = int8_matmul(a_low, b_high[:, part].contiguous())
            extra = other if extra is None else extra + other
        if extra is not None:
            product += extra * (1.0 / RESIDUAL_STEPS)
        product *= a.scale[:, k].repeat_interleave(block)[:rows, None]
        product *= b.scale[:, k].repeat_interleave(block)[None, :columns]
        out += product
    return _finish(out, bias, out_dtype, accumulate)


# --- both scalings ----------------------------------------------------------------------------------------------------


def transposed_integers(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """The ``low_t`` of `quantize_row` or `quantize_block` without fallback, given the scales that it has found.

    Args:
        x: float ``[R, Q]``, any strides.
        scale: float32 ``[R]`` or ``[RB, QB]``.
        block: Block edge ``B``.

    Returns:
        int8 ``[Q, RB·B]``.
    """
    inverse = 1.0 / scale
    v = x.float() * (inverse[:, None] if scale.dim() == 1 else _spread(inverse, *x.shape, block))
    low = v.round_().clamp_(-INT8_MAX, INT8_MAX).nan_to_num_(0.0).to(torch.int8)
    return _transposed(low, low.new_empty(0, block, block), block)[0]


# --- shared -----------------------------------------------------------------------------------------------------------


def _finish(out: Tensor, bias: Tensor | None, out_dtype: torch.dtype, accumulate: Tensor | None) -> Tensor:
    if bias is not None:
        out += bias.float()[None, :]
    if accumulate is not None:
        out += accumulate.float()
    return out.to(out_dtype)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact INT32 product ``a @ bᵀ`` of int8 ``a [R, Q]`` and ``b [C, Q]``, as a real INT8 GEMM."""
    if a.is_cuda:
        return _cuda_int8_matmul(a, b)
    if _cpu_int8_gemm_is_exact():
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).to(torch.int32)


@functools.cache
def _cpu_int8_gemm_is_exact() -> bool:
    """Whether this CPU's INT8 GEMM keeps full INT32 sums (without VNNI, oneDNN may saturate pairs to 16 bits)."""
    a = torch.full((32, 64), -128, dtype=torch.int8)
    b = torch.full((32, 64), 127, dtype=torch.int8)
    exact = bool(
        (torch._int_mm(a, b.t()) == -128 * 127 * 64).all() and (torch._int_mm(b, b.t()) == 127 * 127 * 64).all()
    )
    if not exact:
        import warnings

        warnings.warn(
            "This CPU's INT8 matrix product saturates; the reference computes the same integers in float64, slower.",
            stacklevel=2,
        )
    return exact


def _cuda_int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """CuBLAS wants more than 16 rows and multiples of 8 elsewhere."""
    rows, columns = a.shape[0], b.shape[0]
    depth = padded(a.shape[1], 8)
    a = F.pad(a, (0, depth - a.shape[1], 0, max(0, 32 - rows)))
    b = F.pad(b, (0, depth - b.shape[1], 0, padded(columns, 8) - columns))
    return torch._int_mm(a.contiguous(), b.contiguous().t())[:rows, :columns].contiguous()
