"""`Int8Linear`: an `nn.Linear` whose GEMMs run in INT8. Same parameters, same `state_dict`, no numerics of its own."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_int8.functional import int8_linear
from lightning_int8.recipe import Int8Recipe
from lightning_int8.threshold import FallbackState


class Int8Linear(nn.Linear):
    """An ``nn.Linear`` that computes through :func:`lightning_int8.int8_linear`.

    Made by swapping the class of an existing ``nn.Linear`` in place (:meth:`swap`), so parameters keep their identity:
    optimizers, tied weights, DDP and checkpoints made before the swap stay valid, and a checkpoint of it loads strictly
    into the plain model.

    Attributes:
        int8_recipe: How the layer quantizes.
        int8_state: Its delayed thresholds and counters.
    """

    int8_recipe: Int8Recipe
    int8_state: FallbackState

    @classmethod
    def swap(cls, linear: nn.Linear, recipe: Int8Recipe) -> Int8Linear:
        """Turns ``linear`` itself into an ``Int8Linear`` with ``recipe`` and fresh thresholds, and returns it."""
        linear.__class__ = cls
        linear.int8_recipe = recipe
        linear.int8_state = FallbackState(recipe)
        return linear  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        return int8_linear(
            input,
            self.weight,
            self.bias,
            recipe=self.int8_recipe,
            state=self.int8_state,
            update_state=self.training,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8={self.int8_recipe.describe()}"
