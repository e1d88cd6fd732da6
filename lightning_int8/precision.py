"""`FallbackInt8Precision`: the precision plugin for `lightning.pytorch.Trainer`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning.pytorch as pl
import lightning.pytorch.plugins.precision as trainer_plugins
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.fabric.utilities.types import Optimizable
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import nn
from torch.optim import Optimizer

from lightning_int8.cuda_graphs import refuse_accumulation
from lightning_int8.plugin_core import Int8PluginCore, OuterPrecision, clip_grad_norm, clip_grad_value
from lightning_int8.recipe import Int8Recipe
from lightning_int8.small_layers import MinFeatures


class FallbackInt8Precision(Int8PluginCore, FSDPPrecision):
    """Trains with INT8 GEMMs and block fallback: ``Trainer(plugins=FallbackInt8Precision())``.

    The model's ``nn.Linear`` layers compute in INT8, everything else in the outer precision. Works on a single device
    and under DDP, FSDP and FSDP2 (``ModelParallelStrategy``), with gradient accumulation, manual optimization, gradient
    clipping and activation checkpointing. Checkpoints hold the model under its usual keys, and the plugin's thresholds
    under ``"FallbackInt8Precision"``.

    Thresholds move once after each optimizer step. Where the gradient scaler of "16-mixed" skips a step they stay, and
    what was counted is dropped.

    Leave out ``Trainer(precision=...)``: the plugin takes the outer precision itself.

    Args:
        recipe: How the linear layers are quantized. A preset's name ("row", "block", "jetfire", "rowwise",
            "llm_int8"), an Int8Recipe, or a mapping of its fields, optionally with "preset" as the base to change, such
            as ``{preset: block, block_size: 64}``.
        precision: What runs around the INT8 GEMMs, as in ``Trainer(precision=...)``. "bf16-mixed": autocast to
            bfloat16, float32 weights. "bf16-true": weights and activations in bfloat16. "16-mixed": autocast to float16
            with gradient scaling (CUDA only). "32-true": float32.
        ignore_modules: Layers to keep in the outer precision, as globs over whole dotted segments of a layer's or a
            parent's name, anywhere in it, such as ``["lm_head", "layers.0", "layers.*.router"]``. A pattern that
            matches nothing is an error.
        min_features: Layers whose effective features, 2·in·out / (in + out) (a square layer's width), are fewer than
            this stay in the outer precision. "auto": those that `lightning-int8-bench` found too small to gain on the
            GPU; 0: none.
        keep_weights: Whether each weight's INT8 planes (two bytes a weight) are kept from the first micro-batch to the
            optimizer step instead of made twice for each. "auto": when gradients are accumulated. Sharded and frozen
            weights, and those that a hook makes (weight norm), never are. Where weights that train change within an
            optimizer step, give false: through ``.data`` that is not noticed, nor by compiled layers in any way (SAM).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An unknown recipe or precision, or a recipe field or ``min_features`` out of range.
    """

    _plugins = trainer_plugins
    _used_with = (
        "it needs the Trainer of `from lightning.pytorch import Trainer`, not of `pytorch_lightning`; for Fabric use "
        "lightning_int8.FabricFallbackInt8Precision"
    )
    _seeds_anew = "deleting checkpoint['{}']"

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
        self._accumulated = 1

    def __str__(self) -> str:
        # Only the other package's Trainer takes this one for no precision plugin at all; in lightning's own errors
        # the hint would mislead.
        return super().__str__() if "pytorch_lightning" in sys.modules else repr(self)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Converts ``module`` in place, and returns it. Lightning calls this on every fit, validate, test and predict.

        Raises:
            TypeError: The caller is not a Trainer, or its strategy bypasses precision plugins (DeepSpeed).
            ValueError: See :func:`lightning_int8.convert_to_int8`; or "16-mixed" on a CPU.
        """
        trainer = _trainer_of(module)
        if trainer is None:
            raise TypeError(
                f"{type(self).__name__} is for lightning.pytorch.Trainer, but something else gave it a "
                f"{type(module).__qualname__} to convert. For Fabric use "
                "Fabric(plugins=lightning_int8.FabricFallbackInt8Precision(...)); for plain PyTorch use "
                "lightning_int8.convert_to_int8(module)."
            )
        strategy = trainer.strategy
        if _is_a("DeepSpeedStrategy", strategy):
            raise TypeError(
                f"{type(self).__name__} cannot be used with DeepSpeed, which bypasses precision plugins in backward "
                "and optimizer steps. Use Trainer(strategy='fsdp'), 'ddp' or ModelParallelStrategy()."
            )
        self._modules = [module]
        self._accumulated = 1
        self._bind(strategy.root_device, fsdp1=_is_a("FSDPStrategy", strategy))
        self._outer.convert_module(module)
        self._convert(module)
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Lightning calls this once the model is on its device."""
        self._place_states(self._trainer().strategy.root_device)
        return super().connect(model, optimizers, lr_schedulers)

    def train_step_context(self) -> AbstractContextManager:
        """Around each micro-batch's ``training_step``.

        Raises:
            ValueError: Gradients are accumulated with CUDA graphs, which PyTorch does wrongly.
        """
        outer = self.forward_context()
        trainer = self._trainer()
        # Once for each number, which a scheduler may change.
        if trainer.accumulate_grad_batches != self._accumulated and trainer.strategy.root_device.type == "cuda":
            self._accumulated = trainer.accumulate_grad_batches
            refuse_accumulation(self._modules[0], self._accumulated)
        self._refresh_weights()
        return outer

    def _keeps_weights(self) -> bool:
        return self.keep_weights is True or (
            self.keep_weights == "auto" and self._trainer().accumulate_grad_batches > 1
        )

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizable, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Runs the closure and the optimizer step, then moves the thresholds."""
        outer = self._bound()
        return self._step(lambda: outer.optimizer_step(optimizer, model=model, closure=closure, **kwargs))

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clips the gradients as ``Trainer(gradient_clip_val=..., gradient_clip_algorithm=...)`` says."""
        if clip_val > 0 and self.scaler is not None and _optimizer_handles_unscaling(optimizer):
            raise RuntimeError(
                f"{type(optimizer).__qualname__}(fused=True) unscales its gradients inside the step, so with "
                "precision='16-mixed' they cannot be clipped before it. Use fused=False, or precision='bf16-mixed'."
            )
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:  # type: ignore[override]
        """Clips the norm over all ranks' shards. Under FSDP1 that is the norm of all the model's gradients."""
        root = self._trainer().strategy.model
        if _is_a("FullyShardedDataParallel", root):
            root.clip_grad_norm_(clip_val)  # type: ignore[union-attr, operator]
        else:
            clip_grad_norm(self.main_params(optimizer), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips each gradient's elements."""
        clip_grad_value(self.main_params(optimizer), clip_val)

    def _evaluates(self) -> bool:
        return self._trainer().state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING, TrainerFn.PREDICTING)

    def _trainer(self) -> pl.Trainer:
        trainer = _trainer_of(self._modules[0])
        assert trainer is not None
        return trainer


def _trainer_of(module: nn.Module) -> pl.Trainer | None:
    return getattr(module, "_trainer", None) if isinstance(module, pl.LightningModule) else None


def _is_a(class_name: str, instance: Any) -> bool:
    """``isinstance`` by the class's name, for classes whose packages may not be installed."""
    return any(cls.__name__ == class_name for cls in type(instance).__mro__)
