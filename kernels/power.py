"""How large a quantized operand's errors are, and how large it is itself: what a fallback budget weighs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.ops import _define, _fake, _may_count, _repeated

# Columns of a layer's state, behind those that the quantize kernels write.
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
    return _repeated(backend, getattr(import_module(f"lightning_int8.kernels.{module}"), name))


@_define("measure_power", mutates=["state"])
def measure_power(x: Tensor, step: Tensor | None, state: Tensor, operand: int, update: bool, backend: str) -> None:
    """See :func:`lightning_int8.kernels.power_reference.measure_power`; X, operand 0, counts once under checkpointing.

    Args:
        x: See there, also for what follows.
        step: Contiguous.
        state: Contiguous.
        operand: Row of ``state``.
        update: Whether ``state`` may change; it does not under inference mode.
        backend: Who runs it.
    """
    # Operand 0 is measured in the forward, the others in the backward.
    if update and x.numel() > 0 and (_may_count() if operand == 0 else not torch.is_inference_mode_enabled()):
        _implementation(backend, "measure_power")(x, step, state, operand)


@_fake("measure_power")
def _(x, step, state, operand, update, backend):
    return None


@_define("measure_gradient_power", mutates=["state"])
def measure_gradient_power(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    a_step: Tensor,
    g_step: Tensor,
    state: Tensor,
    update: bool,
    backend: str,
) -> None:
    """See :func:`lightning_int8.kernels.power_reference.measure_gradient_power`.

    Args:
        dy: See there, also for what follows.
        weight_scale: Contiguous.
        input_scale: Contiguous.
        a_step: Contiguous.
        g_step: Contiguous.
        state: Contiguous.
        update: Whether ``state`` may change.
        backend: Who runs it.
    """
    if update and dy.numel() > 0 and not (weight_scale is None and input_scale is None):
        _implementation(backend, "measure_gradient_power")(dy, weight_scale, input_scale, a_step, g_step, state)


@_fake("measure_gradient_power")
def _(dy, weight_scale, input_scale, a_step, g_step, state, update, backend):
    return None
