"""Which modules replay CUDA graphs, and that gradients are not accumulated with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_int8 import FallbackInt8Precision
from lightning_int8.cuda_graphs import modules_with_cuda_graphs, refuse_accumulation
from tests.tiny import GPU_RECIPE, TinyModel, TinyModule, trainer


def test_every_way_to_compile_a_module_is_found() -> None:
    def by_forward(layer: nn.Module) -> None:
        layer.forward = torch.compile(layer.forward, mode="reduce-overhead")

    for compiled in (
        lambda layer: layer.compile(mode="reduce-overhead"),
        lambda layer: layer.compile(mode="max-autotune"),
        lambda layer: layer.compile(options={"triton.cudagraphs": True}),
        by_forward,
    ):
        model = TinyModel()
        compiled(model.layers[1])
        assert modules_with_cuda_graphs(model) == ["layers.1"]
    model.layers[0] = torch.compile(model.layers[0], mode="reduce-overhead")
    assert modules_with_cuda_graphs(model) == ["layers.0", "layers.1"]
    # Whole, as `torch.compile(LightningModule)` and `model.compile` do.
    assert modules_with_cuda_graphs(torch.compile(TinyModel(), mode="reduce-overhead")) == [""]


def test_what_replays_nothing_is_not_found() -> None:
    model = TinyModel()
    model.layers[0].compile()
    model.layers[1].compile(mode="max-autotune-no-cudagraphs")
    model.lm_head.compile(backend="aot_eager")
    assert modules_with_cuda_graphs(model) == []
    # Frozen weights have no gradients to overwrite.
    model.lm_head = torch.compile(model.lm_head.requires_grad_(False), mode="reduce-overhead")
    assert modules_with_cuda_graphs(model) == []


def test_accumulation_is_refused() -> None:
    model = TinyModel()
    for layer in model.layers:
        layer.compile(mode="reduce-overhead")
    refuse_accumulation(model, 1)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 with 'layers\.0' and 1 more.*mode='default'"):
        refuse_accumulation(model, 2)


@pytest.mark.gpu
def test_the_trainer_refuses_it_before_the_first_batch(tmp_path) -> None:
    model = TinyModule()
    model.model.compile(mode="reduce-overhead")
    run = trainer(tmp_path, plugin=FallbackInt8Precision(GPU_RECIPE), accelerator="gpu", accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 with 'model' compiled into CUDA graphs"):
        run.fit(model)
    assert model.losses == []
