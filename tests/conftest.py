"""What every test shares: a fixed seed, few threads, and the skip of GPU tests where there is no GPU."""

from __future__ import annotations

import os
import random

# Rendering to files only, also where a display exists; set before anything imports pyplot.
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests that read a table's text must not see it wrapped to the width of whoever's terminal.
os.environ.setdefault("COLUMNS", "160")

import numpy as np
import pytest
import torch

pytest_plugins = ["tests.gpu_results"]


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        # One thread a worker: workers that each take every core slow each other down.
        torch.set_num_threads(1)
        _spread_over_gpus(int(config.workerinput["workerid"].removeprefix("gw")))


def _spread_over_gpus(worker: int) -> None:
    """Gives each worker another of the machine's GPUs as its first; all stay visible to it."""
    count = torch.cuda.device_count()  # asks NVML, so CUDA has not read the variable yet
    if count > 1:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = named.split(",")[:count] if named else [str(i) for i in range(count)]
        first = worker % count
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first:] + gpus[:first])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        # Side by side as they are, the longest ones decide when all are done.
        items.sort(key=lambda item: "slow" not in item.keywords)
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; run `make gpu-test` on a machine that has one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test read the global state)
    torch.manual_seed(0)
