"""Times the Hopper `row` GEMM by the number of parts its contraction is cut into; what `choose_parts` is fitted to.

``python benchmarks/split.py [--seconds 25] [--json split.json]``

Microseconds of one call, in a CUDA graph of several over three sets of operands (so that X is not in L2, as in a
training step), medians. Every number of parts must give the same bits as one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from triton.testing import do_bench_cudagraph

from lightning_int8.bench.gemm import bf16, operand
from lightning_int8.kernels import hopper
from lightning_int8.kernels.planes import QuantizedMatrix, blocks_along

# Product, rows, columns, contraction.
SHAPES = (
    ("wgrad", 512, 2048, 16384),
    ("wgrad", 1024, 4096, 16384),
    ("wgrad", 768, 768, 16384),
    ("wgrad", 256, 1536, 16384),
    ("wgrad", 128, 896, 16384),
    ("wgrad", 512, 2048, 8192),
    ("wgrad", 512, 2048, 4096),
    ("wgrad", 1536, 1536, 16384),
    ("forward", 1024, 2048, 8192),
    ("forward", 512, 2048, 8192),
    ("forward", 2048, 512, 2048),
)
PARTS = (1, 2, 3, 4, 6, 8)
SETS = 3
choose_parts = hopper.choose_parts


def microseconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Median of one call, ``runs`` taking turns."""
    return 1e3 * do_bench_cudagraph(lambda: [run() for run in runs], return_mode="median") / len(runs)


def in_parts(parts: int, a: QuantizedMatrix, b: QuantizedMatrix) -> Callable[[], torch.Tensor]:
    """``a @ bᵀ`` with the contraction cut into ``parts``."""

    def run() -> torch.Tensor:
        hopper.choose_parts = lambda *_: parts  # type: ignore[assignment]
        return hopper.gemm_row(a, b, None, torch.bfloat16)

    return run


def measure(product: str, rows: int, cols: int, depth: int, rate: float) -> dict[str, Any]:
    """Times by number of parts, which of them `choose_parts` takes, and whether all gave the same bits."""
    forward = product == "forward"
    blocks, shortest = blocks_along(depth, hopper.BLOCK), hopper.LAG + 1
    tiles = blocks_along(rows, hopper.TILE_M) * blocks_along(cols, hopper.TILE_N)
    chosen = choose_parts(rows, cols, blocks, tiles, hopper._processors(0), shortest)
    b_rate = 0.0 if forward else rate
    sets = [
        (operand(rows, depth, rate, "row", True), operand(cols, depth, b_rate, "row", forward)) for _ in range(SETS)
    ]
    wanted = [in_parts(1, a, b)() for a, b in sets]
    times, same = {}, True
    for parts in sorted({*PARTS, chosen}):
        if parts == 1 or parts <= blocks // shortest:
            runs = [in_parts(parts, a, b) for a, b in sets]
            same &= all(torch.equal(run(), value) for run, value in zip(runs, wanted, strict=True))
            times[parts] = microseconds(runs)
    base = microseconds([bf16(product, rows, cols, depth) for _ in range(SETS)])
    return {
        "product": product, "rows": rows, "cols": cols, "depth": depth, "rate": rate, "bf16": base, "parts": times,
        "chosen": chosen, "same": same,
    }  # fmt: skip


def main() -> int:
    """Prints the table; returns the number of lines with different bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=25.0, help="no further line starts after so long (%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit("benchmarks/split.py times the Hopper kernels: it needs a GPU of capability 9.0.")
    table = Table(title=f"µs by number of parts, {torch.cuda.get_device_name()}", caption="*: what choose_parts takes")
    for name in ("product", "rows, cols, contraction", "rate", "BF16", *map(str, PARTS), "chosen", "bits"):
        table.add_column(name, justify="right")
    begin, results = time.monotonic(), []
    for shape in SHAPES:
        for rate in (0.0, 0.2):
            if time.monotonic() - begin > arguments.seconds:
                print(f"left out, {arguments.seconds:g} s are over: {shape} at rate {rate}")
                continue
            found = measure(*shape, rate)
            results.append(found)
            times, chosen = found["parts"], found["chosen"]
            cells = [f"{times[p]:.1f}{'*' if p == chosen else ''}" if p in times else "" for p in PARTS]
            table.add_row(
                shape[0], ", ".join(map(str, shape[1:])), str(rate), f"{found['bf16']:.1f}", *cells,
                f"{chosen}: {times[chosen]:.1f}", "same" if found["same"] else "DIFFERENT",
            )  # fmt: skip
    Console(width=160).print(table)
    if arguments.json is not None:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1))
    return sum(not found["same"] for found in results)


if __name__ == "__main__":
    sys.exit(main())
