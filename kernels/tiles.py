"""Which tile a GEMM takes: a static table by architecture and form of the product, pruned by shared memory.

Nothing is tuned in a user's first step. The table (:mod:`lightning_int8.kernels.tile_table`) lists, for an architecture
and a form, tiles from large to small; a product takes the first that fits the chip and still gives every multiprocessor
an output tile. ``python -m lightning_int8.kernels.tune`` measures the GPU at hand and writes its part of the table.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from lightning_int8.kernels import tile_table
from lightning_int8.kernels.planes import blocks_along

# Shared memory that one thread block may use, in bytes, by compute capability.
SHARED_MEMORY = {
    80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10,
    120: 99 << 10, 121: 99 << 10,
}  # fmt: skip
# What a CPU (Triton's interpreter) and a chip that is not in the table are taken for: the least capable.
FALLBACK_ARCHITECTURE = 86
# Outputs a thread, beyond which it has no registers for a tensor that is added to them.
MOST_WITH_ADDEND = 64


@dataclass(frozen=True)
class Tile:
    """An output tile and how its kernel is compiled.

    Attributes:
        rows, columns: Size of the output tile, powers of two of at least 32. An operand with fallback blocks is
            fastest when its side of the tile is at most one block: a wider tile takes every block that any part needs.
        warps: Warps a program.
        stages: Depth of the software pipeline, in blocks of the contraction.
        group: How many row tiles are visited together, for the L2 cache.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    group: int = 8

    def shared_memory(self, block: int) -> int:
        """Bytes of shared memory that the pipeline holds: ``stages`` tiles of both operands, and some barriers."""
        return self.stages * (self.rows + self.columns) * block + 1024

    @property
    def takes_addend(self) -> bool:
        """Whether its threads have registers for a tensor that is added to the output."""
        return self.rows * self.columns <= MOST_WITH_ADDEND * 32 * self.warps


def form(scaling: str, block: int, b_high: bool) -> str:
    """The table's key: ``row`` or ``row_both`` (fallback blocks in both operands), or ``block`` with the block edge."""
    if scaling == "row":
        return "row_both" if b_high else "row"
    return f"block{block}"


def candidates(architecture: int, key: str, block: int) -> list[Tile]:
    """The tiles listed for ``architecture`` (or the next lower one that has a list) that fit its shared memory."""
    limit = SHARED_MEMORY.get(architecture, SHARED_MEMORY[FALLBACK_ARCHITECTURE])
    listed = max((a for a in tile_table.TILES if a <= architecture), default=min(tile_table.TILES))
    tiles = [Tile(*fields) for fields in tile_table.TILES[listed][key]]
    return [tile for tile in tiles if tile.shared_memory(block) <= limit]


def choose(scaling: str, rows: int, columns: int, block: int, b_high: bool, addend: bool, device: torch.device) -> Tile:
    """The tile for an output ``[rows, columns]``.

    Args:
        scaling: ``"row"`` or ``"block"``.
        rows: Rows of the output.
        columns: Columns of the output.
        block: Block edge.
        b_high: Whether the second operand has fallback blocks.
        addend: Whether a tensor is added, which not all tiles have registers for.
        device: Where the product runs.
    """
    architecture, processors = chip(device)
    tiles = _listed(architecture, form(scaling, block, b_high), block)
    for tile in tiles:
        if addend and not tile.takes_addend:
            continue
        if blocks_along(rows, tile.rows) * blocks_along(columns, tile.columns) >= processors:
            return tile
    return tiles[-1]


@functools.cache
def _listed(architecture: int, key: str, block: int) -> tuple[Tile, ...]:
    return tuple(candidates(architecture, key, block))


def chip(device: torch.device) -> tuple[int, int]:
    """Compute capability and number of multiprocessors."""
    if device.type != "cuda":
        return FALLBACK_ARCHITECTURE, 1
    return _cuda_chip(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_chip(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
