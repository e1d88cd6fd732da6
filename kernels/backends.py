"""Which kernels run: chosen by device and capability, forced by a recipe or `LIGHTNING_INT8_BACKEND`."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "LIGHTNING_INT8_BACKEND"
BACKENDS = ("reference", "triton")


def choose(backend: str, device: torch.device) -> str:
    """The backend that runs on ``device``.

    Args:
        backend: ``"auto"``, or the name of one to force.
        device: Where the tensors are.

    Raises:
        ValueError: The backend, or what the environment variable names, is unknown.
        RuntimeError: A forced backend cannot run on ``device``; says why.
    """
    source = "backend"
    if backend == "auto" and (forced := os.environ.get(ENVIRONMENT_VARIABLE, "")):
        backend, source = forced, ENVIRONMENT_VARIABLE
    if backend == "auto":
        return "triton" if why_not("triton", device) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} must be one of 'auto', {', '.join(map(repr, BACKENDS))}.")
    reason = why_not(backend, device)
    if reason is not None:
        raise RuntimeError(f"{source}={backend!r} cannot run on {device}: {reason} Use 'auto' or 'reference'.")
    return backend


def why_not(backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run on ``device``, or ``None`` if it can."""
    if backend == "reference":
        return None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed."
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type!r}."
    capability = _capability(device.index if device.index is not None else torch.cuda.current_device())
    if capability < (8, 0):
        return f"its compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)."
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def load(backend: str) -> ModuleType:
    """The module that holds ``backend``'s ops, with the reference's names and signatures."""
    return importlib.import_module(f"lightning_int8.kernels.{'portable' if backend == 'triton' else backend}")
