"""Which layers are too small to gain in INT8: from the linears that were measured to a threshold, and to names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_int8.small_layers import effective_features


def least_features(lines: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """The smallest ``min_features`` with which no layer that was measured loses time.

    Args:
        lines: What :func:`lightning_int8.bench.linear.measure` returned.
        name: The recipe's name among their cells.

    Returns:
        The least effective number of features above those of every layer that lost; ``None`` if the largest lost.
    """
    timed = [line for line in lines if "ratio" in line["cells"].get(name, {})]
    lost = [effective_features(line["k"], line["n"]) for line in timed if line["cells"][name]["ratio"] < 1.0]
    above = [
        effective_features(line["k"], line["n"])
        for line in timed
        if effective_features(line["k"], line["n"]) > max(lost, default=0)
    ]
    return int(min(above)) if above else None


def advice(lines: Sequence[Mapping[str, Any]], recipes: Sequence[str], names: Mapping[Any, Sequence[str]]) -> list[str]:
    """What to do about the layers that were measured, one sentence each.

    Args:
        lines: What :func:`lightning_int8.bench.linear.measure` returned.
        recipes: Names of this package's recipes among their cells.
        names: The model's layers by (in-features, out-features); empty without a model.
    """
    said = []
    for recipe in recipes:
        timed = {(line["k"], line["n"]): line["cells"][recipe] for line in lines if "ratio" in line["cells"][recipe]}
        lost = {shape: cell["ratio"] for shape, cell in timed.items() if cell["ratio"] < 1.0}
        if not timed:
            continue
        if not lost:
            said.append(f"{recipe}: every layer that was measured gains; leave min_features=0.")
            continue
        shown = ", ".join(f"{k} → {n} ({ratio:.2f}×{_named(names, (k, n))})" for (k, n), ratio in lost.items())
        least = least_features(lines, recipe)
        fix = (
            f"min_features={least} leaves out what loses here"
            if least is not None
            else "no layer gains: train in BF16, or use INT8 for its memory"
        )
        said.append(f"{recipe}: too small to gain: {shown}. Fix: {fix}.")
    return said


def _named(names: Mapping[Any, Sequence[str]], shape: tuple[int, int]) -> str:
    layers = names.get(shape, ())
    if not layers:
        return ""
    return f", {layers[0]}" + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
