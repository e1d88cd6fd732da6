"""What to do about what was measured: which layers are too small to gain in INT8, and where the GPU waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_int8.small_layers import effective_features

# Below this share of a step the GPU has too little to do.
BUSY = 0.9


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


def linear_advice(
    lines: Sequence[Mapping[str, Any]], recipes: Sequence[str], names: Mapping[Any, Sequence[str]]
) -> list[str]:
    """What to do about the layers that were measured, one sentence each.

    Args:
        lines: What :func:`lightning_int8.bench.linear.measure` returned.
        recipes: Names of this package's recipes among their cells.
        names: The model's layers by (in-features, out-features); empty without a model.
    """
    said = []
    for recipe in recipes:
        cells = {(line["k"], line["n"]): line["cells"].get(recipe, {}) for line in lines}
        timed = {shape: cell for shape, cell in cells.items() if "ratio" in cell}
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


def step_advice(lines: Sequence[Mapping[str, Any]], recipes: Sequence[str]) -> list[str]:
    """What to do about the training steps that were measured, one sentence each."""
    said = []
    for line in lines:
        for recipe in recipes:
            cell = line["cells"].get(recipe, {})
            if "gpu_ms" in cell and cell["gpu_ms"] < BUSY * cell["ms"]:
                graphs = "torch.compile its layers with mode='reduce-overhead', or "
                fix = f"{'' if line['compiling'] == 'graphs' else graphs}a larger batch"
                idle = 1 - cell["gpu_ms"] / cell["ms"]
                said.append(
                    f"{line['model']}, {recipe}: the GPU waits for the host {idle:.0%} of the step. Fix: {fix}."
                )
    return said


def _named(names: Mapping[Any, Sequence[str]], shape: tuple[int, int]) -> str:
    layers = names.get(shape, ())
    if not layers:
        return ""
    return f", {layers[0]}" + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")
