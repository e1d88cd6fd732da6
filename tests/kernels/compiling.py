"""Compiles what launchers launch, for any architecture and without a GPU, and reads the resources it needs.

Run as a script, in a process without `TRITON_INTERPRET`. Launchers are called on CPU tensors with `JITFunction.run`
replaced by one that records, so what is compiled is what would run: arguments, specializations, warps and stages.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

# Compute capability: shared memory one block may use, in bytes.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
_TYPES = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")


class Recorder:
    """While entered, kernel launches are recorded instead of run."""

    def __init__(self) -> None:
        self.launches: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []

    def __enter__(self) -> Recorder:
        self._run = JITFunction.run
        recorder = self

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            options = {k: kwargs.pop(k) for k in list(kwargs) if k in _OPTIONS}
            arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
            recorder.launches.append((self, arguments, options))

        JITFunction.run = run
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self._run


def source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """What `kernel` is compiled from when launched with `arguments`."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialized):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and specialized
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], capability: int) -> Any:
    """The compiled kernel."""
    return triton.compile(source(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers (a thread), bytes of stack and of local memory (spills), and of shared memory, of a compiled kernel."""
    path = folder / f"{compiled.hash}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {**found, "SHARED": compiled.metadata.shared}
