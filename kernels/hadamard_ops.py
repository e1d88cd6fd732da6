"""A wgrad operand with the tokens mixed by a Hadamard transform, as an opaque `torch.library` op."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lightning_int8.kernels.ops import _define, _fake, _repeated
from lightning_int8.kernels.planes import padded

# Adjacent tokens that are mixed.
TOKENS = 128


def padded_tokens(tokens: int, block: int) -> int:
    """``tokens`` rounded up to whole transforms and whole blocks."""
    return padded(tokens, math.lcm(TOKENS, block))


@functools.cache
def _implementation(backend: str) -> Callable[..., Any]:
    """The function; both native backends share one."""
    module = "hadamard_reference" if backend == "reference" else "hadamard"
    return _repeated(backend, import_module(f"lightning_int8.kernels.{module}").quantize_hadamard)


@_define("quantize_hadamard")
def quantize_hadamard(x: Tensor, up: Tensor | None, block: int, backend: str) -> tuple[Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.hadamard_reference.quantize_hadamard`."""
    return _implementation(backend)(x, up, block)


@_fake("quantize_hadamard")
def _(x, up, block, backend):
    rows, columns = x.shape
    low_t = x.new_empty(columns, padded_tokens(rows, block), dtype=torch.int8)
    return low_t, x.new_empty(columns, dtype=torch.float32)
