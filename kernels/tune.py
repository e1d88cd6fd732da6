"""Measures tiles on the GPU at hand and writes its part of the tile table: ``python -m lightning_int8.kernels.tune``.

For each form of product and a large, a middling and a small one, every tile that fits is timed and the fastest kept;
the table then takes them from large to small. Takes minutes. Nothing else runs this. Whether a tile spills on another
architecture is what `tests/kernels/test_compile_gemm.py` finds: run it after a change of the table.
"""

from __future__ import annotations

import argparse
import pprint
from pathlib import Path

import torch

from lightning_int8.kernels import gemm, tile_table
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along
from lightning_int8.kernels.tiles import FALLBACK_ARCHITECTURE, SHARED_MEMORY, Tile, chip

# Rows, columns and contraction.
SHAPES = ((16384, 4096, 4096), (2048, 2048, 2048), (512, 2048, 2048))
RATE = 0.2
# Form: scaling, block edge, whether the second operand has fallback blocks.
FORMS = {
    "row": ("row", 128, False),
    "row_both": ("row", 128, True),
    "block128": ("block", 128, True),
    "block64": ("block", 64, True),
    "block32": ("block", 32, True),
}


def every_tile(architecture: int, block: int) -> list[Tile]:
    """The tiles worth a measurement that fit the chip."""
    tiles = [
        Tile(rows, columns, warps, stages, group)
        for rows, columns, warps in (
            (128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 8), (64, 128, 4), (64, 64, 4)
        )
        for stages in (3, 4, 5)
        for group in ((4, 8, 16) if rows * columns >= 128 * 128 else (8,))
    ]  # fmt: skip
    limit = SHARED_MEMORY.get(architecture, SHARED_MEMORY[FALLBACK_ARCHITECTURE])
    return [tile for tile in tiles if tile.shared_memory(block) <= limit]


def operand(scaling: str, rows: int, depth: int, block: int, high: bool) -> QuantizedMatrix:
    """A random operand with a fraction ``RATE`` of fallback blocks."""
    shape = blocks_along(rows, block), blocks_along(depth, block)
    low = torch.empty(rows, shape[1] * block, dtype=torch.float16, device="cuda").normal_(0, 32)
    planes = slot = None
    if high:
        mask = torch.rand(shape, device="cuda") < RATE
        slot = (mask.flatten().cumsum(0).view(shape) - 1).where(mask, -1).to(torch.int32)
        planes = torch.randint(-3, 4, (int(mask.sum()) + 1, block, block), dtype=torch.int8, device="cuda")
    scale = torch.rand(shape if scaling == "block" else rows, device="cuda")
    return QuantizedMatrix(low.clamp_(-127, 127).to(torch.int8), planes, slot, scale, (rows, depth), block)


def fastest(form: str, architecture: int, shape: tuple[int, int, int]) -> tuple[Tile, float]:
    """The fastest tile of a form for a shape, and its time in milliseconds."""
    from triton.testing import do_bench

    scaling, block, both = FORMS[form]
    rows, columns, depth = shape
    a, b = operand(scaling, rows, depth, block, True), operand(scaling, columns, depth, block, both)
    launch = gemm.launch_row if scaling == "row" else gemm.launch_block
    times = {}
    for tile in every_tile(architecture, block):
        # Triton refuses a kernel that does not fit.
        try:
            launch(a, b, None, torch.bfloat16, None, tile)
            times[tile] = do_bench(
                lambda tile=tile: launch(a, b, None, torch.bfloat16, None, tile), 5, 20, return_mode="median"
            )
        except Exception as error:
            print(f"  {form} {tile}: {str(error).splitlines()[0][:80]}")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tile_table.__file__), help="the table to write")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="leave the others as they are")
    args = parser.parse_args()
    architecture, _ = chip(torch.device("cuda"))
    table = {a: dict(forms) for a, forms in tile_table.TILES.items()}
    nearest = max((a for a in table if a <= architecture), default=min(table))
    listed = dict(table[nearest])
    for form in args.forms:
        found: list[Tile] = []
        for shape in SHAPES:
            tile, time = fastest(form, architecture, shape)
            print(
                f"sm_{architecture} {form} {shape}: {tile}, {2 * shape[0] * shape[1] * shape[2] / time / 1e9:.0f} TOPS"
            )
            if tile not in found:
                found.append(tile)
        found.sort(key=lambda tile: -tile.rows * tile.columns)
        listed[form] = [(t.rows, t.columns, t.warps, t.stages, t.group) for t in found]
    table[architecture] = listed
    args.output.write_text(
        f'"""{tile_table.__doc__}"""\n\n' + "TILES = " + pprint.pformat(table, width=118, sort_dicts=True) + "\n"
    )
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
