"""The monitor callback in real runs: what it logs, when it waits for the device, what it writes, and resuming."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_int8 import FallbackInt8Precision, FallbackRateMonitor
from lightning_int8.monitor import FallbackRate
from lightning_int8.threshold import RATE
from tests.tiny import RECIPE, TinyModule, thresholds, trainer


def plugin(recipe=RECIPE, **kwargs):
    return FallbackInt8Precision(recipe=recipe, **kwargs)


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_metric_averages_rates_and_ignores_what_was_not_seen():
    metric = FallbackRate(2)
    for rate in (0.25, 0.75):
        metric.update(torch.tensor([[1.0, 0, 0, rate], [2.0, 0, 0, float("nan")]]))
    rates, thresholds = metric.compute()
    assert rates[0] == 0.5
    assert rates[1].isnan()
    assert thresholds.tolist() == [1.0, 2.0]
    metric.reset()
    metric.update(torch.tensor([[3.0, 0, 0, 1.0], [4.0, 0, 0, 0.0]]))
    assert metric.compute().tolist() == [[1.0, 0.0], [3.0, 4.0]]


class Rates(Callback):
    """The layers' rates after each batch, as they are."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(thresholds(pl_module)["model.lm_head"][0, RATE].item())


def test_logged_rates_are_the_means_of_the_steps_between(tmp_path):
    logger, rates = CSVLogger(tmp_path, name="run", version=0), Rates()
    monitor = FallbackRateMonitor(every_n_steps=3)
    model = TinyModule(steps=8)
    trainer(tmp_path, plugin=plugin(), logger=logger, callbacks=[rates, monitor]).fit(model)
    assert monitor.steps == [3, 6, 8]
    column = monitor.labels.index(("model.lm_head", "x"))
    expected = [sum(rates.seen[a:b]) / (b - a) for a, b in ((0, 3), (3, 6), (6, 8))]
    assert monitor.rates[:, column].tolist() == pytest.approx(expected)

    key = "fallback_rate/model.lm_head/x"
    logged = [row for row in read(tmp_path / "run/version_0/metrics.csv") if row.get(key)]
    assert [float(row[key]) for row in logged] == pytest.approx(expected)
    assert all(float(row["fallback_threshold/model.lm_head/x"]) > 0 for row in logged)
    assert float(logged[-1]["fallback_rate/mean"]) == pytest.approx(monitor.rates[-1].nanmean().item())

    written = read(tmp_path / "run/version_0/fallback_rate.csv")
    # The model's input needs no gradient, so its first layer runs no dgrad.
    assert len(written) == 3 * (len(monitor.labels) - 1)
    assert not any((r["layer"], r["operand"]) == ("model.layers.0.up_proj", "dy_dgrad") for r in written)
    of_head = [float(r["rate"]) for r in written if (r["layer"], r["operand"]) == ("model.lm_head", "x")]
    assert of_head == pytest.approx(expected, rel=1e-4)
    picture = (tmp_path / "run/version_0/fallback_rate.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_only_logging_steps_read_from_the_device(tmp_path, monkeypatch):
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
                Reads.count += 1
            return func(*args, **(kwargs or {}))

    per_step = []

    class Counting(FallbackRateMonitor):
        def on_train_batch_end(self, *args):
            Reads.count = 0
            with Reads():
                super().on_train_batch_end(*args)
            per_step.append((Reads.count, len(self.steps)))

    trainer(tmp_path, plugin=plugin(), callbacks=[Counting(every_n_steps=4)]).fit(TinyModule(steps=4))
    assert [count for count, _ in per_step[:3]] == [0, 0, 0]
    assert per_step[3][0] > 0
    assert [entries for _, entries in per_step] == [0, 0, 0, 1]


def test_without_a_logger_files_go_to_the_root_or_dirpath(tmp_path):
    trainer(tmp_path / "root", plugin=plugin(), callbacks=[FallbackRateMonitor()]).fit(TinyModule())
    assert (tmp_path / "root/fallback_rate.csv").exists()
    monitor = FallbackRateMonitor(dirpath=str(tmp_path / "there"))
    trainer(tmp_path / "root2", plugin=plugin(), callbacks=[monitor]).fit(TinyModule())
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["fallback_rate.csv", "fallback_rate.png"]
    assert 0 < monitor.mean_rate < 1


def test_an_interrupted_evaluation_leaves_what_was_seen(tmp_path):
    class Interrupted(TinyModule):
        def validation_step(self, batch, batch_index):
            if not self.trainer.sanity_checking:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, plugin=plugin(), callbacks=[FallbackRateMonitor(every_n_steps=1)]).fit(Interrupted())
    assert (tmp_path / "fallback_rate.csv").exists()


