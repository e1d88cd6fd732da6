"""The fused SwiGLU steps as opaque `torch.library` ops, beside those of :mod:`lightning_int8.kernels.ops`."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from lightning_int8.kernels.ops import _define, _fake, _may_count, quantize_row, quantize_row_gradient


def _module(backend: str) -> ModuleType:
    """Both native backends share one implementation."""
    if backend == "reference":
        from lightning_int8.kernels import swiglu_reference

        return swiglu_reference
    from lightning_int8.kernels import swiglu

    return swiglu


@_define("swiglu_row", mutates=["state"])
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.swiglu_reference.swiglu_row`; ``state`` counts once under checkpointing."""
    update = update and _may_count()
    return _module(backend).swiglu_row(gate, up, state, operand, seed_rate, capacity, block, update, transpose)


@_fake("swiglu_row")
def _(gate, up, state, operand, seed_rate, capacity, block, update, transpose, backend):
    h = gate.new_empty(gate.shape)
    return h, *quantize_row(h, state, operand, seed_rate, capacity, block, update, transpose, backend)


@_define("swiglu_row_gradient", mutates=["gate_state", "up_state"])
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
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """See :func:`lightning_int8.kernels.swiglu_reference.swiglu_row_gradient`."""
    return _module(backend).swiglu_row_gradient(
        dh, gate, up, gate_scale, up_scale, input_scale, input_int_max, gate_state, up_state, seed_rate, capacity,
        block, update, stochastic, bias,
    )  # fmt: skip


@_fake("swiglu_row_gradient")
def _(
    dh, gate, up, gate_scale, up_scale, input_scale, input_int_max, gate_state, up_state, seed_rate, capacity, block,
    update, stochastic, bias, backend,
):  # fmt: skip
    rest = seed_rate, capacity, block, update, stochastic, bias, backend
    return (
        *quantize_row_gradient(gate, gate_scale, input_scale, input_int_max, gate_state, *rest),
        *quantize_row_gradient(up, up_scale, input_scale, input_int_max, up_state, *rest),
    )
