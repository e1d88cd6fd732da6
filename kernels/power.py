"""How large a quantized operand's errors are, and how large it is itself: what a fallback budget weighs."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a layer's state, behind those that the quantize kernels write.
POWER_SUM, STEP_SUM, POWER_COUNT = 5, 6, 7
SAMPLED_ROWS = 256


@torch.library.custom_op("lightning_int8::measure_power", mutates_args=("state",))
def measure_power(
    x: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    step: Tensor | None,
    state: Tensor,
    operand: int,
    update: bool,
) -> None:
    """Adds the mean squares of ``diag(row_scale)·x·diag(column_scale)`` and of ``step`` to ``state``; 1 to the count.

    About 256 rows are read, at an odd distance, so that they fall on all positions of sequences of any even length.

    Args:
        x: float ``[R, Q]``.
        row_scale: float32 ``[R]``, or ``None`` for ones.
        column_scale: float32 ``[Q]``, or ``None`` for ones.
        step: float32, any shape: the scales that the operand was quantized with. ``None`` counts as zero.
        state: float32 ``[operands, columns]`` with at least 8 columns; row ``operand`` changes in place.
        operand: Row of ``state``.
        update: Whether ``state`` may change.
    """
    if not update or torch.is_inference_mode_enabled() or x.numel() == 0:
        return
    distance = max(1, x.shape[0] // SAMPLED_ROWS) | 1
    sample = x[::distance]
    if x.dtype == torch.float64:
        sample = sample.float()
    if row_scale is not None:
        sample = sample * row_scale[::distance, None]
    if column_scale is not None:
        sample = sample * column_scale
    power = torch.linalg.vector_norm(sample, dtype=torch.float32)
    # Sizes go to the kernels as numbers: a tensor kept from one call to the next would lie in a CUDA graph's memory.
    sums = state[operand]
    sums[POWER_SUM].addcmul_(power, power, value=1.0 / sample.numel())
    if step is not None:
        error = torch.linalg.vector_norm(step)
        sums[STEP_SUM].addcmul_(error, error, value=1.0 / step.numel())
    sums[POWER_COUNT].add_(1.0)


@measure_power.register_fake
def _(x, row_scale, column_scale, step, state, operand, update):
    return None
