"""A whole training step in every precision: forward, loss, backward, fused AdamW, thresholds; BF16 around the linears.

One precision after the other, as the memory of CUDA graphs, and most models, leave no room for two.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8.bench.precisions import Precision
from lightning_int8.bench.timing import Clock, in_a_row, kernel_times, low_precision_share, seconds
from lightning_int8.bench.workload import Workload
from lightning_int8.threshold import RATE, FallbackState, fallback_states, update_thresholds

# Steps before the timed ones in which thresholds find their bands: their first values are those of a first batch.
SETTLING = 15
# `torch.compile`'s mode, by what the command line calls it.
COMPILING = {"graphs": "reduce-overhead", "layers": "default", "none": None}


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of which a model is a stack: compiled one by one they compile once, whatever the depth."""

    def found(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            kinds = {type(layer) for layer in child.children()} if isinstance(child, nn.ModuleList) else set()
            if len(kinds) == 1 and len(child) > 1:  # type: ignore[arg-type]
                yield from child.children()
            else:
                yield from found(child)

    return list(found(model))


def make_step(
    loss: Callable[[], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, group: Any = None
) -> Callable[[], Tensor]:
    """One training step, which returns its loss.

    Args:
        loss: The forward; it runs under BF16 autocast.
        model: Whose thresholds move after the step.
        optimizer: Of the model's parameters.
        group: The process group whose ranks share thresholds; ``None``: all.
    """
    states = list(fallback_states(model).values())
    device_type = next(model.parameters()).device.type

    def step() -> Tensor:
        # Where graphs are replayed, they may take the memory of the step before.
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device_type, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if states:
            update_thresholds(states, group)
        return value

    return step


def measure(
    workload: Workload,
    precisions: Sequence[Precision],
    compiling: str,
    clock: Clock,
    until: float,
    steps: int = 6,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times the workload's training step in every precision for which there is time, one after the other.

    Args:
        workload: What to train. Its parameters are trained.
        precisions: BF16 first.
        compiling: A key of ``COMPILING``. Each repeated layer is compiled; the whole model where there is none.
        clock: No other precision is begun that, as slow as the slowest after the first, would end past ``until`` of it.
        until: A fraction of the clock's time.
        steps: Steps to time, one behind the other.
        report: Told what is done.

    Returns:
        ``model``, ``tokens``, ``compiling`` and ``cells``: for each precision ``ms``, ``ratio``, ``peak_gib``
        (reserved: it holds what CUDA graphs keep), ``first_step_s`` (in this process, compilation included),
        ``fallback_rate``, ``gpu_ms`` (of all kernels), ``kernels`` (the longest) and ``low_precision_share``; ``error``
        if it did not run, ``skipped`` if there was no time.
    """
    cells: dict[str, dict[str, Any]] = {}
    durations: list[float] = []
    for precision in precisions:
        # The first also loads what all of them need.
        if cells and not clock.before(until, max(durations[1:], default=0.0)):
            cells[precision.name] = {"skipped": f"out of time ({clock.seconds:.0f} s)"}
            continue
        report(f"{workload.name}, {precision.name}")
        begin = clock.spent
        # A peer that cannot train this model is a result, not the end of the table.
        try:
            cells[precision.name] = _measure_one(workload, precision, compiling, steps)
        except Exception as error:
            cells[precision.name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        # What was compiled holds on to the model, and its graphs to their memory.
        torch._dynamo.reset()
        gc.collect()
        if workload.device.type == "cuda":
            torch.cuda.empty_cache()
        durations.append(clock.spent - begin)
    for cell in cells.values():
        if "ms" in cell and "ms" in cells["bf16"]:
            cell["ratio"] = cells["bf16"]["ms"] / cell["ms"]
    return {"model": workload.name, "tokens": workload.tokens, "compiling": compiling, "cells": cells}


def _measure_one(workload: Workload, precision: Precision, compiling: str, steps: int) -> dict[str, Any]:
    device = workload.device
    model = precision.convert(_sharing_parameters(workload.model), workload.ignore_modules)
    mode = COMPILING[compiling]
    for layer in (repeated_layers(model) or [model]) if mode else ():
        layer.compile(mode=mode)
    # So slow that the one batch is not learnt: its gradients would be like no others.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, fused=True)
    step = make_step(lambda: workload.loss(model, workload.batch), model, optimizer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cell: dict[str, Any] = {"first_step_s": seconds(step, device)}
    cell["ms"] = in_a_row(step, device, steps, SETTLING if fallback_states(model) else 2)
    if device.type == "cuda":
        cell["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if kernels := kernel_times(step, device):
        cell |= {"gpu_ms": sum(kernels.values()), "kernels": dict(list(kernels.items())[:25])}
        if precision.name != "bf16":
            cell["low_precision_share"] = low_precision_share(kernels)
    rates = [rate for state in fallback_states(model).values() if (rate := _mean_rate(state)) is not None]
    if rates:
        cell["fallback_rate"] = statistics.mean(rates)
    return cell


def _sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its very parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _mean_rate(state: FallbackState) -> float | None:
    """Mean fallback rate of a layer's operands at its last update."""
    tensor = state.tensor
    return None if tensor is None or not len(tensor) else tensor[:, RATE].nanmean().item()
