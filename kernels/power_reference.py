"""The ground truth of the ops in :mod:`lightning_int8.kernels.power`."""

from __future__ import annotations

from torch import Tensor

from lightning_int8.kernels.power import POWER_COUNT, POWER_SUM, STEP_SUM, sampling


def measure_power(x: Tensor, step: Tensor | None, state: Tensor, operand: int) -> None:
    """Adds the mean squares of ``x`` and of ``step`` to a row of ``state``, and 1 to its count.

    About 256 rows of ``x`` are read, see `sampling`.

    Args:
        x: float ``[R, Q]``, at least one element.
        step: float32, any shape: the scales that the operand was quantized with. ``None`` counts as zero.
        state: float32 ``[operands, columns]`` with at least 8 columns; row ``operand`` changes in place.
        operand: Row of ``state``.
    """
    _add(x[:: sampling(x.shape[0])[0]].float(), step, state[operand])


def measure_gradient_power(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    a_step: Tensor,
    g_step: Tensor,
    state: Tensor,
) -> None:
    """The same for both operands that the backward makes of ``dy``, in the rows 1 and 2 of ``state``.

    Args:
        dy: float ``[M, N]``, at least one element.
        weight_scale: t, float32 ``[N]``: A is ``dy·diag(t)``. ``None``: no A.
        input_scale: s, float32 ``[M]``: G is ``(diag(s)·dy)ᵀ``. ``None``: no G.
        a_step: Scales of A, float32, any shape.
        g_step: Scales of G, float32, any shape.
        state: float32 ``[operands, columns]``, as above.
    """
    distance, _ = sampling(dy.shape[0])
    sample = dy[::distance].float()
    if weight_scale is not None:
        _add(sample * weight_scale, a_step, state[1])
    if input_scale is not None:
        _add(sample * input_scale[::distance, None], g_step, state[2])


def _add(sample: Tensor, step: Tensor | None, sums: Tensor) -> None:
    sums[POWER_SUM] += sample.square().mean()
    if step is not None:
        sums[STEP_SUM] += step.square().mean()
    sums[POWER_COUNT] += 1.0
