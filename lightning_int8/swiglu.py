"""SwiGLU between INT8 linears: gate and up projection, activation and first read of the quantization in one function.

    h  = silu(gate(x))·up(x)        down(h) follows as a layer of its own

`silu·up` and its backward are memory-bound, and so is the first read of each tensor that is quantized, which finds its
AbsMax. Done together, the forward reads ``h`` once less and the backward reads both gradients once less. The integers,
gradients and thresholds are those of the three layers called one by one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from lightning_int8.functional import autocasts
from lightning_int8.kernels import backends
from lightning_int8.kernels.planes import MAX_WGRAD_TOKENS
from lightning_int8.linear import Int8Linear
from lightning_int8.recipe import Int8Recipe
from lightning_int8.schemes import QuantizedInput, QuantizedWeight, RowScheme
from lightning_int8.sharing import leave_planes, shared_planes


class _Int8SwiGLU(torch.autograd.Function):
    """X ``[M, K]``, both weights ``[N, K]``; ``planes`` is X quantized, in the dtype ``dtype``.

    ``needs`` says whether dX, both dW and both db are wanted, and whether the down projection's dW is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        planes: QuantizedInput,
        kept: tuple[QuantizedWeight | None, QuantizedWeight | None],
        down_state: Tensor | None,
        states: tuple[Tensor | None, Tensor | None],
        update: bool,
        recipe: Int8Recipe,
        backend: str,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        scheme = RowScheme(recipe)
        operands: list[Any] = [
            (w or scheme.quantize_weight(weight, False, backend)).forward
            for w, weight in zip(kept, (gate_weight, up_weight), strict=True)
        ]
        gate, up = (
            scheme.gemm(planes.operand, operand, bias, dtype, backend)
            for operand, bias in zip(operands, (gate_bias, up_bias), strict=True)
        )
        h, *h_planes = scheme.quantize_swiglu(gate, up, down_state, update, needs[3], backend)
        ctx.mark_non_differentiable(*h_planes)
        if any(needs[:3]):
            scales = [operand.scale for operand in operands]
            ctx.save_for_backward(gate_weight, up_weight, *scales, gate, up, *planes.saved)
        # Not saved tensors, which may not change until the backward: a layer called twice counts in both backwards.
        ctx.states, ctx.kept = states, kept
        ctx.recipe, ctx.backend, ctx.needs, ctx.update = recipe, backend, needs, update
        ctx.input_size, ctx.input_dtype = tuple(x.shape), x.dtype
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in (gate_bias, up_bias))
        return h, *h_planes

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gate_weight, up_weight, gate_scale, up_scale, gate, up, *saved = ctx.saved_tensors
        backend = ctx.backend
        needs_dx, needs_dw, needs_db, _ = ctx.needs
        scheme = RowScheme(ctx.recipe)
        weights = None
        if needs_dx:
            weights = [
                w or scheme.transpose_weight(v, scale, backend)
                for w, v, scale in zip(ctx.kept, (gate_weight, up_weight), (gate_scale, up_scale), strict=True)
            ]
        saved = tuple(saved) if needs_dw else ()
        dgate, dup, *statistics = scheme.swiglu_gradient(grad_outputs[0], gate, up, weights, saved, needs_db, backend)
        results: list[tuple[Tensor | None, ...]] = []
        # One after the other, so that the planes of one are gone before those of the other are made.
        for i, dy in enumerate((dgate, dup)):
            weight = None if weights is None else weights[i]
            g = scheme.quantize_gradient(
                dy, weight, saved, ctx.input_size, ctx.states[i], ctx.update, needs_db, backend,
                [part[i] for part in statistics],
            )  # fmt: skip
            dx = dw = None
            if weight is not None:
                dx = scheme.gemm(g.dgrad, weight.dgrad, None, gate.dtype, backend).to(ctx.input_dtype)
            if saved:
                dw = scheme.gemm(g.wgrad, g.input_transposed, None, gate_weight.dtype, backend)
            results.append((dx, dw, None if g.dbias is None else g.dbias.to(ctx.bias_dtypes[i])))
            del g
        (gate_dx, *gate_rest), (up_dx, *up_rest) = results
        dx = None if gate_dx is None or up_dx is None else gate_dx + up_dx
        (gate_dw, gate_db), (up_dw, up_db) = gate_rest, up_rest
        return dx, gate_dw, up_dw, gate_db, up_db, *[None] * 9


