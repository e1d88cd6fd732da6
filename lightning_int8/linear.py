"""`Int8Linear`: an `nn.Linear` whose GEMMs run in INT8. Same parameters, same `state_dict`, no numerics of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_int8.functional import int8_linear
from lightning_int8.kernels import backends
from lightning_int8.recipe import Int8Recipe, resolve_recipe
from lightning_int8.tensor_parallel import sharded_int8_linear
from lightning_int8.threshold import FallbackState
from lightning_int8.weight_planes import KeptWeight, planes_of_weight


class Int8Linear(nn.Linear):
    """An ``nn.Linear`` that computes through :func:`lightning_int8.int8_linear`.

    Made by swapping the class of an existing ``nn.Linear`` in place (:meth:`swap`), so parameters keep their identity:
    optimizers, tied weights, DDP and checkpoints made before the swap stay valid, and a checkpoint of it loads strictly
    into the plain model. A new one has ``nn.Linear``'s own first weights.

    Args:
        in_features: Size of each input sample (K).
        out_features: Size of each output sample (N).
        bias: Whether it has a bias.
        device: Where its parameters are.
        dtype: Of its parameters.
        recipe: How it quantizes: a preset's name, an ``Int8Recipe``, or a mapping of its fields.

    Raises:
        TypeError: ``recipe`` is none of these.
        ValueError: An unknown recipe or recipe field, or one out of range.

    Attributes:
        int8_recipe: How the layer quantizes.
        int8_state: Its delayed thresholds and counters.
        int8_shares_input: Whether siblings may read the same tensor: see :mod:`lightning_int8.sharing`.
        int8_kept_weight: The weight's planes between optimizer steps: see :mod:`lightning_int8.weight_planes`.
    """

    int8_recipe: Int8Recipe
    int8_state: FallbackState
    int8_shares_input: bool = False
    int8_kept_weight: KeptWeight | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        recipe: str | Int8Recipe | Mapping[str, Any] = "row",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._quantize_as(resolve_recipe(recipe))

    @classmethod
    def swap(cls, linear: nn.Linear, recipe: Int8Recipe) -> Int8Linear:
        """Turns ``linear`` itself into an ``Int8Linear`` with ``recipe`` and fresh thresholds, and returns it.

        Args:
            linear: An exact ``nn.Linear``, also one that FSDP2's ``fully_shard`` has been applied to.
            recipe: How to quantize it.

        Raises:
            TypeError: ``linear`` is of another class.
        """
        if not is_plain_linear(linear):
            raise TypeError(
                f"Int8Linear.swap takes an exact nn.Linear, not {type(linear).__qualname__}, whose own forward would "
                "be lost."
            )
        linear.__class__ = cls if type(linear) is nn.Linear else _sharded_class(type(linear), cls)
        linear._quantize_as(recipe)  # type: ignore[operator]
        return linear  # type: ignore[return-value]

    def _quantize_as(self, recipe: Int8Recipe) -> None:
        self.int8_recipe = recipe
        self.int8_state = FallbackState(recipe, (self.out_features, self.in_features))
        # Made now rather than in the first forward, which torch.compile would otherwise have to trace twice.
        if self.int8_state.operands:
            self.int8_state.on(self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "recipe": self.int8_recipe,
            "state": self.int8_state,
            "update_state": self.training,
        }
        if hasattr(self.weight, "device_mesh"):
            return sharded_int8_linear(input, self.weight, self.bias, **options)
        return int8_linear(
            input,
            self.weight,
            self.bias,
            share_input=self.int8_shares_input,
            weight_planes=planes_of_weight(self),
            **options,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Moves the thresholds with the parameters (``.to``, ``.cuda``, ``.to_empty``).

        Raises:
            ValueError: On the GPU it moved to there is no kernel for the recipe's block size.
            RuntimeError: The backend that the recipe forces cannot run there.
        """
        super()._apply(fn, recurse)
        self.int8_kept_weight = None
        if self.weight.device.type == "cuda":
            # Here rather than in the first forward, which may be an hour of loading data away.
            backends.choose(self.int8_recipe.backend, self.weight.device, self.int8_recipe.block_size)
        if self.int8_state.operands:
            self.int8_state.on(self.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8={self.int8_recipe.describe()}"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` is an exact ``nn.Linear``, or the class that FSDP2's ``fully_shard`` makes of one."""
    cls = type(module)
    return cls is nn.Linear or (_is_fsdp2_class(cls) and cls.__bases__[-1] is nn.Linear)


def _is_fsdp2_class(cls: type) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return issubclass(cls, FSDPModule) and len(cls.__bases__) > 1


_SHARDED_CLASSES: dict[tuple[type, type], type] = {}


def _sharded_class(cls: type, new: type) -> type:
    """``cls``, which ``fully_shard`` made on the fly from ``nn.Linear``, made anew from ``new``."""
    key = (cls, new)
    if key not in _SHARDED_CLASSES:
        own = {name: value for name, value in vars(cls).items() if name == "__deepcopy__"}
        prefix = cls.__name__.removesuffix(cls.__bases__[-1].__name__)
        _SHARDED_CLASSES[key] = type(f"{prefix}{new.__name__}", (*cls.__bases__[:-1], new), own)
    return _SHARDED_CLASSES[key]
