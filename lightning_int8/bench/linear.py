"""One linear layer, forward and backward with all of its quantization, in every precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_int8.bench.precisions import Precision
from lightning_int8.bench.roofline import Peak, linear_milliseconds
from lightning_int8.bench.timing import interleaved, kernel_times, low_precision_share
from lightning_int8.kernels.planes import blocks_along
from lightning_int8.linear import Int8Linear
from lightning_int8.threshold import FALLBACK_BLOCKS, TOTAL_BLOCKS


def fallback_rate(layer: nn.Module) -> float | None:
    """Mean share of blocks that fell back since the layer's thresholds last moved; ``None`` without fallback."""
    if not isinstance(layer, Int8Linear) or not layer.int8_state.operands:
        return None
    counts = layer.int8_state.tensor
    assert counts is not None
    fallback, total = counts[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS]].sum(0).tolist()
    return fallback / total if total else None


def uneven(rows: int, columns: int, size: float, device: torch.device) -> torch.Tensor:
    """A random BF16 ``[rows, columns]`` whose 128×128 blocks differ in size, so that any of them may fall back."""
    blocks = torch.randn(blocks_along(rows, 128), blocks_along(columns, 128), device=device).exp_().mul_(size)
    sizes = blocks.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return torch.randn(rows, columns, device=device).mul_(sizes).bfloat16()


def operands(tokens: int, k: int, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """X ``[tokens, k]`` and dY ``[tokens, n]``, BF16."""
    return uneven(tokens, k, 1.0, device).requires_grad_(), uneven(tokens, n, 1e-3, device)


def prepared(
    precision: Precision, k: int, n: int, x: torch.Tensor, dy: torch.Tensor
) -> tuple[nn.Module, Callable[[], object]]:
    """A layer in this precision, and its forward and backward as under ``bf16-mixed``."""
    layer = precision.convert(nn.Sequential(nn.Linear(k, n, bias=False, device=x.device)), [])
    forward = torch.compile(layer, dynamic=False) if precision.compiled else layer

    def run() -> object:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = forward(x)
        return torch.autograd.grad(y, [x, *layer.parameters()], dy)

    return layer, run


def measure(
    tokens: int,
    k: int,
    n: int,
    precisions: Sequence[Precision],
    device: torch.device,
    peak: Peak | None,
    bandwidth: float,
) -> dict[str, Any]:
    """Milliseconds of an ``[n, k]`` linear over BF16 ``[tokens, k]``, forward and backward, as under ``bf16-mixed``.

    The weight is float32: BF16 casts it, and its gradient back; INT8 quantizes it as it is.

    Returns:
        ``tokens``, ``k``, ``n``, the ``weights``' dtype, and for each precision its ``ms``, ``ratio`` to BF16, of peers
        their ``low_precision_share``, ``fallback_rate`` where there is one; ``model_ms`` where the GPU's peaks are
        known; ``error`` if it did not run.
    """
    torch.manual_seed(0)
    x, dy = operands(tokens, k, n, device)
    runs: dict[str, Callable[[], object]] = {}
    layers: dict[str, nn.Module] = {}
    cells: dict[str, dict[str, Any]] = {}
    for precision in precisions:
        cell = cells[precision.name] = {}
        # A peer that cannot run this shape, or not on this GPU, is a result, not the end of the table.
        try:
            layer, run = prepared(precision, k, n, x, dy)
            run()
            if precision.compiled and (kernels := kernel_times(run, device)):
                cell["kernels"] = kernels
                cell["low_precision_share"] = low_precision_share(kernels)
            runs[precision.name], layers[precision.name] = run, layer
        except Exception as error:
            cell["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for name, milliseconds in interleaved(runs, device).items():
        cells[name]["ms"] = milliseconds
    for name, layer in layers.items():
        cells[name]["ratio"] = cells["bf16"]["ms"] / cells[name]["ms"]
        rate = fallback_rate(layer[0])  # type: ignore[index]
        if rate is not None:
            cells[name]["fallback_rate"] = rate
        recipe = layer[0].int8_recipe if isinstance(layer[0], Int8Linear) else None  # type: ignore[index]
        if peak is not None and (recipe is not None or name == "bf16"):
            cells[name]["model_ms"] = linear_milliseconds(tokens, k, n, recipe, rate or 0.0, peak, bandwidth)
    return {"tokens": tokens, "k": k, "n": n, "weights": "float32", "cells": cells}
