"""The models that `make bench` times: ``lightning-int8-bench --config benchmarks.models:llama_1b``."""

from __future__ import annotations

from benchmarks.train_step import MODELS
from examples.llama import Llama


def llama_125m() -> Llama:
    """122 million parameters."""
    return Llama(MODELS["125m"])


def llama_1b() -> Llama:
    """Llama 3.2 1B's shape with a smaller vocabulary."""
    return Llama(MODELS["1b"])


def llama_8b_6layers() -> Llama:
    """Six layers of Llama 3 8B's width."""
    return Llama(MODELS["8b-6layers"])
