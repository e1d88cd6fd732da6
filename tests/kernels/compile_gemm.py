"""Compiles every GEMM kernel with every tile of the table, as its launcher launches it; prints a line a kernel.

``python -m tests.kernels.compile_gemm [capability ...]``: fails if a kernel spills or needs more shared memory than the
chip has.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from lightning_int8.kernels import gemm, tiles
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along
from tests.kernels.compiling import SHARED_MEMORY, Recorder, compile_for, resources

# Form of the table: scaling, block edge, fallback blocks of a and b.
FORMS = {
    "row": ("row", 128, True, False),
    "row_both": ("row", 128, True, True),
    "block128": ("block", 128, True, True),
    "block64": ("block", 64, True, True),
    "block32": ("block", 32, True, True),
}


def operand(scaling: str, rows: int, depth: int, block: int, high: bool, scaled: bool) -> QuantizedMatrix:
    """Shapes without values."""
    shape = blocks_along(rows, block), blocks_along(depth, block)
    scale = torch.empty(shape if scaling == "block" else rows) if scaled else None
    low = torch.empty(rows, shape[1] * block, dtype=torch.int8)
    planes = torch.empty(4, block, block, dtype=torch.int8) if high else None
    slot = torch.empty(shape, dtype=torch.int32) if high else None
    return QuantizedMatrix(low, planes, slot, scale, (rows, depth), block)


def cases(capability: int):
    """Every form and tile with its fallback blocks; each form's large tile without, ragged, in FP32 with an addend."""
    for form, (scaling, block, a_high, b_high) in FORMS.items():
        for tile in tiles.candidates(capability, form, block):
            yield scaling, block, a_high, b_high, tile, torch.bfloat16, 1024
        if (block == 128 and not b_high) or scaling == "block":
            listed = tiles.candidates(capability, form, block)
            tile = next(t for t in listed if t.takes_addend)
            yield scaling, block, False, False, tile, torch.float32, 1000


def main(capabilities: list[int]) -> int:
    """Compiles and prints; the number of kernels that spill or do not fit."""
    wrong = 0
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for capability in capabilities:
            for scaling, block, a_high, b_high, tile, dtype, columns in cases(capability):
                a = operand(scaling, 512, 1024, block, a_high, True)
                b = operand(scaling, columns, 1024, block, b_high, scaling == "block" or not b_high)
                full = (torch.empty(columns), torch.empty(512, columns)) if dtype == torch.float32 else (None, None)
                launch = gemm.launch_row if scaling == "row" else gemm.launch_block
                with Recorder() as recorder:
                    launch(a, b, full[0], dtype, full[1], tile)
                for kernel, arguments, options in recorder.launches:
                    compiled = compile_for(kernel, arguments, options, capability)
                    if compiled.hash in seen:
                        continue
                    seen.add(compiled.hash)
                    used = resources(compiled, Path(folder))
                    fits = used["SHARED"] <= SHARED_MEMORY[capability] and used["LOCAL"] == 0 and used["STACK"] == 0
                    wrong += not fits
                    size = f"{tile.rows}x{tile.columns} w{tile.warps} s{tile.stages}"
                    high = "+a" * a_high + "+b" * b_high
                    print(
                        f"sm_{capability:<3} {kernel.__name__:18} {block:3}{high:4} {size:16} {used} {fits}", flush=True
                    )
    print(f"{len(seen)} kernels, {wrong} that spill or do not fit")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main([int(c) for c in sys.argv[1:]] or list(SHARED_MEMORY)) else 0)
