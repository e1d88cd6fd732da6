"""`int8_linear`: one `autograd.Function` with the three GEMMs of a linear layer side by side.

    forward   Y  = X Wᵀ
    dgrad     dX = dY W
    wgrad     dW = dYᵀ X

Each runs in INT8 when the recipe says so, otherwise in X's dtype. What is saved for the backward is X's INT8 operand
of the wgrad (or X itself when the wgrad is not INT8), a reference to the weight, and its scales; W's integers are
made again for the dgrad, which costs little beside the token-sized tensors and keeps sharded (FSDP) weights free to go,
unless its planes are kept between optimizer steps (:mod:`lightning_int8.weight_planes`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_int8.kernels import backends
from lightning_int8.kernels.planes import MAX_WGRAD_TOKENS
from lightning_int8.operands import QuantizedInput, QuantizedWeight
from lightning_int8.recipe import Int8Recipe, resolve_recipe
from lightning_int8.schemes import scheme_of
from lightning_int8.sharing import leave_planes, shared_planes
from lightning_int8.threshold import FallbackState


def differentiable_once(
    backward: Callable[..., tuple[Tensor | None, ...]], linear: bool = True
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward whose gradients raise when they are differentiated again, instead of passing for constants.

    PyTorch's ``once_differentiable`` lets gradients pass whose dY is a constant, though dX depends on W and dW on X,
    and raises only where the whole graph is walked: a node that is told of dY and W is reached from whatever the caller
    differentiates by. (X alone, through dW of a dY that does not depend on it, PyTorch says is not in the graph.)

    Args:
        backward: Of an ``autograd.Function``, its first argument the context.
        linear: Whether dX is the same for every X. Otherwise nothing would be told of X where dY is a constant, so that
            raises at once.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Elsewhere there is no graph to add to: the backward of a compiled program raises in a second one by itself.
        if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grad_outputs)
        if not linear and not any(dy.requires_grad for dy in grad_outputs):
            raise RuntimeError(_TWICE)
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            gradients = backward(unpacked, *grad_outputs)
        anchors = [t for t in (*grad_outputs, *unpacked.saved_tensors) if t is not None and t.requires_grad]
        found = [g for g in gradients if g is not None]
        once = iter(_Once.apply(len(found), *found, *anchors))
        return tuple(None if g is None else next(once) for g in gradients)

    return wrapper


class _Unpacked:
    """The context of a backward, its saved tensors unpacked once, as checkpointing's hooks want it."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Once(torch.autograd.Function):
    """The first ``count`` of ``tensors``, which depend on the others in a way that has no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(_TWICE)


_TWICE = (
    "An INT8 linear cannot be differentiated twice (gradient penalties, Hessian-vector products). Name the layers that "
    "such a loss goes through in ignore_modules, or train them without INT8."
)


class _Int8Linear(torch.autograd.Function):
    """X ``[M, K]``, W ``[N, K]``, bias ``[N]`` or ``None``; ``needs`` says which of dX, dW and db autograd wants.

    X comes quantized too (``planes``), unless neither the forward nor the wgrad is INT8.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        planes: QuantizedInput | None,
        weight_planes: QuantizedWeight | None,
        state: Tensor | None,
        update: bool,
        recipe: Int8Recipe,
        backend: str,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        scheme = scheme_of(recipe)
        saved: tuple[Tensor, ...] = ()
        weight_scale = None
        if needs[1]:
            saved = planes.saved if recipe.wgrad and planes is not None else (x,)
        if recipe.forward and planes is not None and planes.operand is not None:
            w = (weight_planes or scheme.quantize_weight(weight, False, backend)).forward
            assert w is not None
            if weight_planes is None and needs[0] and recipe.dgrad and scheme.quantizes_once:
                weight_scale = w.scale
            y = scheme.gemm(planes.operand, w, bias, x.dtype, backend)
            if planes.remainder is not None:
                y = y + planes.remainder
        else:
            y = _high_precision_linear(x, weight, bias)
        ctx.save_for_backward(weight, weight_scale, *saved)
        # Not a saved tensor, which may not change until the backward: a layer called twice counts in both backwards.
        ctx.state, ctx.weight_planes = state, weight_planes
        ctx.recipe, ctx.backend, ctx.needs, ctx.update = recipe, backend, needs, update
        ctx.input_size, ctx.input_dtype = tuple(x.shape), x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        weight, weight_scale, *saved = ctx.saved_tensors
        recipe, backend, state = ctx.recipe, ctx.backend, ctx.state
        needs_dx, needs_dw, needs_db = ctx.needs
        scheme = scheme_of(recipe)
        int8_dgrad, int8_wgrad = needs_dx and recipe.dgrad, needs_dw and recipe.wgrad
        dx = dw = db = None
        if int8_dgrad or int8_wgrad:
            w = ctx.weight_planes if int8_dgrad else None
            if int8_dgrad and w is None:
                w = scheme.quantize_weight_for_dgrad(weight, weight_scale, backend)
            g = scheme.quantize_gradient(
                dy, w, tuple(saved) if int8_wgrad else None, ctx.input_size, state, ctx.update, needs_db, backend
            )
            db = g.dbias
            if w is not None and w.dgrad is not None and g.dgrad is not None:
                dx = scheme.gemm(g.dgrad, w.dgrad, None, ctx.input_dtype, backend)
            if g.wgrad is not None and g.input_transposed is not None:
                dw = scheme.gemm(g.wgrad, g.input_transposed, None, weight.dtype, backend)
        if needs_db and db is None:
            db = dy.sum(0, dtype=torch.float32)
        if needs_dx and dx is None:
            dx = (dy @ weight.to(dy.dtype)).to(ctx.input_dtype)
        if needs_dw and dw is None:
            dw = (dy.t() @ saved[0]).to(weight.dtype)
        return dx, dw, None if db is None else db.to(ctx.bias_dtype), *[None] * 7


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recipe: str | Int8Recipe | dict[str, Any] = "row",
    state: FallbackState | None = None,
    update_state: bool = True,
    share_input: bool = False,
    weight_planes: QuantizedWeight | None = None,
) -> Tensor:
    """``x @ weightᵀ + bias`` with forward, dgrad and wgrad in INT8, as ``recipe`` says. Differentiable, once.

    Under autocast ``x`` is cast to the autocast dtype as ``F.linear`` would; the weight is quantized from its own
    dtype. NaN and infinities come out as NaN at least wherever full precision would have NaN or an infinity: scales
    carry them, so they also reach what shares the scale (the row, or the block). An empty batch gives an empty result.

    Args:
        x: float ``[..., K]`` (bf16, fp16, fp32 or fp64), any strides. fp64 is quantized from its fp32 value.
        weight: float ``[N, K]``.
        bias: float ``[N]``.
        recipe: Preset name, :class:`Int8Recipe` or mapping of its fields.
        state: The layer's delayed thresholds; made for the same recipe. ``None``: the blocks with the largest AbsMax of
            each tensor at hand fall back, at the rate of the recipe's budget, or at the middle of its band.
        update_state: Whether this call may seed thresholds and count blocks: true when training. Never under
            ``torch.inference_mode`` or in activation checkpointing's second run, whatever this says.
        share_input: Whether to leave ``x``'s planes on ``x``, where that is an alias made for it, for the next linear
            that reads it, and to take those that an earlier one left: see :mod:`lightning_int8.sharing`.
        weight_planes: ``weight`` quantized for the forward and the dgrad by the same recipe; ``None``: it is quantized
            here, for each.

    Returns:
        ``[..., N]`` in ``x``'s dtype (the autocast dtype under autocast).

    Raises:
        TypeError: A tensor is not floating-point, or the dtypes of ``x``, ``weight`` and ``bias`` differ outside
            autocast.
        ValueError: Shapes do not fit, ``weight`` is empty, or ``state`` is of another recipe.
        RuntimeError: Tensors are on different devices, or a forced backend cannot run there.
    """
    recipe = resolve_recipe(recipe)
    _check_tensors(x, weight, bias)
    source = x
    device_type = x.device.type
    autocast = autocasts(x)
    if autocast:
        x = x.to(torch.get_autocast_dtype(device_type))
    elif x.dtype != weight.dtype:
        raise TypeError(
            f"int8_linear: x is {x.dtype} but weight is {weight.dtype}. Give both the same dtype, or run under "
            "torch.autocast (the plugin's precision='bf16-mixed')."
        )
    elif bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"int8_linear: bias is {bias.dtype} but x and weight are {x.dtype}. Give all the same dtype.")
    if state is not None and state.recipe != recipe:
        raise ValueError(
            f"int8_linear: state was made for recipe {state.recipe.describe()} but recipe is {recipe.describe()}; make "
            "the state with FallbackState(recipe)."
        )
    backend = backends.choose(recipe.backend, x.device)
    grad = torch.is_grad_enabled()
    needs = (grad and x.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad)
    forward_state, backward_state = state.on(x.device) if state is not None and state.operands else (None, None)
    flat = x.reshape(-1, x.shape[-1])
    # The wgrad contracts over tokens, and its INT32 bound holds up to this many; autograd sums the pieces.
    pieces = flat.split(MAX_WGRAD_TOKENS) if flat.shape[0] > MAX_WGRAD_TOKENS else (flat,)
    wgrad = needs[1] and recipe.wgrad
    # Siblings share the planes of a tensor that is quantized whole.
    key = (recipe, update_state, x.dtype) if share_input and len(pieces) == 1 else None
    outs = []
    with torch.autocast(device_type, enabled=False) if autocast else contextlib.nullcontext():
        for piece in pieces:
            if flat.shape[0] == 0:
                outs.append(_high_precision_linear(flat, weight, bias))
                continue
            planes = None
            if recipe.forward or wgrad:
                planes = shared_planes(source, key, wgrad) if key else None
                if planes is None:
                    planes = scheme_of(recipe).quantize_input(
                        piece.detach(), weight.detach(), forward_state, update_state, wgrad, backend
                    )
                    if key:
                        leave_planes(source, key, planes)
            outs.append(
                _Int8Linear.apply(
                    piece, weight, bias, planes, weight_planes, backward_state, update_state, recipe, backend, needs
                )
            )
    y = outs[0] if len(outs) == 1 else torch.cat(outs)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def autocasts(x: Tensor) -> bool:
    """Whether autocast applies to ``x``, as it would in F.linear, which leaves float64 alone."""
    # Meta tensors (shape inference) know no autocast.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _high_precision_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"int8_linear: {name} is a DTensor. Convert the parallelized layer with convert_to_int8, which "
                f"computes on each rank's shard, or pass {name}.to_local()."
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"int8_linear: {name} is {tensor.dtype}; it must be a real floating-point tensor (bfloat16, float16, "
                f"float32 or float64). Convert it with {name}.to(torch.bfloat16)."
            )
        if tensor.device != x.device:
            raise RuntimeError(f"int8_linear: {name} is on {tensor.device} but x is on {x.device}; move one of them.")
    if x.ndim == 0:
        raise ValueError("int8_linear: x is a scalar; it must be [..., K].")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"int8_linear: weight has shape {list(weight.shape)}; it must be [N, K] with N and K at least 1."
        )
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"int8_linear: x {list(x.shape)} has {x.shape[-1]} features but weight {list(weight.shape)} takes "
            f"K={weight.shape[1]}."
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"int8_linear: bias has shape {list(bias.shape)}; weight {list(weight.shape)} needs [N={weight.shape[0]}]."
        )
