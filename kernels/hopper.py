"""The GEMMs on Hopper (sm_90), in Gluon: persistent, warp-specialized, TMA and `wgmma`.

One CTA per SM walks over output tiles of 128×256. Its 9 warps have three roles:

- the *producer*, one warp, copies 128×128 blocks of the operands with TMA into a ring of shared-memory stages, each one
  block of ``a`` and two of ``b`` (48 KiB), and signals each stage's ``full`` barrier;
- two *consumer* warpgroups, 64 rows of the tile each, multiply stage after stage, keep one stage's ``wgmma`` in flight
  behind the one they wait for, and signal the ``empty`` barrier of the stage before it.

`row`. A consumer keeps its 64×256 sums in INT32 registers over the whole contraction. The shift levels follow one
another in Horner form, so that one accumulator is enough: all ``high·high`` pairs, ``<< 8``, all ``high·low`` and
``low·high`` pairs, ``<< 8``, all ``low·low`` pairs. ``a``'s fallback blocks concern the whole width of the tile;
``b``'s concern one of its two 128-column halves, and are multiplied for that half alone. Nobody prepares lists of these
blocks: the producer searches the tile's rows of ``slot`` for the next fallback block while the ring is full, and the
consumers only need to know how many stages each level has, which one masked sum says. At a tile's end the left half's
products go first, so that the right half's run while it is scaled and stored. Where an output has few tiles, its
contraction is cut into parts and each CTA makes the sums of one tile and part, see
:mod:`lightning_int8.kernels.hopper_split`.

`block`. Sums are FP32, and each block's INT32 product is scaled into them. On Hopper that costs about as much as the
product itself, so a consumer multiplies 64×128 at a time and scales it while the other consumer's product runs.

The quantize ops of this backend are the portable ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightning_int8.kernels import groups, portable
from lightning_int8.kernels.hopper_block import block_kernel
from lightning_int8.kernels.hopper_groups import groups_of_a_launch, scale_and_add
from lightning_int8.kernels.hopper_row import row_kernel
from lightning_int8.kernels.hopper_split import add_parts, choose_parts
from lightning_int8.kernels.planes import RESIDUAL_STEPS, QuantizedMatrix, blocks_along
from lightning_int8.kernels.portable import quantize_block, quantize_row, quantize_row_gradient, transposed_integers

__all__ = [
    "gemm_block",
    "gemm_row",
    "gemm_row_groups",
    "quantize_block",
    "quantize_row",
    "quantize_row_gradient",
    "transposed_integers",
]

# The edge of a fallback block; this backend has no other.
BLOCK = 128
TILE_M, TILE_N = BLOCK, 2 * BLOCK
STAGES = 4
# So many stages at a tile's end are multiplied for its left half first: about a third of what a tile takes outside its
# products is hidden then.
LAG = 3
# Tiles are visited in groups of this many rows of tiles, so that CTAs running at a time share operands in L2: without
# and with fallback blocks.
GROUPS = (8, 16)
# Registers per thread of the second consumer and the producer, as the compiler needs them; the first consumer gets the
# rest, as many as the second.
REGISTERS = {"row": (232, 40), "block": (232, 32)}


def gemm_row(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``row`` scaling: see :func:`lightning_int8.kernels.reference.gemm_row`, of which it is bit-exact.

    Blocks of 128 only; other sizes go to the portable kernel. Operands are contiguous and 16-byte aligned.
    """
    if a.block != BLOCK or b.block != BLOCK:
        return portable.gemm_row(a, b, bias, out_dtype, accumulate)
    rows, cols, depth = a.size[0], b.size[0], blocks_along(a.size[1], BLOCK)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.low.device)
    if out.numel() == 0:
        return out
    parts = choose_parts(rows, cols, depth, _tiles(out), _processors(out.device.index), LAG + 1)
    if parts == 1:
        row_kernel[_grid(out)](
            *_operand(a), *_operand(b), bias, accumulate, out, _output(out, accumulate), rows, cols, depth, None,
            **_row_constants(a, b, depth),
        )  # fmt: skip
        return out
    a_scale, b_scale = (None if x.scale is None else x.scale.contiguous() for x in (a, b))
    add_parts(_sums_of_parts(a, b, parts), a_scale, b_scale, bias, accumulate, out)
    return out


def gemm_row_groups(a: QuantizedMatrix, b: QuantizedMatrix, out_dtype: torch.dtype, group_blocks: int) -> Tensor:
    """See :func:`lightning_int8.kernels.groups.gemm_row_groups`, of which it is bit-exact."""
    scale = groups.scales_of(a, group_blocks)
    rows, cols, depth = a.size[0], b.size[0], blocks_along(a.size[1], BLOCK)
    at_a_time = groups_of_a_launch(rows, cols, group_blocks, LAG + 1)
    if a.block != BLOCK or at_a_time == 1 or rows * cols == 0:
        return groups.gemm_row_groups(gemm_row, a, b, out_dtype, group_blocks)
    whole, group, total = depth // group_blocks, 0, None
    while group < len(scale):
        # Parts are of one length, so a last group that is shorter runs alone.
        count = max(1, min(at_a_time, whole - group))
        blocks = slice(group * group_blocks, (group + count) * group_blocks)
        dtype = out_dtype if group + count == len(scale) else torch.float32
        part_b = groups.columns_of(b, blocks, None)
        if count == 1:
            total = gemm_row(groups.columns_of(a, blocks, scale[group]), part_b, None, dtype, total)
        else:
            before, total = total, torch.empty(rows, cols, dtype=dtype, device=a.low.device)
            sums = _sums_of_parts(groups.columns_of(a, blocks, None), part_b, count)
            scale_and_add(sums, scale[group : group + count], before, total)
        group += count
    return total  # type: ignore[return-value]


