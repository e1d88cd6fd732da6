"""The Trainer plugin in real runs: precisions, when thresholds move, checkpoints, resuming, and errors."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_int8 import PRESETS, FabricFallbackInt8Precision, FallbackInt8Precision, Int8Linear, fallback_states
from lightning_int8.threshold import RATE, THRESHOLD, TOTAL_BLOCKS
from tests.tiny import (
    GPU_RECIPE,
    RECIPE,
    FarThresholds,
    TinyModule,
    assert_same,
    thresholds,
    trainer,
    updates,
)

BANDS = {"activation_band": (0.1, 0.3), "gradient_band": (0.1, 0.3)}


def plugin(**kwargs: Any) -> FallbackInt8Precision:
    return FallbackInt8Precision(**{"recipe": RECIPE, **kwargs})


class Probe(Callback):
    """What a linear layer gets and gives in the first training batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch_dtype = batch[0].dtype
        self.default_dtype = None

        def hook(module, args, output):
            self.output_dtype, self.default_dtype = output.dtype, torch.get_default_dtype()

        self.handle = pl_module.model.lm_head.register_forward_hook(hook)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.handle.remove()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_outer_precision_does_what_lightnings_own_does(tmp_path, precision):
    seen = []
    for use_plugin in (False, True):
        model, probe = TinyModule(), Probe()
        kwargs = {"plugin": plugin(precision=precision)} if use_plugin else {"plugin": None, "precision": precision}
        run = trainer(tmp_path, callbacks=[probe], **kwargs)
        run.fit(model)
        seen.append(
            (
                probe.batch_dtype,
                probe.output_dtype,
                probe.default_dtype,
                model.model.lm_head.weight.dtype,
                run.precision,
            )
        )
        assert isinstance(model.model.lm_head, Int8Linear) is use_plugin
    assert seen[0] == seen[1]
    assert torch.get_default_dtype() == torch.float32


def test_init_module_uses_the_precisions_dtype(tmp_path):
    with trainer(tmp_path, plugin=plugin(precision="bf16-true")).init_module():
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
    with trainer(tmp_path, plugin=plugin(precision="bf16-mixed")).init_module():
        assert nn.Linear(2, 2).weight.dtype == torch.float32


def test_losses_follow_full_precision(tmp_path):
    losses = []
    for kwargs in ({"plugin": None, "precision": "32-true"}, {"plugin": plugin(precision="32-true")}):
        model = TinyModule(steps=20)
        trainer(tmp_path, **kwargs).fit(model)
        losses.append(model.losses)
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[0] != losses[1]
    assert all(abs(a - b) < 0.05 * a for a, b in zip(*losses, strict=True))


def test_thresholds_move_once_after_each_optimizer_step(tmp_path):
    model = TinyModule(steps=5)
    trainer(tmp_path, plugin=plugin(), callbacks=[FarThresholds()]).fit(model)
    assert updates(model) == {5}


def test_gradient_accumulation_moves_thresholds_once_a_step_and_counts_every_batch(tmp_path):
    class Counts(Callback):
        totals: list[float] = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.totals.append(fallback_states(pl_module)["model.lm_head"].tensor[0, 2].item())

    model, counts = TinyModule(steps=6), Counts()
    trainer(tmp_path, plugin=plugin(), accumulate_grad_batches=3, callbacks=[FarThresholds(), counts]).fit(model)
    assert updates(model) == {2}
    # Three batches of 64 tokens by 64 features, mixed 128, in blocks of 16.
    assert counts.totals == [3 * 4 * 8] * 2


def test_manual_optimization(tmp_path):
    model = TinyModule(steps=6, manual=True)
    trainer(tmp_path, plugin=plugin(), callbacks=[FarThresholds()]).fit(model)
    assert updates(model) == {3}


