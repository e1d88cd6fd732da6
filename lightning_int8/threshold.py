"""Delayed fallback thresholds: what a layer remembers between steps, and how it moves after each optimizer step.

A block falls back when its AbsMax exceeds the layer's threshold θ for that operand. θ is *delayed*: the quantize
kernels only count how many blocks exceeded it, and after the optimizer step it moves by a constant factor when the
measured rate left its band (arXiv 2503.08040, section 4). So no step waits for a statistic, and no host synchronisation
is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_int8.names import strip_wrappers
from lightning_int8.recipe import Int8Recipe

# Columns of FallbackState.tensor.
THRESHOLD, FALLBACK_BLOCKS, TOTAL_BLOCKS, RATE = range(4)
# A threshold stays in this range, so that a run of extreme steps cannot make it 0 or infinite for good.
MIN_THRESHOLD, MAX_THRESHOLD = 1e-30, 1e30

_OPERANDS = {"row": ("x", "dy_dgrad", "dy_wgrad"), "block": ("x", "dy"), "vector": ()}


class FallbackState:
    """Thresholds and block counters of one linear layer; a plain attribute, never a parameter or buffer.

    Attributes:
        recipe: The layer's recipe.
        operands: Names of the operands with a threshold, in the order of ``tensor``'s rows.
        tensor: float32 ``[len(operands), 4]`` on the layer's device, or ``None`` until a device is known. Columns:
            threshold (AbsMax, in the operand's own unit; NaN before the first step seeds it), fallback blocks and total
            blocks since the last update, fallback rate at the last update (NaN before).
    """

    def __init__(self, recipe: Int8Recipe) -> None:
        self.recipe = recipe
        fallback = recipe.activation_band[1] > 0 or recipe.gradient_band[1] > 0
        self.operands: tuple[str, ...] = _OPERANDS[recipe.scaling] if fallback else ()
        self.tensor: Tensor | None = None

    def band(self, operand: str) -> tuple[float, float]:
        """Lowest and highest fallback rate that leaves ``operand``'s threshold where it is."""
        return self.recipe.activation_band if operand == "x" else self.recipe.gradient_band

    def on(self, device: torch.device) -> Tensor:
        """``tensor`` on ``device``, made on first use and moved when the layer has moved."""
        if self.tensor is None:
            # A forward under inference_mode must not make an inference tensor that training could not update.
            with torch.inference_mode(False):
                self.tensor = torch.zeros(len(self.operands), 4, device=device)
                self.tensor[:, THRESHOLD] = float("nan")
                self.tensor[:, RATE] = float("nan")
        elif self.tensor.device != device:
            with torch.inference_mode(False):
                self.tensor = self.tensor.to(device)
        return self.tensor

    def discard_counts(self, gradient_factor: float = 1.0) -> None:
        """Forgets the blocks counted since the last update, leaving the thresholds where they are.

        Args:
            gradient_factor: What the gradients' thresholds are multiplied by: the new loss scale over the old one.
        """
        if self.tensor is None:
            return
        with torch.no_grad():
            self.tensor[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS]] = 0.0
            self.scale_gradient_thresholds(gradient_factor)

    def scale_gradient_thresholds(self, factor: float) -> None:
        """Multiplies the gradients' thresholds by ``factor``, when the unit of the gradients changed by it."""
        if self.tensor is not None and factor != 1.0:
            with torch.no_grad():
                self.tensor[1:, THRESHOLD] *= factor

    def state_dict(self) -> dict[str, Any]:
        """The state as a CPU tensor and plain types; empty while ``tensor`` is ``None``.

        Counts since the last update are left out, as the gradients they belong to are not saved either.
        """
        if self.tensor is None or not self.operands:
            return {}
        tensor = self.tensor.detach().cpu().clone()
        tensor[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS]] = 0.0
        return {"operands": list(self.operands), "tensor": tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: The state is of a recipe with other operands.
        """
        if not state:
            self.tensor = None
            return
        if tuple(state["operands"]) != self.operands:
            raise ValueError(
                f"Thresholds for operands {list(state['operands'])} cannot be restored into a layer whose recipe "
                f"{self.recipe.describe()} has {list(self.operands)}. Use the recipe the checkpoint was trained with, "
                "or drop the saved thresholds to seed new ones."
            )
        device = self.tensor.device if self.tensor is not None else torch.device("cpu")
        with torch.inference_mode(False):
            self.tensor = torch.as_tensor(state["tensor"]).detach().to(device, torch.float32, copy=True)


def fallback_states(module: nn.Module) -> dict[str, FallbackState]:
    """The fallback state of every converted linear in ``module``, by the linear's name, in module order.

    Names are without what ``torch.compile``, FSDP and activation checkpointing insert. Layers whose recipe never falls
    back have no state and are left out.
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
            if state.tensor is None or state.tensor.device.type != home.type:
                state.on(home)
    by_device: dict[torch.device, list[FallbackState]] = {}
    for state in states:
        if state.tensor is not None:
            by_device.setdefault(state.tensor.device, []).append(state)
    for device, group in by_device.items():
        _update_on_device(group, device, distributed, process_group)


def _update_on_device(
    states: list[FallbackState], device: torch.device, distributed: bool, process_group: dist.ProcessGroup | None
) -> None:
    tensors = [state.tensor for state in states if state.tensor is not None]
    table = torch.cat(tensors)
    rows = [(state, operand) for state in states for operand in state.operands]
    limits = torch.tensor(
        [(*state.band(operand), state.recipe.threshold_factor) for state, operand in rows], dtype=torch.float32
    )
    low, high, factor = (
        (limits.pin_memory() if device.type == "cuda" else limits).to(device, non_blocking=True).unbind(1)
    )

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
    moved = torch.where(rate > high, threshold * factor, torch.where(rate < low, threshold / factor, threshold))
    moved = moved.clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    new_rate = torch.where(total > 0, rate, table[:, RATE])
    updated = torch.stack([moved, torch.zeros_like(moved), torch.zeros_like(moved), new_rate], dim=1)
    torch._foreach_copy_(tensors, list(updated.split([len(state.operands) for state in states])))


def _group_device(process_group: dist.ProcessGroup | None, states: list[FallbackState]) -> torch.device:
    """Where a state that has not run belongs: beside the others, and where the group's backend can reduce it."""
    devices = [state.tensor.device for state in states if state.tensor is not None]
    accelerator = next((device for device in devices if device.type != "cpu"), None)
    if accelerator is not None:
        return accelerator
    if "nccl" in dist.get_backend(process_group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
