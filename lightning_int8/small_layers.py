"""Which linear layers are too small to gain from INT8, by their shape and the GPU.

A layer's GEMMs cost time in proportion to M·K·N and its quantization to M·(K + N), over M tokens. So INT8 saves time
where K·N / (K + N) is large, whatever M: where the harmonic mean of K and N, for a square layer its width, passes a
threshold that depends on the GPU and the scaling.
"""

from __future__ import annotations

from typing import Literal

import torch

from lightning_int8.recipe import Int8Recipe

MinFeatures = int | Literal["auto"]

# Least effective features by compute capability, scaling and rate of fallback blocks: measured with
# `lightning-int8-bench` over 16,384 tokens, bf16-mixed, nothing shared with siblings; what siblings share (q/k/v, gate
# and up) makes them gain from less on. Fewer tokens leave the GPU partly idle and move it up. For another GPU,
# `lightning-int8-bench --sections linear` ends with the number to put here.
MEASURED: dict[tuple[int, int], dict[str, dict[float, int]]] = {
    # H100, docs/results/2026-11-22-H100-bench.md. `row` at 0.2: 3072 → 3072 takes 0.94 times BF16's speed, 2048 → 8192
    # (3276.8) 1.01 and all larger ones more; at 0.1: 2048 → 2048 0.95, 2560 → 2560 1.06. `block` loses up to 8192, the
    # largest that was measured. On an H200 with newer kernels 2048 → 2048 still loses (0.96, at 0.2), as it does on an
    # H100 with contractions mixed (0.96, at 0.05: 2026-11-22-H100-bench-2.md; 4096 → 4096 1.33).
    (9, 0): {"row": {0.1: 2560, 0.2: 3276}, "block": {0.2: 16384}},
}
# For other GPUs, which have slower memory beside their INT8 units or kernels that are not made for them.
UNMEASURED = 8192


def effective_features(in_features: int, out_features: int) -> float:
    """The harmonic mean of a layer's features: the width of the square layer that gains as much."""
    return 2 * in_features * out_features / (in_features + out_features)


def expected_rate(recipe: Int8Recipe) -> float:
    """The rate of fallback blocks that a recipe's thresholds settle at."""
    if recipe.budget is not None:
        return recipe.budget
    return max(sum(recipe.activation_band), sum(recipe.gradient_band)) / 2


def check_min_features(min_features: MinFeatures) -> MinFeatures:
    """Returns it.

    Raises:
        ValueError: It is neither ``"auto"`` nor an integer of at least 0.
    """
    if min_features == "auto":
        return min_features
    if isinstance(min_features, bool) or not isinstance(min_features, int) or min_features < 0:
        raise ValueError(
            f"min_features={min_features!r} must be 'auto' or an integer of at least 0, such as 2048; 0 converts "
            "layers of any size."
        )
    return min_features


def least_features(min_features: MinFeatures, recipe: Int8Recipe, device: torch.device) -> tuple[int, str]:
    """The least effective features of a layer to convert, and where that number is from.

    A model that is still on the CPU, as Fabric hands it over, is taken to be on its way to the current CUDA device. On
    a machine without one ``"auto"`` is 0: there INT8 is not for speed.
    """
    if min_features != "auto":
        return min_features, f"min_features={min_features}"
    if not torch.cuda.is_available():
        return 0, f"min_features='auto' on {device.type}"
    if device.type != "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(device)
    name = f"sm_{capability[0]}{capability[1]}"
    by_rate = MEASURED.get(capability, {}).get(recipe.scaling, {}) if recipe.block_size == 128 else {}
    # Fallback only costs, so what was measured at a higher rate is safe.
    measured = next((by_rate[rate] for rate in sorted(by_rate) if rate >= expected_rate(recipe) - 1e-6), None)
    if measured is None:
        return UNMEASURED, f"min_features='auto', {UNMEASURED} where nothing was measured ({name}, {recipe.describe()})"
    return measured, f"min_features='auto', {measured} on {name}"
