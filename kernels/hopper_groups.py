"""The wgrad with scales by groups of tokens on Hopper: several groups a launch, then one kernel that scales and adds.

Groups are the parts of a split contraction (:mod:`lightning_int8.kernels.hopper_split`), except that each has a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.kernels.planes import blocks_along

# Groups of a launch, and bytes of the INT32 sums that it may take.
MAX_GROUPS = 8
MAX_BYTES = 256 << 20


@CachedLaunch
@triton.jit(do_not_specialize=["rows", "parts"])
def _scale_and_add_kernel(
    sums, scale, before, out, rows, cols, parts, MAX_PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    at = m.to(tl.int64)[:, None] * cols + n[None, :]
    size = rows.to(tl.int64) * cols
    value = tl.zeros((BM, BN), tl.float32)
    if before is not None:
        value = tl.load(before + at, mask=inside, other=0.0)
    # Unrolled, so that all parts are on their way at a time.
    for part in tl.static_range(MAX_PARTS):
        found = tl.load(sums + part * size + at, mask=inside & (part < parts), other=0)
        factor = tl.load(scale + part * rows + m, mask=(m < rows) & (part < parts), other=0.0)
        value += found.to(tl.float32) * factor[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def scale_and_add(sums: Tensor, scale: Tensor, before: Tensor | None, out: Tensor) -> None:
    """``out = before + Σ sums·scale``, part after part in float32.

    Args:
        sums: int32 ``[parts, R, N]``, at most ``MAX_GROUPS`` of them, contiguous.
        scale: float32 ``[parts, R]``, contiguous.
        before: float32 ``[R, N]``, contiguous, or ``None``.
        out: float32, bfloat16 or float16 ``[R, N]``, contiguous; written.
    """
    parts, rows, cols = sums.shape
    tile = 4, 256
    # Like the reference, which rounds after each multiplication and addition.
    _scale_and_add_kernel[blocks_along(rows, tile[0]), blocks_along(cols, tile[1])](
        sums, scale, before, out, rows, cols, parts,
        MAX_PARTS=MAX_GROUPS, BM=tile[0], BN=tile[1], num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def groups_of_a_launch(rows: int, cols: int, group_blocks: int, shortest: int) -> int:
    """How many groups to run at a time: 1 where sums would take too much memory or groups are too short to be parts."""
    return 1 if group_blocks < shortest else max(1, min(MAX_GROUPS, MAX_BYTES // (4 * rows * cols)))
