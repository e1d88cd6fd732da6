"""`QuantizedMatrix`: what a quantized GEMM operand is, and the block arithmetic everything here shares.

Every INT8 GEMM is the same product `a @ bᵀ` of two operands that lie contiguous along the contraction:
forward `X Wᵀ`, dgrad `(dY·t) Wᵀᵀ`, wgrad `(dY·s)ᵀ Xᵀᵀ`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

# Largest magnitude of an 8-bit integer, and of a 16-bit one whose high byte stays in [-127, 127].
INT8_MAX = 127
INT16_MAX = 256 * INT8_MAX
# Scales never go below this, so all-zero rows and blocks quantize to exact zeros without a special case.
MIN_SCALE = 2.0**-100
# A base step holds this many residual steps in `block` scaling: a residual is at most half a base step.
RESIDUAL_STEPS = 2 * INT8_MAX
# Above this many tokens the wgrad is done in pieces: see `reference.row_scale` for the bound it comes from.
MAX_WGRAD_TOKENS = 32768
# Fallback blocks that fit, relative to the band's upper end: room for a step that overshoots its band.
CAPACITY_SLACK = 1.25


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized matrix ``[R, Q]``, contiguous along the contraction ``Q``; ``B`` is the block edge.

    With ``RB = ceil(R / B)``, ``QB = ceil(Q / B)`` and ``C`` the capacity for fallback blocks:

    Attributes:
        low: int8 ``[R, QB·B]``, the base plane; columns from ``Q`` on are zero.
        high: int8 ``[C, B, B]``, the extra plane of the fallback blocks; entries past their number are undefined.
            ``None``: there is no fallback.
        slot: int32 ``[RB, QB]``, each block's index into ``high``, or -1. ``None``: there is no fallback.
        scale: float32 ``[R]`` with ``row`` scaling (``[groups, R]`` where groups of the contraction have their own: see
            :mod:`lightning_int8.kernels.groups`), ``[RB, QB]`` with ``block``; ``None`` where it runs along the
            contraction and the other operand has absorbed it.
        size: ``(R, Q)``.
        block: ``B``.
    """

    low: Tensor
    high: Tensor | None
    slot: Tensor | None
    scale: Tensor | None
    size: tuple[int, int]
    block: int


def blocks_along(length: int, block: int) -> int:
    """How many blocks of edge ``block`` cover ``length``."""
    return (length + block - 1) // block


def padded(length: int, block: int) -> int:
    """``length`` rounded up to whole blocks."""
    return blocks_along(length, block) * block


def groups_along(length: int, block: int, group_blocks: int) -> int:
    """How many groups of ``group_blocks`` blocks cover ``length``, at least one."""
    return max(1, blocks_along(length, block * group_blocks))


def seed_count(blocks: int, rate: float) -> int:
    """How many of ``blocks`` fall back at ``rate``: the nearest whole number, halves up."""
    return math.floor(rate * blocks + 0.5)


def fallback_capacity(blocks: int, band: tuple[float, float]) -> int:
    """How many of ``blocks`` may fall back at most when the rate should stay in ``band``.

    The upper end and a quarter more, for steps that overshoot before the delayed threshold follows. Should more blocks
    exceed the threshold, those with the largest AbsMax fall back, and the scales of the others stay correct.
    """
    return min(blocks, math.ceil(CAPACITY_SLACK * band[1] * blocks))