def _sums_of_parts(a: QuantizedMatrix, b: QuantizedMatrix, parts: int) -> Tensor:
    """The INT32 sums of each of ``parts`` parts of the contraction, ``[parts, R, N]``."""
    rows, cols, depth = a.size[0], b.size[0], blocks_along(a.size[1], BLOCK)
    sums = torch.empty(parts, rows, cols, dtype=torch.int32, device=a.low.device)
    row_kernel[_grid(sums)](
        *_operand(a)[:3], None, *_operand(b)[:3], None, None, None, sums, None, rows, cols, depth, parts,
        **_row_constants(a, b, depth),
    )  # fmt: skip
    return sums


def _row_constants(a: QuantizedMatrix, b: QuantizedMatrix, depth: int) -> dict[str, Any]:
    return {
        "DEPTH": _lanes(depth), "BLOCK": BLOCK, "STAGES": STAGES, "GROUP": _group(a, b),
        "LAG": LAG if depth > LAG else 0, "REGISTERS": REGISTERS["row"], "num_warps": 4, "enable_fp_fusion": False,
    }  # fmt: skip


def gemm_block(
    a: QuantizedMatrix,
    b: QuantizedMatrix,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    accumulate: Tensor | None = None,
) -> Tensor:
    """``a @ bᵀ`` for ``block`` scaling: see :func:`lightning_int8.kernels.reference.gemm_block`.

    Within float32 rounding of it: the scales are multiplied with each other first, and added by fused multiply-add.
    Blocks of 128 only; other sizes go to the portable kernel. Operands are contiguous and 16-byte aligned.
    """
    if a.block != BLOCK or b.block != BLOCK:
        return portable.gemm_block(a, b, bias, out_dtype, accumulate)
    if a.scale is None or b.scale is None:
        raise ValueError("gemm_block needs the block scales of both operands.")
    rows, cols, depth = a.size[0], b.size[0], blocks_along(a.size[1], BLOCK)
    out = torch.empty(rows, cols, dtype=out_dtype, device=a.low.device)
    if out.numel() == 0:
        return out
    block_kernel[_grid(out)](
        *_operand(a), *_operand(b), bias, accumulate, out, _output(out, accumulate), rows, cols, depth,
        RESIDUAL_STEPS=RESIDUAL_STEPS, DEPTH=_lanes(depth), BLOCK=BLOCK, STAGES=STAGES, GROUP=_group(a, b),
        REGISTERS=REGISTERS["block"], num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _operand(a: QuantizedMatrix) -> tuple[TensorDescriptor, TensorDescriptor | None, Tensor | None, Tensor | None]:
    low = TensorDescriptor.from_tensor(a.low, [BLOCK, BLOCK], _layout(torch.int8))
    scale = None if a.scale is None else a.scale.contiguous()
    if a.high is None or a.slot is None or a.high.shape[0] == 0:
        return low, None, None, scale
    high = TensorDescriptor.from_tensor(a.high.view(-1, BLOCK), [BLOCK, BLOCK], _layout(torch.int8))
    return low, high, a.slot.contiguous(), scale


def _group(a: QuantizedMatrix, b: QuantizedMatrix) -> int:
    return GROUPS[a.slot is not None or b.slot is not None]


def _lanes(depth: int) -> int:
    """The width of the vector that holds one row of ``slot``; from 128 on, so that few kernels are compiled."""
    return max(128, triton.next_power_of_2(depth))


def _output(out: Tensor, accumulate: Tensor | None) -> TensorDescriptor | None:
    """How TMA writes the output, or ``None`` where threads do.

    That is: 4-byte outputs, whose sectors are whole either way; row strides that TMA cannot take; and where threads
    read an existing sum anyway.
    """
    if out.element_size() != 2 or out.shape[1] % 8 or accumulate is not None:
        return None
    return TensorDescriptor.from_tensor(out, [64, BLOCK // 2], _layout(out.dtype))


@functools.cache
def _layout(dtype: torch.dtype) -> gl.NVMMASharedLayout:
    kind = {torch.int8: gl.int8, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([BLOCK, BLOCK] if dtype == torch.int8 else [64, BLOCK // 2], kind)


def _tiles(out: Tensor) -> int:
    """Of all the matrices in ``out [..., R, N]``."""
    *parts, rows, cols = out.shape
    return math.prod(parts) * blocks_along(rows, TILE_M) * blocks_along(cols, TILE_N)


def _grid(out: Tensor) -> tuple[int]:
    return (min(_tiles(out), _processors(out.device.index)),)


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
