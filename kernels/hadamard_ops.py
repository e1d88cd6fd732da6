"""Operands with tokens or features mixed by a Hadamard transform, as opaque `torch.library` ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.ops import _define, _fake, _may_count, quantize_row, quantize_row_gradient
from lightning_int8.kernels.planes import padded
from lightning_int8.kernels.power import measure_gradient_power, measure_power
from lightning_int8.kernels.replay import repeated

# Adjacent tokens, or features, that are mixed.
TOKENS = 128
# Where the native backends have their functions.
_MODULES = {
    "quantize_hadamard": "hadamard",
    "quantize_row_hadamard": "hadamard_fused",
    "swiglu_row_hadamard": "hadamard_fused",
    "quantize_row_gradient_hadamard": "hadamard_fused",
    "quantize_row_mixed": "hadamard_mixed",
    "swiglu_row_mixed": "hadamard_mixed",
    "quantize_weight_mixed": "hadamard_features",
}


def padded_tokens(tokens: int, block: int) -> int:
    """``tokens`` rounded up to whole transforms and whole blocks."""
    return padded(tokens, math.lcm(TOKENS, block))


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    """The function ``name``; both native backends share one."""
    if backend == "reference":
        module = "hadamard_reference"
    else:
        module = _MODULES[name]
    return repeated(backend, getattr(import_module(f"lightning_int8.kernels.{module}"), name))


@_define("quantize_hadamard")
def quantize_hadamard(x: Tensor, up: Tensor | None, block: int, backend: str) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_hadamard`."""
    return _implementation(backend, "quantize_hadamard")(x, up, block)


@_fake("quantize_hadamard")
def _(x, up, block, backend):
    rows, columns = x.shape
    low_t = x.new_empty(columns, padded_tokens(rows, block), dtype=torch.int8)
    return low_t, x.new_empty(columns, dtype=torch.float32)


@_define("quantize_row_hadamard", mutates=["state"])
def quantize_row_hadamard(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_row_hadamard`; counts as `ops.quantize_row`."""
    update = update and _may_count()
    out = _implementation(backend, "quantize_row_hadamard")(x, state, operand, seed_rate, capacity, block, update)
    if update:
        measure_power(x, out[3], state, operand, backend)
    return out


@_fake("quantize_row_hadamard")
def _(x, state, operand, seed_rate, capacity, block, update, backend):
    low, _, high, _, slot, scale, _ = quantize_row(
        x, state, operand, seed_rate, capacity, block, update, False, backend
    )
    return low, high, slot, scale, *quantize_hadamard(x, None, block, backend)


@_define("swiglu_row_hadamard", mutates=["state"])
def swiglu_row_hadamard(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.swiglu_row_hadamard`; counts as `ops.quantize_row`."""
    update = update and _may_count()
    h, *out = _implementation(backend, "swiglu_row_hadamard")(
        gate, up, state, operand, seed_rate, capacity, block, update
    )
    if update:
        measure_power(h, out[3], state, operand, backend)
    return h, *out


@_fake("swiglu_row_hadamard")
def _(gate, up, state, operand, seed_rate, capacity, block, update, backend):
    h = gate.new_empty(gate.shape)
    return h, *quantize_row_hadamard(h, state, operand, seed_rate, capacity, block, update, backend)


@_define("quantize_row_mixed", mutates=["state"])
def quantize_row_mixed(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    wgrad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_row_mixed`; counts as `ops.quantize_row`."""
    update = update and _may_count()
    out = _implementation(backend, "quantize_row_mixed")(x, state, operand, seed_rate, capacity, block, update, wgrad)
    if update:
        # A row's mean square is that of its transformed features.
        measure_power(x, out[3], state, operand, backend)
    return out


@_fake("quantize_row_mixed")
def _(x, state, operand, seed_rate, capacity, block, update, wgrad, backend):
    mixed = x.new_empty(x.shape[0], padded(x.shape[1], TOKENS))
    low, _, high, _, slot, scale, _ = quantize_row(
        mixed, state, operand, seed_rate, capacity, block, update, False, backend
    )
    if wgrad:
        return low, high, slot, scale, *quantize_hadamard(x, None, block, backend)
    return low, high, slot, scale, low.new_empty(0), scale.new_empty(0)


@_define("swiglu_row_mixed", mutates=["state"])
def swiglu_row_mixed(
    gate: Tensor,
    up: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    wgrad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.swiglu_row_mixed`; counts as `ops.quantize_row`."""
    update = update and _may_count()
    h, *out = _implementation(backend, "swiglu_row_mixed")(
        gate, up, state, operand, seed_rate, capacity, block, update, wgrad
    )
    if update:
        measure_power(h, out[3], state, operand, backend)
    return h, *out


@_fake("swiglu_row_mixed")
def _(gate, up, state, operand, seed_rate, capacity, block, update, wgrad, backend):
    h = gate.new_empty(gate.shape)
    return h, *quantize_row_mixed(h, state, operand, seed_rate, capacity, block, update, wgrad, backend)


@_define("quantize_weight_mixed")
def quantize_weight_mixed(
    weight: Tensor, block: int, transposed: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_weight_mixed`."""
    return _implementation(backend, "quantize_weight_mixed")(weight, block, transposed)


@_fake("quantize_weight_mixed")
def _(weight, block, transposed, backend):
    rows, columns = weight.shape
    low = weight.new_empty(rows, padded(padded(columns, TOKENS), block), dtype=torch.int8)
    scale, plain_scale = (weight.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return low, scale, plain_scale, low.new_empty((columns, padded(rows, block)) if transposed else 0)


@_define("quantize_row_gradient_hadamard", mutates=["state"])
def quantize_row_gradient_hadamard(
    dy: Tensor,
    weight_scale: Tensor,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    bias: bool,
    backend: str,
    statistics: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_row_gradient_hadamard`."""
    out = _implementation(backend, "quantize_row_gradient_hadamard")(
        dy, weight_scale, state, seed_rate, capacity, block, update, bias, statistics
    )
    if update:
        measure_gradient_power(dy, weight_scale, None, out[3], None, state, backend)
    return out


@_fake("quantize_row_gradient_hadamard")
def _(dy, weight_scale, state, seed_rate, capacity, block, update, bias, backend, statistics):
    low, high, slot, scale, *_, dbias = quantize_row_gradient(
        dy, weight_scale, None, None, state, seed_rate, capacity, block, update, "nothing", bias, backend, statistics
    )
    return low, high, slot, scale, dbias, *quantize_hadamard(dy, None, block, backend)
