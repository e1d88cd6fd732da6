"""Thresholds saved under one recipe and resumed under another: which fields they depend on, and in what way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_int8.recipe import Int8Recipe

# What a threshold is compared with. With others, a saved one says nothing.
_MEANING = ("scaling", "block_size", "hadamard")
# What the thresholds are moved to, step by step, from wherever they are.
_TARGET = ("budget", "activation_band", "gradient_band", "forward", "dgrad", "wgrad")


def threshold_fields(recipe: Int8Recipe) -> dict[str, Any]:
    """The fields that the thresholds of ``recipe`` depend on, in plain types; ``hadamard``: whether it is in use."""
    return {name: getattr(recipe, name) for name in (*_MEANING, *_TARGET)} | {"hadamard": recipe.mixes}


def changed_fields(saved: Mapping[str, Any], recipe: Int8Recipe) -> tuple[str, str]:
    """What differs between the `threshold_fields` of a checkpoint and those of ``recipe``.

    Returns:
        The differences that leave no meaning to saved thresholds, and those that only move them; empty for none.
    """
    own = threshold_fields(recipe)
    before = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    changed = [name for name in own if name in before and before[name] != own[name]]
    # A budget needs more numbers of each operand than bands.
    other_numbers = "budget" in changed and None in (before["budget"], own["budget"])
    meaning = [name for name in changed if name in _MEANING or (name == "budget" and other_numbers)]
    texts = {name: f"{name} was {before[name]!r} and is {own[name]!r}" for name in changed}
    return (
        ", ".join(texts[name] for name in meaning),
        ", ".join(texts[name] for name in changed if name not in meaning),
    )


def fell_back(fields: Mapping[str, Any]) -> bool:
    """`Int8Recipe.falls_back` of a recipe with these `threshold_fields`."""
    return max(fields["activation_band"][1], fields["gradient_band"][1]) > 0
