"""Two Llamas × DDP, FSDP1, FSDP2 × compiled, checkpointed: two processes, one run for all (`stack_worker.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stack_worker import OTHER_RUNS, STEPS, STRATEGIES
from tests.two_processes import DEVICES, results

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[dev]'")


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    device = request.param
    parts = [[name] for name in STRATEGIES] + [["graphs" if device == "gpu" else "others"]]
    return results("tests.stack_worker", tmp_path_factory.mktemp("stacks"), device, parts)


# How near to plain DDP, where it is not to rounding: inductor adds up in another order, and an INT8 value on the edge
# of rounding falls to the other side; weights and activations in bfloat16.
NEAR = {"graphs": 1e-3, "gathered in bfloat16": 0.01}


@pytest.mark.slow
def test_every_stack_trains_as_ddp_does(ranks) -> None:
    for rank in ranks:
        for name, cell in rank.items():
            model, _, variant = name.split(", ")
            rel = NEAR.get(variant, 1e-5)
            like = rank[f"{model}, ddp, {variant if variant in OTHER_RUNS else 'eager'}"]
            assert cell["losses"] == pytest.approx(like["losses"], rel=rel), name
            # One program serves both layers and every step; FSDP1's wrappers cut a whole module into several.
            programs = cell["graphs"][0] if "whole" in variant else int("compiled" in variant or variant == "graphs")
            assert cell["graphs"] == [programs] * STEPS, name
            assert bool(programs) == ("compiled" in variant or variant == "graphs")
