"""The schemes: what each scaling quantizes, and which operands its three GEMMs take. One small class a scaling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from lightning_int8.hadamard_scheme import HadamardScheme
from lightning_int8.kernels import ops, swiglu_ops
from lightning_int8.kernels.planes import QuantizedMatrix, padded
from lightning_int8.operands import BlockFallback, QuantizedGradient, QuantizedInput, QuantizedWeight, Scheme
from lightning_int8.recipe import Int8Recipe


class RowScheme(BlockFallback):
    """One scale a row; the backward folds W's scales into dY for the dgrad and X's for the wgrad.

    So X and W are quantized once, each for two GEMMs.
    """

    def quantize_input(self, x, weight, state, update, wgrad, backend):
        rate, capacity = self._fallback(x, self.recipe.activation_band)
        planes = ops.quantize_row(x, state, 0, rate, capacity, self.block, update, wgrad, backend)
        operand, kept = self._parted(planes, tuple(x.shape))
        return QuantizedInput(operand, kept if wgrad else ())

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
        rate, capacity = self._fallback(gate, self.recipe.activation_band)
        keep = wgrad and not recompute
        h, *planes = swiglu_ops.swiglu_row(gate, up, state, 0, rate, capacity, self.block, update, keep, backend)
        operand, kept = self._parted(planes, tuple(h.shape))
        return QuantizedInput(operand, kept if keep else kept[2:] if wgrad else ())

    def swiglu_saved(self, gate: Tensor, up: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        """What `quantize_swiglu` saves without ``recompute``, given what it saves with it."""
        slot, scale, _ = saved
        _, capacity = self._fallback(gate, self.recipe.activation_band)
        return *swiglu_ops.swiglu_planes(gate, up, scale, slot, capacity, self.block, backend), *saved

    def quantize_weight(self, weight, dgrad, backend):
        low, low_t, _, _, _, scale, _ = ops.quantize_row(weight, None, 0, 0.0, 0, self.block, False, dgrad, backend)
        size = tuple(weight.shape)
        forward = QuantizedMatrix(low, None, None, scale, size, self.block)
        if not dgrad:
            return QuantizedWeight(forward)
        return QuantizedWeight(forward, QuantizedMatrix(low_t, None, None, None, size[::-1], self.block), scale)

    def quantize_weight_for_dgrad(self, weight, scale, backend):
        if scale is None:
            return self.quantize_weight(weight, True, backend)
        low_t = ops.transposed_integers(weight, scale, self.block, backend)
        return QuantizedWeight(
            None, QuantizedMatrix(low_t, None, None, None, tuple(weight.shape)[::-1], self.block), scale
        )

    def quantize_gradient(self, dy, weight, saved, size, state, update, bias, backend, statistics=()):
        rate, capacity = self._fallback(dy, self.recipe.gradient_band)
        low_t, high_t, slot, input_scale, int_max = saved or [None] * 5
        a_low, a_high, a_slot, a_scale, g_low, g_high, g_slot, g_scale, dbias = ops.quantize_row_gradient(
            dy,
            None if weight is None else weight.fold,
            input_scale,
            int_max,
            state,
            rate,
            capacity,
            self.block,
            update,
            self.recipe.stochastic_rounding,
            bias,
            backend,
            statistics,
            self._group_blocks(),
        )
        dgrad = wgrad = input_transposed = None
        if weight is not None:
            dgrad = self._matrix(a_low, a_high, a_slot, a_scale, tuple(dy.shape), capacity)
        if low_t is not None and high_t is not None and slot is not None:
            wgrad = self._matrix(g_low, g_high, g_slot, g_scale, tuple(dy.shape)[::-1], capacity)
            input_transposed = self._transposed(low_t, high_t, slot, None, size)
        return QuantizedGradient(dgrad, wgrad, input_transposed, dbias if bias else None)

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
        _, capacity = self._fallback(gate, self.recipe.gradient_band)
        gate_scale, up_scale = (None if w is None else w.fold for w in weights)
        _, _, _, input_scale, int_max = saved or [None] * 5
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


class BlockScheme(BlockFallback):
    """One scale a square block, which transposes with it: dY is quantized once for both backward GEMMs."""

    def quantize_input(self, x, weight, state, update, wgrad, backend):
        rate, capacity = self._fallback(x, self.recipe.activation_band)
        low, low_t, high, high_t, slot, scale = ops.quantize_block(
            x, state, 0, rate, capacity, self.block, update, wgrad, "nothing", backend
        )
        operand = self._matrix(low, high, slot, scale, tuple(x.shape), capacity)
        return QuantizedInput(operand, (low_t, high_t, slot, scale) if wgrad else ())

    def quantize_weight(self, weight, dgrad, backend):
        low, low_t, high, high_t, slot, scale = ops.quantize_block(
            weight, None, 0, 0.0, 0, self.block, False, dgrad, "nothing", backend
        )
        size = tuple(weight.shape)
        forward = self._matrix(low, high, slot, scale, size, 0)
        return QuantizedWeight(forward, self._transposed(low_t, high_t, slot, scale, size) if dgrad else None)

    def quantize_weight_for_dgrad(self, weight, scale, backend):
        if scale is None:
            return self.quantize_weight(weight, True, backend)
        low_t = ops.transposed_integers(weight, scale, self.block, backend)
        size = tuple(weight.shape)[::-1]
        return QuantizedWeight(None, QuantizedMatrix(low_t, None, None, scale.t().contiguous(), size, self.block))

    def quantize_gradient(self, dy, weight, saved, size, state, update, bias, backend):
        rate, capacity = self._fallback(dy, self.recipe.gradient_band)
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

    quantizes_once = False

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

    def quantize_weight(self, weight, dgrad, backend):
        forward = self._quantize(weight, backend)
        return QuantizedWeight(forward, self._quantize(weight.t(), backend) if dgrad else None)

    def quantize_weight_for_dgrad(self, weight, scale, backend):
        return QuantizedWeight(None, self._quantize(weight.t(), backend))

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
    return HadamardScheme(recipe) if recipe.mixes else _SCHEMES[recipe.scaling](recipe)
