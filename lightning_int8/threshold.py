"""Delayed fallback thresholds: what a layer remembers between steps, and how it moves after each optimizer step.

A block falls back when its AbsMax exceeds the layer's threshold θ for that operand. θ is *delayed*: the quantize kernels
only count how many blocks exceeded it, and after the optimizer step it moves by a constant factor when the measured rate
left its band (arXiv 2503.08040, section 4). So no step waits for a statistic, and no host synchronisation is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        tensor: float32 ``[len(operands), 4]`` on the layer's device, or ``None`` before the first forward. Columns:
            threshold (AbsMax, in the operand's own unit; NaN before the first step seeds it), fallback blocks and total
            blocks since the last update, fallback rate at the last update (NaN before).
    """

    def __init__(self, recipe: Int8Recipe) -> None:
        self.recipe = recipe
        self.operands: tuple[str, ...] = _OPERANDS[recipe.scaling]
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

    def state_dict(self) -> dict[str, Any]:
        """The state as a CPU tensor and plain types; empty before the first forward."""
        if self.tensor is None or not self.operands:
            return {}
        return {"operands": list(self.operands), "tensor": self.tensor.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: The state is of a recipe with other operands.
        """
        if not state:
            return
        if tuple(state["operands"]) != self.operands:
            raise ValueError(
                f"Thresholds for operands {list(state['operands'])} cannot be restored into a layer whose recipe "
                f"{self.recipe.describe()} has {list(self.operands)}. Use the recipe the checkpoint was trained with, or "
                "drop the saved thresholds to seed new ones."
            )
        device = self.tensor.device if self.tensor is not None else torch.device("cpu")
        with torch.inference_mode(False):
            self.tensor = state["tensor"].detach().clone().to(device=device, dtype=torch.float32)


def fallback_states(module: nn.Module) -> dict[str, FallbackState]:
    """The fallback state of every converted linear in ``module``, by the linear's name, in module order."""
    from lightning_int8.linear import Int8Linear

    return {
        name: child.int8_state
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
        # A rank on which a layer has not run (yet) still takes part, or the all-reduce would not match.
        fallback_device = next((s.tensor.device for s in states if s.tensor is not None), _group_device(process_group))
        for state in states:
            if state.tensor is None:
                state.on(fallback_device)
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
    low, high, factor = (limits.pin_memory() if device.type == "cuda" else limits).to(device, non_blocking=True).unbind(1)

    threshold, fallback, total = table[:, THRESHOLD], table[:, FALLBACK_BLOCKS], table[:, TOTAL_BLOCKS]
    if distributed:
        # Thresholds differ between ranks only after each seeded its own: their mean is the common one.
        seeded = threshold.isfinite()
        packed = torch.stack([threshold.nan_to_num(0.0), seeded.float(), fallback, total])
        dist.all_reduce(packed, group=process_group)
        threshold = packed[0] / packed[1]  # 0 / 0: NaN, not seeded anywhere
        fallback, total = packed[2], packed[3]
    rate = fallback / total  # 0 / 0 where nothing was counted: NaN, which compares false with both limits
    moved = torch.where(rate > high, threshold * factor, torch.where(rate < low, threshold / factor, threshold))
    moved = moved.clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    new_rate = torch.where(total > 0, rate, table[:, RATE])
    updated = torch.stack([moved, torch.zeros_like(moved), torch.zeros_like(moved), new_rate], dim=1)
    torch._foreach_copy_(tensors, list(updated.split([len(state.operands) for state in states])))


def _group_device(process_group: dist.ProcessGroup | None) -> torch.device:
    if dist.get_backend(process_group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
