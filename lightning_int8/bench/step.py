"""A whole training step in every precision: forward, loss, backward, fused AdamW, thresholds; BF16 around the linears.

All precisions train the same parameters in turn, so that they fit one GPU and are timed in the same rounds.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_int8.bench.precisions import Precision
from lightning_int8.bench.timing import Clock, interleaved, kernel_times, low_precision_share, peak_gib, seconds
from lightning_int8.bench.workload import Workload
from lightning_int8.threshold import RATE, FallbackState, fallback_states, update_thresholds


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


def make_step(workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """One training step of ``model`` on the workload's batch."""
    states = list(fallback_states(model).values())

    def step() -> None:
        with torch.autocast(workload.device.type, torch.bfloat16):
            loss = workload.loss(model, workload.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if states:
            update_thresholds(states)

    return step


def measure(
    workload: Workload,
    precisions: Sequence[Precision],
    compiled: bool,
    clock: Clock,
    until: float,
    steps: int = 5,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times the workload's training step in every precision for which there is time.

    Args:
        workload: What to train. Its parameters are trained.
        precisions: BF16 first.
        compiled: Whether each repeated layer is compiled (the whole model where there is none), or nothing.
        clock: No other precision is begun once ``until`` of it is spent.
        until: A fraction of the clock's time.
        steps: Rounds to time, after one of warm-up.
        report: Told what is done.

    Returns:
        ``model``, ``tokens``, ``compiled`` and ``cells``: for each precision ``ms``, ``ratio``, ``peak_gib``,
        ``first_step_s`` (in this process, compilation included), ``fallback_rate``, ``gpu_ms`` (of all kernels),
        ``kernels`` (the longest) and ``low_precision_share``;
        ``error`` if it did not run, ``skipped`` if there was no time.
    """
    device = workload.device
    # One entry a precision, plus what dynamic shapes or flags may add.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(precisions))
    cells: dict[str, dict[str, Any]] = {precision.name: {} for precision in precisions}
    runs: dict[str, Callable[[], None]] = {}
    models: dict[str, nn.Module] = {}
    optimizers: dict[tuple[int, ...], torch.optim.Optimizer] = {}
    for precision in precisions:
        cell = cells[precision.name]
        if runs and not clock.before(until):
            cell["skipped"] = f"out of time ({clock.seconds:.0f} s)"
            continue
        report(f"{workload.name}, {precision.name}: compiling" if compiled else f"{workload.name}, {precision.name}")
        # A peer that cannot train this model is a result, not the end of the table.
        try:
            model = precision.convert(_sharing_parameters(workload.model), workload.ignore_modules)
            if compiled:
                for layer in repeated_layers(model) or [model]:
                    layer.compile()
            owned = tuple(id(p) for p in model.parameters())
            if owned not in optimizers:
                optimizers[owned] = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            step = make_step(workload, model, optimizers[owned])
            cell["first_step_s"] = seconds(step, device)
            runs[precision.name], models[precision.name] = step, model
        except Exception as error:
            cell["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    times = interleaved(runs, device, steps, warmup=1, steady=True)
    for name, run in runs.items():
        cells[name] |= {"ms": times[name], "ratio": times["bf16"] / times[name], "peak_gib": peak_gib(run, device)}
        kernels = kernel_times(run, device)
        if kernels:
            cells[name] |= {"gpu_ms": sum(kernels.values()), "kernels": dict(list(kernels.items())[:25])}
            if name != "bf16":
                cells[name]["low_precision_share"] = low_precision_share(kernels)
        rates = [rate for state in fallback_states(models[name]).values() if (rate := _mean_rate(state)) is not None]
        if rates:
            cells[name]["fallback_rate"] = statistics.mean(rates)
    # What was compiled holds on to the model.
    torch._dynamo.reset()
    return {"model": workload.name, "tokens": workload.tokens, "compiled": compiled, "cells": cells}


def _sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with its very parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _mean_rate(state: FallbackState) -> float | None:
    """Mean fallback rate of a layer's operands at its last update."""
    tensor = state.tensor
    return None if tensor is None or not len(tensor) else tensor[:, RATE].nanmean().item()
