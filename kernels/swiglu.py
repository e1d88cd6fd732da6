"""SwiGLU in Triton, fused with the first read of what is quantized next: ``silu(gate)·up``, and its backward.

The statistics that quantization needs are gathered while the values are in registers, so that the activation and its
two gradients are read once less. Values are computed and rounded as PyTorch's own `silu`, `mul` and `silu_backward`
compute and round them, so that the integers are those of the unfused layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import libdevice

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import blocks_along
from lightning_int8.kernels.quantize import MatrixStatistics, row_from_statistics
from lightning_int8.kernels.quantize_gradient import GradientStatistics
from lightning_int8.kernels.quantize_launch import check, on, row_options
from lightning_int8.kernels.statistics import column_statistics, fold_rows, row_statistics, store_column_statistics

# Compiled, `tl.exp` is an approximation other than PyTorch's; the interpreter has no other.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _one_plus_exp(x):
    """``1 + exp(-x)``."""
    if _INTERPRETED:
        return 1.0 + tl.exp(-x)
    else:
        return 1.0 + libdevice.exp(-x)


@triton.jit
def silu_in(x, dtype: tl.constexpr):
    """``silu(x)`` as PyTorch rounds it in ``dtype``, float32."""
    return tl.div_rn(x, _one_plus_exp(x)).to(dtype).to(tl.float32)


@triton.jit
def _quotient(x, y, inverse):
    """``x / y`` rounded to nearest, given ``1 / y`` so rounded (Markstein): one division serves two quotients."""
    q = x * inverse
    remainder = tl.fma(-q, y, x)
    # NaN where x or y is infinite; q itself is the quotient there.
    return tl.where(remainder == remainder, tl.fma(remainder, inverse, q), q)


@triton.jit
def _load(x, offset, inside):
    return tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)


@CachedLaunch
@triton.jit
def swiglu_statistics(
    gate,
    up,
    h,
    amax,  # int32 [QB, R], or None
    weight,  # float32 [QB, R], or None
    block_amax,  # int32 [RB, QB], or None
    rows,
    columns,
    B: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One ``B×B`` block of ``h = silu(gate)·up``, all row-major ``[R, Q]``, and its `matrix_statistics`."""
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    dtype = h.dtype.element_ty
    corner = row_block.to(tl.int64) * B * columns + column_block * B
    gate += corner
    up += corner
    h += corner
    i = tl.arange(0, PART)
    c = column_block * B + tl.arange(0, B)
    largest = tl.zeros([PART], tl.int32)
    for start in tl.range(0, B, PART, num_stages=STAGES):
        r = row_block * B + start + i
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        offset = (start + i)[:, None] * columns + tl.arange(0, B)[None, :]
        silu = silu_in(_load(gate, offset, inside), dtype)
        value = (silu * _load(up, offset, inside)).to(dtype)
        tl.store(h + offset, value, mask=inside)
        by_row = row_statistics(value.to(tl.float32), amax, weight, column_block, r, rows)
        largest = tl.maximum(largest, by_row)
    if block_amax is not None:
        tl.store(block_amax + pid, tl.max(largest, 0))


