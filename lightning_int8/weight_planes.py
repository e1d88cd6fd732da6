"""W is quantized once an optimizer step: its INT8 planes, kept from the first micro-batch to the last.

Without this, each micro-batch quantizes every weight twice, for its forward and for its dgrad: with few tokens in a
micro-batch that is a fifth of the step. Kept planes cost two bytes a weight. They are only read in training; whoever
runs the steps makes them before a micro-batch (:func:`keep_weight_planes`, which renews those whose weight has changed)
and drops them after the optimizer step, which may change weights in ways that PyTorch does not notice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lightning_int8.kernels import backends
from lightning_int8.schemes import QuantizedWeight, scheme_of


class KeptWeight(NamedTuple):
    """The planes of one weight, and the address and version of the weight they were made of."""

    planes: QuantizedWeight
    source: tuple[int, int]


@torch.no_grad()
def keep_weight_planes(module: nn.Module) -> None:
    """Quantizes the weights of ``module``'s INT8 linears whose planes are not kept yet or not those of the weight.

    Weights that are shards (FSDP, tensor parallelism) are left out, since whole ones come and go with each forward; so
    are recipes that quantize W differently for the forward and the dgrad (``scaling="vector"``).
    """
    from lightning_int8.linear import Int8Linear

    for linear in module.modules():
        if not isinstance(linear, Int8Linear) or not _can_keep(linear):
            continue
        weight = linear.weight
        source = weight.data_ptr(), weight._version
        if linear.int8_kept_weight is None or linear.int8_kept_weight.source != source:
            recipe = linear.int8_recipe
            backend = backends.choose(recipe.backend, weight.device)
            planes = scheme_of(recipe).quantize_weight(weight.detach(), True, backend)
            linear.int8_kept_weight = KeptWeight(planes, source)


def drop_weight_planes(module: nn.Module) -> None:
    """Forgets the planes of the weights that train; a frozen weight's stay good."""
    from lightning_int8.linear import Int8Linear

    for linear in module.modules():
        if isinstance(linear, Int8Linear) and linear.weight.requires_grad:
            linear.int8_kept_weight = None


def _can_keep(linear: nn.Linear) -> bool:
    weight, recipe = linear.weight, linear.int8_recipe
    whole = not hasattr(weight, "device_mesh") and tuple(weight.shape) == (linear.out_features, linear.in_features)
    return linear.training and whole and (recipe.forward or recipe.dgrad) and scheme_of(recipe).quantizes_weight_once
