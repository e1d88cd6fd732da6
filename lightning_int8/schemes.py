"""What each scaling quantizes, and which operands its three GEMMs take. One small class a scaling, one interface.

`int8_linear` asks a scheme for X's operands, W's operands and dY's operands, and multiplies pairs of them. What X's
quantization must keep for the backward is a tuple of tensors, so that autograd can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels import ops, swiglu_ops
from lightning_int8.kernels.hadamard_ops import (
    TOKENS,
    quantize_hadamard,
    quantize_row_gradient_hadamard,
    quantize_row_hadamard,
    quantize_row_mixed,
    quantize_weight_mixed,
    swiglu_row_hadamard,
    swiglu_row_mixed,
)
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along, fallback_capacity, padded
from lightning_int8.recipe import Int8Recipe


class QuantizedInput(NamedTuple):
    """X for the forward GEMM (or ``None``: it is not INT8), what to keep for the wgrad, what the product leaves out."""

    operand: QuantizedMatrix | None
    saved: tuple[Tensor, ...]
    remainder: Tensor | None = None


class QuantizedWeight(NamedTuple):
    """W for the forward GEMM, Wᵀ for the dgrad, and what `Scheme.transpose_weight` takes, if W is quantized once.

    ``scale`` is that of W as it is; of `row`, the dgrad's dY absorbs it.
    """

    forward: QuantizedMatrix | None
    dgrad: QuantizedMatrix | None = None
    scale: Tensor | None = None


class QuantizedGradient(NamedTuple):
    """dY for the dgrad, dYᵀ for the wgrad with the Xᵀ it meets there, and the bias gradient if it came with them."""

    dgrad: QuantizedMatrix | None
    wgrad: QuantizedMatrix | None
    input_transposed: QuantizedMatrix | None
    dbias: Tensor | None


class Scheme(Protocol):
    """One scaling. ``backend`` is the resolved one (see :mod:`lightning_int8.kernels.backends`).

    Attributes:
        quantizes_weight_once: Whether one quantization of W serves the forward and the dgrad.
    """

    quantizes_weight_once: bool

    def quantize_input(
        self, x: Tensor, weight: Tensor, state: Tensor | None, update: bool, wgrad: bool, backend: str
    ) -> QuantizedInput:
        """X ``[M, K]``; ``wgrad``: the transposed planes will be needed."""
        ...

    def quantize_weight(self, weight: Tensor, transposed: bool, backend: str) -> QuantizedWeight:
        """W ``[N, K]`` for the forward, or with ``transposed`` for the dgrad (and the forward, if that comes along)."""
        ...

    def transpose_weight(self, weight: Tensor, scale: Tensor, backend: str) -> QuantizedWeight:
        """W for the dgrad, given the scale `quantize_weight` found: read once. Only if ``quantizes_weight_once``."""
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


class _BlockFallback:
    """What `row` and `block` share: blocks, bands and capacities."""

    quantizes_weight_once = True

    def __init__(self, recipe: Int8Recipe) -> None:
        self.recipe = recipe
        self.block = recipe.block_size

    def _fallback(self, size: Sequence[int], band: tuple[float, float]) -> tuple[float, int]:
        """The rate that seeds a threshold, and how many blocks of a matrix of ``size`` may fall back."""
        blocks = blocks_along(size[0], self.block) * blocks_along(size[1], self.block)
        budget = self.recipe.budget
        rate = (band[0] + band[1]) / 2 if budget is None else min(budget, band[1])
        return rate, fallback_capacity(blocks, band)

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


class RowScheme(_BlockFallback):
    """One scale a row; the backward folds W's scales into dY, so W is quantized once.

    For the wgrad X and dY are quantized apart, transformed (``wgrad_hadamard``). Otherwise X's planes serve there too,
    and the backward folds their scales into dY. With ``forward_hadamard`` the forward takes X and W with their features
    mixed, and the dgrad W as it is, by the scales that one read has found for both.
    """

    def __init__(self, recipe: Int8Recipe) -> None:
        super().__init__(recipe)
        self.hadamard, self.mixes = recipe.transforms_wgrad, recipe.transforms_forward

    def quantize_input(self, x, weight, state, update, wgrad, backend):
        if self.hadamard and not self.recipe.forward:
            return QuantizedInput(None, quantize_hadamard(x, None, self.block, backend) if wgrad else ())
        if self.mixes:
            size = _mixed_size(x)
            rate, capacity = self._fallback(size, self.recipe.activation_band)
            planes = quantize_row_mixed(x, state, 0, rate, capacity, self.block, update, wgrad, backend)
            return self._mixed(planes, size, wgrad)
        rate, capacity = self._fallback(x.shape, self.recipe.activation_band)
        if self.hadamard and wgrad:
            low, high, slot, scale, *transformed = quantize_row_hadamard(
                x, state, 0, rate, capacity, self.block, update, backend
            )
            operand, saved = self._matrix(low, high, slot, scale, tuple(x.shape), capacity), tuple(transformed)
        else:
            planes = ops.quantize_row(x, state, 0, rate, capacity, self.block, update, wgrad, backend)
            operand, kept = self._parted(planes, tuple(x.shape))
            saved = kept if wgrad else ()
        return QuantizedInput(operand, saved)

    def _mixed(self, planes: Sequence[Tensor], size: tuple[int, int], wgrad: bool) -> QuantizedInput:
        """What `quantize_row_mixed` returns of a matrix of `_mixed_size`."""
        low, high, slot, scale, *transformed = planes
        operand = self._matrix(low, high, slot, scale, size, high.shape[0])
        return QuantizedInput(operand, tuple(transformed) if wgrad else ())

    def _parted(
        self, planes: Sequence[Tensor], size: tuple[int, int]
    ) -> tuple[QuantizedMatrix, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """What `ops.quantize_row` returns, as the forward's operand of ``size`` and as what a wgrad takes."""
        low, low_t, high, high_t, slot, scale, int_max = planes
        return self._matrix(low, high, slot, scale, size, high.shape[0]), (low_t, high_t, slot, scale, int_max)

    def quantize_swiglu(
        self, gate: Tensor, up: Tensor, state: Tensor | None, update: bool, wgrad: bool, recompute: bool, backend: str
    ) -> QuantizedInput:
        """``silu(gate)·up`` ``[M, N]``; with ``recompute`` ``saved`` is what `swiglu_saved` takes."""
        keep = wgrad and not recompute
        if self.mixes:
            size = _mixed_size(gate)
            rate, capacity = self._fallback(size, self.recipe.activation_band)
            _, *planes = swiglu_row_mixed(gate, up, state, 0, rate, capacity, self.block, update, keep, backend)
            return self._mixed(planes, size, keep)
        rate, capacity = self._fallback(gate.shape, self.recipe.activation_band)
        saved: tuple[Tensor, ...]
        if self.hadamard and keep:
            h, low, high, slot, scale, *saved_of_h = swiglu_row_hadamard(
                gate, up, state, 0, rate, capacity, self.block, update, backend
            )
            operand, saved = self._matrix(low, high, slot, scale, tuple(h.shape), capacity), tuple(saved_of_h)
        else:
            h, *planes = swiglu_ops.swiglu_row(gate, up, state, 0, rate, capacity, self.block, update, keep, backend)
            operand, kept = self._parted(planes, tuple(h.shape))
            saved = kept if keep else kept[2:] if wgrad and not self.hadamard else ()
        return QuantizedInput(operand, saved)

    def swiglu_saved(self, gate: Tensor, up: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        """What `quantize_swiglu` saves without ``recompute``, given what it saves with it."""
        if self.hadamard:
            return quantize_hadamard(gate, up, self.block, backend)
        slot, scale, _ = saved
        _, capacity = self._fallback(gate.shape, self.recipe.activation_band)
        return *swiglu_ops.swiglu_planes(gate, up, scale, slot, capacity, self.block, backend), *saved

    def quantize_weight(self, weight, transposed, backend):
        size = tuple(weight.shape)
        if self.mixes:
            low, mixed_scale, scale, low_t = quantize_weight_mixed(weight, self.block, transposed, backend)
            forward = QuantizedMatrix(low, None, None, mixed_scale, _mixed_size(weight), self.block)
        else:
            low, low_t, _, _, _, scale, _ = ops.quantize_row(
                weight, None, 0, 0.0, 0, self.block, False, transposed, backend
            )
            forward = QuantizedMatrix(low, None, None, scale, size, self.block)
        dgrad = QuantizedMatrix(low_t, None, None, None, size[::-1], self.block) if transposed else None
        return QuantizedWeight(forward, dgrad, scale)

    def transpose_weight(self, weight, scale, backend):
        low_t = ops.transposed_integers(weight, scale, self.block, backend)
        return QuantizedWeight(
            None, QuantizedMatrix(low_t, None, None, None, tuple(weight.shape)[::-1], self.block), scale
        )

    def quantize_gradient(self, dy, weight, saved, size, state, update, bias, backend, statistics=()):
        rate, capacity = self._fallback(dy.shape, self.recipe.gradient_band)
        weight_scale = None if weight is None else weight.scale
        if self.hadamard and weight is not None and saved:
            low, high, slot, scale, dbias, *transformed = quantize_row_gradient_hadamard(
                dy, weight.scale, state, rate, capacity, self.block, update, bias, backend, statistics
            )
            return QuantizedGradient(
                self._matrix(low, high, slot, scale, tuple(dy.shape), capacity),
                self._transformed(*transformed),
                self._transformed(*saved),
                dbias if bias else None,
            )
        low_t, high_t, slot, input_scale, int_max = self._folded(saved)
        a_low, a_high, a_slot, a_scale, g_low, g_high, g_slot, g_scale, dbias = ops.quantize_row_gradient(
            dy,
            weight_scale,
            input_scale,
            int_max,
            state,
            rate,
            capacity,
            self.block,
            update,
            "nothing" if self.hadamard else self.recipe.stochastic_rounding,
            bias,
            backend,
            statistics,
            self._group_blocks(),
        )
        dgrad = wgrad = input_transposed = None
        if weight is not None:
            dgrad = self._matrix(a_low, a_high, a_slot, a_scale, tuple(dy.shape), capacity)
        if saved and self.hadamard:
            wgrad = self._transformed(*quantize_hadamard(dy, None, self.block, backend))
            input_transposed = self._transformed(*saved)
        elif low_t is not None and high_t is not None and slot is not None:
            wgrad = self._matrix(g_low, g_high, g_slot, g_scale, tuple(dy.shape)[::-1], capacity)
            input_transposed = self._transposed(low_t, high_t, slot, None, size)
        return QuantizedGradient(dgrad, wgrad, input_transposed, dbias if bias else None)

    def _folded(self, saved: Sequence[Tensor] | None) -> Sequence[Any]:
        """What was saved of X where its scales are folded into dY, else five times ``None``."""
        return saved if saved and not self.hadamard else [None] * 5

    def _transformed(self, low: Tensor, scale: Tensor) -> QuantizedMatrix:
        return QuantizedMatrix(low, None, None, scale, tuple(low.shape), self.block)

    def _group_blocks(self) -> int:
        return (self.recipe.wgrad_group_tokens or 0) // self.block

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
        """The gradient of ``gate``, and for both, stacked, the ``statistics`` that `quantize_gradient` takes.

        ``dh`` becomes the gradient of ``up``. ``weights`` and ``saved`` as `quantize_gradient` will be given them; both
        projections read one X.
        """
        _, capacity = self._fallback(gate.shape, self.recipe.gradient_band)
        gate_scale, up_scale = (None if w is None else w.scale for w in weights)
        _, _, _, input_scale, int_max = self._folded(saved)
        return swiglu_ops.swiglu_gradient(
            dh, gate, up, gate_scale, up_scale, input_scale, int_max, capacity, self.block, bias, backend
        )

    def gemm(self, a, b, bias, out_dtype, backend):
        # Only dY as the wgrad's operand has scales by groups.
        grouped = a.scale is not None and a.scale.dim() == 2
        return ops.gemm_row(a, b, bias, out_dtype, backend, group_blocks=self._group_blocks() if grouped else 0)

    def input_again(self, saved: tuple[Tensor, ...], size: tuple[int, int]) -> QuantizedMatrix:
        """X of ``size`` for the forward GEMM, from what `quantize_input` saves."""
        low_t, high_t, slot, scale, _ = saved
        columns = padded(size[1], self.block) - size[1]
        low = F.pad(low_t[:, : size[0]].t(), (0, columns)).contiguous()
        return self._matrix(low, high_t.mT.contiguous(), slot, scale, size, high_t.shape[0])

    def gemm_again(
        self, a: QuantizedMatrix, b: QuantizedMatrix, bias: Tensor | None, out_dtype: torch.dtype, backend: str
    ) -> Tensor:
        """A forward's product computed again in the backward, which the compiler must not take for the forward's."""
        return ops.gemm_row(a, b, bias, out_dtype, backend, again=True)


def _mixed_size(x: Tensor) -> tuple[int, int]:
    """The size of ``x`` with its features mixed: groups of them are whole."""
    return x.shape[0], padded(x.shape[1], TOKENS)


class BlockScheme(_BlockFallback):
    """One scale a square block, which transposes with it: dY is quantized once for both backward GEMMs."""

    def quantize_input(self, x, weight, state, update, wgrad, backend):
        rate, capacity = self._fallback(x.shape, self.recipe.activation_band)
        low, low_t, high, high_t, slot, scale = ops.quantize_block(
            x, state, 0, rate, capacity, self.block, update, wgrad, "nothing", backend
        )
        operand = self._matrix(low, high, slot, scale, tuple(x.shape), capacity)
        return QuantizedInput(operand, (low_t, high_t, slot, scale) if wgrad else ())

    def quantize_weight(self, weight, transposed, backend):
        low, low_t, high, high_t, slot, scale = ops.quantize_block(
            weight, None, 0, 0.0, 0, self.block, False, transposed, "nothing", backend
        )
        size = tuple(weight.shape)
        forward = self._matrix(low, high, slot, scale, size, 0)
        dgrad = self._transposed(low_t, high_t, slot, scale, size) if transposed else None
        return QuantizedWeight(forward, dgrad, scale)

    def transpose_weight(self, weight, scale, backend):
        low_t = ops.transposed_integers(weight, scale, self.block, backend)
        size = tuple(weight.shape)[::-1]
        return QuantizedWeight(None, QuantizedMatrix(low_t, None, None, scale.t().contiguous(), size, self.block))

    def quantize_gradient(self, dy, weight, saved, size, state, update, bias, backend):
        rate, capacity = self._fallback(dy.shape, self.recipe.gradient_band)
        low, low_t, high, high_t, slot, scale = ops.quantize_block(
            dy,
            state,
            1,
            rate,
            capacity,
            self.block,
            update,
            saved is not None,
            self.recipe.stochastic_rounding,
            backend,
        )
        wgrad = input_transposed = None
        if saved is not None:
            wgrad = self._transposed(low_t, high_t, slot, scale, tuple(dy.shape))
            input_transposed = self._transposed(*saved, size)
        dgrad = self._matrix(low, high, slot, scale, tuple(dy.shape), capacity)
        return QuantizedGradient(dgrad, wgrad, input_transposed, None)

    def gemm(self, a, b, bias, out_dtype, backend):
        return ops.gemm_block(a, b, bias, out_dtype, backend)


class VectorScheme:
    """Both operands of each GEMM quantized per row along its contraction, with LLM.int8()'s outlier columns."""

    quantizes_weight_once = False

    def __init__(self, recipe: Int8Recipe) -> None:
        self.recipe = recipe

    def _quantize(self, x: Tensor, backend: str) -> QuantizedMatrix:
        block = self.recipe.block_size
        low, _, _, _, _, scale, _ = ops.quantize_row(x, None, 0, 0.0, 0, block, False, False, backend)
        return QuantizedMatrix(low, None, None, scale, tuple(x.shape), block)

    def quantize_input(self, x, weight, state, update, wgrad, backend):
        saved = (x,) if wgrad else ()
        if self.recipe.outlier_threshold is None:
            return QuantizedInput(self._quantize(x, backend), saved)
        plain, remainder = ops.split_outlier_columns(x, weight, self.recipe.outlier_threshold)
        return QuantizedInput(self._quantize(plain, backend), saved, remainder)

    def quantize_weight(self, weight, transposed, backend):
        if transposed:
            return QuantizedWeight(None, self._quantize(weight.t(), backend))
        return QuantizedWeight(self._quantize(weight, backend))

    def transpose_weight(self, weight, scale, backend):
        raise NotImplementedError("scales of W's rows do not serve its columns: quantizes_weight_once is false")

    def quantize_gradient(self, dy, weight, saved, size, state, update, bias, backend):
        dgrad = None if weight is None else self._quantize(dy, backend)
        wgrad = input_transposed = None
        if saved is not None:
            wgrad, input_transposed = self._quantize(dy.t(), backend), self._quantize(saved[0].t(), backend)
        return QuantizedGradient(dgrad, wgrad, input_transposed, None)

    def gemm(self, a, b, bias, out_dtype, backend):
        return ops.gemm_row(a, b, bias, out_dtype, backend)


_SCHEMES: dict[str, type] = {"row": RowScheme, "block": BlockScheme, "vector": VectorScheme}


def scheme_of(recipe: Int8Recipe) -> Scheme:
    """The scheme that carries out ``recipe``."""
    return _SCHEMES[recipe.scaling](recipe)
