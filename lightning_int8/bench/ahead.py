"""What a run will compile, as jobs for worker processes: this package's kernels, peers' layers, a model's layers.

A job leaves what it compiles in the caches on disk. Nothing here has to succeed: what was not compiled ahead is
compiled where it is first used, only later and alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from lightning_int8.bench import gemm, linear
from lightning_int8.bench.precisions import Precision, precisions
from lightning_int8.bench.step import COMPILING, repeated_layers
from lightning_int8.bench.workload import Workload, load
from lightning_int8.kernels import backends
from lightning_int8.recipe import Int8Recipe
from lightning_int8.small_layers import MinFeatures

META = torch.device("meta")


@dataclass(frozen=True)
class Named:
    """A precision by what makes it, for another process.

    Attributes:
        recipe: This package's; ``None`` for the others.
        peer: torchao's name; with neither, BF16.
        min_features: Below which features a recipe leaves layers as they are.
    """

    recipe: Int8Recipe | None
    peer: str | None
    min_features: MinFeatures = 0

    def made(self) -> Precision:
        """The precision."""
        recipes, peers = [self.recipe] if self.recipe else [], [self.peer] if self.peer else []
        return precisions(recipes, peers, self.min_features)[-1]


@dataclass(frozen=True)
class PeerLinear:
    """A job: compiles one linear in a peer's precision."""

    tokens: int
    k: int
    n: int
    peer: str
    device: torch.device

    def __call__(self) -> None:
        """Runs it once."""
        x, dy = linear.operands(self.tokens, self.k, self.n, self.device)
        linear.prepared(Named(None, self.peer).made(), self.k, self.n, x, dy)[1]()


@dataclass(frozen=True)
class Layer:
    """A job: compiles a model's repeated layer in one precision."""

    config: str
    tokens: int
    precision: Named
    compiling: str
    device: torch.device

    def __call__(self) -> None:
        """Runs it once, forward and backward."""
        workload = load(self.config, self.tokens, META)
        layer_pass(workload, self.precision.made(), COMPILING[self.compiling], self.device)()


class _Reached(Exception):
    """A model has come to its first repeated layer, with these arguments."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = args, kwargs


def layer_pass(workload: Workload, precision: Precision, mode: str | None, device: torch.device) -> Callable[[], None]:
    """The first repeated layer of a model that is on ``meta``, forward and backward on ``device`` on inputs of noise.

    Compiled it leaves what all such layers take, without the memory of the others and of the head.

    Args:
        workload: Loaded on ``meta``.
        precision: Of its linears.
        mode: `torch.compile`'s; ``None`` for eager.
        device: Where to run it.

    Raises:
        ValueError: The model has no repeated layer.
    """
    model = precision.convert(copy.deepcopy(workload.model), workload.ignore_modules)
    layers = repeated_layers(model)
    if not layers:
        raise ValueError(f"{workload.name} has no repeated layer.")

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(args, kwargs)

    hook = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        workload.loss(model, workload.batch)
        raise ValueError(f"{workload.name} never calls its first repeated layer.")
    except _Reached as reached:
        args, kwargs = tree_map_only(Tensor, functools.partial(_noise, device=device), reached.inputs)
    hook.remove()
    layer = layers[0].to_empty(device=device)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
    if mode:
        layer.compile(mode=mode)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            out = next(x for x in tree_flatten(layer(*args, **kwargs))[0] if isinstance(x, Tensor))
        out.backward(torch.randn_like(out))

    return run


def _noise(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor like one on ``meta``, on ``device``; not a leaf, as a layer's input is none."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).zero_()
    if tensor.is_floating_point():
        made.normal_()
    return made.requires_grad_().clone() if tensor.requires_grad else made


def run_gemms(
    shapes: Sequence[tuple[int, int]], tokens: int, recipes: Sequence[Int8Recipe], device: torch.device
) -> None:
    """Runs each of this package's GEMMs that the benchmark times once."""
    backend = backends.choose("auto", device)
    for k, n in shapes:
        for name, size in gemm.products(tokens, k, n).items():
            for scaling, rates in gemm.timed(name, recipes).items():
                for rate in rates:
                    gemm.ours(name, *size, scaling, rate, backend, device)[0]()


def run_linears(
    shapes: Sequence[tuple[int, int]], tokens: int, ours: Sequence[Precision], device: torch.device
) -> None:
    """Runs linears of these shapes in these precisions, forward and backward."""
    for k, n in shapes:
        x, dy = linear.operands(tokens, k, n, device)
        for precision in ours:
            linear.prepared(precision, k, n, x, dy)[1]()
