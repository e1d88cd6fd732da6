"""A SwiGLU layer as one function: two INT8 projections, activation, quantization and the INT8 projection down.

    h = silu(gate(x))·up(x)        y = down(h)

`silu·up` and its backward are memory-bound, and so is the first read of each tensor that is quantized, which finds its
AbsMax. Done together, the forward reads ``h`` once less and the backward reads both gradients once less. What the
backward needs is kept or computed again, as the recipe's ``recompute_swiglu`` says. The integers, gradients and
thresholds are those of the three layers called one by one.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from lightning_int8.functional import autocasts, differentiable_once
from lightning_int8.kernels import backends
from lightning_int8.kernels.ops import gemm_row
from lightning_int8.kernels.planes import MAX_WGRAD_TOKENS, QuantizedMatrix
from lightning_int8.linear import Int8Linear
from lightning_int8.operands import QuantizedInput, QuantizedWeight
from lightning_int8.recipe import Int8Recipe
from lightning_int8.schemes import scheme_of
from lightning_int8.weight_planes import planes_of_weight


class _Int8SwiGLU(torch.autograd.Function):
    """X ``[M, K]``; weights and biases of the gate, up and down projection; ``planes`` is X quantized, in ``dtype``.

    ``states`` are the three layers' thresholds for the forward and for the backward. ``needs`` says whether autograd
    wants dX, dW and db of both gate and up, and dW and db of down.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        planes: QuantizedInput,
        kept: tuple[QuantizedWeight | None, ...],
        states: tuple[tuple[Tensor | None, Tensor | None], ...],
        update: bool,
        recipe: Int8Recipe,
        backend: str,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool, bool, bool],
    ) -> Tensor:
        scheme: Any = scheme_of(recipe)
        weights, biases = (gate_weight, up_weight, down_weight), (gate_bias, up_bias, down_bias)
        scales: list[Tensor | None] = []

        def project(i: int, operand: QuantizedMatrix) -> Tensor:
            w: Any = (kept[i] or scheme.quantize_weight(weights[i], False, backend)).forward
            scales.append(w.scale if scheme.quantizes_once else None)
            return scheme.gemm(operand, w, biases[i], dtype, backend)

        operand: Any = planes.operand
        gate, up = project(0, operand), project(1, operand)
        recompute = recipe.recompute_swiglu != "nothing"
        hidden: Any = scheme.quantize_swiglu(gate, up, states[2][0], update, needs[3], recompute, backend)
        y = project(2, hidden.operand)
        if any(needs):
            if recipe.recompute_swiglu != "all":
                activations: tuple[Tensor | None, ...] = (gate, up)
            elif planes.saved and scheme.quantizes_once:
                # X's operand can be made of its transposed planes.
                activations = (gate_bias, up_bias)
            else:
                activations = (gate_bias, up_bias, operand.low, operand.high, operand.slot, operand.scale)
            groups: tuple[tuple[Tensor | None, ...], ...] = (
                weights,
                tuple(scales),
                activations,
                planes.saved,
                hidden.saved,
            )
            ctx.group_sizes = [len(group) for group in groups]
            ctx.save_for_backward(*[tensor for group in groups for tensor in group])
        # Not saved tensors, which may not change until the backward: a layer called twice counts in both backwards.
        ctx.states, ctx.kept = states, kept
        ctx.recipe, ctx.backend, ctx.dtype, ctx.needs, ctx.update = recipe, backend, dtype, needs, update
        ctx.input_size, ctx.input_dtype, ctx.hidden_size = tuple(x.shape), x.dtype, tuple(gate.shape)
        ctx.operand_size = operand.size
        ctx.bias_dtypes = tuple(None if bias is None else bias.dtype for bias in biases)
        return y

    @staticmethod
    @functools.partial(differentiable_once, linear=False)
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        tensors, groups = list(ctx.saved_tensors), []
        for size in ctx.group_sizes:
            groups.append(tuple(tensors[:size]))
            tensors = tensors[size:]
        weights, scales, kept_activations, x_saved, h_saved = groups
        recipe, backend, dtype, states, update = ctx.recipe, ctx.backend, ctx.dtype, ctx.states, ctx.update
        needs_dx, needs_dw, needs_db, needs_down_dw, needs_down_db = ctx.needs
        needs_dh = needs_dx or needs_dw or needs_db
        scheme: Any = scheme_of(recipe)

        def transposed(i: int) -> QuantizedWeight:
            return ctx.kept[i] or scheme.quantize_weight_for_dgrad(weights[i], scales[i], backend)

        gate_up: list[Any] = [None, None]
        if recipe.recompute_swiglu == "all":
            gate_up = [ctx.kept[i] or scheme.quantize_weight(weights[i], True, backend) for i in (0, 1)]
            gate, up = _gate_and_up_again(scheme, ctx, gate_up, kept_activations, x_saved)
        else:
            gate, up = kept_activations
        if needs_down_dw and recipe.recompute_swiglu != "nothing":
            h_saved = scheme.swiglu_saved(gate, up, h_saved, backend)
        w = transposed(2) if needs_dh else None
        g = scheme.quantize_gradient(dy, w, h_saved, ctx.hidden_size, states[2][1], update, needs_down_db, backend)
        # The wgrad first, since it needs the planes of h, so that those are gone before dh is made.
        down_dw = scheme.gemm(g.wgrad, g.input_transposed, None, weights[2].dtype, backend) if needs_down_dw else None
        down_db = g.dbias.to(ctx.bias_dtypes[2]) if needs_down_db else None
        a = g.dgrad
        del g, h_saved
        dh = None if w is None else scheme.gemm(a, w.dgrad, None, dtype, backend)
        if dh is None:
            return None, None, None, down_dw, None, None, down_db, *[None] * 8
        if needs_dx:
            gate_up = [w or transposed(i) for i, w in enumerate(gate_up)]
        else:
            gate_up = [None, None]
        x_saved = x_saved if needs_dw else ()
        dgate, *statistics = scheme.swiglu_gradient(dh, gate, up, gate_up, x_saved, needs_db, backend)
        pending = [dh, dgate]
        del dh, dgate, gate, up
        results: list[tuple[Tensor | None, ...]] = []
        # One after the other, so that one and its planes are gone before the planes of the other are made.
        for i, w in enumerate(gate_up):
            dprojected = pending.pop()
            g = scheme.quantize_gradient(
                dprojected, w, x_saved, ctx.input_size, states[i][1], update, needs_db, backend,
                [part[i] for part in statistics],
            )  # fmt: skip
            dx = None if w is None else scheme.gemm(g.dgrad, w.dgrad, None, dtype, backend).to(ctx.input_dtype)
            dw = scheme.gemm(g.wgrad, g.input_transposed, None, weights[i].dtype, backend) if x_saved else None
            results.append((dx, dw, None if g.dbias is None else g.dbias.to(ctx.bias_dtypes[i])))
            del g, dprojected
        (gate_dx, gate_dw, gate_db), (up_dx, up_dw, up_db) = results
        dx = None if gate_dx is None or up_dx is None else gate_dx + up_dx
        return dx, gate_dw, up_dw, down_dw, gate_db, up_db, down_db, *[None] * 8


