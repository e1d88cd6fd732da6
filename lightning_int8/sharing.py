"""One activation is quantized once: linears that read the same tensor (q/k/v, gate/up) share its planes.

Where a module directly holds several INT8 linears, the first of them leaves the planes of its input on the input tensor
itself, and the next ones take them from there. So that nothing is ever left on a tensor of the user's, and so that a
traced program (`torch.compile`, also under activation checkpointing) only changes tensors of its own, such a module
gets aliases of its arguments; the planes go with the aliases when its forward ends. They are also what each linear
saves for its backward, so that memory is shared as well.

The first linear of a group decides by its own threshold which blocks fall back; the others' thresholds for X rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_int8.operands import QuantizedInput

_ATTRIBUTE = "_int8_planes"


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    version: int
    planes: QuantizedInput


def share_inputs(groups: Iterable[nn.Module]) -> None:
    """Lets the INT8 linears that are direct children of each of ``groups`` share their inputs' planes.

    Idempotent. The hook holds no state and changes neither parameters nor the ``state_dict``.
    """
    for group in groups:
        if _alias_arguments not in group._forward_pre_hooks.values():
            group.register_forward_pre_hook(_alias_arguments, with_kwargs=True)
        for child in group.children():
            if hasattr(child, "int8_shares_input"):
                child.int8_shares_input = True
                child.int8_state.input_group = id(group)


def shared_planes(source: Tensor, key: tuple[Any, ...], wgrad: bool) -> QuantizedInput | None:
    """What an earlier linear left on ``source``, if it serves this one too.

    Args:
        source: The linear's input, as its caller passed it.
        key: Whatever else the planes depend on: recipe, whether thresholds may move, the dtype under autocast.
        wgrad: Whether the transposed planes are needed.
    """
    entry: _Entry | None = getattr(source, _ATTRIBUTE, None)
    if entry is None or entry.key != key or entry.version != _version(source) or (wgrad and not entry.planes.saved):
        return None
    return entry.planes


def leave_planes(source: Tensor, key: tuple[Any, ...], planes: QuantizedInput) -> None:
    """Leaves the planes of ``source`` for the next linears that read it."""
    # LLM.int8()'s remainder belongs to one weight.
    if planes.remainder is None:
        setattr(source, _ATTRIBUTE, _Entry(key, _version(source), planes))


def _version(source: Tensor) -> int:
    """How often ``source`` was changed in place; a traced program has no in-place changes, nor inference tensors."""
    if torch.compiler.is_compiling() or source.is_inference():
        return 0
    return source._version


def _alias_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return tuple(_alias(value) for value in args), {name: _alias(value) for name, value in kwargs.items()}


def _alias(value: Any) -> Any:
    return value.view_as(value) if type(value) is Tensor and value.is_floating_point() else value
