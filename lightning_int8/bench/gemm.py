"""The three INT8 GEMMs of a linear layer alone, checked, beside cuBLAS BF16 and PyTorch's own FP8 and INT8 products.

Operands are made as integers (low plane normal with a deviation of 32, high plane within ±3), so this times the GEMM
and the lists it makes of its fallback blocks, without quantization. TFLOP/s are of the product, 2·M·N·K, whatever the
extra work of fallback blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_int8.bench.roofline import Peak, gemm_milliseconds
from lightning_int8.bench.timing import interleaved, kernel_times, low_precision_share
from lightning_int8.kernels import backends, reference
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along
from lightning_int8.recipe import Int8Recipe

BLOCK = 128
CORNER = 256
# The rate that is timed beside none and a recipe's budget: the middle of the paper's band.
BAND = 0.2
# Lowest SQNR in dB of an output's corners against the reference.
EXACT = {"row": math.inf, "block": 40.0}


def timed(product: str, recipes: Sequence[Int8Recipe]) -> dict[str, tuple[float, ...]]:
    """The rates of fallback blocks at which ``product`` is timed, by the scalings of ``recipes``.

    None, the budget and :data:`BAND`; none alone in a wgrad where the recipes mix contractions. LLM.int8() has no GEMMs
    of its own.
    """
    found: dict[str, set[float]] = {}
    for recipe in recipes:
        if recipe.scaling != "vector":
            rates = found.setdefault(recipe.scaling, {0.0})
            if product != "wgrad" or not recipe.mixes:
                rates |= {BAND} if recipe.budget is None else {recipe.budget, BAND}
    return {scaling: tuple(sorted(rates)) for scaling, rates in found.items()}


def peers(device: torch.device) -> tuple[str, ...]:
    """PyTorch's own 8-bit products that run on ``device``."""
    if device.type != "cuda":
        return ()
    fp8 = ("fp8-tensorwise", "fp8-rowwise") if torch.cuda.get_device_capability(device) >= (8, 9) else ()
    return (*fp8, "int8-torch")


def operand(
    rows: int, depth: int, rate: float, scaling: str, scaled: bool, device: torch.device | str = "cuda"
) -> QuantizedMatrix:
    """A random ``[rows, depth]`` with a fraction ``rate`` of fallback blocks."""
    shape = blocks_along(rows, BLOCK), blocks_along(depth, BLOCK)
    low = torch.zeros(rows, shape[1] * BLOCK, dtype=torch.int8, device=device)
    low[:, :depth] = (
        torch.empty(rows, depth, dtype=torch.float16, device=device).normal_(0, 32).round_().clamp_(-127, 127)
    )
    high = slot = scale = None
    if rate:
        mask = torch.rand(shape, device=device) < rate
        slot = (mask.flatten().cumsum(0).view(shape) - 1).where(mask, -1).to(torch.int32)
        high = torch.randint(-3, 4, (int(mask.sum()) + 1, BLOCK, BLOCK), dtype=torch.int8, device=device)
    if scaling == "block" or scaled:
        scale = torch.rand(shape if scaling == "block" else rows, device=device) * 1e-2
    return QuantizedMatrix(low, high, slot, scale, (rows, depth), BLOCK)


def products(tokens: int, k: int, n: int) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and contraction of a linear's three products."""
    return {"forward": (tokens, n, k), "dgrad": (tokens, k, n), "wgrad": (n, k, tokens)}


