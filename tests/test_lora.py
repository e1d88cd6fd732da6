"""LoRA: a frozen base computes in INT8 without a weight gradient, adapters stay in high precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_int8 import FallbackInt8Precision, Int8Linear, convert_to_int8, fallback_states, update_thresholds
from lightning_int8.threshold import RATE
from tests.assertions import assert_close
from tests.tiny import RECIPE, TinyModel, TinyModule, trainer

ADAPTERS = ["lora_A", "lora_B"]


class LoRALinear(nn.Module):
    """A frozen linear with a low-rank term, as everyone writes it."""

    def __init__(self, base_layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_adapters(model: TinyModel) -> TinyModel:
    for layer in model.layers:
        layer.up_proj = LoRALinear(layer.up_proj)
        layer.down_proj = LoRALinear(layer.down_proj)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_conversion_before_or_after_wrapping_gives_the_same_model(wrapped_first: bool) -> None:
    torch.manual_seed(1)
    plain = TinyModel()
    int8 = copy.deepcopy(plain)
    torch.manual_seed(2)
    with_adapters(plain)
    torch.manual_seed(2)
    if wrapped_first:
        report = convert_to_int8(with_adapters(int8), RECIPE, ignore_modules=ADAPTERS)
        assert set(report.skipped) == {
            f"layers.{i}.{p}_proj.lora_{m}" for i in range(2) for p in ("up", "down") for m in "AB"
        }
    else:
        convert_to_int8(int8, RECIPE)
        with_adapters(int8)
    bases = [int8.layers[0].up_proj.base_layer, int8.lm_head]
    assert all(isinstance(base, Int8Linear) for base in bases)
    assert type(int8.layers[0].up_proj.lora_A) is nn.Linear
    x = torch.randn(64, 64)
    for _ in range(2):
        expected, measured = gradients(plain, x), gradients(int8, x)
        for name, gradient in expected.items():
            assert (gradient is None) == ("base_layer" in name)
            assert (measured[name] is None) == (gradient is None)
            if gradient is not None and gradient.any():
                assert_close(name, gradient, measured[name], 20.0)
        update_thresholds(int8)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(x)
    assert kept.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("recipe", ["row", "block", {"hadamard": False}])
def test_a_frozen_linear_saves_no_activation_and_counts_no_wgrad(recipe: str | dict) -> None:
    linear = nn.Linear(256, 256)
    convert_to_int8(linear, recipe)
    x = torch.randn(128, 256, requires_grad=True)
    trained = saved_bytes(linear, x)
    linear.requires_grad_(False)
    assert saved_bytes(linear, x) < 2048 < 128 * 256 <= trained
    linear(x).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is None
    assert x.grad is not None
    update_thresholds(linear)
    if isinstance(recipe, dict):
        # NaN: no block of the weight gradient's operand was ever counted.
        rate = linear.int8_state.tensor[linear.int8_state.operands.index("dy_wgrad"), RATE]
        assert rate.isnan()


def test_trainer_trains_only_adapters_and_saves_all(tmp_path) -> None:
    class Adapted(TinyModule):
        def __init__(self) -> None:
            super().__init__(steps=6)
            with_adapters(self.model)
            self.model.lm_head.requires_grad_(False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    module = Adapted()
    before = {name: p.clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, plugin=FallbackInt8Precision(RECIPE, "32-true", ignore_modules=ADAPTERS))
    run.fit(module)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    run.save_checkpoint(tmp_path / "lora.ckpt")
    plain = Adapted.load_from_checkpoint(tmp_path / "lora.ckpt", strict=True)
    assert not fallback_states(plain)


def peft_model(base: nn.Module) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[dev]'")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_peft(wrapped_first: bool) -> None:
    torch.manual_seed(1)
    base = TinyModel()
    plain = peft_model(copy.deepcopy(base))
    if wrapped_first:
        int8 = peft_model(base)
        convert_to_int8(int8, RECIPE, ignore_modules=ADAPTERS)
    else:
        convert_to_int8(base, RECIPE)
        int8 = peft_model(base)
    layer = int8.base_model.model.layers[0].up_proj
    assert type(layer.base_layer) is Int8Linear
    assert type(layer.lora_A["default"]) is nn.Linear
    x = torch.randn(64, 64)
    for _ in range(2):
        expected, measured = gradients(plain, x), gradients(int8, x)
        for name, gradient in expected.items():
            assert (measured[name] is None) == (gradient is None)
            if gradient is not None:
                assert_close(name, gradient, measured[name], 18.0)
        update_thresholds(int8)
    merged = int8.merge_and_unload()
    assert type(merged.layers[0].up_proj) is Int8Linear
    assert_close("merged output", plain.merge_and_unload()(x), merged(x), 25.0)