def can_fuse(x: Tensor, gate: Int8Linear, up: Int8Linear, down: Int8Linear) -> bool:
    """Whether `int8_swiglu` computes what the three layers would, called one by one.

    It does not call ``gate`` and ``up``, so hooks on them, a forward of their own or weights that are not there yet
    rule it out, as does anything that the layers themselves would treat or refuse in another way.
    """
    linears = gate, up, down
    if not all(isinstance(linear, Int8Linear) for linear in linears):
        return False
    recipe = gate.int8_recipe
    tokens = x.numel() // max(1, x.shape[-1]) if x.ndim else 0
    return (
        0 < tokens <= MAX_WGRAD_TOKENS
        and all(linear.int8_recipe == recipe and linear.training == gate.training for linear in linears)
        and all(_is_plain(linear) for linear in (gate, up))
        and recipe.scaling == "row"
        and recipe.forward
        and recipe.dgrad
        and recipe.wgrad
        and gate.weight.shape == up.weight.shape
        and gate.weight.dtype == up.weight.dtype
        and gate.weight.requires_grad == up.weight.requires_grad
        and (gate.bias is None) == (up.bias is None)
        and (gate.bias is None or gate.bias.requires_grad == up.bias.requires_grad)
        and x.shape[-1] == gate.in_features
        and x.device == gate.weight.device == up.weight.device
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and (autocasts(x) or x.dtype == gate.weight.dtype)
    )


def _is_plain(linear: Int8Linear) -> bool:
    return not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in vars(linear)
        or hasattr(linear.weight, "device_mesh")
    )


def int8_swiglu(x: Tensor, gate: Int8Linear, up: Int8Linear, down: Int8Linear) -> Tensor:
    """``silu(gate(x))·up(x)``, which carries the planes that ``down`` will make of it.

    Args:
        x: float ``[..., K]``, for which `can_fuse` is true.
        gate: ``[N, K]``.
        up: ``[N, K]``.
        down: The layer that reads the result next.

    Returns:
        ``[..., N]`` in ``x``'s dtype (the autocast dtype under autocast).
    """
    source, recipe, update = x, gate.int8_recipe, gate.training
    autocast = autocasts(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    backend = backends.choose(recipe.backend, x.device)
    grad = torch.is_grad_enabled()
    needs = (
        grad and x.requires_grad,
        grad and gate.weight.requires_grad,
        grad and gate.bias is not None and gate.bias.requires_grad,
        grad and down.weight.requires_grad,
    )
    gate_state, up_state, down_state = (
        linear.int8_state.on(x.device) if linear.int8_state.operands else (None, None) for linear in (gate, up, down)
    )
    kept = tuple(
        None if linear.int8_kept_weight is None or not (update and grad) else linear.int8_kept_weight.planes
        for linear in (gate, up)
    )
    scheme = RowScheme(recipe)
    key = (recipe, update, dtype)
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        planes = shared_planes(source, key, needs[1])
        if planes is None:
            planes = scheme.quantize_input(
                flat.detach().to(dtype), gate.weight.detach(), gate_state[0], update, needs[1], backend
            )
            leave_planes(source, key, planes)
        h, *h_planes = _Int8SwiGLU.apply(
            flat, gate.weight, up.weight, gate.bias, up.bias, planes, kept, down_state[0], (gate_state[1], up_state[1]),
            update, recipe, backend, dtype, needs,
        )  # fmt: skip
    size = tuple(h.shape)
    h = h.reshape(*x.shape[:-1], -1)
    leave_planes(h, key, scheme.input_of(h_planes, size, needs[3]))
    return h
