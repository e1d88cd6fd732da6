"""Tensor parallelism on two gloo processes: column- and row-parallel linears compute in INT8, other layouts refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_int8 import FallbackInt8Precision
from tests.assertions import assert_close
from tests.tiny import RECIPE, TinyModule, assert_same, trainer
from tests.two_processes import launch, logs

KINDS = ["parallelized first", "converted first", "compiled"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tensor_parallel")
    if any(launch("tests.tensor_parallel_worker", folder)):
        pytest.fail(logs(folder))
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return [{**result, "folder": folder} for result in results]


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_identical_on_every_rank(ranks, kind: str) -> None:
    first, second = (rank[kind]["thresholds"] for rank in ranks)
    assert len(first) == 5
    assert all(table[0].isfinite().all() for table in first.values())
    assert_same(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_near_full_precision_and_one_device(ranks, kind: str) -> None:
    result, single, exact = ranks[0][kind], ranks[0]["one device"], ranks[0]["full precision"]
    assert_close("first output, beside one device", single["first"], result["first"], 35.0)
    assert result["gradients"].keys() == exact["gradients"].keys()
    for name, gradient in exact["gradients"].items():
        assert_close(name, gradient, result["gradients"][name], 17.0)


@pytest.mark.strict
def test_conversion_order_and_compilation_change_nothing(ranks) -> None:
    for kind in KINDS[1:]:
        assert_same(ranks[0][KINDS[0]]["gradients"], ranks[0][kind]["gradients"])


def test_tokens_split_between_the_products(ranks) -> None:
    exact = ranks[0]["full precision"]["block"]
    for name in ("out", "dx"):
        joined = torch.cat([rank["sequence parallel"][name] for rank in ranks])
        assert_close(name, exact[name], joined, 25.0)
    assert_close("dw", exact["dw"], ranks[0]["sequence parallel"]["dw"], 25.0)


def test_other_layouts_are_refused_by_name(ranks) -> None:
    said = ranks[0]["refusals"]
    assert "int8_linear: weight is a DTensor" in said["function"]
    assert "the input is a plain tensor beside DTensors" in said["plain input"]
    assert "ColwiseParallel or RowwiseParallel" in said["plain input"]
    assert "weight R on a mesh" in said["layout"]
    assert "name the layer in ignore_modules" in said["layout"]


def test_trainer_follows_full_precision_and_saves_a_plain_checkpoint(ranks) -> None:
    for rank in ranks:
        assert rank["Trainer"]["losses"] == pytest.approx(rank["plain Trainer"]["losses"], rel=0.01)
        assert rank["Trainer"]["losses"] != rank["plain Trainer"]["losses"]
    assert_same(ranks[0]["Trainer"]["weights"], ranks[1]["Trainer"]["weights"])
    loaded = TinyModule.load_from_checkpoint(ranks[0]["folder"] / "int8" / "tensor_parallel.ckpt", strict=True)
    assert_same(dict(loaded.named_parameters()), ranks[0]["Trainer"]["weights"])


def test_its_checkpoint_is_resumed_on_one_device(ranks, tmp_path) -> None:
    path = ranks[0]["folder"] / "int8" / "tensor_parallel.ckpt"
    for plugin in (FallbackInt8Precision(RECIPE, precision="32-true"), None):
        model = TinyModule(steps=6)
        trainer(tmp_path, plugin=plugin, max_epochs=2).fit(model, ckpt_path=path)
        assert len(model.losses) == 6
        # The worker's last epoch ended near 1.6; a fresh model begins near 2.2.
        assert model.losses[0] < 1.9
