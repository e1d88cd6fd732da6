"""What the launchers of the quantize kernels share: what they take, what they allocate, and their launch options."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_int8.kernels.planes import INT8_MAX, blocks_along, padded
from lightning_int8.kernels.reference import _INT32_LIMIT

BLOCKS = (32, 64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Launch options by kernel and block edge. `PART`: how many columns of a block (`gradient_statistics`: how many rows) a
# program takes at a time; `RUN`: see `integers.rows_of_block`; `STAGES`: of the software pipeline.
_PLANES = {
    32: {"num_warps": 2, "PART": 32, "RUN": 4},
    64: {"num_warps": 2, "PART": 64, "RUN": 4},
    128: {"num_warps": 4, "PART": 64, "RUN": 4},
}
_ROWS_AT_A_TIME = {block: {"num_warps": 1, "PART": 512 // block, "STAGES": 3} for block in BLOCKS}
OPTIONS: dict[str, dict[int, dict[str, int]]] = {
    "matrix_statistics": {32: {"num_warps": 1}, 64: {"num_warps": 4}, 128: {"num_warps": 16}},
    "row_planes": dict(_PLANES),
    "swiglu_row_planes": _PLANES | {128: {"num_warps": 4, "PART": 32, "RUN": 4}},
    # Elements, of as many whole rows as that is; more warps for longer rows. Without `maxnreg` ptxas spills a register.
    "plain_row_planes": {block: {"num_warps": 8, "PART": 8192, "maxnreg": 96} for block in BLOCKS},
    "block_planes": dict(_PLANES),
    "gradient_statistics": {block: {"num_warps": 1, "PART": 1024 // block, "STAGES": 3} for block in BLOCKS},
    "gradient_planes": dict(_PLANES),
    "swiglu_statistics": dict(_ROWS_AT_A_TIME),
    # Without `maxnreg` ptxas spills a register on sm_100; elsewhere it takes 80.
    "hadamard_statistics": {block: {"num_warps": 4, "PART": 64, "maxnreg": 128} for block in BLOCKS},
    "hadamard_scales": {block: {"num_warps": 4, "PART": 32, "CHUNK": 64} for block in BLOCKS},
    "hadamard_planes": {block: {"num_warps": 4, "PART": 64} for block in BLOCKS},
    "features_mixed": {128: {"num_warps": 4, "PART": 64}},
    # Groups of 128 features of a row, and so of several rows; more warps for longer rows.
    "mixed_rows": {128: {"num_warps": 8, "PART": 64}},
    # Not pipelined, so that what a program reads twice comes from L1 the second time.
    "mixed_statistics": {128: {"num_warps": 4, "PART": 64, "num_stages": 1}},
    "mixed_planes": {128: {"num_warps": 4, "PART": 32, "maxnreg": 128}},
    "swiglu_gradient_statistics": _ROWS_AT_A_TIME | {32: {"num_warps": 1, "PART": 8, "STAGES": 3}},
}


class Allocator:
    """Uninitialized tensors on one device."""

    def __init__(self, device: torch.device, copies: tuple[int, ...] = ()) -> None:
        self.device, self.copies = device, copies

    def int8(self, *size: int) -> Tensor:
        return torch.empty(self.copies + size, dtype=torch.int8, device=self.device)

    def int32(self, *size: int) -> Tensor:
        return torch.empty(self.copies + size, dtype=torch.int32, device=self.device)

    def float32(self, *size: int) -> Tensor:
        return torch.empty(self.copies + size, dtype=torch.float32, device=self.device)


def check(x: Tensor, block: int) -> tuple[Tensor, int, int, int, int]:
    """``x`` with strides that the kernels can take, and its size in elements and in blocks."""
    if block not in BLOCKS:
        raise ValueError(
            f"block={block} is not among the block sizes of the Triton kernels, {', '.join(map(str, BLOCKS))}; "
            "use one of them, or backend='reference'."
        )
    if x.dim() != 2 or x.dtype not in _DTYPES:
        raise ValueError(
            f"the quantize kernels take a matrix of {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, "
            f"not {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}."
        )
    rows, columns = x.shape
    if max(rows, columns) * block >= 2**31:
        raise ValueError(f"the quantize kernels take at most {2**31 // block} rows and columns, not {tuple(x.shape)}.")
    if x.dtype is torch.float64:
        # What the reference does first, too.
        x = x.float()
    if sum(x.stride()) * block >= 2**31:
        # Offsets within a block are 32-bit.
        x = x.contiguous()
    return x, rows, columns, blocks_along(rows, block), blocks_along(columns, block)


def empty_planes(
    new: Allocator, rows: int, columns: int, capacity: int, block: int, transpose: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``low``, ``low_t``, ``high``, ``high_t`` and ``slot``, uninitialized; transposed ones empty unless wanted."""
    return (
        new.int8(rows, padded(columns, block)),
        new.int8(columns, padded(rows, block)) if transpose else new.int8(0),
        new.int8(capacity, block, block),
        new.int8(capacity, block, block) if transpose else new.int8(0),
        new.int32(blocks_along(rows, block), blocks_along(columns, block)),
    )


