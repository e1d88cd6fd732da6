"""The `triton` backend: the reference's ops in plain Triton, for NVIDIA GPUs from Ampere on (and the interpreter)."""

from lightning_int8.kernels.gemm import gemm_block, gemm_row
from lightning_int8.kernels.quantize import quantize_block, quantize_row, transposed_integers
from lightning_int8.kernels.quantize_gradient import quantize_row_gradient
from lightning_int8.kernels.quantize_launch import BLOCKS

__all__ = [
    "BLOCKS",
    "gemm_block",
    "gemm_row",
    "quantize_block",
    "quantize_row",
    "quantize_row_gradient",
    "transposed_integers",
]
