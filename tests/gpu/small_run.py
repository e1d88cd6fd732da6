"""One small forward and backward of every recipe on the GPU's own kernels: what compute-sanitizer watches."""

from __future__ import annotations

import re
import sys

import torch

from lightning_int8 import Int8Recipe, int8_linear
from lightning_int8.kernels.launch import CachedLaunch
from lightning_int8.recipe import resolve_recipe

# What the driver keeps of each block's shared memory on sm_90, in bytes; racecheck's addresses count it.
RESERVED = 1024


def print_dispatch(kernel: CachedLaunch) -> None:
    """Prints where ``gl.warp_specialize`` keeps the bytes that tell each worker warp what to run.

    They are all that these kernels read from shared memory byte by byte; warps 4 to 11 read one each.
    """
    for compiled, _ in kernel._compiled.values():
        (offset,) = re.findall(r"ld\.shared\.b8\s+\S+, \[\S+\+(\d+)\]", compiled.asm["ptx"])
        start = RESERVED + int(offset) + 4
        print(f"dispatch {kernel.__name__} {start} {start + 8}")


def main(backend: str) -> None:
    """Runs ``row``, ``block`` and ``jetfire`` with ragged shapes on ``backend``."""
    torch.manual_seed(0)
    for recipe in ("row", "block", "jetfire"):
        fields = resolve_recipe(recipe)
        names = "scaling", "block_size", "budget", "activation_band", "gradient_band"
        values = {name: getattr(fields, name) for name in names}
        x = torch.randn(300, 200, device="cuda", dtype=torch.bfloat16)
        x[:, 3] *= 50
        x.requires_grad_()
        weight = torch.randn(136, 200, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(136, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = int8_linear(x, weight, bias, recipe=Int8Recipe(backend=backend, **values))
        y.backward(torch.randn_like(y))
        torch.cuda.synchronize()
        assert all(t.grad.isfinite().all() for t in (x, weight, bias))
    if backend == "hopper":
        from lightning_int8.kernels import hopper

        print_dispatch(hopper.row_kernel)
        print_dispatch(hopper.block_kernel)
    print("small run: ok")


if __name__ == "__main__":
    main(sys.argv[1])
