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

from lightning_int8 import budget
from lightning_int8.kernels.power import POWER_COUNT, POWER_SUM
from lightning_int8.names import strip_wrappers
from lightning_int8.recipe import Int8Recipe

# Columns of FallbackState.tensor; recipes with a budget have more, see budget.py.
THRESHOLD, FALLBACK_BLOCKS, TOTAL_BLOCKS, RATE, STEP = range(5)
COLUMNS = 5
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
        mmas: For each operand, the MMAs that one of its fallback blocks repeats, in any unit: its weight in a budget.
        input_group: Equal for layers that may read the same planes of X, which one of them makes and counts.
        columns: Of ``tensor``: 5, and those of :mod:`lightning_int8.budget` for a recipe with a budget.
        parts: Two float32 ``[len(operands), columns]`` on the layer's device, or ``None`` until a device is known: the
            first is the forward's, which writes row 0 (X), the second the backward's, which writes the others. Two,
            because a traced program can change a tensor either in its forward or in its backward. Columns: threshold
            (AbsMax, in the operand's own unit; NaN before the first step seeds it), fallback blocks and total blocks
            since the last update, fallback rate at the last update (NaN before), exponent of the factor it last moved
            by.
    """

    # How many there have ever been: whoever keeps a list of a model's states looks again when it has changed.
    made = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> FallbackState:
        # Copies and pickles come here, too.
        FallbackState.made += 1
        return super().__new__(cls)

    def __init__(self, recipe: Int8Recipe, features: tuple[int, int] = (1, 1)) -> None:
        """Makes a state without thresholds.

        Args:
            recipe: The layer's recipe.
            features: The layer's out-features and in-features.
        """
        self.recipe = recipe
        self.columns = COLUMNS if recipe.budget is None else budget.COLUMNS
        operands = _OPERANDS[recipe.scaling][: 2 if recipe.mixes else None]
        self.operands: tuple[str, ...] = operands if recipe.falls_back else ()
        # X meets W in the forward and dY in the wgrad; dY meets W, with the in-features as columns, and X.
        wgrad_falls_back = recipe.wgrad and not recipe.mixes
        x, dgrad = features[0] * (recipe.forward + wgrad_falls_back), features[1] * recipe.dgrad
        wgrad = features[1] * wgrad_falls_back
        self.input_group: int | None = None
        self.mmas = {"x": x, "dy_dgrad": dgrad, "dy_wgrad": wgrad, "dy": dgrad + wgrad}
        self.parts: tuple[Tensor, Tensor] | None = None

    @property
    def tensor(self) -> Tensor | None:
        """A copy of the rows in use, float32 ``[len(operands), columns]``, or ``None`` until a device is known."""
        return None if self.parts is None else rows_in_use([self.parts], self.columns)

    @property
    def device(self) -> torch.device | None:
        """Where ``parts`` are."""
        return None if self.parts is None else self.parts[0].device

    def band(self, operand: str) -> tuple[float, float]:
        """Lowest and highest fallback rate that leaves ``operand``'s threshold where it is."""
        return self.recipe.activation_band if operand == "x" else self.recipe.gradient_band

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``parts`` on ``device``, made on first use and moved when the layer has moved; none stay on ``meta``."""
        if device.type == "meta":
            # A forward for shapes alone must not lose what is known.
            return self._fresh().to(device), self._fresh().to(device)
        if self.parts is None:
            self._set(self._fresh(), device)
        elif self.device != device:
            self._set(rows_in_use([self.parts], self.columns), device)
        return self.parts  # type: ignore[return-value]

    def _fresh(self) -> Tensor:
        fresh = torch.zeros(len(self.operands), self.columns)
        fresh[:, [THRESHOLD, RATE]] = float("nan")
        return fresh

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
            _clear_counts(part)
        self.scale_gradient_thresholds(gradient_factor)

    @torch.no_grad()
    def scale_gradient_thresholds(self, factor: float) -> None:
        """Multiplies the gradients' thresholds by ``factor``, when the unit of the gradients changed by it."""
        if self.parts is not None and factor != 1.0:
            self.parts[1][1:, THRESHOLD] *= factor
            if self.recipe.budget is not None:
                budget.scale_units(self.parts[1], factor)

    def state_dict(self) -> dict[str, Any]:
        """The state as a CPU tensor and plain types; empty until a device is known.

        Counts since the last update are left out, as the gradients they belong to are not saved either.
        """
        tensor = self.tensor
        if tensor is None or not self.operands:
            return {}
        tensor = tensor.cpu()
        _clear_counts(tensor)
        return {"operands": list(self.operands), "tensor": tensor, "mixed": self.recipe.mixes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned.

        Raises:
            ValueError: The state is of a recipe with other operands, or with operands mixed otherwise.
        """
        if not state:
            self.parts = None
            return
        saved = list(state["operands"]), state["tensor"].shape[1], state.get("mixed", False)
        own = list(self.operands), self.columns, self.recipe.mixes
        if saved != own:
            (theirs, numbers, mixed), (ours, columns, mixes) = saved, own
            raise ValueError(
                f"Thresholds for operands {theirs} ({numbers} numbers each, hadamard={mixed}) cannot be restored into "
                f"a layer whose recipe {self.recipe.describe()} has {ours} ({columns} each, hadamard={mixes}). Use the "
                "recipe the checkpoint was trained with (once the default: 'row' with hadamard=False, budget=None and "
                "bands of (0.1, 0.3); none mixes the wgrad alone any more), or drop the saved thresholds to seed new "
                "ones."
            )
        self._set(torch.as_tensor(state["tensor"]), self.device or torch.device("cpu"))


def rows_in_use(parts: Iterable[tuple[Tensor, Tensor]], columns: int = COLUMNS) -> Tensor:
    """The operands' rows of several ``FallbackState.parts``, layer after layer: float32 ``[operands, columns]``."""
    return torch.cat([rows[:, :columns] for forward, backward in parts for rows in (forward[:1], backward[1:])])


def _clear_counts(tensor: Tensor) -> None:
    tensor[:, [FALLBACK_BLOCKS, TOTAL_BLOCKS]] = 0.0
    tensor[:, POWER_SUM : POWER_COUNT + 1] = 0.0  # nothing without a budget


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
    """Moves every threshold whose measured fallback rate left its band (or towards its budget's price), counts anew.

    Call it once after each ``optimizer.step()``; the Lightning and Fabric plugins do. Runs on the device without a host
    synchronisation: a few kernels for the whole model. In a distributed run the counts of all ranks are summed (one
    all-reduce of 4 floats an operand, 7 under a budget), and thresholds come out identical on every rank. Every rank
    must hold the same layers and call this together.

    Args:
        module: The converted module, or its fallback states.
        process_group: The ranks that share the model's weights; the default group when ``None``.

    Raises:
        TypeError: ``module`` is neither. (A module without INT8 layers has no thresholds to move, which is no error.)
    """
    found: Any = fallback_states(module).values() if isinstance(module, nn.Module) else module
    states = list(found) if isinstance(found, Iterable) else [found]
    if not all(isinstance(state, FallbackState) for state in states):
        raise TypeError(
            f"update_thresholds takes the converted module or its fallback_states(module).values(), not "
            f"{type(module).__name__}."
        )
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
    # A budget is shared by the layers that name it, as far as they compute in the same way.
    groups: dict[tuple[torch.device, float | None, str], list[FallbackState]] = {}
    for state in states:
        if state.device is not None:
            scaling = "" if state.recipe.budget is None else state.recipe.scaling
            groups.setdefault((state.device, state.recipe.budget, scaling), []).append(state)
    for (device, _, _), group in groups.items():
        _update_group(group, device, distributed, process_group)


def _update_group(
    states: list[FallbackState], device: torch.device, distributed: bool, process_group: dist.ProcessGroup | None
) -> None:
    recipe, columns = states[0].recipe, states[0].columns
    parts = [state.on(device) for state in states]
    table = rows_in_use(parts, columns)
    limits = tuple((*s.band(operand), s.recipe.threshold_factor) for s in states for operand in s.operands)
    low, high, factor = _on_device(limits, device).unbind(1)

    threshold, fallback, total = table[:, THRESHOLD], table[:, FALLBACK_BLOCKS], table[:, TOTAL_BLOCKS]
    # Anything but a positive number says nothing about the next step: such a threshold is seeded again.
    seeded = threshold.isfinite() & (threshold > 0)
    threshold = threshold.where(seeded, float("nan"))
    powers = table[:, POWER_SUM : POWER_COUNT + 1].unbind(1) if recipe.budget is not None else ()
    if distributed:
        # Thresholds differ between ranks only after each seeded its own: their mean is the common one.
        packed = torch.stack([threshold.where(seeded, 0.0), seeded.float(), fallback, total, *powers])
        dist.all_reduce(packed, group=process_group)
        threshold = packed[0] / packed[1]  # 0 / 0: NaN, not seeded anywhere
        fallback, total, powers = packed[2], packed[3], packed[4:].unbind(0)
    rate = fallback / total  # 0 / 0 where nothing was counted: NaN, which compares false with both limits
    direction = (rate > high).float() - (rate < low).float()
    step = table[:, STEP]
    extra = table[:, COLUMNS:]
    if recipe.budget is None:
        growing = torch.where(step == 0, 1.0, step.abs() * STEP_GROWTH).clamp_max(1.0)
        size = torch.where(direction * step < 0, step.abs() / 2, growing).clamp_min(MIN_STEP)
        step = torch.where(direction == 0, step, direction * size)
        moved = torch.where(direction == 0, threshold, threshold * factor**step)
    else:
        weight = budget.shared_weights(total, *_on_device(_weights(states), device).unbind(1))
        by_rows = recipe.scaling == "row"
        moved, extra = budget.move_to_price(
            table, threshold, (fallback, total, *powers), weight, (low, high, factor), recipe.budget, by_rows
        )
        extra = torch.cat([torch.zeros_like(table[:, POWER_SUM : POWER_COUNT + 1]), extra], dim=1)
    moved = moved.clamp(MIN_THRESHOLD, MAX_THRESHOLD)
    new_rate = torch.where(total > 0, rate, table[:, RATE])
    zero = torch.zeros_like(moved)
    updated = torch.cat([torch.stack([moved, zero, zero, new_rate, step], dim=1), extra], dim=1)
    of_layer = updated.split([len(state.operands) for state in states])
    # Both parts hold every row, so that either shows the whole state between updates.
    torch._foreach_copy_([part for pair in parts for part in pair], [rows for rows in of_layer for _ in range(2)])


def _weights(states: list[FallbackState]) -> tuple[tuple[float, float], ...]:
    """For each row of a group's table the MMAs of a fallback block, and the number of its input group, or 0."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(s.input_group for s in states), start=1)}
    numbers[None] = 0
    return tuple(
        (float(state.mmas[operand]), float(numbers[state.input_group] if operand == "x" else 0))
        for state in states
        for operand in state.operands
    )


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
