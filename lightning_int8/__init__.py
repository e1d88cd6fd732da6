"""Train Transformers in 8 bits: dynamic block-level fallback for INT8 GEMMs, as a PyTorch Lightning precision plugin.

What needs Lightning loads on first use, so that `import lightning_int8.kernels` costs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_int8.checkpoint import (
        CorruptedCheckpointError,
        VerifiedCheckpointIO,
        consolidate_checkpoint,
        verify_checkpoint,
    )
    from lightning_int8.convert import ConversionReport, convert_to_int8
    from lightning_int8.energy import EnergyMonitor
    from lightning_int8.fabric import FabricFallbackInt8Precision
    from lightning_int8.functional import int8_linear
    from lightning_int8.linear import Int8Linear
    from lightning_int8.monitor import FallbackRateMonitor
    from lightning_int8.precision import FallbackInt8Precision
    from lightning_int8.recipe import PRESETS, Int8Recipe, resolve_recipe
    from lightning_int8.threshold import FallbackState, fallback_states, update_thresholds

__version__ = "0.1.0"

_HOME = {
    "CorruptedCheckpointError": "checkpoint",
    "VerifiedCheckpointIO": "checkpoint",
    "consolidate_checkpoint": "checkpoint",
    "verify_checkpoint": "checkpoint",
    "ConversionReport": "convert",
    "convert_to_int8": "convert",
    "EnergyMonitor": "energy",
    "FabricFallbackInt8Precision": "fabric",
    "int8_linear": "functional",
    "Int8Linear": "linear",
    "FallbackRateMonitor": "monitor",
    "FallbackInt8Precision": "precision",
    "PRESETS": "recipe",
    "Int8Recipe": "recipe",
    "resolve_recipe": "recipe",
    "FallbackState": "threshold",
    "fallback_states": "threshold",
    "update_thresholds": "threshold",
}

__all__ = [
    "PRESETS",
    "ConversionReport",
    "CorruptedCheckpointError",
    "EnergyMonitor",
    "FabricFallbackInt8Precision",
    "FallbackInt8Precision",
    "FallbackRateMonitor",
    "FallbackState",
    "Int8Linear",
    "Int8Recipe",
    "VerifiedCheckpointIO",
    "consolidate_checkpoint",
    "convert_to_int8",
    "fallback_states",
    "int8_linear",
    "resolve_recipe",
    "update_thresholds",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
