"""Quantize kernels in Triton for every NVIDIA GPU since Ampere: the functions of `reference`, bit for bit.

Three launches, none of which the host waits for: statistics (first read), select (thresholds, slots and scales, from
statistics that lie in L2), and the integers in both layouts (second read).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_int8.kernels.integers import block_planes, gradient_planes, row_planes
from lightning_int8.kernels.planes import INT8_MAX, MIN_SCALE, blocks_along, padded, seed_count
from lightning_int8.kernels.reference import _INT32_LIMIT
from lightning_int8.kernels.select import gradient_select, matrix_select
from lightning_int8.kernels.statistics import gradient_statistics, matrix_statistics

BLOCKS = (32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Launch options by kernel and block edge. `PART`: how many columns of a block (`gradient_statistics`: how many rows) a
# program takes at a time; `RUN`: see `integers._rows_of_block`; `STAGES`: of the software pipeline.
_PLANES = {
    32: {"num_warps": 2, "PART": 32, "RUN": 4},
    64: {"num_warps": 2, "PART": 64, "RUN": 4},
    128: {"num_warps": 4, "PART": 64, "RUN": 4},
}
_ROWS_AT_A_TIME = {block: {"num_warps": 1, "PART": 512 // block, "STAGES": 3} for block in BLOCKS}
OPTIONS: dict[str, dict[int, dict[str, int]]] = {
    "matrix_statistics": {32: {"num_warps": 1}, 64: {"num_warps": 4}, 128: {"num_warps": 16}},
    "row_planes": dict(_PLANES),
    "block_planes": dict(_PLANES),
    "gradient_statistics": {block: {"num_warps": 1, "PART": 1024 // block, "STAGES": 3} for block in BLOCKS},
    "gradient_planes": dict(_PLANES),
    "swiglu_statistics": dict(_ROWS_AT_A_TIME),
    "swiglu_gradient_statistics": _ROWS_AT_A_TIME | {32: {"num_warps": 1, "PART": 8, "STAGES": 3}},
}
SELECT_WARPS = 4
# Rows whose scales one select program makes.
SELECT_ROWS = 32


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
    """Quantizes X or W ``[R, Q]`` with ``row`` scaling: arguments and results of `reference.quantize_row`.

    Equal to it bit for bit, except that the sum behind a scale that the INT32 bound sets is taken in another order, and
    that entries of ``high`` past the number of fallback blocks are not written.

    Args:
        x: bfloat16, float16, float32 or float64 ``[R, Q]``, any strides; fast if one of them is 1.
        state: float32 ``[operands, 4]`` or ``None``; row ``operand`` is read, and updated in place when ``update``.
        operand: Row of ``state``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``: 32, 64 or 128.
        transpose: Whether to write ``low_t`` and ``high_t``.

    Returns:
        ``low [R, QB·B]``, ``low_t [Q, RB·B]``, ``high [C, B, B]``, ``high_t [C, B, B]`` int8; ``slot [RB, QB]`` int32;
        ``scale [R]``, ``int_max [R]`` float32.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    statistics = MatrixStatistics.empty(x, capacity, block)
    if x.numel() > 0:
        with on(x):
            matrix_statistics[(row_blocks * column_blocks,)](
                x, *statistics, rows, columns, *x.stride(), B=block, **options("matrix_statistics", block)
            )
    return row_from_statistics(x, statistics, state, operand, seed_rate, capacity, block, update, transpose)


class MatrixStatistics(NamedTuple):
    """What the first read of ``x [R, Q]`` leaves for `row` scaling; ``None`` is not needed.

    Attributes:
        amax: int32 ``[QB, R]``, bit patterns of AbsMax.
        weight: float32 ``[QB, R]``: see `statistics.matrix_statistics`.
        block_amax: int32 ``[RB, QB]``.
    """

    amax: Tensor
    weight: Tensor | None
    block_amax: Tensor | None

    @classmethod
    def empty(cls, x: Tensor, capacity: int, block: int) -> MatrixStatistics:
        """Room for the statistics of ``x``, uninitialized."""
        rows, columns = x.shape
        new, column_blocks = _Allocator(x.device), blocks_along(columns, block)
        return cls(
            new.int32(column_blocks, rows),
            new.float32(column_blocks, rows) if capacity > 0 or _may_bind(columns) else None,
            new.int32(blocks_along(rows, block), column_blocks) if capacity > 0 else None,
        )