def part(a: QuantizedMatrix, start: int) -> QuantizedMatrix:
    """Some rows of ``a`` from a multiple of the block edge on."""
    rows, blocks = slice(start, start + CORNER), slice(start // BLOCK, (start + CORNER) // BLOCK)
    low = a.low[rows]
    slot = None if a.slot is None else a.slot[blocks]
    scale = None if a.scale is None else a.scale[blocks if a.scale.dim() == 2 else rows]
    return QuantizedMatrix(low, a.high, slot, scale, (low.shape[0], a.size[1]), BLOCK)


def check(out: Tensor, a: QuantizedMatrix, b: QuantizedMatrix, scaling: str) -> None:
    """Raises ``AssertionError`` unless the corners of ``out`` are right."""
    if not out.isfinite().all():
        raise AssertionError("the output has elements that are not finite")
    for i in (0, (a.size[0] - 1) // BLOCK * BLOCK):
        for j in (0, (b.size[0] - 1) // BLOCK * BLOCK):
            wanted = getattr(reference, f"gemm_{scaling}")(part(a, i), part(b, j), None, out.dtype).double()
            noise = out[i : i + CORNER, j : j + CORNER].double() - wanted
            sqnr = 10 * torch.log10(wanted.square().sum() / noise.square().sum()).item()
            if sqnr < EXACT[scaling]:
                raise AssertionError(f"{scaling} {a.size}x{b.size} at ({i}, {j}): SQNR {sqnr:.1f} dB")


def bf16(name: str, rows: int, columns: int, depth: int, device: torch.device | str = "cuda") -> Callable[[], Tensor]:
    """The BF16 product of cuBLAS on the operands as autograd has them."""
    a = torch.randn((depth, rows) if name == "wgrad" else (rows, depth), device=device, dtype=torch.bfloat16)
    b = torch.randn((columns, depth) if name == "forward" else (depth, columns), device=device, dtype=torch.bfloat16)
    a = a.t() if name == "wgrad" else a
    b = b.t() if name == "forward" else b
    return lambda: a @ b


def ours(
    name: str, rows: int, columns: int, depth: int, scaling: str, rate: float, backend: str, device: torch.device
) -> tuple[Callable[[], Tensor], QuantizedMatrix, QuantizedMatrix]:
    """One of this package's products and its operands; the wgrad has fallback blocks on both."""
    a = operand(rows, depth, rate, scaling, True, device)
    b = operand(columns, depth, rate if name == "wgrad" else 0.0, scaling, name == "forward", device)
    run = functools.partial(getattr(backends.load(backend), f"gemm_{scaling}"), a, b, None, torch.bfloat16)
    return run, a, b


def checked(
    name: str, rows: int, columns: int, depth: int, scaling: str, rate: float, backend: str, device: torch.device
) -> Callable[[], Tensor]:
    """The product of :func:`ours`; ``AssertionError`` where it is wrong."""
    run, a, b = ours(name, rows, columns, depth, scaling, rate, backend, device)
    check(run(), a, b, scaling)
    return run


def peer(name: str, rows: int, columns: int, depth: int, device: torch.device) -> Callable[[], Tensor]:
    """PyTorch's product of the kernels that torchao calls; both operands contiguous along the contraction."""
    if name == "int8-torch":
        a = torch.randint(-127, 128, (rows, depth), dtype=torch.int8, device=device)
        b = torch.randint(-127, 128, (columns, depth), dtype=torch.int8, device=device)
        return lambda: torch._int_mm(a, b.t())
    a = torch.randn(rows, depth, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(columns, depth, device=device).to(torch.float8_e4m3fn)
    rowwise = name == "fp8-rowwise"
    scale_a = torch.ones((rows, 1) if rowwise else (), device=device)
    scale_b = torch.ones((1, columns) if rowwise else (), device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def measure(
    name: str,
    tokens: int,
    k: int,
    n: int,
    rates: Mapping[str, Sequence[float]],
    peers: Sequence[str],
    backend: str,
    device: torch.device,
    peak: Peak | None,
    bandwidth: float,
) -> dict[str, Any]:
    """Times the product ``name`` of an ``[n, k]`` linear over ``tokens`` tokens.

    Args:
        name: ``forward``, ``dgrad`` or ``wgrad``.
        tokens: Rows of X.
        k: In-features.
        n: Out-features.
        rates: Rates of fallback blocks by scaling, as of :func:`timed`.
        peers: As of :func:`peers`.
        backend: Of this package's GEMMs.
        device: Where.
        peak: Of the GPU, if known.
        bandwidth: Of a copy, bytes a second.

    Returns:
        ``product``, ``tokens``, ``k``, ``n`` and ``cells``: for BF16, each scaling at each rate and each peer ``ms``,
        ``tflops`` and ``ratio`` to BF16; ``model_ms`` where the GPU's peaks are known; ``low_precision_share`` for
        peers; ``error`` if it did not run or was wrong.
    """
    rows, columns, depth = products(tokens, k, n)[name]
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {"bf16": lambda: bf16(name, rows, columns, depth, device)}
    for scaling, wanted in rates.items():
        for rate in wanted:
            makers[f"{scaling} r={rate:g}"] = functools.partial(
                checked, name, rows, columns, depth, scaling, rate, backend, device
            )
    for other in peers:
        makers[other] = functools.partial(peer, other, rows, columns, depth, device)
    cells: dict[str, dict[str, Any]] = {head: {} for head in makers}
    runs = {}
    for head, make in makers.items():
        # What cannot run here, or is wrong, is a result, not the end of the table.
        try:
            run = make()
            run()
            if head in peers:
                kernels = cells[head]["kernels"] = kernel_times(run, device)
                cells[head]["low_precision_share"] = low_precision_share(kernels)
            runs[head] = run
        except (RuntimeError, ValueError, AssertionError) as error:
            cells[head]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times = interleaved(runs, device)
    for head, milliseconds in times.items():
        cells[head] |= {
            "ms": milliseconds,
            "tflops": 2 * rows * columns * depth / milliseconds / 1e9,
            "ratio": times["bf16"] / milliseconds,
        }
        if peak is not None:
            rate = float(head.partition("r=")[2] or 0.0)
            extra = (1 + rate) ** 2 if name == "wgrad" else 1 + rate
            rates_of = {"bf16": (peak.bf16, 2), "fp8": (peak.fp8, 1)}
            limit, size = rates_of.get(head.split("-")[0], (peak.int8, 1))
            if limit is not None:
                cells[head]["model_ms"] = gemm_milliseconds(rows, columns, depth, limit / extra, bandwidth, size)
    return {"product": name, "tokens": tokens, "k": k, "n": n, "cells": cells}
