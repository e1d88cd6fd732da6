"""W is quantized once an optimizer step: its INT8 planes, kept from the first micro-batch to the last.

Without this, each micro-batch quantizes every weight twice, for its forward and for its dgrad: with few tokens in a
micro-batch that is a fifth of the step. Kept planes cost two bytes a weight. They are only read in training; whoever
runs the steps makes them before a micro-batch (:func:`keep_weight_planes`, which renews those whose weight has changed)
and drops them after the optimizer step, which may change weights in ways that PyTorch does not notice.

A layer reads its planes while its weight has the address and the version that they were made of. Code of
`torch.compile` cannot ask for a version: there a weight that changes between `keep_weight_planes` and the forward (SAM
inside a `training_step`) is multiplied as it was before. Fabric's plugin renews planes before each forward of a module
that it has set up, so that this holds for the Trainer's alone, with accumulated gradients or ``keep_weights=True``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lightning_int8.kernels import backends
from lightning_int8.operands import QuantizedWeight
from lightning_int8.schemes import scheme_of

if TYPE_CHECKING:
    from lightning_int8.linear import Int8Linear


class KeptWeight(NamedTuple):
    """The planes of one weight, and the address and version of the weight they were made of."""

    planes: QuantizedWeight
    source: tuple[int, int]


def linears_to_keep(module: nn.Module) -> list[Int8Linear]:
    """The linears in ``module`` whose recipe quantizes W."""
    from lightning_int8.linear import Int8Linear

    return [
        child
        for child in module.modules()
        if isinstance(child, Int8Linear) and (child.int8_recipe.forward or child.int8_recipe.dgrad)
    ]


@torch.no_grad()
def keep_weight_planes(module: nn.Module | Iterable[Int8Linear]) -> None:
    """Quantizes the weights whose planes are not kept yet, or are no longer those of the weight.

    Weights that are shards (FSDP, tensor parallelism) are left out, since whole ones come and go with each forward, as
    are those that a hook or parametrization makes anew (weight norm, pruning), and frozen ones: what averages them or
    merges adapters into them between micro-batches often goes through ``.data``, of which nothing is noticed.

    Args:
        module: The converted module, or its :func:`linears_to_keep`.
    """
    for linear in linears_to_keep(module) if isinstance(module, nn.Module) else module:
        if not linear.training or not linear.weight.requires_grad or not _has_whole_parameter(linear):
            continue
        weight = linear.weight
        source = _source(weight)
        if linear.int8_kept_weight is None or linear.int8_kept_weight.source != source:
            recipe = linear.int8_recipe
            backend = backends.choose(recipe.backend, weight.device)
            planes = scheme_of(recipe).quantize_weight(weight.detach(), recipe.dgrad, backend)
            linear.int8_kept_weight = KeptWeight(planes, source)


def drop_weight_planes(module: nn.Module | Iterable[Int8Linear]) -> None:
    """Forgets all planes.

    Args:
        module: As for :func:`keep_weight_planes`.
    """
    for linear in linears_to_keep(module) if isinstance(module, nn.Module) else module:
        linear.int8_kept_weight = None


def planes_of_weight(linear: Int8Linear) -> QuantizedWeight | None:
    """The planes that are kept of the weight as it is now; ``None`` outside of training."""
    kept = linear.int8_kept_weight
    if kept is None or not (linear.training and torch.is_grad_enabled()):
        return None
    if not torch.compiler.is_dynamo_compiling() and kept.source != _source(linear.weight):
        return None
    return kept.planes


def _source(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def _has_whole_parameter(linear: Int8Linear) -> bool:
    weight = linear._parameters.get("weight")
    return (
        weight is not None
        and not hasattr(weight, "device_mesh")
        and tuple(weight.shape) == (linear.out_features, linear.in_features)
    )
