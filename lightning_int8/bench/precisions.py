"""What is compared: BF16, this package's recipes, and torchao's float8 and INT8 where it is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_int8 import __version__
from lightning_int8.convert import convert_to_int8
from lightning_int8.names import matches
from lightning_int8.recipe import Int8Recipe
from lightning_int8.small_layers import MinFeatures

TORCHAO = ("fp8-tensorwise", "fp8-rowwise", "torchao-int8", "torchao-int8-swap")


@dataclass(frozen=True)
class Precision:
    """One way to compute the linear layers.

    Attributes:
        name: Its heading.
        convert: Changes a model's linears, but for those that the patterns name, in place; returns the model.
        recipe: This package's recipe; ``None`` for the others.
        compiled: Whether a lone layer of it needs ``torch.compile`` to be what its authors mean it to be.
    """

    name: str
    convert: Callable[[nn.Module, Sequence[str]], nn.Module]
    recipe: Int8Recipe | None = None
    compiled: bool = False


def precisions(recipes: Sequence[Int8Recipe], peers: Sequence[str], min_features: MinFeatures = 0) -> list[Precision]:
    """BF16 first, then the recipes, which leave out layers below ``min_features``, then the peers.

    Raises:
        ValueError: An unknown peer.
        ModuleNotFoundError: A peer is asked for and torchao is not installed.
    """
    for name in peers:
        if name not in TORCHAO:
            raise ValueError(f"--peers {name}: must be of {', '.join(TORCHAO)}.")
    if peers and importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError(
            f"--peers {' '.join(peers)} needs torchao: pip install torchao, or leave --peers out."
        )
    ours = [Precision(recipe.describe(), _ours(recipe, min_features), recipe=recipe) for recipe in recipes]
    theirs = [Precision(name, _torchao(name), compiled=True) for name in peers]
    return [Precision("bf16", lambda model, ignored: model), *ours, *theirs]


def installed_peers() -> list[str]:
    """The peers that can be compared here. torchao's INT8 is left to ask for: it tunes itself for minutes."""
    return list(TORCHAO[:2]) if importlib.util.find_spec("torchao") is not None else []


def _ours(recipe: Int8Recipe, min_features: MinFeatures) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def convert(model: nn.Module, ignored: Sequence[str]) -> nn.Module:
        convert_to_int8(model, recipe, list(ignored), min_features=min_features)
        return model

    return convert


def _torchao(name: str) -> Callable[[nn.Module, Sequence[str]], nn.Module]:
    def convert(model: nn.Module, ignored: Sequence[str]) -> nn.Module:
        def chosen(module: nn.Module, path: str) -> bool:
            return isinstance(module, nn.Linear) and not any(matches(pattern, path) for pattern in ignored if path)

        if name.startswith("fp8"):
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training

            config = Float8LinearConfig.from_recipe_name(name.removeprefix("fp8-"))
            return convert_to_float8_training(model, config=config, module_filter_fn=chosen)
        from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
        from torchao.quantization import quantize_

        quantize_(model, Int8MixedPrecisionTrainingConfig(module_swap=name.endswith("swap")), filter_fn=chosen)
        return model

    return convert


def versions() -> dict[str, str]:
    """Of what is compared."""
    found = {"lightning-int8": __version__}
    for package in ("torch", "triton", "torchao", "lightning", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
