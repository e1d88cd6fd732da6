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
    What is not finite is left out.

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
    sample = x[::distance].float()
    if row_scale is not None:
        sample = sample * row_scale[::distance, None]
    if column_scale is not None:
        sample = sample * column_scale
    power = sample.square().mean()
    error = torch.zeros_like(power) if step is None else step.square().mean()
    finite = (power + error).isfinite()
    both = torch.stack([power, error]).where(finite, 0.0)
    state[operand, POWER_SUM : POWER_COUNT + 1] += torch.cat([both, finite.float()[None]])


@measure_power.register_fake
def _(x, row_scale, column_scale, step, state, operand, update):
    return None
