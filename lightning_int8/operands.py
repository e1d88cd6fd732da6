"""What a scheme makes of X, W and dY for the three GEMMs, and the interface that all schemes share.

`int8_linear` asks a scheme for X's operands, W's operands and dY's operands, and multiplies pairs of them. What X's
quantization must keep for the backward is a tuple of tensors, so that autograd can hold it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along, fallback_capacity
from lightning_int8.recipe import Int8Recipe


class QuantizedInput(NamedTuple):
    """X for the forward GEMM (or ``None``: it is not INT8), what to keep for the wgrad, what the product leaves out."""

    operand: QuantizedMatrix | None
    saved: tuple[Tensor, ...]
    remainder: Tensor | None = None


class QuantizedWeight(NamedTuple):
    """W for the forward GEMM, Wᵀ for the dgrad, and ``fold``, the scale that dY must absorb there (or ``None``)."""

    forward: QuantizedMatrix | None
    dgrad: QuantizedMatrix | None = None
    fold: Tensor | None = None


class QuantizedGradient(NamedTuple):
    """dY for the dgrad, dYᵀ for the wgrad with the Xᵀ it meets there, and the bias gradient if it came with them."""

    dgrad: QuantizedMatrix | None
    wgrad: QuantizedMatrix | None
    input_transposed: QuantizedMatrix | None
    dbias: Tensor | None


class Scheme(Protocol):
    """One scaling. ``backend`` is the resolved one (see :mod:`lightning_int8.kernels.backends`).

    Attributes:
        quantizes_once: Whether one quantization of a matrix serves both of the GEMMs that take it.
    """

    quantizes_once: bool

    def quantize_input(
        self, x: Tensor, weight: Tensor, state: Tensor | None, update: bool, wgrad: bool, backend: str
    ) -> QuantizedInput:
        """X ``[M, K]``; ``wgrad``: the transposed planes will be needed."""
        ...

    def quantize_weight(self, weight: Tensor, dgrad: bool, backend: str) -> QuantizedWeight:
        """W ``[N, K]`` for the forward, and with ``dgrad`` for that as well."""
        ...

    def quantize_weight_for_dgrad(self, weight: Tensor, scale: Tensor | None, backend: str) -> QuantizedWeight:
        """W for the dgrad; with ``quantizes_once`` it is read once, given the ``scale`` of its forward operand."""
        ...

    def quantize_gradient(
        self,
        dy: Tensor,
        weight: QuantizedWeight | None,
        saved: tuple[Tensor, ...] | None,
        size: tuple[int, int],
        state: Tensor | None,
        update: bool,
        bias: bool,
        backend: str,
    ) -> QuantizedGradient:
        """DY ``[M, N]``; ``weight`` and ``saved`` are ``None`` when the dgrad or wgrad is not wanted; X is ``size``."""
        ...

    def gemm(
        self, a: QuantizedMatrix, b: QuantizedMatrix, bias: Tensor | None, out_dtype: torch.dtype, backend: str
    ) -> Tensor:
        """``a @ bᵀ + bias``."""
        ...


class BlockFallback:
    """What schemes with fallback share: blocks, bands and capacities."""

    quantizes_once = True

    def __init__(self, recipe: Int8Recipe) -> None:
        self.recipe = recipe
        self.block = recipe.block_size

    def _fallback(self, x: Tensor, band: tuple[float, float]) -> tuple[float, int]:
        """The rate that seeds a threshold, and how many of ``x``'s blocks may fall back."""
        budget = self.recipe.budget
        rate = (band[0] + band[1]) / 2 if budget is None else min(budget, band[1])
        return rate, fallback_capacity(self._blocks(*x.shape), band)

    def _blocks(self, rows: int, columns: int) -> int:
        return blocks_along(rows, self.block) * blocks_along(columns, self.block)

    def _matrix(
        self, low: Tensor, high: Tensor, slot: Tensor, scale: Tensor | None, size: tuple[int, int], capacity: int
    ) -> QuantizedMatrix:
        if capacity == 0:
            return QuantizedMatrix(low, None, None, scale, size, self.block)
        return QuantizedMatrix(low, high, slot, scale, size, self.block)

    def _transposed(
        self, low_t: Tensor, high_t: Tensor, slot: Tensor, scale: Tensor | None, size: tuple[int, int]
    ) -> QuantizedMatrix:
        """The operand whose untransposed matrix has ``slot``, ``scale`` and ``size``."""
        scale_t = None if scale is None else scale.t().contiguous()
        return self._matrix(low_t, high_t, slot.t().contiguous(), scale_t, size[::-1], high_t.shape[0])
