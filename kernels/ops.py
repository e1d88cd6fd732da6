"""The quantize and GEMM steps as opaque `torch.library` ops: what autograd, `torch.compile` and FLOP counters see.

Each op has the signature of its reference (:mod:`lightning_int8.kernels.reference`) plus the name of the backend that
runs it, a fake implementation for tracing, and, for GEMMs, a FLOP formula. Operands travel as plain tensors and sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_int8.kernels import backends
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along, groups_along, padded
from lightning_int8.kernels.power import measure_gradient_power, measure_power
from lightning_int8.kernels.replay import repeated

_library = torch.library.Library("lightning_int8", "DEF")


def _define(
    name: str, mutates: Sequence[str] = (), tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Makes a function the op ``lightning_int8::name``, with the schema that its annotations say.

    ``torch.library.custom_op`` would do the same with four Python frames around each call for autograd, which these ops
    are never differentiated by; small models are bound by such host time.
    """

    def define(function: Callable[..., Any]) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.lightning_int8, name).default

    return define


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"lightning_int8::{name}", lib=_library)


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    """``backend``'s function."""
    return repeated(backend, getattr(backends.load(backend), name))


def _may_count() -> bool:
    """Whether a forward op may change its layer's state: not under inference mode, nor in a backward.

    A forward op inside a backward is activation checkpointing's second run. Asked here, inside the op, since a traced
    program could not ask.
    """
    return torch._C._current_graph_task_id() == -1 and not torch.is_inference_mode_enabled()