def row_from_statistics(
    x: Tensor,
    statistics: MatrixStatistics,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_row` does after its first read, given what that read found."""
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    new = _Allocator(x.device)
    low, low_t, high, high_t, slot = _planes(new, rows, columns, capacity, block, transpose)
    scale, inverse, int_max = new.float32(rows), new.float32(rows), new.float32(rows)
    if x.numel() == 0:
        return low, low_t, high, high_t, slot, scale.fill_(MIN_SCALE), int_max.zero_()
    fallback = capacity > 0
    blocks = row_blocks * column_blocks
    with on(x):
        matrix_select[(row_blocks, blocks_along(block, SELECT_ROWS))](
            statistics.block_amax, _operand(state, operand), seed_count(blocks, seed_rate), capacity, int(update),
            slot, None, None, statistics.amax, statistics.weight, _limit(columns), scale, inverse, int_max, rows,
            columns, FALLBACK=fallback, **_select_sizes(block, blocks, column_blocks),
        )  # fmt: skip
        row_planes[_parts("row_planes", blocks, block)](
            x, inverse, slot, low, low_t if transpose else None, high if fallback else None,
            high_t if fallback and transpose else None, rows, columns, *x.stride(),
            B=block, **options("row_planes", block),
        )  # fmt: skip
    return low, low_t, high, high_t, slot, scale, int_max


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
    stochastic: bool,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes dY ``[M, N]`` as ``A = dY·diag(t)`` and ``G = (dY·diag(s))ᵀ``, with the bias gradient, in two reads.

    Arguments and results of `reference.quantize_row_gradient`, equal to it as `quantize_row` is to its own; ``dbias``
    is a float32 sum in a fixed order, another than the reference's.

    Args:
        dy: bfloat16, float16, float32 or float64 ``[M, N]``, any strides; fast if one of them is 1.
        weight_scale: ``t``, contiguous float32 ``[N]``, or ``None``: no A.
        input_scale: ``s``, contiguous float32 ``[M]``, or ``None``: no G.
        input_int_max: Contiguous float32 ``[M]``; goes with ``input_scale``.
        state: float32 ``[operands, 4]`` or ``None``: A uses row 1 and G row 2, updated in place when ``update``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks of A, and of G, that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``: 32, 64 or 128.
        stochastic: Round stochastically: see :mod:`lightning_int8.kernels.rounding`.
        bias: Whether to write ``dbias``.

    Returns:
        A's ``low [M, NB·B]``, ``high [C, B, B]`` int8, ``slot [MB, NB]`` int32, ``scale [M]`` float32; G's
        ``low [N, MB·B]``, ``high [C, B, B]``, ``slot [NB, MB]``, ``scale [N]``; ``dbias`` float32 ``[N]``. What is not
        wanted comes back empty.
    """
    dy, rows, columns, row_blocks, column_blocks = check(dy, block)
    has_a, has_g = weight_scale is not None, input_scale is not None
    statistics = GradientStatistics.empty(dy, has_a, has_g, bias, capacity, block)
    if dy.numel() > 0 and (has_a or has_g or bias):
        with on(dy):
            gradient_statistics[(row_blocks * column_blocks,)](
                dy, input_scale, input_int_max, weight_scale, *statistics, rows, columns, *dy.stride(),
                B=block, **row_options("gradient_statistics", block, dy),
            )  # fmt: skip
    return gradient_from_statistics(
        dy, statistics, weight_scale, input_scale, state, seed_rate, capacity, block, update, stochastic
    )


class GradientStatistics(NamedTuple):
    """What the first read of ``dy [M, N]`` leaves: see `statistics.gradient_statistics`; ``None`` is not needed."""

    a_amax: Tensor | None
    a_weight: Tensor | None
    a_block_amax: Tensor | None
    g_amax: Tensor | None
    g_weight: Tensor | None
    g_block_amax: Tensor | None
    int_sums: Tensor | None
    column_sums: Tensor | None

    @classmethod
    def empty(
        cls, dy: Tensor, a: bool, g: bool, bias: bool, capacity: int, block: int, copies: tuple[int, ...] = ()
    ) -> GradientStatistics:
        """Room for the statistics of ``dy`` as A and as G, or of ``copies`` like it, uninitialized."""
        rows, columns = dy.shape
        new = _Allocator(dy.device, copies)
        row_blocks, column_blocks = blocks_along(rows, block), blocks_along(columns, block)
        return cls(
            new.int32(column_blocks, rows) if a else None,
            new.float32(column_blocks, rows) if a and (capacity > 0 or _may_bind(columns)) else None,
            new.int32(row_blocks, column_blocks) if a else None,
            new.int32(row_blocks, columns) if g else None,
            new.float32(row_blocks, columns) if g else None,
            new.int32(column_blocks, row_blocks) if g else None,
            new.float32(row_blocks) if g else None,
            new.float32(row_blocks, columns) if bias else None,
        )


def gradient_from_statistics(
    dy: Tensor,
    statistics: GradientStatistics,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `quantize_row_gradient` does after its first read, given what that read found."""
    dy, rows, columns, row_blocks, column_blocks = check(dy, block)
    new = _Allocator(dy.device)
    fallback, blocks = capacity > 0, row_blocks * column_blocks
    has_a, has_g, bias = weight_scale is not None, input_scale is not None, statistics.column_sums is not None

    def results(wanted: bool, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not wanted:
            return new.int8(0), new.int8(0), new.int32(0), new.float32(0)
        low, _, high, _, slot = _planes(new, rows, columns, capacity, block, False)
        return low, high, slot, new.float32(rows)

    a_low, a_high, a_slot, a_scale = results(has_a, rows, columns)
    g_low, g_high, g_slot, g_scale = results(has_g, columns, rows)
    dbias = new.float32(columns if bias else 0)
    out = a_low, a_high, a_slot, a_scale, g_low, g_high, g_slot, g_scale, dbias
    if dy.numel() == 0:
        for scale in (a_scale, g_scale):
            scale.fill_(MIN_SCALE)
        g_slot.fill_(-1)
        dbias.zero_()
        return out
    if not (has_a or has_g or bias):
        return out
    a_inverse, g_inverse = new.float32(rows), new.float32(columns)
    a_seed = new.int32(1) if has_a and stochastic else None
    g_seed = new.int32(1) if has_g and stochastic else None
    found = statistics
    with on(dy):
        gradient_select[(row_blocks + column_blocks, blocks_along(block, SELECT_ROWS))](
            found.a_block_amax, _operand(state, 1), found.a_amax, found.a_weight, _limit(columns), a_slot, a_scale,
            a_inverse, a_seed, found.g_block_amax, _operand(state, 2), found.g_amax, found.g_weight, found.int_sums,
            _INT32_LIMIT * 2.0**-31, g_slot, g_scale, g_inverse, g_seed, found.column_sums, dbias,
            seed_count(blocks, seed_rate), capacity, int(update), rows, columns,
            FALLBACK=fallback,
            **_select_sizes(block, blocks, max(row_blocks, column_blocks)),
        )  # fmt: skip
        if has_a or has_g:
            gradient_planes[_parts("gradient_planes", blocks, block)](
                dy, weight_scale, a_inverse, a_slot, a_seed, a_low, a_high if fallback else None,
                input_scale, g_inverse, g_slot, g_seed, g_low, g_high if fallback else None,
                rows, columns, *dy.stride(),
                B=block, **options("gradient_planes", block),
            )  # fmt: skip
    return out


def quantize_block(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantizes X, W or dY ``[R, Q]`` with one scale per block: arguments and results of `reference.quantize_block`.

    Equal to it bit for bit; entries of ``high`` past the number of fallback blocks are not written.

    Args:
        x: bfloat16, float16, float32 or float64 ``[R, Q]``, any strides; fast if one of them is 1.
        state: float32 ``[operands, 4]`` or ``None``; row ``operand`` is read, and updated in place when ``update``.
        operand: Row of ``state``.
        seed_rate: See `reference.fallback_mask`.
        capacity: Most blocks that may fall back; 0 turns fallback off.
        update: Whether ``state`` may change.
        block: Block edge ``B``: 32, 64 or 128.
        transpose: Whether to write ``low_t`` and ``high_t``.
        stochastic: Round the finest plane of each block stochastically.

    Returns:
        ``low [R, QB·B]``, ``low_t [Q, RB·B]``, ``high [C, B, B]`` (residuals), ``high_t [C, B, B]`` int8;
        ``slot [RB, QB]`` int32; ``scale [RB, QB]`` float32.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    new = _Allocator(x.device)
    low, low_t, high, high_t, slot = _planes(new, rows, columns, capacity, block, transpose)
    scale = new.float32(row_blocks, column_blocks)
    if x.numel() == 0:
        return low, low_t, high, high_t, slot, scale
    fallback, blocks = capacity > 0, row_blocks * column_blocks
    block_amax, seed = new.int32(row_blocks, column_blocks), new.int32(1) if stochastic else None
    with on(x):
        matrix_statistics[(blocks,)](
            x, None, None, block_amax, rows, columns, *x.stride(), B=block, **options("matrix_statistics", block)
        )
        matrix_select[(row_blocks, 1)](
            block_amax, _operand(state, operand), seed_count(blocks, seed_rate), capacity, int(update), slot, seed,
            scale, None, None, 0.0, None, None, None, rows, columns,
            FALLBACK=fallback, **_select_sizes(block, blocks, column_blocks),
        )  # fmt: skip
        block_planes[_parts("block_planes", blocks, block)](
            x, scale, slot, seed, low, low_t if transpose else None, high if fallback else None,
            high_t if fallback and transpose else None, rows, columns, *x.stride(),
            B=block, **options("block_planes", block),
        )  # fmt: skip
    return low, low_t, high, high_t, slot, scale


def transposed_integers(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """The ``low_t`` of `quantize_row` or `quantize_block` without fallback, in one read, given the scales it has found.

    Args:
        x: bfloat16, float16, float32 or float64 ``[R, Q]``, any strides; fast if one of them is 1.
        scale: Contiguous float32 ``[R]`` or ``[RB, QB]``.
        block: Block edge ``B``: 32, 64 or 128.

    Returns:
        int8 ``[Q, RB·B]``.
    """
    x, rows, columns, row_blocks, column_blocks = check(x, block)
    low_t = _Allocator(x.device).int8(columns, padded(rows, block))
    if x.numel() == 0:
        return low_t
    blocks = row_blocks * column_blocks
    with on(x):
        if scale.dim() == 1:
            row_planes[_parts("row_planes", blocks, block)](
                x, scale.reciprocal(), None, None, low_t, None, None, rows, columns, *x.stride(),
                B=block, **options("row_planes", block),
            )  # fmt: skip
        else:
            block_planes[_parts("block_planes", blocks, block)](
                x, scale, None, None, None, low_t, None, None, rows, columns, *x.stride(),
                B=block, **options("block_planes", block),
            )  # fmt: skip
    return low_t


class _Allocator:
    """Uninitialized tensors on one device."""

    def __init__(self, device: torch.device, copies: tuple[int, ...] = ()) -> None:
        self.device, self.copies = device, copies

    def int8(self, *size: int) -> Tensor:
        return torch.empty(self.copies + size, dtype=torch.int8, device=self.device)

    def int32(self, *size: int) -> Tensor:
        return torch.empty(self.copies + size, dtype=torch.int32, device=self.device)

    def float32(self, *size: int) -> Tensor:
        return torch.empty(self.copies + size, dtype=torch.float32, device=self.device)


def check(x: Tensor, block: int) -> tuple[Tensor, int, int, int, int]:
    """``x`` with strides that the kernels can take, and its size in elements and in blocks."""
    if block not in BLOCKS:
        raise ValueError(
            f"block={block} is not among the block sizes of the Triton kernels, {', '.join(map(str, BLOCKS))}; "
            "use one of them, or backend='reference'."
        )
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"the quantize kernels take a matrix of {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, "
            f"not {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}."
        )
    rows, columns = x.shape
    if max(rows, columns) * block >= 2**31:
        raise ValueError(f"the quantize kernels take at most {2**31 // block} rows and columns, not {tuple(x.shape)}.")
    if x.dtype is torch.float64:
        # What the reference does first, too.
        x = x.float()
    if sum(x.stride()) * block >= 2**31:
        # Offsets within a block are 32-bit.
        x = x.contiguous()
    return x, rows, columns, blocks_along(rows, block), blocks_along(columns, block)


def _planes(
    new: _Allocator, rows: int, columns: int, capacity: int, block: int, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``low``, ``low_t``, ``high``, ``high_t`` and ``slot``, uninitialized; transposed ones empty unless wanted."""
    return (
        new.int8(rows, padded(columns, block)),
        new.int8(columns, padded(rows, block)) if transpose else new.int8(0),
        new.int8(capacity, block, block),
        new.int8(capacity, block, block) if transpose else new.int8(0),
        new.int32(blocks_along(rows, block), blocks_along(columns, block)),
    )


def _limit(columns: int) -> float:
    """`L` of `reference.row_scale` in units of 2^31, for an other operand of ±127."""
    return (_INT32_LIMIT - INT8_MAX * columns) * 2.0**-31


def _may_bind(columns: int) -> bool:
    """Whether the INT32 bound can raise the scale of a row of integers within ±127, against an operand of the same."""
    return columns * INT8_MAX**2 > 0.99 * (_INT32_LIMIT - INT8_MAX * columns)


def _operand(state: Tensor | None, operand: int) -> Tensor | None:
    return None if state is None else state[operand]


def on(x: Tensor) -> torch.cuda.device_of:
    """Launches go to the current device; makes that the one of ``x`` (and does nothing on a CPU)."""
    return torch.cuda.device_of(x)


def options(kernel: str, block: int) -> dict:
    """What ``kernel`` is launched with, for blocks of edge ``block``."""
    # The reference rounds after each multiplication and addition, which fused ones would not.
    return {**OPTIONS[kernel][block], "enable_fp_fusion": False}


def row_options(kernel: str, block: int, x: Tensor) -> dict:
    """The same for a kernel that takes ``PART`` rows of ``x`` at a time: fewer if elements are wider than 16 bits."""
    found = options(kernel, block)
    return found | {"PART": max(found["PART"] * 2 // x.element_size(), 256 // block)}


def _parts(kernel: str, blocks: int, block: int) -> tuple[int]:
    return (blocks * (block // OPTIONS[kernel][block]["PART"]),)


def _select_sizes(block: int, blocks: int, along: int) -> dict:
    """How many blocks a select program takes in one step: of all, and along its row of blocks."""
    return {
        "B": block,
        "CHUNK": 512 if blocks <= 512 else 4096,
        "COLUMN_CHUNK": 8 if along <= 8 else 32 if along <= 32 else 128,
        "PART": min(SELECT_ROWS, block),
        "num_warps": SELECT_WARPS,
        # Left to itself, ptxas spills a register to get more warps on a multiprocessor than are launched.
        "maxnreg": 96,
        "enable_fp_fusion": False,
    }
