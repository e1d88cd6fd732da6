"""The mean square of a quantized operand, from a sample of its rows: what a fallback budget weighs errors against."""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a layer's state, behind those that the quantize kernels write.
POWER_SUM, POWER_COUNT = 5, 6
SAMPLED_ROWS = 256


@torch.library.custom_op("lightning_int8::measure_power", mutates_args=("state",))
def measure_power(
    x: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, state: Tensor, operand: int, update: bool
) -> None:
    """Adds the mean square of ``diag(row_scale)·x·diag(column_scale)`` to ``state``, and 1 to its count.

    About 256 rows are read, at an odd distance, so that they fall on all positions of sequences of any even length.
    What is not finite is left out.

    Args:
        x: float ``[R, Q]``.
        row_scale: float32 ``[R]``, or ``None`` for ones.
        column_scale: float32 ``[Q]``, or ``None`` for ones.
        state: float32 ``[operands, columns]`` with at least 7 columns; row ``operand`` changes in place.
        operand: Row of ``state``.
        update: Whether ``state`` may change.
    """
    if not update or torch.is_inference_mode_enabled() or x.numel() == 0:
        return
    step = max(1, x.shape[0] // SAMPLED_ROWS) | 1
    sample = x[::step].float()
    if row_scale is not None:
        sample = sample * row_scale[::step, None]
    if column_scale is not None:
        sample = sample * column_scale
    power = sample.square().mean()
    finite = power.isfinite()
    state[operand, POWER_SUM : POWER_COUNT + 1] += torch.stack([power.where(finite, 0.0), finite.float()])


@measure_power.register_fake
def _(x, row_scale, column_scale, state, operand, update):
    return None
