"""The `triton` backend: the reference's ops in plain Triton, for NVIDIA GPUs from Ampere on (and the interpreter)."""

from functools import partial

from lightning_int8.kernels import groups
from lightning_int8.kernels.gemm import gemm_block, gemm_row
from lightning_int8.kernels.quantize import quantize_block, quantize_row, transposed_integers
from lightning_int8.kernels.quantize_gradient import quantize_row_gradient
from lightning_int8.kernels.quantize_launch import BLOCKS

__all__ = [
    "BLOCKS",
    "gemm_block",
    "gemm_row",
    "gemm_row_groups",
    "quantize_block",
    "quantize_row",
    "quantize_row_gradient",
    "transposed_integers",
]

gemm_row_groups = partial(groups.gemm_row_groups, gemm_row)
