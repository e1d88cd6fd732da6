"""Fabric with DDP, FSDP1 and FSDP2: two processes, one run for all, in `fabric_worker.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fabric_worker import CLIP, STRATEGIES, VARIANTS
from tests.tiny import assert_same
from tests.two_processes import DEVICES, launch, logs

# With `--dist loadgroup` one worker takes the whole file, which has one run.
pytestmark = pytest.mark.xdist_group("fabric")


@pytest.fixture(scope="module", params=DEVICES)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fabric")
    if any(launch("tests.fabric_worker", folder, request.param, gpus=request.param == "gpu")):
        pytest.fail(logs(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", STRATEGIES)
def test_every_strategy_trains_alike(ranks, kind: str) -> None:
    for rank in ranks:
        assert rank[kind]["losses"] == pytest.approx(rank["ddp"]["losses"], rel=1e-5)
        assert rank[kind]["norms"] == pytest.approx(rank["ddp"]["norms"], rel=1e-4)
    assert min(ranks[0][kind]["norms"]) > 2 * CLIP
    assert ranks[0][kind]["losses"][-1] < ranks[0][kind]["losses"][0]
    assert_same(ranks[0][kind]["thresholds"], ranks[1][kind]["thresholds"])


@pytest.mark.parametrize("saved", ["one file", "shards"])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_resumed_run_continues_as_if_nothing_had_happened(ranks, kind: str, saved: str) -> None:
    for rank in ranks:
        resumed = rank[f"{kind}, resumed from {saved}"]
        assert resumed["losses"] == rank[kind]["losses"][3:]
        assert_same(resumed["thresholds"], rank[kind]["thresholds"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", STRATEGIES)
def test_compiled_and_checkpointed_layers_change_nothing(ranks, kind: str, variant: str) -> None:
    for rank in ranks:
        result = rank[f"{kind}, {variant}"]
        assert result["losses"] == pytest.approx(rank[kind]["losses"][:3], rel=1e-5)
        # All that is compiled is compiled in the first step.
        assert result["graphs"] == [result["graphs"][0]] * 3
        assert bool(result["graphs"][0]) == ("compiled" in variant)
