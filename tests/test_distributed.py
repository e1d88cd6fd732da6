"""Two gloo processes: DDP, FSDP2 and FSDP1; every scenario runs once in `distributed_worker.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import TinyModule, assert_same
from tests.two_processes import launch, logs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    if any(launch("tests.distributed_worker", folder)):
        pytest.fail(logs(folder))
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        result["folder"] = folder
    return results


def tables(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: layer["tensor"] if isinstance(layer, dict) else layer for name, layer in state.items()}


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2", "fsdp1", "fsdp1_bf16", "plain_fsdp1", "budget"])
def test_thresholds_are_identical_on_every_rank(ranks, scenario):
    first, second = (tables(rank[scenario]["thresholds"]) for rank in ranks)
    assert len(first) == 5
    assert all(table[0].isfinite().all() for table in first.values())
    assert_same(first, second)


def test_a_layer_that_did_not_run_on_one_rank_takes_the_others_threshold(ranks):
    first, second = (rank["ddp"]["after_loss_on_one_rank"] for rank in ranks)
    assert_same(first, second)
    assert first["model.lm_head"].isfinite().all()


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_ranks_saw_different_batches_and_hold_the_same_weights(ranks, scenario):
    assert len(ranks[0][scenario]["losses"]) == 3
    assert ranks[0][scenario]["losses"] != ranks[1][scenario]["losses"]
    assert_same(ranks[0][scenario]["weights"], ranks[1][scenario]["weights"])


@pytest.mark.parametrize("scenario", ["fsdp2", "fsdp1"])
def test_sharding_gives_the_losses_of_ddp(ranks, scenario):
    for rank in ranks:
        losses, expected = rank[scenario]["losses"], rank["ddp"]["losses"]
        assert losses[:2] == pytest.approx(expected[:2], rel=1e-5)
        # Gradients differ in last bits, with which a rounding or two flip: 3e-5.
        assert losses[2] == pytest.approx(expected[2], rel=1e-4)


def test_fsdp1_under_autocast_follows_float32(ranks):
    assert ranks[0]["fsdp1_bf16"]["losses"] == pytest.approx(ranks[0]["ddp"]["losses"], rel=0.02)


def test_fsdp2_layers_keep_both_classes(ranks):
    classes = ranks[0]["fsdp2"]["classes"]
    assert classes["lm_head"] == ["FSDPInt8Linear", "FSDPModule", "Int8Linear", "Linear"]


def test_names_are_those_of_the_plain_model(ranks):
    assert set(ranks[0]["plain_fsdp1"]["thresholds"]) == {
        *(f"layers.{i}.{p}_proj" for i in range(2) for p in ("up", "down")),
        "lm_head",
    }
    assert ranks[0]["plain_fsdp1"]["is_fsdp1"] is True


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_checkpoints_load_into_the_plain_model_on_one_device(ranks, scenario):
    path = ranks[0]["folder"] / scenario / f"{scenario}.ckpt"
    model = TinyModule.load_from_checkpoint(path, strict=True)
    assert_same(dict(model.named_parameters()), ranks[0][scenario]["weights"])
    saved = torch.load(path, weights_only=True)["FallbackInt8Precision"]["thresholds"]
    if scenario == "fsdp2":
        assert_same(tables(saved), tables(ranks[0][scenario]["thresholds"]))


def test_only_rank_zero_writes_and_every_rank_measures_the_same(ranks):
    torch.testing.assert_close(ranks[0]["ddp"]["rates"], ranks[1]["ddp"]["rates"], rtol=0, atol=0, equal_nan=True)
    assert (ranks[0]["folder"] / "ddp/fallback_rate.csv").exists()
    logs = [(ranks[0]["folder"] / f"rank{rank}.log").read_text() for rank in range(2)]
    assert "INT8 linear layers" in logs[0]
    assert "INT8 linear layers" not in logs[1]


def test_clipping_dtensors_beside_plain_tensors(ranks):
    plain, sharded = ranks[0]["clipping"]["plain"], ranks[0]["clipping"]["sharded"]
    torch.testing.assert_close(plain["total"], sharded["total"])
    torch.testing.assert_close(plain["grads"], sharded["grads"])
    assert torch.nn.utils.get_total_norm(sharded["grads"]).item() == pytest.approx(0.01, rel=1e-3)