def test_several_loggers_and_accumulation(tmp_path):
    loggers = [CSVLogger(tmp_path, name="a"), TensorBoardLogger(tmp_path, name="b")]
    monitor = FallbackRateMonitor(every_n_steps=1)
    run = trainer(tmp_path, plugin=plugin(), logger=loggers, callbacks=[monitor], accumulate_grad_batches=2)
    run.fit(TinyModule(steps=6))
    assert monitor.steps == [1, 2, 3]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(loggers[1].log_dir)
    events.Reload()
    assert len(events.Scalars("fallback_rate/model.lm_head/x")) == 3


def test_history_and_open_window_resume_from_a_checkpoint(tmp_path):
    whole = FallbackRateMonitor(every_n_steps=4)
    trainer(tmp_path / "whole", plugin=plugin(), callbacks=[whole], max_epochs=2).fit(TinyModule(steps=6))

    class Stop(Exception):
        pass

    class Killed(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise Stop

    keep = ModelCheckpoint(tmp_path, filename="one", every_n_epochs=1)
    callbacks = [FallbackRateMonitor(every_n_steps=4), Killed(), keep]
    run = trainer(tmp_path / "first", plugin=plugin(), enable_checkpointing=True, callbacks=callbacks, max_epochs=2)
    with pytest.raises(Stop):
        run.fit(TinyModule(steps=6))
    # What there was is not lost with the run.
    assert (tmp_path / "first/fallback_rate.csv").exists()

    torch.load(tmp_path / "one.ckpt", weights_only=True)
    resumed = FallbackRateMonitor(every_n_steps=4)
    run = trainer(tmp_path / "second", plugin=plugin(), callbacks=[resumed], max_epochs=2)
    run.fit(TinyModule(steps=6), ckpt_path=tmp_path / "one.ckpt")
    assert resumed.steps == whole.steps == [4, 8, 12]
    torch.testing.assert_close(resumed.rates, whole.rates, equal_nan=True)
    torch.testing.assert_close(resumed.thresholds, whole.thresholds, equal_nan=True)


def test_table_shows_the_extremes(tmp_path, capsys):
    monitor = FallbackRateMonitor()
    trainer(tmp_path, plugin=plugin(), callbacks=[monitor]).fit(TinyModule())
    assert "Fallback rates: extremes" in capsys.readouterr().out
    assert monitor.table(count=2).row_count == 4
    assert monitor.table(count=100).row_count == int(monitor.rates.isfinite().any(0).sum())


def test_errors_and_recipes_without_fallback(tmp_path):
    with pytest.raises(ValueError, match=r"every_n_steps=0\) must be an integer of at least 1"):
        FallbackRateMonitor(0)
    with pytest.raises(ValueError, match="TinyModule has no INT8 layers"):
        trainer(tmp_path, plugin=None, callbacks=[FallbackRateMonitor()]).fit(TinyModule())
    monitor = FallbackRateMonitor(1, dirpath=str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="no block fallback"):
        trainer(tmp_path, plugin=plugin("rowwise"), callbacks=[monitor]).fit(TinyModule())
    assert not (tmp_path / "none").exists()
    assert math.isnan(monitor.mean_rate)
