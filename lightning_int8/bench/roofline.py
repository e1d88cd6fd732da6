"""What the hardware would allow: peak rates by GPU, and the time a GEMM or a linear layer takes at them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_int8.recipe import Int8Recipe


@dataclass(frozen=True)
class Peak:
    """Dense tensor-core peaks in TFLOP/s (TOPS) with FP32 or INT32 accumulation, as the vendor states them.

    Attributes:
        bf16: BF16.
        int8: INT8.
        fp8: FP8; ``None`` where the GPU has none.
    """

    bf16: float
    int8: float
    fp8: float | None


# The first whose words the GPU's name contains counts. From NVIDIA's data sheets and architecture white papers; where
# they state rates with sparsity, half of it.
PEAKS: dict[str, Peak] = {
    "H100 PCIe": Peak(756, 1513, 1513),
    "H100 NVL": Peak(835, 1671, 1671),
    "H100": Peak(989, 1979, 1979),
    "H200 NVL": Peak(835, 1671, 1671),
    "H200": Peak(989, 1979, 1979),
    "GH200": Peak(989, 1979, 1979),
    "H800": Peak(989, 1979, 1979),
    "H20": Peak(148, 296, 296),
    "B200": Peak(2250, 4500, 4500),
    "A100": Peak(312, 624, None),
    "A800": Peak(312, 624, None),
    "A40": Peak(149.7, 299.3, None),
    "A10G": Peak(70, 140, None),
    "A10": Peak(125, 250, None),
    "L40S": Peak(362, 733, 733),
    "L40": Peak(181, 362, 362),
    "L4": Peak(121, 242, 242),
    "RTX A6000": Peak(154.8, 309.7, None),
    "RTX 3090": Peak(71, 284, None),
    "RTX 4090": Peak(165.2, 660.6, 330.3),
    "RTX 5090": Peak(209.5, 838, 419),
}


def peak_of(gpu: str) -> Peak | None:
    """The peak rates of the GPU of this name; ``None`` where they are not in the table, as of a laptop's."""
    found = (peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", gpu))
    return None if "Laptop" in gpu else next(found, None)


def gemm_milliseconds(rows: int, columns: int, depth: int, rate: float, bandwidth: float, size: int) -> float:
    """The least time of one GEMM: its arithmetic at the peak, or its bytes at the copy's bandwidth.

    Args:
        rows: Rows of the output.
        columns: Columns of the output.
        depth: The contraction.
        rate: Peak in TFLOP/s.
        bandwidth: Bytes a second.
        size: Bytes of an operand's element; the output's has 2.
    """
    arithmetic = 2 * rows * columns * depth / rate / 1e9
    traffic = (size * depth * (rows + columns) + 2 * rows * columns) / bandwidth * 1e3
    return max(arithmetic, traffic)


def linear_milliseconds(
    tokens: int, k: int, n: int, recipe: Int8Recipe | None, fallback: float, peak: Peak, bandwidth: float
) -> float:
    """The least time of a linear's three GEMMs and of what goes with them, that at the copy's bandwidth.

    BF16 casts a float32 weight, and its gradient back. INT8: a fraction ``fallback`` of X's and dY's blocks is
    multiplied twice, both ways in the wgrad unless contractions are mixed. Quantizing reads a BF16 tensor twice
    (statistics, then integers) and writes two INT8 layouts of it and of its fallback blocks, mixed of these one. The
    float32 weight is read three times: twice for the forward and once for the dgrad, mixed the other way round.
    """
    size, rate = (1, peak.int8) if recipe else (2, peak.bf16)
    extra = 1 + fallback if recipe else 1.0
    mixes = recipe is not None and recipe.mixes
    gemms = [((tokens, n, k), extra), ((tokens, k, n), extra), ((n, k, tokens), 1.0 if mixes else extra * extra)]
    time = sum(gemm_milliseconds(*shape, rate / factor, bandwidth, size) for shape, factor in gemms)
    each = 6 + (fallback if mixes else 2 * fallback)
    beside = tokens * (k + n) * each + 14 * k * n if recipe else 12 * k * n
    return time + beside / bandwidth * 1e3