@_define("quantize_row", mutates=["state"])
def quantize_row(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.reference.quantize_row`; ``state`` counts once under checkpointing.

    As all ops that quantize, it also measures what a budget weighs, if ``state`` has columns for that.
    """
    update = update and _may_count()
    planes = _implementation(backend, "quantize_row")(x, state, operand, seed_rate, capacity, block, update, transpose)
    if update:
        measure_power(x, planes[5], state, operand, backend)
    return planes


@_fake("quantize_row")
def _(x, state, operand, seed_rate, capacity, block, update, transpose, backend):
    rows, columns = x.shape
    low = x.new_empty(rows, padded(columns, block), dtype=torch.int8)
    low_t = x.new_empty((columns, padded(rows, block)) if transpose else (0,), dtype=torch.int8)
    high = x.new_empty(capacity, block, block, dtype=torch.int8)
    high_t = x.new_empty((capacity, block, block) if transpose else (0,), dtype=torch.int8)
    slot = x.new_empty(blocks_along(rows, block), blocks_along(columns, block), dtype=torch.int32)
    scale = x.new_empty(rows, dtype=torch.float32)
    return low, low_t, high, high_t, slot, scale, torch.empty_like(scale)


@_define("quantize_row_gradient", mutates=["state"])
def quantize_row_gradient(
    dy: Tensor,
    weight_scale: Tensor | None,
    input_scale: Tensor | None,
    input_int_max: Tensor | None,
    state: Tensor | None,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    stochastic: str,
    bias: bool,
    backend: str,
    statistics: Sequence[Tensor],
    group_blocks: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.reference.quantize_row_gradient`; ``statistics`` may be empty."""
    planes = _implementation(backend, "quantize_row_gradient")(
        dy, weight_scale, input_scale, input_int_max, state, seed_rate, capacity, block, update, stochastic, bias,
        statistics, group_blocks,
    )  # fmt: skip
    if update:
        measure_gradient_power(dy, weight_scale, input_scale, planes[3], planes[7], state, backend)
    return planes


@_fake("quantize_row_gradient")
def _(
    dy, weight_scale, input_scale, input_int_max, state, seed_rate, capacity, block, update, stochastic, bias, backend,
    statistics, group_blocks=0,
):  # fmt: skip
    tokens, features = dy.shape
    out = []
    for fold, rows, columns in ((weight_scale, tokens, features), (input_scale, features, tokens)):
        if fold is None:
            out += [dy.new_empty(0, dtype=d) for d in (torch.int8, torch.int8, torch.int32, torch.float32)]
            continue
        out += [
            dy.new_empty(rows, padded(columns, block), dtype=torch.int8),
            dy.new_empty(capacity, block, block, dtype=torch.int8),
            dy.new_empty(blocks_along(rows, block), blocks_along(columns, block), dtype=torch.int32),
            dy.new_empty(rows, dtype=torch.float32),
        ]
    if group_blocks and input_scale is not None:
        out[-1] = dy.new_empty(groups_along(tokens, block, group_blocks), features, dtype=torch.float32)
    return (*out, dy.new_empty(features if bias else 0, dtype=torch.float32))


@_define("quantize_block", mutates=["state"])
def quantize_block(
    x: Tensor,
    state: Tensor | None,
    operand: int,
    seed_rate: float,
    capacity: int,
    block: int,
    update: bool,
    transpose: bool,
    stochastic: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`lightning_int8.kernels.reference.quantize_block`; X (operand 0) counts once under checkpointing."""
    update = update and (operand != 0 or _may_count())
    if update:
        measure_power(x, None, state, operand, backend)
    return _implementation(backend, "quantize_block")(
        x, state, operand, seed_rate, capacity, block, update, transpose, stochastic
    )


@_fake("quantize_block")
def _(x, state, operand, seed_rate, capacity, block, update, transpose, stochastic, backend):
    rows, columns = x.shape
    blocks = blocks_along(rows, block), blocks_along(columns, block)
    return (
        x.new_empty(rows, padded(columns, block), dtype=torch.int8),
        x.new_empty((columns, padded(rows, block)) if transpose else (0,), dtype=torch.int8),
        x.new_empty(capacity, block, block, dtype=torch.int8),
        x.new_empty((capacity, block, block) if transpose else (0,), dtype=torch.int8),
        x.new_empty(blocks, dtype=torch.int32),
        x.new_empty(blocks, dtype=torch.float32),
    )


@_define("transposed_integers")
def transposed_integers(x: Tensor, scale: Tensor, block: int, backend: str) -> Tensor:
    """See :func:`lightning_int8.kernels.reference.transposed_integers`."""
    return _implementation(backend, "transposed_integers")(x, scale, block)


@_fake("transposed_integers")
def _(x, scale, block, backend):
    rows, columns = x.shape
    return x.new_empty(columns, padded(rows, block), dtype=torch.int8)


def _gemm_fake(
    a_low, a_high, a_slot, a_scale, b_low, b_high, b_slot, b_scale, bias, depth, block, out_dtype, backend,
    group_blocks=0,
):  # fmt: skip
    return a_low.new_empty(a_low.shape[0], b_low.shape[0], dtype=out_dtype)


@functools.cache
def _product(backend: str, kernel: str, grouped: bool) -> Callable[..., Tensor]:
    """``backend``'s GEMM, given its operands' fields; as `_implementation`."""
    function = getattr(backends.load(backend), f"{kernel}_groups" if grouped else kernel)

    def product(
        a_low, a_high, a_slot, a_scale, b_low, b_high, b_slot, b_scale, bias, depth, block, out_dtype, group_blocks
    ):  # fmt: skip
        a = QuantizedMatrix(a_low, a_high, a_slot, a_scale, (a_low.shape[0], depth), block)
        b = QuantizedMatrix(b_low, b_high, b_slot, b_scale, (b_low.shape[0], depth), block)
        return function(a, b, out_dtype, group_blocks) if grouped else function(a, b, bias, out_dtype)

    # Groups' sums are freed one after another, which memory shared by all that is not returned would not be.
    return product if grouped else repeated(backend, product)


def _gemm_op(name: str, kernel: str) -> torch._ops.OpOverload:
    @_define(name)
    def op(
        a_low: Tensor,
        a_high: Tensor | None,
        a_slot: Tensor | None,
        a_scale: Tensor | None,
        b_low: Tensor,
        b_high: Tensor | None,
        b_slot: Tensor | None,
        b_scale: Tensor | None,
        bias: Tensor | None,
        depth: int,
        block: int,
        out_dtype: torch.dtype,
        backend: str,
        group_blocks: int = 0,
    ) -> Tensor:
        return _product(backend, kernel, group_blocks > 0)(
            a_low, a_high, a_slot, a_scale, b_low, b_high, b_slot, b_scale, bias, depth, block, out_dtype, group_blocks
        )

    _fake(name)(_gemm_fake)
    return op


_gemm_row, _gemm_block = _gemm_op("gemm_row", "gemm_row"), _gemm_op("gemm_block", "gemm_block")
# The same under another name: equal calls of one op in forward and backward would be merged into one by the compiler,
# and its result kept.
_gemm_row_again = _gemm_op("gemm_row_again", "gemm_row")


@register_flop_formula(
    [
        torch.ops.lightning_int8.gemm_row,
        torch.ops.lightning_int8.gemm_row_again,
        torch.ops.lightning_int8.gemm_block,
    ]
)
def _gemm_flops(
    a_shape, a_high, a_slot, a_scale, b_shape, b_high, b_slot, b_scale, bias, depth, *args, **kwargs
) -> int:
    """Of the matrix product itself; fallback blocks repeat part of it but add nothing to the model's work."""
    return 2 * a_shape[0] * b_shape[0] * depth


def gemm_row(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
    again: bool = False,
    group_blocks: int = 0,
) -> Tensor:
    """See :func:`lightning_int8.kernels.reference.gemm_row`, and with ``group_blocks`` `groups.gemm_row_groups`.

    Args:
        a: First operand.
        b: Second operand.
        bias: See there.
        out_dtype: See there.
        backend: Who runs it.
        again: In a backward, for a product of the forward that was not kept.
        group_blocks: Blocks of the contraction that share ``a``'s scales, without ``bias``; 0: all.
    """
    op = _gemm_row_again if again else _gemm_row
    return op(*_flat(a), *_flat(b), bias, a.size[1], a.block, out_dtype, backend, group_blocks)


def gemm_block(
    a: QuantizedMatrix, b: QuantizedMatrix, bias: Tensor | None, out_dtype: torch.dtype, backend: str
) -> Tensor:
    """See :func:`lightning_int8.kernels.reference.gemm_block`."""
    return _gemm_block(*_flat(a), *_flat(b), bias, a.size[1], a.block, out_dtype, backend)


def _flat(a: QuantizedMatrix) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    return a.low, a.high, a.slot, a.scale


# Inductor leaves it out of CUDA graphs, which cannot wait for the host.
@_define("split_outlier_columns", tags=[torch.Tag.cudagraph_unsafe])
def split_outlier_columns(x: Tensor, weight: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """LLM.int8()'s decomposition (arXiv 2208.07339): columns of X with outliers are multiplied in X's own dtype.

    Finding the columns needs their number on the host, so this waits for the device.

    Args:
        x: float ``[M, K]``.
        weight: float ``[N, K]``.
        threshold: A column is an outlier when its AbsMax exceeds this.

    Returns:
        ``x`` with the outlier columns set to zero, and the outlier columns' share of the product, ``[M, N]`` in ``x``'s
        dtype.
    """
    columns = (x.abs().amax(0) > threshold).nonzero().flatten()
    plain = x.clone()
    plain[:, columns] = 0
    return plain, x[:, columns] @ weight[:, columns].to(x.dtype).t()


@_fake("split_outlier_columns")
def _(x, weight, threshold):
    return torch.empty_like(x), x.new_empty(x.shape[0], weight.shape[0])
