"""Measures tiles on the GPU at hand and writes its part of the tile table: ``python -m lightning_int8.kernels.tune``.

For each form of product and a large, a middling and a small one, every tile that fits is timed and the fastest kept;
the table then takes them from large to small. Compiles side by side first; takes a minute or two. Nothing else runs
this. Whether a tile spills on another architecture is what `tests/kernels/test_compile_gemm.py` finds: run it after a
change of the table.
"""

from __future__ import annotations

import argparse
import pprint
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_int8.kernels import gemm, tile_table
from lightning_int8.kernels.compile_ahead import default_workers, noted, side_by_side
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along
from lightning_int8.kernels.tiles import FALLBACK_ARCHITECTURE, SHARED_MEMORY, Tile, chip, choose

# Rows, columns and contraction; a wgrad, the one `row` product with fallback blocks in both operands, contracts over
# tokens.
LARGE, WGRAD = (16384, 4096, 4096), (4096, 4096, 16384)
SMALLER = ((2048, 2048, 2048), (512, 2048, 2048))
RATE = 0.2
# Form: scaling, block edge, whether the second operand has fallback blocks.
FORMS = {
    "row": ("row", 128, False),
    "row_both": ("row", 128, True),
    "block128": ("block", 128, True),
    "block64": ("block", 64, True),
    "block32": ("block", 32, True),
}


def shapes(form: str) -> list[tuple[int, int, int]]:
    """A large, a middling and a small product of a form."""
    return [WGRAD if form == "row_both" else LARGE, *SMALLER]


def every_tile(architecture: int, block: int, groups: tuple[int, ...]) -> list[Tile]:
    """The tiles worth a measurement that fit the chip; large ones with each of ``groups``."""
    tiles = [
        Tile(rows, columns, warps, stages, group)
        for rows, columns, warps in (
            (128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 128, 8), (64, 128, 4), (64, 64, 4)
        )
        for stages in (3, 4, 5)
        for group in (groups if rows * columns >= 128 * 128 else (8,))
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


def product(form: str, shape: tuple[int, int, int]) -> Callable[[Tile], object]:
    """A product of this form and shape, to be launched with a tile."""
    scaling, block, both = FORMS[form]
    rows, columns, depth = shape
    a, b = operand(scaling, rows, depth, block, True), operand(scaling, columns, depth, block, both)
    launch = gemm.launch_row if scaling == "row" else gemm.launch_block
    return lambda tile: launch(a, b, None, torch.bfloat16, None, tile)


def tiles_for(form: str, shape: tuple[int, int, int], architecture: int) -> list[Tile]:
    """The present tile, then the others. Which tiles share the L2 cache matters where many do not run at a time."""
    scaling, block, both = FORMS[form]
    present = choose(scaling, shape[0], shape[1], block, both, False, torch.device("cuda"))
    groups = (8,) if shape in SMALLER else (4, 8, 16)
    return list(dict.fromkeys([present, *every_tile(architecture, block, groups)]))


def compile_all(pairs: list[tuple[str, tuple[int, int, int]]], architecture: int, seconds: float) -> None:
    """Compiles the products of these forms and shapes with all of their tiles, side by side."""

    def launch_all() -> None:
        for form, shape in pairs:
            launch = product(form, shape)
            for tile in tiles_for(form, shape, architecture):
                launch(tile)

    begin, kernels = time.monotonic(), noted(launch_all)
    for ended, (index, error) in enumerate(side_by_side(kernels, default_workers(), seconds), 1):
        print(f"\rcompiled {ended} of {len(kernels)}, {time.monotonic() - begin:.0f} s", end="", flush=True)
        if error:
            print(f"\n  {kernels[index].name} {dict(kernels[index].constants)}: {error}")
    print()


def fastest(form: str, shape: tuple[int, int, int], architecture: int, until: float) -> Tile | None:
    """The fastest tile of a form for a shape; ``None`` where the clock passed ``until`` before all were timed."""
    from triton.testing import do_bench

    launch, tiles = product(form, shape), tiles_for(form, shape, architecture)
    times = {}
    for tile in tiles:
        if time.monotonic() > until:
            return None
        # Triton refuses a kernel that does not fit.
        try:
            times[tile] = do_bench(lambda tile=tile: launch(tile), 5, 20, return_mode="median")
        except Exception as error:
            print(f"  {form} {tile}: {str(error).splitlines()[0][:80]}")
    best, present = min(times, key=times.__getitem__), tiles[0]
    # Once more, in turn: the least of many measurements is also the luckiest.
    again = {tile: do_bench(lambda tile=tile: launch(tile), 5, 40, return_mode="median") for tile in (best, present)}
    best = min(again, key=again.__getitem__)
    rates = [f"{2 * shape[0] * shape[1] * shape[2] / again[tile] / 1e9:.0f} TOPS" for tile in (best, present)]
    print(f"{form} {shape}: {best} {rates[0]}; present {present} {rates[1]}", flush=True)
    return best


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tile_table.__file__), help="the table to write")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="leave the others as they are")
    parser.add_argument("--seconds", type=float, default=600.0, help="forms not measured by then stay as they are")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    architecture, _ = chip(torch.device("cuda"))
    table = {a: dict(forms) for a, forms in tile_table.TILES.items()}
    nearest = max((a for a in table if a <= architecture), default=min(table))
    table[architecture] = dict(table[nearest])
    compile_all([(form, shape) for form in args.forms for shape in shapes(form)], architecture, 0.75 * args.seconds)
    for form in args.forms:
        found = [fastest(form, shape, architecture, until) for shape in shapes(form)]
        if None in found:
            print(f"out of time (--seconds {args.seconds:g}): sm_{architecture} keeps its {form}")
            continue
        # Of equally large tiles only the first would ever be taken: that of the larger shape.
        by_area = {tile.rows * tile.columns: tile for tile in reversed(found) if tile is not None}
        tiles = [by_area[area] for area in sorted(by_area, reverse=True)]
        # A large product with an addend is not to fall to the next smaller tile.
        if not tiles[0].takes_addend:
            tiles = sorted({*tiles, Tile(128, 128, 8, 3)}, key=lambda t: (-t.rows * t.columns, t.takes_addend))
        table[architecture][form] = [(t.rows, t.columns, t.warps, t.stages, t.group) for t in tiles]
        # After each form, so that what was measured survives whatever ends the rest.
        args.output.write_text(
            f'"""{tile_table.__doc__}"""\n\n' + "TILES = " + pprint.pformat(table, width=118, sort_dicts=True) + "\n"
        )
        print(f"wrote {form} to {args.output}", flush=True)


if __name__ == "__main__":
    main()
