"""`FabricFallbackInt8Precision`: the precision plugin for `lightning.fabric.Fabric`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning.fabric.plugins.precision as fabric_plugins
import torch
from lightning.fabric.plugins.precision import FSDPPrecision
from lightning.fabric.utilities.types import Optimizable
from torch import nn

from lightning_int8.plugin_core import Int8PluginCore, OuterPrecision
from lightning_int8.recipe import Int8Recipe
from lightning_int8.small_layers import MinFeatures


class FabricFallbackInt8Precision(Int8PluginCore, FSDPPrecision):
    """Trains with INT8 GEMMs and block fallback: ``Fabric(plugins=FabricFallbackInt8Precision())``.

    ``fabric.setup`` converts the model in place, so optimizers may exist already; each step of an optimizer that Fabric
    has set up moves the thresholds. Fabric saves what it is given: to resume exactly, save the plugin's state too::

        plugin = FabricFallbackInt8Precision()
        fabric = Fabric(plugins=plugin)
        model, optimizer = fabric.setup(model, optimizer)
        state = {"model": model, "optimizer": optimizer}
        fabric.save("last.ckpt", state | {"int8": plugin.state_dict()})
        plugin.load_state_dict(fabric.load("last.ckpt", state)["int8"])

    (With the plugin itself in ``state`` Fabric would not restore it from sharded checkpoints.)

    Args:
        recipe: How the linear layers are quantized. A preset's name ("row", "block", "jetfire", "rowwise",
            "llm_int8"), an Int8Recipe, or a mapping of its fields, optionally with "preset" as the base to change.
        precision: What runs around the INT8 GEMMs, as in ``Fabric(precision=...)``: "bf16-mixed", "bf16-true",
            "16-mixed" (CUDA only) or "32-true".
        ignore_modules: Layers to keep in the outer precision, as globs over whole dotted segments of a layer's or a
            parent's name, anywhere in it, such as ``["lm_head", "layers.0"]``. With several models each must have a
            match for every pattern.
        min_features: Layers whose effective features, 2·in·out / (in + out) (a square layer's width), are fewer than
            this stay in the outer precision. "auto": those that `lightning-int8-bench` found too small to gain on the
            GPU; 0: none.
        keep_weights: Whether each weight's INT8 planes (two bytes a weight) are kept from the first micro-batch to the
            optimizer step instead of made twice for each. "auto": no. Sharded weights never are.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An unknown recipe or precision, or a recipe field or ``min_features`` out of range.
    """

    _plugins = fabric_plugins
    _used_with = (
        "it needs the Fabric of `from lightning.fabric import Fabric`, not of `lightning_fabric`; for a Trainer use "
        "lightning_int8.FallbackInt8Precision with `from lightning.pytorch import Trainer`"
    )
    _seeds_anew = "leaving out plugin.load_state_dict(...)"

    def __init__(
        self,
        recipe: str | dict[str, Any] | Int8Recipe = "row",
        precision: OuterPrecision = "bf16-mixed",
        ignore_modules: list[str] | None = None,
        min_features: MinFeatures = 0,
        keep_weights: bool | Literal["auto"] = "auto",
    ) -> None:
        # "32-true" here: any scaler is made later, when it is known whether gradients are sharded and on what device.
        FSDPPrecision.__init__(self, "32-true")
        self._init_core(recipe, precision, ignore_modules, min_features, keep_weights)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts ``module`` in place, and returns it."""
        if self.precision == "bf16-true":
            module.to(torch.bfloat16)
        self._convert(module)
        return module

    def forward_context(self) -> AbstractContextManager:
        """Around each forward of a module that Fabric has set up.

        Raises:
            ValueError: "16-mixed" on a CPU, or with DTensor parameters.
        """
        outer = super().forward_context()
        self._refresh_weights()
        return outer

    def optimizer_step(self, optimizer: Optimizable, **kwargs: Any) -> Any:
        """Runs the optimizer step, then moves the thresholds.

        Raises:
            TypeError: The optimizer is DeepSpeed's engine, which bypasses precision plugins in the backward.
        """
        if any(cls.__name__ == "DeepSpeedEngine" for cls in type(optimizer).__mro__):
            raise TypeError(
                f"{type(self).__name__} cannot be used with DeepSpeed, which bypasses precision plugins in backward. "
                "Use Fabric(strategy='fsdp'), 'ddp' or ModelParallelStrategy(...)."
            )
        outer = self._bound()
        return self._step(lambda: outer.optimizer_step(optimizer, **kwargs))
