"""The Fabric plugin in real loops: conversion around existing optimizers, thresholds, checkpoints, errors."""

from __future__ import annotations

from typing import Any

import lightning.fabric.plugins.precision as fabric_plugins
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_int8 import FabricFallbackInt8Precision, Int8Linear
from lightning_int8.threshold import THRESHOLD
from tests.tiny import BATCH, RECIPE, TinyModel, assert_same, batches, set_far, thresholds, updates


def plugin(**kwargs: Any) -> FabricFallbackInt8Precision:
    return FabricFallbackInt8Precision(**{"recipe": RECIPE, **kwargs})


def setup(
    plugins: FabricFallbackInt8Precision | None, reentrant: bool | None = None, compiled: bool = False, **kwargs: Any
) -> tuple[Fabric, Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins, **kwargs)
    torch.manual_seed(1)
    model: Any = TinyModel(reentrant=reentrant)
    if compiled:
        # Fabric takes the wrapper off, and puts it on again.
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    # Made before the conversion, as Fabric's users do.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fabric, *fabric.setup(model, optimizer)


def train(fabric: Fabric, model: Any, optimizer: Any, first: int, last: int) -> list[float]:
    x, y = batches(8)
    losses = []
    for step in range(first, last):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        loss = F.cross_entropy(model(x[rows]).float(), y[rows])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_an_existing_optimizer_trains_the_converted_layers():
    fabric, model, optimizer = setup(plugin())
    assert isinstance(model.lm_head, Int8Linear)
    before = model.lm_head.weight.detach().clone()
    losses = train(fabric, model, optimizer, 0, 8)
    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.strict
@pytest.mark.parametrize(("reentrant", "compiled"), [(False, False), (None, True), (False, True)])
def test_compiled_and_checkpointed_layers_change_nothing(reentrant, compiled):
    expected = train(*setup(plugin()), 0, 4)
    torch._dynamo.reset()
    counters.clear()
    fabric, model, optimizer = setup(plugin(), reentrant, compiled)
    losses, graphs = [], []
    for step in range(4):
        losses += train(fabric, model, optimizer, step, step + 1)
        graphs.append(counters["stats"]["unique_graphs"])
    assert losses == expected
    assert graphs == [int(compiled)] * 4


def test_thresholds_move_once_a_step_and_not_while_accumulating():
    fabric, model, optimizer = setup(plugin())
    x, _ = batches(1)
    model(x)
    set_far(model)
    for step in range(6):
        fabric.backward(model(x).square().mean())
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    assert updates(model) == {2}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_outer_precision_does_what_fabrics_own_does(precision):
    seen = []
    for own in (True, False):
        fabric, model, _ = setup(None, precision=precision) if own else setup(plugin(precision=precision))
        inner = {}
        model.lm_head.register_forward_hook(lambda m, i, o, inner=inner: inner.update(dtype=o.dtype))
        output = model(batches(1)[0])
        with fabric.init_module():
            fresh = nn.Linear(2, 2).weight.dtype
        with fabric.autocast():
            product = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        seen.append((output.dtype, inner["dtype"], model.lm_head.weight.dtype, fresh, product))
    assert seen[0] == seen[1]


def test_16_mixed_on_a_cpu_is_refused():
    _, model, _ = setup(plugin(precision="16-mixed"))
    with pytest.raises(ValueError, match=r"FabricFallbackInt8Precision\(precision='16-mixed'\) needs a GPU"):
        model(batches(1)[0])


def test_checkpoint_resumes_with_the_same_losses(tmp_path):
    fabric, model, optimizer = setup(plugin())
    whole = train(fabric, model, optimizer, 0, 6)

    precision = plugin()
    fabric, model, optimizer = setup(precision)
    first = train(fabric, model, optimizer, 0, 3)
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer, "int8": precision})

    precision = plugin()
    fabric, model, optimizer = setup(precision)
    fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer, "int8": precision})
    assert whole == first + train(fabric, model, optimizer, 3, 6)

    plain = TinyModel()
    plain.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True)["model"], strict=True)


def test_thresholds_loaded_before_setup_are_restored_by_it():
    precision = plugin()
    fabric, model, optimizer = setup(precision)
    train(fabric, model, optimizer, 0, 2)
    saved, before = precision.state_dict(), thresholds(model)
    other = plugin()
    other.load_state_dict(saved)
    _, again, _ = setup(other)
    assert_same(before, thresholds(again))


def test_two_models_each_have_their_thresholds():
    precision = plugin()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    first, second = fabric.setup_module(TinyModel()), fabric.setup_module(nn.Sequential(nn.Linear(64, 64)))
    optimizer = fabric.setup_optimizers(torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1))
    fabric.backward(first(second(batches(1)[0])).square().mean())
    optimizer.step()
    names = list(precision.state_dict()["thresholds"])
    assert names[-2:] == ["lm_head", "module_1.0"]
    assert all(table[0, 3].isfinite() for table in [*thresholds(first).values(), *thresholds(second).values()])


def test_a_step_that_the_scaler_skips_moves_no_threshold():
    precision = plugin()
    fabric, model, optimizer = setup(precision)
    precision._bound()
    precision._outer = fabric_plugins.MixedPrecision("16-mixed", "cpu")
    precision.scaler = precision._outer.scaler
    set_far(model)
    x, _ = batches(1)
    for overflow in (False, True):
        fabric.backward(model(x).float().square().mean())
        if overflow:
            model.lm_head.weight.grad[0, 0] = float("inf")
        optimizer.step()
        optimizer.zero_grad()
    table = thresholds(model)["lm_head"]
    moved = 1e10 / RECIPE.threshold_factor
    torch.testing.assert_close(table[:, THRESHOLD], torch.tensor([moved, moved / 2]))


def test_another_model_is_an_error():
    precision = plugin()
    setup(precision)
    saved = precision.state_dict()
    other = plugin(ignore_modules=["lm_head"])
    setup(other)
    # Fabric's checkpoints hold the state where the user has put it.
    with pytest.raises(
        ValueError, match=r"for lm_head, not an INT8 layer.* by leaving out plugin\.load_state_dict\("
    ) as e:
        other.load_state_dict(saved)
    assert "checkpoint[" not in str(e.value)
    other = plugin(recipe="block")
    setup(other)
    with pytest.raises(ValueError, match=r"'row' and is 'block'.* leaving out plugin\.load_state_dict\(\.\.\.\)\.$"):
        other.load_state_dict(saved)


def test_trainer_given_the_fabric_plugin_says_which_class(tmp_path):
    from lightning.pytorch import Trainer

    with pytest.raises(Exception, match=r"for a Trainer use lightning_int8\.FallbackInt8Precision"):
        Trainer(plugins=plugin(), accelerator="cpu", default_root_dir=tmp_path)


def test_legacy_fabric_says_which_import():
    legacy = pytest.importorskip("lightning_fabric")
    with pytest.raises(TypeError, match=r"needs the Fabric of `from lightning\.fabric import Fabric`"):
        legacy.Fabric(plugins=plugin(), accelerator="cpu")


def test_deepspeed_is_refused_by_name():
    fabric, _, _ = setup(plugin())
    engine = type("DeepSpeedEngine", (), {"step": lambda self: None})()
    with pytest.raises(TypeError, match="cannot be used with DeepSpeed"):
        fabric.strategy.optimizer_step(engine)
