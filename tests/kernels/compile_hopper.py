"""Compiles the Hopper GEMMs as their launchers launch them and prints a line a kernel: its resources, its `IGMMA`s.

``python -m tests.kernels.compile_hopper``: fails if one spills, needs more shared memory than the chip has, or has its
`wgmma` serialized by the assembler. Run in a process without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lightning_int8.kernels import hopper
from lightning_int8.kernels.planes import QuantizedMatrix
from tests.kernels.compiling import SHARED_MEMORY, Recorder, compile_for, resources, source

# a and b with fallback blocks, b scaled (`row`), output, bias and accumulation.
CASES = [
    (False, False, True, torch.bfloat16, False),
    (True, False, True, torch.bfloat16, False),
    (True, False, True, torch.float16, True),
    (True, False, False, torch.bfloat16, False),
    (True, True, False, torch.bfloat16, False),
    (True, True, False, torch.float32, False),
    (True, True, False, torch.float32, True),
    (False, True, False, torch.bfloat16, False),
]


def operand(scaling: str, rows: int, depth: int, high: bool, scaled: bool) -> QuantizedMatrix:
    """Shapes without values."""
    shape = rows // 128, depth // 128
    scale = torch.empty(shape if scaling == "block" else rows) if scaled else None
    planes = torch.empty(4, 128, 128, dtype=torch.int8) if high else None
    slot = torch.empty(shape, dtype=torch.int32) if high else None
    return QuantizedMatrix(torch.empty(rows, depth, dtype=torch.int8), planes, slot, scale, (rows, depth), 128)


def gluon_source(kernel: Any, arguments: dict[str, Any]) -> GluonASTSource:
    """As :func:`source`, with tensor descriptors."""
    plain = {k: None if isinstance(v, TensorDescriptor) else v for k, v in arguments.items()}
    made = source(kernel, plain)
    signature, constants = dict(made.signature), dict(made.constants)
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if isinstance(value, TensorDescriptor):
            kind = {torch.int8: "i8", torch.float16: "fp16", torch.bfloat16: "bf16"}[value.base.dtype]
            signature[name] = f"tensordesc<{kind}{list(value.block_shape)},{value.layout!r}>"
            constants.pop((i,), None)
    return GluonASTSource(kernel, signature, constants, made.attrs)


def sass(compiled: Any, folder: Path) -> str:
    """The machine code."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", path], check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Compiles and prints; the number of kernels that fail."""
    wrong = 0
    hopper._processors = lambda index: 132
    with tempfile.TemporaryDirectory() as folder:
        for scaling, parts in (("row", 1), ("row", 4), ("block", 1)):
            hopper.choose_parts = lambda *_, parts=parts: parts
            for a_high, b_high, b_scaled, dtype, full in CASES:
                a = operand(scaling, 512, 2048, a_high, True)
                b = operand(scaling, 1024, 2048, b_high, scaling == "block" or b_scaled)
                extras = (torch.empty(1024), torch.empty(512, 1024)) if full else (None, None)
                with Recorder() as recorder:
                    getattr(hopper, f"gemm_{scaling}")(a, b, extras[0], dtype, extras[1])
                (kernel, arguments, options), *sums = recorder.launches
                compiled = triton.compile(
                    gluon_source(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options
                )
                used, code = resources(compiled, Path(folder)), sass(compiled, Path(folder))
                fits = used["SHARED"] < SHARED_MEMORY[90]
                # An accumulator touched in flight makes the assembler wait after every instruction.
                serialized = code.count("WARPGROUP.DEPBAR") > code.count("IGMMA") // 2
                spilled = used["STACK"] + used["LOCAL"]
                for launch in sums:
                    more = resources(compile_for(*launch, 90), Path(folder))
                    spilled += more["STACK"] + more["LOCAL"]
                fine = fits and not spilled and "IGMMA" in code and not serialized and len(sums) == (parts > 1)
                wrong += not fine
                what = f"{scaling:5} parts {parts} high {a_high:d}{b_high:d} {dtype!s:14} bias+sum {full:d}"
                print("ok  " if fine else "FAIL", what, used, "IGMMA", code.count("IGMMA"), "serialized" * serialized)
        a, b = operand("row", 512, 8192, True, False), operand("row", 1024, 8192, True, False)
        with Recorder() as recorder:
            hopper.gemm_row_groups(dataclasses.replace(a, scale=torch.empty(16, 512)), b, torch.bfloat16, 4)
        products, sums = recorder.launches[::2], recorder.launches[1::2]
        for launch in sums:
            used = resources(compile_for(*launch, 90), Path(folder))
            fine = not (used["STACK"] + used["LOCAL"]) and len(products) == len(sums) == 2
            wrong += not fine
            print("ok  " if fine else "FAIL", "groups", used)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
