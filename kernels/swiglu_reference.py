"""The ground truth of the fused SwiGLU ops: PyTorch's own activation, then the reference's integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels.reference import _gather_blocks, _transposed, quantize_row, row_integers, split_bytes


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``h = silu(gate)·up`` ``[R, Q]`` in the dtype of ``gate``."""
    return F.silu(gate) * up


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
    """``h`` of `swiglu`, and what `reference.quantize_row` makes of it."""
    h = swiglu(gate, up)
    return h, *quantize_row(h, state, operand, seed_rate, capacity, block, update, transpose)


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
    dup: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of ``gate`` and ``up`` ``[M, N]``; the statistics, which the reference needs not, are empty."""
    dgate = torch.ops.aten.silu_backward(dh * up, gate)
    dup = torch.mul(dh, F.silu(gate), out=dup)
    return dgate, dup, *(gate.new_empty(2, 0) for _ in range(8))


def swiglu_planes(
    gate: Tensor, up: Tensor, scale: Tensor, slot: Tensor, capacity: int, block: int
) -> tuple[Tensor, Tensor]:
    """``low_t`` and ``high_t`` of `swiglu_row`, from the scales and slots that it has found."""
    low, high = split_bytes(row_integers((F.silu(gate) * up).float(), scale, slot >= 0, block, None))
    return _transposed(low, _gather_blocks(high, slot, capacity, block), block)