def int32_limit(columns: int) -> float:
    """`L` of `reference.row_scale` in units of 2^31, for an other operand of ±127."""
    return (_INT32_LIMIT - INT8_MAX * columns) * 2.0**-31


def may_bind(columns: int) -> bool:
    """Whether the INT32 bound can raise the scale of a row of integers within ±127, against an operand of the same."""
    return columns * INT8_MAX**2 > 0.99 * (_INT32_LIMIT - INT8_MAX * columns)


def operand_state(state: Tensor | None, operand: int) -> Tensor | None:
    return None if state is None else state[operand]


def on(x: Tensor) -> torch.cuda.device_of:
    """Launches go to the current device; makes that the one of ``x`` (and does nothing on a CPU)."""
    return torch.cuda.device_of(x)


def options(kernel: str, block: int) -> dict:
    """What ``kernel`` is launched with, for blocks of edge ``block``."""
    # The reference rounds after each multiplication and addition, which fused ones would not.
    return {**OPTIONS[kernel][block], "enable_fp_fusion": False}


def row_options(kernel: str, block: int, x: Tensor) -> dict:
    """The same for a kernel that takes ``PART`` rows of ``x`` at a time: fewer if elements are wider than 16 bits."""
    found = options(kernel, block)
    return found | {"PART": max(found["PART"] * 2 // x.element_size(), 256 // block)}


def parts(kernel: str, blocks: int, block: int) -> tuple[int]:
    return (blocks * (block // OPTIONS[kernel][block]["PART"]),)


def select_sizes(block: int, blocks: int, along: int) -> dict:
    """How a select kernel is launched: blocks that a program takes in one step, of all and along its row; its rows."""
    # As many as registers hold for all counts, or if there are more, as many as can be loaded in one go.
    chunk = 512 if blocks <= 512 else 2048 if blocks <= 2048 else 8192 if blocks <= 8192 else 4096
    # Each program counts over all blocks: of few, many small programs are faster; of many, a program takes a whole row
    # of blocks, with as many warps as their registers ask for.
    small = blocks <= 2048
    return {
        "B": block,
        "CHUNK": chunk,
        "WHOLE": blocks <= chunk,
        # What is known to divide the number of blocks: loads of four at a time.
        "MULTIPLE": 4 if blocks % 4 == 0 else 1,
        "COLUMN_CHUNK": 8 if along <= 8 else 32,
        "PART": min(32 if small else 128, block),
        "num_warps": 4 if small else 8,
        # Two programs on a multiprocessor: the gradients' are more than there are multiprocessors.
        "maxnreg": 128,
        "enable_fp_fusion": False,
    }
