"""What the Trainer's and Fabric's plugin share: conversion, the outer precision, and moving and saving thresholds.

The outer precision (autocast, dtypes, gradient scaling) is not written again here: each method passes on to Lightning's
own plugin for it, made once the device and the strategy are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn

from lightning_int8.convert import convert_to_int8
from lightning_int8.linear import Int8Linear
from lightning_int8.names import checked_patterns, near
from lightning_int8.recipe import Int8Recipe, resolve_recipe
from lightning_int8.report import ConversionReport
from lightning_int8.resume import changed_fields, fell_back, threshold_fields
from lightning_int8.small_layers import MinFeatures, check_min_features
from lightning_int8.threshold import FallbackState, fallback_states, update_thresholds
from lightning_int8.weight_planes import drop_weight_planes, keep_weight_planes, linears_to_keep

OuterPrecision = Literal["bf16-mixed", "bf16-true", "16-mixed", "32-true"]

T = TypeVar("T")


class Int8PluginCore:
    """Mixed in before Lightning's ``FSDPPrecision`` (the Trainer's or Fabric's) by the two plugins.

    Subclasses set ``_plugins`` to the package that holds Lightning's precision plugins for them and, for messages,
    ``_used_with`` to what they work with and ``_seeds_anew`` to how saved thresholds are left behind (``{}``: the
    class's name).
    """

    _plugins: ModuleType
    _used_with: str
    _seeds_anew: str

    def _init_core(
        self,
        recipe: str | Int8Recipe | Mapping[str, Any],
        precision: OuterPrecision,
        ignore_modules: Sequence[str] | None,
        min_features: MinFeatures,
        keep_weights: bool | Literal["auto"],
    ) -> None:
        if precision not in get_args(OuterPrecision):
            raise ValueError(
                f"{type(self).__name__}(precision={precision!r}) must be one of "
                f"{', '.join(map(repr, get_args(OuterPrecision)))}: what runs around the INT8 GEMMs."
            )
        self.precision = precision
        self.recipe = resolve_recipe(recipe)
        self.ignore_modules = None if ignore_modules is None else checked_patterns(ignore_modules)
        self.min_features = check_min_features(min_features)
        if not isinstance(keep_weights, bool) and keep_weights != "auto":
            raise ValueError(f"{type(self).__name__}(keep_weights={keep_weights!r}) must be true, false or 'auto'.")
        self.keep_weights = keep_weights
        self.scaler: Any = None
        self.report: ConversionReport | None = None
        self._modules: list[nn.Module] = []
        self._stepped_states: list[FallbackState] | None = None
        self._kept_linears: list[Int8Linear] | None = None
        self._states_made = 0
        self._outer: Any = None
        self._bound_to: tuple[str, bool] = ("", False)
        self._pending_thresholds: dict[str, Any] | None = None
        self._pending_scaler: dict[str, Any] | None = None

    def __str__(self) -> str:
        # What an incompatible Trainer or Fabric prints when it refuses the plugin: "Found invalid type for plugin ...".
        return f"{self!r} ({self._used_with})"

    def __repr__(self) -> str:
        ignored = "" if not self.ignore_modules else f", ignore_modules={list(self.ignore_modules)!r}"
        least = "" if not self.min_features else f", min_features={self.min_features!r}"
        return f"{type(self).__name__}(recipe={self.recipe.describe()!r}, precision={self.precision!r}{ignored}{least})"

    # conversion

    def _convert(self, module: nn.Module) -> None:
        # Lightning converts before it moves the model.
        trainer = getattr(module, "_trainer", None)
        device = None if trainer is None else trainer.strategy.root_device
        report = convert_to_int8(module, self.recipe, self.ignore_modules, device, self.min_features)
        self.report = report
        self._stepped_states = self._kept_linears = None
        if all(module is not known for known in self._modules):
            self._modules.append(module)
        if report.newly_converted:
            rank_zero_info(report.summary())
            _print_table(report)
        if self._pending_thresholds is not None:
            pending, self._pending_thresholds = self._pending_thresholds, None
            self._load_thresholds(pending)

    def _states(self) -> dict[str, FallbackState]:
        """Fallback states by layer name; those of a second module have its position before them."""
        states: dict[str, FallbackState] = {}
        for index, module in enumerate(self._modules):
            prefix = f"module_{index}." if index else ""
            states.update({prefix + name: state for name, state in fallback_states(module).items()})
        return states

    # outer precision

    def _bind(self, device: torch.device, fsdp1: bool) -> None:
        """Makes Lightning's own plugin for the outer precision, once device and strategy are known."""
        if self._bound_to == (device.type, fsdp1):
            return
        if self.precision == "16-mixed" and device.type == "cpu":
            # Lightning's own would train in bf16-mixed instead, with a warning.
            raise ValueError(
                f"{type(self).__name__}(precision='16-mixed') needs a GPU, and this run is on a CPU. Use 'bf16-mixed' "
                "or '32-true'."
            )
        if self.precision == "16-mixed" and any(_mesh(p) is not None for m in self._modules for p in m.parameters()):
            raise ValueError(
                f"{type(self).__name__}(precision='16-mixed') cannot scale the gradients of DTensor parameters (FSDP2, "
                "tensor parallel). Use 'bf16-mixed', 'bf16-true' or '32-true'."
            )
        if fsdp1:
            self._outer = self._plugins.FSDPPrecision(self.precision)
        elif "mixed" in self.precision:
            self._outer = self._plugins.MixedPrecision(self.precision, device.type)
        elif self.precision == "bf16-true":
            self._outer = self._plugins.HalfPrecision(self.precision)
        else:
            self._outer = self._plugins.Precision()
        self._bound_to = (device.type, fsdp1)
        self.scaler = getattr(self._outer, "scaler", None)
        if self.scaler is not None and self._pending_scaler is not None:
            self.scaler.load_state_dict(self._pending_scaler)
            self._pending_scaler = None

    def _place_states(self, device: torch.device) -> None:
        # Before the first forward, which torch.compile would otherwise trace once more when thresholds change device.
        for state in self._states().values():
            state.on(device)

    def _bound(self) -> Any:
        """Lightning's own plugin for the outer precision."""
        if self._outer is None:
            device = _compute_device(self._modules)
            self._bind(device, _is_fsdp1(self._modules))
            self._place_states(device)
        return self._outer

    def tensor_init_context(self) -> AbstractContextManager:
        return _DtypeContextManager(torch.bfloat16) if self.precision == "bf16-true" else nullcontext()

    def module_init_context(self) -> AbstractContextManager:
        return self.tensor_init_context()

    def forward_context(self) -> AbstractContextManager:
        outer = self._bound()
        if isinstance(outer, self._plugins.FSDPPrecision) and "mixed" in self.precision:
            # Lightning's own asks for CUDA whatever the device.
            dtype = torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16
            return torch.autocast(self._bound_to[0], dtype=dtype)
        return outer.forward_context()

    def convert_input(self, data: Any) -> Any:
        return self._bound().convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self._bound().convert_output(data)

    # weights

    def _keeps_weights(self) -> bool:
        """Whether the weights' planes are kept from micro-batch to micro-batch."""
        return self.keep_weights is True

    def _refresh_weights(self) -> None:
        if self._keeps_weights() and torch.is_grad_enabled() and not self._bound_to[1]:
            self._look_again()
            if self._kept_linears is None:
                self._kept_linears = [linear for module in self._modules for linear in linears_to_keep(module)]
            keep_weight_planes(self._kept_linears)

    # thresholds

    def _look_again(self) -> None:
        """Forgets which layers there are when some may have come since, as where a model grows while it trains."""
        if self._states_made != FallbackState.made:
            self._states_made = FallbackState.made
            self._stepped_states = self._kept_linears = None

    def _step(self, step: Callable[[], T]) -> T:
        """Runs an optimizer step and moves the thresholds after it.

        A gradient scaler skips the step when it finds infinite or NaN gradients. Then thresholds stay, since such
        gradients say nothing about the next ones, and the counts start anew. When the scaler changes the loss scale,
        the gradients' thresholds change with it.
        """
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        result = step()
        drop_weight_planes(self._kept_linears or ())
        self._look_again()
        if self._stepped_states is None:
            # Walking a large model's modules after every step would cost more than moving its thresholds.
            self._stepped_states = list(self._states().values())
        states = self._stepped_states
        factor = 1.0 if self.scaler is None or not scale else self.scaler.get_scale() / scale
        if factor < 1.0:
            for state in states:
                state.discard_counts(gradient_factor=factor)
            return result
        update_thresholds(states)
        for state in states:
            state.scale_gradient_thresholds(factor)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Thresholds by layer name and, with ``"16-mixed"``, the gradient scaler: tensors and plain types."""
        state: dict[str, Any] = {
            "recipe": self.recipe.describe(),
            "recipe_fields": threshold_fields(self.recipe),
            "thresholds": {name: layer.state_dict() for name, layer in self._states().items()},
        }
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; before the model is set up, as soon as it is.

        Where the recipe has changed since, thresholds that still have a meaning go on from where they were, with a
        warning. Others are refused in training, and left out with a warning in evaluation, which seeds its own.

        Raises:
            ValueError: The saved layers are not the converted ones, or thresholds have no meaning for the recipe.
        """
        if self._modules:
            self._load_thresholds(state_dict)
        else:
            self._pending_thresholds = state_dict
        scaler = state_dict.get("scaler")
        if scaler is None:
            return
        if self.scaler is not None:
            self.scaler.load_state_dict(scaler)
        elif self._outer is None:
            self._pending_scaler = scaler

    def _recipe_changes(self, state_dict: Mapping[str, Any]) -> tuple[str, str]:
        """Why saved thresholds have no meaning for the recipe, and which fields only move them; empty for neither."""
        # Older checkpoints lack the fields; whose operands differ is told layer by layer.
        before = state_dict.get("recipe_fields", threshold_fields(self.recipe))
        if not self.recipe.falls_back and state_dict.get("thresholds"):
            return f"the recipe {self.recipe.describe()} has no fallback", ""
        if not fell_back(before):
            return f"the recipe it was trained with, {state_dict.get('recipe')}, has no fallback", ""
        return changed_fields(before, self.recipe)

    def _evaluates(self) -> bool:
        """Whether what is restored will only be evaluated."""
        return False

    def _load_thresholds(self, state_dict: Mapping[str, Any]) -> None:
        states, seeds_anew = self._states(), self._seeds_anew.format(type(self).__qualname__)
        saved = state_dict.get("thresholds", {})
        reason, moved = self._recipe_changes(state_dict) if saved or states else ("", "")
        if reason and self._evaluates():
            rank_zero_warn(
                f"The checkpoint's INT8 thresholds are left out, since {reason}. Of each tensor its own largest blocks "
                "fall back instead, as far as the recipe has fallback."
            )
            return
        if reason:
            raise ValueError(
                f"The checkpoint's INT8 thresholds cannot be used, since {reason}. Resume with the recipe it was "
                f"trained with ({state_dict.get('recipe')}), or seed new thresholds by {seeds_anew}."
            )
        if moved:
            rank_zero_warn(
                f"The checkpoint's INT8 thresholds were made under another recipe: {moved}. They are used as they are, "
                "and move to the new rates while training."
            )
        missing = [name for name in states if name not in saved]
        unknown = [name for name in saved if name not in states]
        if missing or unknown:
            parts = []
            if unknown:
                close = near(unknown[0], states, count=1)
                hint = f" (nearest INT8 layer: {close[0]})" if close else ""
                parts.append(f"has thresholds for {_some(unknown)}, not an INT8 layer of this model{hint}")
            if missing:
                parts.append(f"lacks thresholds for {_some(missing)}")
            differs = f"The checkpoint's INT8 state {' and '.join(parts)}."
            # Without any, it was saved by a process that only started others (ddp_spawn) and converted no model.
            if saved and not self._evaluates():
                raise ValueError(
                    f"{differs} Resume with the model, recipe and ignore_modules it was trained with, or seed new "
                    f"thresholds by {seeds_anew}."
                )
            rank_zero_warn(f"{differs} Layers without thresholds seed their own.")
        for name in [name for name in states if name in saved]:
            try:
                states[name].load_state_dict(saved[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error} (They are dropped by {seeds_anew}.)") from None


def _print_table(report: ConversionReport) -> None:
    if rank_zero_only.rank != 0:
        return
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        rank_zero_warn("The table of INT8 layers needs rich: pip install rich.")
        return
    Console().print(report.table())


def _mesh(tensor: Tensor) -> Any:
    """The device mesh of a DTensor; ``None`` for a plain tensor."""
    return getattr(tensor, "device_mesh", None)


def _compute_device(modules: Sequence[nn.Module]) -> torch.device:
    """Where the modules compute. An offloaded DTensor lies on the CPU, but its mesh knows the device."""
    for module in modules:
        for parameter in module.parameters():
            mesh = _mesh(parameter)
            if mesh is None or mesh.device_type == parameter.device.type:
                return parameter.device
            return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator


def _is_fsdp1(modules: Sequence[nn.Module]) -> bool:
    """Whether FSDP1 manages a module: it marks each submodule, as FSDP2 does, but its parameters are no DTensors."""
    return any(
        getattr(child, "_is_fsdp_managed_module", False)
        and all(_mesh(parameter) is None for parameter in child.parameters())
        for module in modules
        for child in module.modules()
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` that also takes DTensors of several meshes among plain tensors (FSDP2, TP).

    Returns:
        The total norm before clipping, as a plain tensor.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if all(_mesh(parameter.grad) is None for parameter in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((_mesh(parameter.grad), parameter.grad.device), []).append(parameter.grad)
    with torch.no_grad():
        norms = [torch.nn.utils.get_total_norm(grads) for grads in groups.values()]
        norms = [norm if _mesh(norm) is None else norm.full_tensor() for norm in norms]
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for (_, device), grads in groups.items():
            torch._foreach_mul_([_local(grad) for grad in grads], factor.to(device))
    return total


def clip_grad_value(parameters: Iterable[Tensor], max_value: float) -> None:
    """``torch.nn.utils.clip_grad_value_`` that also takes DTensors."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                _local(parameter.grad).clamp_(-max_value, max_value)


def _local(tensor: Tensor) -> Tensor:
    return tensor if _mesh(tensor) is None else tensor.to_local()  # type: ignore[attr-defined]
