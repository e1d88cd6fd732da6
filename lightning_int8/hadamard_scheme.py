"""The default: a Hadamard transform mixes the contraction of all three GEMMs before their operands are quantized.

With R the orthogonal transform of each 128 adjacent rows or columns, which leaves products as they are:

    forward   Y  = (X Rᵀ)(W Rᵀ)ᵀ          in-features mixed
    dgrad     dX = (dY Rᵀ)(R W)           out-features mixed
    wgrad     dW = (R dY)ᵀ(R X)           tokens mixed

A value of a mixed operand holds a share of 128 others, large and small ones, so that one scale a row of each operand
and 8 bits leave little for fallback to do. X, dY and W are alike: each has an operand of its rows, with the columns
mixed, and one of its columns, with the rows mixed, and both come from the same two reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_int8.kernels import ops, swiglu_ops
from lightning_int8.kernels.hadamard_ops import TOKENS, quantize_hadamard, quantize_mixed
from lightning_int8.kernels.planes import QuantizedMatrix, padded
from lightning_int8.operands import BlockFallback, QuantizedGradient, QuantizedInput, QuantizedWeight


class HadamardScheme(BlockFallback):
    """One scale a row of each GEMM's operands, mixed; blocks of X for the forward and of dY for the dgrad fall back."""

    quantizes_once = False

    def quantize_input(self, x, weight, state, update, wgrad, backend):
        if not self.recipe.forward:
            return QuantizedInput(None, self._quantize_columns(x, None, backend) if wgrad else ())
        return self._quantize_input(x, state, update, wgrad, backend)

    def _quantize_input(
        self, x: Tensor, state: Tensor | None, update: bool, columns: bool, backend: str
    ) -> QuantizedInput:
        rate, capacity = self._fallback(x, self.recipe.activation_band)
        *rows, low_t, scale_t, _ = quantize_mixed(
            x, state, 0, rate, capacity, self.block, update, columns, False, backend
        )
        return QuantizedInput(self._rows(rows, capacity), (low_t, scale_t) if columns else ())

    def _blocks(self, rows: int, columns: int) -> int:
        return super()._blocks(rows, padded(columns, TOKENS))

    def _rows(self, planes: Sequence[Tensor], capacity: int) -> QuantizedMatrix:
        low, high, slot, scale = planes
        return self._matrix(low, high, slot, scale, tuple(low.shape), capacity)

    def _quantize_columns(self, x: Tensor, up: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        low_t, scale_t, _ = quantize_hadamard(x, up, self.block, False, backend)
        return low_t, scale_t

    def _columns(self, low_t: Tensor, scale: Tensor) -> QuantizedMatrix:
        return QuantizedMatrix(low_t, None, None, scale, tuple(low_t.shape), self.block)

    def quantize_swiglu(
        self, gate: Tensor, up: Tensor, state: Tensor | None, update: bool, wgrad: bool, recompute: bool, backend: str
    ) -> QuantizedInput:
        """As `RowScheme.quantize_swiglu`."""
        h = swiglu_ops.swiglu(gate, up, backend)
        return self._quantize_input(h, state, update, wgrad and not recompute, backend)

    def swiglu_saved(self, gate: Tensor, up: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        """As `RowScheme.swiglu_saved`."""
        return self._quantize_columns(gate, up, backend)

    def quantize_weight(self, weight, dgrad, backend):
        *rows, low_t, scale_t, _ = quantize_mixed(weight, None, 0, 0.0, 0, self.block, False, dgrad, False, backend)
        return QuantizedWeight(self._rows(rows, 0), self._columns(low_t, scale_t) if dgrad else None)

    def quantize_weight_for_dgrad(self, weight, scale, backend):
        return QuantizedWeight(None, self._columns(*self._quantize_columns(weight, None, backend)))

    def quantize_gradient(self, dy, weight, saved, size, state, update, bias, backend, statistics=()):
        dgrad = wgrad = dbias = None
        if weight is not None:
            rate, capacity = self._fallback(dy, self.recipe.gradient_band)
            # torch.compile cannot trace bool(saved).
            columns = saved is not None and len(saved) > 0
            *rows, low_t, scale_t, sums = quantize_mixed(
                dy, state, 1, rate, capacity, self.block, update, columns, columns and bias, backend
            )
            dgrad = self._rows(rows, capacity)
            if columns:
                wgrad, dbias = self._columns(low_t, scale_t), sums if bias else None
        elif saved:
            # Summed up in the op, where the order of the sums is the same whether it is compiled or not.
            low_t, scale_t, sums = quantize_hadamard(dy, None, self.block, bias, backend)
            wgrad, dbias = self._columns(low_t, scale_t), sums if bias else None
        if bias and dbias is None:
            dbias = dy.sum(0, dtype=torch.float32)
        return QuantizedGradient(dgrad, wgrad, self._columns(*saved) if saved else None, dbias)

    def swiglu_gradient(
        self,
        dh: Tensor,
        gate: Tensor,
        up: Tensor,
        weights: Sequence[QuantizedWeight | None],
        saved: Sequence[Tensor],
        bias: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        """As `RowScheme.swiglu_gradient`; nothing of mixed gradients is known before they are mixed."""
        dgate, *_ = swiglu_ops.swiglu_gradient(dh, gate, up, None, None, None, None, 0, self.block, False, backend)
        return (dgate,)

    def gemm(self, a, b, bias, out_dtype, backend):
        return ops.gemm_row(a, b, bias, out_dtype, backend)
