"""Which kernels run: chosen by device and capability, forced by a recipe or `LIGHTNING_INT8_BACKEND`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
from types import ModuleType

import torch

ENVIRONMENT_VARIABLE = "LIGHTNING_INT8_BACKEND"
BACKENDS = ("reference", "triton", "hopper")

_logger = logging.getLogger(__name__)


# A traced program takes the answer as it is when it is traced, rather than tracing how it is found.
@torch.compiler.assume_constant_result
def choose(backend: str, device: torch.device, block: int | None = None) -> str:
    """The backend that runs on ``device``.

    Args:
        backend: ``"auto"``, or the name of one to force.
        device: Where the tensors are.
        block: Edge of the blocks that it must have kernels for.

    Raises:
        ValueError: The backend, or what the environment variable names, is unknown, or it does not have ``block``.
        RuntimeError: A forced backend cannot run on ``device``; says why.
    """
    chosen = _choose(backend, device)
    # The kernels of 'hopper' are for 128; other sizes run on those of 'triton'.
    if block is not None and chosen != "reference" and block not in (sizes := load("triton").BLOCKS):
        raise ValueError(
            f"block_size={block} has no kernel on {device}: backend {chosen!r} has blocks of "
            f"{', '.join(map(str, sizes))}. Use 128, the fastest, or 32; backend='reference' takes any size, slowly."
        )
    return chosen


def _choose(backend: str, device: torch.device) -> str:
    source = "backend"
    if backend == "auto" and (forced := os.environ.get(ENVIRONMENT_VARIABLE, "")):
        backend, source = forced, ENVIRONMENT_VARIABLE
    if backend == "auto":
        if why_not("triton", device) is not None:
            return "reference"
        if device.type != "cuda" or _capability(_index(device)) != (9, 0):
            return "triton"
        reason = why_not("hopper", device)
        if reason is not None:
            _say_once(f"The portable Triton kernels run on this Hopper GPU, not the faster ones made for it: {reason}")
        return "triton" if reason is not None else "hopper"
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
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type!r}."
    capability = _capability(_index(device))
    if capability < (8, 0):
        return f"its compute capability {capability[0]}.{capability[1]} is below 8.0 (Ampere)."
    if backend == "hopper":
        if capability != (9, 0):
            return f"its compute capability is {capability[0]}.{capability[1]}, not 9.0 (Hopper)."
        return _why_not_gluon()
    return None


@functools.cache
def _why_not_gluon() -> str | None:
    """Why the installed Triton's Gluon cannot compile :mod:`lightning_int8.kernels.hopper`; it is experimental."""
    try:
        language = importlib.import_module("triton.experimental.gluon.language")
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
        importlib.import_module("triton.experimental.gluon.nvidia.hopper")
        found = list(inspect.signature(language.warp_specialize).parameters)[:3]
    except (ImportError, AttributeError) as error:
        return f"this Triton has no Gluon for Hopper ({error})."
    if found != ["functions_and_args", "worker_num_warps", "worker_num_regs"]:
        return f"this Triton's Gluon has another `warp_specialize` than 3.6 and 3.7: {found}."
    return None


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def load(backend: str) -> ModuleType:
    """The module that holds ``backend``'s ops, with the reference's names and signatures."""
    return importlib.import_module(f"lightning_int8.kernels.{'portable' if backend == 'triton' else backend}")
