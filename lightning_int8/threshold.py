"""Delayed fallback thresholds: what a layer remembers between steps, and how it moves after each optimizer step.

A block falls back when its AbsMax exceeds the layer's threshold θ for that operand. θ is *delayed*: the quantize
kernels only count how many blocks exceeded it, and after the optimizer step it moves by a constant factor when the
measured rate left its band (arXiv 2503.08040, section 4). So no step waits for a statistic, and no host synchronisation
is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_int8.names import strip_wrappers
from lightning_int8.recipe import Int8Recipe

# Columns of FallbackState.tensor.
THRESHOLD, FALLBACK_BLOCKS, TOTAL_BLOCKS, RATE, STEP = range(5)
# A threshold stays in this range, so that a run of extreme steps cannot make it 0 or infinite for good.
MIN_THRESHOLD, MAX_THRESHOLD = 1e-30, 1e30
# Smallest exponent of the factor that a threshold moves by, and how fast the exponent recovers.
MIN_STEP, STEP_GROWTH = 1 / 64, 1.5

_OPERANDS = {"row": ("x", "dy_dgrad", "dy_wgrad"), "block": ("x", "dy"), "vector": ()}


class FallbackState:
    """Thresholds and block counters of one linear layer; a plain attribute, never a parameter or buffer.

    Attributes:
        recipe: The layer's recipe.
        operands: Names of the operands with a threshold, in the order of ``tensor``'s rows.
        parts: Two float32 ``[len(operands), 5]`` on the layer's device, or ``None`` until a device is known: the first
            is the forward's, which writes row 0 (X), the second the backward's, which writes the others. Two, because
            a traced program can change a tensor either in its forward or in its backward. Columns: threshold (AbsMax,
            in the operand's own unit; NaN before the first step seeds it), fallback blocks and total blocks since the
            last update, fallback rate at the last update (NaN before), exponent of the factor it last moved by.
    """

    def __init__(self, recipe: Int8Recipe) -> None:
        self.recipe = recipe
        fallback = recipe.activation_band[1] > 0 or recipe.gradient_band[1] > 0
        self.operands: tuple[str, ...] = _OPERANDS[recipe.scaling] if fallback else ()
        self.parts: tuple[Tensor, Tensor] | None = None

    @property
    def tensor(self) -> Tensor | None:
        """A copy of the rows in use, float32 ``[len(operands), 5]``, or ``None`` until a device is known."""
        return None if self.parts is None else rows_in_use([self.parts])

    @property
    def device(self) -> torch.device | None:
        """Where ``parts`` are."""
        return None if self.parts is None else self.parts[0].device

    def band(self, operand: str) -> tuple[float, float]:
        """Lowest and highest fallback rate that leaves ``operand``'s threshold where it is."""
        return self.recipe.activation_band if operand == "x" else self.recipe.gradient_band

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``parts`` on ``device``, made on first use and moved when the layer has moved."""
        if self.parts is None:
            fresh = torch.zeros(len(self.operands), 5)
            fresh[:, [THRESHOLD, RATE]] = float("nan")
            self._set(fresh, device)
        elif self.device != device:
            self._set(rows_in_use([self.parts]), device)
        return self.parts  # type: ignore[return-value]

    def _set(self, tensor: Tensor, device: torch.device) -> None:
        # A forward under inference_mode must not make an inference tensor that training could not update.
        with torch.inference_mode(False):
            tensor = tensor.detach().to(device, torch.float32)
            self.parts = (tensor.clone(), tensor.clone())

    @torch.no_grad()
    def discard_counts(self, gradient_factor: float = 1.0) -> None:
        """Forgets the blocks counted since the last update, leaving the thresholds where they are.

        Args:
            gradient_factor: What the gradients' thresholds are multiplied by: the new loss scale over the old one.
        """
        for part in self.parts or ():
            part[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS]] = 0.0
        self.scale_gradient_thresholds(gradient_factor)

    @torch.no_grad()
    def scale_gradient_thresholds(self, factor: float) -> None:
        """Multiplies the gradients' thresholds by ``factor``, when the unit of the gradients changed by it."""
        if self.parts is not None and factor != 1.0:
            self.parts[1][1:, THRESHOLD] *= factor

    def state_dict(self) -> dict[str, Any]:
        """The state as a CPU tensor and plain types; empty until a device is known.

        Counts since the last update are left out, as the gradients they belong to are not saved either.
        """
        tensor = self.tensor
        if tensor is None or not self.operands:
            return {}
        tensor = tensor.cpu()
        tensor[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS]] = 0.0
        return {"operands": list(self.operands), "tensor": tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: The state is of a recipe with other operands.
        """
        if not state:
            self.parts = None
            return
        if tuple(state["operands"]) != self.operands:
            raise ValueError(
                f"Thresholds for operands {list(state['operands'])} cannot be restored into a layer whose recipe "
                f"{self.recipe.describe()} has {list(self.operands)}. Use the recipe the checkpoint was trained with, "
                "or drop the saved thresholds to seed new ones."
            )
        self._set(torch.as_tensor(state["tensor"]), self.device or torch.device("cpu"))


def rows_in_use(parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The operands' rows of several ``FallbackState.parts``, layer after layer: float32 ``[operands, 5]``, a copy."""
    return torch.cat([rows for forward, backward in parts for rows in (forward[:1], backward[1:])])


def fallback_states(module: nn.Module) -> dict[str, FallbackState]:
    """The fallback state of every converted linear in ``module``, by the linear's name, in module order.

    Names are without what ``torch.compile``, FSDP, activation checkpointing and Fabric insert. Layers whose recipe
    never falls back have no state and are left out.
    """
    from lightning_int8.linear import Int8Linear

    return {
        strip_wrappers(name): child.int8_state
        for name, child in module.named_modules()
        if isinstance(child, Int8Linear) and child.int8_state.operands
    }


@torch.no_grad()
def update_thresholds(
    module: nn.Module | Iterable[FallbackState], process_group: dist.ProcessGroup | None = None
) -> None:
    """Moves every threshold whose measured fallback rate left its band, and starts counting anew.

    Call it once after each ``optimizer.step()``; the Lightning and Fabric plugins do. Runs on the device without a host
    synchronisation: a few kernels for the whole model. In a distributed run the counts of all ranks are summed (one
    all-reduce of 4 floats an operand), and thresholds come out identical on every rank. Every rank must hold the same
    layers and call this together.

    Args:
        module: The converted module, or its fallback states.
        process_group: The ranks that share the model's weights; the default group when ``None``.
    """
    states = fallback_states(module).values() if isinstance(module, nn.Module) else module
    states = [state for state in states if state.operands]
    if not states:
        return
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1
    if distributed:
        # A layer that has not run on this rank (or not since its state was restored, on the CPU) still takes part, on
        # the device of the others, or the all-reduces of the ranks would not match.
        home = _group_device(process_group, states)
        for state in states:
            if state.device is None or state.device.type != home.type:
                state.on(home)
    by_device: dict[torch.device, list[FallbackState]] = {}
    for state in states:
        if state.device is not None:
            by_device.setdefault(state.device, []).append(state)
    for device, group in by_device.items():
        _update_on_device(group, device, distributed, process_group)


def _update_on_device(
    states: list[FallbackState], device: torch.device, distributed: bool, process_group: dist.ProcessGroup | None
) -> None:
    parts = [state.on(device) for state in states]
    table = rows_in_use(parts)
    limits = tuple((*s.band(operand), s.recipe.threshold_factor) for s in states for operand in s.operands)
    low, high, factor = _on_device(limits, device).unbind(1)

    threshold, fallback, total = table[:, THRESHOLD], table[:, FALLBACK_BLOCKS], table[:, TOTAL_BLOCKS]
    # Anything but a positive number says nothing about the next step: such a threshold is seeded again.
    seeded = threshold.isfinite() & (threshold > 0)
    threshold = threshold.where(seeded, float("nan"))
    if distributed:
        # Thresholds differ between ranks only after each seeded its own: their mean is the common one.
        packed = torch.stack([threshold.where(seeded, 0.0), seeded.float(), fallback, total])
        dist.all_reduce(packed, group=process_group)
        threshold = packed[0] / packed[1]  # 0 / 0: NaN, not seeded anywhere
        fallback, total = packed[2], packed[3]
    rate = fallback / total  # 0 / 0 where nothing was counted: NaN, which compares false with both limits
    direction = (rate > high).float() - (rate < low).float()
    last = table[:, STEP]
    growing = torch.where(last == 0, 1.0, last.abs() * STEP_GROWTH).clamp_max(1.0)
    size = torch.where(direction * last < 0, last.abs() / 2, growing).clamp_min(MIN_STEP)
    step = torch.where(direction == 0, last, direction * size)
    moved = torch.where(direction == 0, threshold, threshold * factor**step)
    moved = moved.clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    new_rate = torch.where(total > 0, rate, table[:, RATE])
    updated = torch.stack([moved, torch.zeros_like(moved), torch.zeros_like(moved), new_rate, step], dim=1)
    of_layer = updated.split([len(state.operands) for state in states])
    # Both parts hold every row, so that either shows the whole state between updates.
    torch._foreach_copy_([part for pair in parts for part in pair], [rows for rows in of_layer for _ in range(2)])


# Kept, so that a step copies nothing from the host: a CUDA graph of it would read the copied memory again.
@functools.lru_cache(maxsize=64)
def _on_device(rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _group_device(process_group: dist.ProcessGroup | None, states: list[FallbackState]) -> torch.device:
    """Where a state that has not run belongs: beside the others, and where the group's backend can reduce it."""
    accelerator = next((s.device for s in states if s.device is not None and s.device.type != "cpu"), None)
    if accelerator is not None:
        return accelerator
    if "nccl" in dist.get_backend(process_group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
