"""Operands whose contraction a Hadamard transform has mixed, as opaque `torch.library` ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.ops import _define, _fake, _may_count, quantize_row
from lightning_int8.kernels.planes import padded
from lightning_int8.kernels.power import measure_power
from lightning_int8.kernels.replay import repeated

# Adjacent tokens, or features, that are mixed.
TOKENS = 128


def padded_tokens(tokens: int, block: int) -> int:
    """``tokens`` rounded up to whole transforms and whole blocks."""
    return padded(tokens, math.lcm(TOKENS, block))


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    """The function ``name``; both native backends share one."""
    if backend == "reference":
        module = "hadamard_reference"
    else:
        module = "hadamard" if name == "quantize_hadamard" else "hadamard_mixed"
    return repeated(backend, getattr(import_module(f"lightning_int8.kernels.{module}"), name))


@_define("quantize_hadamard")
def quantize_hadamard(
    x: Tensor, up: Tensor | None, block: int, sums: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_hadamard`."""
    return _implementation(backend, "quantize_hadamard")(x, up, block, sums)


@_fake("quantize_hadamard")
def _(x, up, block, sums, backend):
    rows, columns = x.shape
    low_t = x.new_empty(columns, padded_tokens(rows, block), dtype=torch.int8)
    return low_t, *(x.new_empty(size, dtype=torch.float32) for size in (columns, columns if sums else 0))


@_define("quantize_mixed", mutates=["state"])
def quantize_mixed(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    columns: bool,
    sums: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_mixed`; X (operand 0) counts once."""
    update = update and (operand != 0 or _may_count())
    out = _implementation(backend, "quantize_mixed")(
        x, state, operand, seed_rate, capacity, block, update, columns, sums
    )
    if update:
        # A row's mean square is that of its transformed features.
        measure_power(x, out[3], state, operand, backend)
    return out


@_fake("quantize_mixed")
def _(x, state, operand, seed_rate, capacity, block, update, columns, sums, backend):
    mixed = x.new_empty(x.shape[0], padded(x.shape[1], TOKENS))
    low, _, high, _, slot, scale, _ = quantize_row(
        mixed, state, operand, seed_rate, capacity, block, update, False, backend
    )
    if columns:
        return low, high, slot, scale, *quantize_hadamard(x, None, block, sums, backend)
    return low, high, slot, scale, low.new_empty(0), scale.new_empty(0), scale.new_empty(0)
