"""One activation is quantized once: linears that read the same tensor (q/k/v, gate/up) share its planes.

A module that directly holds several INT8 linears opens a window around its forward. Within it, the first linear leaves
the planes of its input behind, and the next ones take them when they are given that very tensor. The window closes with
the forward, so nothing outlives it, and a traced program sees no more than local variables. The planes are also what
each linear saves for its backward, so that memory is shared as well.

The first linear of a group decides by its own threshold which blocks fall back; the others' thresholds for X rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_int8.schemes import QuantizedInput


class _Window:
    """The open window's last quantized input; closed and empty outside of a sharing module's forward."""

    def __init__(self) -> None:
        self.open = False
        self.source: Tensor | None = None
        self.version = 0
        self.key: tuple[Any, ...] = ()
        self.planes: QuantizedInput | None = None


_WINDOW = _Window()


def share_inputs(groups: Iterable[nn.Module]) -> None:
    """Opens a window around the forward of each of ``groups``, modules that directly hold several INT8 linears.

    Idempotent. The hooks hold no state and change neither parameters nor the ``state_dict``.
    """
    for group in groups:
        if _open_window not in group._forward_pre_hooks.values():
            group.register_forward_pre_hook(_open_window)
            group.register_forward_hook(_close_window)


def shared_planes(source: Tensor, key: tuple[Any, ...], wgrad: bool) -> QuantizedInput | None:
    """What an earlier linear of this window left behind for ``source``, if it serves this one too.

    Args:
        source: The linear's input, as its caller passed it.
        key: Whatever else the planes depend on: recipe, whether thresholds may move, the dtype under autocast.
        wgrad: Whether the transposed planes are needed.
    """
    window = _WINDOW
    if not window.open or window.source is not source or window.planes is None:
        return None
    if window.key != key or (wgrad and not window.planes.saved) or window.version != _version(source):
        return None
    return window.planes


def leave_planes(source: Tensor, key: tuple[Any, ...], planes: QuantizedInput) -> None:
    """Leaves the planes of ``source`` for the next linears of this window, if one is open."""
    window = _WINDOW
    # LLM.int8()'s remainder belongs to one weight.
    if window.open and planes.remainder is None:
        window.source, window.planes = source, planes
        window.key, window.version = key, _version(source)


def _version(source: Tensor) -> int:
    """How often ``source`` was changed in place; a traced program has no in-place changes, nor inference tensors."""
    if torch.compiler.is_compiling() or source.is_inference():
        return 0
    return source._version


def _open_window(module: nn.Module, args: Any) -> None:
    _WINDOW.open, _WINDOW.source, _WINDOW.planes = True, None, None


def _close_window(module: nn.Module, args: Any, output: Any) -> None:
    _WINDOW.open, _WINDOW.source, _WINDOW.planes = False, None, None
