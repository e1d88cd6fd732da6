"""The fused SwiGLU steps as opaque `torch.library` ops, beside those of :mod:`lightning_int8.kernels.ops`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.ops import _define, _fake, _may_count, quantize_row
from lightning_int8.kernels.planes import padded
from lightning_int8.kernels.power import measure_power
from lightning_int8.kernels.replay import repeated


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    """The function ``name``; both native backends share one."""
    if backend == "reference":
        module = "swiglu_reference"
    else:
        module = "swiglu_planes" if name == "swiglu_planes" else "swiglu"
    function = getattr(import_module(f"lightning_int8.kernels.{module}"), name)
    if name == "swiglu_gradient":
        function = _writing_over(function)
    return repeated(backend, function)


def _writing_over(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """``swiglu_gradient`` with ``dup`` written over ``dh`` and not returned."""

    def over(dh: Tensor, *args: Any) -> tuple[Tensor, ...]:
        dgate, _, *statistics = gradient(dh, *args, dup=dh)
        return dgate, *statistics

    return over


@_define("swiglu")
def swiglu(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    """See :func:`lightning_int8.kernels.swiglu_reference.swiglu`."""
    return _implementation(backend, "swiglu")(gate, up)


@_fake("swiglu")
def _(gate, up, backend):
    return gate.new_empty(gate.shape)


@_define("swiglu_row", mutates=["state"])
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.swiglu_reference.swiglu_row`; ``state`` counts once under checkpointing."""
    update = update and _may_count()
    h, *planes = _implementation(backend, "swiglu_row")(
        gate, up, state, operand, seed_rate, capacity, block, update, transpose
    )
    if update:
        measure_power(h, planes[5], state, operand, backend)
    return h, *planes


@_fake("swiglu_row")
def _(gate, up, state, operand, seed_rate, capacity, block, update, transpose, backend):
    h = gate.new_empty(gate.shape)
    return h, *quantize_row(h, state, operand, seed_rate, capacity, block, update, transpose, backend)


@_define("swiglu_gradient", mutates=["dh"])
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.swiglu.swiglu_gradient`; ``dh``, contiguous, becomes the gradient of ``up``."""
    return _implementation(backend, "swiglu_gradient")(
        dh, gate, up, gate_scale, up_scale, input_scale, input_int_max, capacity, block, bias
    )


@_fake("swiglu_gradient")
def _(dh, gate, up, gate_scale, up_scale, input_scale, input_int_max, capacity, block, bias, backend):
    dgate = torch.empty_like(gate)
    if backend == "reference":
        return dgate, *(gate.new_empty(2, 0) for _ in range(8))
    from lightning_int8.kernels.quantize_gradient import GradientStatistics

    pair = GradientStatistics.empty(
        gate, gate_scale is not None, input_scale is not None, bias, capacity, block, copies=(2,)
    )
    return dgate, *(gate.new_empty(2, 0) if part is None else part for part in pair)


@_define("swiglu_planes")
def swiglu_planes(
    gate: Tensor, up: Tensor, scale: Tensor, slot: Tensor, capacity: int, block: int, backend: str
) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.swiglu_planes.swiglu_planes`."""
    return _implementation(backend, "swiglu_planes")(gate, up, scale, slot, capacity, block)


@_fake("swiglu_planes")
def _(gate, up, scale, slot, capacity, block, backend):
    rows, columns = gate.shape
    low_t = gate.new_empty(columns, padded(rows, block), dtype=torch.int8)
    return low_t, gate.new_empty(capacity, block, block, dtype=torch.int8)
