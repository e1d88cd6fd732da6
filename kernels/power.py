"""How large a quantized operand's errors are, and how large it is itself: what a fallback budget weighs.

The ops that quantize take these sums, rather than ops of their own: Inductor writes a tensor once for each op that
reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from lightning_int8.kernels.replay import repeated

# Columns of a layer's state, behind those that the quantize kernels write; it has them under a budget only.
POWER_SUM, STEP_SUM, POWER_COUNT = 5, 6, 7
_SAMPLED_ROWS = 256


def sampling(rows: int) -> tuple[int, int]:
    """Distance of the rows that are read, and their number: about 256.

    The distance is odd, so that they fall on all positions of sequences of any even length.
    """
    distance = max(1, rows // _SAMPLED_ROWS) | 1
    return distance, -(-rows // distance)


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    """The function ``name``; both native backends share one."""
    module = "power_reference" if backend == "reference" else "power_sums"
    return repeated(backend, getattr(import_module(f"lightning_int8.kernels.{module}"), name))


def measure_power(x: Tensor, step: Tensor | None, state: Tensor | None, operand: int, backend: str) -> None:
    """See :func:`lightning_int8.kernels.power_reference.measure_power`; nothing where ``state`` has no columns for it.

    Args:
        x: See there, also for what follows.
        step: Contiguous.
        state: Contiguous.
        operand: Row of ``state``.
        backend: Who runs it.
    """
    if _is_wanted(x, state):
        _implementation(backend, "measure_power")(x, step, state, operand)


def measure_gradient_power(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    a_step: Tensor,
    g_step: Tensor,
    state: Tensor | None,
    backend: str,
) -> None:
    """See :func:`lightning_int8.kernels.power_reference.measure_gradient_power`, and `measure_power`.

    Args:
        dy: See there, also for what follows.
        weight_scale: Contiguous.
        input_scale: Contiguous.
        a_step: Contiguous.
        g_step: Contiguous; unused without ``input_scale``.
        state: Contiguous.
        backend: Who runs it.
    """
    if _is_wanted(dy, state) and not (weight_scale is None and input_scale is None):
        _implementation(backend, "measure_gradient_power")(dy, weight_scale, input_scale, a_step, g_step, state)


def _is_wanted(x: Tensor, state: Tensor | None) -> bool:
    return state is not None and state.shape[1] > POWER_COUNT and x.numel() > 0
