"""One small forward and backward of every recipe on the GPU's own kernels: what compute-sanitizer watches."""

from __future__ import annotations

import sys

import torch

from lightning_int8 import Int8Recipe, int8_linear
from lightning_int8.recipe import resolve_recipe


def main(backend: str) -> None:
    """Runs ``row``, ``block`` and ``jetfire`` with ragged shapes on ``backend``."""
    torch.manual_seed(0)
    for recipe in ("row", "block", "jetfire"):
        fields = resolve_recipe(recipe)
        values = {f: getattr(fields, f) for f in ("scaling", "block_size", "activation_band", "gradient_band")}
        x = torch.randn(300, 200, device="cuda", dtype=torch.bfloat16)
        x[:, 3] *= 50
        x.requires_grad_()
        weight = torch.randn(136, 200, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(136, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = int8_linear(x, weight, bias, recipe=Int8Recipe(backend=backend, **values))
        y.backward(torch.randn_like(y))
        torch.cuda.synchronize()
        assert all(t.grad.isfinite().all() for t in (x, weight, bias))
    print("small run: ok")


if __name__ == "__main__":
    main(sys.argv[1])
