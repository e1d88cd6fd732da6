"""The first training step of a fresh process, eager: what compiling the kernels costs, and what their cache saves.

``python -m lightning_int8.bench.first_step CONFIG RECIPE TOKENS DEVICE`` is one such process; it prints its seconds.
RECIPE is the recipe's fields as JSON, or ``null`` for BF16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from lightning_int8.bench.precisions import precisions
from lightning_int8.bench.step import make_step
from lightning_int8.bench.timing import seconds
from lightning_int8.bench.workload import load
from lightning_int8.recipe import Int8Recipe, resolve_recipe


def seconds_here(config: str, recipe: Int8Recipe | None, tokens: int, device: torch.device) -> float:
    """Seconds from the first step's beginning to its end, in this process, once the model is on its device."""
    workload = load(config, tokens, device)
    chosen = precisions([] if recipe is None else [recipe], [])[-1]
    model = chosen.convert(workload.model, workload.ignore_modules)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = make_step(lambda: workload.loss(model, workload.batch), model, optimizer)
    return seconds(step, device)


def measure(config: str, recipe: Int8Recipe, tokens: int, device: torch.device, limit: float) -> dict[str, float | str]:
    """Runs three processes one after the other: BF16, INT8 with an empty Triton cache, and INT8 with the cache filled.

    ``limit``: seconds after which the process that runs then is stopped.

    Returns:
        Seconds by ``"bf16"``, ``"empty cache"`` and ``"warm cache"``; ``"error"`` with the end of the output of the
        process that failed.
    """
    found: dict[str, float | str] = {}
    until = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as cache:
        fields = dataclasses.asdict(recipe)
        for name, chosen in (("bf16", None), ("empty cache", fields), ("warm cache", fields)):
            arguments = [config, json.dumps(chosen), str(tokens), str(device)]
            try:
                process = subprocess.run(
                    [sys.executable, "-m", "lightning_int8.bench.first_step", *arguments],
                    env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False,
                    timeout=max(0.0, until - time.monotonic()),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                found["error"] = f"{name}: out of time"
                break
            if process.returncode:
                found["error"] = f"{name}: {process.stderr[-300:]}"
                break
            found[name] = float(process.stdout.split()[-1])
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    chosen = None if given is None else resolve_recipe(given)
    print(seconds_here(sys.argv[1], chosen, int(sys.argv[3]), torch.device(sys.argv[4])))