def test_gradient_clipping(tmp_path):
    norms = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.nn.utils.get_total_norm(grads).item())

    def fit(**kwargs):
        norms.clear()
        trainer(tmp_path, plugin=plugin(), callbacks=[Norms()], **kwargs).fit(TinyModule())
        return max(norms)

    assert fit() > 0.1
    assert fit(gradient_clip_val=0.01) <= 0.0101
    assert fit(gradient_clip_val=1e-4, gradient_clip_algorithm="value") <= 1e-4 * math.sqrt(50_000)


class FloatingScaler(Callback):
    """Gives the run 16-mixed's scaler on the CPU, where Lightning itself would not, and an overflow at one step."""

    def __init__(self, overflow_at: int) -> None:
        self.overflow_at = overflow_at

    def on_fit_start(self, trainer, pl_module):
        precision = trainer.precision_plugin
        precision._outer = MixedPrecision("16-mixed", "cpu")
        precision.scaler = precision._outer.scaler

    def on_after_backward(self, trainer, pl_module):
        if trainer.fit_loop.epoch_loop.batch_idx == self.overflow_at:
            pl_module.model.lm_head.weight.grad[0, 0] = math.inf


def test_a_step_that_the_scaler_skips_moves_no_threshold(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((thresholds(pl_module)["model.lm_head"], pl_module.model.lm_head.weight.detach().clone()))

    model = TinyModule(steps=3)
    callbacks = [FloatingScaler(overflow_at=1), FarThresholds(), Watch()]
    trainer(tmp_path, plugin=plugin(), callbacks=callbacks).fit(model)
    (first, first_weight), (skipped, skipped_weight), (last, last_weight) = seen
    assert torch.equal(first_weight, skipped_weight)
    assert not torch.equal(skipped_weight, last_weight)
    # The scale was halved, and the gradients' thresholds with it; X's stays, and nothing counted is left.
    factors = torch.tensor([1.0, 0.5])
    torch.testing.assert_close(skipped[:, THRESHOLD], first[:, THRESHOLD] * factors)
    torch.testing.assert_close(last[:, THRESHOLD], skipped[:, THRESHOLD] / RECIPE.threshold_factor)
    assert skipped[:, 1:3].tolist() == [[0.0, 0.0]] * 2


def test_the_scaler_is_saved_with_the_thresholds(tmp_path):
    model, precision = TinyModule(), plugin()
    run = trainer(tmp_path, plugin=precision, callbacks=[FloatingScaler(overflow_at=1)])
    run.fit(model)
    saved = precision.state_dict()
    assert saved["scaler"]["scale"] == 2.0**15
    run.save_checkpoint(tmp_path / "scaler.ckpt")
    other = plugin()
    other.scaler = torch.amp.GradScaler("cpu")
    other.load_state_dict({"thresholds": {}, "scaler": saved["scaler"]})
    assert other.scaler.get_scale() == 2.0**15


def test_16_mixed_on_a_cpu_is_refused(tmp_path):
    model = TinyModule()
    with pytest.raises(ValueError, match=r"'16-mixed'\) needs a GPU.*Use 'bf16-mixed' or '32-true'"):
        trainer(tmp_path, plugin=plugin(precision="16-mixed")).fit(model)
    assert model.losses == []


class InputWithGradient(Callback):
    """What reentrant checkpointing needs."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[0].requires_grad_()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_run(tmp_path, reentrant):
    runs = []
    for mode in (None, reentrant):
        model = TinyModule(reentrant=mode)
        trainer(tmp_path, plugin=plugin(), callbacks=[InputWithGradient()]).fit(model)
        runs.append((model.losses, thresholds(model)))
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])


def test_only_training_steps_move_thresholds_and_counts(tmp_path):
    model, precision = TinyModule(), plugin()
    model.example_input_array = torch.randn(4, 64)
    model.forward = model.model.forward
    run = trainer(tmp_path, plugin=precision, num_sanity_val_steps=1, callbacks=[ModelSummary()])
    seen = []
    model.on_train_start = lambda: seen.append(thresholds(model))
    run.fit(model)
    assert all(t[:, THRESHOLD].isnan().all() and (t[:, 1:3] == 0).all() for t in seen[0].values())
    trained = thresholds(model)
    run.validate(model, verbose=False)
    run.test(model, verbose=False)
    run.predict(model)
    assert_same(trained, thresholds(model))


def test_fit_validate_and_fit_again_convert_once(tmp_path):
    model, precision = TinyModule(), plugin(ignore_modules=["lm_head"])
    run = trainer(tmp_path, plugin=precision)
    run.fit(model)
    states = {name: id(state) for name, state in fallback_states(model).items()}
    assert len(precision.report.newly_converted) == 4
    run.validate(model, verbose=False)
    assert precision.report.newly_converted == ()
    assert precision.report.converted
    run.fit_loop.max_epochs = 2
    run.fit(model)
    assert {name: id(state) for name, state in fallback_states(model).items()} == states
    assert type(model.model.lm_head) is nn.Linear
    assert len(model.losses) == 6


def test_checkpoint_loads_into_the_plain_model_and_resumes_with_the_same_losses(tmp_path):
    whole = TinyModule()
    trainer(tmp_path, plugin=plugin(), max_epochs=3).fit(whole)

    first = TinyModule()
    checkpoint = ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1)
    trainer(tmp_path, plugin=plugin(), enable_checkpointing=True, callbacks=[checkpoint]).fit(first)
    path = tmp_path / "one.ckpt"
    saved = torch.load(path, weights_only=True)
    assert set(saved["FallbackInt8Precision"]["thresholds"]) == set(fallback_states(first))

    plain = TinyModule.load_from_checkpoint(path, strict=True)
    assert not any(isinstance(m, Int8Linear) for m in plain.modules())
    assert_same(plain.state_dict(), first.state_dict())

    resumed, precision = TinyModule(), plugin()
    trainer(tmp_path, plugin=precision, max_epochs=3).fit(resumed, ckpt_path=path)
    assert whole.losses == first.losses + resumed.losses
    assert_same(thresholds(whole), thresholds(resumed))

    # Without its thresholds the run would go another way: what was restored mattered.
    del saved["FallbackInt8Precision"]
    torch.save(saved, tmp_path / "without.ckpt")
    unsaved = TinyModule()
    trainer(tmp_path, plugin=plugin(), max_epochs=3).fit(unsaved, ckpt_path=tmp_path / "without.ckpt")
    assert unsaved.losses[0] != resumed.losses[0]


def test_a_checkpoint_trained_without_the_plugin_goes_on_with_it(tmp_path):
    run = trainer(tmp_path, plugin=None)
    run.fit(TinyModule())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    model = TinyModule()
    trainer(tmp_path, plugin=plugin(), max_epochs=2).fit(model, ckpt_path=tmp_path / "plain.ckpt")
    assert len(model.losses) == 3
    assert len(thresholds(model)) == 5


def test_a_checkpoint_of_other_layers_or_another_recipe_is_an_error(tmp_path):
    run = trainer(tmp_path, plugin=plugin())
    run.fit(TinyModule())
    path = tmp_path / "all.ckpt"
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"has thresholds for model\.lm_head, not an INT8 layer.*ignore_modules"):
        trainer(tmp_path, plugin=plugin(ignore_modules=["lm_head"])).fit(TinyModule(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"scaling was 'row' and is 'block'.*deleting checkpoint\['FallbackInt8Prec"):
        trainer(tmp_path, plugin=plugin(recipe="block")).fit(TinyModule(), ckpt_path=path)
    saved = torch.load(path, weights_only=True)
    del saved["FallbackInt8Precision"]["recipe_fields"]  # as before there were any
    torch.save(saved, path)
    fix = r"model\.layers\.0\.up_proj: Thresholds for operands .* by deleting checkpoint\['FallbackInt8Precision'\]"
    with pytest.raises(ValueError, match=fix):
        trainer(tmp_path, plugin=plugin(recipe="block")).fit(TinyModule(), ckpt_path=path)
    del saved["FallbackInt8Precision"]
    torch.save(saved, path)
    model = TinyModule()
    trainer(tmp_path, plugin=plugin(recipe="block"), max_epochs=2).fit(model, ckpt_path=path)
    assert len(model.losses) == 3
    run = trainer(tmp_path, plugin=plugin(ignore_modules=["lm_head"]))
    run.fit(TinyModule())
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"lacks thresholds for model\.lm_head"):
        trainer(tmp_path, plugin=plugin()).fit(TinyModule(), ckpt_path=path)


def saved_run(tmp_path, recipe: Any) -> tuple[Any, dict[str, Tensor]]:
    """A checkpoint of a run with ``recipe``, and its thresholds."""
    run, model = trainer(tmp_path, plugin=plugin(recipe=recipe)), TinyModule()
    run.fit(model)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt", thresholds(model)


BLOCK = {"preset": "block", "block_size": 16}


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (BLOCK, {**BLOCK, "block_size": 32}, "since block_size was 16 and is 32"),
        (BLOCK, RECIPE, "since scaling was 'block' and is 'row', hadamard was False and is True"),
        (
            RECIPE,
            {"block_size": 16, "hadamard": False, "budget": None, **BANDS},
            "since hadamard was True and is False",
        ),
        ({"block_size": 16}, RECIPE, r"since budget was 0\.05 and is None"),
        (BLOCK, "rowwise", "since the recipe rowwise has no fallback"),
        ("rowwise", BLOCK, "since the recipe it was trained with, rowwise, has no fallback"),
    ],
)
def test_thresholds_without_a_meaning_for_the_recipe_are_refused_and_left_out_of_an_evaluation(
    tmp_path, before, after, says
):
    path, _ = saved_run(tmp_path, before)
    with pytest.raises(ValueError, match=rf"cannot be used, {says}.*trained with \(.*deleting checkpoint\['Fallback"):
        trainer(tmp_path, plugin=plugin(recipe=after), max_epochs=2).fit(TinyModule(), ckpt_path=path)
    model = TinyModule()
    with pytest.warns(UserWarning, match=f"left out, {says}"):
        trainer(tmp_path, plugin=plugin(recipe=after)).validate(model, ckpt_path=path, verbose=False)
    assert not any(table[0, THRESHOLD].isfinite() for table in thresholds(model).values())


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"block_size": 16}, {"block_size": 16, "budget": 0.1}, r"budget was 0\.05 and is 0\.1\. They"),
        (
            BLOCK,
            {**BLOCK, "activation_band": (0.2, 0.4), "threshold_factor": 1.2},
            r"activation_band was \(0\.1, 0\.3\) and is \(0\.2, 0\.4\)\. They",
        ),
        (BLOCK, {**BLOCK, "wgrad": False}, r"wgrad was True and is False\. They"),
    ],
)
def test_thresholds_that_adapt_to_the_recipe_go_on_with_one_warning(tmp_path, before, after, says):
    path, saved = saved_run(tmp_path, before)
    model, seen = TinyModule(), []
    model.on_train_start = lambda: seen.append(thresholds(model))
    with pytest.warns(UserWarning, match="under another recipe") as warned:
        trainer(tmp_path, plugin=plugin(recipe=after), max_epochs=2).fit(model, ckpt_path=path)
    (text,) = [str(w.message) for w in warned if "another recipe" in str(w.message)]
    assert re.search(says, text)
    assert_same(saved, seen[0])


def test_thresholds_of_layers_that_come_while_training_move(tmp_path):
    class Growing(TinyModule):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.model.layers.append(copy.deepcopy(self.model.layers[0]))
                self.trainer.optimizers[0].add_param_group({"params": list(self.model.layers[-1].parameters())})

    model = Growing(steps=4)
    trainer(tmp_path, plugin=plugin(), max_epochs=3).fit(model)
    grown = {name: table for name, table in thresholds(model).items() if name.startswith("model.layers.2.")}
    assert grown
    assert all(table[0, RATE].isfinite() and table[0, TOTAL_BLOCKS] == 0 for table in grown.values())


def test_an_evaluation_takes_the_thresholds_of_the_layers_that_both_have(tmp_path):
    run = trainer(tmp_path, plugin=plugin(ignore_modules=["lm_head"]))
    run.fit(TinyModule())
    run.save_checkpoint(path := tmp_path / "some.ckpt")
    model = TinyModule()
    with pytest.warns(UserWarning, match=r"lacks thresholds for model\.lm_head\. Layers without"):
        trainer(tmp_path, plugin=plugin()).validate(model, ckpt_path=path, verbose=False)
    found = {name: bool(table[0, THRESHOLD].isfinite()) for name, table in thresholds(model).items()}
    assert found.pop("model.lm_head") is False
    assert set(found.values()) == {True}


def test_a_checkpoint_without_thresholds_seeds_them(tmp_path):
    run = trainer(tmp_path, plugin=plugin())
    run.fit(TinyModule())
    run.save_checkpoint(path := tmp_path / "spawned.ckpt")
    saved = torch.load(path, weights_only=True)
    # As the process that started others by ddp_spawn saves it, whose own model nobody converted.
    saved["FallbackInt8Precision"]["thresholds"] = {}
    torch.save(saved, path)
    model = TinyModule()
    with pytest.warns(UserWarning, match="lacks thresholds for .* Layers without thresholds seed their own"):
        trainer(tmp_path, plugin=plugin(), max_epochs=2).fit(model, ckpt_path=path)
    assert all(table[0, THRESHOLD].isfinite() for table in thresholds(model).values())


def test_what_thresholds_do_not_depend_on_may_change_in_silence(tmp_path):
    path, _ = saved_run(tmp_path, BLOCK)
    changed = {**BLOCK, "threshold_factor": 1.2, "stochastic_rounding": "nothing", "backend": "reference"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, plugin=plugin(recipe=changed), max_epochs=2).fit(TinyModule(), ckpt_path=path)
        trainer(tmp_path, plugin=plugin(recipe="rowwise")).validate(TinyModule(), verbose=False)
    assert not any("INT8 thresholds" in str(w.message) for w in caught)


@pytest.mark.skipif(not hasattr(lightning_callbacks, "WeightAveraging"), reason="needs lightning 2.6")
def test_weight_averaging(tmp_path):
    model = TinyModule()
    average = lightning_callbacks.WeightAveraging()
    run = trainer(tmp_path, plugin=plugin(), callbacks=[average], max_epochs=2)
    run.fit(model)
    assert len(model.losses) == 6
    # After the fit the model holds the averaged weights, in INT8 layers, and can be copied and fitted again.
    assert isinstance(copy.deepcopy(model.model).lm_head, Int8Linear)
    run.fit_loop.max_epochs = 3
    run.fit(model)
    assert len(model.losses) == 9


def test_compiled_submodules_neither_break_nor_recompile(tmp_path):
    class Frames(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, frames = TinyModule(steps=4), Frames()
    frames.frames = []
    model.model = torch.compile(model.model, backend="aot_eager", fullgraph=True)
    # Evaluation is a graph of its own.
    options = {"callbacks": [frames, FarThresholds()], "limit_val_batches": 0}
    trainer(tmp_path, plugin=plugin(ignore_modules=["layers.0.up_proj"]), **options).fit(model)
    assert frames.frames == [1, 1, 1, 1]
    assert set(fallback_states(model)) == {
        "model.layers.0.down_proj",
        "model.layers.1.up_proj",
        "model.layers.1.down_proj",
        "model.lm_head",
    }
    assert updates(model) == {4}


def test_tied_weights_train_as_one(tmp_path):
    class Tied(TinyModule):
        def __init__(self):
            super().__init__()
            self.model.layers[1].up_proj.weight = self.model.layers[0].up_proj.weight

    model = Tied()
    run = trainer(tmp_path, plugin=plugin())
    run.fit(model)
    assert model.model.layers[0].up_proj.weight is model.model.layers[1].up_proj.weight
    run.save_checkpoint(tmp_path / "tied.ckpt")
    again = Tied.load_from_checkpoint(tmp_path / "tied.ckpt")
    assert again.model.layers[0].up_proj.weight is again.model.layers[1].up_proj.weight


def test_recipes_from_names_and_mappings():
    assert FallbackInt8Precision("block").recipe == PRESETS["block"]
    smaller = dataclasses.replace(PRESETS["block"], block_size=64)
    assert FallbackInt8Precision({"preset": "block", "block_size": 64}).recipe == smaller
    assert "ignore_modules=['a']" in repr(FallbackInt8Precision(ignore_modules=["a"]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"precision='bf16'\) must be one of 'bf16-mixed', 'bf16-true'"):
        FallbackInt8Precision(precision="bf16")
    with pytest.raises(ValueError, match="Unknown recipe 'fp8'"):
        FallbackInt8Precision("fp8")
    for cls in (FallbackInt8Precision, FabricFallbackInt8Precision):
        for patterns in ("lm_head", 5, True):
            with pytest.raises(TypeError, match=r"must be a list of patterns, such as \['lm_head'\]"):
                cls(ignore_modules=patterns)
        for patterns, wrong in (([1], "1"), ([""], "''")):
            with pytest.raises(TypeError, match=f": {wrong} must be a non-empty string"):
                cls(ignore_modules=patterns)


def test_precision_and_plugin_together_is_lightnings_error(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    with pytest.raises(ValueError, match="Received both") as error:
        trainer(tmp_path, plugin=plugin(), precision="bf16-mixed")
    assert "needs the Trainer" not in str(error.value)


def test_wrong_trainer_says_which_import(tmp_path):
    legacy = pytest.importorskip("pytorch_lightning")
    with pytest.raises(Exception, match=r"needs the Trainer of `from lightning\.pytorch import Trainer`"):
        legacy.Trainer(plugins=plugin(), accelerator="cpu", default_root_dir=tmp_path)


def test_fabric_given_the_trainer_plugin_says_which_class():
    from lightning.fabric import Fabric

    fabric = Fabric(plugins=plugin(), accelerator="cpu", devices=1)
    with pytest.raises(TypeError, match=r"lightning_int8\.FabricFallbackInt8Precision"):
        fabric.setup(nn.Sequential(nn.Linear(16, 16)))
    with pytest.raises(TypeError, match=r"lightning_int8\.FabricFallbackInt8Precision"):
        fabric.setup(TinyModule())


def test_deepspeed_is_refused_by_name(tmp_path):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    # DeepSpeed itself is not installed where the tests run; the plugin goes by the strategy's class name.
    strategy = type("DeepSpeedStrategy", (SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    with pytest.raises(TypeError, match="cannot be used with DeepSpeed"):
        trainer(tmp_path, plugin=plugin(), strategy=strategy, devices="auto").fit(TinyModule())


def test_nothing_to_convert_stops_the_run(tmp_path):
    class NoLinear(TinyModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Conv1d(4, 4, 1)

    with pytest.raises(ValueError, match="Nothing to convert to INT8 in NoLinear"):
        trainer(tmp_path, plugin=plugin()).fit(NoLinear())
    with pytest.raises(ValueError, match=r"the pattern 'lm_hed' matches no module\. Names like it: lm_head"):
        trainer(tmp_path, plugin=plugin(ignore_modules=["lm_hed"])).fit(TinyModule())


def test_layers_made_in_configure_model_are_converted(tmp_path):
    class Late(TinyModule):
        def __init__(self):
            super().__init__()
            self.late = None

        def configure_model(self):
            if self.late is None:
                self.late = nn.Linear(4, 4)

    model = Late()
    trainer(tmp_path, plugin=plugin()).fit(model)
    assert isinstance(model.late, Int8Linear)


def test_the_summary_is_logged_once(tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    model = TinyModule()
    run = trainer(tmp_path, plugin=plugin())
    with caplog.at_level("INFO", logger="lightning.fabric"), caplog.at_level("INFO", logger="lightning.pytorch"):
        run.fit(model)
        run.validate(model, verbose=False)
    printed = capsys.readouterr()
    assert printed.out.count("INT8 linear layers, recipe") == 1
    assert "model.lm_head" in printed.out


def test_state_before_any_fit_is_empty():
    state = plugin().state_dict()
    assert state.pop("recipe_fields")["block_size"] == RECIPE.block_size
    assert state == {"recipe": RECIPE.describe(), "thresholds": {}}


class ShardedModule(TinyModule):
    """As FSDP2's users write it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.model, FSDPModule):
            for layer in self.model.layers:
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


@pytest.fixture
def _process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.usefixtures("_process_group")
@pytest.mark.parametrize(
    ("strategy", "precision", "scaler"),
    [
        ("auto", "bf16-mixed", None),
        ("auto", "bf16-true", None),
        ("auto", "16-mixed", "GradScaler"),
        ("fsdp", "bf16-mixed", None),
        ("fsdp", "16-mixed", "ShardedGradScaler"),
        ("fsdp2", "bf16-mixed", None),
    ],
)
def test_on_a_gpu(tmp_path, strategy, precision, scaler):
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    from tests.tiny import Block

    model = ShardedModule(steps=8) if strategy == "fsdp2" else TinyModule(steps=8)
    strategies = {
        "auto": lambda: "auto",
        "fsdp": lambda: FSDPStrategy(auto_wrap_policy={Block}),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
    }

    class Devices(Callback):
        def on_train_end(self, trainer, pl_module):
            self.types = {table.device.type for table in thresholds(pl_module).values()}

    own, devices = plugin(recipe=GPU_RECIPE, precision=precision), Devices()
    options = {"accelerator": "gpu", "strategy": strategies[strategy](), "callbacks": [devices]}
    run = trainer(tmp_path, plugin=own, gradient_clip_val=1.0, **options)
    run.fit(model)
    assert (type(own.scaler).__name__ if own.scaler else None) == scaler
    assert model.losses[-1] < model.losses[0]
    assert devices.types == {"cuda"}
    run.validate(model, verbose=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("_process_group")
def test_fsdp2_with_16_mixed_is_refused(tmp_path):
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    own = plugin(recipe=GPU_RECIPE, precision="16-mixed")
    run = trainer(tmp_path, plugin=own, accelerator="gpu", strategy=strategy)
    with pytest.raises(ValueError, match="cannot scale the gradients of DTensor parameters"):
        run.fit(ShardedModule())


@pytest.mark.gpu
def test_blocks_without_a_kernel_are_refused_before_training(tmp_path):
    model = TinyModule()
    with pytest.raises(ValueError, match=r"block_size=16 has no kernel on cuda:0.*32, 64, 128\."):
        trainer(tmp_path, plugin=plugin(), accelerator="gpu").fit(model)
    assert model.losses == []
    # Fabric's plugin is not told where the model will go.
    own = FabricFallbackInt8Precision(RECIPE)
    with pytest.raises(ValueError, match="block_size=16 has no kernel on cuda:0"):
        Fabric(accelerator="gpu", devices=1, plugins=own).setup_module(nn.Linear(64, 64))
