"""The ground truth of the fused SwiGLU ops: PyTorch's own activation, then the reference's integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels.reference import quantize_row, quantize_row_gradient


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h = silu(gate)·up`` ``[R, Q]`` in the dtype of ``gate``, and what `reference.quantize_row` makes of it."""
    h = F.silu(gate) * up
    return h, *quantize_row(h, state, operand, seed_rate, capacity, block, update, transpose)


def swiglu_row_gradient(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    input_scale: Tensor | None,
    input_int_max: Tensor | None,
    gate_state: Tensor | None,
    up_state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    stochastic: bool,
    bias: bool,
) -> tuple[Tensor, ...]:
    """The gradients of ``gate`` and ``up`` ``[M, N]``, each as `reference.quantize_row_gradient` quantizes it.

    Returns:
        Its nine tensors for ``gate``, then those for ``up``.
    """
    dgate, dup = torch.ops.aten.silu_backward(dh * up, gate), dh * F.silu(gate)
    rest = seed_rate, capacity, block, update, stochastic, bias
    return (
        *quantize_row_gradient(dgate, gate_scale, input_scale, input_int_max, gate_state, *rest),
        *quantize_row_gradient(dup, up_scale, input_scale, input_int_max, up_state, *rest),
    )
