"""FP8 training of a linear layer as torchao does it, emulated: values are rounded to float8, products are float32.

For comparisons only (the probe's): it shows FP8's rounding on any device, not its speed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Float8Scaling = Literal["rowwise", "tensorwise"]


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: Float8Scaling) -> Tensor:
    """``x @ weightᵀ + bias`` with all three GEMMs on float8 values. Differentiable.

    ``"rowwise"``: E4M3 throughout, one power-of-2 scale a row of each operand along each GEMM's contraction.
    ``"tensorwise"``: E4M3 for X and W, E5M2 for dY, one scale a tensor. Both as in torchao 0.18's recipes.

    Args:
        x: float ``[..., K]``.
        weight: float ``[N, K]``.
        bias: float ``[N]`` or ``None``.
        scaling: Where the scales lie.

    Returns:
        ``[..., N]`` in ``x``'s dtype (the autocast dtype under autocast).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # The products below stand for FP8's, whose sums are not rounded to the autocast dtype before the end.
    with torch.autocast(x.device.type, enabled=False):
        y = _Float8Linear.apply(x.reshape(-1, x.shape[-1]), weight, scaling)
    return (y if bias is None else y + bias.to(y.dtype)).reshape(*x.shape[:-1], -1)


def round_to_float8(x: Tensor, dtype: torch.dtype, rowwise: bool) -> Tensor:
    """``x [R, Q]`` with each value rounded to ``dtype`` after scaling by the AbsMax: float32 ``[R, Q]``."""
    x = x.float()
    largest = torch.finfo(dtype).max
    amax = (x.abs().amax(1, keepdim=True) if rowwise else x.abs().amax()).clamp_min(1e-12)
    scale = largest / amax
    if rowwise:
        scale = torch.exp2(scale.log2().floor())
    return (x * scale).clamp(-largest, largest).to(dtype).float() / scale


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scaling: Float8Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling = scaling
        return _product(x, weight, torch.float8_e4m3fn, scaling).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (dy,) = grad_outputs
        x, weight = ctx.saved_tensors
        dtype = torch.float8_e4m3fn if ctx.scaling == "rowwise" else torch.float8_e5m2
        dx = _product(dy, weight.t(), dtype, ctx.scaling)
        dw = _product(dy.t(), x.t(), dtype, ctx.scaling)
        return dx.to(x.dtype), dw.to(weight.dtype), None


def _product(a: Tensor, b: Tensor, a_dtype: torch.dtype, scaling: Float8Scaling) -> Tensor:
    """``a @ bᵀ`` of the rounded operands, float32."""
    rowwise = scaling == "rowwise"
    return round_to_float8(a, a_dtype, rowwise) @ round_to_float8(b, torch.float8_e4m3fn, rowwise).t()
