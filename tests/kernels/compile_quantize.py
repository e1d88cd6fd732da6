"""Compiles the quantize kernels as their launchers launch them; prints a line a kernel and fails if one does not fit.

``python -m tests.kernels.compile_quantize [capability ...]``: every kernel for each architecture, and further data
types, blocks and layouts for sm_80 and sm_90, in about a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from lightning_int8.kernels import (
    hadamard,
    hadamard_features,
    hadamard_mixed,
    power_sums,
    quantize,
    quantize_gradient,
    swiglu,
    swiglu_planes,
)
from tests.kernels.compiling import SHARED_MEMORY, Recorder, compile_for, resources


def launch(block: int, dtype: torch.dtype, fallback: bool, stochastic: str, transposed: bool, ragged: bool) -> None:
    """Every launcher once."""
    rows, columns = (4 * block, 6 * block) if not ragged else (3 * block + 5, 2 * block + 9)
    x = torch.empty(columns, rows, dtype=dtype).t() if transposed else torch.empty(rows, columns, dtype=dtype)
    state = torch.zeros(3, 4)
    capacity = 5 if fallback else 0
    quantize.quantize_row(x, state, 0, 0.2, capacity, block, True, not transposed)
    quantize.quantize_row(x, None, 0, 0.0, 0, block, False, False)
    quantize.quantize_block(x, state, 0, 0.2, capacity, block, True, True, stochastic)
    quantize.transposed_integers(x, torch.empty(rows), block)
    quantize.transposed_integers(x, torch.empty(-(-rows // block), -(-columns // block)), block)
    s, t = torch.empty(rows), torch.empty(columns)
    quantize_gradient.quantize_row_gradient(x, t, s, s, state, 0.2, capacity, block, True, stochastic, True)
    power_sums.measure_power(x, s, torch.zeros(3, 16), 0)
    power_sums.measure_gradient_power(x, t, s, s, t, torch.zeros(3, 16))
    hadamard.quantize_hadamard(x, None, block, True)
    hadamard_features.mix_features(x)
    hadamard_mixed.quantize_mixed(x, state, 0, 0.2, capacity, block, True, True, True)
    hadamard_mixed.quantize_mixed(x, state, 0, 0.2, capacity, block, True, False, False)
    hadamard_mixed.quantize_mixed(x, state, 0, 0.0, 0, block, False, False, False)
    if dtype is not torch.float64 and not transposed:
        swiglu.swiglu_row(x, x, state, 0, 0.2, capacity, block, True, True)
        slot = torch.empty(-(-rows // block), -(-columns // block), dtype=torch.int32)
        swiglu_planes.swiglu_planes(x, x, s, slot, capacity, block)
        swiglu.swiglu_gradient(x, x, x, t, t, s, s, capacity, block, True)
        swiglu.swiglu_gradient(x, x, x, None, None, None, None, 0, block, False)
        swiglu.swiglu(x, x)
        hadamard.quantize_hadamard(x, x, block, False)


def launch_many_blocks(block: int, rows: int, columns: int) -> None:
    """The launchers that select, for a matrix of ``rows × columns`` blocks, of which nothing is touched."""
    x = torch.empty(rows * block, columns * block, dtype=torch.bfloat16)
    state, s, t = torch.zeros(3, 4), torch.empty(rows * block), torch.empty(columns * block)
    quantize.quantize_row(x, state, 0, 0.2, 5, block, True, False)
    quantize.quantize_block(x, state, 0, 0.2, 5, block, True, False, "all")
    quantize_gradient.quantize_row_gradient(x, t, s, s, state, 0.2, 5, block, True, "all", True)


def main(capabilities: list[int]) -> int:
    """Compiles and prints; the number of kernels that spill or do not fit."""
    cases = [
        (capability, 128, torch.bfloat16, True, which, False, False)
        for capability in capabilities
        for which in ("small", "all")
    ]
    for capability in {80, 90}.intersection(capabilities):
        cases += [(capability, 128, torch.bfloat16, False, "nothing", True, False)]
        cases += [(capability, 32, torch.bfloat16, True, "all", False, True)]
        cases += [(capability, 64, torch.float16, True, "nothing", False, False)]
    if 80 in capabilities:
        cases += [
            (80, 128, torch.float64, True, "small", False, True),
            (80, 128, torch.float32, True, "nothing", True, True),
        ]
    # In registers, an odd number, and in several steps.
    many = [(c, 128, 128, columns) for c in capabilities for columns in (64, 128)]
    many += [(c, 128, 127, 63) for c in capabilities if c == 90]
    wrong = 0
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for capability, block, *rest in cases + many:
            selecting = len(rest) == 2
            with Recorder() as recorder:
                if selecting:
                    launch_many_blocks(block, *rest)
                else:
                    launch(block, *rest)
            for kernel, arguments, options in recorder.launches:
                if selecting and not kernel.__name__.endswith("_select"):
                    continue
                compiled = compile_for(kernel, arguments, options, capability)
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                used = resources(compiled, Path(folder))
                fits = used["SHARED"] <= SHARED_MEMORY[capability] and used["LOCAL"] == 0 and used["STACK"] == 0
                wrong += not fits
                name = kernel.__name__
                print(f"sm_{capability:<3} {name:20} {block:3} {rest[0]} warps {options['num_warps']} {used}", fits)
    print(f"{len(seen)} kernels, {wrong} that spill or do not fit")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main([int(a) for a in sys.argv[1:]] or list(SHARED_MEMORY)) else 0)