@CachedLaunch
@triton.jit
def swiglu_gradient_statistics(
    dh,
    gate,
    up,
    dgate,
    dup,
    row_fold,  # s, float32 [M], or None: no G
    row_int_max,  # float32 [M]
    gate_fold,  # t of the gate's weight, float32 [N], or None: no A
    up_fold,
    a_amax,  # int32 [2, NB, M]: of dgate and of dup, as are the others
    a_weight,  # float32 [2, NB, M], or None
    a_block_amax,  # int32 [2, MB, NB]
    g_amax,  # int32 [2, MB, N]
    g_weight,  # float32 [2, MB, N]
    g_block_amax,  # int32 [2, NB, MB]
    int_sums,  # float32 [2, MB]
    column_sums,  # float32 [2, MB, N], or None: no bias gradient
    rows,
    columns,
    B: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One ``B×B`` block of the gradients of ``silu(gate)·up``, row-major, and `gradient_statistics` of both."""
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(rows, B)
    column_blocks = tl.cdiv(columns, B)
    row_block = pid // column_blocks
    column_block = pid % column_blocks
    dtype = dgate.dtype.element_ty
    corner = row_block.to(tl.int64) * B * columns + column_block * B
    dh += corner
    gate += corner
    up += corner
    dgate += corner
    dup += corner
    blocks = row_blocks * column_blocks
    by_rows = column_blocks.to(tl.int64) * rows
    by_columns = row_blocks.to(tl.int64) * columns
    i = tl.arange(0, PART)
    c = column_block * B + tl.arange(0, B)
    up_a_weight = None
    if gate_fold is not None:
        gate_fold_c = tl.load(gate_fold + c, mask=c < columns, other=0.0)
        up_fold_c = tl.load(up_fold + c, mask=c < columns, other=0.0)
        if a_weight is not None:
            up_a_weight = a_weight + by_rows
    gate_a = tl.zeros([PART], tl.int32)
    up_a = tl.zeros([PART], tl.int32)
    gate_g = tl.zeros([256 // B, B], tl.float32)
    up_g = tl.zeros([256 // B, B], tl.float32)
    gate_weighted = tl.zeros([256 // B, B], tl.float32)
    up_weighted = tl.zeros([256 // B, B], tl.float32)
    gate_sum = tl.zeros([256 // B, B], tl.float32)
    up_sum = tl.zeros([256 // B, B], tl.float32)
    int_sum = tl.zeros([PART], tl.float32)
    for start in tl.range(0, B, PART, num_stages=STAGES):
        r = row_block * B + start + i
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        offset = (start + i)[:, None] * columns + tl.arange(0, B)[None, :]
        dy = _load(dh, offset, inside)
        x = _load(gate, offset, inside)
        one = tl.full([PART, B], 1.0, tl.float32)
        divisor = _one_plus_exp(x)
        s = tl.div_rn(one, divisor)
        rounded = (dy * _quotient(x, divisor, s).to(dtype).to(tl.float32)).to(dtype)
        tl.store(dup + offset, rounded, mask=inside)
        up_tile = rounded.to(tl.float32)
        # As PyTorch's silu_backward, with the fused multiply-add that its compiler makes of it.
        dsilu = (dy * _load(up, offset, inside)).to(dtype).to(tl.float32)
        rounded = (dsilu * s * tl.fma(x, 1.0 - s, one)).to(dtype)
        tl.store(dgate + offset, rounded, mask=inside)
        gate_tile = rounded.to(tl.float32)
        if gate_fold is not None:
            by_row = row_statistics(gate_tile * gate_fold_c[None, :], a_amax, a_weight, column_block, r, rows)
            gate_a = tl.maximum(gate_a, by_row)
            by_row = row_statistics(up_tile * up_fold_c[None, :], a_amax + by_rows, up_a_weight, column_block, r, rows)
            up_a = tl.maximum(up_a, by_row)
        if row_fold is not None:
            fold_r = tl.load(row_fold + r, mask=r < rows, other=0.0)
            int_max = tl.load(row_int_max + r, mask=r < rows, other=0.0)
            gate_g, gate_weighted = column_statistics(gate_tile, fold_r, int_max, gate_g, gate_weighted)
            up_g, up_weighted = column_statistics(up_tile, fold_r, int_max, up_g, up_weighted)
            int_sum += int_max
        if column_sums is not None:
            gate_sum += tl.sum(fold_rows(gate_tile), 0)
            up_sum += tl.sum(fold_rows(up_tile), 0)
    if gate_fold is not None:
        tl.store(a_block_amax + pid, tl.max(gate_a, 0))
        tl.store(a_block_amax + blocks + pid, tl.max(up_a, 0))
    if row_fold is not None:
        store_column_statistics(
            gate_g, gate_weighted, g_amax, g_weight, g_block_amax, row_block, column_block, rows, columns, B
        )
        store_column_statistics(
            up_g, up_weighted, g_amax + by_columns, g_weight + by_columns, g_block_amax + blocks,
            row_block, column_block, rows, columns, B,
        )  # fmt: skip
        if column_block == 0:
            tl.store(int_sums + row_block, tl.sum(int_sum, 0))
            tl.store(int_sums + row_blocks + row_block, tl.sum(int_sum, 0))
    if column_sums is not None:
        out = row_block.to(tl.int64) * columns + c
        tl.store(column_sums + out, tl.sum(gate_sum, 0), mask=c < columns)
        tl.store(column_sums + by_columns + out, tl.sum(up_sum, 0), mask=c < columns)


def swiglu_row(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h = silu(gate)·up``, and what `quantize_row` makes of it: see `swiglu_reference.swiglu_row`.

    Args:
        gate: bfloat16, float16 or float32 ``[R, Q]``, contiguous (others are copied), at least one element.
        up: The same.
        state: See `quantize.quantize_row`, also for the others.
        operand: Row of ``state``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        block: Block edge: 32, 64 or 128.
        update: Whether ``state`` may change.
        transpose: Whether to write ``low_t`` and ``high_t``.

    Returns:
        ``h [R, Q]`` in ``gate``'s dtype, then the seven tensors of `quantize_row`.
    """
    statistics = MatrixStatistics.empty(gate, capacity, block)
    h = _activation(gate, up, block, statistics)
    return h, *row_from_statistics(h, statistics, state, operand, seed_rate, capacity, block, update, transpose)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``h = silu(gate)·up`` ``[R, Q]``, as PyTorch rounds it, of what `swiglu_row` takes."""
    return _activation(gate, up, 128, (None, None, None))


def _activation(gate: Tensor, up: Tensor, block: int, statistics: Sequence[Tensor | None]) -> Tensor:
    """``h`` of `swiglu_row`; writes those of its ``statistics`` that are not ``None``."""
    gate, up = _inputs(block, gate, up)
    h = torch.empty_like(gate)
    with on(h):
        swiglu_statistics[_grid(h, block)](
            gate, up, h, *statistics, *h.shape, B=block, **row_options("swiglu_statistics", block, h)
        )
    return h


def swiglu_gradient(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    input_scale: Tensor | None,
    input_int_max: Tensor | None,
    capacity: int,
    block: int,
    bias: bool,
    dup: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of ``gate`` and ``up``, and the statistics that `quantize_row_gradient` takes of each.

    Args:
        dh: Gradient of ``silu(gate)·up``, in the dtype of ``gate``, ``[M, N]``.
        gate: bfloat16, float16 or float32 ``[M, N]``, contiguous (others are copied), at least one element.
        up: The same.
        gate_scale: ``t`` of the gate's weight, contiguous float32 ``[N]``; both ``None``: no A.
        up_scale: ``t`` of the up projection's weight.
        input_scale: ``s`` of the input that both projections read, contiguous float32 ``[M]``, or ``None``: no G.
        input_int_max: Contiguous float32 ``[M]``; goes with ``input_scale``.
        capacity: As `quantize_row_gradient` will be given it.
        block: Block edge: 32, 64 or 128.
        bias: Whether to sum the columns too.
        dup: Where to write the gradient of ``up``: a contiguous tensor like ``up``, which may be ``dh`` itself.

    Returns:
        Both gradients, then the fields of `GradientStatistics`, each with a first axis of two: of ``gate``'s gradient
        and of ``up``'s. What is not wanted comes back as ``[2, 0]``.
    """
    dh, gate, up = _inputs(block, dh, gate, up)
    gradients = torch.empty_like(gate), torch.empty_like(up) if dup is None else dup
    rows, columns = gate.shape
    pair = GradientStatistics.empty(
        gate, gate_scale is not None, input_scale is not None, bias, capacity, block, copies=(2,)
    )
    with on(gate):
        swiglu_gradient_statistics[_grid(gate, block)](
            dh, gate, up, *gradients, input_scale, input_int_max, gate_scale, up_scale, *pair, rows, columns,
            B=block, **row_options("swiglu_gradient_statistics", block, gate),
        )  # fmt: skip
    return *gradients, *(gate.new_empty(2, 0) if part is None else part for part in pair)


def _grid(x: Tensor, block: int) -> tuple[int]:
    return (blocks_along(x.shape[0], block) * blocks_along(x.shape[1], block),)


def _inputs(block: int, *tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernels take them."""
    first = tensors[0]
    for tensor in tensors:
        check(tensor, block)
        if tensor.dtype != first.dtype or tensor.shape != first.shape or tensor.dtype is torch.float64:
            raise ValueError(
                "the SwiGLU kernels take matrices of one shape and one dtype, bfloat16, float16 or float32, not "
                f"{', '.join(f'{t.dtype} {tuple(t.shape)}' for t in tensors)}."
            )
    return [tensor.contiguous() for tensor in tensors]
