"""Which modules are a SwiGLU layer, by what their forward computes, and their class with the fused forward."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_int8.linear import Int8Linear
from lightning_int8.swiglu import can_fuse, int8_swiglu


def fuse_swiglu(module: nn.Module) -> bool:
    """Lets ``module`` compute through :func:`~lightning_int8.swiglu.int8_swiglu`, if it is a SwiGLU layer.

    That is, if its forward is ``down(silu(gate(x)) * up(x))`` of three of its own INT8 linears and nothing else, as in
    the Llama, Qwen and Mistral models of transformers. Its class becomes a subclass with another ``forward``;
    parameters, buffers and hooks stay. Whenever the fused forward would not compute the same (hooks on a projection, a
    projection replaced by an adapter, ...), the module's own forward runs.

    Args:
        module: Any module whose linear layers have been converted.

    Returns:
        Whether it is one.
    """
    if is_fused(module):
        return True
    names = _swiglu_names(module)
    if names is None:
        return False
    cls: Any = type(module)
    module.__class__ = _fused_class(cls)
    module.int8_swiglu_names = names  # type: ignore[assignment]
    return True


def is_fused(module: nn.Module) -> bool:
    """Whether :func:`fuse_swiglu` has been applied to ``module``."""
    return hasattr(module, "int8_swiglu_names")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear)


def _swiglu_names(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the gate, up and down projection, or ``None`` where the forward is something else."""
    linears = [name for name, child in module.named_children() if isinstance(child, Int8Linear)]
    if len(linears) != 3 or isinstance(module, fx.GraphModule):
        return None
    before = dict(vars(module))
    try:
        graph = _Tracer().trace(module)
    # Tracing runs code of the user's on stand-ins for tensors: whatever it raises, this is no plain SwiGLU.
    except Exception:
        return None
    finally:
        changed = vars(module).keys() != before.keys() or any(vars(module)[k] is not v for k, v in before.items())
        vars(module).clear()
        vars(module).update(before)
    if changed:
        return None
    return _match(graph)


def _match(graph: fx.Graph) -> tuple[str, str, str] | None:
    nodes = list(graph.nodes)
    if [node.op for node in nodes].count("placeholder") != 1 or len(nodes) != 7:
        return None
    (x,) = (node for node in nodes if node.op == "placeholder")
    (out,) = nodes[-1].args
    if not _is_module(out) or not _is_product(out.args[0]):
        return None
    left, right = out.args[0].args
    activation, up = (left, right) if _is_silu(left) else (right, left)
    if not _is_silu(activation) or not _is_module(activation.args[0]) or not _is_module(up):
        return None
    gate = activation.args[0]
    if gate.args != (x,) or up.args != (x,) or gate is up:
        return None
    return gate.target, up.target, out.target


def _is_module(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs


def _is_product(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target in (operator.mul, torch.mul)
        and len(node.args) == 2
        and not node.kwargs
    )


def _is_silu(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is F.silu and len(node.args) == 1


@functools.cache
def _fused_class(cls: Any) -> Any:
    class Fused(cls):  # type: ignore[misc, valid-type]
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            (x,) = *args, *kwargs.values()
            gate, up, down = (getattr(self, name) for name in self.int8_swiglu_names)
            if can_fuse(x, gate, up, down):
                return int8_swiglu(x, gate, up, down)
            return super().forward(x)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            # The class is made here and cannot be found by its name, so a copy or pickle makes it again.
            return _restore, (cls,), self.__dict__

    Fused.__name__, Fused.__qualname__, Fused.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    Fused.__doc__ = cls.__doc__
    return Fused


def _restore(cls: Any) -> Any:
    return object.__new__(_fused_class(cls))
