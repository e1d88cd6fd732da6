"""One activation is quantized once: linears that read the same tensor (q/k/v, gate/up) share its planes.

Where a module directly holds several INT8 linears, it gets aliases of its arguments, and the first linear that reads
such an alias leaves the planes on it for the next ones. They go with the alias when the forward ends, and are also what
each linear saves for its backward, so that memory is shared as well. Only those aliases ever carry planes: a tensor
inside a list or dict, one that the forward makes itself, or one given to the linears outside of it is quantized by each
linear, so nothing is left on a tensor of the user's.

Planes serve as long as the version of the tensor's data, which every view of it shares, is that of when they were made.
Tensors made under `torch.inference_mode` have no version outside of `torch.compile`, so nothing is shared there: to
share in evaluation use `torch.no_grad` (`Trainer(inference_mode=False)`), or compile. Changes without a version inside
the forward are not noticed, as by PyTorch's autograd: through `.data` or NumPy, or, compiled in inference mode, through
another argument that has the same memory. Strict `torch.export` shares nothing.

The first linear of a group decides by its own threshold which blocks fall back; the others' thresholds for X rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._guards import CompileContext

from lightning_int8.operands import QuantizedInput

# On aliases made here alone: None, or what a linear has left.
_ATTRIBUTE = "_int8_planes"


class _Entry(NamedTuple):
    key: tuple[Any, ...]
    version: tuple[int, ...]
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
    if entry is None or entry.version != _version(source) or entry.key != key or (wgrad and not entry.planes.saved):
        return None
    return entry.planes


def leave_planes(source: Tensor, key: tuple[Any, ...], planes: QuantizedInput) -> None:
    """Leaves the planes of ``source`` for the next linears that read it, if it is an alias made here."""
    # LLM.int8()'s remainder belongs to one weight.
    if hasattr(source, _ATTRIBUTE) and planes.remainder is None:
        version = _version(source)
        if version:
            setattr(source, _ATTRIBUTE, _Entry(key, version, planes))


def _version(source: Tensor) -> tuple[int, ...]:
    """Which state of its data ``source`` shows; empty where that cannot be told."""
    if torch.compiler.is_dynamo_compiling():
        return () if _exporting() else _traced_version(source)
    return () if source.is_inference() else (source._version,)


@torch._dynamo.nonstrict_trace
def _traced_version(source: Tensor) -> tuple[int, ...]:
    """The trace, and the version in it of the tensor that stands for ``source`` there: constants of the program.

    A compiled program has no versions, and what it leaves when it ends early (a graph break) says nothing about later
    changes: it serves no other trace, nor eager code.
    """
    trace = CompileContext.current_trace_id()
    if trace is None:
        return 0, 0, 0, 0  # Run by a backend that keeps unused calls.
    return trace.compile_id.frame_id, trace.compile_id.frame_compile_id, trace.attempt, source._version


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    """Whether `torch.export` traces, which does not take the calls of `_traced_version` in its graph."""
    return torch.compiler.is_exporting()


def _alias_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return tuple(_alias(value) for value in args), {name: _alias(value) for name, value in kwargs.items()}


def _alias(value: Any) -> Any:
    if type(value) is not Tensor or not value.is_floating_point():
        return value
    alias = value.view_as(value)
    setattr(alias, _ATTRIBUTE, None)
    return alias
