"""Two Llamas × DDP, FSDP1, FSDP2 × compiled, checkpointed: two processes, one run for all (`stack_worker.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.stack_worker import STEPS
from tests.two_processes import DEVICES, launch, logs

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stacks")
    if any(launch("tests.stack_worker", folder, request.param, gpus=request.param == "gpu")):
        pytest.fail(logs(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_every_stack_trains_as_ddp_does(ranks) -> None:
    for rank in ranks:
        for name, cell in rank.items():
            model, _, variant = name.split(", ")
            # Inductor adds up in another order, and an INT8 value on the edge of rounding falls to the other side.
            rel = 1e-3 if variant == "graphs" else 1e-6
            assert cell["losses"] == pytest.approx(rank[f"{model}, ddp, eager"]["losses"], rel=rel), name
            # One program serves both layers and every step.
            assert cell["graphs"] == [int("compiled" in variant or variant == "graphs")] * STEPS, name