def _gate_and_up_again(
    scheme: Any, ctx: Any, weights: list[Any], kept: tuple[Any, ...], x_saved: tuple[Tensor, ...]
) -> list[Tensor]:
    gate_bias, up_bias, *operand = kept
    if operand:
        low, high, slot, scale = operand
        x = QuantizedMatrix(low, high, slot, scale, ctx.operand_size, ctx.recipe.block_size)
    else:
        x = scheme.input_again(x_saved, ctx.input_size)
    return [
        # Which the compiler must not take for the forward's products.
        gemm_row(x, w.forward, bias, ctx.dtype, ctx.backend, again=True)
        for w, bias in zip(weights, (gate_bias, up_bias), strict=True)
    ]


def can_fuse(x: Tensor, gate: Int8Linear, up: Int8Linear, down: Int8Linear) -> bool:
    """Whether `int8_swiglu` computes what the three layers would, called one by one.

    It does not call them, so hooks on them, a forward of their own or weights that are not there yet rule it out, as
    does anything that the layers themselves would treat or refuse in another way.
    """
    linears = gate, up, down
    if not all(isinstance(linear, Int8Linear) for linear in linears):
        return False
    recipe = gate.int8_recipe
    tokens = x.numel() // max(1, x.shape[-1]) if x.ndim else 0
    return (
        0 < tokens <= MAX_WGRAD_TOKENS
        and all(linear.int8_recipe == recipe and linear.training == gate.training for linear in linears)
        and all(_is_plain(linear) for linear in linears)
        and recipe.fuses
        and gate.weight.shape == up.weight.shape
        and down.in_features == gate.out_features
        and gate.weight.dtype == up.weight.dtype == down.weight.dtype
        and gate.weight.requires_grad == up.weight.requires_grad
        and (gate.bias is None) == (up.bias is None)
        and (gate.bias is None or gate.bias.requires_grad == up.bias.requires_grad)
        and x.shape[-1] == gate.in_features
        and x.device == gate.weight.device == up.weight.device == down.weight.device
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
    """``down(silu(gate(x))·up(x))``.

    Args:
        x: float ``[..., K]``, for which `can_fuse` is true.
        gate: ``[N, K]``.
        up: ``[N, K]``.
        down: ``[L, N]``.

    Returns:
        ``[..., L]`` in ``x``'s dtype (the autocast dtype under autocast).
    """
    recipe, update = gate.int8_recipe, gate.training
    autocast = autocasts(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    backend = backends.choose(recipe.backend, x.device)
    grad = torch.is_grad_enabled()
    needs = (
        grad and x.requires_grad,
        grad and gate.weight.requires_grad,
        grad and gate.bias is not None and gate.bias.requires_grad,
        grad and down.weight.requires_grad,
        grad and down.bias is not None and down.bias.requires_grad,
    )
    linears = gate, up, down
    states = tuple(linear.int8_state.on(x.device) if linear.int8_state.operands else (None, None) for linear in linears)
    kept = tuple(planes_of_weight(linear) for linear in linears)
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        planes = scheme_of(recipe).quantize_input(
            flat.detach().to(dtype), gate.weight.detach(), states[0][0], update, needs[1], backend
        )
        y = _Int8SwiGLU.apply(
            flat, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias, planes, kept, states, update,
            recipe, backend, dtype, needs,
        )  # fmt: skip
    return y.reshape(*x.shape[:-1], -1)
