"""The `triton` backend: the reference's ops in plain Triton, for NVIDIA GPUs from Ampere on (and the interpreter)."""

from lightning_int8.kernels.gemm import gemm_block, gemm_row
from lightning_int8.kernels.quantize import (
    BLOCKS,
    quantize_block,
    quantize_row,
    quantize_row_gradient,
    transposed_integers,
)

__all__ = [
    "BLOCKS",
    "gemm_block",
    "gemm_row",
    "quantize_block",
    "quantize_row",
    "quantize_row_gradient",
    "transposed_integers",
]
