"""Stochastic rounding whose noise is a hash of the data: no generator state, so replays and resumed runs repeat it.

The seed is the exclusive or of all finite block AbsMax values, as bit patterns. It differs from step to step and from
rank to rank as the data does, and is the same whenever the same tensor is quantized again.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """32-bit integer hash (the "lowbias32" constants of C. Wellons' hash prospector), on int64 holding uint32."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def data_seed(block_amax: Tensor) -> int:
    """Exclusive or of the float32 bit patterns of ``block_amax``, as an unsigned 32-bit number.

    Blocks with NaN (which has many bit patterns) or an infinity count as zero.
    """
    bits = block_amax.where(block_amax.isfinite(), 0.0).contiguous().view(torch.int32).flatten().tolist()
    seed = 0
    for value in bits:
        seed ^= value & _MASK
    return seed


def uniform(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), float32 ``[rows, columns]``, a pure function of ``seed`` and the element's position.

    The upper 24 bits of a hash of ``mix(row ^ seed) ^ (column · 0x9E3779B1)``, which leaves few instructions for each
    element: what depends on the row or the column alone is computed once for it.
    """
    row = _mix(torch.arange(rows, dtype=torch.int64, device=device) ^ seed)
    column = (torch.arange(columns, dtype=torch.int64, device=device) * 0x9E3779B1) & _MASK
    h = ((row[:, None] ^ column) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return (h >> 8).to(torch.float32) * 2.0**-24
