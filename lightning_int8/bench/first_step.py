"""The first training step of a fresh process, eager: what compiling the kernels costs, and what their cache saves.

``python -m lightning_int8.bench.first_step CONFIG PRECISION TOKENS DEVICE`` is one such process; it prints its seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import torch

from lightning_int8.bench.precisions import precisions
from lightning_int8.bench.step import make_step
from lightning_int8.bench.timing import seconds
from lightning_int8.bench.workload import load


def seconds_here(config: str, precision: str, tokens: int, device: torch.device) -> float:
    """Seconds from the first step's beginning to its end, in this process, once the model is on its device."""
    workload = load(config, tokens, device)
    chosen = precisions([] if precision == "bf16" else [precision], [])[-1]
    model = chosen.convert(workload.model, workload.ignore_modules)
    step = make_step(workload, model, torch.optim.AdamW(model.parameters(), fused=True))
    return seconds(step, device)


def measure(config: str, recipe: str, tokens: int, device: torch.device) -> dict[str, float | str]:
    """Runs three processes one after the other: BF16, INT8 with an empty Triton cache, and INT8 with the cache filled.

    Returns:
        Seconds by ``"bf16"``, ``"empty cache"`` and ``"warm cache"``; ``"error"`` with the end of the output of the
        process that failed.
    """
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, precision in (("bf16", "bf16"), ("empty cache", recipe), ("warm cache", recipe)):
            process = subprocess.run(
                [sys.executable, "-m", "lightning_int8.bench.first_step", config, precision, str(tokens), str(device)],
                env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if process.returncode:
                found["error"] = f"{name}: {process.stderr[-300:]}"
                break
            found[name] = float(process.stdout.split()[-1])
    return found


if __name__ == "__main__":
    print(seconds_here(sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.device(sys.argv[4])))
