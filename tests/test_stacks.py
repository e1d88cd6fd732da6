"""Two Llamas × DDP, FSDP1, FSDP2 × compiled, checkpointed: two gloo processes, one run for all (`stack_worker.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.stack_worker import CELLS, STEPS
from tests.two_processes import launch, logs

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("stacks")
    if any(launch("tests.stack_worker", folder)):
        pytest.fail(logs(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "strategy", "variant"), CELLS)
def test_every_stack_trains_as_ddp_does(ranks, model: str, strategy: str, variant: str) -> None:
    for rank in ranks:
        cell = rank[f"{model}, {strategy}, {variant}"]
        assert cell["losses"] == pytest.approx(rank[f"{model}, ddp, eager"]["losses"], rel=1e-6)
        # One graph serves both layers and every step.
        assert cell["graphs"] == [int("compiled" in variant)] * STEPS
